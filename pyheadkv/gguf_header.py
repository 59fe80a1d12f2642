"""The header of a GGUF: keys, values, and where its tensors are. The only reader of it in this package.

It builds no Python objects for a vocabulary: a header with 152k tokens takes 0.02 s, and 6 s with gguf.GGUFReader. A file
that did not change is not parsed again, whoever asks (:func:`read_header`). Every count in the file is checked
against the bytes that are left before it is used.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

PathLike = str | os.PathLike[str]
T = TypeVar("T")

# GGUF value types, ggml/include/gguf.h
UINT32, FLOAT32, BOOL, STRING, ARRAY, FLOAT64 = 4, 6, 7, 8, 9, 12
SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TYPE_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")

MAGIC = b"GGUF"
GGUF_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20  # far above any real one; it is also the size of the padding we write
MIN_PAIR_BYTES = 8 + 4 + 1  # empty key, type, smallest value
MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # empty name, no dimensions, type, offset
MAX_DIMS = 4
MAX_LAYERS = 1 << 16  # far above any model; what is damaged must not size a list
FRESH_NS = 2_000_000_000  # a file that changed so recently may change again without another time of change

REMEDY_DAMAGED = "the file is damaged or not complete, fetch or write it again"


@dataclass(frozen=True)
class Pair:
    """One key: its type, value (None for an array of strings) and the bytes it takes in the file."""

    type: int
    sub_type: int | None
    value: Any
    begin: int
    end: int


NO_PAIR = Pair(-1, None, None, 0, 0)


@dataclass(frozen=True)
class Tensor:
    """Name, offset in the data section and size in bytes, which is 1 for a type unknown to gguf-py.

    ``shape`` is in the order of the file: the first dimension is the one whose values lie side by side.
    """

    name: str
    begin: int
    n_bytes: int
    shape: tuple[int, ...]
    type: int


@dataclass(frozen=True)
class Stamp:
    """What tells one content of a file from another without reading it."""

    device: int
    inode: int
    n_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: int | Path) -> Stamp:
        """Stamp of a path or an open file."""
        stat = os.stat(file)
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    @property
    def is_fresh(self) -> bool:
        return self.ctime_ns > time.time_ns() - FRESH_NS


@dataclass(frozen=True)
class Header:
    """What a GGUF holds, and where. Offsets and sizes in bytes.

    Attributes
    ----------
    stamp : of the file that was parsed
    pairs : by the names of the keys, in the order of the file
    tensors_begin, tensors_end : the table of tensors
    """

    path: Path
    stamp: Stamp
    version: int
    pairs: dict[str, Pair]
    tensors_begin: int
    tensors_end: int
    alignment: int
    tensors: list[Tensor]

    @property
    def arch(self) -> str:
        """general.architecture.

        Raises
        ------
        ValueError : it is missing or no name
        """
        arch = self.value("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise ValueError(f"{self.path}: general.architecture is {arch!r}, not a name: {REMEDY_DAMAGED}")
        return arch

    @property
    def data_begin(self) -> int:
        """Where the data section begins, from which the offsets of tensors count."""
        return pad(self.tensors_end, self.alignment)

    def value(self, key: str, default: Any = None) -> Any:
        """Value of a key; ``default`` without it."""
        pair = self.pairs.get(key)
        return default if pair is None else pair.value

    @contextmanager
    def mapped(self) -> Iterator[mmap.mmap]:
        """Bytes of the file.

        Raises
        ------
        ValueError : it is no longer the one that was parsed
        """
        with _mapped(self.path) as (data, stamp):
            if stamp != self.stamp:
                raise ValueError(f"{self.path} changed while it was read: start again when it is written")
            yield data

    def heads_by_layer(self) -> list[tuple[int, int]] | None:
        """(query heads, KV heads) of each layer; None when the file does not say."""
        n_layer, n_head, n_head_kv = (
            self.value(f"{self.arch}.{key}") for key in ("block_count", "attention.head_count", "attention.head_count_kv")
        )
        if n_layer is None or n_head is None:
            return None
        if type(n_layer) is not int or not 1 <= n_layer <= MAX_LAYERS:
            raise ValueError(f"{self.path}: {self.arch}.block_count = {n_layer!r} is no number in [1, {MAX_LAYERS}]: {REMEDY_DAMAGED}")
        columns = []
        for name, value in (("head_count", n_head), ("head_count_kv", n_head if n_head_kv is None else n_head_kv)):
            counts = np.atleast_1d(value)
            if counts.dtype.kind not in "iu" or counts.ndim != 1 or len(counts) not in (1, n_layer) or (counts < 0).any():
                raise ValueError(
                    f"{self.path}: {self.arch}.attention.{name} = {counts.tolist()!r} does not fit {n_layer} layers: {REMEDY_DAMAGED}"
                )
            columns.append(counts.tolist() * (n_layer if len(counts) == 1 else 1))
        return list(zip(*columns, strict=True))

    def f32_vectors(self, *, suffix: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """(name, copy of the values) of the F32 tensors of one dimension whose names end so."""
        with self.mapped() as data:
            for tensor in self.tensors:
                if tensor.name.endswith(suffix) and tensor.type == 0 and len(tensor.shape) == 1:
                    begin = self.data_begin + tensor.begin
                    yield tensor.name, np.frombuffer(data[begin : begin + tensor.n_bytes], dtype="<f4")

    def weights(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """(name, dequantised values) of every tensor; the last dimension is the first one of the file."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        with self.mapped() as data:
            for tensor in self.tensors:
                begin = self.data_begin + tensor.begin
                raw = np.frombuffer(data[begin : begin + tensor.n_bytes], dtype=np.uint8)
                rows = raw.reshape(*tensor.shape[:0:-1], -1)
                yield tensor.name, dequantize(rows, GGMLQuantizationType(tensor.type))

    def raw_strings(self, key: str) -> tuple[int, bytes]:
        """Number of the strings of an array and its bytes in the file; (0, b"") without the key or for another type."""
        pair = self.pairs.get(key, NO_PAIR)
        if pair.type != ARRAY or pair.sub_type != STRING:
            return 0, b""
        begin = pair.begin + 8 + len(key.encode()) + 4 + 4
        with self.mapped() as data:
            return struct.unpack_from("<Q", data, begin)[0], data[begin + 8 : pair.end]


def once_per_file(function: Callable[[Path], T]) -> Callable[[PathLike], T]:
    """A function of the content of a file that is computed again only when the file changed."""

    @lru_cache(maxsize=8)
    def computed(path: Path, _: Stamp) -> T:
        return function(path)

    @wraps(function)
    def call(path: PathLike) -> T:
        path = Path(path)
        stamp = Stamp.of(path)
        return function(path) if stamp.is_fresh else computed(path, stamp)

    return call


@once_per_file
def read_header(path: Path) -> Header:
    """All of a GGUF but the tensor data; a file that did not change since the last time is not parsed again.

    Raises
    ------
    ValueError : the file is damaged
    """
    with _mapped(path) as (data, stamp):
        return _parse(data, path, stamp)


@contextmanager
def _mapped(path: Path) -> Iterator[tuple[mmap.mmap, Stamp]]:
    with open(path, "rb") as file:
        stamp = Stamp.of(file.fileno())
        if stamp.n_bytes == 0:
            raise ValueError(f"{path}: size is 0 bytes, no GGUF file: {REMEDY_DAMAGED}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data, stamp


class _Cursor:
    """Reads forward through the mapped file and refuses to leave it."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.offset = data, path, 0

    def skip(self, n_bytes: int, what: str) -> int:
        """Offset before the skip."""
        begin = self.offset
        if n_bytes > len(self.data) - begin:
            raise self.error(f"{what} needs {n_bytes} bytes at offset {begin}, {len(self.data) - begin} are left")
        self.offset = begin + n_bytes
        return begin

    def scalar(self, fmt: str, what: str) -> Any:
        fmt = "<" + fmt
        return struct.unpack_from(fmt, self.data, self.skip(struct.calcsize(fmt), what))[0]

    def count(self, what: str, *, min_bytes: int) -> int:
        """A 64-bit count of things of at least ``min_bytes`` each that must still fit into the file."""
        n: int = self.scalar("Q", what)
        if n * min_bytes > len(self.data) - self.offset:
            raise self.error(f"{what} = {n} needs {n * min_bytes} bytes, {len(self.data) - self.offset} are left")
        return n

    def string(self, what: str) -> str:
        n = self.count(f"length of {what}", min_bytes=1)
        raw = self.data[self.skip(n, what) : self.offset]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} at offset {self.offset - n} is not UTF-8: {raw[:40]!r}") from None

    def skip_strings(self, n: int, what: str) -> None:
        """Skip ``n`` strings, without a call for each: a vocabulary has a hundred thousand."""
        unpack, data, offset = struct.Struct("<Q").unpack_from, self.data, self.offset
        try:
            for _ in range(n):
                offset += 8 + unpack(data, offset)[0]
        except (struct.error, OverflowError):
            offset = len(data) + 1
        if offset <= len(data):
            self.offset = offset
            return
        for _ in range(n):  # one of them leaves the file: this says which
            self.skip(self.scalar("Q", what), what)

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}: {REMEDY_DAMAGED}")


def _parse(data: mmap.mmap, path: Path, stamp: Stamp) -> Header:
    cursor = _Cursor(data, path)
    magic = data[cursor.skip(4, "magic") : cursor.offset]
    if magic != MAGIC:
        raise cursor.error(f"magic is {magic!r}, not {MAGIC!r}, no GGUF file")
    version = cursor.scalar("I", "version")
    if version not in GGUF_VERSIONS:
        raise ValueError(f"{path}: GGUF version = {version}, readable are {GGUF_VERSIONS}, little endian: convert the model again")
    n_tensors = cursor.count("tensor count", min_bytes=MIN_TENSOR_BYTES)
    n_pairs = cursor.count("key count", min_bytes=MIN_PAIR_BYTES)
    pairs: dict[str, Pair] = {}
    for _ in range(n_pairs):
        begin = cursor.offset
        name = cursor.string("key")
        if name in pairs:
            raise cursor.error(f"key {name!r} at offset {begin} is there twice")
        pairs[name] = _parse_pair(cursor, name, begin)
    alignment = _alignment(cursor, pairs)
    tensors_begin = cursor.offset
    tensors = [_parse_tensor(cursor) for _ in range(n_tensors)]
    header = Header(path, stamp, version, pairs, tensors_begin, cursor.offset, alignment, tensors)
    for tensor in tensors:
        cursor.offset = min(header.data_begin, len(data))
        cursor.skip(tensor.begin + tensor.n_bytes, f"tensor {tensor.name!r}")
    return header


def _parse_pair(cursor: _Cursor, name: str, begin: int) -> Pair:
    vtype: int = cursor.scalar("I", f"type of {name!r}")
    sub_type: int | None = None
    value: Any
    if vtype == ARRAY:
        sub_type, value = _parse_array(cursor, name)
    elif vtype == STRING:
        value = cursor.string(f"value of {name!r}")
    elif vtype in SCALAR_FORMATS:
        value = cursor.scalar(SCALAR_FORMATS[vtype], f"value of {name!r}")
    else:
        raise cursor.error(f"type of {name!r} = {vtype} is unknown, 0..{len(TYPE_NAMES) - 1} are known")
    return Pair(vtype, sub_type, value, begin, cursor.offset)


def _parse_array(cursor: _Cursor, name: str) -> tuple[int, NDArray[Any] | None]:
    """Element type and, for numbers, a copy of the values; strings are skipped."""
    sub_type = cursor.scalar("I", f"element type of {name!r}")
    if sub_type == STRING:
        n = cursor.count(f"length of {name!r}", min_bytes=8)
        cursor.skip_strings(n, f"element of {name!r}")
        return sub_type, None
    if sub_type not in SCALAR_FORMATS:
        raise cursor.error(f"element type of {name!r} = {sub_type} is unknown or nested")
    dtype = np.dtype("<" + SCALAR_FORMATS[sub_type])
    n = cursor.count(f"length of {name!r}", min_bytes=dtype.itemsize)
    begin = cursor.skip(n * dtype.itemsize, f"value of {name!r}")
    return sub_type, np.frombuffer(cursor.data[begin : cursor.offset], dtype=dtype)


def _parse_tensor(cursor: _Cursor) -> Tensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string("tensor name")
    n_dims = cursor.scalar("I", f"dimensions of {name!r}")
    if n_dims > MAX_DIMS:
        raise cursor.error(f"tensor {name!r} has {n_dims} dimensions, at most {MAX_DIMS} are possible")
    shape = tuple(cursor.scalar("Q", f"shape of {name!r}") for _ in range(n_dims))
    raw_type = cursor.scalar("I", f"type of {name!r}")
    begin = cursor.scalar("Q", f"offset of {name!r}")
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(raw_type)]
    except (ValueError, KeyError):
        return Tensor(name, begin, 1, shape, raw_type)
    return Tensor(name, begin, math.prod(shape) // block * block_bytes, shape, raw_type)


def _alignment(cursor: _Cursor, pairs: dict[str, Pair]) -> int:
    pair = pairs.get("general.alignment")
    if pair is None:
        return DEFAULT_ALIGNMENT
    if pair.type != UINT32 or not 1 <= pair.value <= MAX_ALIGNMENT or pair.value & (pair.value - 1):
        raise cursor.error(f"general.alignment = {pair.value!r} is no power of two up to {MAX_ALIGNMENT} of type u32")
    return int(pair.value)


def pad(offset: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-offset // alignment) * alignment
