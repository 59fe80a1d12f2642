"""Cells that each policy keeps, against the NumPy oracle, on random GQA models."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import SHAPES, Shape, load, nmse, tokens

from pyheadkv import _lib
from pyheadkv.options import BY_BETA, BY_IMPORTANCE, POLICIES, Options
from pyheadkv.replay_values import ReplayTable
from pyheadkv.testing import reference
from pyheadkv.testing.oracle import Kept, head_rows, kept_by, kept_of

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
WINDOW = 8
GQA = SHAPES[1:]
ALL_SHAPES = pytest.mark.parametrize("shape", GQA, ids=lambda s: s.name)
# budgets far below the prompt, near it, and above it
SIZES = pytest.mark.parametrize(("n_prompt", "kv_size"), [(300, 9), (300, 40), (701, 96), (120, 80), (60, 40), (40, 39), (5, 32)])


def as_lists(kept: Kept) -> list[list[list[int]]]:
    return [[rows.tolist() for rows in heads] for heads in kept]


def check_kept(shape: Shape, make_model: MakeModel, n_prompt: int, *, ftype: str = "f16", **options: Any) -> Kept:
    """Kept cells of both orders of prefill are those of the oracle, with both ways to attend; returns those of the fused one."""
    path, prompt = make_model(shape, ftype=ftype), tokens(n_prompt, seed=n_prompt)
    how = {"n_ubatch": 64, "n_buckets": 2, **options}
    found = {}
    for attend in ("fused", "composed"):
        llm = load(path, prefill="token", attend=attend, **how)
        llm.eval(prompt)
        expected = found[attend] = kept_of(llm, shape)
        rows = [[head_rows(llm, shape, il, v=v) for v in (False, True)] for il in range(shape.n_layer)]
        llm.end_prompt()
        assert as_lists(kept_by(llm, shape)) == as_lists(expected)
        assert llm.kv_stats().n_cells.tolist() == [[len(kept) for kept in heads] for heads in expected]
        for il, heads in enumerate(expected):  # the rows moved unchanged
            for ih, kept in enumerate(heads):
                for v in (False, True):
                    got = llm._read_floats(_lib.lib.headkv_read_cells, shape.head_dim, llm.n_ctx(), il, ih, v)
                    all_rows, real = rows[il][v][:, ih], kept[kept >= 0]
                    if len(real) < len(kept):
                        mean = np.delete(all_rows, real, axis=0).mean(axis=0, dtype=np.float64)
                        np.testing.assert_allclose(got[0], mean, rtol=2**-10, atol=1e-5)
                    np.testing.assert_array_equal(got[len(kept) - len(real) :], all_rows[real])
        other = load(path, prefill="layer", attend=attend, **how)
        other.read_prompt(prompt)
        assert as_lists(kept_by(other, shape)) == as_lists(expected)
        for model in (llm, other):
            model.eval([9])
            assert np.isfinite(model.last_logits).all()
    return found["fused"]


def n_cells(kept: Kept) -> int:
    return sum(len(rows) for heads in kept for rows in heads)


def plan(
    policy: str, *, n_layer: int, n_head: int, n_head_kv: int, replay: ReplayTable | None = None, **options: Any
) -> npt.NDArray[np.int32]:
    """Budgets without a context."""
    params = Options(policy=policy, **options).to_params(None, None, replay)
    got = np.zeros((n_layer, n_head_kv), dtype=np.int32)
    counts = [np.full(n_layer, n, dtype=np.int32) for n in (n_head, n_head_kv)]
    *heads, dst = (x.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)) for x in (*counts, got))
    _lib.check(_lib.lib.headkv_plan(ctypes.byref(params), n_layer, *heads, 0, dst))
    return got


def test_python_and_the_library_know_the_same_policies() -> None:
    params = Options(kv_size=64).to_params(None, None)
    params.policy = b"?"
    assert _lib.lib.headkv_set_params(ctypes.byref(params)) < 0
    assert _lib.last_error() == f"policy is '?': it must be one of {', '.join(POLICIES)}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pyramid_exact": "no"}, "pyramid_exact='no': it must be True or False"),
        ({"sinks": -1}, "sinks=-1: it must be in"),
        ({"sinks": "4"}, "sinks='4': it must be an integer"),
        ({"protect": [(5, 5)]}, "protect end=5: .*0 <= start < end"),
        ({"protect": [(-1, 5)]}, "protect start=-1: .*0 <= start < end"),
        ({"protect": [(1, 2.5)]}, "protect end=2.5"),
        ({"protect": (1, 2)}, r"protect=\(1, 2\): give \(start, end\) positions"),
        ({"protect": [(1, 2, 3)]}, "give .start, end. positions"),
        ({"surplus": "kept"}, "surplus='kept': it must be one of 'lost', 'redistribute'"),
        ({"adakv_normalize": 1}, "adakv_normalize=1: it must be True or False"),
        ({"adakv_floor": 1.5}, r"adakv_floor=1.5: it must be a number in \[0, 1\]"),
        ({"adakv_floor": -1}, "adakv_floor=-1"),
        ({"adakv_floor": float("nan")}, "adakv_floor=nan"),
    ],
)
def test_wrong_options_are_value_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(kv_size=64, **options)


def test_every_policy_holds_the_same_bytes(make_model: MakeModel) -> None:
    shape, prompt = Shape("equal", "llama", 16, 4, n_layer=6, n_ff=64), tokens(2000)
    llm = load(make_model(shape), kv_size=32, n_tail=1, prefill="token", n_seq_max=2)
    llm.eval(prompt)
    for kv_size in (32, 128, 500):
        held = {}
        for policy in sorted({*POLICIES} - {"h2o", "lossless"}):  # which looks at all tokens while they are read
            llm.configure(kv_size=kv_size, policy=policy)
            llm.compress_as(1)
            held[policy] = (int(llm.kv_stats(1).n_cells.sum()), llm.kv_stats(1).bytes_store)
            llm._ctx.kv_cache_seq_rm(1, -1, -1)
        for n, n_bytes in held.values():
            assert abs(n / (kv_size * shape.n_layer * shape.n_head_kv) - 1) < 0.01, held
            assert abs(n_bytes / held["snapkv"][1] - 1) < 0.01, held


@pytest.mark.parametrize("case", ["openelm (heads by layer)", "deci (heads by layer)", "deci (a layer without attention)"])
@pytest.mark.parametrize("policy", sorted({*POLICIES} - {*BY_IMPORTANCE, "lossless"}))
def test_cells_add_up_where_layers_differ_in_heads(case: str, policy: str) -> None:
    import architectures
    import llama_cpp

    model = architectures.make_model(*architectures.cases()[case])
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.flash_attn_type = 512, 1
    for kv_size in (9, 20, 100):
        with _lib.creating(Options(kv_size=kv_size, policy=policy).to_params(None, None)):
            ctx = llama_cpp.llama_init_from_model(model, params)
        _lib.check(_lib.lib.headkv_fill_prompt(ctx, 0, 300, 1))
        _lib.check(_lib.lib.headkv_end_prompt(ctx, 0))
        cells = np.zeros(_lib.check(_lib.lib.headkv_get_n_cells(ctx, 0, None, 0)), dtype=np.int32)
        _lib.check(_lib.lib.headkv_get_n_cells(ctx, 0, cells.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), cells.size))
        assert cells.sum() == kv_size * (cells > 0).sum()
        llama_cpp.llama_free(ctx)
    llama_cpp.llama_model_free(model)


# ---------------------------------------------------------------- pyramidkv


@ALL_SHAPES
@SIZES
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "authors"])
def test_pyramidkv_keeps_what_the_oracle_keeps(shape: Shape, n_prompt: int, kv_size: int, exact: bool, make_model: MakeModel) -> None:
    kept = check_kept(shape, make_model, n_prompt, kv_size=kv_size, policy="pyramidkv", pyramid_exact=exact)
    uniform = min(kv_size, n_prompt) * shape.n_layer * shape.n_head_kv
    assert n_cells(kept) == uniform if exact else n_cells(kept) >= uniform


@pytest.mark.parametrize(
    ("kv_size", "first", "last", "total"),
    [
        (64, 110, 17, 2032),
        (128, 234, 17, 4016),
        (256, 484, 19, 8048),
        (512, 983, 53, 16576),
        (1024, 1982, 60, 32672),
    ],
)
def test_pyramidkv_of_the_authors_is_reproduced(kv_size: int, first: int, last: int, total: int) -> None:
    """Cells of 32 layers without the window, by hand from the authors' formula."""
    got = plan("pyramidkv", n_layer=32, n_head=4, n_head_kv=2, kv_size=kv_size, pyramid_exact=False) - WINDOW
    assert (got[0, 0], got[-1, 0], got[:, 0].sum()) == (first, last, total)
    exact = plan("pyramidkv", n_layer=32, n_head=4, n_head_kv=2, kv_size=kv_size) - WINDOW
    assert exact.sum() == 64 * (kv_size - WINDOW)
    assert (np.diff(exact[:, 0]) <= 0).all() and exact[-1, 0] == (kv_size - WINDOW) // 20


@pytest.mark.parametrize("n_layer", [1, 2, 3, 28, 80])
@pytest.mark.parametrize("kv_size", [9, 10, 29, 64, 1000])
@pytest.mark.parametrize("exact", [True, False])
def test_pyramidkv_plan_equals_the_oracle(n_layer: int, kv_size: int, exact: bool) -> None:
    got = plan("pyramidkv", n_layer=n_layer, n_head=6, n_head_kv=3, kv_size=kv_size, pyramid_exact=exact)
    expected = reference.pyramid_budget(n_layer=n_layer, n_head_kv=3, kv_size=kv_size, recent=WINDOW, exact=exact)
    np.testing.assert_array_equal(got, expected + WINDOW)


# ---------------------------------------------------------------- adakv


@ALL_SHAPES
@SIZES
@pytest.mark.parametrize("options", [{}, {"adakv_normalize": True}, {"adakv_floor": 0.0}, {"adakv_floor": 0.55, "pool": "avg"}], ids=str)
def test_adakv_keeps_what_the_oracle_keeps(
    shape: Shape, n_prompt: int, kv_size: int, options: dict[str, Any], make_model: MakeModel
) -> None:
    kept = check_kept(shape, make_model, n_prompt, kv_size=kv_size, policy="adakv", **options)
    for heads in kept:  # every layer has what it has under snapkv
        assert sum(map(len, heads)) == min(kv_size, n_prompt) * shape.n_head_kv
        assert min(map(len, heads)) >= min(n_prompt, WINDOW + int(options.get("adakv_floor", 0.2) * (kv_size - WINDOW)))


def test_adakv_moves_cells_between_heads_and_a_floor_of_one_keeps_them(make_model: MakeModel) -> None:
    shape = SHAPES[4]
    kept = {floor: check_kept(shape, make_model, 300, kv_size=40, policy="adakv", adakv_floor=floor) for floor in (0.0, 1.0)}
    assert all(len(rows) == 40 for heads in kept[1.0] for rows in heads)
    assert max(len(rows) for heads in kept[0.0] for rows in heads) > 44
    uniform = check_kept(shape, make_model, 300, kv_size=40, policy="snapkv")
    assert as_lists(kept[1.0]) == as_lists(uniform)


def test_adaptive_budget_by_hand() -> None:
    scores = np.array([[9.0, 8, 7, 6, 0, 0, 0, 0, 0, 0], [5.0, 4, 0, 0, 0, 0, 0, 0, 0, 0]])
    assert reference.adapt_budget(scores, [3, 3], floor=0.0).tolist() == [4, 2]
    assert reference.adapt_budget(scores, [3, 3], floor=1.0).tolist() == [3, 3]
    assert reference.adapt_budget(scores, [3, 3], floor=0.5).tolist() == [4, 2]  # 1 + 4 * 4 / 6, 1 + 2 * 4 / 6: the larger remainder
    assert reference.adapt_budget(scores, [4, 4], floor=0.0).tolist() == [6, 2]  # ties of zeros go to the lower head
    assert reference.adapt_budget(np.zeros((3, 2)), [1, 1, 1], floor=0.0).tolist() == [2, 1, 0]
    # two cells hold 7/16 of the first head's sum and all of the second one's
    flat = np.array([[4.0, 3, 3, 3, 3], [2.9, 2.8, 0, 0, 0]])
    assert reference.adapt_budget(flat, [2, 2], floor=0.0).tolist() == [4, 0]
    assert reference.adapt_budget(flat, [2, 2], floor=0.0, normalize=True).tolist() == [2, 2]


# ---------------------------------------------------------------- headkv+adakv


@ALL_SHAPES
@SIZES
@pytest.mark.parametrize("options", [{}, {"adakv_normalize": True, "adakv_floor": 0.25, "beta": 1.05}], ids=str)
def test_headkv_with_adakv_keeps_what_the_oracle_keeps(
    shape: Shape, n_prompt: int, kv_size: int, options: dict[str, Any], make_model: MakeModel
) -> None:
    """Every layer has the cells that it has under headkv, and every head at least the guaranteed share of its own."""
    kept = check_kept(shape, make_model, n_prompt, kv_size=kv_size, policy="headkv+adakv", **options)
    beta = {k: v for k, v in options.items() if k == "beta"}
    llm = load(make_model(shape), kv_size=kv_size, **beta)
    llm.read_prompt(tokens(n_prompt, seed=n_prompt))
    for heads, cells in zip(kept, llm.kv_stats().n_cells.tolist()):
        assert sum(map(len, heads)) == sum(cells)
        assert all(len(rows) >= (n - WINDOW) * options.get("adakv_floor", 0.5) for rows, n in zip(heads, cells))


def test_a_floor_of_one_is_headkv(make_model: MakeModel) -> None:
    shape = SHAPES[1]
    mixed = check_kept(shape, make_model, 300, kv_size=40, policy="headkv+adakv", adakv_floor=1.0)
    assert as_lists(mixed) == as_lists(check_kept(shape, make_model, 300, kv_size=40))
    assert as_lists(mixed) != as_lists(check_kept(shape, make_model, 300, kv_size=40, policy="headkv+adakv"))


def test_a_model_without_importance_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="policy 'headkv\\+adakv' needs the importance of each head and nothing is known of this model.s"):
        load(make_model(SHAPES[1], importance=None), kv_size=64, policy="headkv+adakv")


# ---------------------------------------------------------------- h2o


@ALL_SHAPES
@SIZES
def test_h2o_keeps_what_the_oracle_keeps(shape: Shape, n_prompt: int, kv_size: int, make_model: MakeModel) -> None:
    kept = check_kept(shape, make_model, n_prompt, kv_size=kv_size, policy="h2o")
    assert n_cells(kept) == min(kv_size, n_prompt) * shape.n_layer * shape.n_head_kv


def test_h2o_in_batches_of_any_size_keeps_nearly_the_same(make_model: MakeModel) -> None:
    kept = []
    for n_ubatch in (32, 64, 512):
        llm = load(make_model(SHAPES[1]), kv_size=40, policy="h2o", n_ubatch=n_ubatch)
        llm.read_prompt(tokens(701))
        kept.append(
            {
                (il, ih, pos)
                for il in range(SHAPES[1].n_layer)
                for ih in range(SHAPES[1].n_head_kv)
                for pos in llm.kv_positions(il, ih).tolist()
            }
        )
    assert all(len(kept[0] ^ other) <= 0.02 * len(kept[0]) for other in kept[1:])


def test_sums_of_h2o_move_with_a_prompt_whose_staging_grows(make_model: MakeModel) -> None:
    """A prompt that was not announced; what is summed for its first tokens is copied into the next staging."""
    prompt, kept, sizes = tokens(1500), [], set()
    for n_batch in (len(prompt), 250):
        llm = load(make_model(SHAPES[1]), kv_size=40, policy="h2o", n_ubatch=250, prefill="token")
        for i in range(0, len(prompt), n_batch):
            llm.eval(prompt[i : i + n_batch])
            sizes.add(llm.kv_stats().bytes_staging)
        llm.end_prompt()
        kept.append([llm.kv_positions(il, ih).tolist() for il in range(SHAPES[1].n_layer) for ih in range(SHAPES[1].n_head_kv)])
    assert kept[0] == kept[1] and len(sizes) > 2


def test_h2o_refuses_what_its_sums_do_not_tell(make_model: MakeModel) -> None:
    path, prompt = make_model(SHAPES[1]), tokens(200)
    llm = load(path, kv_size=40, policy="h2o", prefill="token")
    llm.eval(prompt)
    llm._ctx.kv_cache_seq_rm(0, 190, -1)
    llm.n_tokens = 190
    llm.eval(prompt[190:])
    with pytest.raises(
        RuntimeError, match="tokens were removed from the end of the prompt, or came from the archive, whose attention policy 'h2o' counts"
    ):
        llm.end_prompt()
    llm.configure(policy="snapkv")
    llm.end_prompt()
    with pytest.raises(ValueError, match="policy 'h2o' looks at all tokens while they are read: create the context with it"):
        load(path, kv_size=40).configure(policy="h2o")


# ---------------------------------------------------------------- razor


@ALL_SHAPES
@SIZES
@pytest.mark.parametrize("options", [{}, {"sinks": 0}, {"protect": [(50, 60)]}], ids=str)
def test_razor_keeps_what_the_oracle_keeps(
    shape: Shape, n_prompt: int, kv_size: int, options: dict[str, Any], make_model: MakeModel
) -> None:
    kept = check_kept(shape, make_model, n_prompt, kv_size=kv_size, policy="razor", **options)
    n_heads = shape.n_layer * shape.n_head_kv
    if not options and kv_size > WINDOW + 4:
        assert n_cells(kept) == min(kv_size, n_prompt) * n_heads
    lengths = sorted(len(rows) for heads in kept for rows in heads)
    assert sum(lengths[0] < n < n_prompt for n in lengths) <= 1  # all, few, and one head with the rest


@ALL_SHAPES
@pytest.mark.parametrize(("n_prompt", "kv_size"), [(700, 40), (701, 160)])
def test_the_cell_for_what_is_dropped_counts_as_often_as_it_stands_for(
    shape: Shape, n_prompt: int, kv_size: int, make_model: MakeModel
) -> None:
    """Both ways to attend agree on its weight, with one token and with several, and after the end of the prompt is taken back."""
    prompt, path = tokens(n_prompt), make_model(shape)
    logits = []
    for options in ({"attend": "fused"}, {"attend": "composed"}, {"attend": "composed", "n_buckets": 3}):
        llm = load(path, policy="razor", kv_size=kv_size, **options)
        llm.read_prompt(prompt)
        llm.eval([5])
        one = llm.last_logits.copy()
        llm.eval([6, 7, 8])
        several = llm.last_logits.copy()
        llm._ctx.kv_cache_seq_rm(0, n_prompt - 2, -1)
        llm.n_tokens = n_prompt - 2
        llm.eval(prompt[-2:])
        logits.append((one, several, llm.last_logits.copy()))
    for other in logits[1:]:
        assert all(nmse(a, b) < 1e-5 for a, b in zip(logits[0], other))


def test_the_cell_for_what_is_dropped_is_exact_where_all_that_is_dropped_is_alike(make_model: MakeModel) -> None:
    """In the first layer a value depends on its token alone: with equal values only the sum of the weights matters."""
    shape = Shape("alike", "llama", 4, 2, n_layer=1)
    prompt = [1, 2, 3, 4, *[50] * 300, *range(60, 68)]
    path = make_model(shape, rope_theta=1e30)  # nor does a key depend on its position, but for the fastest rotation
    full, few = load(path, flash_attn=True), load(path, policy="razor", kv_size=WINDOW + 5)
    few.read_prompt(prompt)
    assert [few.kv_positions(0, ih).tolist()[:5] for ih in range(2)] == [[-1, 0, 1, 2, 3]] * 2
    plain = load(path, policy="streaming", kv_size=WINDOW + 5)
    plain.read_prompt(prompt)
    full.eval(prompt)
    errors = []
    for token in (70, 71, 72):
        for llm in (full, few, plain):
            llm.eval([token])
        errors.append([nmse(llm.last_logits, full.last_logits) for llm in (few, plain)])
    few_error, plain_error = np.mean(errors, axis=0)
    assert few_error < 0.1 * plain_error, errors


def test_the_cell_for_what_is_dropped_survives_saving(make_model: MakeModel) -> None:
    path, prompt = make_model(SHAPES[1]), tokens(400)
    llm, other = (load(path, policy="razor", kv_size=40) for _ in range(2))
    llm.read_prompt(prompt)
    state = llm.save_state()
    other.load_state(state)
    for model in (llm, other):
        model.eval([5])
    np.testing.assert_array_equal(llm.last_logits, other.last_logits)
    assert (kept_by(llm, SHAPES[1])[0][0] == kept_by(other, SHAPES[1])[0][0]).all()


# ---------------------------------------------------------------- sinks, protect, surplus

SPANS = [(100, 104), (20, 29), (25, 40), (290, 1000)]
ALL_POLICIES = pytest.mark.parametrize("policy", [p for p in POLICIES if p != "lossless"])


@ALL_POLICIES
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=lambda s: s.name)
@pytest.mark.parametrize(("n_prompt", "kv_size"), [(300, 12), (300, 96), (60, 40), (20, 32)])
@pytest.mark.parametrize("options", [{"sinks": 5}, {"protect": SPANS}, {"protect": SPANS, "sinks": 3, "surplus": "redistribute"}], ids=str)
def test_protected_cells_are_kept_by_every_head(
    shape: Shape, policy: str, n_prompt: int, kv_size: int, options: dict[str, Any], make_model: MakeModel
) -> None:
    kept = check_kept(shape, make_model, n_prompt, kv_size=kv_size, policy=policy, **options)
    sure = [*range(options.get("sinks", 0)), *(i for start, end in options.get("protect", ()) for i in range(start, min(end, n_prompt)))]
    assert all(set(sure) <= set(rows.tolist()) for heads in kept for rows in heads)


@ALL_POLICIES
def test_protected_cells_are_part_of_the_budget_until_they_exceed_it(policy: str, make_model: MakeModel) -> None:
    shape, prompt = SHAPES[4], tokens(300)
    stats = {}
    for name, options in {"none": {}, "few": {"sinks": 4, "protect": [(50, 54)]}, "many": {"protect": [(100, 250)]}}.items():
        llm = load(make_model(shape), kv_size=64, policy=policy, beta=2.0 if policy in BY_BETA else None, **options)
        llm.read_prompt(prompt)
        stats[name] = llm.kv_stats()
    n_more = int(stats["few"].n_cells.sum() - stats["none"].n_cells.sum())
    assert n_more == (4 * 6 if policy == "pyramidkv" else 0)  # its last layer has 2 cells before the window
    assert (stats["many"].n_cells >= 150 + WINDOW).all()
    row = shape.head_dim * 2 * 2  # K and V in f16
    for s in stats.values():
        assert s.bytes_store == (s.n_cells.sum() + Options.n_tail * s.n_cells.size) * row


@ALL_SHAPES
@pytest.mark.parametrize("policy", ["headkv", "headkv+adakv", "pyramidkv"])
@pytest.mark.parametrize(("n_prompt", "kv_size"), [(60, 40), (60, 60), (300, 200), (100, 99)])
def test_redistributed_surplus_fills_the_budget(shape: Shape, policy: str, n_prompt: int, kv_size: int, make_model: MakeModel) -> None:
    options = {"kv_size": kv_size, "policy": policy, "beta": 1.01 if policy in BY_BETA else None}
    kept = {surplus: check_kept(shape, make_model, n_prompt, surplus=surplus, **options) for surplus in ("lost", "redistribute")}
    budget = load(make_model(shape), **options).kv_budget
    if kv_size - WINDOW <= n_prompt - WINDOW:
        assert n_cells(kept["redistribute"]) == min(int(budget.sum()), n_prompt * budget.size)
    assert n_cells(kept["redistribute"]) >= n_cells(kept["lost"])


def test_fitted_budget_by_hand() -> None:
    cells = [[9, 1, 1], [20, 2, 2], [3, 3, 3]]
    assert reference.fit_budget(cells, n_prefix=5).tolist() == [[5, 1, 1], [5, 2, 2], [3, 3, 3]]
    # 4 go to two heads of layer 0; of 15, 6 fit into layer 1, and the other 9 go to five heads of all layers
    full = reference.fit_budget(cells, n_prefix=5, redistribute=True)
    assert full.tolist() == [[5, 5, 5], [5, 5, 5], [5, 5, 4]]
    assert reference.fit_budget([[3, 0], [1, 1]], n_prefix=2, redistribute=True).tolist() == [[2, 1], [1, 1]]
    assert reference.fit_budget(cells, n_prefix=5, n_protected=4).tolist() == [[5, 4, 4], [5, 4, 4], [4, 4, 4]]


@pytest.mark.parametrize("policy", ["uniform/value/mean", "replay/value/mean", "adaptive/attention/mean", "pyramid/recent/mean"])
@pytest.mark.parametrize("options", [{}, {"protect": [(30, 90)]}, {"protect": SPANS, "sinks": 3}], ids=str)
def test_the_cell_for_what_is_dropped_takes_no_protected_one(policy: str, options: dict[str, Any], make_model: MakeModel) -> None:
    shape = SHAPES[4]
    kept = check_kept(shape, make_model, 300, kv_size=12, policy=policy, replay=random_table(shape), **options)
    sure = [i for start, end in options.get("protect", ()) for i in range(start, min(end, 300))]
    assert all(set(sure) <= set(rows.tolist()) for heads in kept for rows in heads)


def test_what_a_rank_is_certain_of_takes_no_protected_cell(make_model: MakeModel) -> None:
    """Cells move away from a head that is certain of half of them."""
    shape, rng = Shape("many heads", "llama", 32, 16, n_layer=2), np.random.default_rng(0)
    importance = rng.dirichlet(np.full(64, 0.05)).reshape(2, 32) + 1e-9
    llm = load(make_model(shape), kv_size=60, policy="importance+adaptive/critical", importance=importance,
               adakv_floor=0.0, beta=1.01, protect=[(150, 180)], prefill="token")  # fmt: skip
    llm.eval(tokens(250))
    expected = kept_of(llm, shape)
    llm.end_prompt()
    kept = kept_by(llm, shape)
    assert as_lists(kept) == as_lists(expected)
    assert all(set(range(150, 180)) <= set(rows.tolist()) for heads in kept for rows in heads)


def test_spans_beyond_the_context_are_refused(make_model: MakeModel) -> None:
    path = make_model(SHAPES[1])
    for options in ({"protect": [(10, 513)]}, {"sinks": 513}):
        with pytest.raises(ValueError, match="sinks or protect reach to position 513: they must end at or before n_ctx = 512"):
            load(path, kv_size=64, n_ctx=512, **options)
    llm = load(path, kv_size=64, n_ctx=512, protect=[(10, 512)])
    with pytest.raises(ValueError, match="position 513"):
        llm.configure(protect=[(0, 513)])
    llm.read_prompt(tokens(200))
    assert (llm.kv_stats().n_cells == 192 - 10 + WINDOW).all()


def test_the_library_checks_spans_itself() -> None:
    params = Options(kv_size=64, policy="snapkv", protect=[(3, 9)]).to_params(None, None)
    assert _lib.lib.headkv_set_params(ctypes.byref(params)) == 0
    for change, message in ({"n_protect": -1}, "n_protect is -1"), ({"sinks": -2}, "sinks is -2"), ({"surplus": 2}, "surplus is 2"):
        other = Options(kv_size=64, policy="snapkv").to_params(None, None)
        for name, value in change.items():
            setattr(other, name, value)
        assert _lib.lib.headkv_set_params(ctypes.byref(other)) < 0 and message in _lib.last_error()
    params.protect[1] = 3
    assert _lib.lib.headkv_set_params(ctypes.byref(params)) < 0 and "the span [3, 3)" in _lib.last_error()


# ---------------------------------------------------------------- budget x rank


def random_table(shape: Shape, seed: int = 0) -> ReplayTable:
    """Some heads need nearly all of a text, some nothing."""
    rng, shares = np.random.default_rng(seed), np.array([1 / 32, 1 / 8, 1 / 2])
    rows = []
    for share in shares:
        row = rng.permutation(np.linspace(0, 1, shape.n_layer * shape.n_head_kv)) ** 4 if not rows else rows[0].ravel() ** 0.5
        for _ in range(200):  # up to one each, with the mean of the share
            row = np.clip(row * share / row.mean(), 0, 1)
        rows.append(row.reshape(shape.n_layer, shape.n_head_kv))
    return ReplayTable(shares, np.maximum.accumulate(rows))


COMPOSED = ["replay/value", "mix/value", "mix/attention*value", "replay/attention", "importance/output", "adaptive/value",
            "importance+adaptive/attention*value", "pyramid/value", "uniform/recent/mean", "replay/value/mean", "adaptive/critical"]  # fmt: skip


@pytest.mark.parametrize("policy", COMPOSED)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=lambda s: s.name)
@SIZES
def test_every_budget_goes_with_every_rank(shape: Shape, policy: str, n_prompt: int, kv_size: int, make_model: MakeModel) -> None:
    check_kept(shape, make_model, n_prompt, kv_size=kv_size, policy=policy, replay=random_table(shape))


@pytest.mark.parametrize("policy", ["replay/value", "mix/attention*value"])
@pytest.mark.parametrize("options", [{"sinks": 0}, {"protect": SPANS, "sinks": 3}, {"surplus": "redistribute"}], ids=str)
def test_replay_budgets_count_what_is_protected(policy: str, options: dict[str, Any], make_model: MakeModel) -> None:
    shape = SHAPES[4]
    kept = check_kept(shape, make_model, 300, kv_size=40, policy=policy, replay=random_table(shape), **options)
    if policy == "replay/value" and "protect" not in options:
        assert n_cells(kept) == 40 * shape.n_layer * shape.n_head_kv


@pytest.mark.parametrize("type_v", [1, 8, 2], ids=["f16", "q8_0", "q4_0"])
def test_norms_of_quantised_values(type_v: int, make_model: MakeModel) -> None:
    shape = Shape("lengths", "llama", 8, 2, n_layer=2, head_dim=64)
    check_kept(shape, make_model, 301, kv_size=40, policy="uniform/value", type_k=1, type_v=type_v)


def test_choices_replace_those_of_the_policy(make_model: MakeModel) -> None:
    shape = SHAPES[4]
    table = random_table(shape)
    llm = load(make_model(shape), kv_size=40, policy="headkv", rank="value", budget="mix", replay=table)
    assert llm.policy == "mix/value" and llm.replay_origin == "the argument replay=" and llm.importance_origin
    llm.configure(budget=None)
    assert llm.policy == "importance/value" and llm.replay_origin == ""
    llm.configure(rank="attention", fit="none")
    assert llm.policy == "headkv"
    other = load(make_model(shape), kv_size=40, policy="mix/value", replay=table)
    llm.configure(policy="mix/value", rank=None)
    for model in (llm, other):
        model.read_prompt(tokens(300))
    assert as_lists(kept_by(llm, shape)) == as_lists(kept_by(other, shape))


@pytest.mark.parametrize("has_importance", [True, False], ids=["importance", "nothing"])
@pytest.mark.parametrize("has_table", [True, False], ids=["table", "no table"])
def test_auto_knows_the_three_situations(has_importance: bool, has_table: bool, make_model: MakeModel) -> None:
    shape = SHAPES[4]
    path = make_model(shape) if has_importance else make_model(shape, importance=None)
    replay = random_table(shape) if has_table else None
    later = {
        (True, True): "mix/outlying+value",
        (False, True): "replay/outlying+value",
        (True, False): "importance/outlying",
        (False, False): "uniform/outlying",
    }
    llm = load(path, kv_size=40, policy="auto", replay=replay)
    assert llm.policy == ("headkv" if has_importance else "adakv")
    llm.configure(question="both")
    budget = "uniform" if not has_importance else "mix" if has_table else "importance"
    assert llm.policy == f"{budget}/attention+outlying"
    llm.configure(question="later")
    assert llm.policy == later[has_importance, has_table]
    llm.configure(policy="snapkv")
    assert llm.policy == "snapkv"
    with pytest.raises(ValueError, match="policy='snapkv', question='later': a policy that is named does not look at it"):
        llm.configure(question="later")
    with pytest.raises(ValueError, match="question='never': it must be one of 'known', 'both', 'later'"):
        llm.configure(question="never")
    with pytest.raises(ValueError, match="budget='uniform', rank='value', question='later': nothing is left for the question to decide"):
        llm.configure(policy="auto", budget="uniform", rank="value", question="later")
    if has_table:  # kv_reuse says that questions come later, which a policy that is named does not look at
        for policy, used in (("auto", later[has_importance, True]), ("replay/value", "replay/value"), ("snapkv", "snapkv")):
            assert load(path, kv_size=40, policy=policy, replay=replay, kv_reuse=True).policy == used


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"policy": "mix/values"},
            "rank is 'values': it must be one of attention, value, attention.value, expected, outlying, outlying.value, attention.outlying, output, critical, sums, recent",
        ),
        ({"policy": "mixed/value"}, "budget is 'mixed': it must be one of uniform, importance, replay, mix, adaptive"),
        ({"policy": "snapkv", "fit": "value"}, "fit is 'value': it must be one of none, mean, values"),
        ({"policy": "uniform/value/none/x"}, "fit is 'none/x'"),
        ({"policy": "lossless", "rank": "value"}, "policy 'lossless' keeps all cells: it takes no rank and no fit"),
        ({"budget": "all", "fit": "values"}, "budget 'all' keeps all cells: it takes no rank and no fit"),
        ({"budget": "all", "kv_size": 40}, "budget='all', kv_size=40: it keeps all cells, leave the amount out"),
        ({"policy": "all/recent", "kv_ratio": 0.5}, "policy='all/recent', kv_ratio=0.5: it keeps all cells, leave the amount out"),
        ({"policy": "lossless", "budget": "uniform"}, "policy='lossless', budget='uniform': nothing says how much is kept"),
        ({"budget": 3}, "budget=3: it must be a name, or None"),
        ({"rank": ["value"]}, r"rank=\['value'\]: it must be a name, or None"),
        ({"policy": "uniform/value\0s"}, r"policy='uniform/value.x00s': it must be a name"),
        ({"policy": "replay/value"}, "needs the replay table of each head .*pyheadkv score MODEL.gguf --method replay"),
        ({"policy": "replay/value", "beta": 1.5}, "it does not look at beta"),
    ],
    ids=str,
)
def test_wrong_choices_are_value_errors(options: dict[str, Any], message: str, make_model: MakeModel) -> None:
    is_all = {"lossless", "all", "all/recent"} & {options.get("policy"), options.get("budget")}
    amount = {"preset": None} if is_all else {"kv_size": 40}
    with pytest.raises(ValueError, match=message):
        load(make_model(SHAPES[4]), **{**amount, **options})


@pytest.mark.parametrize("options", [{"policy": "all/recent"}, {"budget": "all"}], ids=str)
def test_a_budget_of_all_is_lossless(options: dict[str, str], make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[4]), **options)
    llm.read_prompt(tokens(100))
    assert llm.policy == "lossless" and (llm.kv_stats().n_cells == 100).all()


def test_a_table_is_read_however_it_lies_in_memory(make_model: MakeModel) -> None:
    shape = SHAPES[4]
    table, path = random_table(shape), make_model(shape)
    expected = load(path, kv_size=40, policy="replay/value", replay=table).kv_budget
    values = table.values
    for other in (np.asfortranarray(values), np.repeat(values, 2, axis=2)[:, :, ::2], values.tolist()):
        llm = load(path, kv_size=40, policy="replay/value", replay=ReplayTable(table.shares, other))
        np.testing.assert_array_equal(llm.kv_budget, expected)
    rounded = ReplayTable(table.shares.astype(np.float32), values.astype(np.float32))
    np.testing.assert_allclose(load(path, kv_size=40, policy="replay/value", replay=rounded).kv_budget, expected, atol=1)
    with pytest.raises(ValueError, match="they must ascend"):
        load(path, kv_size=40, policy="replay/value", replay=ReplayTable(table.shares[::-1], values[::-1]))
    with pytest.raises(ValueError, match="it must be a path or a ReplayTable"):
        load(path, kv_size=40, policy="replay/value", replay=values)


def test_what_is_not_known_is_looked_for_once(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each prompt: it takes as long as reading the header."""
    from pyheadkv import llama

    calls: list[str] = []
    for name in ("find_replay", "find_importance"):
        monkeypatch.setattr(llama, name, lambda path, name=name: calls.append(name))
    llm = load(make_model(SHAPES[4]), kv_ratio=0.5, policy="auto")
    for n in (50, 60):
        llm.read_prompt(tokens(n))
    llm.configure(question="later")
    assert llm.policy == "uniform/outlying" and sorted(calls) == ["find_importance", "find_replay"]


@pytest.mark.parametrize("n_layer", [1, 3])
def test_importance_and_table_of_different_models_are_refused(n_layer: int, make_model: MakeModel) -> None:
    shape = SHAPES[4]
    with pytest.raises(ValueError, match=f"importance is for {n_layer} layers, the replay table for 2"):
        load(make_model(shape), kv_size=40, policy="mix/value", importance=np.ones((n_layer, shape.n_head)), replay=random_table(shape))


def test_the_library_checks_tables_itself() -> None:
    shape = Shape("table", "llama", 8, 2, n_layer=2)
    for change, message in (
        (lambda t: np.copyto(t.values[0], 2.0), "the replay table has 2 for layer 0, KV head 0: it must be in"),
        (lambda t: np.copyto(t.values[0], np.nan), "the replay table has"),
        (lambda t: np.copyto(t.values[1], 0.0), "all zero at the share 0.125"),
        (lambda t: np.copyto(t.values[1], t.values[0] / 2), "at the share 0.125: it must not be below that of a smaller one"),
        (lambda t: np.copyto(t.shares, 0.5), "the share 0.5 after 0.5: shares must ascend between 0 and 1"),
    ):
        table = random_table(shape)
        change(table)
        params = Options(kv_size=64, policy="replay/value").to_params(None, None, table)
        assert _lib.lib.headkv_set_params(ctypes.byref(params)) < 0 and message in _lib.last_error()
    _lib.lib.headkv_set_params(None)


def test_the_library_refuses_a_table_of_another_mean() -> None:
    shape = Shape("table", "llama", 8, 2, n_layer=2)
    table = random_table(shape)
    plan("replay/value", n_layer=2, n_head=8, n_head_kv=2, replay=table, kv_size=64)
    for values, n_head_kv in ((table.values / 2, 2), (table.values, 1)):
        other = ReplayTable(table.shares, values)
        with pytest.raises(RuntimeError, match="measure it on this model"):
            plan("replay/value", n_layer=2, n_head=8, n_head_kv=n_head_kv, replay=other, kv_size=64)


def test_replay_budgets_by_hand() -> None:
    shares, values = [0.25], [[[1.0, 0.25], [0.0, 0.0]]]  # mean 0.3125, brought to what is asked for
    table = {"kv_size": 28, "recent": 8, "n_prefix": 80}
    got = reference.replay_budget(shares, values, **table)
    assert got.tolist() == [[64, 16], [0, 0]]
    # 4 of each head are protected, 16 of 76 go by the table at a share of 0.2105: 51.2, 12.8, and the cell that is left
    assert reference.replay_budget(shares, values, n_protected=4, **table).tolist() == [[56, 16], [4, 4]]
    full = reference.replay_budget(shares, values, kv_size=88, recent=8, n_prefix=80)
    assert full.tolist() == [[80, 80], [80, 80]]
    assert reference.mix_budget([[100, 20], [0, 0]], [[64, 15], [0, 0]], n_prefix=80).tolist() == [[72, 27], [0, 0]]


# ---------------------------------------------------------------- criticalkv


@ALL_SHAPES
@SIZES
@pytest.mark.parametrize("options", [{}, {"pool": "avg"}], ids=str)
def test_criticalkv_keeps_what_the_oracle_keeps(
    shape: Shape, n_prompt: int, kv_size: int, options: dict[str, Any], make_model: MakeModel
) -> None:
    kept = check_kept(shape, make_model, n_prompt, kv_size=kv_size, policy="criticalkv", **options)
    assert {len(rows) for heads in kept for rows in heads} == {min(kv_size, n_prompt)}


@pytest.mark.parametrize("ftype", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("type_v", [1, 8], ids=["v-f16", "v-q8_0"])
def test_criticalkv_reads_quantised_weights_and_values(ftype: str, type_v: int, make_model: MakeModel) -> None:
    """Of types that the CPU backend repacks, too; quantised values are rotated in the cache."""
    shape = Shape("critical", "llama", 8, 2, n_layer=2, head_dim=64)
    check_kept(shape, make_model, 301, kv_size=40, policy="criticalkv", ftype=ftype, type_k=1, type_v=type_v)


def test_criticalkv_keeps_the_better_half_by_attention_and_then_looks_at_the_values(make_model: MakeModel) -> None:
    shape = SHAPES[4]
    path, prompt = make_model(shape), tokens(300)
    kept = {}
    for policy, kv_size in (("criticalkv", 48), ("snapkv", 48), ("snapkv", 28)):
        llm = load(path, kv_size=kv_size, policy=policy)
        llm.read_prompt(prompt)
        kept[policy, kv_size] = kept_by(llm, shape)
    assert as_lists(kept["criticalkv", 48]) != as_lists(kept["snapkv", 48])
    for heads, sure in zip(kept["criticalkv", 48], kept["snapkv", 28]):
        assert all(set(b.tolist()) <= set(a.tolist()) for a, b in zip(heads, sure))


def test_criticalkv_is_refused_where_something_comes_between_attention_and_output_matrix() -> None:
    import architectures
    import llama_cpp

    model = architectures.make_model(*architectures.cases()["bitnet"])
    critical = Options(kv_size=64, policy="criticalkv").to_params(None, None)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.flash_attn_type = 512, 1
    message = "policy 'criticalkv' needs the output matrix of layer 0"
    with _lib.creating(critical):
        assert not llama_cpp.llama_init_from_model(model, params)
    assert message in _lib.last_error()
    with _lib.creating(Options(kv_size=64, policy="snapkv").to_params(None, None)):
        ctx = llama_cpp.llama_init_from_model(model, params)
    assert _lib.lib.headkv_configure(ctx, ctypes.byref(critical)) < 0 and message in _lib.last_error()
    llama_cpp.llama_free(ctx)
    llama_cpp.llama_model_free(model)
