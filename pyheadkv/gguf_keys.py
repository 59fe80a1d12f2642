"""Head importance as GGUF metadata: names and types of the keys, reading, writing, and files of scores.

=========================================  ==============  =======================================================
key                                        type            meaning
=========================================  ==============  =======================================================
``{arch}.attention.head_importance``        array of F32    n_layer * n_head values, row-major, >= 0, not normalised
                                            or F64
``{arch}.attention.head_importance.shape``   array of U32    [n_layer, n_head]
``{arch}.attention.head_importance.method``  string          how it was measured, e.g. "headkv-r2"
``{arch}.attention.head_importance.source``  string          where it came from
``{arch}.attention.head_importance.version`` U32             1
``{arch}.attention.head_importance.beta``    F64             beta that suits these scores; may be missing
=========================================  ==============  =======================================================

Values that float32 cannot hold exactly are stored as F64: rounding the authors' Mistral R2 importance to float32
changes one head's budget at kv_size 512, beta 2, and in about 4 % of all settings.

The header parser here does not build Python objects for a vocabulary, so reading takes a fraction of a second for
a model with 128k tokens, where gguf.GGUFReader takes several. Every count in the file is checked against the
bytes that are left before it is used.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import struct
import sys
import tempfile
import tokenize
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import gguf

PathLike = str | os.PathLike[str]

KEY_IMPORTANCE = "{arch}.attention.head_importance"
KEY_SHAPE = KEY_IMPORTANCE + ".shape"
KEY_METHOD = KEY_IMPORTANCE + ".method"
KEY_SOURCE = KEY_IMPORTANCE + ".source"
KEY_VERSION = KEY_IMPORTANCE + ".version"
KEY_BETA = KEY_IMPORTANCE + ".beta"
VERSION = 1

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

SCORE_SUFFIXES = (".json", ".npy", ".csv", ".tsv")
MAX_SCORE_BYTES = 1 << 26  # of a score file; the authors' largest has 2 MB
NPY_ERRORS = (  # what numpy raises at damaged headers, of which it tokenises and parses the text
    ValueError, TypeError, KeyError, EOFError, OverflowError, RecursionError, MemoryError, SyntaxError, Warning,
    tokenize.TokenError,
)  # fmt: skip

REMEDY_DAMAGED = "the file is damaged or not complete, fetch or write it again"
REMEDY_WRITE = "write it with 'pyheadkv score MODEL.gguf --write OUT.gguf'"


@dataclass(frozen=True)
class Importance:
    """Head importance of one model.

    Attributes
    ----------
    values : (n_layer, n_head) float64, >= 0, at least one > 0, not normalised
    method : how it was measured, may be empty
    source : where it came from, may be empty
    version : of the keys
    arch : general.architecture of the model; empty for a score file
    beta : that suits these scores, as ``pyheadkv score --calibrate`` chose it; None = not chosen
    fingerprint : of the model that a score file was measured on, see ``pyheadkv.importance``; may be empty
    """

    values: NDArray[np.float64]
    method: str = ""
    source: str = ""
    version: int = VERSION
    arch: str = ""
    beta: float | None = None
    fingerprint: str = ""


def read_importance(path: PathLike) -> Importance | None:
    """Importance stored in a GGUF; None when it has no such keys.

    Raises
    ------
    ValueError : the file or its keys are damaged, or do not fit the model's block_count and head_count
    """
    with open_header(path) as header:
        return _importance_of(header)


def write_importance(
    src: PathLike,
    dst: PathLike,
    importance: ArrayLike,
    *,
    method: str = "",
    source: str = "",
    beta: float | None = None,
    force: bool = False,
) -> None:
    """Copy a GGUF and set its importance; other keys and all tensors keep their bytes.

    The copy is written beside ``dst``, flushed to the disk and then renamed: after an error there is no new file.

    Parameters
    ----------
    src : model to copy
    dst : file to write, another one than ``src``
    importance : (n_layer, n_head), >= 0, at least one > 0
    beta : that suits it; None = not stored
    force : replace an existing ``dst`` and an importance that ``src`` already has
    """
    src, dst = Path(src), Path(dst)
    check_destination(src, dst, force=force)
    with open_header(src) as header:
        values = check_importance(importance, name="importance")
        if header.pairs.get("split.count", _NO_PAIR).value not in (None, 0, 1):
            raise ValueError(f"{src}: split.count = {header.pairs['split.count'].value}: merge the parts with llama-gguf-split --merge")
        old_keys = {name for name in header.pairs if name.startswith(KEY_IMPORTANCE.format(arch=header.arch))}
        if old_keys and not force:
            raise ValueError(f"{src}: {sorted(old_keys)[0]} is already there: pass force=True (--force) to replace it")
        _check_model_heads(header, values)
        fields = importance_fields(values, arch=header.arch, method=method, source=source, beta=beta)
        replace_file(dst, lambda out: _copy_with_fields(header, out, fields, without=old_keys))


def load_scores(path: PathLike) -> Importance:
    """Importance from a file of numbers; nothing in it is ever executed.

    ``.json`` has two forms: the authors' ``{"layer-head": [float, ..], ..}``, one score per accepted example, of which
    the mean is taken (HeadKV 0862a09, snapkv_utils.py:381), and ``{"importance": [[float, ..], ..]}``, what
    ``pyheadkv score`` writes, with "method" and "beta" beside it. ``.npy``, ``.csv`` (commas) and ``.tsv`` (tabs, the patterns of DuoAttention) hold one
    row per layer; they may have one number per KV head, see :func:`fit_heads`.

    Raises
    ------
    ValueError : another suffix, a damaged file, or one above MAX_SCORE_BYTES
    """
    path = Path(path)
    load = {".json": _load_json, ".npy": _load_npy, ".csv": _load_text, ".tsv": _load_text}.get(path.suffix.lower())
    if load is None:
        raise ValueError(f"{path}: score files end in {', '.join(SCORE_SUFFIXES)}: rename or convert it")
    n_bytes = path.stat().st_size
    if n_bytes > MAX_SCORE_BYTES:
        raise ValueError(f"{path} has {n_bytes} bytes, at most {MAX_SCORE_BYTES} are read: no model has so many heads")
    return load(path.read_bytes(), path)


def fit_heads(values: NDArray[np.float64], model: PathLike) -> NDArray[np.float64]:
    """Importance with one column per query head: a column per KV head is repeated for its query heads.

    Parameters
    ----------
    values : (n_layer, n_head) or (n_layer, n_head_kv)
    model : GGUF; where its layers differ, columns are the heads of the layer that has most

    Raises
    ------
    ValueError : ``values`` has neither shape
    """
    with open_header(model) as header:
        heads = heads_by_layer(header) or []
        n_head, n_head_kv = (max(counts, default=0) for counts in (zip(*heads) if heads else ((), ())))
        if values.shape == (len(heads), n_head_kv) and n_head_kv != n_head:
            per_kv, values = values, np.zeros((len(heads), n_head))
            for il, (n, n_kv) in enumerate(heads):
                if n_kv:
                    values[il, :n] = np.repeat(per_kv[il, :n_kv], n // n_kv)
        _check_model_heads(header, values)
    return values


def add_importance_keys(
    writer: gguf.GGUFWriter, importance: ArrayLike, *, n_layer: int, n_head: int, method: str = "", source: str = ""
) -> None:
    """Set the importance of a model that a gguf.GGUFWriter is about to write.

    Parameters
    ----------
    importance : (n_layer, n_head), >= 0, at least one > 0
    """
    import gguf

    values = check_importance(importance, name="importance")
    if values.shape != (n_layer, n_head):
        raise ValueError(f"importance has shape {values.shape}, the model {(n_layer, n_head)}: pass (n_layer, n_head)")
    for key, vtype, sub_type, value in importance_fields(values, arch=writer.arch, method=method, source=source):
        sub = None if sub_type is None else gguf.GGUFValueType(sub_type)
        writer.add_key_value(key, value, gguf.GGUFValueType(vtype), sub)


def importance_fields(
    values: NDArray[np.float64], *, arch: str, method: str = "", source: str = "", beta: float | None = None
) -> list[tuple[str, int, int | None, Any]]:
    """The keys to write, each as (name, GGUF type, type of array elements or None, value)."""
    with np.errstate(over="ignore", under="ignore"):
        exact = np.array_equal(values.astype(np.float32).astype(np.float64), values)
    fields: list[tuple[str, int, int | None, Any]] = [
        (KEY_IMPORTANCE.format(arch=arch), ARRAY, FLOAT32 if exact else FLOAT64, values.ravel().tolist()),
        (KEY_SHAPE.format(arch=arch), ARRAY, UINT32, list(values.shape)),
        (KEY_METHOD.format(arch=arch), STRING, None, method),
        (KEY_SOURCE.format(arch=arch), STRING, None, source),
        (KEY_VERSION.format(arch=arch), UINT32, None, VERSION),
    ]
    if beta is not None:
        fields.append((KEY_BETA.format(arch=arch), FLOAT64, None, check_beta(beta, name="beta")))
    return fields


def check_beta(value: Any, *, name: str) -> float:
    """``value`` as float, if it is a finite number above 1, else ValueError."""
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.floating)) or not 1 < value < math.inf:
        raise ValueError(f"{name}={value!r}: it must be a finite number > 1 (larger = more uniform budgets)")
    return float(value)


def check_importance(values: ArrayLike, *, name: str) -> NDArray[np.float64]:
    """(n_layer, n_head) float64 in which every value is finite and >= 0 and one is above 0, else ValueError."""
    try:
        raw = np.asarray(values)
        if raw.dtype.kind not in "iuf":
            raise ValueError(f"elements of type {raw.dtype}")
        array = raw.astype(np.float64, order="C")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} is no rectangle of numbers ({error}): give n_layer rows of n_head numbers") from None
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}: give n_layer rows of n_head numbers")
    for bad, rule in ((~np.isfinite(array), "finite"), (array < 0, ">= 0")):
        if bad.any():
            il, ih = np.argwhere(bad)[0]
            raise ValueError(f"{name}: layer {il} head {ih} is {array[il, ih]}: every value must be {rule}, measure it again")
    with np.errstate(over="ignore"):
        total = array.sum()
    if not 0 < total < math.inf:
        raise ValueError(f"{name} has sum {total}: it must be above 0 and finite, measure it again")
    return array


# score files


def _load_json(raw: bytes, path: Path) -> Importance:
    try:
        data = json.loads(raw, object_pairs_hook=_no_duplicates)
    except ValueError as error:  # also what a byte that is not UTF-8 and broken JSON raise
        raise ValueError(f"{path}: not readable as JSON: {error}; {REMEDY_DAMAGED}") from None
    except RecursionError:
        raise ValueError(f"{path}: not readable as JSON: nested too deeply; {REMEDY_DAMAGED}") from None
    if not isinstance(data, dict) or not data:
        raise ValueError(f'{path}: holds {_brief(data)}: use {{"layer-head": [floats]}} or {{"importance": [[floats]]}}')
    if "importance" in data:
        beta, method, fingerprint = data.get("beta"), data.get("method", ""), data.get("fingerprint", "")
        return Importance(
            check_importance(data["importance"], name=f"{path}: importance"),
            method=method if isinstance(method, str) else "",
            beta=None if beta is None else check_beta(beta, name=f"{path}: beta"),
            fingerprint=fingerprint if isinstance(fingerprint, str) else "",
        )
    return Importance(check_importance(_mean_per_head(data, path), name=f"{path}: mean scores"))


def _load_npy(raw: bytes, path: Path) -> Importance:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _check_npy_header(raw)
            values = np.load(io.BytesIO(raw), allow_pickle=False)
    except NPY_ERRORS as error:
        raise ValueError(f"{path}: not readable as .npy: {error}; {REMEDY_DAMAGED}") from None
    return Importance(check_importance(values, name=str(path)))


def _check_npy_header(raw: bytes) -> None:
    """Refuse a header whose array is not in the file, before memory is taken for it."""
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version}, readable are 1.0 and 2.0")
    if dtype.kind not in "iuf" or math.prod(shape) * dtype.itemsize != len(raw) - file.tell():
        raise ValueError(f"an array of shape {shape} and type {dtype} in {len(raw) - file.tell()} bytes")


def _load_text(raw: bytes, path: Path) -> Importance:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        lines = raw.decode("ascii").splitlines()
        rows = [[float(field) for field in line.split(separator)] for line in lines if line.strip()]
    except ValueError as error:  # also what a byte that is not ASCII raises
        raise ValueError(f"{path}: not rows of numbers: {error}; {REMEDY_DAMAGED}") from None
    return Importance(check_importance(rows, name=str(path)))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} is there twice")
    return result


def _mean_per_head(data: dict[str, Any], path: Path) -> list[list[np.float64]]:
    """Means as a rectangle; every head from 0-0 to the largest must be there exactly once."""
    means: dict[tuple[int, int], np.float64] = {}
    for key, scores in data.items():
        head = _parse_head(key, path)
        if head in means:
            raise ValueError(f"{path}: key {key!r} names head {head} a second time: keep one of them")
        means[head] = _mean(scores, key, path)
    n_layer, n_head = (max(head[axis] for head in means) + 1 for axis in (0, 1))
    if n_layer * n_head != len(means):
        heads = ((il, ih) for il in range(n_layer) for ih in range(n_head))
        il, ih = next(head for head in heads if head not in means)
        raise ValueError(f"{path}: key '{il}-{ih}' is missing, {len(means)} of {n_layer} x {n_head} heads found: {REMEDY_DAMAGED}")
    return [[means[il, ih] for ih in range(n_head)] for il in range(n_layer)]


def _mean(scores: Any, key: str, path: Path) -> np.float64:
    if not isinstance(scores, list) or not scores or not all(type(s) in (int, float) for s in scores):
        raise ValueError(f"{path}: key {key!r} holds {_brief(scores)}: give a list of at least one number")
    for value in scores:
        if not 0 <= value <= sys.float_info.max:  # NaN fails too
            raise ValueError(f"{path}: key {key!r} holds {_brief(value)}: scores are finite and >= 0, measure it again")
    return np.float64(np.mean(np.array(scores, dtype=np.float64)))


def _parse_head(key: str, path: Path) -> tuple[int, int]:
    parts = key.split("-")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() and len(p) <= 6 for p in parts):
        raise ValueError(f"{path}: key {key[:40]!r} is not 'layer-head' with two small numbers: use keys such as '31-7'")
    return int(parts[0]), int(parts[1])


def _brief(value: Any) -> str:
    """A value short enough for an error message."""
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 60 else text[:57] + "..."


# GGUF header


@dataclass(frozen=True)
class _Pair:
    """One key: its type, value (None for an array that was skipped) and the bytes it takes in the file."""

    type: int
    sub_type: int | None
    value: Any
    begin: int
    end: int


_NO_PAIR = _Pair(-1, None, None, 0, 0)


@dataclass(frozen=True)
class _Tensor:
    """Name, offset in the data section and size in bytes, which is 1 for a type unknown to gguf-py."""

    name: str
    begin: int
    n_bytes: int
    shape: tuple[int, ...]
    type: int


@dataclass(frozen=True)
class _Header:
    """Where everything is in a GGUF file. Offsets and sizes in bytes."""

    path: Path
    data: mmap.mmap
    version: int
    n_tensors: int
    pairs: dict[str, _Pair]
    tensors_begin: int
    tensors_end: int
    alignment: int
    tensors: list[_Tensor]

    @property
    def arch(self) -> str:
        arch = self.pairs.get("general.architecture", _NO_PAIR).value
        if not isinstance(arch, str) or not arch:
            raise ValueError(f"{self.path}: general.architecture is {arch!r}, not a name: {REMEDY_DAMAGED}")
        return arch

    @property
    def data_begin(self) -> int:
        return _pad(self.tensors_end, self.alignment)


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

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}: {REMEDY_DAMAGED}")


@contextmanager
def open_header(path: PathLike) -> Iterator[_Header]:
    """Map a GGUF file and parse all of it but the tensor data."""
    path = Path(path)
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"{path}: size is 0 bytes, no GGUF file: {REMEDY_DAMAGED}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _parse_header(data, path)


def _parse_header(data: mmap.mmap, path: Path) -> _Header:
    cursor = _Cursor(data, path)
    magic = data[cursor.skip(4, "magic") : cursor.offset]
    if magic != MAGIC:
        raise cursor.error(f"magic is {magic!r}, not {MAGIC!r}, no GGUF file")
    version = cursor.scalar("I", "version")
    if version not in GGUF_VERSIONS:
        raise ValueError(f"{path}: GGUF version = {version}, readable are {GGUF_VERSIONS}, little endian: convert the model again")
    n_tensors = cursor.count("tensor count", min_bytes=MIN_TENSOR_BYTES)
    n_pairs = cursor.count("key count", min_bytes=MIN_PAIR_BYTES)
    pairs: dict[str, _Pair] = {}
    for _ in range(n_pairs):
        begin = cursor.offset
        name = cursor.string("key")
        if name in pairs:
            raise cursor.error(f"key {name!r} at offset {begin} is there twice")
        pairs[name] = _parse_pair(cursor, name, begin)
    alignment = _alignment(cursor, pairs)
    tensors_begin = cursor.offset
    tensors = [_parse_tensor(cursor) for _ in range(n_tensors)]
    header = _Header(path, data, version, n_tensors, pairs, tensors_begin, cursor.offset, alignment, tensors)
    for tensor in tensors:
        cursor.offset = min(header.data_begin, len(data))
        cursor.skip(tensor.begin + tensor.n_bytes, f"tensor {tensor.name!r}")
    return header


def _parse_pair(cursor: _Cursor, name: str, begin: int) -> _Pair:
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
    return _Pair(vtype, sub_type, value, begin, cursor.offset)


def _parse_array(cursor: _Cursor, name: str) -> tuple[int, NDArray[Any] | None]:
    """Element type and, for numbers, a copy of the values; strings are skipped."""
    sub_type = cursor.scalar("I", f"element type of {name!r}")
    if sub_type == STRING:
        n = cursor.count(f"length of {name!r}", min_bytes=8)
        for _ in range(n):
            cursor.skip(cursor.scalar("Q", f"element of {name!r}"), f"element of {name!r}")
        return sub_type, None
    if sub_type not in SCALAR_FORMATS:
        raise cursor.error(f"element type of {name!r} = {sub_type} is unknown or nested")
    dtype = np.dtype("<" + SCALAR_FORMATS[sub_type])
    n = cursor.count(f"length of {name!r}", min_bytes=dtype.itemsize)
    begin = cursor.skip(n * dtype.itemsize, f"value of {name!r}")
    return sub_type, np.frombuffer(cursor.data[begin : cursor.offset], dtype=dtype)


def _parse_tensor(cursor: _Cursor) -> _Tensor:
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
        return _Tensor(name, begin, 1, shape, raw_type)
    return _Tensor(name, begin, math.prod(shape) // block * block_bytes, shape, raw_type)


def _alignment(cursor: _Cursor, pairs: dict[str, _Pair]) -> int:
    pair = pairs.get("general.alignment")
    if pair is None:
        return DEFAULT_ALIGNMENT
    if pair.type != UINT32 or not 1 <= pair.value <= MAX_ALIGNMENT or pair.value & (pair.value - 1):
        raise cursor.error(f"general.alignment = {pair.value!r} is no power of two up to {MAX_ALIGNMENT} of type u32")
    return int(pair.value)


# importance in a header


def _importance_of(header: _Header) -> Importance | None:
    prefix = KEY_IMPORTANCE.format(arch=header.arch)
    if not any(name == prefix or name.startswith(prefix + ".") for name in header.pairs):
        return None
    version = _typed(header, KEY_VERSION, (UINT32,))
    if version != VERSION:
        raise ValueError(f"{header.path}: {prefix}.version = {version}, readable is {VERSION}: update pyheadkv or {REMEDY_WRITE}")
    flat = _typed(header, KEY_IMPORTANCE, (FLOAT32, FLOAT64), array=True)
    shape = tuple(_typed(header, KEY_SHAPE, (UINT32,), array=True).tolist())
    if len(shape) != 2 or math.prod(shape) != len(flat):
        raise ValueError(f"{header.path}: {prefix}.shape = {list(shape)} does not fit {len(flat)} values: {REMEDY_WRITE}")
    values = check_importance(flat.reshape(shape), name=f"{header.path}: {prefix}")
    _check_model_heads(header, values)
    method, source = (_typed(header, key, (STRING,)) for key in (KEY_METHOD, KEY_SOURCE))
    beta = None
    if KEY_BETA.format(arch=header.arch) in header.pairs:
        beta = check_beta(_typed(header, KEY_BETA, (FLOAT64,)), name=f"{header.path}: {prefix}.beta")
    return Importance(values, method, source, version, header.arch, beta)


def _typed(header: _Header, key: str, types: tuple[int, ...], *, array: bool = False) -> Any:
    """Value of a key that must be there with one of these types (of its elements, for an array)."""
    name = key.format(arch=header.arch)
    pair = header.pairs.get(name)
    wanted = " or ".join(TYPE_NAMES[t] for t in types)
    if pair is None:
        raise ValueError(f"{header.path}: key {name} is missing, expected {wanted}: {REMEDY_WRITE}")
    found = pair.sub_type if pair.type == ARRAY else pair.type
    if found not in types or (pair.type == ARRAY) != array:
        kind = "array of " if pair.type == ARRAY else ""
        want_kind = "array of " if array else ""
        raise ValueError(f"{header.path}: key {name} is {kind}{TYPE_NAMES[found or 0]}, expected {want_kind}{wanted}: {REMEDY_WRITE}")
    return pair.value


def heads_by_layer(header: _Header) -> list[tuple[int, int]] | None:
    """(query heads, KV heads) of each layer; None when the file does not say."""
    n_layer, n_head, n_head_kv = (
        header.pairs.get(f"{header.arch}.{key}", _NO_PAIR).value
        for key in ("block_count", "attention.head_count", "attention.head_count_kv")
    )
    if n_layer is None or n_head is None:
        return None
    if type(n_layer) is not int or not 1 <= n_layer <= MAX_LAYERS:
        raise ValueError(f"{header.path}: {header.arch}.block_count = {n_layer!r} is no number in [1, {MAX_LAYERS}]: {REMEDY_DAMAGED}")
    columns = []
    for name, value in (("head_count", n_head), ("head_count_kv", n_head if n_head_kv is None else n_head_kv)):
        counts = np.atleast_1d(value)
        if counts.dtype.kind not in "iu" or counts.ndim != 1 or len(counts) not in (1, n_layer) or (counts < 0).any():
            raise ValueError(
                f"{header.path}: {header.arch}.attention.{name} = {counts.tolist()!r} does not fit {n_layer} layers: {REMEDY_DAMAGED}"
            )
        columns.append(counts.tolist() * (n_layer if len(counts) == 1 else 1))
    return list(zip(*columns, strict=True))


def f32_vectors(header: _Header, *, suffix: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(name, copy of the values) of the F32 tensors of one dimension whose names end so."""
    for tensor in header.tensors:
        if tensor.name.endswith(suffix) and tensor.type == 0 and len(tensor.shape) == 1:
            begin = header.data_begin + tensor.begin
            yield tensor.name, np.frombuffer(header.data[begin : begin + tensor.n_bytes], dtype="<f4")


def strings_of(header: _Header, key: str) -> tuple[int, bytes]:
    """Number of the strings of an array and its bytes in the file; (0, b"") without the key or for another type."""
    pair = header.pairs.get(key, _NO_PAIR)
    if pair.type != ARRAY or pair.sub_type != STRING:
        return 0, b""
    begin = pair.begin + 8 + len(key.encode()) + 4 + 4
    return struct.unpack_from("<Q", header.data, begin)[0], header.data[begin + 8 : pair.end]


def _check_model_heads(header: _Header, values: NDArray[np.float64]) -> None:
    """Refuse an importance that is not (layers, query heads), or above 0 for a head that its layer does not have."""
    heads = heads_by_layer(header)
    if heads is None:
        return
    n_head = max(n for n, _ in heads)
    for name, want, got in (("block_count", len(heads), len(values)), ("attention.head_count", n_head, values.shape[1])):
        if want != got:
            raise ValueError(
                f"{header.path}: importance has shape {values.shape}, the model has {header.arch}.{name} = {want}: "
                "use the importance that was measured on this model"
            )
    for il, (n, _) in enumerate(heads):
        if values[il, n:].any():
            ih = n + int(values[il, n:].argmax())
            raise ValueError(
                f"{header.path}: importance of layer {il} head {ih} is {values[il, ih]}, but this layer has {n} query heads: "
                "use the importance that was measured on this model"
            )


# writing


def check_destination(src: Path, dst: Path, *, force: bool) -> None:
    if dst.exists() and src.exists() and dst.samefile(src):
        raise ValueError(f"output {dst} is the input itself: choose another name")
    if dst.exists() and not force:
        raise ValueError(f"output {dst} exists: pass force=True (--force) to replace it, or choose another name")
    if dst.is_dir() or not dst.parent.is_dir():
        raise ValueError(f"output {dst} is a folder or in a folder that does not exist: choose a file in an existing one")


def replace_file(dst: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create ``dst`` completely or not at all."""
    handle, temporary = tempfile.mkstemp(dir=dst.parent, prefix=dst.name + ".", suffix=".part")
    try:
        with open(handle, "wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, dst)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _copy_with_fields(header: _Header, out: BinaryIO, fields: list[tuple[str, int, int | None, Any]], *, without: set[str]) -> None:
    """Same bytes in the same order, but for the keys in ``without``; new keys come last.

    Tensor offsets count from the data section, so the tensor table is copied as it is.
    """
    kept = [pair for name, pair in header.pairs.items() if name not in without]
    out.write(MAGIC + struct.pack("<IQQ", header.version, header.n_tensors, len(kept) + len(fields)))
    for pair in kept:
        out.write(header.data[pair.begin : pair.end])
    for field in fields:
        out.write(_pack_field(*field))
    out.write(header.data[header.tensors_begin : header.tensors_end])
    out.write(bytes(_pad(out.tell(), header.alignment) - out.tell()))
    step = 1 << 24
    for begin in range(header.data_begin, len(header.data), step):
        out.write(header.data[begin : begin + step])


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


def _pad(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
