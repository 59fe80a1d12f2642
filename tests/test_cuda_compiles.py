"""The CUDA sources compile for every architecture that has its own code paths. No GPU is needed.

Needs nvcc and the headers of cuBLAS, which upstream's common.cuh includes: those of a CUDA toolkit or of the package
nvidia-cublas, which the Makefile installs where nvcc is.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHS = (75, 86, 90)


@pytest.fixture(scope="module")
def nvcc() -> list[str]:
    """The compiler with the flags that upstream compiles with, behind ccache where that is there: what it has compiled before is not compiled again."""
    path = shutil.which("nvcc")
    if not path:
        pytest.skip("nvcc is not installed")
    ggml = ROOT / "build" / "llama" / "llama.cpp" / "ggml"
    if not ggml.is_dir():
        pytest.skip("no patched source tree: run make")
    places = [Path(sysconfig.get_paths()["purelib"]) / "nvidia", Path(path).resolve().parents[1], Path("/usr/local/cuda")]
    headers = [h for place in places for h in sorted(place.glob("**/cublas_v2.h"))]
    if not headers:
        pytest.skip("no headers of cuBLAS: pip install nvidia-cublas")
    include = [ggml / "src", ggml / "include", ROOT / "cpp" / "llama", ROOT / "cpp" / "ggml-cuda", headers[0].parent]
    cached = [ccache] if (ccache := shutil.which("ccache")) else []
    flags = ["-std=c++17", "-use_fast_math", "-extended-lambda", "-DGGML_CUDA_USE_GRAPHS", "-t", "3"]
    return [*cached, path, *flags, *(f"-I{p}" for p in include)]


def compile_for(nvcc: list[str], source: Path, out: Path, archs: tuple[int, ...]) -> str:
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    res = subprocess.run([*nvcc, *code, "-c", str(source), "-o", str(out)], capture_output=True, text=True, check=False)
    assert res.returncode == 0, (res.stdout + res.stderr)[-4000:]
    return res.stdout + res.stderr


@pytest.mark.parametrize("source", sorted((ROOT / "cpp" / "ggml-cuda").glob("*.cu")), ids=lambda p: p.name)
def test_our_sources_compile_for_all_architectures(nvcc: list[str], source: Path, tmp_path: Path) -> None:
    assert "warning" not in compile_for(nvcc, source, tmp_path / "out.o", ARCHS)


def test_the_patched_source_of_upstream_compiles(nvcc: list[str], tmp_path: Path) -> None:
    source = ROOT / "build" / "llama" / "llama.cpp" / "ggml" / "src" / "ggml-cuda" / "ggml-cuda.cu"
    assert "headkv_cuda_supports" in source.read_text(), "the tree is not patched"
    compile_for(nvcc, source, tmp_path / "out.o", ARCHS[:1])
