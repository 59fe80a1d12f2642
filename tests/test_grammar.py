"""Grammars: a wrong one is a ValueError with the reason, with the stock cache and with ours, and never the end of the process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from conftest import SHAPES, load
from llama_cpp import LlamaGrammar

MakeModel = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture(scope="module", params=[None, 64])
def llm(request: pytest.FixtureRequest, make_model: MakeModel) -> Any:
    return load(make_model(SHAPES[1]), kv_size=request.param, n_ctx=512)


def log_callback() -> int | None:
    """Address of what llama.cpp logs with."""
    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    return ctypes.cast(callback, ctypes.c_void_p).value


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ("root ::= (", r"expecting '\)' at"),
        ('root ::= "a', "unexpected end of input"),
        ("root ::= bar", "Undefined rule identifier 'bar'"),
        ('first ::= "a"', "does not contain a 'root' symbol"),
        ('root ::= root "a" | "b"', "left recursion"),
        ("", "grammar='': it must be rules"),
        ("# nothing", "failed to parse"),
        ('root ::= "a"\0 )', "without a NUL"),
        ('root ::= "a"{5, # at least\n2}', "at least 5 and at most 2 times"),
        ("root ::= " + 20000 * "(", "more than 500 parentheses"),
        ('root ::= "\udc80"', "surrogates not allowed"),
    ],
    ids=lambda value: value[:12].encode("ascii", "replace").decode(),
)
def test_a_wrong_grammar_is_a_value_error_with_the_reason(rules: str, reason: str, llm: Any) -> None:
    log = log_callback()
    expected = llm.create_completion("the", max_tokens=3, temperature=0)["choices"][0]["text"]
    grammar = LlamaGrammar.from_string(rules, verbose=False)
    with pytest.raises(ValueError, match=reason):
        llm.create_completion("the", max_tokens=3, grammar=grammar)
    with pytest.raises(ValueError, match=reason):
        list(llm.create_completion("the", max_tokens=3, grammar=grammar, stream=True))
    assert llm.create_completion("the", max_tokens=3, temperature=0)["choices"][0]["text"] == expected
    assert log_callback() == log  # it is where it was


def test_a_grammar_that_no_token_can_go_on_with_is_a_value_error(llm: Any) -> None:
    n_vocab = llm.n_vocab()
    grammar = LlamaGrammar.from_string(f'root ::= "a" <[{n_vocab + 9}]>', verbose=False)
    with pytest.raises(ValueError, match="allows no token of the vocabulary"):
        llm.create_completion("the", max_tokens=3, grammar=grammar)


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.9, "seed": 3}, {"temperature": 0.9, "seed": 3, "mirostat_mode": 2}], ids=str
)
@pytest.mark.parametrize("rules", ['root ::= [a-z ]{4,40} "."', r'root ::= "\"" ("{9,1}" | "(((" | [\]x])* "\""'])
def test_tokens_are_those_of_llama_cpp(rules: str, options: dict[str, Any], make_model: MakeModel) -> None:
    path, grammar = make_model(SHAPES[1]), LlamaGrammar.from_string(rules, verbose=False)
    texts = []
    for cls in (llama_cpp.Llama, None):
        llm = load(path, n_ctx=256) if cls is None else cls(str(path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
        texts.append([llm.create_completion("the code", max_tokens=24, grammar=grammar, **options)["choices"][0]["text"] for _ in range(2)])
    assert texts[0] == texts[1] and texts[0][0]
