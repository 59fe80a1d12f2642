"""Files of head scores: JSON, NumPy arrays and tables of text, as importance. Nothing in them is ever executed."""

from __future__ import annotations

import io
import json
import math
import sys
import tokenize
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .gguf_header import REMEDY_DAMAGED, PathLike
from .importance_values import Importance, check_beta, check_importance

SCORE_SUFFIXES = (".json", ".npy", ".csv", ".tsv")
MAX_SCORE_BYTES = 1 << 26  # of a score file; the authors' largest has 2 MB
NPY_ERRORS = (  # what numpy raises at damaged headers, of which it tokenises and parses the text
    ValueError, TypeError, KeyError, EOFError, OverflowError, RecursionError, MemoryError, SyntaxError, Warning,
    tokenize.TokenError,
)  # fmt: skip


def load_scores(path: PathLike) -> Importance:
    """Importance from a file of numbers; nothing in it is ever executed.

    ``.json`` has two forms: the authors' ``{"layer-head": [float, ..], ..}``, one score per accepted example, of which
    the mean is taken (HeadKV 0862a09, snapkv_utils.py:381), and ``{"importance": [[float, ..], ..]}``, what
    ``pyheadkv score`` writes, with "method" and "beta" beside it. ``.npy``, ``.csv`` (commas) and ``.tsv`` (tabs, the patterns of DuoAttention) hold one
    row per layer; they may have one number per KV head, see
    :func:`pyheadkv.importance_values.fit_heads`.

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


def _load_json(raw: bytes, path: Path) -> Importance:
    try:
        data = json.loads(raw, object_pairs_hook=no_duplicates)
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


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, for ``object_pairs_hook``; ValueError where a key is there twice."""
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
