#!/usr/bin/env python3
"""Random models of every architecture of llama.cpp, and what compression does with each of them.

    python tests/architectures.py --out bench/results/architectures.md

The models are made in memory: metadata from the tables below, weights from a generator seeded by the tensor's name.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from conftest import nmse

from pyheadkv import _lib  # isort: skip  # before llama_cpp, which then loads our library
from llama_cpp import llama_cpp

from pyheadkv.importance_values import Importance
from pyheadkv.llama import STATES
from pyheadkv.options import Options
from pyheadkv.testing import reference

TABLE = Path(__file__).resolve().parents[1] / "bench" / "results" / "architectures.md"

N_PROMPT, N_CTX, N_UBATCH = 150, 256, 64  # the last ubatch is not a full one
KV_SIZE, KV_SIZE_ALL = 24, 200  # some cells are evicted, none are
NEXT = (9, 10, 11)  # tokens decoded after the prompt

# ---------------------------------------------------------------- metadata

Keys = dict[str, Any]  # without the prefix of the architecture; None = without the key

N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, HEAD_DIM, N_FF = 3, 128, 4, 2, 32, 192
N_VOCAB = 128

BASE: Keys = {
    "vocab_size": N_VOCAB,
    "context_length": N_CTX,
    "block_count": N_LAYER,
    "embedding_length": N_EMBD,
    "feed_forward_length": N_FF,
    "attention.head_count": N_HEAD,
    "attention.head_count_kv": N_HEAD_KV,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.clamp_kqv": 8.0,
    "attention.q_lora_rank": 48,
    "attention.kv_lora_rank": 64,
    "attention.relative_buckets_count": 8,
    "use_parallel_residual": False,
    "logit_scale": 0.5,
    "residual_scale": 0.7,
    # all experts are used: which ones are chosen must not depend on rounding
    "expert_count": 2,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_feed_forward_length": 64,
    "expert_shared_feed_forward_length": 48,
    "expert_latent_length": 64,
    "expert_gating_func": 2,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.5,
    "expert_group_scale": 0.5,
    "experts_per_group": 1,
    "interleave_moe_layer_step": 2,
    "leading_dense_block_count": 1,
    # recurrent layers
    "full_attention_interval": 2,
    "shortconv.l_cache": 3,
    "wkv.head_size": 32,
    "time_mix_extra_dim": 16,
    "time_decay_extra_dim": 16,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 2 * N_EMBD,
    "ssm.state_size": 32,
    "ssm.group_count": 2,
    "ssm.time_step_rank": N_HEAD,
    "kda.head_dim": 32,
    "kda.safe_gate": True,
    "kda.gate_lower_bound": -5.0,
    "attention.decay_lora_rank": 8,
    "attention.iclr_lora_rank": 8,
    "attention.value_residual_mix_lora_rank": 8,
    "attention.gate_lora_rank": 8,
    # sparse attention
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 32,
    "attention.indexer.top_k": 1024,
    "attention.indexer.block_size": 4,
    "attention.indexer.local_blocks": 1,
    "attention.indexer.kpool": 4,
}

DENSE: Keys = {"expert_count": 0, "expert_used_count": 0}
MHA: Keys = {"attention.head_count_kv": N_HEAD}
SWA: Keys = {"attention.sliding_window": 32, "attention.sliding_window_pattern": [1, 0, 1]}
SWA_PERIOD: Keys = {"attention.sliding_window": 32, "attention.sliding_window_pattern": 2}
MROPE: Keys = {"rope.dimension_sections": [4, 6, 6, 0]}
HYBRID: Keys = {"attention.head_count": [N_HEAD, 0, N_HEAD], "attention.head_count_kv": [N_HEAD_KV, 0, N_HEAD_KV]}
WIDE_KEYS: Keys = {"attention.key_length": 48, "rope.dimension_count": 16}
MLA: Keys = {
    "attention.key_length": 80,
    "attention.value_length": 64,
    "attention.head_count_kv": 1,
    "rope.dimension_count": 16,
    "attention.key_length_mla": 48,
    "attention.value_length_mla": 32,
}
HYPER: Keys = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.low_rank": 8,
    "hyper_connection.magnitude": 2.0,
}
MTP: Keys = {"block_count": N_LAYER + 1, "nextn_predict_layers": 1}

# what architectures need beyond BASE
CHANGES: list[tuple[str, Keys]] = [
    ("llama refact minicpm granite mistral3 llama-embed", DENSE),
    ("mpt olmoe dots1 deepseek2-ocr minicpm3 plm", MHA),
    ("gemma2 gemma3n gemma-embedding cohere2 exaone-moe deepseek4", SWA_PERIOD),
    ("cohere2moe maple mimo2 step35 dots3note afmoe gpt-oss muse-glimmer spark2_5 granite_swa gemma4 gemma4-assistant", SWA),
    ("deepseek2 deepseek32 glm-dsa dots3note mistral4 hy_v4 kimi-linear kimi-k3 bailingmoe3 glm5-next", MLA),
    ("jamba plamo2 nemotron_h nemotron_h_moe granitehybrid lfm2 lfm2moe kimi-linear kimi-k3 bailingmoe3 glm5-next", HYBRID),
    ("qwen2vl qwen3vl qwen3vlmoe qwen35 qwen35moe qwen4exp paddleocr qwen3tts", MROPE),
    ("hy_v4 glm5-next deepseek4 qwen4exp", HYPER),
    ("minicpm3 plm mimo2", WIDE_KEYS),
    ("qwen3next qwen35 qwen35moe qwen4exp", {"ssm.inner_size": N_EMBD}),  # heads of the state's size
    ("plamo2", {"ssm.group_count": 0}),
    ("mpt jais", {"attention.max_alibi_bias": 8.0}),
    ("llama4", {"block_count": 4}),
    ("baichuan", {"block_count": 32}),  # other sizes have no positions
    ("granite", {"attention.scale": 0.3, "embedding_scale": 2.0}),
    ("nemotron_h nemotron_h_moe", {"feed_forward_length": [0, 0, N_FF]}),
    ("nanbeige", {"num_loops": 2}),
    ("hrm_text", {"block_count": 6, "hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2}),
    ("kimi-k3", {"attn_res.block_size": 12, "activation.situ_beta": 4.0, "activation.situ_linear_beta": 25.0}),
    ("hy_v4 maple", {"swiglu_clamp_exp": 7.0}),
    ("hy_v4 dots3note", {"attention.indexer.types": [1, 0, 1]}),
    (
        "dots3note",
        {
            "attention.kv_lora_rank_swa": 64,
            "attention.key_length_swa": 80,
            "attention.value_length_swa": 64,
            "attention.key_length_mla_swa": 48,
            "attention.value_length_mla_swa": 32,
            "rope.freq_base_swa": 1e4,
        },
    ),
    ("bailingmoe3", {"swiglu_clamp_exp": [0.0, 4.0, 4.0], "swiglu_clamp_shexp": [0.0, 5.0, 5.0]}),
    (
        "graniteswitch",
        {
            "adapters.count": 2,
            "adapters.lora_rank": 8,
            "adapters.token_ids_activate": np.int32([120, 121]),
            "adapters.token_ids_substitute": np.int32([3, 4]),
        },
    ),
    (
        "deepseek4",
        {
            "block_count": 4,
            "attention.head_count_kv": 1,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "rope.dimension_count": 32,
            "attention.compress_ratios": [0, 0, 4, 128],
            "attention.output_group_count": 4,
            "attention.output_lora_rank": 32,
            "attention.compress_rope_freq_base": 16e4,
            "hash_layer_count": 0,
            "swiglu_clamp_exp": 10.0,
            "expert_gating_func": 4,
        },
    ),
    ("gemma3n", {"block_count": 22}),
    (
        "gemma4 gemma4-assistant",
        {
            "embedding_length_per_layer_input": 32,
            "attention.key_length_swa": 32,
            "attention.value_length_swa": 32,
            "attention.shared_kv_layers": 0,
        },
    ),
    (
        "qwen4exp",
        {
            "attention.compress_ratios": [4] * N_LAYER,
            "ple.layers": [0],
            "ple.ngram_size": 3,
            "ple.heads_per_ngram": 2,
            "ple.conv_kernel": 4,
            "ple.eos_token_id": 0,
            "embedding_length_per_layer_input": 32,
            "ple.layer_multipliers": np.uint64([1, 3, 5]),
            "ple.head_offsets": np.uint64([0, 128, 256, 384]),
            "ple.head_vocab_sizes": np.uint64([128] * 4),
        },
    ),
    ("eagle3", {"block_count": 1, "target_layers": np.int32([0, 1, 2]), "target_hidden_size": N_EMBD}),
    ("dflash", {"target_layers": np.int32([0, 1, 2]), "block_size": 4}),
    (
        "wavtokenizer-dec",
        {
            "features_length": N_EMBD,
            "attention.group_norm_epsilon": 1e-5,
            "attention.group_norm_groups": 8,
            "posnet.embedding_length": N_EMBD,
            "posnet.block_count": N_LAYER,
            "convnext.embedding_length": N_EMBD,
            "convnext.block_count": N_LAYER,
        },
    ),
]

# metadata of every architecture
GLOBAL: Keys = {
    "tokenizer.ggml.model": "test",
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(N_VOCAB)],
    "tokenizer.ggml.scores": [0.0] * N_VOCAB,
    "tokenizer.ggml.token_type_count": 2,
    "xielu.alpha_n": 1.0,
    "xielu.alpha_p": 1.0,
    "xielu.beta": 1.0,
    "xielu.eps": 1e-7,
}

# other shapes of an architecture
VARIANTS: list[tuple[str, str, Keys]] = [
    *((arch, "MoE", {"expert_count": 2, "expert_used_count": 2}) for arch in ("llama", "minicpm", "granite", "mistral3")),
    *((arch, "M-RoPE", MROPE) for arch in ("glm4", "glm4moe", "hunyuan_vl")),
    *((arch, "sliding window", SWA_PERIOD) for arch in ("gemma3", "olmo2", "plamo3", "smallthinker", "mellum", "laguna")),
    *((arch, "MTP head", MTP) for arch in ("glm4moe", "hy_v3")),
    ("gemma4", "shared cells", {"block_count": 4, "attention.sliding_window_pattern": [1, 0, 1, 0], "attention.shared_kv_layers": 2}),
    ("exaone4", "sliding window", {"block_count": 64}),
    ("mpt", "no ALiBi", {"attention.max_alibi_bias": 0.0}),
    ("jais", "no ALiBi", {"attention.max_alibi_bias": 0.0}),
    ("baichuan", "13B", {"block_count": 40}),
    ("llama", "not causal", {"attention.causal": False}),
    ("qwen3", "one layer", {"block_count": 1}),
    ("mistral3", "attention temperature", {"attention.temperature_scale": 0.3, "rope.scaling.original_context_length": 32}),
    ("phi3", "long RoPE factors", {"rope.scaling.original_context_length": 64}),
    (
        "openelm",
        "heads by layer",
        {"attention.head_count": [4, 6, 8], "attention.head_count_kv": [2, 3, 4], "feed_forward_length": [192, 128, 64]},
    ),
    ("deci", "heads by layer", {"attention.head_count": [4, 4, 8], "attention.head_count_kv": [2, 4, 1]}),
    ("deci", "a layer without attention", {"attention.head_count": [4, 0, 4], "attention.head_count_kv": [2, 0, 1]}),
    ("deci", "a layer with linear attention", {"attention.head_count_kv": [0, 2, 2]}),
    ("deci", "a layer without FFN", {"feed_forward_length": [192, 0, 64]}),
    (
        "deci",
        "an empty layer",
        {"attention.head_count": [4, 0, 4], "attention.head_count_kv": [2, 0, 2], "feed_forward_length": [192, 0, 64]},
    ),
    (
        "deepseek2",
        "without MLA",
        {**WIDE_KEYS, **MHA, "attention.value_length": HEAD_DIM, "attention.key_length_mla": None, "attention.value_length_mla": None},
    ),
]

# upstream aborts the process
NOT_RUN = {
    "qwen3tts": "upstream aborts on all vocabularies but one",
    "chameleon": "upstream aborts on a ubatch without outputs",
    "gemma4-assistant": "upstream aborts when it makes one without a file; a draft head of another model",
}


def cases() -> dict[str, tuple[str, Keys]]:
    """Name of every case -> architecture and its metadata without prefix."""
    keys = {arch: dict(BASE) for arch in architectures()}
    for names, changes in CHANGES:
        for arch in names.split():
            keys[arch] |= changes
    variants = {f"{arch} ({label})": (arch, keys[arch] | changes) for arch, label, changes in VARIANTS}
    return {arch: (arch, keys[arch]) for arch in keys} | variants


# ---------------------------------------------------------------- models


_P, _S, _SIZE = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    func = llama_cpp._lib[name]  # searches ggml too, and is another object than the one that llama_cpp declares
    func.restype, func.argtypes = restype, argtypes
    return func


# gguf.h, ggml.h, ggml-backend.h
gguf_init_empty = _function("gguf_init_empty", _P)
gguf_free = _function("gguf_free", None, _P)
gguf_set_val_bool = _function("gguf_set_val_bool", None, _P, _S, ctypes.c_bool)
gguf_set_val_u32 = _function("gguf_set_val_u32", None, _P, _S, ctypes.c_uint32)
gguf_set_val_f32 = _function("gguf_set_val_f32", None, _P, _S, ctypes.c_float)
gguf_set_val_str = _function("gguf_set_val_str", None, _P, _S, _S)
gguf_set_arr_data = _function("gguf_set_arr_data", None, _P, _S, ctypes.c_int, _P, _SIZE)
gguf_set_arr_str = _function("gguf_set_arr_str", None, _P, _S, ctypes.POINTER(_S), _SIZE)
ggml_get_name = _function("ggml_get_name", _S, _P)
ggml_nelements = _function("ggml_nelements", ctypes.c_int64, _P)
ggml_nrows = _function("ggml_nrows", ctypes.c_int64, _P)
ggml_backend_tensor_set = _function("ggml_backend_tensor_set", None, _P, _P, _SIZE, _SIZE)
# llama.h; llm_arch_name(llm_arch) is C++
llama_model_init_from_user = _function("llama_model_init_from_user", _P, _P, _P, _P, llama_cpp.llama_model_params)
llm_arch_name = _function("_Z13llm_arch_name8llm_arch", _S, ctypes.c_int)


def architectures() -> list[str]:
    """Names of all architectures that the library knows."""
    names: list[str] = []
    while (name := llm_arch_name(len(names)).decode()) not in ("(unknown)", "unknown"):
        names.append(name)
    return names


def random_weights(name: str, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Values of a tensor of (n_rows, n_columns): scales near 1, products that keep the size of their input."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if re.search(r"norm.*\.weight$|\.scale$|^rope_f", name):
        return 1 + 0.1 * x
    if re.search(r"\.ssm_a$", name):
        return -np.abs(x)  # states decay
    return x * (0.1 if shape[0] == 1 else shape[1] ** -0.5)


def make_model(arch: str, keys: Keys) -> Any:
    """A ``llama_model`` with random weights, None if the library refuses the metadata."""
    gguf = gguf_init_empty()
    metadata = {"general.architecture": arch} | GLOBAL | {f"{arch}.{key}": value for key, value in keys.items()}
    for key, value in metadata.items():
        name = key.encode()
        if isinstance(value, bool):
            gguf_set_val_bool(gguf, name, value)
        elif isinstance(value, int):
            gguf_set_val_u32(gguf, name, value)
        elif isinstance(value, float):
            gguf_set_val_f32(gguf, name, value)
        elif isinstance(value, str):
            gguf_set_val_str(gguf, name, value.encode())
        elif isinstance(value, list) and isinstance(value[0], str):
            gguf_set_arr_str(gguf, name, (ctypes.c_char_p * len(value))(*(v.encode() for v in value)), len(value))
        elif value is not None:
            array = np.array(value, dtype={int: np.uint32, float: np.float32}.get(type(value[0])))
            gguf_type = {"uint32": 4, "int32": 5, "float32": 6, "uint64": 10}[array.dtype.name]
            gguf_set_arr_data(gguf, name, gguf_type, array.ctypes.data, len(array))

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
    def fill(tensor: int, _: Any) -> None:
        n, n_rows = ggml_nelements(tensor), ggml_nrows(tensor)
        x = random_weights(ggml_get_name(tensor).decode(), (n_rows, n // n_rows))
        ggml_backend_tensor_set(tensor, x.ctypes.data, 0, x.nbytes)

    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.load_mtp = 0, True
    model = llama_model_init_from_user(gguf, ctypes.cast(fill, ctypes.c_void_p), None, params)
    gguf_free(gguf)
    return model


# ---------------------------------------------------------------- contexts


def heads_of(model: Any) -> list[npt.NDArray[np.int32]]:
    """Query heads, KV heads, sizes of a K and of a V head of each layer, 0 where it is not compressed."""
    n = _lib.check(_lib.lib.headkv_get_heads(model, None, None, None, None, None, 0))
    found = [np.zeros(n, dtype=np.int32) for _ in range(5)]
    _lib.check(_lib.lib.headkv_get_heads(model, *(x.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)) for x in found), n))
    return found[:4]


class Refused(Exception):
    """No context; the reason is empty if it is not one of compression."""


class Context:
    """A context of the low level API, with compression if there is a ``kv_size``.

    Parameters
    ----------
    model : as ``make_model`` returns it
    kv_size : mean cells per KV head, None = the stock cache
    prefill, attend : as in ``pyheadkv.Llama``
    importance : of the query heads; None = uniform budgets
    n_seq_max : sequences
    flash_attn : of the stock cache
    options : others of the compression

    Raises
    ------
    Refused
        the library makes no such context
    """

    def __init__(
        self,
        model: Any,
        kv_size: int | None = None,
        *,
        prefill: str = "auto",
        attend: str = "auto",
        importance: Importance | None = None,
        n_seq_max: int = 1,
        flash_attn: bool = True,
        **options: Any,
    ) -> None:
        self.kv_size, self.n_vocab = kv_size, llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.n_layer = llama_cpp.llama_model_n_layer(model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = N_CTX * n_seq_max, N_CTX, N_UBATCH, n_seq_max
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = int(flash_attn)
        how: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if kv_size is not None:
            self.options = Options(
                **{"kv_size": kv_size, "policy": "snapkv" if importance is None else "headkv", "prefill": prefill, "attend": attend}
                | options
            )
            how = _lib.creating(self.options.to_params(importance, None))
        with how:
            self.ctx = llama_cpp.llama_init_from_model(model, params)
        if not self.ctx:
            reason = _lib.last_error() if kv_size is not None else ""
            raise Refused(re.sub(r"^KV compression is not possible for .*?architecture \S+: ", "", reason))
        self.why_token = "" if kv_size is None else _lib.lib.headkv_why_token_prefill(self.ctx).decode()
        self.layered = False  # whether the last prompt was read layer by layer
        self.heads = heads_of(model) if kv_size is not None else None  # of each layer of ours
        self.defined: dict[tuple[int, int], list[int]] = {}  # positions that the heads of the last staged prompt keep, by definition

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: Any) -> None:
        llama_cpp.llama_free(self.ctx)

    def budget(self) -> npt.NDArray[np.int32]:
        """Cells each KV head may keep, (n_layer, n_head_kv)."""
        n = _lib.check(_lib.lib.headkv_get_budget(self.ctx, None, 0))
        cells = np.zeros((self.n_layer, n // self.n_layer), dtype=np.int32)
        _lib.check(_lib.lib.headkv_get_budget(self.ctx, cells.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n))
        return cells

    def decode(self, tokens: list[int], position: int) -> npt.NDArray[np.float32]:
        """Logits of the last of the tokens, (n_vocab,)."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position + i, 1, 0
            batch.logits[i] = i == len(tokens) - 1
        code = llama_cpp.llama_decode(self.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}: {_lib.last_error()}")
        return np.array(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, -1), shape=(self.n_vocab,)))

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits of the end of a prompt and of each of ``NEXT``, (1 + len(NEXT), n_vocab)."""
        prompt = np.random.default_rng(0).integers(0, self.n_vocab, N_PROMPT).tolist()
        if self.kv_size is not None:
            _lib.check(_lib.lib.headkv_begin_prompt(self.ctx, 0, N_PROMPT, not self.why_token, None))
        out = [self.decode(prompt, 0)]
        self.layered = self.kv_size is not None and self._state() == "layered"
        if self.kv_size == KV_SIZE and self._state() == "staged":
            self.defined = {(il, ih): row for il in range(self.n_layer) for ih, row in enumerate(self._defined_of_layer(il))}
        if self.kv_size is not None and _lib.lib.headkv_end_prompt(self.ctx, 0) < 0:
            raise Refused(f"at the end of the first prompt, {_lib.last_error()}")
        return np.array(out + [self.decode([token], N_PROMPT + i) for i, token in enumerate(NEXT)])

    def _state(self) -> str:
        stats = _lib.Stats(size=ctypes.sizeof(_lib.Stats))
        _lib.check(_lib.lib.headkv_get_stats(self.ctx, 0, ctypes.byref(stats)))
        return STATES[stats.state]

    def _defined_of_layer(self, il: int) -> list[list[int]]:
        """What the NumPy definition keeps, out of the queries and keys of a staged prompt."""

        def read(func: Callable[..., int], n_row: int, *args: int) -> npt.NDArray[np.float32]:
            values = np.zeros((1 << 16, n_row), dtype=np.float32)
            return values[: _lib.check(func(self.ctx, *args, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size))]

        n_head, n_head_kv, dim, _ = (int(x[il]) for x in self.heads)
        if n_head_kv == 0:
            return []
        options = self.options
        q = read(_lib.lib.headkv_read_window, n_head * dim, 0, il).reshape(-1, n_head, dim)
        k = np.stack([read(_lib.lib.headkv_read_cells, dim, 0, il, ih, False) for ih in range(n_head_kv)], axis=1)
        scale, softcap, max_bias, *sinks = read(_lib.lib.headkv_read_softmax, 1, il).ravel().tolist()
        cells = np.full(n_head_kv, KV_SIZE)
        scores = reference.score(
            q,
            k,
            scale=scale,
            softcap=softcap,
            max_bias=max_bias,
            sinks=sinks or None,
            n_prefix=N_PROMPT - options.recent,
            power=options.power,
            pool=options.pool,
            pool_kernel=options.pool_kernel or reference.pool_kernels(cells - options.recent),
        )
        return [row.tolist() for row in reference.keep(scores, cells, kv_size=KV_SIZE, recent=options.recent, n_tokens=N_PROMPT)]

    def positions(self) -> dict[tuple[int, int], list[int]]:
        """Prompt positions that each (layer, KV head) kept."""

        def read(func: Callable[..., int], *args: int) -> npt.NDArray[np.int32]:
            values = np.zeros(_lib.check(func(self.ctx, *args, None, 0)), dtype=np.int32)
            _lib.check(func(self.ctx, *args, values.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(values)))
            return values

        budget = read(_lib.lib.headkv_get_budget).reshape(self.n_layer, -1)
        return {(il, ih): read(_lib.lib.headkv_get_positions, 0, il, ih).tolist() for il, ih in np.argwhere(budget > 0).tolist()}


def can_run(model: Any) -> bool:
    """Whether there is a context of the model without compression."""
    try:
        with Context(model):
            return True
    except Refused:
        return False


# ---------------------------------------------------------------- outcomes


@dataclass(frozen=True)
class Result:
    """What compression did with a model.

    Attributes
    ----------
    name : of the case
    outcome : "layer", "token: reason", "refused: reason", "not run: reason" or "aborted: assertion"
    n_kept : prompt positions kept per head with both sizes, each number once
    n_other : prompt positions that heads kept and by definition do not
    same_order : whether layer by layer gave the bits and the kept cells of upstream's order
    same_prompt : whether the prompt's last logits have the bits of the stock cache, where its attention is ggml's
    nmse_prompt : of the prompt's last logits against the stock cache, where its attention is ours
    nmse_fused, nmse_composed : of the decoded logits against the stock cache, when no cell was evicted
    n_moved : cells that one path keeps and the other does not, since the prompt's attention is rounded otherwise
    nmse_paths : composed against fused, when cells were evicted, the same ones; 0 of both where there is no composed path
    nmse_evicted : fused against the stock cache, when cells were evicted
    finite : whether all logits are
    """

    name: str
    outcome: str
    n_kept: tuple[int, ...] = ()
    n_other: int = 0
    same_order: bool = False
    same_prompt: bool = False
    nmse_prompt: float = 0.0
    n_moved: int = 0
    nmse_fused: float = 0.0
    nmse_composed: float = 0.0
    nmse_paths: float = 0.0
    nmse_evicted: float = 0.0
    finite: bool = False

    @property
    def kind(self) -> str:
        """First word of the outcome."""
        return self.outcome.split(":")[0]


def examine(name: str, arch: str, keys: Keys, log: list[str]) -> Result:
    """Make the model and read the same prompt with and without compression.

    Parameters
    ----------
    log : where a log callback puts the errors of the library
    """
    if name in NOT_RUN:
        return Result(name, f"not run: {NOT_RUN[name]}")
    model = make_model(arch, keys)
    if not model:
        return Result(name, f"not run: {log[0].split('error loading model: ')[-1]}")
    try:
        with Context(model, KV_SIZE, prefill="layer") as auto:
            ours, kept = [auto.logits()], auto.positions()
        with Context(model, KV_SIZE, prefill="token") as token:
            ours.append(token.logits())
            n_other = sum(len(set(kept[head]) - set(token.defined[head])) for head in kept)
            same_bits = ours[0].tobytes() == ours[1].tobytes() and kept == token.positions()
            same_order = auto.layered and not token.layered and same_bits
        n_kept = {len(positions) for positions in kept.values()}
        only_fused, has_bits = False, True
        n_moved = 0
        for kv_size, attend in ((KV_SIZE, "composed"), (KV_SIZE_ALL, "auto"), (KV_SIZE_ALL, "composed")):
            try:
                with Context(model, kv_size, attend=attend) as other:
                    ours.append(other.logits())
                    positions = other.positions()
                    n_kept |= {len(of_head) for of_head in positions.values()}
                    if kv_size == KV_SIZE:
                        n_moved = sum(len(set(positions[head]) - set(kept[head])) for head in kept)
            except Refused as e:
                if attend != "composed" or "needs attend 'fused' on the CPU" not in str(e):
                    raise
                only_fused = True
                has_bits = str(e).startswith("ALiBi")  # its prompts are read by the attention of ggml
                ours.append(ours[0 if kv_size == KV_SIZE else 3])
        with Context(model, flash_attn=arch != "plm") as context:  # whose V the stock cache takes only without
            stock = context.logits()
    except Refused as e:
        if str(e) or can_run(model):
            return Result(name, f"refused: {e}")
        return Result(name, f"not run: {log[0].split(': ', 2)[-1]}")
    finally:
        llama_cpp.llama_model_free(model)
    return Result(
        name,
        "layer" if auto.layered else f"token: {auto.why_token}",
        n_kept=tuple(sorted(n_kept)),
        n_other=n_other,
        same_order=same_order,
        same_prompt=not has_bits or all(x[0].tobytes() == stock[0].tobytes() for x in (ours[2], ours[4])),
        nmse_prompt=max(nmse(x[0], stock[0]) for x in ours),
        n_moved=n_moved,
        nmse_fused=nmse(ours[3][1:], stock[1:]),
        nmse_composed=0.0 if only_fused else nmse(ours[4][1:], stock[1:]),
        nmse_paths=0.0 if n_moved else nmse(ours[2][1:], ours[0][1:]),
        nmse_evicted=nmse(ours[0][1:], stock[1:]),
        finite=bool(np.isfinite([*ours, stock]).all()),
    )


def work(names: list[str]) -> None:
    """Print the result of each case as a line of JSON."""
    log: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: Any) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            log.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(keep, None)
    table = cases()
    for name in names or table:
        log.clear()
        print(json.dumps(asdict(examine(name, *table[name], log))), flush=True)


def sweep() -> Iterator[Result]:
    """Results of all cases. They are made by another process; if one aborts it, the next one goes on after it."""
    names = list(cases())
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)), GGML_NO_BACKTRACE="1")
    while names:
        cmd = [sys.executable, __file__, "--work", *names]
        run = subprocess.run(cmd, env=env, capture_output=True, text=True)
        for line in run.stdout.splitlines():
            result = json.loads(line)
            assert result["name"] == names.pop(0)
            yield Result(**{**result, "n_kept": tuple(result["n_kept"])})
        if run.returncode > 0:
            raise RuntimeError(f"{names[0]}: {run.stderr[-2000:]}")
        if run.returncode < 0:
            *_, last = [signal.Signals(-run.returncode).name, *run.stderr.splitlines()]
            yield Result(names.pop(0), f"aborted: {last.split(': ', 1)[-1]}")


def format_table(results: list[Result]) -> str:
    """The results as Markdown."""
    counts = {kind: sum(r.kind == kind for r in results) for kind in ("layer", "token", "refused", "not run", "aborted")}
    lines = [
        "# What compression does with every architecture of llama.cpp",
        "",
        "`python tests/architectures.py --out bench/results/architectures.md`: a random model of each, a prompt of "
        f"{N_PROMPT} tokens in ubatches of {N_UBATCH}, `kv_size={KV_SIZE}`.",
        "",
        "- **layer**: prompts are read layer by layer; **token**: only in upstream's order, with the reason",
        "- **refused**: an error with this reason, when the context is created if nothing else is said",
        "- **not run**: upstream runs no such model, with or without compression",
        "",
        ", ".join(f"{n} {kind}" for kind, n in counts.items() if n) + ".",
        "",
        "| architecture | outcome |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {r.name} | {r.outcome} |" for r in results)]) + "\n"


def read_table(text: str) -> dict[str, str]:
    """Name -> outcome, as ``format_table`` wrote them."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", text, re.M)
    return dict(rows[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to write")
    parser.add_argument("--work", nargs="*", metavar="CASE", help="print results as JSON instead, of these cases or of all")
    args = parser.parse_args()
    if args.work is not None:
        work(args.work)
        return
    results = list(sweep())
    args.out.write_text(format_table(results))
    print(format_table(results))


if __name__ == "__main__":
    main()
