"""What a GGUF says about the heads that are compressed. No weights are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._lib import embedded_model
from .gguf_header import read_header
from .layers import Layers, layers_of
from .options import MissingFileError

BYTES_F16 = 2


@dataclass(frozen=True)
class ModelShape:
    """Attention sizes of a GGUF, as far as its layers are compressed.

    Attributes
    ----------
    n_head, n_head_kv : query heads and KV heads of the layer that has most
    heads : (query heads, KV heads) of each layer, (0, 0) where one is not compressed: no KV heads, windowed attention, or a
        recurrent state alone
    n_embd_head_k, n_embd_head_v : values of one K and one V
    n_ctx_train : tokens; 0 when the file does not say
    n_windowed, n_recurrent : layers with windowed attention, and with a recurrent state
    why_not : why the model cannot be compressed, if it is known; the sizes are those of the header then
    """

    arch: str
    name: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    n_ctx_train: int
    heads: tuple[tuple[int, int], ...]
    n_windowed: int = 0
    n_recurrent: int = 0
    why_not: str = ""

    @property
    def is_uniform(self) -> bool:
        """All layers that are compressed have the same heads."""
        return len(set(self.heads) - {(0, 0)}) == 1

    @property
    def n_compressed(self) -> int:
        """Layers that are compressed."""
        return sum(n_kv > 0 for _, n_kv in self.heads)

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell, the f16 K and V of one token in one KV head."""
        return (self.n_embd_head_k + self.n_embd_head_v) * BYTES_F16

    @property
    def n_heads_kv(self) -> int:
        """KV heads of all layers that are compressed."""
        return sum(n for _, n in self.heads)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in an uncompressed f16 cache, all layers that can be compressed."""
        return self.n_heads_kv * self.cell_bytes


def model_path(path: str | os.PathLike[str] | None) -> Path:
    """Path of an existing model file; None means the embedded model.

    Raises
    ------
    MissingFileError : there is no such file
    """
    if path is None and not embedded_model().is_file():
        raise MissingFileError("the embedded model is missing in this installation: name a MODEL.gguf or install again")
    found = embedded_model() if path is None else Path(path)
    if not found.is_file():
        raise MissingFileError(f"model={str(found)!r}: no such file, name a GGUF")
    return found


def read_shape(path: str | os.PathLike[str]) -> ModelShape:
    """Attention sizes of a GGUF.

    Raises
    ------
    ValueError : the file is damaged, no model with a KV cache, or one that is asked about and cannot be loaded
    """
    header = read_header(path)
    arch, layers = header.arch, layers_of(header) or Layers()
    heads = list(layers.heads) or header.heads_by_layer()

    def get(name: str, default: Any = None) -> int:
        return _one_int(header.value(f"{arch}.{name}", default), f"{path}: {arch}.{name}")

    if heads is None:
        get("block_count")
        raise ValueError(f"{path}: {arch}.attention.head_count is missing: the file is damaged or no language model")
    n_head, n_head_kv = (max(counts) for counts in zip(*heads, strict=True))
    if n_head < 1:
        reason = layers.why_not or "only models with attention have a KV cache"
        raise ValueError(f"{path}: {arch}.attention.head_count = {n_head}: {reason}")
    if layers.heads:
        sizes = (layers.n_embd_head_k, layers.n_embd_head_v)
        n_embd_head_k, n_embd_head_v = (_one_int(np.array([n for n in x if n]), f"{path}: values of a head") for x in sizes)
    else:
        n_embd_head = get("embedding_length") // next(n for n, _ in heads if n)
        n_embd_head_k, n_embd_head_v = (get(f"attention.{name}_length", n_embd_head) for name in ("key", "value"))
    return ModelShape(
        arch=arch,
        name=str(header.value("general.name", Path(path).stem)),
        n_layer=len(heads),
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head_k=n_embd_head_k,
        n_embd_head_v=n_embd_head_v,
        n_ctx_train=get("context_length", 0),
        heads=tuple((n, n_kv) if n_kv else (0, 0) for n, n_kv in heads),
        n_windowed=layers.n_windowed,
        n_recurrent=layers.n_recurrent,
        why_not=layers.why_not,
    )


def _one_int(value: Any, name: str) -> int:
    if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
        value = value[0].item()
    if isinstance(value, int):
        return value
    if np.ndim(value) > 0:
        raise ValueError(f"{name} = {value.tolist()} differs between layers: one number for all layers is needed")
    raise ValueError(f"{name} is {value!r}: a whole number is needed, the file is damaged or no language model")
