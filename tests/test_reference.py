"""The NumPy oracle against cases small enough to work out by hand, and against itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyheadkv.testing import random_importance, reference, write_random_model
from pyheadkv.testing.reference import (
    ReferenceModel,
    attend,
    attention_sums,
    compact,
    fit_values,
    keep,
    pool_scores,
    score,
    select,
    softmax,
    window_queries,
)

WINDOW = 4
SHAPES = {  # name -> arguments of write_random_model; GQA 1, 4 and 7, odd sizes on purpose
    "llama-gqa1": {"arch": "llama", "n_embd": 64, "n_head": 3, "n_head_kv": 3, "head_dim": 32},
    "llama-gqa4": {"arch": "llama", "n_embd": 64, "n_head": 8, "n_head_kv": 2, "head_dim": 16},
    "llama-gqa7": {"arch": "llama", "n_embd": 64, "n_head": 7, "n_head_kv": 1, "head_dim": 32},
    "qwen2-gqa1": {"arch": "qwen2", "n_embd": 64, "n_head": 4, "n_head_kv": 4},
    "qwen2-gqa4": {"arch": "qwen2", "n_embd": 64, "n_head": 4, "n_head_kv": 1},
    "qwen2-gqa7": {"arch": "qwen2", "n_embd": 224, "n_head": 14, "n_head_kv": 2},
    "qwen3-gqa1": {"arch": "qwen3", "n_embd": 64, "n_head": 2, "n_head_kv": 2, "head_dim": 64},
    "qwen3-gqa4": {"arch": "qwen3", "n_embd": 64, "n_head": 4, "n_head_kv": 1, "head_dim": 32},
    "qwen3-gqa7": {"arch": "qwen3", "n_embd": 64, "n_head": 7, "n_head_kv": 1, "head_dim": 32},
}


def write_model(path: Path, **change: Any) -> Path:
    args: dict[str, Any] = {"n_layer": 2, "n_ff": 96, "seed": 7, **SHAPES["llama-gqa4"], **change}
    write_random_model(path, **args)
    return path


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def path_of(name: str) -> Path:
        path = folder / f"{name}.gguf"
        return path if path.exists() else write_model(path, **SHAPES[name])

    return path_of


def tokens(n: int, *, n_vocab: int = 384) -> list[int]:
    return [1, *np.random.default_rng(5).integers(3, n_vocab, n - 1).tolist()]


def lists(positions: list[NDArray[np.int32]]) -> list[list[int]]:
    return [rows.tolist() for rows in positions]


# softmax and pooling


def test_softmax_of_known_logits() -> None:
    np.testing.assert_allclose(softmax([[0.0, math.log(3)], [1000.0, 1000.0]]), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-15)


def test_softmax_of_a_row_masked_in_full_is_zero() -> None:
    assert softmax([[-np.inf, -np.inf], [-np.inf, 5.0]]).tolist() == [[0, 0], [0, 1]]


def test_softmax_beside_a_sink() -> None:
    logits = [[0.0, math.log(3)], [-np.inf, 0.0]]
    np.testing.assert_allclose(softmax(logits, sink=math.log(4)), [[1 / 8, 3 / 8], [0, 1 / 5]], rtol=1e-15)
    np.testing.assert_allclose(softmax(logits, sink=[math.log(4), 0.0]), [[1 / 8, 3 / 8], [0, 1 / 2]], rtol=1e-15)
    np.testing.assert_array_equal(softmax(logits, sink=-1e30), softmax(logits))
    assert softmax(np.zeros((2, 0)), sink=1.0).shape == (2, 0)


def test_max_pooling_takes_the_largest_neighbour() -> None:
    assert pool_scores([[1.0, 0, 0, 0, 2]], pool="max", kernel=3).tolist() == [[1, 1, 0, 2, 2]]
    assert pool_scores([[1.0, 0, 0, 0, 2]], pool="max", kernel=7).tolist() == [[1, 2, 2, 2, 2]]


def test_max_pooling_ignores_the_padding() -> None:
    assert pool_scores([[-1.0, -3, -2]], pool="max", kernel=3).tolist() == [[-1, -1, -2]]


def test_avg_pooling_divides_by_the_full_kernel_at_the_ends() -> None:
    np.testing.assert_allclose(pool_scores([[3.0, 0, 0, 6]], pool="avg", kernel=3), [[1, 1, 2, 2]], rtol=1e-15)
    np.testing.assert_allclose(pool_scores([[7.0]], pool="avg", kernel=7), [[1]], rtol=1e-15)


@pytest.mark.parametrize("pool", reference.POOLS)
def test_kernel_1_pools_nothing(pool: reference.Pool) -> None:
    assert pool_scores([[3.0, 1, 2]], pool=pool, kernel=1).tolist() == [[3, 1, 2]]


@pytest.mark.parametrize("kernel", [0, -1, 2, 8])
def test_even_kernel_is_refused(kernel: int) -> None:
    with pytest.raises(ValueError, match=f"pool_kernel = {kernel} is not odd"):
        pool_scores([[1.0]], pool="max", kernel=kernel)


def test_unknown_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="pool = 'min'.*max, avg"):
        pool_scores([[1.0]], pool="min", kernel=3)  # type: ignore[arg-type]


# score

KEYS = np.log([2.0, 4, 1, 1]).reshape(4, 1, 1)  # (n_tokens, n_head_kv, head_dim); with q = 1 the weights are 2 4 1 1
ONE_HEAD = [(2 / 7 + 2 / 8) / 2, (4 / 7 + 4 / 8) / 2]  # row of token 2 does not see token 3


def test_score_is_the_mean_over_the_window_of_a_causal_softmax() -> None:
    got = score(np.ones((2, 1, 1)), KEYS, scale=1.0, pool_kernel=1)
    np.testing.assert_allclose(got, [ONE_HEAD], rtol=1e-14)


def test_score_is_the_mean_over_the_query_heads_of_a_group() -> None:
    q = np.stack([np.ones((2, 1)), np.zeros((2, 1))], axis=1)  # the second head attends evenly
    even = (1 / 3 + 1 / 4) / 2
    got = score(q, KEYS, scale=1.0, pool_kernel=1)
    np.testing.assert_allclose(got, [[(ONE_HEAD[0] + even) / 2, (ONE_HEAD[1] + even) / 2]], rtol=1e-14)


def test_query_head_reads_the_kv_head_of_its_group() -> None:
    q = np.ones((2, 4, 1))
    k = np.concatenate([KEYS, np.zeros_like(KEYS)], axis=1)
    even = (1 / 3 + 1 / 4) / 2
    np.testing.assert_allclose(score(q, k, scale=1.0, pool_kernel=1), [ONE_HEAD, [even, even]], rtol=1e-14)


def test_group_mean_is_taken_before_pooling() -> None:
    q = np.array([[[1.0], [-1.0]]])
    k = np.array([3.0, 0, 0, -3, 0]).reshape(5, 1, 1)
    plain = score(q, k, scale=1.0, pool_kernel=1)
    np.testing.assert_allclose(score(q, k, scale=1.0, pool_kernel=3), pool_scores(plain, pool="max", kernel=3), rtol=1e-14)


def test_each_head_may_have_a_kernel_of_its_own() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((3, 4, 8)), rng.standard_normal((30, 2, 8))
    one, other, both = (score(q, k, scale=1.0, pool_kernel=kernel) for kernel in (3, 7, np.array([3, 7])))
    np.testing.assert_array_equal(both, [one[0], other[1]])
    assert reference.pool_kernels([0, 11, 12, 20, 28, 123, 124, 5000]).tolist() == [3, 3, 3, 5, 7, 31, 31, 31]


def test_pooling_does_not_see_the_window_columns() -> None:
    k = np.array([0.0, 0, 9, 9]).reshape(4, 1, 1)
    got = score(np.ones((2, 1, 1)), k, scale=1.0, pool_kernel=3)
    assert got.shape == (1, 2) and got.max() < 1e-3


def test_n_prefix_drops_more_columns() -> None:
    got = score(np.ones((2, 1, 1)), KEYS, scale=1.0, pool_kernel=1, n_prefix=1)
    np.testing.assert_allclose(got, [ONE_HEAD[:1]], rtol=1e-14)


def test_scale_and_softcap_act_on_the_logits() -> None:
    q, capped = np.ones((2, 1, 1)), 2 * np.tanh(0.5 * KEYS / 2)
    np.testing.assert_allclose(
        score(q, KEYS, scale=0.5, softcap=2.0, pool_kernel=1), score(q, capped, scale=1.0, pool_kernel=1), rtol=1e-14
    )


def test_sinks_of_the_query_heads_are_in_the_sums_that_score_divides_by() -> None:
    q = np.ones((2, 2, 1))  # two query heads of one group
    got = score(q, KEYS, scale=1.0, pool_kernel=1, sinks=np.log([1.0, 8.0]))
    expected = [np.mean([w / 8, w / 9, w / 15, w / 16]) for w in (2, 4)]
    np.testing.assert_allclose(got, [expected], rtol=1e-14)


def test_sinks_are_neither_scaled_nor_capped() -> None:
    capped = 2 * np.tanh(np.log([2.0, 4, 1, 1]) / 2)
    plain, with_sinks = (score(np.full((2, 1, 1), 2.0), KEYS, scale=0.5, softcap=2.0, pool_kernel=1, sinks=s) for s in (None, [3.0]))
    sums = np.exp(capped)[:3].sum(), np.exp(capped).sum()
    expected = np.mean([np.exp(capped[:2]) / (s + np.exp(3.0)) for s in sums], axis=0)
    np.testing.assert_allclose(with_sinks, [expected], rtol=1e-14)
    assert (with_sinks < plain).all()


def test_attention_sums_beside_sinks() -> None:
    got = attention_sums(np.ones((4, 1, 1)), KEYS, scale=1.0, sinks=[math.log(5)])
    sums = np.array([2.0, 6, 7, 8]) + 5
    np.testing.assert_allclose(got, [[2 * (1 / sums).sum(), 4 * (1 / sums[1:]).sum(), (1 / sums[2:]).sum(), 1 / sums[3]]], rtol=1e-14)


def test_q_round_rounds_the_queries_before_use() -> None:
    q = np.full((2, 1, 1), 1 + 2.0**-12)
    exact, rounded = (score(q, KEYS, scale=1.0, pool_kernel=1, q_round=dtype) for dtype in (None, np.float16))
    np.testing.assert_allclose(rounded, [ONE_HEAD], rtol=1e-14)
    assert np.abs(exact - rounded).max() > 1e-6


def test_prompt_not_longer_than_the_window_has_no_prefix() -> None:
    q = np.ones((3, 2, 1))
    assert len(window_queries(q, window=8)) == 3
    assert score(window_queries(q, window=8), KEYS[:3], scale=1.0).shape == (1, 0)


@pytest.mark.parametrize(("n_window", "n_prefix"), [(2, 5), (2, -1), (5, None), (0, None)])
def test_window_and_prefix_must_fit_the_keys(n_window: int, n_prefix: int | None) -> None:
    with pytest.raises(ValueError, match="n_prefix|do not fit"):
        score(np.ones((n_window, 1, 1)), KEYS, scale=1.0, n_prefix=n_prefix)


# select and keep


def test_select_gives_ties_to_the_lower_position() -> None:
    assert lists(select([[1.0, 1, 1, 1]], 2)) == [[0, 1]]
    assert lists(select([[0.0, 2, 2, 2, 3]], 3)) == [[1, 2, 4]]
    assert lists(select([[0.0, -0.0, 0.0]], 1)) == [[0]]


def test_select_has_one_k_per_head_and_clips_it() -> None:
    scores = [[1.0, 3, 2], [3.0, 1, 2], [1.0, 2, 3]]
    kept = select(scores, [1, 9, 0])
    assert lists(kept) == [[1], [0, 1, 2], []]
    assert all(rows.dtype == np.int32 for rows in kept)


def test_select_ties_do_not_depend_on_the_length() -> None:
    scores = np.repeat([5.0, 1.0, 5.0], 100)[None]
    assert lists(select(scores, 150)) == [[*range(100), *range(200, 250)]]


def test_select_refuses_nan() -> None:
    with pytest.raises(ValueError, match="1 NaN"):
        select([[1.0, float("nan")]], 1)


def test_select_refuses_a_negative_k() -> None:
    with pytest.raises(ValueError, match="k = -1"):
        select([[1.0, 2.0]], [-1])


def test_keep_is_the_best_prefix_cells_and_the_window() -> None:
    scores = [[0.0, 9, 1, 2, 8, 0], [1.0, 2, 3, 4, 5, 6]]
    kept = keep(scores, [6, 5], kv_size=6, recent=WINDOW, n_tokens=10)
    assert lists(kept) == [[1, 4, 6, 7, 8, 9], [5, 6, 7, 8, 9]]


def test_prompt_shorter_than_the_mean_budget_is_not_compressed_whatever_the_heads_have() -> None:
    scores = np.ones((2, 5))
    assert lists(keep(scores, [5, 99], kv_size=10, recent=WINDOW, n_tokens=9)) == [list(range(9))] * 2


def test_prompt_of_exactly_kv_size_tokens_is_compressed_and_surplus_is_lost() -> None:
    scores = np.array([[3.0, 2, 1, 0, 0, 0], [0.0] * 6])
    kept = keep(scores, [5, 15], kv_size=10, recent=WINDOW, n_tokens=10)
    assert lists(kept) == [[0, 6, 7, 8, 9], list(range(10))]


def test_prompt_shorter_than_the_window_is_kept() -> None:
    assert lists(keep(np.zeros((1, 0)), [9], kv_size=9, recent=8, n_tokens=3)) == [[0, 1, 2]]


# attend


def test_attend_on_equal_lists_is_plain_attention() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(6, 8)), rng.normal(size=(31, 3, 8)), rng.normal(size=(31, 3, 5))
    got = attend(q, compact(k, [np.arange(31)] * 3), compact(v, [np.arange(31)] * 3), scale=0.3)
    k6, v6 = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    weights = np.exp(0.3 * np.einsum("hd,nhd->hn", q, k6))
    expected = np.einsum("hn,nhd->hd", weights / weights.sum(axis=-1, keepdims=True), v6)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


def test_attend_reads_each_heads_own_cells_in_any_order() -> None:
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(2, 4)), rng.normal(size=(9, 2, 4)), rng.normal(size=(9, 2, 4))
    rows = [np.array([7, 0, 3]), np.array([8])]
    got = attend(q, compact(k, rows), compact(v, rows), scale=0.5)
    ordered = [np.sort(r) for r in rows]
    np.testing.assert_allclose(got, attend(q, compact(k, ordered), compact(v, ordered), scale=0.5), rtol=1e-14)
    np.testing.assert_allclose(got[1], v[8, 1], rtol=1e-14)


def test_attend_on_an_empty_head_is_zero() -> None:
    empty, full = np.zeros((0, 4)), np.ones((2, 4))
    got = attend(np.ones((2, 4)), [empty, full], [empty, full], scale=1.0)
    assert got.tolist() == [[0] * 4, [1] * 4]


def test_a_sink_is_a_cell_without_a_value() -> None:
    rng = np.random.default_rng(3)
    q, sinks = rng.normal(size=(3, 4)), np.array([-4.0, 0.0, 20.0])
    k, v = [rng.normal(size=(n, 4)) for n in (1, 7, 30)], [rng.normal(size=(n, 4)) for n in (1, 7, 30)]
    cells = [np.vstack([rows, row * sink / (0.5 * row @ row)]) for rows, row, sink in zip(k, q, sinks, strict=True)]
    expected = attend(q, cells, [np.vstack([rows, np.zeros(4)]) for rows in v], scale=0.5)
    np.testing.assert_allclose(attend(q, k, v, scale=0.5, sinks=sinks), expected, rtol=1e-12)
    np.testing.assert_array_equal(attend(q, k, v, scale=0.5, sinks=np.full(3, -1e30)), attend(q, k, v, scale=0.5))


def test_attend_on_an_empty_head_is_zero_beside_a_sink() -> None:
    empty = np.zeros((0, 4))
    assert attend(np.ones((2, 4)), [empty], [empty], scale=1.0, sinks=[0.0, 20.0]).tolist() == [[0] * 4] * 2


def test_there_is_one_sink_for_each_query_head() -> None:
    with pytest.raises(ValueError, match=r"sinks have shape \(1,\): .* 2 query heads"):
        attend(np.ones((2, 4)), [np.ones((1, 4))], [np.ones((1, 4))], scale=1.0, sinks=[0.0])


# fit


def test_fit_answers_beside_the_sinks_of_its_queries() -> None:
    # weights of the two cells are 2 and 4, the first one is kept; queries 3 and 7 are held out
    sinks = np.log([1.0, 2, 3, 5, 1, 2, 3, 7])
    k, v = KEYS[:2, 0], np.array([[1.0], [10.0]])
    _, before, _ = fit_values(np.ones((8, 1)), np.full(8, 1), k, v, [0], scale=1.0, sinks=sinks)
    y, x = np.array([42 / (6 + s) for s in (5, 7)]), np.array([2 / (2 + s) for s in (5, 7)])
    assert before == pytest.approx(((y - x) ** 2).sum() / (y**2).sum(), rel=1e-12)


# forward pass


def test_rope_rotates_neighbours_in_llama_and_halves_in_qwen(model_path: Callable[[str], Path]) -> None:
    x, angle = np.zeros((1, 1, 32)), 3.0
    x[..., 0] = 1
    for name, partner in (("llama-gqa1", 1), ("qwen3-gqa4", 16)):
        turned = ReferenceModel(model_path(name)).rope(x, np.array([3]))[0, 0]
        assert np.flatnonzero(turned).tolist() == [0, partner]
        np.testing.assert_allclose(turned[[0, partner]], [math.cos(angle), math.sin(angle)], rtol=1e-14)


@pytest.mark.parametrize("name", ["llama-gqa1", "qwen3-gqa4"])
def test_rope_makes_logits_depend_on_distance_only(name: str, model_path: Callable[[str], Path]) -> None:
    model, rng = ReferenceModel(model_path(name)), np.random.default_rng(2)
    q, k = rng.normal(size=(2, 1, 1, model.head_dim))
    logits = [float((model.rope(q, np.array([n + 5])) * model.rope(k, np.array([n]))).sum()) for n in (0, 1, 17, 1000)]
    np.testing.assert_allclose(logits, logits[0], rtol=1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_decode_after_keep_all_equals_prefill_of_the_longer_prompt(name: str, model_path: Callable[[str], Path]) -> None:
    model, ids = ReferenceModel(model_path(name)), tokens(33)
    longer = model.prefill(ids)
    model.prefill(ids[:20])
    full = np.full((model.n_layer, model.n_head_kv), 99)
    kept = model.compress(full, kv_size=99, window=WINDOW)
    assert all(lists(heads) == [list(range(20))] * model.n_head_kv for heads in kept)
    decoded = [model.decode(token) for token in ids[20:]]
    np.testing.assert_allclose(decoded, longer[20:], rtol=0, atol=1e-9)
    assert model.n_past == 33


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 3, 4, 5, 12, 31])
def test_compression_keeps_the_window_and_at_most_the_budget(name: str, n_tokens: int, model_path: Callable[[str], Path]) -> None:
    model, kv_size = ReferenceModel(model_path(name)), 10
    caps = reference.budget(random_importance(n_layer=model.n_layer, n_head=model.n_head, seed=3), kv_size=kv_size, recent=WINDOW, beta=1.2)
    cells = reference.budget_kv(caps, n_head_kv=model.n_head_kv, recent=WINDOW)
    model.prefill(tokens(n_tokens))
    kept = model.compress(cells, kv_size=kv_size, window=WINDOW)
    for il, heads in enumerate(kept):
        for ih, rows in enumerate(heads):
            whole = n_tokens < kv_size
            assert len(rows) == (n_tokens if whole else min(n_tokens, cells[il, ih]))
            assert (np.diff(rows) > 0).all()
            assert set(range(max(0, n_tokens - WINDOW), n_tokens)) <= set(rows.tolist())


def test_decode_after_compression_attends_to_kept_and_appended_cells_only(model_path: Callable[[str], Path]) -> None:
    model, ids = ReferenceModel(model_path("llama-gqa4")), tokens(40)
    model.prefill(ids)
    full = model.decode(5)
    model.prefill(ids)
    kept = model.compress(np.full((2, 2), 8), kv_size=8, window=WINDOW)
    dropped = sorted(set(range(40)) - {p for heads in kept for rows in heads for p in rows.tolist()})
    for il in range(model.n_layer):  # what was dropped by every head must not matter any more
        model.k[il][dropped] = np.nan
        model.v[il][dropped] = np.nan
    first = model.decode(5)
    assert np.isfinite(first).all() and np.abs(first - full).max() > 1e-3
    assert model.positions[1][1].tolist() == [*kept[1][1].tolist(), 40]
    assert model.decode(6).shape == (model.n_vocab,)
    assert model.positions[0][0].tolist() == [*kept[0][0].tolist(), 40, 41]


def test_kept_cells_of_the_model_are_the_stages_applied_to_its_q_and_k(model_path: Callable[[str], Path]) -> None:
    model = ReferenceModel(model_path("qwen2-gqa7"))
    model.prefill(tokens(40))
    kept = model.compress(np.array([[9, 12], [20, 5]]), kv_size=10, window=WINDOW, pool="avg", pool_kernel=5)
    scores = score(model.q[1][-WINDOW:], model.k[1], scale=16**-0.5, pool="avg", pool_kernel=5)
    assert lists(kept[1]) == lists(keep(scores, [20, 5], kv_size=10, recent=WINDOW, n_tokens=40))


def test_retain_replaces_the_kept_cells(model_path: Callable[[str], Path]) -> None:
    model, ids = ReferenceModel(model_path("llama-gqa4")), tokens(12)
    model.prefill(ids)
    model.retain([[[0, 11], [11, 3]]] * 2)
    assert lists(model.positions[0]) == [[0, 11], [3, 11]]
    with pytest.raises(ValueError, match="0..11"):
        model.retain([[[0], [12]]] * 2)


def test_prefill_forgets_the_previous_prompt(model_path: Callable[[str], Path]) -> None:
    model, ids = ReferenceModel(model_path("llama-gqa4")), tokens(12)
    first = model.prefill(ids)
    model.compress(np.full((2, 2), 5), kv_size=5, window=WINDOW)
    model.decode(9)
    np.testing.assert_array_equal(model.prefill(ids), first)


def test_kv_round_stores_float16_values(model_path: Callable[[str], Path]) -> None:
    exact, rounded = (ReferenceModel(model_path("llama-gqa4"), kv_round=dtype) for dtype in (None, np.float16))
    difference = np.abs(exact.prefill(tokens(20)) - rounded.prefill(tokens(20))).max()
    assert 0 < difference < 0.05
    rounded.decode(4)
    for x in (*rounded.k, *rounded.v):
        np.testing.assert_array_equal(x, x.astype(np.float16).astype(np.float64))


@pytest.mark.parametrize("ids", [[], [-1], [384], [[1, 2]]])
def test_tokens_outside_the_vocabulary_are_refused(ids: list[int], model_path: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="token"):
        ReferenceModel(model_path("llama-gqa4")).prefill(ids)


# random models


@pytest.mark.parametrize("name", SHAPES)
def test_random_model_has_attention_that_is_not_flat(name: str, model_path: Callable[[str], Path]) -> None:
    model = ReferenceModel(model_path(name))
    logits = model.prefill(tokens(60))
    group = model.n_head // model.n_head_kv
    attention = np.einsum("thd,shd->hts", model.q[1], np.repeat(model.k[1], group, axis=1)) * model.scale
    assert 1 < attention.std() < 2
    assert len(set(logits.argmax(axis=-1).tolist())) > 15
    assert logits[:, :3].max() < logits.max(axis=-1).min()  # unk, bos and eos are never the greedy choice


@pytest.mark.parametrize("ftype", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_random_model_of_any_type_is_read_and_reproduced_by_its_seed(ftype: str, tie_embeddings: bool, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.gguf" for i in range(3)]
    for path, seed in zip(paths, (1, 1, 2)):
        write_model(path, ftype=ftype, tie_embeddings=tie_embeddings, seed=seed, importance="random")
    first, same, other = (path.read_bytes() for path in paths)
    assert first == same != other
    model = ReferenceModel(paths[0])
    assert ("output.weight" in model.weights) == (not tie_embeddings)
    assert np.isfinite(model.prefill(tokens(9))).all()


def test_repeat_layers_writes_equal_layers_and_distinct_vocabulary_rows(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", repeat_layers=True, n_vocab=9000, ftype="q8_0", n_layer=3)
    weights = ReferenceModel(path).weights
    for name in ("attn_q", "ffn_down"):
        np.testing.assert_array_equal(weights[f"blk.0.{name}.weight"], weights[f"blk.2.{name}.weight"])
    assert len({row.tobytes() for row in weights["token_embd.weight"]}) == 9000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "gpt2"}, "arch = 'gpt2'"),
        ({"ftype": "q2_k"}, "ftype = 'q2_k'"),
        ({"n_layer": 0}, "n_layer = 0"),
        ({"n_head_kv": 3}, "n_head_kv = 3"),
        ({"n_vocab": 258}, "n_vocab = 258.*259"),
        ({"head_dim": 15}, "head_dim = 15"),
        ({"head_dim": None, "n_embd": 65}, "n_embd = 65"),
        ({"arch": "qwen2", "head_dim": 32}, "head_dim = 32"),
        ({"ftype": "q8_0", "n_ff": 40}, "n_ff = 40"),
        ({"scale": 0.0}, "scale = 0.0"),
        ({"importance": [[1.0] * 8]}, r"importance has shape \(1, 8\)"),
        ({"importance": "uniform"}, "importance = 'uniform'"),
    ],
)
def test_random_model_refuses_wrong_sizes(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_model(tmp_path / "m.gguf", **change)
    assert not list(tmp_path.iterdir())
