"""Trained weights -> GGUF of architecture llama, with tokenizer, chat template and head importance."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from . import language
from .model import ModelOptions, NeedleModel

GGUF_TYPES: dict[str, gguf.GGMLQuantizationType] = {
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_FILE_TYPES = {
    gguf.GGMLQuantizationType.F16: gguf.LlamaFileType.MOSTLY_F16,
    gguf.GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
Array = NDArray[np.float32]


def _add_shape(writer: gguf.GGUFWriter, options: ModelOptions, n_vocab: int) -> None:
    writer.add_context_length(options.n_ctx)
    writer.add_embedding_length(options.n_embd)
    writer.add_block_count(options.n_layer)
    writer.add_feed_forward_length(options.n_ff)
    writer.add_head_count(options.n_head)
    writer.add_head_count_kv(options.n_head_kv)
    writer.add_key_length(options.n_embd_head)
    writer.add_value_length(options.n_embd_head)
    writer.add_rope_dimension_count(options.n_embd_head)
    writer.add_rope_freq_base(options.rope_freq_base)
    writer.add_layer_norm_rms_eps(options.rms_eps)
    writer.add_vocab_size(n_vocab)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """SPM whose words are user-defined tokens with their leading space inside: llama.cpp cuts them out of a text,
    longest first, before SPM sees the rest, which falls back to bytes."""
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * len(language.BYTE_TOKENS)
    tokens = language.token_list()
    kinds += [gguf.TokenType.USER_DEFINED] * (len(tokens) - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_scores([0.0 if i < language.FIRST_WORD_ID else -float(i) for i in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(language.BOS)
    writer.add_eos_token_id(language.EOS)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    # a prompt may begin with or without a space: both spellings of its first word are tokens
    writer.add_add_space_prefix(False)
    writer.add_chat_template(language.CHAT_TEMPLATE)


def _add_importance(writer: gguf.GGUFWriter, importance: Array, source: str) -> None:
    key = "llama.attention.head_importance"
    writer.add_array(key, [float(x) for x in importance.reshape(-1)])
    writer.add_key_value(f"{key}.shape", [int(n) for n in importance.shape], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    writer.add_string(f"{key}.method", "headkv-r2")
    writer.add_string(f"{key}.source", source)
    writer.add_uint32(f"{key}.version", 1)


def _interleaved(weight: Array, n_head: int) -> Array:
    """Rows of a query or key projection in the order of llama.cpp, whose RoPE turns neighbouring channels."""
    n = weight.shape[0] // n_head // 2
    return weight.reshape(n_head, 2, n, -1).swapaxes(1, 2).reshape(weight.shape)


def _tensors(model: NeedleModel) -> dict[str, Array]:
    """All tensors under the names of llama.cpp, rows in its order."""
    weights = {name: value.detach().float().cpu().numpy() for name, value in model.state_dict().items()}
    copied = [base for _, base in language.variants()]
    embedding, head = weights["embedding.weight"], weights["head.weight"]
    tensors = {
        # another spelling reads as the word it stands for, and is never generated: its output row is that of <unk>
        "token_embd": np.concatenate([embedding, embedding[copied]]),
        "output": np.concatenate([head, np.repeat(head[:1], len(copied), 0)]),
        "output_norm": weights["norm.weight"],
    }
    names = {
        "attn_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "attn.q": "attn_q",
        "attn.k": "attn_k",
        "attn.v": "attn_v",
        "attn.out": "attn_output",
        "ffn.gate": "ffn_gate",
        "ffn.up": "ffn_up",
        "ffn.down": "ffn_down",
    }
    heads = {"attn_q": model.options.n_head, "attn_k": model.options.n_head_kv}
    for i in range(model.options.n_layer):
        for ours, theirs in names.items():
            weight = weights[f"blocks.{i}.{ours}.weight"]
            tensors[f"blk.{i}.{theirs}"] = _interleaved(weight, heads[theirs]) if theirs in heads else weight
    return tensors


def write_gguf(model: NeedleModel, path: Path, *, kind: gguf.GGMLQuantizationType, importance: Array, source: str) -> None:
    """Write the model; matrices in type `kind`, norms in F32.

    Parameters
    ----------
    importance : (n_layer, n_head) float32
    source : what made the file, for people
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("pyheadkv needle model")
    writer.add_file_type(_FILE_TYPES[kind])
    tensors = _tensors(model)
    _add_shape(writer, model.options, len(tensors["token_embd"]))
    _add_tokenizer(writer)
    _add_importance(writer, importance, source)
    for name, values in tensors.items():
        values = np.ascontiguousarray(values)
        if values.ndim == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
