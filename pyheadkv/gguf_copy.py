"""Writing GGUFs: a copy with other keys, of which all that stays keeps its bytes, and one of keys alone."""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from typing import Any, BinaryIO

import numpy as np

from .gguf_header import ARRAY, GGUF_VERSIONS, MAGIC, SCALAR_FORMATS, STRING, Header, pad

Field = tuple[str, int, int | None, Any]  # name, GGUF type, type of the elements of an array, value


def copy_with_fields(header: Header, out: BinaryIO, fields: Sequence[Field], *, without: Collection[str]) -> None:
    """Same bytes in the same order, but for the keys in ``without``; new keys come last.

    Tensor offsets count from the data section, so the tensor table is copied as it is.
    """
    kept = [pair for name, pair in header.pairs.items() if name not in without]
    with header.mapped() as data:
        out.write(_begin(len(header.tensors), len(kept) + len(fields), version=header.version))
        for pair in kept:
            out.write(data[pair.begin : pair.end])
        for field in fields:
            out.write(_pack_field(*field))
        out.write(data[header.tensors_begin : header.tensors_end])
        out.write(bytes(pad(out.tell(), header.alignment) - out.tell()))
        step = 1 << 24
        for begin in range(header.data_begin, len(data), step):
            out.write(data[begin : begin + step])


def write_fields(out: BinaryIO, fields: Sequence[Field]) -> None:
    """A GGUF that holds these keys and no tensor."""
    out.write(_begin(0, len(fields), version=max(GGUF_VERSIONS)))
    for field in fields:
        out.write(_pack_field(*field))


def _begin(n_tensors: int, n_pairs: int, *, version: int) -> bytes:
    return MAGIC + struct.pack("<IQQ", version, n_tensors, n_pairs)


def _pack_field(key: str, vtype: int, sub_type: int | None, value: Any) -> bytes:
    head = _pack_string(key) + struct.pack("<I", vtype)
    if vtype == STRING:
        return head + _pack_string(value)
    if vtype == ARRAY and sub_type is not None:
        items = np.asarray(value, dtype="<" + SCALAR_FORMATS[sub_type])
        return head + struct.pack("<IQ", sub_type, len(items)) + items.tobytes()
    return head + struct.pack("<" + SCALAR_FORMATS[vtype], value)


def _pack_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
