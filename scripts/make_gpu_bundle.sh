#!/bin/sh
# Packs what a machine with a GPU needs to build, test and measure without a network: the patched sources without
# documents and models, our sources, tests and benchmarks, the embedded model, and the Python packages that are plain Python.
#
#   scripts/make_gpu_bundle.sh [OUT.tar.gz]      after make, or with build/llama/llama.cpp and a .venv from elsewhere
#
# On the other machine: tar xzf OUT.tar.gz && cd pyheadkv-gpu && scripts/gpu_check.sh build, then test, then bench.
set -eu
cd "$(dirname "$0")/.."
out=${1:-build/pyheadkv-gpu.tar.gz}
tree=build/llama/llama.cpp
python=${PYTHON:-.venv/bin/python}
limit=$((60*1024*1024))

[ -d "$tree/ggml" ] || { echo "no patched sources in $tree: run make first" >&2; exit 1; }
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
root=$stage/pyheadkv-gpu
mkdir -p "$root/llama.cpp" "$root/python"

(cd "$tree" && tar cf - CMakeLists.txt LICENSE cmake ggml include src vendor) | tar xf - -C "$root/llama.cpp"
tar cf - --exclude=__pycache__ --exclude='*.pyc' --exclude=lib CMakeLists.txt LICENSE pyproject.toml cpp patches pyheadkv tests scripts/gpu_check.sh bench/*.py \
    | tar xf - -C "$root"
git rev-parse --short HEAD > "$root/COMMIT" 2>/dev/null || echo "?" > "$root/COMMIT"

# plain Python, used where the machine has no package of that name
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for name in llama_cpp diskcache gguf jinja2 markupsafe platformdirs tqdm yaml pytest _pytest pluggy iniconfig packaging pygments typing_extensions.py; do
    [ -e "$site/$name" ] || { echo "no Python package $name in $site" >&2; exit 1; }
    (cd "$site" && tar cf - --exclude=__pycache__ --exclude='*.so' --exclude='*.so.*' --exclude=lib "$name") | tar xf - -C "$root/python"
done

mkdir -p "$(dirname "$out")"
tar czf "$out" -C "$stage" pyheadkv-gpu
size=$(wc -c < "$out")
echo "$out: $((size/1024/1024)) MiB"
[ "$size" -lt "$limit" ] || { echo "$out has $size bytes, the limit is $limit: leave more out" >&2; exit 1; }
