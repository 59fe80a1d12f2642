"""A file of JSON lines that a long run appends to and goes on from: its settings, then one line per step that is done.

And what such a run names: checksums of files, the commit and the machine it ran on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

REMEDY = "begin again without --resume, with --force"


class Journal:
    """Steps that are done.

    Parameters
    ----------
    settings : what decides the result; a run goes on only with equal ones
    resume : go on with the file if it exists, else begin it again

    Attributes
    ----------
    entries : one dict per step, in order

    Raises
    ------
    ValueError : the file is damaged or was begun with other settings
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if resume and path.exists():
            self._restore(settings)
        else:
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def _restore(self, settings: dict[str, Any]) -> None:
        begun, self.entries, n_bytes = read_lines(self.path)
        for name, value in json.loads(json.dumps(settings)).items():
            if begun.get(name) != value:
                raise ValueError(f"{self.path} was begun with {name} = {begun.get(name)!r}, not {value!r}: use the same, or {REMEDY}")
        with open(self.path, "r+b") as file:
            file.truncate(n_bytes)

    def append(self, entry: dict[str, Any]) -> None:
        """Add one step and see it on the disk."""
        self.entries.append(entry)
        with open(self.path, "ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Settings, steps, and the bytes they take; a last line without its end is left out.

    Raises
    ------
    ValueError : the file is damaged
    """
    complete = path.read_bytes().split(b"\n")[:-1]
    try:
        header, *entries = (json.loads(line) for line in complete)
        if not all(isinstance(entry, dict) for entry in (header, *entries)):
            raise ValueError("a line is no object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from None
    return header, entries, sum(len(line) + 1 for line in complete)


def sha256(path: str | os.PathLike[str]) -> str:
    """Of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def commit() -> str:
    """Of the checkout that this package runs from, "-dirty" behind it if files other than results differ, or of the bundle; "" if it is installed."""
    root = Path(__file__).resolve().parents[2]
    if (root / "COMMIT").is_file():
        return (root / "COMMIT").read_text().strip()
    if shutil.which("git") is None or not (root / "cpp" / "headkv.h").is_file():
        return ""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False).stdout.strip()

    is_dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results") != ""
    return git("describe", "--always") + "-dirty" * is_dirty


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV of results, which is made with its columns if there is none."""
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def machine() -> str:
    """Name of the processor and the number of usable cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), name)
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {n_cores} cores"
