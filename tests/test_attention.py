"""Attention of the last token, reduced by the engine, against NumPy on the engine's own queries and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import numpy.typing as npt
import pytest
from conftest import SHAPES, Shape, load, tokens
from test_engine import head_cells, window

from pyheadkv import reference

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]


def probabilities(llm: Any, shape: Shape) -> npt.NDArray[np.float64]:
    """(n_layer, n_head, n_tokens) of the last token."""
    rows = []
    for il in range(shape.n_layer):
        q = window(llm, il, shape.n_head, shape.head_dim)[-1]
        for h in range(shape.n_head):
            k = head_cells(llm, il, h * shape.n_head_kv // shape.n_head)
            rows.append(reference.softmax(k.astype(np.float64) @ q[h] * shape.head_dim**-0.5))
    return np.stack(rows).reshape(shape.n_layer, shape.n_head, -1)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize(("spans", "n_top"), [([(3, 9)], 6), ([(0, 1), (40, 90), (80, 100)], 25), ([(119, 120)], 1), ([(0, 120)], 120), ([], 5)],
                         ids=str)
def test_mass_and_top_equal_numpy(shape: Shape, spans: list[tuple[int, int]], n_top: int, make_model: MakeModel) -> None:
    llm = load(make_model(shape), kv_size=64, prefill="token")
    llm.eval(tokens(119))
    llm.eval([17])
    p = probabilities(llm, shape)
    inside = np.zeros(120, dtype=bool)
    for start, end in spans:
        inside[start:end] = True
    best = np.argsort(-p, axis=-1, kind="stable")[..., :n_top]
    expected = np.where(inside[best], np.take_along_axis(p, best, -1), 0).sum(-1)
    mass, top = llm.read_attention(spans, n_top)
    np.testing.assert_allclose(mass, expected, rtol=2e-3, atol=1e-6)
    near = np.take_along_axis(p, top[..., None].astype(np.int64), -1)[..., 0]
    np.testing.assert_allclose(near, p.max(-1), rtol=2e-3)
    if n_top == 120:
        np.testing.assert_allclose(mass, 1, rtol=1e-5)


def test_reading_attention_changes_nothing(make_model: MakeModel) -> None:
    results = []
    for read in (False, True):
        llm = load(make_model(SHAPES[1]), kv_size=48, prefill="token")
        llm.eval(tokens(200))
        if read:
            llm.read_attention([(0, 5)], 5)
        llm.end_prompt()
        results.append([llm.kv_positions(il, ih).tolist() for il in range(3) for ih in range(2)])
    assert results[0] == results[1]


def test_what_cannot_be_read_is_an_error(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=48, prefill="token")
    with pytest.raises(ValueError, match="not staged"):
        llm.read_attention([(0, 1)], 1)
    llm.eval(tokens(100))
    for spans, n_top, message in [([(0, 101)], 1, r"span \[0, 101\) of 100"), ([(5, 5)], 1, "must not be empty"), ([(-1, 3)], 1, "span"),
                                  ([(0, 1)], 0, r"in \[1, 100\]"), ([(0, 1)], 101, r"in \[1, 100\]")]:
        with pytest.raises(ValueError, match=message):
            llm.read_attention(spans, n_top)
    llm.end_prompt()
    with pytest.raises(ValueError, match="not staged"):
        llm.read_attention([(0, 1)], 1)
