"""The source distribution has all that a build needs and asks no network for more: made and configured where there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SDIST = ROOT / "build" / "llama.sdist"  # where make notes which sources of llama-cpp-python it took


def offline(command: list[str], cwd: Path) -> None:
    done = subprocess.run(["unshare", "-rn", *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_the_sdist_is_made_and_configured_without_a_network(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode != 0:
        pytest.skip("no network namespaces here")
    if not SDIST.is_file() or not Path(SDIST.read_text().strip()).is_file():
        pytest.skip("no sources of llama-cpp-python: run make")
    cmake = Path(sys.executable).with_name("cmake")
    if not cmake.is_file():
        pytest.skip("no cmake beside Python: run make")
    make = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"
    offline([sys.executable, "-c", make, str(tmp_path)], ROOT)
    with tarfile.open(next(tmp_path.glob("pyheadkv-*.tar.gz"))) as tar:
        tar.extractall(tmp_path)
    source = next(path for path in tmp_path.iterdir() if path.is_dir())
    shutil.copy(Path(SDIST.read_text().strip()), tmp_path)
    given = next(tmp_path.glob("llama_cpp_python-*.tar.gz"))
    options = [f"-DPYHEADKV_LLAMA_CPP_SDIST={given}", f"-DPython_EXECUTABLE={sys.executable}"]
    offline([str(cmake), "-G", "Ninja", "-S", str(source), "-B", str(tmp_path / "build"), *options], tmp_path)
    assert (tmp_path / "build" / "llama" / "llama.cpp" / "src").is_dir()
    # and the Python of the package is all there
    files = {path.relative_to(ROOT / "pyheadkv") for path in (ROOT / "pyheadkv").rglob("*.py")}
    assert files == {path.relative_to(source / "pyheadkv") for path in (source / "pyheadkv").rglob("*.py")}
