"""Which layers of a model are compressed.

Those with K and V per head for the attention to all tokens. What has windowed attention or a recurrent state keeps as much
of a sequence whatever its length, and stays upstream's. Where the header of a file alone does not tell, the library is asked, on a
model without weights.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import _lib
from .gguf_header import Header, once_per_file

# the library is asked about models with one of these keys, or keys that begin so, and about architectures that need none
KEYS = (
    "attention.sliding_window",
    "attention.recurrent_layers",
    "attention.shared_kv_layers",
    "attention.kv_lora_rank",
    "full_attention_interval",
    "kda.",
    "nextn_predict_layers",
    "shortconv.",
    "ssm.",
    "wkv.",
)
ARCHS = ("exaone4", "gemma2", "llama4", "minimax-01", "smallthinker")
WINDOW, STATE = 1, 2  # enum headkv_kept_aside, cpp/headkv.h


@dataclass(frozen=True)
class Layers:
    """What the library says of a model.

    Attributes
    ----------
    heads : (query heads, KV heads) of each layer that are compressed, (0, 0) where none are
    n_embd_head_k, n_embd_head_v : values of one K and of one V of each layer, 0 where none are compressed
    n_windowed, n_recurrent : layers with windowed attention, and with a recurrent state
    why_not : why no context of the model is compressed; empty = one is, else the others are empty
    """

    heads: tuple[tuple[int, int], ...] = ()
    n_embd_head_k: tuple[int, ...] = ()
    n_embd_head_v: tuple[int, ...] = ()
    n_windowed: int = 0
    n_recurrent: int = 0
    why_not: str = ""


def heads_by_layer(header: Header) -> list[tuple[int, int]] | None:
    """(query heads, KV heads) of each layer as budgets count them: no KV heads where a layer is not compressed. None when the file does
    not say.

    Raises
    ------
    ValueError : the file is damaged
    """
    layers = layers_of(header)
    return header.heads_by_layer() if layers is None or layers.why_not else list(layers.heads)


def layers_of(header: Header) -> Layers | None:
    """What the library says of a model; None where its header tells.

    Raises
    ------
    ValueError : llama.cpp cannot load it
    """
    keys = [f"{header.arch}.{key}" for key in KEYS]
    asked = header.arch in ARCHS or any(
        name == key or (key.endswith(".") and name.startswith(key)) for key in keys for name in header.pairs
    )
    return ask_library(header.path) if asked else None


@once_per_file
def ask_library(path: Path) -> Layers:
    """What the library says of a model.

    Raises
    ------
    ValueError : llama.cpp cannot load it
    """
    import llama_cpp

    model = load_without_weights(path)
    try:
        n_layer = _lib.check(_lib.lib.headkv_get_heads(model, None, None, None, None, None, 0))
        found = np.zeros((5, n_layer), dtype=np.int32)
        rows = [row.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)) for row in found]
        with captured_log():
            result = _lib.lib.headkv_get_heads(model, *rows, n_layer)
        if result < 0:
            return Layers(why_not=_lib.last_error())
    finally:
        llama_cpp.llama_model_free(model)
    n_head, n_head_kv, n_embd_head_k, n_embd_head_v, beside = found.tolist()
    n_windowed, n_recurrent = (sum(bool(x & kind) for x in beside) for kind in (WINDOW, STATE))
    return Layers(tuple(zip(n_head, n_head_kv, strict=True)), tuple(n_embd_head_k), tuple(n_embd_head_v), n_windowed, n_recurrent)


def bytes_beside(path: str | os.PathLike[str], *, n_ctx: int, n_ubatch: int, type_k: int, type_v: int) -> int:
    """Bytes that the layers which are not compressed take for one sequence.

    Parameters
    ----------
    n_ctx : tokens
    type_k, type_v : ggml types

    Raises
    ------
    ValueError : llama.cpp cannot load the model, or it cannot be compressed
    """
    import llama_cpp

    model = load_without_weights(path)
    try:
        ctx = create_without_memory(model, path, n_ctx=n_ctx, n_ubatch=n_ubatch, type_k=type_k, type_v=type_v)
        try:
            return int(footprint_of(ctx, any_params(), n_prompt=1).beside)
        finally:
            llama_cpp.llama_free(ctx)
    finally:
        llama_cpp.llama_model_free(model)


def footprint_of(
    ctx: Any, params: _lib.Params, *, n_prompt: int, n_predict: int = 0, n_ubatch: int = 1, layered: bool = False
) -> _lib.Footprint:
    """What a prompt would take in a context.

    Raises
    ------
    ValueError : the library refuses the parameters
    """
    found = _lib.Footprint(size=ctypes.sizeof(_lib.Footprint))
    _lib.check(_lib.lib.headkv_get_footprint(ctx, params, n_prompt, n_predict, n_ubatch, layered, found), ValueError)
    return found


PREFILL_LAYER = 2  # cpp/headkv.h: whether it is possible, not whether it is worth it
ATTEND_COMPOSED = 2  # same: by the ops of ggml


def any_params(*, as_stock: bool = False) -> _lib.Params:
    """Of contexts that are only asked for sizes: graphs are reserved for n_ctx cells per head, whatever the budgets.

    as_stock : prompts are read with the attention of ggml, which has masks
    """
    params: _lib.Params = _lib.lib.headkv_default_params()
    params.kv_size, params.policy, params.prefill = 64, b"snapkv", PREFILL_LAYER
    if as_stock:
        params.attend = ATTEND_COMPOSED
    return params


def load_without_weights(path: str | os.PathLike[str]) -> Any:
    """A model of which sizes can be asked, to be freed with ``llama_model_free``.

    Raises
    ------
    ValueError : llama.cpp cannot load it
    """
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mode, params.n_gpu_layers = True, llama_cpp.LLAMA_LOAD_MODE_NONE, 0
    with captured_log() as lines:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ValueError(f"{path}: llama.cpp cannot load it: {_reason(lines)}")
    return model


def create_without_memory(
    model: Any, path: str | os.PathLike[str], *, n_ctx: int, n_ubatch: int, type_k: int, type_v: int, as_stock: bool = False
) -> Any:
    """A compressed context of a model without weights, to be freed with ``llama_free``.

    Raises
    ------
    ValueError : the model cannot be compressed
    """
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = n_ctx
    params.n_ubatch = params.n_outputs_max = n_ubatch
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k, params.type_v = type_k, type_v
    with captured_log() as lines, _lib.creating(any_params(as_stock=as_stock)):
        ctx = llama_cpp.llama_init_from_model(model, params)
    if not ctx:
        raise ValueError(f"{path}: {_lib.last_error() or _reason(lines)}; the stock cache (kv_size=None) may work")
    return ctx


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """What llama.cpp logs, instead of printing it."""
    import llama_cpp

    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(before, data)


def _reason(lines: Sequence[str]) -> str:
    errors = [line for line in lines if "error" in line] or list(lines[-1:])
    return errors[0].strip() if errors else "no reason was given"
