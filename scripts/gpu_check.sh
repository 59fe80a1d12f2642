#!/bin/sh
# Builds, tests and measures on a machine with a GPU: without a network from an unpacked bundle (make_gpu_bundle.sh), or in a checkout.
#
#   scripts/gpu_check.sh build|test|bench [OUT]     OUT: folder for logs and CSV (default: gpu_check_out)
#   scripts/gpu_check.sh all [OUT]                  the three of them, as long as they take
#   GPU_CHECK_BACKEND=metal scripts/gpu_check.sh all   on a Mac, in a checkout; OUT is all that there is to send
#
# Each call of a part ends within ten minutes. Exit code 75: there is more of this part, call it again.
# Needs cmake >= 3.21, ninja, a C++17 compiler, Python >= 3.10 with numpy, and the CUDA toolkit; in a checkout only what make needs.
#   GPU_CHECK_BACKEND=cuda|metal|vulkan|cpu   what to build (default: cuda); cpu is a rehearsal without a GPU
#   GPU_CHECK_SECONDS=570               time of one call
#   GPU_CHECK_BENCH=full|small          small: the 1B shape at 2048 tokens, for the rehearsal (default: full, small for cpu)
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
    for part in build test bench; do
        code=75
        while [ $code -eq 75 ]; do
            code=0
            "$0" $part "$out" || code=$?
        done
        [ $code -eq 0 ] || echo "$part: exit code $code"
        if [ $part = build ] && [ $code -ne 0 ]; then
            exit $code
        fi
    done
    exit $code
fi

case $backend in
    cuda)   define="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native"; device=cuda0 ;;
    metal)  define="-DGGML_METAL=ON -DGGML_METAL_EMBED_LIBRARY=ON"; device=mtl0
            [ "$(uname)" = Darwin ] || { echo "GPU_CHECK_BACKEND is metal: only macOS has it, this is $(uname)" >&2; exit 2; } ;;
    vulkan) define=-DGGML_VULKAN=ON; device=vulkan0 ;;
    cpu)    define=; device=cpu ;;
    *)      echo "GPU_CHECK_BACKEND is $backend: use cuda, metal, vulkan or cpu" >&2; exit 2 ;;
esac
build=$root/build/gpu-$backend

# a checkout: what make installs, and the sources that it patches
tree=$root/llama.cpp
if [ ! -d "$tree" ]; then
    tree=$root/build/llama/llama.cpp
    [ -n "${PYTHON:-}" ] || python=$root/.venv/bin/python
    PATH=$root/.venv/bin:$PATH
    if [ "$part" = build ]; then
        make all > "$out/make.log" 2>&1 || { echo "make: see $out/make.log" >&2; exit 1; }
    fi
fi

export PYHEADKV_LIB_PATH="$build/bin"
export PYTHONPATH="$root"
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

# more NAME COMMAND..: log in OUT/NAME.log; a part that is done is not done again, one that runs out of time is
failed=0
more() {
    name=$1; shift
    if [ -e "$out/$name.done" ]; then
        return
    fi
    if [ "$(left)" -lt 20 ]; then
        echo "more to do: call $part again"; exit 75
    fi
    code=0
    limit "$(left)" "$@" > "$out/$name.log" 2>&1 || code=$?
    if [ $code -eq 124 ]; then
        echo "$name: out of time, call $part again"; exit 75
    fi
    [ $code -eq 0 ] && touch "$out/$name.done" || failed=1
    echo "$name: exit code $code, $(tail -n 1 "$out/$name.log" | cut -c1-150)"
}

case $part in
build)
    for command in "cat COMMIT" "git rev-parse HEAD" "uname -a" nvidia-smi "nvcc --version" sw_vers "xcrun --show-sdk-version" \
        "system_profiler SPHardwareDataType SPDisplaysDataType" "cmake --version" "$python --version"; do
        $command 2> /dev/null || true
    done > "$out/machine.txt"
    # shellcheck disable=SC2086
    more configure cmake -G Ninja -S . -B "$build" $define -DCMAKE_BUILD_TYPE=Release -DPYHEADKV_LLAMA_CPP_DIR="$tree" \
        -DPYHEADKV_SERVER=OFF -DPYHEADKV_TESTS=ON
    [ $failed -eq 0 ] || exit 1
    more build cmake --build "$build" --parallel "$jobs" --target pyheadkv-libs pyheadkv-tests
    ;;
test)
    more ops "$build/bin/test-headkv-ops"
    if [ $backend != cpu ]; then
        more ops_device "$build/bin/test-headkv-ops" device
    fi
    if [ $backend = cuda ] && command -v compute-sanitizer > /dev/null; then
        more ops_sanitizer compute-sanitizer --error-exitcode 9 "$build/bin/test-headkv-ops" device
    fi
    if [ $backend = metal ]; then
        # Apple's own checks of addresses and of what is encoded
        more ops_validation env MTL_DEBUG_LAYER=1 MTL_SHADER_VALIDATION=1 "$build/bin/test-headkv-ops" device
    fi
    for file in attention engine policies prefill_layer sequences policy_oracle; do
        more "test_$file" "$python" -m pytest -q -p no:cacheprovider "tests/test_$file.py" --device $device
    done
    ;;
bench)
    run() { name=$1; shift; more "bench_$name" "$python" bench/bench_decode.py --device $device --out "$out/$name.csv" "$@"; }
    size=${GPU_CHECK_BENCH:-$([ $backend = cpu ] && echo small || echo full)}
    if [ "$size" = small ]; then
        run decode_1b_2k --prompt 2048 --generated 128 --rounds 2 --uncompressed --prefill
    else
        # a Mac of 16 GiB holds no other
        ftypes="q4_0 f16 q8_0"; prompts="8192 32768 131072"; generated=f16
        [ $backend != metal ] || { ftypes=q4_0; prompts="8192 32768"; generated=q4_0; }
        for ftype in $ftypes; do
            for prompt in $prompts; do
                for kv_size in 128 1024; do
                    run "decode_8b_${ftype}_${prompt}_${kv_size}" --shape llama-3.1-8b --ftype $ftype --prompt $prompt --kv-size $kv_size --rounds 5
                done
            done
            run "decode_8b_${ftype}_composed" --shape llama-3.1-8b --ftype $ftype --prompt 32768 --attend composed --rounds 5
        done
        run decode_8b_q8kv      --shape llama-3.1-8b --ftype q4_0 --prompt 32768 --type-kv 8 --rounds 5
        run decode_8b_whole     --shape llama-3.1-8b --ftype q4_0 --prompt 32768 --uncompressed --rounds 5
        run decode_8b_generated --shape llama-3.1-8b --ftype $generated --prompt 8192 --generated 1024 --rounds 5
        run prefill_8b          --shape llama-3.1-8b --ftype q4_0 --prompt 32768 --prefill --rounds 3
    fi
    ;;
*)
    echo "usage: $0 build|test|bench [OUT]" >&2; exit 2 ;;
esac
exit $failed
