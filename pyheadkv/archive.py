"""The archive: K and V of prompts as they were read, in a folder or in memory; see ``cpp/headkv.h``."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from os import PathLike, fsencode, fspath
from typing import Any

from . import _lib
from .options import check_choice, check_int, check_text
from .units import ggml_type, parse_bytes

TYPES = ("f16", "bf16", "q8_0", "q4_0")

ArchiveLike = str | PathLike[str] | bool | None


@dataclass(frozen=True)
class ArchiveStats:
    """What the archive of a ``Llama`` did since it was opened.

    Attributes
    ----------
    max_bytes : limit
    n_blocks, bytes : held, as counted when the last prompt was written, of all that share the folder
    n_restored : prompt tokens that came from it
    n_computed : prompt tokens that were read
    bytes_read, bytes_written : of K and V
    seconds_read, seconds_write : the time that took
    n_evicted : blocks that had to make room
    n_damaged : blocks that were removed because they were damaged, or gone while they were read
    n_failed : prompts that could not be written
    """

    max_bytes: int
    n_blocks: int
    bytes: int
    n_restored: int
    n_computed: int
    bytes_read: int
    bytes_written: int
    seconds_read: float
    seconds_write: float
    n_evicted: int
    n_damaged: int
    n_failed: int


@dataclass(frozen=True)
class Block:
    """A block of a folder: K and V of 256 tokens in all layers, or of 64, 128 or 192 at the end of a prompt.

    Attributes
    ----------
    name : of its file, without the suffix
    model : name of the model that it belongs to
    n_tokens : of the prompt, up to its end
    bytes : of the file
    used : when it was last read or written, seconds since 1970
    damaged : why it is no block; empty = it is one, as far as was looked
    """

    name: str
    model: str
    n_tokens: int
    bytes: int
    used: float
    damaged: str


def check_archive(kv_archive: ArchiveLike, kv_archive_size: int | str | None, kv_archive_type: str | None) -> _lib.ArchiveParams | None:
    """The C struct that the three arguments of ``Llama`` describe; None = no archive.

    Raises
    ------
    ValueError
        a wrong value, or a size or a type without an archive
    """
    if kv_archive is None or kv_archive is False:
        for name, value in {"kv_archive_size": kv_archive_size, "kv_archive_type": kv_archive_type}.items():
            if value is not None:
                raise ValueError(f"{name}={value!r}: there is no archive, give kv_archive=a folder, or True = memory")
        return None
    params: _lib.ArchiveParams = _lib.lib.headkv_default_archive_params()
    if kv_archive is not True:
        if not isinstance(kv_archive, (str, PathLike)) or not fspath(kv_archive):
            raise ValueError(f"kv_archive={kv_archive!r}: it must be a folder, or True = memory")
        check_text("kv_archive", str(kv_archive))
        if "\0" in str(kv_archive):
            raise ValueError(f"kv_archive={kv_archive!r}: a zero byte ends the name of a folder")
        params.folder = fsencode(os.path.abspath(os.path.expanduser(kv_archive)))
    if kv_archive_size is not None:
        params.max_bytes = check_int("kv_archive_size", parse_bytes("kv_archive_size", kv_archive_size), 1, (1 << 62) - 1)
    if kv_archive_type is not None:
        params.type = ggml_type(check_choice("kv_archive_type", kv_archive_type, TYPES))
    return params


def archive_stats(ctx: Any) -> ArchiveStats:
    """Of a context with an archive; ValueError without one."""
    s = _lib.ArchiveStats(size=ctypes.sizeof(_lib.ArchiveStats))
    _lib.check(_lib.lib.headkv_get_archive_stats(ctx, ctypes.byref(s)), ValueError)
    return ArchiveStats(
        max_bytes=s.max_bytes,
        n_blocks=s.n_blocks,
        bytes=s.bytes,
        n_restored=s.n_restored,
        n_computed=s.n_computed,
        bytes_read=s.bytes_read,
        bytes_written=s.bytes_written,
        seconds_read=s.t_read_us / 1e6,
        seconds_write=s.t_write_us / 1e6,
        n_evicted=s.n_evicted,
        n_damaged=s.n_damaged,
        n_failed=s.n_failed,
    )


def _folder(folder: str | PathLike[str]) -> bytes:
    if not os.path.isdir(folder):
        raise ValueError(f"{fspath(folder)!r}: there is no such folder")
    return fsencode(folder)


def list_blocks(folder: str | PathLike[str], *, deep: bool = False) -> list[Block]:
    """Blocks of a folder, those first that were not used for the longest time.

    Parameters
    ----------
    deep : check all bytes, not only what the header says

    Raises
    ------
    ValueError
        there is no such folder, or it cannot be read
    """
    found: list[Block] = []

    def tell(block: Any, _user_data: Any) -> bool:
        b = block.contents
        found.append(Block(b.name.decode(), b.model.decode("utf-8", "replace"), b.n_tokens, b.bytes, b.t_used_us / 1e6, b.damaged.decode()))
        return True

    _lib.check(_lib.lib.headkv_archive_list(_folder(folder), deep, _lib.ArchiveTell(tell), None), ValueError)
    return found


def prune(folder: str | PathLike[str], max_bytes: int) -> int:
    """Remove the blocks that were not used for the longest time until the rest takes ``max_bytes``; returns how many."""
    return _lib.check(_lib.lib.headkv_archive_prune(_folder(folder), max_bytes), ValueError)
