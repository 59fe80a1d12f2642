"""Random-weight GGUF models for tests and benchmarks; no network, no training.

The files load in stock llama.cpp. Architectures: ``llama`` (Mistral-7B uses it too), ``qwen2`` (biases on
q, k, v), ``qwen3`` (RMS norm per head on q and k), ``gemma3`` (windowed attention but for every period-th layer) and ``lfm2``
(recurrent layers but for every period-th one). Only numpy and gguf are needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..gguf_header import read_header
from ..gguf_keys import add_importance_keys

if TYPE_CHECKING:
    import gguf

Arch = Literal["llama", "qwen2", "qwen3", "gemma3", "gpt-oss", "lfm2"]
FileType = Literal["f32", "f16", "q8_0", "q4_0"]

ARCHS: tuple[str, ...] = ("llama", "qwen2", "qwen3", "gemma3", "gpt-oss", "lfm2")
FTYPES: tuple[str, ...] = ("f32", "f16", "q8_0", "q4_0")

N_SPECIAL = 3  # <unk> <s> </s>
N_BYTES = 256
N_VOCAB_MIN = N_SPECIAL + N_BYTES

RMS_EPS = 1e-5
QUANT_BLOCK = 32  # elements of a row that q8_0 and q4_0 quantise together
L_CACHE = 3  # tokens that a recurrent layer of lfm2 looks at
N_EXPERTS, N_EXPERTS_USED = 8, 4  # of gpt-oss, which has 32
N_ROWS_UNIQUE = 8192  # rows of a big vocabulary drawn freshly when repeat_layers is set; the rest are these, rolled

WORDS = ("the", "and", "code", "is", "of", "in", "to", "he", "it", "on", "at")  # every prefix becomes a token too


@dataclass(frozen=True)
class _Shape:
    """Sizes of one random model, in the words of GGUF metadata."""

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rope_theta: float
    tie_embeddings: bool
    ftype: str
    window: int
    period: int

    def is_global(self, il: int) -> bool:
        """Layer il attends to all tokens."""
        return self.arch not in ("gemma3", "gpt-oss", "lfm2") or il % self.period == self.period - 1

    def validate(self) -> None:
        """Refuse what llama.cpp would not load."""
        if self.arch not in ARCHS:
            raise ValueError(f"arch = {self.arch!r} is unknown: use one of {', '.join(ARCHS)}")
        if self.ftype not in FTYPES:
            raise ValueError(f"ftype = {self.ftype!r} is unknown: use one of {', '.join(FTYPES)}")
        for name in ("n_layer", "n_embd", "n_head", "n_head_kv", "head_dim", "n_ff", "n_ctx_train", "window", "period"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is below 1: give a positive number")
        if self.n_vocab < N_VOCAB_MIN:
            raise ValueError(f"n_vocab = {self.n_vocab} is below {N_VOCAB_MIN}, the special and byte tokens: raise it")
        if self.n_head % self.n_head_kv:
            raise ValueError(f"n_head = {self.n_head} is no multiple of n_head_kv = {self.n_head_kv}: choose one that is")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd: RoPE rotates pairs, choose an even one")
        if self.arch in ("qwen2", "lfm2") and self.n_head * self.head_dim != self.n_embd:
            raise ValueError(
                f"head_dim = {self.head_dim} with n_head = {self.n_head} gives {self.n_head * self.head_dim} columns: "
                f"llama.cpp wants n_embd = {self.n_embd} for {self.arch}, use head_dim = n_embd / n_head or another arch"
            )
        self._validate_quant_rows()

    def _validate_quant_rows(self) -> None:
        if not self.ftype.startswith("q"):
            return
        for name, n in (
            ("n_embd", self.n_embd),
            ("n_ff", self.n_ff),
            ("n_head * head_dim", self.n_head * self.head_dim),
        ):
            if n % QUANT_BLOCK:
                raise ValueError(f"{name} = {n} is no multiple of {QUANT_BLOCK}: {self.ftype} needs it, or use ftype='f16'")


def write_random_model(
    path: str | os.PathLike[str],
    *,
    arch: Arch = "llama",
    n_layer: int,
    n_embd: int,
    n_head: int,
    n_head_kv: int,
    head_dim: int | None = None,
    n_ff: int,
    n_vocab: int = 384,
    seed: int,
    ftype: FileType = "f16",
    n_ctx_train: int = 32768,
    rope_theta: float = 10000.0,
    tie_embeddings: bool = False,
    importance: ArrayLike | Literal["random"] | None = None,
    repeat_layers: bool = False,
    scale: float = 1.5,
    window: int = 32,
    period: int = 2,
    texts: Sequence[str] = (),
) -> None:
    """Write a GGUF of random weights that stock llama.cpp loads.

    Parameters
    ----------
    path : file to write, replaced if it exists
    n_embd, n_ff : columns of the residual stream and of the FFN
    n_head, n_head_kv : query heads and KV heads per layer
    head_dim : columns of one head; None means n_embd / n_head
    n_vocab : tokens; 3 special, 256 byte tokens, some words, the rest unused padding
    seed : of every random number; same arguments, same file
    ftype : type of the matrices; vectors are always f32
    n_ctx_train : tokens
    importance : (n_layer, n_head) non-negative array, "random" for a skewed one, None for no such key
    repeat_layers : every layer gets the same weights, so that a large model is written in seconds
    scale : standard deviation of the attention logits before softmax; near 0 gives flat attention
    window : tokens that the windowed layers of gemma3 and gpt-oss attend to
    period : of gemma3, gpt-oss and lfm2: layers period - 1, 2 * period - 1, .. attend to all tokens
    texts : of tokens that take the place of the last unused ones
    """
    if head_dim is None:
        if n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_embd = {n_embd} is no multiple of n_head = {n_head}: give head_dim")
        head_dim = n_embd // n_head
    shape = _Shape(
        arch,
        n_layer,
        n_embd,
        n_head,
        n_head_kv,
        head_dim,
        n_ff,
        n_vocab,
        n_ctx_train,
        rope_theta,
        tie_embeddings,
        ftype,
        window,
        period,
    )
    shape.validate()
    if not scale > 0:
        raise ValueError(f"scale = {scale} is not above 0: give the standard deviation of the attention logits")

    import gguf

    writer = gguf.GGUFWriter(path, arch)
    try:
        _add_hparams(writer, shape)
        _add_tokenizer(writer, n_vocab, texts)
        _add_importance(writer, shape, importance, seed)
        _add_tensors(writer, shape, seed=seed, repeat_layers=repeat_layers, scale=scale)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def random_importance(*, n_layer: int, n_head: int, seed: int) -> NDArray[np.float64]:
    """Skewed importance like that of real models: few heads hold most of the mass.

    Returns
    -------
    (n_layer, n_head) float64, >= 0, exact in float32
    """
    rng = np.random.default_rng((seed, 0x1A9))
    return rng.gamma(0.3, size=(n_layer, n_head)).astype(np.float32).astype(np.float64)


def _add_hparams(writer: gguf.GGUFWriter, shape: _Shape) -> None:
    import gguf

    writer.add_name(f"random-{shape.arch}")
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    if shape.arch == "lfm2":
        writer.add_head_count_kv([shape.n_head_kv * shape.is_global(il) for il in range(shape.n_layer)])
        writer.add_shortconv_l_cache(L_CACHE)
    else:
        writer.add_head_count_kv(shape.n_head_kv)
    if shape.arch == "gpt-oss":
        writer.add_expert_count(N_EXPERTS)
        writer.add_expert_used_count(N_EXPERTS_USED)
        writer.add_expert_feed_forward_length(shape.n_ff)
    if shape.arch in ("gemma3", "gpt-oss"):
        writer.add_sliding_window(shape.window)
        writer.add_sliding_window_pattern([not shape.is_global(il) for il in range(shape.n_layer)])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(RMS_EPS)
    writer.add_vocab_size(shape.n_vocab)
    file_types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    }
    writer.add_file_type(file_types[shape.ftype])


def _pieces() -> list[str]:
    """Every prefix of every word, with and without the leading space, so that SPM can merge up to it."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    merged = [mark + word[:n] for word in WORDS for mark in ("", "\u2581") for n in range(1, len(word) + 1)]
    return list(dict.fromkeys(letters + merged))


def _add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int, texts: Sequence[str]) -> None:
    """SPM tokenizer: special, byte and word tokens, then unused padding; any text tokenizes."""
    from gguf import TokenType

    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(N_BYTES)]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * N_BYTES
    pieces = _pieces()[: n_vocab - len(tokens)]
    tokens += pieces
    types += [TokenType.NORMAL] * len(pieces)
    n_pad = n_vocab - len(tokens) - len(texts)
    if n_pad < 0:
        raise ValueError(f"{len(texts)} texts are more than the {n_pad + len(texts)} unused tokens: raise n_vocab = {n_vocab}")
    tokens += [f"<pad{i}>" for i in range(n_pad)]
    types += [TokenType.UNUSED] * n_pad
    tokens += texts
    types += [TokenType.NORMAL] * len(texts)
    # longer pieces first, as a trained SPM vocabulary has them
    scores = [float(len(t)) if ty == TokenType.NORMAL else 0.0 for t, ty in zip(tokens, types)]

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([t.encode() for t in tokens])
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _add_importance(writer: gguf.GGUFWriter, shape: _Shape, importance: ArrayLike | Literal["random"] | None, seed: int) -> None:
    if importance is None:
        return
    if isinstance(importance, str):
        if importance != "random":
            raise ValueError(f"importance = {importance!r} is unknown: use 'random', an array or None")
        importance = random_importance(n_layer=shape.n_layer, n_head=shape.n_head, seed=seed)
    add_importance_keys(writer, importance, n_layer=shape.n_layer, n_head=shape.n_head, method="random", source=f"seed {seed}")


def _quantize(x: NDArray[np.float32], ftype: str) -> tuple[NDArray[Any], gguf.GGMLQuantizationType]:
    """Matrix as stored: bytes per row for q8_0 and q4_0."""
    import gguf

    if ftype == "f32":
        return x, gguf.GGMLQuantizationType.F32
    if ftype == "f16":
        return x.astype(np.float16), gguf.GGMLQuantizationType.F16
    qtype = gguf.GGMLQuantizationType.Q8_0 if ftype == "q8_0" else gguf.GGMLQuantizationType.Q4_0
    return gguf.quants.quantize(x, qtype), qtype


def _add_tensors(writer: gguf.GGUFWriter, shape: _Shape, *, seed: int, repeat_layers: bool, scale: float) -> None:
    rng = np.random.default_rng(seed)
    _add_embeddings(writer, shape, rng, roll_rows=repeat_layers)
    stored: list[tuple[str, NDArray[Any], Any]] = []
    for il in range(shape.n_layer):
        if il == 0 or not repeat_layers or shape.arch == "lfm2":
            stored = [(name, *_stored(name, x, shape.ftype)) for name, x in _layer_tensors(shape, rng, scale, il)]
        for name, data, qtype in stored:
            writer.add_tensor(f"blk.{il}.{name}", data, raw_dtype=qtype)


def _stored(name: str, x: NDArray[np.float32], ftype: str) -> tuple[NDArray[Any], gguf.GGMLQuantizationType]:
    is_small = x.ndim == 1 or name in ("shortconv.conv.weight", "ffn_gate_inp.weight") or name.endswith(".bias")
    return _quantize(x, "f32" if is_small else ftype)


def _layer_tensors(shape: _Shape, rng: np.random.Generator, scale: float, il: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Weights of one layer, (n_out, n_in) each; inputs have unit variance after the RMS norm."""
    gain_out = 8 * _embd_std(shape) if shape.tie_embeddings else 1.0  # the layers must outweigh a tied embedding

    yield "attn_norm.weight", _norm(rng, shape.n_embd)
    if shape.arch == "lfm2" and not shape.is_global(il):
        yield "shortconv.conv.weight", _matrix(rng, shape.n_embd, L_CACHE, 1.0)
        yield "shortconv.in_proj.weight", _matrix(rng, 3 * shape.n_embd, shape.n_embd, 1.0)
        yield "shortconv.out_proj.weight", _matrix(rng, shape.n_embd, shape.n_embd, gain_out)
    else:
        yield from _attention_tensors(shape, rng, scale, gain_out)
    if shape.arch == "gemma3":
        yield "post_attention_norm.weight", 2 * gain_out * _norm(rng, shape.n_embd)
    if shape.arch == "gpt-oss":
        yield from _expert_tensors(shape, rng, gain_out)
        return
    yield "ffn_norm.weight", _norm(rng, shape.n_embd)
    yield "ffn_gate.weight", _matrix(rng, shape.n_ff, shape.n_embd, 1.0)
    yield "ffn_up.weight", _matrix(rng, shape.n_ff, shape.n_embd, 1.0)
    yield "ffn_down.weight", _matrix(rng, shape.n_embd, shape.n_ff, gain_out)
    if shape.arch == "gemma3":
        yield "post_ffw_norm.weight", gain_out * _norm(rng, shape.n_embd)


def _expert_tensors(shape: _Shape, rng: np.random.Generator, gain_out: float) -> Iterator[tuple[str, NDArray[np.float32]]]:
    yield "post_attention_norm.weight", _norm(rng, shape.n_embd)
    yield "ffn_gate_inp.weight", _matrix(rng, N_EXPERTS, shape.n_embd, 1.0)
    yield "ffn_gate_inp.bias", np.zeros(N_EXPERTS, dtype=np.float32)
    for name, n_out, n_in, gain in (
        ("ffn_gate_exps", shape.n_ff, shape.n_embd, 1.0),
        ("ffn_up_exps", shape.n_ff, shape.n_embd, 1.0),
        ("ffn_down_exps", shape.n_embd, shape.n_ff, gain_out),
    ):
        one = _matrix(rng, n_out, n_in, gain)
        yield f"{name}.weight", np.stack([np.roll(one, QUANT_BLOCK * i, axis=1) for i in range(N_EXPERTS)])
        yield f"{name}.bias", np.zeros((N_EXPERTS, n_out), dtype=np.float32)


def _attention_tensors(shape: _Shape, rng: np.random.Generator, scale: float, gain_out: float) -> Iterator[tuple[str, NDArray[np.float32]]]:
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    gain_qk = scale**0.5  # q . k / sqrt(head_dim) then has standard deviation `scale`
    if shape.arch in ("qwen3", "gemma3", "lfm2"):
        yield "attn_q_norm.weight", gain_qk * _norm(rng, shape.head_dim)
        yield "attn_k_norm.weight", gain_qk * _norm(rng, shape.head_dim)
    yield "attn_q.weight", _matrix(rng, n_q, shape.n_embd, gain_qk)
    yield "attn_k.weight", _matrix(rng, n_kv, shape.n_embd, gain_qk)
    yield "attn_v.weight", _matrix(rng, n_kv, shape.n_embd, 1.0)
    if shape.arch == "gpt-oss":
        yield "attn_sinks.weight", rng.standard_normal(shape.n_head, dtype=np.float32)
        yield "attn_output.bias", np.zeros(shape.n_embd, dtype=np.float32)
    if shape.arch in ("qwen2", "gpt-oss"):
        for name, n in (("attn_q.bias", n_q), ("attn_k.bias", n_kv), ("attn_v.bias", n_kv)):
            yield name, 0.3 * rng.standard_normal(n, dtype=np.float32)
    yield "attn_output.weight", _matrix(rng, shape.n_embd, n_q, 2 * gain_out)


def _add_embeddings(writer: gguf.GGUFWriter, shape: _Shape, rng: np.random.Generator, *, roll_rows: bool) -> None:
    n_rolls = max(1, shape.n_embd // QUANT_BLOCK)  # distinct ways to roll a row
    n_unique = min(shape.n_vocab, max(N_ROWS_UNIQUE, -(-shape.n_vocab // n_rolls))) if roll_rows else shape.n_vocab
    # unk, bos and eos are made so short that greedy decoding never picks them
    root = shape.n_embd**0.5 if shape.arch == "gemma3" else 1.0  # by which it multiplies what it reads
    embd = np.float32(_embd_std(shape) / root) * rng.standard_normal((n_unique, shape.n_embd), dtype=np.float32)
    if shape.tie_embeddings:
        embd[:N_SPECIAL] *= np.float32(0.1)
    _add_rolled(writer, "token_embd.weight", embd, shape)
    if not shape.tie_embeddings:
        output = _matrix(rng, n_unique, shape.n_embd, 3.0)
        output[:N_SPECIAL] = 0
        _add_rolled(writer, "output.weight", output, shape)
    writer.add_tensor("token_embd_norm.weight" if shape.arch == "lfm2" else "output_norm.weight", _norm(rng, shape.n_embd))


def _add_rolled(writer: gguf.GGUFWriter, name: str, x: NDArray[np.float32], shape: _Shape) -> None:
    """Store x; missing rows are earlier ones rolled by whole quantisation blocks, cheap and yet distinct."""
    data, qtype = _quantize(x, shape.ftype)
    if len(data) < shape.n_vocab:
        n_copies = -(-shape.n_vocab // len(data))
        step = data.shape[1] * QUANT_BLOCK // shape.n_embd
        data = np.concatenate([np.roll(data, i * step, axis=1) for i in range(n_copies)])[: shape.n_vocab]
    writer.add_tensor(name, data, raw_dtype=qtype)


def _embd_std(shape: _Shape) -> float:
    """A tied embedding is also the output matrix, so its rows must be short to keep the logits small."""
    return 3.0 * shape.n_embd**-0.5 if shape.tie_embeddings else 1.0


def _norm(rng: np.random.Generator, n: int) -> NDArray[np.float32]:
    return (1 + 0.1 * rng.standard_normal(n)).astype(np.float32)


def _matrix(rng: np.random.Generator, n_out: int, n_in: int, gain: float) -> NDArray[np.float32]:
    """Normal weights that turn unit-variance inputs into outputs of standard deviation `gain`."""
    return np.float32(gain * n_in**-0.5) * rng.standard_normal((n_out, n_in), dtype=np.float32)


def write_random_lora(path: Path, model: Path, *, seed: int, invocation: Sequence[int] = ()) -> Path:
    """A random adapter of a model of architecture llama, written to ``path``, which is returned.

    Parameters
    ----------
    invocation : tokens that switch an aLoRA on; empty = a LoRA
    """
    import gguf

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    if invocation:
        writer.add_key_value("adapter.alora.invocation_tokens", list(invocation), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    shapes = {t.name: t.shape for t in read_header(model).tensors}
    for name in (n for n in shapes if re.fullmatch(r"blk\.\d+\.(attn_q|attn_v|ffn_up)\.weight", n)):
        n_in, n_out = shapes[name]
        writer.add_tensor(f"{name}.lora_a", 0.1 * rng.standard_normal((4, n_in), dtype=np.float32))
        writer.add_tensor(f"{name}.lora_b", 0.1 * rng.standard_normal((n_out, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
