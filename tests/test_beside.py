"""Models in which some layers are not ours: rings of windowed layers and recurrent states go with their sequences."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import numpy.typing as npt
import pytest
from conftest import nmse
from llama_cpp import llama_cpp
from test_sequences import Sequences

from pyheadkv.options import Options

N_SHORT, N_LONG = 150, 700  # a ring holds 256 tokens, and the window is 32
WINDOWED = ["gemma3 (sliding window)", "gemma2", "cohere2", "llama4", "gpt-oss", "gemma4 (shared cells)"]
RECURRENT = ["jamba", "falcon-h1", "qwen3next", "lfm2", "granitehybrid", "nemotron_h"]
ALL = pytest.mark.parametrize("name", WINDOWED + RECURRENT)


@dataclass
class Lent:
    """A model for ``Sequences``."""

    model: Any

    def n_vocab(self) -> int:
        return architectures.N_VOCAB


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Lent]]:
    """Random models, made when they are asked for."""
    made: dict[str, Lent] = {}

    class Models(dict[str, Lent]):
        def __missing__(self, name: str) -> Lent:
            self[name] = made[name] = Lent(architectures.make_model(*architectures.cases()[name]))
            assert made[name].model
            return made[name]

    yield Models()
    for lent in made.values():
        llama_cpp.llama_model_free(lent.model)


@contextmanager
def sequences(lent: Lent, **options: Any) -> Iterator[Sequences]:
    made = Sequences(lent, **{"n_seq_max": 1, "n_ctx": 4096, "n_ubatch": 64, "unified": False, "prefill": "layer", **options})
    try:
        yield made
    finally:
        llama_cpp.llama_free(made.ctx)


def prompt_of(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, architectures.N_VOCAB, n).tolist()


def alone(lent: Lent, prompt: Sequence[int], new: Sequence[int], **options: Any) -> list[npt.NDArray[np.float32]]:
    """Logits of the prompt's end and of each new token, of a sequence that has its context to itself."""
    with sequences(lent, **options) as one:
        return [one.read(0, prompt)[0], *(one.decode({0: [token]})[0] for token in new)]


def can_remove(many: Sequences, s: int, start: int) -> bool:
    return bool(llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(many.ctx), s, start, -1))


@ALL
def test_sequences_answer_as_alone_while_others_come_and_go(name: str, models: dict[str, Lent]) -> None:
    """Prompts of other lengths are read while sequences are decoded, one leaves, its place is taken again."""
    prompts = [prompt_of(n, seed) for seed, n in enumerate((N_SHORT, N_LONG, 90))]
    new = [prompt_of(6, 10 + s) for s in range(3)]
    expected = [alone(models[name], prompt, tokens) for prompt, tokens in zip(prompts, new, strict=True)]
    with sequences(models[name], n_seq_max=3) as many:
        for s in (0, 1):
            assert (many.read(s, prompts[s])[s] == expected[s][0]).all()
        for i in (0, 1):
            logits = many.decode({s: [new[s][i]] for s in (0, 1)})
            assert all(nmse(logits[s], expected[s][i + 1]) < 1e-5 for s in (0, 1))
        assert (many.read(2, prompts[2])[2] == expected[2][0]).all()
        logits = many.decode({s: [new[s][i]] for s, i in ((0, 2), (2, 0))})
        assert nmse(logits[0], expected[0][3]) < 1e-5 and nmse(logits[2], expected[2][1]) < 1e-5
        many.remove(0)
        logits = many.decode({s: [new[s][i]] for s, i in ((2, 1), (1, 2))})  # not in their order
        assert nmse(logits[1], expected[1][3]) < 1e-5 and nmse(logits[2], expected[2][2]) < 1e-5
        assert (many.read(0, prompts[0])[0] == expected[0][0]).all()
        logits = many.decode({s: [new[s][i]] for s, i in ((0, 0), (1, 3), (2, 2))})
        assert all(nmse(logits[s], expected[s][i]) < 1e-5 for s, i in ((0, 1), (1, 4), (2, 3)))


@pytest.mark.parametrize("name", [name for name in WINDOWED + RECURRENT if "shared" not in name])  # which are not read layer by layer
def test_others_decode_on_between_the_steps_of_a_paused_prompt(name: str, models: dict[str, Lent]) -> None:
    first, second, new = prompt_of(N_SHORT, 1), prompt_of(N_LONG, 2), prompt_of(40, 3)
    expected = [alone(models[name], first, new), alone(models[name], second, new[:3])]
    with sequences(models[name], n_seq_max=2) as many:
        many.read(0, first)
        n_paused = 0
        for i, token in enumerate(new):
            n_paused += many.read_ahead(1, second, 0) > 1
            assert (many.decode({0: [token]})[0] == expected[0][i + 1]).all()
        assert n_paused > 5
        assert (many.read(1, second)[1] == expected[1][0]).all()
        for i in range(3):
            assert (many.decode({1: [new[i]]})[1] == expected[1][i + 1]).all()


@ALL
@pytest.mark.parametrize("prefill", ["layer", "token"])
def test_a_prompt_that_was_given_up_leaves_nothing(prefill: str, name: str, models: dict[str, Lent]) -> None:
    """Aborted in the middle, by its progress or between its batches; what comes then is as in a new context."""
    prompts = [prompt_of(N_LONG, 1), prompt_of(N_SHORT, 2)]
    (expected,) = alone(models[name], prompts[1], [])
    with sequences(models[name], prefill=prefill) as one:
        n_calls = 0

        @one.headkv.Progress
        def stop(*_: Any) -> bool:
            nonlocal n_calls
            n_calls += 1
            return n_calls < 5

        one.headkv.check(one.headkv.lib.headkv_set_progress(one.ctx, stop, None))
        one.announce(0, N_LONG)
        with pytest.raises(RuntimeError, match="aborted"):
            one.decode({0: prompts[0]})
        one.headkv.check(one.headkv.lib.headkv_set_progress(one.ctx, one.headkv.Progress(), None))
        assert can_remove(one, 0, -1) and one.state(0) == 0
        assert (one.read(0, prompts[1])[0] == expected).all()
        one.remove(0)
        one.announce(0, N_LONG, whole=False)
        one.decode({0: prompts[0][:200]})
        one.remove(0)
        assert (one.read(0, prompts[1])[0] == expected).all()


@ALL
def test_saved_sequences_are_restored_to_the_bit(name: str, models: dict[str, Lent]) -> None:
    """One sequence under another number, and the whole context; a damaged file is refused and leaves nothing."""
    prompts, new = [prompt_of(N_LONG, 1), prompt_of(N_SHORT, 2)], prompt_of(4, 3)
    c = llama_cpp
    with sequences(models[name], n_seq_max=2) as many:
        for s, prompt in enumerate(prompts):
            many.read(s, prompt)
            many.decode({s: [new[0]]})
        one = np.zeros(c.llama_state_seq_get_size(many.ctx, 1), dtype=np.uint8)
        data = one.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        assert c.llama_state_seq_get_data(many.ctx, data, one.size, 1) == one.size
        whole = np.zeros(c.llama_state_get_size(many.ctx), dtype=np.uint8)
        assert c.llama_state_get_data(many.ctx, whole.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), whole.size) == whole.size
        expected = [[many.decode({s: [token]})[s] for token in new[1:]] for s in (0, 1)]
    with sequences(models[name], n_seq_max=2) as many:
        many.read(0, prompts[0][:77])  # what is there is replaced
        assert c.llama_state_seq_set_data(many.ctx, data, one.size, 0) == one.size
        many.n_past[0] = N_SHORT + 1
        assert [(many.decode({0: [token]})[0] == logits).all() for token, logits in zip(new[1:], expected[1], strict=True)] == [True] * 3
        assert c.llama_state_set_data(many.ctx, whole.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), whole.size) == whole.size
        many.n_past = [N_LONG + 1, N_SHORT + 1]
        for s in (0, 1):
            assert [(many.decode({s: [token]})[s] == logits).all() for token, logits in zip(new[1:], expected[s], strict=True)] == [
                True
            ] * 3
        with sequences(models[name]) as alone_there:  # whatever the number of sequences
            assert c.llama_state_seq_set_data(alone_there.ctx, data, one.size, 0) == one.size
            alone_there.n_past[0] = N_SHORT + 1
            got = [alone_there.decode({0: [token]})[0] for token in new[1:]]
            assert [(a == b).all() for a, b in zip(got, expected[1], strict=True)] == [True] * 3
        one[-3000] ^= 1
        assert c.llama_state_seq_set_data(many.ctx, data, one.size, 1) == 0
        assert "damaged" in many.headkv.last_error() and many.state(1) == 2  # as it was
        logits = many.decode({0: [5]})[0]
        assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", WINDOWED)
def test_what_a_window_still_sees_can_be_taken_back(name: str, models: dict[str, Lent]) -> None:
    """Generated tokens and recent cells; not so many that a window reaches behind the ring, nor cells that heads have dropped."""
    prompt, new = prompt_of(N_LONG, 1), prompt_of(8, 2)
    expected = alone(models[name], prompt, new)
    with sequences(models[name]) as one:
        memory = llama_cpp.llama_get_memory(one.ctx)
        one.read(0, prompt)
        for token in prompt_of(5, 9):
            one.decode({0: [token]})
        assert llama_cpp.llama_memory_seq_pos_min(memory, 0) == N_LONG - 8  # recent cells
        assert can_remove(one, 0, N_LONG)
        one.n_past[0] = N_LONG
        assert [nmse(one.decode({0: [token]})[0], logits) < 1e-6 for token, logits in zip(new, expected[1:], strict=True)] == [True] * len(
            new
        )
        for start in (1, 100, N_LONG - 9):
            assert not can_remove(one, 0, start)
        for token in prompt_of(300, 3):
            one.decode({0: [token]})
        if name == "llama4":
            return  # its chunk is larger than the context; the other rings have lost what is before these
        first = llama_cpp.llama_memory_seq_pos_min(memory, 0)
        assert N_LONG < first < N_LONG + 308
        assert not can_remove(one, 0, first - 1) and can_remove(one, 0, first)
        one.n_past[0] = first
        one.decode({0: [4]})
        assert can_remove(one, 0, -1) and one.state(0) == 0


@pytest.mark.parametrize("name", RECURRENT)
def test_what_went_through_a_recurrent_layer_cannot_be_taken_back(name: str, models: dict[str, Lent]) -> None:
    """As upstream has it: all or nothing, and nothing has changed."""
    prompt, new = prompt_of(N_SHORT, 1), prompt_of(4, 2)
    expected = alone(models[name], prompt, new)
    with sequences(models[name]) as one:
        one.read(0, prompt)
        for i in (0, 1):
            one.decode({0: [new[i]]})
        assert not can_remove(one, 0, N_SHORT + 1) and not can_remove(one, 0, N_SHORT) and not can_remove(one, 0, 1)
        assert llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(one.ctx), 0) == N_SHORT + 1
        for i in (2, 3):
            assert (one.decode({0: [new[i]]})[0] == expected[i + 1]).all()
        one.remove(0)
        assert (one.read(0, prompt)[0] == expected[0]).all()


@pytest.mark.parametrize("name", [WINDOWED[0], RECURRENT[0]])
def test_random_cells_are_refused_and_an_archive_of_states(name: str, models: dict[str, Lent], tmp_path: Path) -> None:
    with sequences(models[name]) as one:
        lib = one.headkv.lib
        params = lib.headkv_default_archive_params()
        params.folder = str(tmp_path).encode()
        assert (lib.headkv_set_archive(one.ctx, ctypes.byref(params)) < 0) == (name in RECURRENT)
        assert name not in RECURRENT or "recurrent layers, whose state is right at one position alone" in one.headkv.last_error()
        assert lib.headkv_fill_prompt(one.ctx, 0, 100, 1) < 0
        assert "cannot be filled" in one.headkv.last_error()


@ALL
def test_a_prompt_is_compressed_as_another_sequence(name: str, models: dict[str, Lent]) -> None:
    """The copy goes on as the prompt itself would, which stays as it is and is compressed again."""
    prompt, new = prompt_of(N_LONG, 1), prompt_of(4, 2)
    expected = alone(models[name], prompt, new, prefill="token")
    with sequences(models[name], n_seq_max=3, prefill="token") as many:
        many.announce(0, N_LONG)
        many.decode({0: prompt})
        for s in (2, 1):
            many.headkv.check(many.headkv.lib.headkv_compress_as(many.ctx, 0, s))
            many.n_past[s] = N_LONG
            assert (many.state(0), many.state(s)) == (1, 2)
            for i, token in enumerate(new):
                assert nmse(many.decode({s: [token]})[s], expected[i + 1]) < 1e-6
        many.end_prompt(0)
        for i, token in enumerate(new):
            assert nmse(many.decode({0: [token]})[0], expected[i + 1]) < 1e-6
        many.remove(2)
        assert nmse(many.decode({1: [7]})[1], many.decode({0: [7]})[0]) < 1e-6


def test_images_are_refused_and_texts_go_on(models: dict[str, Lent]) -> None:
    """M-RoPE: a text has one position per token, an image several."""
    prompt, n_embd = prompt_of(N_SHORT, 1), architectures.N_EMBD
    expected = alone(models["qwen2vl"], prompt, [5])
    with sequences(models["qwen2vl"]) as one:
        one.read(0, prompt)
        batch = llama_cpp.llama_batch_init(4, n_embd, 1)
        pos = (ctypes.c_int32 * 16)(*[N_SHORT + i % 4 for i in range(16)])
        given = ctypes.addressof(batch.pos.contents)
        batch.n_tokens, batch.pos = 4, ctypes.cast(pos, type(batch.pos))
        for i in range(4):
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == 3
        ctypes.memset(batch.embd, 0, 4 * 4 * n_embd)
        assert llama_cpp.llama_decode(one.ctx, batch) != 0
        assert "those of an image" in one.headkv.last_error()
        batch.pos = ctypes.cast(given, type(batch.pos))
        llama_cpp.llama_batch_free(batch)
        assert nmse(one.decode({0: [5]})[0], expected[1]) < 1e-6


def test_rollback_of_recurrent_states_is_refused(models: dict[str, Lent]) -> None:
    """Upstream keeps the last tokens of a prompt in one ubatch for it, which is not done here."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.flash_attn_type, params.n_rs_seq = 256, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, 2
    with architectures._lib.creating(Options(kv_size=40, policy="snapkv").to_params(None, None)):
        assert not llama_cpp.llama_init_from_model(models["lfm2"].model, params)
    assert "n_rs_seq" in architectures._lib.last_error()


def test_memory_of_other_layers_is_counted(models: dict[str, Lent]) -> None:
    """A ring of 256 cells in the windowed layers, whatever the context; bytes per sequence."""
    name = WINDOWED[0]
    n_windowed = sum(1 for il in range(architectures.N_LAYER) if (il + 1) % 2)
    per_seq = n_windowed * 256 * 2 * architectures.N_HEAD_KV * architectures.HEAD_DIM * 2
    for n_seq_max in (1, 3):
        with sequences(models[name], n_seq_max=n_seq_max, n_ctx=4096 * n_seq_max) as many:
            assert many.stats(0).bytes_beside == n_seq_max * per_seq
    with sequences(models["jamba"], n_seq_max=2) as many:
        assert many.stats(0).bytes_beside > 0


@pytest.mark.parametrize(("n_global", "chosen"), [(1, "upstream's"), (3, "layer by layer")])
def test_the_order_that_takes_less_is_chosen(n_global: int, chosen: str) -> None:
    """Hidden states of a prompt against K and V of the layers that need not be staged at once."""
    keys = dict(architectures.cases()[WINDOWED[0]][1])
    n_layer = n_global + 1
    keys |= {"block_count": n_layer, "attention.sliding_window_pattern": [1] + [0] * n_global, "embedding_length": 64}
    lent = Lent(architectures.make_model("gemma3", keys))
    try:
        with sequences(lent, prefill="auto") as one:
            why = one.headkv.lib.headkv_why_token_prefill(one.ctx).decode()
            assert ("K and V of one layer take 512 bytes, K and V of all layers that are compressed 256" in why) == (chosen == "upstream's")
            assert (why == "") == (chosen == "layer by layer")
        with sequences(lent, prefill="layer") as one:
            assert one.headkv.lib.headkv_why_token_prefill(one.ctx) == b""
    finally:
        llama_cpp.llama_model_free(lent.model)
