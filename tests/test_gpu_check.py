"""``scripts/gpu_check.sh`` in a bundle whose programs are stand-ins: what it needs of a machine, in one line, and the order of what it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bundles are for Linux")


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle for compute capability 9.0; its programs fail where there is no fake device."""
    root = tmp_path / "pyheadkv-gpu"
    for folder in ("scripts", "lib", "stock", "bin"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "gpu_check.sh", root / "scripts")
    for name, text in (("ARCH", "90"), ("TOOLKIT", "13"), ("COMMIT", "abc1234")):
        (root / name).write_text(text + "\n")
    script(root / "lib" / "test-headkv-ops", 'echo "0 of 7 cases failed"')
    script(root / "lib" / "bench_device", 'if [ "$1" = devices ]; then [ -n "$FAKE_GPU" ] || exit 3; echo "CUDA0: fake"; fi')
    script(root / "bin" / "nvidia-smi", 'case "$*" in *compute_cap*) echo "$FAKE_GPU" ;; *) echo "no devices were found" ;; esac')
    # a python that has numpy and runs no tests
    script(root / "bin" / "python3", 'case "$*" in *pytest*) echo "1 passed" ;; *) exec "$REAL_PYTHON" "$@" ;; esac')
    make_library(root / "lib" / "libggml-cuda.so")
    return root


def make_library(path: Path, *, needs: Path | None = None) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    more = [] if needs is None else ["-Wl,--no-as-needed", str(needs)]
    command = ["gcc", "-shared", "-o", str(path), "-x", "c", "/dev/null", "-x", "none", *more, f"-Wl,-soname,{path.name}"]
    subprocess.run(command, check=True)


def check(bundle: Path, backend: str = "cuda", gpu: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{bundle / 'bin'}:{os.environ['PATH']}", "GPU_CHECK_BACKEND": backend, "FAKE_GPU": gpu}
    env |= {"REAL_PYTHON": sys.executable, "GPU_CHECK_BENCH": "small", "LD_LIBRARY_PATH": ""}
    env.pop("PYTHON", None)
    return subprocess.run(["sh", "scripts/gpu_check.sh", "run", "out"], cwd=bundle, env=env, capture_output=True, text=True)


def test_no_device_is_one_line_and_no_pass(bundle: Path) -> None:
    res = check(bundle)
    assert res.returncode == 3 and len(res.stderr.splitlines()) == 1
    assert "no cuda device; nvidia-smi lists: no devices were found. Run this on a machine with such a GPU and its driver" in res.stderr
    assert not (bundle / "out" / "summary.txt").exists()


def test_a_library_of_the_toolkit_that_is_missing_is_named(bundle: Path) -> None:
    needed = bundle / "lib" / "libcublas.so.99"
    make_library(needed)
    make_library(bundle / "lib" / "libggml-cuda.so", needs=needed)
    needed.unlink()
    res = check(bundle, gpu="9.0")
    assert res.returncode == 3 and len(res.stderr.splitlines()) == 1
    assert "missing: libcublas.so.99 - install the runtime and cuBLAS of CUDA 13" in res.stderr and "CUDA_LIB=DIR" in res.stderr


def test_a_gpu_of_another_kind_is_refused(bundle: Path) -> None:
    res = check(bundle, gpu="8.6")
    assert res.returncode == 3 and "has compute capability 86, this bundle is for 90" in res.stderr


def test_a_bundle_without_cuda_is_for_the_rehearsal(bundle: Path) -> None:
    (bundle / "lib" / "libggml-cuda.so").unlink()
    (bundle / "ARCH").unlink()
    res = check(bundle, gpu="9.0")
    assert res.returncode == 3 and "have no CUDA" in res.stderr and "GPU_CHECK_BACKEND=cpu" in res.stderr


def test_what_is_worth_most_comes_first_and_nothing_runs_twice(bundle: Path) -> None:
    res = check(bundle, gpu="9.0")
    assert res.returncode == 0, res.stdout + res.stderr
    lines = (bundle / "out" / "summary.txt").read_text().splitlines()
    ran = [line.split(":")[0] for line in lines]
    assert ran[:7] == ["ops_device", "test_engine", "test_attention", "bench_same", "bench_decode_q4_0", "bench_decode_f16", "bench_prompt"]
    assert ran[-1] == "ops" and all("exit code 0" in line for line in lines)
    assert (bundle / "out.tar.gz").is_file()
    assert check(bundle, gpu="9.0").returncode == 0
    assert (bundle / "out" / "summary.txt").read_text().splitlines() == lines


def test_a_part_that_fails_is_the_exit_code_and_the_others_run(bundle: Path) -> None:
    script(bundle / "lib" / "test-headkv-ops", 'echo "3 of 7 cases failed"; exit 1')
    res = check(bundle, gpu="9.0")
    assert res.returncode == 1 and "ops_device: exit code 1" in res.stdout and "bench_prompt: exit code 0" in res.stdout
