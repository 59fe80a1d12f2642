"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def check_destination(src: Path, dst: Path, *, force: bool) -> None:
    """Refuse an output that is the input, that exists without ``force``, or that cannot be written.

    Raises
    ------
    ValueError : with the remedy
    """
    if dst.exists() and src.exists() and dst.samefile(src):
        raise ValueError(f"output {dst} is the input itself: choose another name")
    if dst.exists() and not force:
        raise ValueError(f"output {dst} exists: pass force=True (--force) to replace it, or choose another name")
    if dst.is_dir() or not dst.parent.is_dir():
        raise ValueError(f"output {dst} is a folder or in a folder that does not exist: choose a file in an existing one")


def replace_file(dst: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create ``dst`` completely or not at all; what a link leads to keeps its mode.

    Raises
    ------
    ValueError : it is a device, a pipe or a folder
    """
    dst = dst.resolve()
    if dst.exists() and not dst.is_file():
        raise ValueError(f"output {dst} is no regular file: choose another name")
    mode = dst.stat().st_mode & 0o777 if dst.exists() else 0o666 & ~_umask()
    handle, temporary = tempfile.mkstemp(dir=dst.parent, prefix=dst.name + ".", suffix=".part")
    try:
        with open(handle, "wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, mode)  # mkstemp makes it private
        os.replace(temporary, dst)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
