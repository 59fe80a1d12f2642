"""Attention of the last tokens, reduced by the engine, against NumPy on the engine's own queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import SHAPES, Shape, load, tokens
from test_engine import head_cells, window

from pyheadkv.testing import reference

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]


def probabilities(llm: Any, shape: Shape, n_queries: int) -> npt.NDArray[np.float64]:
    """(n_queries, n_layer, n_head, n_tokens) of the last tokens; 0 for tokens behind them."""
    keys = [[head_cells(llm, il, ih).astype(np.float64) for ih in range(shape.n_head_kv)] for il in range(shape.n_layer)]
    queries = [window(llm, il, shape.n_head, shape.head_dim) for il in range(shape.n_layer)]
    p = np.zeros((n_queries, shape.n_layer, shape.n_head, len(keys[0][0])))
    for i, il, h in np.ndindex(p.shape[:3]):
        n_visible = p.shape[3] - (n_queries - 1 - i)
        k = keys[il][h * shape.n_head_kv // shape.n_head][:n_visible]
        p[i, il, h, :n_visible] = reference.softmax(k @ queries[il][i - n_queries, h] * shape.head_dim**-0.5)
    return p


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("n_queries", "spans", "n_top"),
    [
        (1, [(3, 9)], 6),
        (1, [(0, 1), (40, 90), (80, 100)], 25),
        (1, [(119, 120)], 1),
        (1, [(0, 120)], 120),
        (1, [], 5),
        (8, [(3, 9)], 6),
        (5, [(0, 1), (40, 90), (80, 120)], 25),
        (8, [(0, 120)], 113),
    ],
    ids=str,
)
def test_mass_and_top_equal_numpy(n_queries: int, shape: Shape, spans: list[tuple[int, int]], n_top: int, make_model: MakeModel) -> None:
    llm = load(make_model(shape), kv_size=64, prefill="token")
    llm.eval(tokens(119))
    llm.eval([17])
    p = probabilities(llm, shape, n_queries)
    inside = np.zeros(120, dtype=bool)
    for start, end in spans:
        inside[start:end] = True
    best = np.argsort(-p, axis=-1, kind="stable")[..., :n_top]
    expected = np.where(inside[best], np.take_along_axis(p, best, -1), 0).sum(-1)
    mass, top = llm.read_attention(spans, n_top, n_queries=n_queries)
    np.testing.assert_allclose(mass, expected, rtol=2e-3, atol=1e-6)
    near = np.take_along_axis(p, top[..., None].astype(np.int64), -1)[..., 0]
    np.testing.assert_allclose(near, p.max(-1), rtol=2e-3)
    if spans == [(0, 120)]:
        np.testing.assert_allclose(mass[0], 1, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize(("n_queries", "n_positions"), [(1, 200), (8, 1), (100, 60), (130, 71)])
def test_the_most_that_is_attended_equals_numpy(n_queries: int, n_positions: int, shape: Shape, make_model: MakeModel) -> None:
    llm = load(make_model(shape), kv_size=64, window=130, prefill="token")
    llm.eval(tokens(70))
    llm.eval(tokens(130, seed=1))
    p = probabilities(llm, shape, n_queries)[..., :n_positions]
    expected = p.reshape(n_queries, shape.n_layer, shape.n_head_kv, -1, n_positions).max((0, 3))
    found = llm.read_attention_max(n_positions, n_queries=n_queries)
    assert found.shape == (shape.n_layer, shape.n_head_kv, n_positions) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-7)


def test_reading_attention_changes_nothing(make_model: MakeModel) -> None:
    results = []
    for read in (False, True):
        llm = load(make_model(SHAPES[1]), kv_size=48, prefill="token")
        llm.eval(tokens(200))
        if read:
            llm.read_attention([(0, 5)], 5)
            llm.read_attention_max(200, n_queries=8)
        llm.end_prompt()
        results.append([llm.kv_positions(il, ih).tolist() for il in range(3) for ih in range(2)])
    assert results[0] == results[1]


def test_what_cannot_be_read_is_an_error(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=48, prefill="token")
    with pytest.raises(ValueError, match="not staged"):
        llm.read_attention([(0, 1)], 1)
    with pytest.raises(ValueError, match="not staged"):
        llm.read_attention_max(1)
    llm.eval(tokens(100))
    for spans, n_top, message in [
        ([(0, 101)], 1, r"span \[0, 101\) of 100"),
        ([(5, 5)], 1, "must not be empty"),
        ([(-1, 3)], 1, "span"),
        ([(0, 1)], 0, r"in \[1, 100\]"),
        ([(0, 1)], 101, r"in \[1, 100\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            llm.read_attention(spans, n_top)
    for n_queries, n_top, message in [(0, 1, r"in \[1, 8\]"), (9, 1, r"in \[1, 8\]"), (8, 94, r"in \[1, 93\]")]:
        with pytest.raises(ValueError, match=message):
            llm.read_attention([(0, 1)], n_top, n_queries=n_queries)
    for n_positions, n_queries, message in [
        (0, 1, r"first 0 positions: it must be in \[1, n_ctx = 2048\]"),
        (101, 1, r"first 101 positions: it must be in \[1, 100\]"),
        (9, 0, r"last 0 tokens: it must be in \[1, 8\]"),
        (9, 9, r"last 9 tokens: it must be in \[1, 8\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            llm.read_attention_max(n_positions, n_queries=n_queries)
    llm.end_prompt()
    with pytest.raises(ValueError, match="not staged"):
        llm.read_attention([(0, 1)], 1)
    with pytest.raises(ValueError, match="not staged"):
        llm.read_attention_max(1)
