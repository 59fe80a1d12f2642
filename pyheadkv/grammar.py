"""Grammars, checked before llama.cpp has them: at one that it cannot parse, or that no token of the vocabulary can go on
with, it ends the process or never returns."""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np

MAX_REASON = 300  # characters
MAX_DEPTH = 500  # of parentheses, for which the parser calls itself
# what is no structure: strings, classes, tokens and comments
TEXT = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|<[^>]*>|#[^\n]*', flags=re.DOTALL)
TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


def check_grammar(grammar: Any, model: Any) -> None:
    """Let a grammar pass that llama.cpp can parse.

    Parameters
    ----------
    grammar : ``llama_cpp.LlamaGrammar``
    model : ``llama_cpp._internals.LlamaModel``

    Raises
    ------
    ValueError
        it is empty, which would be no grammar, or what llama.cpp says about it
    """
    text, root = grammar._grammar, grammar._root
    if not text or "\0" in text:
        raise ValueError(f"grammar={text[:MAX_REASON]!r}: it must be rules without a NUL, among them {root!r}")
    _check_structure(TEXT.sub(lambda found: " " if found[0].startswith("#") else "_", text))
    parts = text.encode("utf-8"), root.encode("utf-8")
    if not _parse(*parts, model):
        said = " ".join(_what_is_printed(lambda: _parse(*parts, model)).split())
        raise ValueError(f"the grammar is invalid: {said[:MAX_REASON]}")


def _check_structure(text: str) -> None:
    """What the parser itself does not survive."""
    for found in re.finditer(r"\{\s*([0-9]+)\s*,\s*([0-9]+)\s*\}", text):
        if int(found[2]) < int(found[1]):
            raise ValueError(f"the grammar is invalid: {found[0]} repeats at least {found[1]} and at most {found[2]} times")
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth > MAX_DEPTH:
            raise ValueError(f"the grammar is invalid: more than {MAX_DEPTH} parentheses are open at once, make rules of them")


def _parse(text: bytes, root: bytes, model: Any) -> bool:
    sampler = llama_cpp.llama_sampler_init_grammar(model.vocab, text, root)
    if sampler:
        llama_cpp.llama_sampler_free(sampler)
    return bool(sampler)


def _what_is_printed(call: Callable[[], object]) -> str:
    """On standard error and in the log of the C library: where it says why it refuses."""
    lines: list[bytes] = []
    log = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text))
    former, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(data))
    llama_cpp.llama_log_set(log, None)
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            call()
            file.seek(0)
            return (file.read() + b"".join(lines)).decode("utf-8", "replace")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        llama_cpp.llama_log_set(former, data)


class GrammarSampler:
    """What a ``llama_cpp._internals.LlamaSampler`` with a grammar samples, as long as the grammar leaves a token."""

    def __init__(self, sampler: Any, *, n_vocab: int) -> None:
        self._sampler = sampler
        self._data = np.zeros(n_vocab, dtype=TOKEN_DATA)

    def sample(self, ctx: Any, idx: int = -1) -> int:
        """As ``llama_sampler_sample``.

        Raises
        ------
        ValueError
            the grammar allows no token of the vocabulary
        """
        data = self._data
        data["id"] = np.arange(len(data))
        data["logit"] = np.ctypeslib.as_array(ctx.get_logits_ith(idx), shape=(len(data),))
        data["p"] = 0
        pointer = data.ctypes.data_as(llama_cpp.llama_token_data_p)
        array = llama_cpp.llama_token_data_array(pointer, len(data), -1, False)
        llama_cpp.llama_sampler_apply(self._sampler.sampler, ctypes.byref(array))
        chosen = array.data[array.selected]
        if chosen.logit == -np.inf:
            raise ValueError(
                "the grammar allows no token of the vocabulary after what was generated: the model cannot write what it asks for"
            )
        self._sampler.accept(chosen.id)
        return int(chosen.id)
