"""The archive of models with windows: their rings come back too, and what is read from it gives what reading all of it gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
from conftest import WINDOWED, Shape, load, logits, tokens
from llama_cpp import llama_cpp
from test_archive import ORDERS, blocks, n_archived, usable
from test_archive_edges import check_growing_text

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
SHAPES = [WINDOWED, Shape("gpt-oss-gqa4", "gpt-oss", 8, 2, n_layer=4, head_dim=64)]
CHAT = [tokens(1700, seed=3)[:n] for n in (700, 790, 1100, 1101, 1700)]


def outcome(llm: Any, prompt: list[int], shape: Shape = WINDOWED) -> tuple[list[bytes], list[list[int]]]:
    """Logits of the prompt's end and of three more tokens, and the kept positions of every head that is compressed."""
    llm.read_prompt(prompt)
    out = [logits(llm).tobytes()]
    kept = [llm.kv_positions(il, ih).tolist() for il in range(1, shape.n_layer, 2) for ih in range(shape.n_head_kv)]
    for token in (9, 10, 11):
        llm.eval([token])
        out.append(logits(llm).tobytes())
    return out, kept


@ORDERS
@pytest.mark.parametrize("n_ubatch", [64, 100, 256])
@pytest.mark.parametrize("window", [32, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_every_turn_of_a_chat_is_that_of_a_fresh_context(
    shape: Shape, window: int, n_ubatch: int, prefill: str, make_model: MakeModel, tmp_path: Path
) -> None:
    path = make_model(shape, window=window)
    options = dict(kv_size=48, prefill=prefill, n_ubatch=n_ubatch, n_batch=n_ubatch * 4)
    llm, fresh = load(path, kv_archive=tmp_path / "kv", **options), load(path, **options)
    for i, prompt in enumerate(CHAT):
        assert outcome(llm, prompt, shape) == outcome(fresh, prompt, shape)
        if n_ubatch % 64 == 0:
            assert n_archived(llm) == usable(len(CHAT[i - 1]) if i else 0, len(prompt), prefill, n_ubatch * 4)
    stats = llm.kv_stats().archive
    assert stats.n_restored + stats.n_computed == sum(map(len, CHAT)) and n_archived(llm) > 700
    assert stats.n_blocks == len(blocks(tmp_path / "kv")) == 1700 // 256 + 1
    assert stats.n_damaged == stats.n_failed == stats.n_evicted == 0


@ORDERS
@pytest.mark.parametrize("type_kv", [8, 2, 30], ids=["q8_0", "q4_0", "bf16"])
def test_cells_of_every_type_are_restored_as_they_were(type_kv: int, prefill: str, make_model: MakeModel, tmp_path: Path) -> None:
    shape = Shape("quant", "gemma3", 4, 2, n_layer=4, head_dim=64)
    path, options = make_model(shape), dict(kv_size=48, prefill=prefill, type_k=type_kv, type_v=type_kv, n_ubatch=128, n_batch=512)
    llm, fresh = load(path, kv_archive=tmp_path, **options), load(path, **options)
    for prompt in CHAT[1:4]:
        assert outcome(llm, prompt, shape) == outcome(fresh, prompt, shape)
    assert n_archived(llm) == usable(1100, 1101, prefill)


@pytest.mark.parametrize("window", [32, 300])
def test_edits_other_beginnings_and_the_same_prompt_again(window: int, make_model: MakeModel, tmp_path: Path) -> None:
    path, options = make_model(WINDOWED, window=window), dict(kv_size=48, n_ubatch=128, prefill="layer")
    llm, fresh = load(path, kv_archive=tmp_path, **options), load(path, **options)
    base = tokens(1500, seed=5)
    edited = [*base[:1000], 17, *base[1001:]]
    other = [1, 20, *base[2:]]
    joined = [*base[:512], *tokens(300, seed=6), *base[800:]]
    for prompt, n in [(base, 0), (edited, 960), (base, 1408), (base[:600], 512), (other, 0), (other, 1408), (joined, 512), (edited, 1408)]:
        assert outcome(llm, prompt) == outcome(fresh, prompt)
        assert n_archived(llm) == n


@ORDERS
@pytest.mark.parametrize("seed", range(4))
def test_prompts_of_any_length_are_those_of_a_fresh_context(seed: int, prefill: str, make_model: MakeModel) -> None:
    rng = np.random.default_rng(seed)
    path = make_model(WINDOWED, window=int(rng.integers(20, 400)))
    check_growing_text(path, outcome, rng, n_ubatch=int(rng.integers(64, 300)), seed=seed, prefill=prefill)


def test_a_restart_in_the_other_order_and_with_other_ubatches(make_model: MakeModel, tmp_path: Path) -> None:
    """A ring of as many cells has them in the same order; one of another size shares nothing."""
    path = make_model(WINDOWED)
    load(path, kv_size=48, prefill="token", n_ubatch=64, kv_archive=tmp_path).read_prompt(CHAT[2])
    for n_ubatch, n in ((200, 1088), (300, 0)):  # 232 and 332 tokens
        llm, fresh = (load(path, kv_size=32, prefill="layer", n_ubatch=n_ubatch, kv_archive=kv) for kv in (tmp_path, None))
        assert outcome(llm, CHAT[4]) == outcome(fresh, CHAT[4])
        assert n_archived(llm) == n


@ORDERS
def test_a_damaged_block_is_read_again(prefill: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Whatever of it is damaged: one byte in each layer of each block in turn."""
    path, prompt, options = make_model(WINDOWED), CHAT[2], dict(kv_size=48, prefill=prefill, n_ubatch=128, n_batch=512)
    llm, fresh = load(path, kv_archive=tmp_path, **options), load(path, **options)
    wanted = outcome(fresh, prompt)
    assert outcome(llm, prompt) == wanted
    n_bytes_row = 2 * 2 * 32 * 2  # two KV heads of 32, K and V in f16
    for file in blocks(tmp_path):
        good = file.read_bytes()
        n_rows = int.from_bytes(good[8:12], "little")
        for il in range(4):
            data = bytearray(good)
            data[len(data) - 1 - il * (n_rows * n_bytes_row + 8) - 5 * n_bytes_row] ^= 4
            file.write_bytes(data)
            assert outcome(llm, prompt) == wanted, (file.name, il)
            file.write_bytes(good)


def test_what_a_window_still_sees_can_be_taken_back(make_model: MakeModel, tmp_path: Path) -> None:
    """Of a prompt that came from the archive, as of one that was read."""
    path, options = make_model(WINDOWED), dict(kv_size=48, n_ubatch=64, prefill="layer")
    llm, fresh = load(path, kv_archive=tmp_path, **options), load(path, **options)
    memory = [llama_cpp.llama_get_memory(x.ctx) for x in (llm, fresh)]
    for _ in range(2):
        for x in (llm, fresh):
            for prompt in (tokens(900, seed=9), CHAT[2]):  # the first one leaves other rows in the rings
                x.reset()
                x.read_prompt(prompt)
            x.eval([5] * 3)
        first = {llama_cpp.llama_memory_seq_pos_min(m, 0) for m in memory}
        assert len(first) == 1
        (start,) = first
        assert [llama_cpp.llama_memory_seq_rm(m, 0, start - 1, -1) for m in memory] == [False, False]
        assert [llama_cpp.llama_memory_seq_rm(m, 0, start, -1) for m in memory] == [True, True]
        for x in (llm, fresh):
            x.n_tokens = start
            x.eval([7, 8])
        assert logits(llm).tobytes() == logits(fresh).tobytes()
    assert n_archived(llm) > 900


@ORDERS
@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_a_prompt_that_was_aborted_is_begun_again(n_steps: int, prefill: str, make_model: MakeModel, tmp_path: Path) -> None:
    """In upstream's order in a batch, too, whose first tokens had come from the archive."""
    path, prompt, options = make_model(WINDOWED), CHAT[4], dict(kv_size=48, prefill=prefill, n_ubatch=64, n_batch=512)
    wanted = outcome(load(path, **options), prompt)
    load(path, kv_archive=tmp_path, **options).read_prompt(prompt)
    llm = load(path, kv_archive=tmp_path, **options)
    calls: list[int] = []
    llm.set_progress(lambda *_: calls.append(1) or len(calls) < n_steps + 1)
    with pytest.raises(RuntimeError, match="aborted"):
        llm.read_prompt(prompt)
    llm.set_progress(None)
    assert outcome(llm, prompt) == wanted and n_archived(llm) == usable(1700, 1700, prefill)


@pytest.mark.parametrize("name", ["gemma2", "cohere2", "llama4", "gemma4 (shared cells)", "bloom"])
def test_other_kinds_of_attention(name: str, tmp_path: Path) -> None:
    """Chunks, caps of logits, layers that share cells, ALiBi: in the order that the model can be read in, each prompt in a context of its own."""
    import ctypes

    from test_sequences import Sequences

    class Lent:
        model = architectures.make_model(*architectures.cases()[name])

        def n_vocab(self) -> int:
            return architectures.N_VOCAB

    prompts = [np.random.default_rng(0).integers(0, architectures.N_VOCAB, 900)[:n].tolist() for n in (500, 900)]

    def answers(folder: Path | None) -> Iterator[tuple[bytes, int]]:
        for prompt in prompts:
            many = Sequences(Lent(), n_seq_max=1, n_ctx=2048, n_ubatch=64, unified=False, prefill="auto")
            if folder is not None:
                params = many.headkv.lib.headkv_default_archive_params()
                params.folder = os.fsencode(folder)
                many.headkv.check(many.headkv.lib.headkv_set_archive(many.ctx, ctypes.byref(params)))
            last = many.read(0, prompt)[0].tobytes()
            yield last + b"".join(many.decode({0: [token]})[0].tobytes() for token in (3, 4, 5)), many.stats(0).n_archived
            llama_cpp.llama_free(many.ctx)

    found, wanted = list(answers(tmp_path)), list(answers(None))
    assert [x[0] for x in found] == [x[0] for x in wanted]
    assert [x[1] for x in found] == [0, 448]
    llama_cpp.llama_model_free(Lent.model)
