"""Values that are fitted to the prompt's own queries, against the oracle and against themselves, on random models."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import SHAPES, Shape, logits, nmse, tokens
from conftest import load as load_plain
from test_sequences import params_of
from test_sequences import sequences as sequences_plain

from pyheadkv import _lib
from pyheadkv.testing import reference
from pyheadkv.testing.oracle import fit_of, heads, references, rows

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
Values = dict[tuple[int, int], npt.NDArray[np.float32]]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8


def load(path: Path, **options: Any) -> Any:
    return load_plain(path, **{"fit": "values", **options})


def sequences(path: Path, **options: Any) -> Any:
    return sequences_plain(path, fit="values", **options)


def dropped(llm: Any, shape: Shape, n_prompt: int) -> list[tuple[int, int]]:
    return [head for head in heads(shape) if len(llm.kv_positions(*head)) < n_prompt]


# ---------------------------------------------------------------- the oracle


@ALL_SHAPES
@pytest.mark.parametrize("n_prompt", [3, 513, 1100, 2300])
def test_references_are_queries_of_the_prompt(shape: Shape, n_prompt: int, make_model: MakeModel) -> None:
    path, prompt = make_model(shape, n_layer=1), tokens(n_prompt)
    model = reference.ReferenceModel(path)
    model._append_qkv(0, model._rms_norm(model._weight("token_embd.weight")[prompt], "blk.0.attn_norm.weight"), np.arange(n_prompt))
    at = reference.reference_positions(n_prompt)
    assert len(at) == min(n_prompt, 512) and (np.diff(at) > 0).all() and n_prompt - 5 < at[-1] < n_prompt
    which = reference.reference_heads(at, n_head=shape.n_head, n_head_kv=shape.n_head_kv)
    assert n_prompt < 500 or len(np.unique(which)) == shape.n_head
    expected = model.q[0][at[:, None], which]
    for n_ubatch in (64, 512, 2048):
        llm = load(path, kv_size=48, prefill="token", n_ctx=4096, n_ubatch=n_ubatch, n_batch=2048)
        llm.eval(prompt)
        assert nmse(references(llm, shape, 0), expected) < 1e-5


@ALL_SHAPES
@pytest.mark.parametrize(("n_prompt", "kv_size", "type_kv"), [(100, 24, F16), (700, 48, F32), (1700, 100, F16), (1700, 450, F32)])
def test_values_equal_the_oracle(shape: Shape, n_prompt: int, kv_size: int, type_kv: int, make_model: MakeModel) -> None:
    llm = load(make_model(shape), kv_size=kv_size, prefill="token", type_k=type_kv, type_v=type_kv)
    expected, _ = fit_of(llm, shape, tokens(n_prompt))
    ours = rows(llm, shape, v=True)
    for head, (values, *_) in expected.items():
        assert nmse(ours[head], values) < (1e-9 if type_kv == F32 else 1e-7)
    stats, those = llm.kv_stats(), dropped(llm, shape, n_prompt)
    assert stats.n_heads_fitted == sum(expected[head][2] < expected[head][1] for head in those) > 0
    for name, i in (("fit_before", 1), ("fit_after", 2)):
        np.testing.assert_allclose(getattr(stats, name), np.mean([expected[head][i] for head in those]), rtol=1e-4)
    assert 0 < stats.fit_after < stats.fit_before and 0 < stats.fit_ms < stats.compress_ms


@pytest.mark.parametrize("policy", ["streaming", "adakv", "criticalkv", "h2o", "uniform/value", "whole/recent"])
def test_every_policy_can_have_it(policy: str, make_model: MakeModel) -> None:
    shape = SHAPES[1]
    llm = load(make_model(shape), kv_size=40, policy=policy, prefill="token")
    expected, _ = fit_of(llm, shape, tokens(600))
    ours = rows(llm, shape, v=True)
    assert all(nmse(ours[head], values) < 1e-7 for head, (values, *_) in expected.items())


@pytest.mark.parametrize(("type_v", "error"), [(Q8_0, 1e-4), (Q4_0, 1e-2)], ids=["q8_0", "q4_0"])
def test_values_of_a_quantised_cache_are_fitted(type_v: int, error: float, make_model: MakeModel) -> None:
    shape = Shape("quant", "llama", 4, 2, n_layer=2, head_dim=64)
    llm = load(make_model(shape), kv_size=48, prefill="token", type_k=Q8_0, type_v=type_v)
    expected, before = fit_of(llm, shape, tokens(700))
    ours = rows(llm, shape, v=True)
    for head, (values, *_) in expected.items():
        assert nmse(ours[head], values) < error < nmse(before[head], values)


@pytest.mark.parametrize("head_dim", [16, 48, 80])
def test_heads_of_any_size(head_dim: int, make_model: MakeModel) -> None:
    shape = Shape(f"size{head_dim}", "llama", 4, 2, n_layer=2, head_dim=head_dim)
    llm = load(make_model(shape), kv_size=48, prefill="token")
    expected, _ = fit_of(llm, shape, tokens(300))
    ours = rows(llm, shape, v=True)
    assert all(nmse(ours[head], values) < 1e-7 for head, (values, *_) in expected.items())


def test_what_does_not_help_is_not_taken(make_model: MakeModel) -> None:
    """Few references, and fewer that are held out: a head whose residual on these grows keeps its values, bit by bit."""
    shape, n_kept, n_fitted = SHAPES[1], 0, 0
    path = make_model(shape)
    for seed in range(12):
        llm = load(path, kv_size=12, prefill="token", n_ctx=256)
        expected, before = fit_of(llm, shape, tokens(17 + seed, seed=seed))
        ours = rows(llm, shape, v=True)
        for head, (values, residual_before, residual_after) in expected.items():
            is_fitted = residual_after < residual_before
            n_kept, n_fitted = n_kept + (not is_fitted), n_fitted + is_fitted
            assert nmse(ours[head], values) < 1e-7
            assert is_fitted or (ours[head] == before[head]).all()
        assert llm.kv_stats().n_heads_fitted == sum(after < before for _, before, after in expected.values())
    assert n_kept > 2 and n_fitted > 2


def test_generation_is_closer_to_that_of_the_whole_prompt(make_model: MakeModel) -> None:
    path, prompt = make_model(SHAPES[1]), tokens(1500)
    out = {}
    for name, options in {"whole": {"kv_size": 2000}, "none": {"kv_size": 48}, "values": {"kv_size": 48}}.items():
        llm = load(path, fit="values" if name == "values" else "none", **options)
        llm.read_prompt(prompt)
        rows_of_logits = []
        for token in range(10, 30):
            llm.eval([token])
            rows_of_logits.append(logits(llm))
        out[name] = rows_of_logits
    assert nmse(out["values"], out["whole"]) < 0.8 * nmse(out["none"], out["whole"])


# ---------------------------------------------------------------- itself


@ALL_SHAPES
def test_outcome_is_that_of_one_thread_and_of_token_order(shape: Shape, make_model: MakeModel) -> None:
    path, prompt = make_model(shape), tokens(1500)
    outcomes = []
    for prefill, n_threads in (("token", 1), ("layer", 1), ("layer", 2), ("layer", 3)):
        llm = load(path, kv_size=80, prefill=prefill, n_threads=n_threads, n_threads_batch=n_threads)
        assert llm.prefill_mode == prefill
        llm.read_prompt(prompt)
        values = rows(llm, shape, v=True)
        outcomes.append({head: (llm.kv_positions(*head).tolist(), values[head].tobytes()) for head in heads(shape)})
    assert all(other == outcomes[0] for other in outcomes[1:])


@ALL_SHAPES
@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_ubatches_of_another_size_change_no_more_than_their_rounding(prefill: str, shape: Shape, make_model: MakeModel) -> None:
    path, prompt = make_model(shape), tokens(1500)
    outcomes = []
    for n_ubatch in (64, 512, 2048):
        llm = load(path, kv_size=80, policy="streaming", prefill=prefill, n_ubatch=n_ubatch, n_batch=2048)
        llm.read_prompt(prompt)
        outcomes.append((rows(llm, shape, v=True), llm.kv_stats()))
    for values, stats in outcomes[1:]:
        assert all(nmse(values[head], outcomes[0][0][head]) < 1e-4 for head in heads(shape))
        np.testing.assert_allclose([stats.fit_before, stats.fit_after], [outcomes[0][1].fit_before, outcomes[0][1].fit_after], rtol=1e-2)


def test_kernels_of_all_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch, make_model: MakeModel) -> None:
    shape, outcomes = SHAPES[3], []
    path = make_model(shape)
    for kernel in ("portable", None):
        if kernel:
            monkeypatch.setenv("HEADKV_KERNEL", kernel)
        else:
            monkeypatch.delenv("HEADKV_KERNEL")
        llm = load(path, kv_size=80, policy="streaming")
        llm.read_prompt(tokens(900))
        outcomes.append(rows(llm, shape, v=True))
    assert all(nmse(outcomes[0][head], outcomes[1][head]) < 1e-6 for head in heads(shape))


def test_a_prompt_that_is_kept_whole_needs_none(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=300)
    llm.read_prompt(tokens(200))
    stats = llm.kv_stats()
    assert (stats.n_heads_fitted, stats.fit_before, stats.fit_after, stats.fit_ms) == (0, 0.0, 0.0, 0.0)


def test_saved_values_come_back(make_model: MakeModel) -> None:
    shape = SHAPES[1]
    llm = load(make_model(shape), kv_size=48)
    llm.read_prompt(tokens(500))
    before, state = rows(llm, shape, v=True), llm.save_state()
    llm.read_prompt(tokens(400, seed=1))
    llm.load_state(state)
    after = rows(llm, shape, v=True)
    assert all((before[head] == after[head]).all() for head in heads(shape))


def test_bytes_are_counted(make_model: MakeModel) -> None:
    shape, staged, planned, n = SHAPES[1], [], [], 1900
    path = make_model(shape)
    for name in ("none", "values"):
        llm = load(path, kv_size=48, prefill="token", fit=name)
        out = _lib.Footprint(size=ctypes.sizeof(_lib.Footprint))
        params = llm.kv_options.to_params(llm._importance, llm.model_path)
        _lib.check(_lib.lib.headkv_get_footprint(llm.ctx, ctypes.byref(params), n, 16, 512, False, ctypes.byref(out)))
        planned.append(out)
        llm.eval(tokens(n))
        staged.append(llm.kv_stats().bytes_staging)
        llm.end_prompt()
        assert llm.kv_stats().bytes_peak <= out.staging + out.ring + out.hidden + out.scratch + out.store
    n_row = shape.head_dim * shape.n_head_kv * 2
    assert staged[1] - staged[0] == planned[1].ring - planned[0].ring == shape.n_layer * 1025 * n_row
    assert planned[1].scratch - planned[0].scratch > 512 * n_row


# ---------------------------------------------------------------- sequences, pauses, the archive


class Fitted:
    """The outcome of one sequence of a context for several."""

    def __init__(self, many: Any, s: int, shape: Shape) -> None:
        self.values = {}
        for head in heads(shape):
            dst = np.zeros((4096, shape.head_dim), dtype=np.float32)
            args = (*head, True, dst.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), dst.size)
            n = _lib.check(_lib.lib.headkv_read_cells(many.ctx, s, *args))
            self.values[head] = (many.positions(s, *head), dst[:n].tobytes())
        stats = many.stats(s)
        self.numbers = (stats.n_heads_fitted, stats.fit_before, stats.fit_after)
        assert stats.n_heads_fitted > 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fitted) and self.values == other.values and self.numbers == other.numbers

    def check_near(self, other: Fitted) -> None:
        """But for the rounding of tokens that were computed beside others."""
        for head, (positions, values) in self.values.items():
            theirs, their_values = other.values[head]
            assert positions == theirs
            assert nmse(np.frombuffer(values, np.float32), np.frombuffer(their_values, np.float32)) < 1e-4
        np.testing.assert_allclose(self.numbers, other.numbers, rtol=1e-3)


def alone(path: Path, shape: Shape, prompt: list[int], **options: Any) -> Fitted:
    with sequences(path, n_seq_max=1, **options) as one:
        one.read(0, prompt)
        return Fitted(one, 0, shape)


@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_sequences_are_fitted_as_they_are_alone(prefill: str, make_model: MakeModel) -> None:
    shape, prompts = SHAPES[1], [tokens(400 + 500 * s, seed=s) for s in range(3)]
    path = make_model(shape)
    expected = [alone(path, shape, prompt, prefill=prefill) for prompt in prompts]
    with sequences(path, n_seq_max=4, prefill=prefill) as many:
        for s in (2, 0, 1):
            many.read(s, prompts[s])
        assert [Fitted(many, s, shape) for s in range(3)] == expected


def test_prompts_that_are_read_side_by_side(make_model: MakeModel) -> None:
    """Their tokens in turn, in pieces whose number was not announced."""
    shape, prompts = SHAPES[1], [tokens(1100 + 64 * s, seed=s) for s in range(2)]
    path = make_model(shape)
    expected = [alone(path, shape, prompt, prefill="token") for prompt in prompts]
    with sequences(path, n_seq_max=2, prefill="token") as many:
        for i in range(0, 1200, 128):
            many.decode({s: prompt[i : i + 128] for s, prompt in enumerate(prompts) if prompt[i : i + 128]})
        for s in range(2):
            many.end_prompt(s)
        for s in range(2):
            Fitted(many, s, shape).check_near(expected[s])


def test_a_paused_prompt_goes_on(make_model: MakeModel) -> None:
    shape, prompt, other = SHAPES[1], tokens(1500, seed=1), tokens(200, seed=2)
    path = make_model(shape)
    expected = alone(path, shape, prompt)
    with sequences(path, n_seq_max=2) as many:
        many.read(0, other)
        while many.read_ahead(1, prompt, 0) > 1:
            many.decode({0: [7]})
        many.read(1, prompt)
        assert Fitted(many, 1, shape) == expected


def test_copies_of_a_prompt_are_fitted_on_their_own(make_model: MakeModel) -> None:
    shape, prompt = SHAPES[1], tokens(900)
    path = make_model(shape)
    with sequences(path, n_seq_max=3, prefill="token") as many:
        many.announce(0, len(prompt), whole=False)
        many.decode({0: prompt})
        for s, kv_size in ((1, 24), (2, 100)):
            params = params_of(kv_size=kv_size, prefill="token", fit="values")
            _lib.check(_lib.lib.headkv_configure(many.ctx, ctypes.byref(params)))
            _lib.check(_lib.lib.headkv_compress_as(many.ctx, 0, s))
        copies = [Fitted(many, s, shape) for s in (1, 2)]
        more = prompt[::-1][:100]
        many.decode({0: more})  # the prompt is as it was, and goes on
        many.end_prompt(0)
        longer = Fitted(many, 0, shape)
    for kv_size, copy in zip((24, 100), copies):
        llm = load(path, kv_size=kv_size, policy="snapkv", preset="default", prefill="token", n_ubatch=64)
        llm.read_prompt(prompt)
        values = rows(llm, shape, v=True)
        assert copy.values == {head: (llm.kv_positions(*head).tolist(), values[head].tobytes()) for head in heads(shape)}
    llm = load(path, kv_size=100, policy="snapkv", preset="default", prefill="token", n_ubatch=64)
    llm.read_prompt([*prompt, *more])
    assert abs(llm.kv_stats().fit_after - longer.numbers[2]) < 1e-2 * longer.numbers[2]


def test_a_prompt_that_was_cut(make_model: MakeModel) -> None:
    """A little: as if it had been read so. To so few tokens that there are too few references of them: an error that says so."""
    import llama_cpp

    path, prompt = make_model(SHAPES[1]), tokens(1500)

    def cut(n: int) -> Any:
        llm = load(path, kv_size=48, prefill="token", n_ubatch=64)
        llm.eval(prompt)
        assert llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, n, -1)
        llm.n_tokens = n
        llm.eval(prompt[n : n + 64])
        return llm

    llm, fresh = cut(1408), load(path, kv_size=48, prefill="token", n_ubatch=64)
    llm.end_prompt()
    fresh.read_prompt(prompt[: 1408 + 64])
    ours, theirs = rows(llm, SHAPES[1], v=True), rows(fresh, SHAPES[1], v=True)
    assert all((ours[head] == theirs[head]).all() for head in heads(SHAPES[1]))
    llm = cut(640)
    with pytest.raises(RuntimeError, match="queries that fit 'values' looks at are missing, because tokens were removed"):
        llm.end_prompt()
    assert llm.kv_stats().state == "staged"


@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_with_an_archive_such_prompts_only_write(prefill: str, make_model: MakeModel, tmp_path: Path) -> None:
    path, prompt = make_model(SHAPES[1]), tokens(1500)
    llm = load(path, kv_size=48, prefill=prefill, kv_archive=str(tmp_path))
    outcomes = []
    for _ in range(2):
        llm.read_prompt(prompt)
        assert llm.kv_stats().n_archived == 0 and llm.kv_stats().n_heads_fitted > 0
        outcomes.append({head: x.tobytes() for head, x in rows(llm, SHAPES[1], v=True).items()})
    assert outcomes[0] == outcomes[1]
    llm.configure(fit="none")
    llm.read_prompt(prompt)
    assert llm.kv_stats().n_archived > 1000 and llm.kv_stats().n_heads_fitted == 0
    if prefill == "token":
        llm.reset()
        llm.eval(prompt)
        llm.configure(fit="values")
        with pytest.raises(RuntimeError, match="came from the archive: configure the fit before the prompt"):
            llm.end_prompt()


# ---------------------------------------------------------------- refused


def test_a_context_that_was_made_without_cannot(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=48, fit="none")
    with pytest.raises(ValueError, match="fit 'values' looks at queries of the whole prompt while it is read: create the context with it"):
        llm.configure(fit="values")


def test_what_was_fitted_is_not_what_was_not(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=48)
    llm.read_prompt(tokens(300))
    assert _lib.lib.headkv_can_continue(llm.ctx, 0, None) == 0
    llm.configure(fit="none")
    assert _lib.lib.headkv_can_continue(llm.ctx, 0, None) < 0 and "other options" in _lib.last_error()
