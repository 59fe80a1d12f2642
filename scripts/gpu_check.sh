#!/bin/sh
# Tests and measures on a machine with a GPU: without a network and without a compiler from an unpacked bundle (make_gpu_bundle.sh), or in a
# checkout, where it builds first.
#
#   scripts/gpu_check.sh run [OUT]                  what is worth most comes first; OUT: folder for logs and CSV (default: gpu_check_out)
#   scripts/gpu_check.sh build [OUT]                before it, in a checkout or a bundle of sources
#   scripts/gpu_check.sh all [OUT]                  both, as long as they take
#   GPU_CHECK_BACKEND=metal scripts/gpu_check.sh all   on a Mac, in a checkout
#
# Each call of build and run ends within ten minutes. Exit code 75: there is more of this part, call it again. OUT.tar.gz is all there is to send.
# Needs Python >= 3.10 with numpy and a driver; build also cmake >= 3.21, ninja, a C++17 compiler and the CUDA toolkit, in a checkout
# only what make needs.
#   GPU_CHECK_BACKEND=cuda|metal|vulkan|cpu   (default: cuda); cpu is a rehearsal without a GPU
#   GPU_CHECK_SECONDS=570               time of one call
#   GPU_CHECK_BENCH=full|small          small: a model of a few MB and short prompts, for the rehearsal (default: full, small for cpu)
#   CUDA_LIB=DIR                        where libcudart and libcublas are, if they are not found
set -eu
cd "$(dirname "$0")/.."
root=$PWD
part=${1:-}
out=${2:-$root/gpu_check_out}
mkdir -p "$out"
out=$(cd "$out" && pwd)
backend=${GPU_CHECK_BACKEND:-cuda}
seconds=${GPU_CHECK_SECONDS:-570}
start=$(date +%s)
jobs=${GPU_CHECK_JOBS:-$(getconf _NPROCESSORS_ONLN)}
python=${PYTHON:-python3}

if [ "$part" = all ]; then
    for part in build run; do
        code=75
        while [ $code -eq 75 ]; do
            code=0
            "$0" $part "$out" || code=$?
        done
        [ $code -eq 0 ] || { echo "$part: exit code $code"; exit $code; }
    done
    exit 0
fi

case $backend in
    cuda)   define="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native"; device=cuda0 ;;
    metal)  define="-DGGML_METAL=ON -DGGML_METAL_EMBED_LIBRARY=ON"; device=mtl0
            [ "$(uname)" = Darwin ] || { echo "GPU_CHECK_BACKEND is metal: only macOS has it, this is $(uname)" >&2; exit 2; } ;;
    vulkan) define=-DGGML_VULKAN=ON; device=vulkan0 ;;
    cpu)    define=; device=cpu ;;
    *)      echo "GPU_CHECK_BACKEND is $backend: use cuda, metal, vulkan or cpu" >&2; exit 2 ;;
esac

# a bundle of libraries; else a build, in a checkout of what make installs and of the sources that it patches
bin=$root/lib
stock=$root/stock
if [ ! -d "$root/stock" ]; then
    bin=$root/build/gpu-$backend/bin
    stock=$root/build/stock/bin
    tree=$root/llama.cpp
    if [ ! -d "$tree" ]; then
        tree=$root/build/llama/llama.cpp
        [ -n "${PYTHON:-}" ] || python=$root/.venv/bin/python
        PATH=$root/.venv/bin:$PATH
        if [ "$part" = build ]; then
            make all stock > "$out/make.log" 2>&1 || { echo "make: see $out/make.log" >&2; exit 1; }
        fi
    fi
elif [ "$part" = build ]; then
    echo "nothing to build: this bundle has libraries"
    exit 0
fi
commit=$(cat COMMIT 2> /dev/null || git describe --always --dirty)

export PYHEADKV_LIB_PATH="$bin"
left() { echo $((seconds - $(date +%s) + start)); }

# macOS has no timeout
limit() {
    if command -v timeout > /dev/null; then
        timeout "$@"
    else
        "$python" -c 'import subprocess, sys
try:
    sys.exit(subprocess.run(sys.argv[2:], timeout=float(sys.argv[1])).returncode)
except subprocess.TimeoutExpired:
    sys.exit(124)' "$@"
    fi
}

# packages of the bundle only where the machine has none of that name
for package in "$root"/python/*; do
    [ -e "$package" ] || continue
    name=$(basename "$package" .py)
    if ! (cd / && PYTHONPATH= "$python" -c "import $name") 2> /dev/null; then
        mkdir -p "$root/build/python"
        ln -sfn "$package" "$root/build/python/$(basename "$package")"
    fi
done
export PYTHONPATH="$root:$root/build/python"

# what a bundle of libraries needs of the machine, or one line that says what is missing
refuse() {
    echo "gpu_check.sh: $1" | tee "$out/refused.txt" >&2
    exit 3
}
find_toolkit() {
    for dir in ${CUDA_LIB:-} /usr/local/cuda/lib64 /usr/local/cuda/targets/x86_64-linux/lib \
        $("$python" -c 'import nvidia, pathlib
for place in nvidia.__path__:
    print(*sorted({str(p.parent) for p in pathlib.Path(place).rglob("lib*.so.*")}))' 2> /dev/null || true); do
        LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$dir
    done
    export LD_LIBRARY_PATH
    if [ ! -e "$root/ARCH" ]; then
        return
    fi
    missing=$(ldd "$bin/libggml-cuda.so" 2>&1 | grep 'not found' | sed 's/^[[:space:]]*//; s/ (required.*//; s/ => not found//' | sort -u | tr '\n' ' ')
    [ -z "$missing" ] || refuse "the libraries of this bundle do not load here, missing: ${missing}- install the runtime and cuBLAS of CUDA $(cat TOOLKIT) \
(pip install nvidia-cuda-runtime nvidia-cublas), or name their folder with CUDA_LIB=DIR"
}
check_machine() {
    rm -f "$out/refused.txt"
    "$python" -c 'import sys; assert sys.version_info >= (3, 10); import numpy' 2> /dev/null || refuse "$python is no Python >= 3.10 with numpy: name one with PYTHON=.."
    if [ "$backend" = cuda ] || [ -e "$root/ARCH" ]; then
        find_toolkit
    fi
    if [ "$backend" = cuda ] && [ ! -e "$bin/libggml-cuda.so" ]; then
        refuse "the libraries in $bin have no CUDA: make a bundle on a machine with nvcc, or rehearse with GPU_CHECK_BACKEND=cpu"
    fi
    if [ "$backend" = cpu ]; then
        return
    fi
    "$bin/bench_device" devices > "$out/devices.txt" 2> "$out/devices.log" || {
        driver="there is no nvidia-smi"
        ! command -v nvidia-smi > /dev/null || driver="nvidia-smi lists: $(nvidia-smi -L 2>&1 | head -n 1 || true)"
        [ "$backend" = cuda ] || driver="see $out/devices.log"
        refuse "no $backend device; $driver. Run this on a machine with such a GPU and its driver, or with GPU_CHECK_BACKEND=cpu for a rehearsal"
    }
    if [ "$backend" = cuda ] && [ -e "$root/ARCH" ]; then
        has=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader -i 0 | tr -d '.')
        [ "$has" = "$(cat ARCH)" ] || refuse "the GPU has compute capability $has, this bundle is for $(cat ARCH): make one with GPU_ARCH=$has scripts/make_gpu_bundle.sh"
    fi
}

# more NAME COMMAND..: log in OUT/NAME.log; a part that is done is not done again, one that runs out of time is
failed=0
pack() { tar czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"; }
more() {
    name=$1; shift
    if [ -e "$out/$name.done" ]; then
        return
    fi
    if [ "$(left)" -lt 20 ]; then
        pack; echo "more to do: call $part again"; exit 75
    fi
    began=$(date +%s)
    code=0
    limit "$(left)" "$@" > "$out/$name.log" 2>&1 || code=$?
    if [ $code -eq 124 ]; then
        pack; echo "$name: out of time, call $part again"; exit 75
    fi
    [ $code -eq 0 ] && touch "$out/$name.done" || failed=1
    echo "$name: exit code $code, $(($(date +%s) - began)) s, $(tail -n 1 "$out/$name.log" | cut -c1-150)" | tee -a "$out/summary.txt"
}

case $part in
build)
    # shellcheck disable=SC2086
    more configure cmake -G Ninja -S . -B "$root/build/gpu-$backend" $define -DCMAKE_BUILD_TYPE=Release -DPYHEADKV_LLAMA_CPP_DIR="$tree" \
        -DPYHEADKV_SERVER=OFF -DPYHEADKV_TESTS=ON
    [ $failed -eq 0 ] || exit 1
    more build cmake --build "$root/build/gpu-$backend" --parallel "$jobs" --target pyheadkv-libs pyheadkv-tests
    ;;
run)
    [ -e "$bin/test-headkv-ops" ] || { echo "gpu_check.sh: no $bin/test-headkv-ops: call build first" >&2; exit 2; }
    check_machine
    for command in "echo $commit" "uname -a" nvidia-smi "nvcc --version" sw_vers "xcrun --show-sdk-version" \
        "system_profiler SPHardwareDataType SPDisplaysDataType" "$python --version" "cat $out/devices.txt"; do
        $command 2> /dev/null || true
    done > "$out/machine.txt"

    test_file() { more "test_$1" "$python" -m pytest -q -p no:cacheprovider "tests/test_$1.py" --device $device; }
    size=${GPU_CHECK_BENCH:-$([ $backend = cpu ] && echo small || echo full)}
    bench() {
        name=$1; shift
        if [ "$size" = small ]; then
            set -- "$1" shape=tiny ftype=f16 prompt=1024 rounds=3
        fi
        [ $backend != cpu ] || set -- "$@" device=CPU threads="$jobs"
        more "bench_$name" "$bin/bench_device" "$@" commit="$commit" stock="$stock" out="$out/$name.csv"
    }
    # a Mac of 16 GiB holds no 8B shape in f16
    f16=f16; [ $backend != metal ] || f16=q8_0

    # seconds: do the kernels compute what they should
    if [ $backend = cpu ]; then
        more ops "$bin/test-headkv-ops"
    else
        more ops_device "$bin/test-headkv-ops" device
    fi
    # the engine on it
    test_file engine
    test_file attention
    # speed, what is asked first comes first
    if [ -e "$stock" ]; then
        bench same        same   prompt=2048
    else
        echo "bench_same: left out, there are no unpatched libraries in $stock" | tee -a "$out/summary.txt"
    fi
    bench decode_q4_0     decode prompt=32768
    bench decode_$f16     decode prompt=32768 ftype=$f16
    bench prompt          prompt prompt=32768 rounds=3
    # addresses and races
    if [ $backend = cuda ] && command -v compute-sanitizer > /dev/null; then
        more ops_sanitizer compute-sanitizer --error-exitcode 9 "$bin/test-headkv-ops" device
    fi
    if [ $backend = metal ]; then
        # Apple's own checks of addresses and of what is encoded
        more ops_validation env MTL_DEBUG_LAYER=1 MTL_SHADER_VALIDATION=1 "$bin/test-headkv-ops" device
    fi
    # the rest
    for file in policies prefill_layer sequences policy_oracle; do
        test_file $file
    done
    [ $backend = cpu ] || more ops "$bin/test-headkv-ops"
    if [ "$size" = full ]; then
        rest() { name=$1; shift; more "bench_$name" "$python" bench/bench_decode.py --device $device --shape llama-3.1-8b --rounds 5 --out "$out/$name.csv" "$@"; }
        for prompt in 8192 131072; do
            bench decode_q4_0_$prompt decode prompt=$prompt
        done
        bench decode_q4_0_1024  decode prompt=32768 kv_size=1024
        rest composed   --ftype q4_0 --prompt 32768 --attend composed --no-full
        rest q8kv       --ftype q4_0 --prompt 32768 --type-kv 8 --no-full
        rest whole      --ftype q4_0 --prompt 32768 --uncompressed --no-full
        rest generated  --ftype q4_0 --prompt 8192 --generated 1024 --no-full
    fi
    pack
    ;;
*)
    echo "usage: $0 build|run|all [OUT]" >&2; exit 2 ;;
esac
exit $failed
