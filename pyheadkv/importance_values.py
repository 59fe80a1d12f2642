"""Importance of the heads of one model: the values, and what they must be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .gguf_header import Header, PathLike, read_header
from .layers import heads_by_layer

VERSION = 1  # of the keys that hold it in a GGUF


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
    header = read_header(model)
    heads = heads_by_layer(header) or []
    n_head, n_head_kv = (max(counts, default=0) for counts in (zip(*heads) if heads else ((), ())))
    if values.shape == (len(heads), n_head_kv) and n_head_kv != n_head:
        per_kv, values = values, np.zeros((len(heads), n_head))
        for il, (n, n_kv) in enumerate(heads):
            if n_kv:
                values[il, :n] = np.repeat(per_kv[il, :n_kv], n // n_kv)
    check_model_heads(header, values)
    return values


def check_model_heads(header: Header, values: NDArray[np.float64]) -> None:
    """Refuse an importance that is not (layers, query heads), or above 0 for a head that its layer does not have. Layers that are
    not compressed take no part, whatever it says of them."""
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
    for il, (n, n_kv) in enumerate(heads):
        if n_kv and values[il, n:].any():
            ih = n + int(values[il, n:].argmax())
            raise ValueError(
                f"{header.path}: importance of layer {il} head {ih} is {values[il, ih]}, but this layer has {n} query heads: "
                "use the importance that was measured on this model"
            )
