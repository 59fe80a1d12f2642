"""Several sequences in one context: each behaves as if it were alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import N_THREADS, SHAPES, Shape, load, nmse, tokens

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
KV_SIZE = 40


class Sequences:
    """A context for several sequences, through the C API.

    Parameters
    ----------
    llm : lends its model
    """

    def __init__(self, llm: Any, *, n_seq_max: int, n_ctx: int = 8192, n_ubatch: int = 64, unified: bool = True, **options: Any) -> None:
        import llama_cpp

        from pyheadkv import _lib
        from pyheadkv.options import Options

        self.c, self.headkv, self.model = llama_cpp, _lib, llm.model
        self.n_vocab = llm.n_vocab()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_ctx, n_ubatch, n_seq_max
        params.n_threads = params.n_threads_batch = N_THREADS
        params.kv_unified = unified
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        headkv = Options(kv_size=KV_SIZE, policy="snapkv", **options).to_params(None, None)
        with _lib.creating(headkv):
            self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        assert self.ctx, _lib.last_error()
        self.n_past = [0] * n_seq_max

    def announce(self, s: int, n: int, *, whole: bool = True, params: Any = None) -> None:
        self.headkv.check(self.headkv.lib.headkv_begin_prompt(self.ctx, s, n, whole, params))

    def end_prompt(self, s: int) -> None:
        self.headkv.check(self.headkv.lib.headkv_end_prompt(self.ctx, s))

    def stats(self, s: int) -> Any:
        stats = self.headkv.Stats(size=ctypes.sizeof(self.headkv.Stats))
        self.headkv.check(self.headkv.lib.headkv_get_stats(self.ctx, s, ctypes.byref(stats)))
        return stats

    def state(self, s: int) -> int:
        return int(self.stats(s).state)

    def positions(self, s: int, il: int, ih: int) -> list[int]:
        out = np.zeros(8192, dtype=np.int32)
        n = self.headkv.lib.headkv_get_positions(self.ctx, s, il, ih, out.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(out))
        return out[: self.headkv.check(n)].tolist()

    def decode(self, new: Mapping[int, Sequence[int]], *, interleave: bool = False) -> dict[int, npt.NDArray[np.float32]]:
        """One llama_decode call: tokens by sequence. Returns the logits of the last token of each."""
        entries = [(s, self.n_past[s] + i, token, i == len(row) - 1) for s, row in new.items() for i, token in enumerate(row)]
        if interleave:
            entries.sort(key=lambda e: (e[1] - self.n_past[e[0]], e[0]))
        batch = self.c.llama_batch_init(len(entries), 0, 1)
        try:
            batch.n_tokens = len(entries)
            for i, (s, pos, token, last) in enumerate(entries):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, pos, 1, s, last
            code = self.c.llama_decode(self.ctx, batch)
        finally:
            self.c.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}: {self.headkv.last_error()}")
        for s, row in new.items():
            self.n_past[s] += len(row)
        return {
            s: np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.ctx, i), shape=(self.n_vocab,)).copy()
            for i, (s, _, _, last) in enumerate(entries)
            if last
        }

    def read_ahead(self, s: int, prompt: Sequence[int], max_ms: int = 1) -> int:
        """Steps left after at least one more of a whole prompt."""
        ids = np.asarray(prompt, dtype=np.int32)
        return self.headkv.check(
            self.headkv.lib.headkv_read_ahead(self.ctx, s, ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(ids), max_ms)
        )

    def remove(self, s: int) -> None:
        assert self.c.llama_memory_seq_rm(self.c.llama_get_memory(self.ctx), s, -1, -1)
        self.n_past[s] = 0

    def read(self, s: int, prompt: Sequence[int], **others: Any) -> dict[int, npt.NDArray[np.float32]]:
        self.announce(s, len(prompt))
        out = self.decode({s: prompt, **others})
        self.end_prompt(s)
        return out


def params_of(**options: Any) -> Any:
    from pyheadkv.options import Options

    return Options(**{"kv_size": KV_SIZE, "policy": "snapkv", **options}).to_params(None, None)


@contextmanager
def sequences(path: Path, **kwargs: Any) -> Iterator[Sequences]:
    llm = load(path, n_ctx=256, n_ubatch=64, flash_attn=True)
    made = Sequences(llm, **kwargs)
    try:
        yield made
    finally:
        made.c.llama_free(made.ctx)
        llm.close()


def alone(path: Path, prompt: Sequence[int], n: int, **options: Any) -> list[npt.NDArray[np.float32]]:
    """Logits of a sequence that has its context to itself: of the prompt's end, then of n greedy tokens."""
    with sequences(path, n_seq_max=1, **options) as one:
        out = [one.read(0, prompt)[0]]
        for _ in range(n):
            out.append(one.decode({0: [int(out[-1].argmax())]})[0])
        return out


MODES: dict[str, dict[str, Any]] = {
    "fused": {},
    "composed": {"attend": "composed"},
    "buckets": {"attend": "composed", "n_buckets": 2},
    "token": {"prefill": "token"},
}
CASES = [(shape, mode, 4) for shape in SHAPES for mode in MODES] + [(SHAPES[1], "fused", 2), (SHAPES[1], "fused", 8)]


@pytest.mark.parametrize(("shape", "mode", "n_seq"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_sequences_decode_together_as_they_do_alone(shape: Shape, mode: str, n_seq: int, make_model: MakeModel) -> None:
    """Greedy tokens are equal; logits too, up to the matrix products of a larger batch."""
    options = MODES[mode]
    path, n = make_model(shape), 12
    prompts = [tokens(60 + 97 * s, seed=s) for s in range(n_seq)]
    expected = [alone(path, prompt, n, **options) for prompt in prompts]
    with sequences(path, n_seq_max=n_seq, **options) as many:
        logits = {s: many.read(s, prompt)[s] for s, prompt in enumerate(prompts)}
        for s in range(n_seq):
            assert (logits[s] == expected[s][0]).all()
        for i in range(1, n + 1):
            logits = many.decode({s: [int(expected[s][i - 1].argmax())] for s in range(n_seq)})
            for s in range(n_seq):
                assert nmse(logits[s], expected[s][i]) < 1e-5
                best, ours = int(expected[s][i].argmax()), int(logits[s].argmax())
                assert best == ours or expected[s][i][best] - expected[s][i][ours] < 5e-3 * expected[s][i].std()


@ALL_SHAPES
@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_others_decode_on_in_the_batch_of_a_prompt(prefill: str, shape: Shape, make_model: MakeModel) -> None:
    path, first, second = make_model(shape), tokens(150, seed=1), tokens(333, seed=2)
    expected = [alone(path, prompt, 3, prefill=prefill) for prompt in (first, second)]
    with sequences(path, n_seq_max=3, prefill=prefill) as many:
        many.read(0, first)
        token = int(expected[0][0].argmax())
        many.announce(2, len(second))
        logits = many.decode({2: second, 0: [token]}, interleave=True)
        assert many.state(2) == {"token": 1, "layer": 3}[prefill]  # staged, layered
        assert (logits[2] == expected[1][0]).all()
        assert nmse(logits[0], expected[0][1]) < 1e-5
        # before its end is announced the new one is decoded in the staging, the other one in the store
        many.end_prompt(2)
        logits = many.decode({0: [int(expected[0][1].argmax())], 2: [int(expected[1][0].argmax())]})
        assert nmse(logits[0], expected[0][2]) < 1e-5 and nmse(logits[2], expected[1][1]) < 1e-5


@ALL_SHAPES
@pytest.mark.parametrize("mode", ["fused", "composed"])
def test_others_decode_on_between_the_steps_of_a_paused_prompt(mode: str, shape: Shape, make_model: MakeModel) -> None:
    """Prompt and others as alone, bit by bit, wherever the prompt is paused; the tails of the others grow meanwhile."""
    options = MODES[mode] | {"n_tail": 2}
    path, first, second, n_ubatch = make_model(shape), tokens(150, seed=1), tokens(777, seed=2), 16
    n_steps = shape.n_layer * -(-len(second) // n_ubatch)
    expected = [alone(path, prompt, n, n_ubatch=n_ubatch, **options) for prompt, n in ((first, 30), (second, 3))]
    with sequences(path, n_seq_max=2, n_ubatch=n_ubatch, **options) as many:
        many.read(0, first)
        left = [n_steps]
        for i in range(1, 31):
            if left[-1] > 1:
                left.append(many.read_ahead(1, second, 1 if i < 30 else 60_000))
                assert many.state(1) == 3
            logits = many.decode({0: [int(expected[0][i - 1].argmax())]})[0]
            assert (logits == expected[0][i]).all()
        assert left[1] < n_steps and left == sorted(left, reverse=True) and left[-1] == 1
        assert (many.read(1, second)[1] == expected[1][0]).all()
        for i in (1, 2, 3):
            assert (many.decode({1: [int(expected[1][i - 1].argmax())]})[1] == expected[1][i]).all()


def test_a_paused_prompt_is_given_up_or_finished_as_it_was_begun(make_model: MakeModel) -> None:
    path, prompts = make_model(SHAPES[1]), [tokens(150, seed=1), tokens(2000, seed=2)]
    expected = alone(path, prompts[0], 1)
    with sequences(path, n_seq_max=3) as many:
        memory = many.c.llama_get_memory(many.ctx)
        assert many.read_ahead(1, prompts[1]) > 1
        assert many.stats(1).bytes_staging > 0 and many.c.llama_memory_seq_pos_max(memory, 1) == -1
        for new, why in (
            ({1: [*prompts[1][:-1], 3]}, "other tokens came"),
            ({1: prompts[1][:-1]}, "other tokens came"),
            ({0: prompts[0]}, "sequence 0 has to wait"),
        ):
            with pytest.raises(RuntimeError, match=f"sequence 1 is being read layer by layer and {why}"):
                many.decode(new)
        # as llama-server does before it decodes a prompt that it has announced: of a sequence that counts as empty nothing is removed
        many.headkv.check(many.headkv.lib.headkv_begin_prompt(many.ctx, 1, len(prompts[1]), True, None))
        assert many.c.llama_memory_seq_rm(memory, 1, 0, -1)
        assert many.state(1) == 3 and many.read_ahead(1, prompts[1], 10_000) == 1  # it was not disturbed
        for start in (-1, 0):  # all of it, in either form
            many.read_ahead(1, prompts[1])
            assert many.stats(1).bytes_staging > 0
            assert many.c.llama_memory_seq_rm(memory, 1, start, -1)
            assert many.stats(1).bytes_staging == 0 and many.state(1) == 0
        many.read(2, prompts[0])
        assert many.read_ahead(1, prompts[1]) > 1
        left = [many.read_ahead(1, prompts[1], 0) for _ in range(2)]
        assert left[0] == left[1] + 1  # 0 ms: one step
        with pytest.raises(RuntimeError, match="in -1 ms"):
            many.read_ahead(1, prompts[1], -1)
        many.remove(2)
        many.remove(1)
        assert many.stats(1).bytes_staging == many.stats(1).bytes_store == 0
        logits = many.read(0, prompts[0])[0]
        assert (logits == expected[0]).all()
        many.decode({2: [5, 6, 7]})
        with pytest.raises(RuntimeError, match="cannot be read layer by layer now"):
            many.read_ahead(1, prompts[1])
        with pytest.raises(RuntimeError, match="sequence 0 holds 150 tokens"):
            many.read_ahead(0, prompts[1])
    with sequences(path, n_seq_max=1, prefill="token") as one, pytest.raises(RuntimeError, match="prefill is 'token'"):
        one.read_ahead(0, prompts[1])


def test_what_is_removed_gives_its_memory_back_at_once(make_model: MakeModel) -> None:
    prompts = [tokens(300, seed=s) for s in range(2)]
    with sequences(make_model(SHAPES[1]), n_seq_max=2) as many:
        memory, held = many.c.llama_get_memory(many.ctx), []
        for s, prompt in enumerate(prompts):
            many.read(s, prompt)
            held.append(many.stats(0).bytes_store)
        logits = many.decode({1: [5]})[1]
        many.remove(0)
        assert many.stats(1).bytes_store == held[0] < held[1]
        assert many.c.llama_memory_seq_rm(memory, 1, 300, -1)
        many.n_past[1] = 300
        assert (many.decode({1: [5]})[1] == logits).all()
        for staged in (False, True):
            if staged:
                many.decode({0: prompts[0]})
                assert many.stats(0).bytes_staging > 0
            many.c.llama_memory_clear(memory, True)
            assert many.stats(0).bytes_store == many.stats(0).bytes_staging == 0
            many.n_past = [0, 0]


def test_prompts_staged_together_keep_what_they_keep_alone(make_model: MakeModel) -> None:
    shape = SHAPES[1]
    path, prompts = make_model(shape), [tokens(200 + 50 * s, seed=s) for s in range(3)]
    kept = []
    for prompt in prompts:
        with sequences(path, n_seq_max=1, prefill="token") as one:
            one.read(0, prompt)
            kept.append([one.positions(0, il, ih) for il in range(shape.n_layer) for ih in range(shape.n_head_kv)])
    with sequences(path, n_seq_max=3, prefill="token") as many:
        for part in (slice(0, 130), slice(130, None)):
            many.decode({s: prompt[part] for s, prompt in enumerate(prompts)}, interleave=True)
        for s in (1, 0, 2):
            many.end_prompt(s)
            assert [many.positions(s, il, ih) for il in range(shape.n_layer) for ih in range(shape.n_head_kv)] == kept[s]


def test_a_prompt_beside_a_staged_one_is_read_token_by_token(make_model: MakeModel) -> None:
    path, prompts = make_model(SHAPES[1]), [tokens(100, seed=1), tokens(120, seed=2)]
    expected = [alone(path, prompt, 1) for prompt in prompts]
    with sequences(path, n_seq_max=2) as many:
        many.decode({0: prompts[0]})
        many.announce(1, 120)
        many.decode({1: prompts[1]})
        assert (many.state(0), many.state(1)) == (1, 1)
        for s in (0, 1):
            many.end_prompt(s)
        logits = many.decode({s: [int(expected[s][0].argmax())] for s in (0, 1)})
        assert all(nmse(logits[s], expected[s][1]) < 1e-5 for s in (0, 1))


def test_the_pending_last_layer_is_compressed_before_another_prompt(make_model: MakeModel) -> None:
    path, prompts = make_model(SHAPES[1]), [tokens(100, seed=1), tokens(120, seed=2)]
    expected = [alone(path, prompt, 1) for prompt in prompts]
    with sequences(path, n_seq_max=2) as many:
        for s, prompt in enumerate(prompts):
            many.announce(s, len(prompt))
            many.decode({s: prompt})
            assert many.state(s) == 3
        assert many.state(0) == 2
        logits = many.decode({s: [int(expected[s][0].argmax())] for s in (0, 1)})
        assert all(nmse(logits[s], expected[s][1]) < 1e-5 for s in (0, 1))


def test_sequences_come_and_go(make_model: MakeModel) -> None:
    """Tails of different lengths grow, removed sequences give their rows back, none disturbs another."""
    path = make_model(SHAPES[1])
    with sequences(path, n_seq_max=3, n_tail=4) as many:
        history: dict[int, list[int]] = {}
        for step in range(40):
            s = step % 3
            if step % 10 == s:
                if s in history:
                    many.remove(s)
                history[s] = tokens(80 + step, seed=step)
                many.read(s, history[s])
            for s in history:
                history[s] = [*history[s], 20 + (step * 7 + s) % 300]
            last = many.decode({s: [row[-1]] for s, row in history.items()})
        for s, row in history.items():
            n_prompt = 80 + max(step for step in range(40) if step % 3 == s and step % 10 == s)
            with sequences(path, n_seq_max=1) as one:
                one.read(0, row[:n_prompt])
                for token in row[n_prompt:]:
                    expected = one.decode({0: [token]})[0]
            assert nmse(last[s], expected) < 1e-5


def test_limits_are_those_of_a_sequence(make_model: MakeModel) -> None:
    with sequences(make_model(SHAPES[1]), n_seq_max=2, n_ctx=1024, unified=False) as many:
        many.read(0, tokens(500))
        with pytest.raises(RuntimeError, match=r"500 tokens and 13 new ones do not fit into n_ctx = 512: use a larger n_ctx$"):
            many.decode({0: tokens(13)})
        many.decode({0: tokens(12)})


def test_a_token_of_two_sequences_is_refused(make_model: MakeModel) -> None:
    with sequences(make_model(SHAPES[1]), n_seq_max=2) as many:
        batch = many.c.llama_batch_init(1, 0, 2)
        batch.n_tokens = 1
        batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.logits[0] = 5, 0, 2, True
        batch.seq_id[0][0], batch.seq_id[0][1] = 0, 1
        assert many.c.llama_decode(many.ctx, batch) != 0
        assert "more than one sequence" in many.headkv.last_error()
        many.c.llama_batch_free(batch)
        many.read(0, tokens(50))


@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_prompts_are_compressed_by_the_parameters_that_they_were_begun_with(prefill: str, make_model: MakeModel) -> None:
    path, prompts = make_model(SHAPES[1]), [tokens(150, seed=1), tokens(200, seed=2)]
    own = [{"kv_size": 24}, {"kv_size": 60, "protect": [(2, 9)]}]
    expected = []
    for prompt, options in zip(prompts, own, strict=True):
        with sequences(path, n_seq_max=1, prefill=prefill) as one:
            one.announce(0, len(prompt), params=params_of(prefill=prefill, **options))
            one.decode({0: prompt})
            one.end_prompt(0)
            expected.append([one.positions(0, il, 0) for il in range(SHAPES[1].n_layer)])
            assert [len(p) for p in expected[-1]] == [options["kv_size"]] * SHAPES[1].n_layer
            lib, other = one.headkv.lib, params_of(prefill=prefill, **{**options, "kv_size": 25})
            assert lib.headkv_can_continue(one.ctx, 0, params_of(prefill=prefill, **options)) == 0
            assert lib.headkv_can_continue(one.ctx, 0, other) < 0 and "kv_size" in one.headkv.last_error()
            assert lib.headkv_can_continue(one.ctx, 0, None) < 0
    with sequences(path, n_seq_max=2, prefill=prefill) as both:
        for s, (prompt, options) in enumerate(zip(prompts, own, strict=True)):
            both.announce(s, len(prompt), whole=prefill == "layer", params=params_of(prefill=prefill, **options))
            if prefill == "layer":
                both.decode({s: prompt})
        if prefill == "token":
            both.decode(dict(enumerate(prompts)))  # they share the staging
        for s in (1, 0):
            both.end_prompt(s)
        assert [[both.positions(s, il, 0) for il in range(SHAPES[1].n_layer)] for s in range(2)] == expected
        both.remove(0)
        both.read(0, prompts[0])  # what was begun without parameters has those of the context
        assert len(both.positions(0, 0, 0)) == KV_SIZE
        both.remove(1)
        with pytest.raises(RuntimeError, match="window is 200: the context has room"):
            both.announce(1, 20, params=params_of(prefill=prefill, window=200))


def test_a_paused_prompt_cannot_be_compressed(make_model: MakeModel) -> None:
    prompt = tokens(350)
    with sequences(make_model(SHAPES[1]), n_seq_max=2) as both:
        both.announce(0, len(prompt))
        assert both.read_ahead(0, prompt) > 1
        lib = both.headkv.lib
        for call in (lambda: lib.headkv_end_prompt(both.ctx, 0), lambda: lib.headkv_compress_as(both.ctx, 0, 1)):
            assert call() < 0 and both.headkv.last_error()
        assert "is being read layer by layer" in (lib.headkv_end_prompt(both.ctx, 0), both.headkv.last_error())[1]
        while both.read_ahead(0, prompt) > 1:
            pass
        both.decode({0: prompt})
        both.end_prompt(0)
        assert both.state(0) == 2 and both.stats(0).n_prompt == len(prompt)


def test_parameters_go_with_what_is_removed_and_stay_with_what_failed(make_model: MakeModel) -> None:
    prompt = tokens(200)
    for prefill in ("token", "layer"):
        with sequences(make_model(SHAPES[1]), n_seq_max=1, prefill=prefill) as one:
            lib, params = one.headkv.lib, params_of(prefill=prefill, kv_size=100)
            one.announce(0, len(prompt), params=params)
            one.remove(0)  # given up
            one.decode({0: prompt})
            one.end_prompt(0)
            assert one.stats(0).kv_size == KV_SIZE
            with pytest.raises(RuntimeError, match="sequence 0 is begun: it keeps the parameters"):
                one.announce(0, len(prompt), params=params)
            one.remove(0)
            stop = one.headkv.Progress(lambda *_: False)
            one.announce(0, len(prompt), params=params)
            lib.headkv_set_progress(one.ctx, stop, None)
            with pytest.raises(RuntimeError, match="aborted"):
                one.decode({0: prompt})
            lib.headkv_set_progress(one.ctx, one.headkv.Progress(), None)
            one.n_past[0] = 0
            one.decode({0: prompt})
            one.end_prompt(0)
            assert one.stats(0).kv_size == 100


def test_what_would_be_kept_now_is_more_than_its_number(make_model: MakeModel) -> None:
    with sequences(make_model(SHAPES[1]), n_seq_max=1) as one:
        one.read(0, tokens(200))
        lib = one.headkv.lib
        assert lib.headkv_can_continue(one.ctx, 0, params_of()) == 0
        for other in (
            {"policy": "streaming", "sinks": 0},
            {"policy": "pyramidkv"},
            {"window": 8},
            {"recent": 20},
            {"pool": "avg"},
            {"power": 1},
        ):
            assert lib.headkv_can_continue(one.ctx, 0, params_of(**other)) < 0, other
            assert "another policy, or with other options of it" in one.headkv.last_error()


@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_nothing_changes_while_the_progress_is_told(prefill: str, make_model: MakeModel) -> None:
    prompt = tokens(200)
    with sequences(make_model(SHAPES[1]), n_seq_max=1, prefill=prefill) as one:
        said = []

        def look(*_: Any) -> bool:
            memory = one.c.llama_get_memory(one.ctx)
            said.append(bool(one.c.llama_memory_seq_rm(memory, 0, -1, -1)))
            one.c.llama_memory_clear(memory, True)
            said.append(one.headkv.lib.headkv_end_prompt(one.ctx, 0) >= 0)
            return True

        progress = one.headkv.Progress(look)
        one.announce(0, len(prompt))
        one.headkv.lib.headkv_set_progress(one.ctx, progress, None)
        one.decode({0: prompt})
        one.headkv.lib.headkv_set_progress(one.ctx, one.headkv.Progress(), None)
        one.end_prompt(0)
        assert said and not any(said)
        assert one.state(0) == 2 and one.stats(0).n_prompt == len(prompt)


def test_the_end_of_a_prompt_that_is_to_be_compressed_cannot_be_cut(make_model: MakeModel) -> None:
    prompt = tokens(200)
    with sequences(make_model(SHAPES[1]), n_seq_max=1) as one:
        one.announce(0, len(prompt))
        one.decode({0: prompt})
        memory = one.c.llama_get_memory(one.ctx)
        assert one.state(0) == 3 and one.c.llama_memory_seq_pos_min(memory, 0) == len(prompt) - 1
        assert not one.c.llama_memory_seq_rm(memory, 0, len(prompt) - 1, -1)
        one.end_prompt(0)
        assert one.stats(0).n_prompt == len(prompt)
