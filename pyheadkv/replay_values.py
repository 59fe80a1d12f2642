"""Budgets of the heads of one model out of replays of texts: the values, what they must be, and where they are stored.

=====================================  ============  =========================================================
key of a GGUF                          type          meaning
=====================================  ============  =========================================================
``{arch}.attention.head_replay``        array of F32  n_share * n_layer * n_head_kv_max values, row-major, 0 to 1
``{arch}.attention.head_replay.shape``   array of U32  [n_share, n_layer, n_head_kv_max]
``{arch}.attention.head_replay.shares``  array of F64  ascending, above 0 and below 1
``{arch}.attention.head_replay.version`` U32           1
``{arch}.attention.head_replay.source``  string        where it came from
=====================================  ============  =========================================================

A score file, ``MODEL.replay.json``, has "shares" and "values" as lists, and "method", "source" and "fingerprint".
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .atomic_write import check_destination, replace_file
from .gguf_copy import Field, copy_with_fields
from .gguf_header import ARRAY, FLOAT32, FLOAT64, REMEDY_DAMAGED, STRING, UINT32, Header, PathLike, read_header
from .gguf_keys import typed
from .layers import heads_by_layer
from .score_files import MAX_SCORE_BYTES, no_duplicates

VERSION = 1
METHOD = "replay"
KEY_REPLAY = "{arch}.attention.head_replay"
KEY_SHAPE = KEY_REPLAY + ".shape"
KEY_SHARES = KEY_REPLAY + ".shares"
KEY_VERSION = KEY_REPLAY + ".version"
KEY_SOURCE = KEY_REPLAY + ".source"
MEAN_WITHIN = 0.02  # of the mean of a table from its share
REMEDY = "measure it again with 'pyheadkv score MODEL.gguf --method replay'"


@dataclass(frozen=True)
class ReplayTable:
    """Which part of a prompt each KV head keeps when all heads together keep a share of it.

    Attributes
    ----------
    shares : (n_share,) float64, ascending, above 0 and below 1: means over the heads
    values : (n_share, n_layer, n_head_kv_max) float64, 0 to 1; 0 where a layer has fewer KV heads
    method : how it was measured
    source : where it came from, may be empty
    fingerprint : of the model that a file was measured on, see ``pyheadkv.importance``; may be empty
    """

    shares: NDArray[np.float64]
    values: NDArray[np.float64]
    method: str = METHOD
    source: str = ""
    fingerprint: str = ""


def check_replay(shares: ArrayLike, values: ArrayLike, *, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares (n_share,) and values (n_share, n_layer, n_head_kv_max) as float64.

    Raises
    ------
    ValueError : they are no such arrays, shares do not ascend within (0, 1), or a value is outside [0, 1] or smaller than at a
        smaller share
    """
    x, y = _floats(shares, name=f"{name}: shares"), _floats(values, name=f"{name}: values")
    if x.ndim != 1 or y.ndim != 3 or y.size == 0 or len(x) != len(y):
        raise ValueError(
            f"{name}: shares of shape {x.shape}, values of shape {y.shape}: it must be (n) and (n, layers, KV heads), {REMEDY}"
        )
    if not (0 < x[0] and x[-1] < 1 and (np.diff(x) > 0).all()):  # NaN fails too
        raise ValueError(f"{name}: shares {x.tolist()}: they must ascend, above 0 and below 1, {REMEDY}")
    steps = np.diff(y, axis=0, prepend=0)
    for bad, rule in ((~((y >= 0) & (y <= 1)), "in [0, 1]"), (~(steps >= 0), "not below that of a smaller share")):
        if bad.any():
            i, il, ih = np.argwhere(bad)[0]
            raise ValueError(f"{name}: share {x[i]:.6g} of layer {il} KV head {ih} is {y[i, il, ih]}: it must be {rule}, {REMEDY}")
    return x, y


def _floats(values: ArrayLike, *, name: str) -> NDArray[np.float64]:
    try:
        raw = np.asarray(values)
        if raw.dtype.kind not in "iuf":
            raise ValueError(f"elements of type {raw.dtype}")
        return raw.astype(np.float64, order="C")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} are no array of numbers ({error}): {REMEDY}") from None


def check_model_replay(header: Header, table: ReplayTable) -> None:
    """Refuse a table of another shape than the model, above 0 for a KV head that a layer does not have, or with another mean than
    its share.

    Raises
    ------
    ValueError : with the remedy
    """
    heads = heads_by_layer(header)
    if heads is None:
        return
    n_head_kv = max(n for _, n in heads)
    wanted = (len(table.shares), len(heads), n_head_kv)
    if table.values.shape != wanted:
        raise ValueError(
            f"{header.path}: the replay table has shape {table.values.shape}, the model {len(heads)} layers with up to {n_head_kv} KV "
            f"heads: {REMEDY}"
        )
    is_there = np.arange(n_head_kv) < np.array([n for _, n in heads])[:, None]
    if table.values[:, ~is_there].any():
        il, ih = next((il, ih) for il, ih in np.argwhere(~is_there) if table.values[:, il, ih].any())
        raise ValueError(
            f"{header.path}: the replay table gives layer {il} KV head {ih} a share, but the layer has {heads[il][1]} that are compressed: {REMEDY}"
        )
    for share, mean in zip(table.shares, table.values[:, is_there].mean(1), strict=True):
        if abs(mean - share) > MEAN_WITHIN * share:
            raise ValueError(
                f"{header.path}: the replay table of share {share:.6g} has the mean {mean:.6g}: it must be within 2 %, {REMEDY}"
            )


# score files


def load_replay(path: PathLike) -> ReplayTable:
    """A table out of a file that ``pyheadkv score --method replay`` wrote.

    Raises
    ------
    ValueError : it is damaged, or larger than MAX_SCORE_BYTES
    """
    path = Path(path)
    n_bytes = path.stat().st_size
    if n_bytes > MAX_SCORE_BYTES:
        raise ValueError(f"{path} has {n_bytes} bytes, at most {MAX_SCORE_BYTES} are read: no model has so many heads")
    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}; {REMEDY_DAMAGED}") from None
    return replay_of(data, name=str(path))


def replay_of(data: Any, *, name: str) -> ReplayTable:
    """A table out of the member "replay" of an entry of the registry, or of a whole score file.

    Raises
    ------
    ValueError : it is none
    """
    if not isinstance(data, dict) or not {"shares", "values"} <= data.keys():
        raise ValueError(f'{name}: holds no replay table, "shares" and "values": {REMEDY}')
    shares, values = check_replay(data["shares"], data["values"], name=name)
    texts = {key: data.get(key, "") for key in ("source", "fingerprint")}
    return ReplayTable(shares, values, METHOD, **{key: text if isinstance(text, str) else "" for key, text in texts.items()})


# metadata


def read_replay(path: PathLike) -> ReplayTable | None:
    """Table stored in a GGUF; None when it has no such keys.

    Raises
    ------
    ValueError : the file or its keys are damaged, or do not fit the model
    """
    header = read_header(path)
    prefix = KEY_REPLAY.format(arch=header.arch)
    if not any(_is_key(name, prefix) for name in header.pairs):
        return None
    version = typed(header, KEY_VERSION, (UINT32,), remedy=REMEDY)
    if version != VERSION:
        raise ValueError(f"{header.path}: {prefix}.version = {version}, readable is {VERSION}: update pyheadkv or {REMEDY}")
    flat, shape, shares = (
        typed(header, key, (kind,), array=True, remedy=REMEDY)
        for key, kind in ((KEY_REPLAY, FLOAT32), (KEY_SHAPE, UINT32), (KEY_SHARES, FLOAT64))
    )
    if len(shape) != 3 or math.prod(shape.tolist()) != len(flat):
        raise ValueError(f"{header.path}: {prefix}.shape = {shape.tolist()} does not fit {len(flat)} values: {REMEDY}")
    found = check_replay(shares, flat.reshape(shape), name=f"{header.path}: {prefix}")
    table = ReplayTable(*found, METHOD, typed(header, KEY_SOURCE, (STRING,), remedy=REMEDY))
    check_model_replay(header, table)
    return table


def write_replay(src: PathLike, dst: PathLike, table: ReplayTable, *, force: bool = False) -> None:
    """Copy a GGUF and set its table; other keys, an importance too, and all tensors keep their bytes.

    Parameters
    ----------
    src : model to copy
    dst : file to write, another one than ``src``
    force : replace an existing ``dst`` and a table that ``src`` already has

    Raises
    ------
    ValueError : with the remedy
    """
    src, dst = Path(src), Path(dst)
    check_destination(src, dst, force=force)
    header = read_header(src)
    if header.value("split.count") not in (None, 0, 1):
        raise ValueError(f"{src}: split.count = {header.value('split.count')}: merge the parts with llama-gguf-split --merge")
    prefix = KEY_REPLAY.format(arch=header.arch)
    old_keys = {name for name in header.pairs if _is_key(name, prefix)}
    if old_keys and not force:
        raise ValueError(f"{src}: {min(old_keys)} is already there: pass force=True (--force) to replace it")
    check_replay(table.shares, table.values, name="replay table")
    check_model_replay(header, table)
    fields = replay_fields(table, arch=header.arch)
    replace_file(dst, lambda out: copy_with_fields(header, out, fields, without=old_keys))


def replay_fields(table: ReplayTable, *, arch: str) -> list[Field]:
    """The keys to write, each as (name, GGUF type, type of array elements or None, value)."""
    return [
        (KEY_REPLAY.format(arch=arch), ARRAY, FLOAT32, table.values.ravel().tolist()),
        (KEY_SHAPE.format(arch=arch), ARRAY, UINT32, list(table.values.shape)),
        (KEY_SHARES.format(arch=arch), ARRAY, FLOAT64, table.shares.tolist()),
        (KEY_VERSION.format(arch=arch), UINT32, None, VERSION),
        (KEY_SOURCE.format(arch=arch), STRING, None, table.source),
    ]


def _is_key(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")
