"""The embedded model: its tokenizer, its answers, its metadata, and the bundled server against the library."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

try:
    import pyheadkv
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from conftest import N_THREADS, load

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import llama_server

from pyheadkv import gguf_keys
from pyheadkv.cli import serve
from pyheadkv.eval import needle
from pyheadkv.model import read_shape

PATH = pyheadkv.embedded_model()
N_CTX, N_UBATCH = 2048, 512
MAX_BYTES = 8 << 20
SECONDS = 60  # for the server to start
SHARE_RIGHT = 0.8

pytestmark = pytest.mark.skipif(not PATH.is_file(), reason="the embedded model is not there yet")


@pytest.fixture(scope="module")
def llm() -> Any:
    return load(PATH, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH, flash_attn=True)


def documents(*, n_tokens: Sequence[int], n_each: int, kinds: Sequence[needle.Kind] = needle.KINDS) -> list[needle.Document]:
    """Documents of all kinds, their lengths in turn."""
    asked = [kind for kind in kinds for _ in range(n_each)]
    lengths = [n_tokens[i % len(n_tokens)] for i in range(len(asked))]
    return [needle.make_document(random.Random(i), n_tokens=n, kinds=[kind]) for i, (kind, n) in enumerate(zip(asked, lengths))]


def words_of(ids: Sequence[int]) -> list[str]:
    """The trained words that tokens stand for, whatever their spelling; bytes and specials are left out."""
    variants = [word_id for _, word_id in needle.variants()]
    trained = [i if i < needle.N_TRAINED_TOKENS else variants[i - needle.N_TRAINED_TOKENS] for i in ids]
    return needle.decode(trained).split()


def typed(text: str) -> str:
    """The text as a person would write it: sentences and names in capitals, no space before a mark, line breaks."""
    spellings = {token for token in needle.token_list() if not token.startswith(" ")}
    words = text.split()
    for i, word in enumerate(words):
        begins = i == 0 or words[i - 1] == "."
        if (begins or word in needle.NAMES) and word.capitalize() in spellings:
            words[i] = word.capitalize()
    joined = " ".join(words)
    for mark in (".", ",", "?", ":", "'s"):
        joined = joined.replace(f" {mark}", mark)
    return re.sub(r"(\.[^.]*\.) ", r"\1\n", joined)


def answer(llm: Any, prompt: str, document: needle.Document) -> str:
    completion = llm.create_completion(prompt, max_tokens=document.n_answer_tokens + 1, temperature=0)
    return str(completion["choices"][0]["text"])


# tokenizer


@pytest.mark.parametrize("kind", needle.KINDS)
def test_the_tokenizer_gives_the_ids_of_training(llm: Any, kind: needle.Kind) -> None:
    for document in documents(n_tokens=[600, 1000], n_each=4, kinds=[kind]):
        text = f" {document.prompt()} {document.answer}"
        ids = llm.tokenize(text.encode(), add_bos=False)
        assert ids == needle.encode(text)
        assert llm.detokenize(ids) == text.encode()


@pytest.mark.parametrize("kind", needle.KINDS)
def test_text_as_typed_means_the_same_words(llm: Any, kind: needle.Kind) -> None:
    for document in documents(n_tokens=[600, 1000], n_each=4, kinds=[kind]):
        text = f"{document.prompt()} {document.answer}"
        for spelling in (text, typed(text), text.replace(" ", "\n"), f"\n\n{text}\n"):
            ids = llm.tokenize(spelling.encode(), add_bos=False)
            assert words_of(ids) == text.split()
            assert llm.detokenize(ids) == spelling.encode()


def test_typed_text_is_what_a_person_types() -> None:
    text = "the code of anna is 48 17 . the room of bob equals anna 's . question : who ? anna , bob"
    assert typed(text) == "The code of Anna is 48 17. The room of Bob equals Anna's.\nQuestion: who? Anna, Bob"


def test_every_token_of_the_file_is_the_one_of_the_language(llm: Any) -> None:
    assert llm.n_vocab() == len(needle.token_list())
    assert (llm.token_bos(), llm.token_eos()) == (needle.BOS, needle.EOS)
    for i, token in enumerate(needle.token_list()[needle.FIRST_WORD_ID :], start=needle.FIRST_WORD_ID):
        assert llm.detokenize([i]).decode() == token


@pytest.mark.parametrize("text", ["xyz", "naïve", "\u6f22\u5b57", "\U0001f642", "a\x00b\tc\r\n", "</s><s>", "{anna}48.17"])
def test_bytes_outside_of_the_vocabulary_survive(llm: Any, text: str) -> None:
    assert llm.detokenize(llm.tokenize(text.encode(), add_bos=False)) == text.encode()


@pytest.mark.parametrize("text", ["anna  bob", "hello world", "anna \n", " "])
def test_spaces_outside_of_the_vocabulary_survive(llm: Any, text: str) -> None:
    assert llm.detokenize(llm.tokenize(text.encode(), add_bos=False)) == text.encode()


# answers


def test_chat_answers_are_right(llm: Any) -> None:
    asked = documents(n_tokens=[600, 800, 1000], n_each=4)
    n_right = 0
    for document in asked:
        n = document.n_answer_tokens + 1
        chat = llm.create_chat_completion(document.messages(), max_tokens=n, temperature=0)
        n_right += document.is_correct(chat["choices"][0]["message"]["content"])
    assert n_right >= SHARE_RIGHT * len(asked), f"{n_right} of {len(asked)}"


def test_prompts_with_and_without_leading_space_get_the_same_answer(llm: Any) -> None:
    asked = documents(n_tokens=[600, 800, 1000], n_each=2)
    texts = [answer(llm, document.prompt(), document) for document in asked]
    assert [answer(llm, f" {document.prompt()}", document) for document in asked] == texts
    n_right = sum(document.is_correct(text) for document, text in zip(asked, texts))
    assert n_right >= SHARE_RIGHT * len(asked), f"{n_right} of {len(asked)}"


# metadata


def test_the_file_is_small_and_holds_importance_and_a_chat_template(llm: Any) -> None:
    assert PATH.stat().st_size <= MAX_BYTES
    shape, importance = read_shape(PATH), gguf_keys.read_importance(PATH)
    assert importance is not None
    assert importance.values.shape == (shape.n_layer, shape.n_head)
    assert np.isfinite(importance.values).all() and (importance.values >= 0).all() and importance.values.max() > 0
    assert llm.metadata["tokenizer.chat_template"] == needle.CHAT_TEMPLATE


# server


def test_the_server_answers_as_the_library(llm: Any, tmp_path: Path) -> None:
    try:
        serve.server_path()
    except ValueError as error:
        pytest.skip(str(error))
    asked = documents(n_tokens=[1000], n_each=1)
    expected = [answer(llm, document.prompt(), document) for document in asked]
    flags = ["-m", PATH, "-c", N_CTX, "-b", N_UBATCH, "-ub", N_UBATCH, "-t", N_THREADS, "-tb", N_THREADS, "-np", 1, "-fa", "on"]
    with llama_server.running(*flags, log=tmp_path / "log", seconds=SECONDS) as server:
        answers = [server.complete(d.prompt(), d.n_answer_tokens + 1, cache_prompt=False)["content"] for d in asked]
    assert answers == expected
    assert all(expected)
