"""Policy "lossless": nothing is evicted, and the answers are those of the full cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES, Shape, greedy, load, logits, tokens

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize(
    "options",
    [{"policy": "lossless"}, {"policy": "lossless", "prefill": "token"}, {"kv_ratio": 1.0}, {"kv_ratio": 1.0, "policy": "snapkv"}],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 9, 400])
def test_every_head_keeps_every_cell(n: int, options: dict[str, Any], shape: Shape, make_model: MakeModel) -> None:
    llm = load(make_model(shape), **options)
    llm.read_prompt(tokens(n, seed=3))
    assert llm.kv_stats().state == "compressed"
    for il in range(shape.n_layer):
        for ih in range(shape.n_head_kv):
            assert llm.kv_positions(il, ih).tolist() == list(range(n))
    for token in (5, 6):
        llm.eval([token])
    assert (llm.kv_stats().n_cells == n + 2).all()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_answers_are_those_of_the_full_cache(shape: Shape, make_model: MakeModel) -> None:
    path, prompt = make_model(shape), tokens(500, seed=4)
    full, lossless = load(path, flash_attn=True), load(path, policy="lossless")
    assert lossless.policy == "lossless" and lossless.importance_origin == ""
    full.eval(prompt)
    lossless.read_prompt(prompt)
    for token in [None, *greedy(load(path, flash_attn=True), prompt, 30)]:
        for llm in (full, lossless):
            if token is not None:
                llm.eval([token])
        a, b = logits(full).astype(np.float64), logits(lossless)
        assert ((a - b) ** 2).sum() < 1e-4 * (a**2).sum()


def test_a_lossless_prompt_can_be_truncated_anywhere(make_model: MakeModel) -> None:
    path, prompt = make_model(SHAPES[1]), tokens(300, seed=5)
    llm = load(path, policy="lossless", kv_reuse=True)
    first = llm(prompt, max_tokens=3, temperature=0)["choices"][0]["text"]
    assert llm(prompt[:100] + [7, 8, 9], max_tokens=3, temperature=0)["usage"]["prompt_tokens"] == 103
    assert llm.kv_stats().n_past >= 103
    assert llm(prompt, max_tokens=3, temperature=0)["choices"][0]["text"] == first


def test_an_amount_beside_lossless_is_an_error(make_model: MakeModel) -> None:
    for amount in ({"kv_size": 64}, {"kv_ratio": 0.5}, {"kv_bytes": "1MiB"}):
        with pytest.raises(ValueError, match="policy='lossless', .*it keeps all cells, leave the amount out"):
            load(make_model(SHAPES[1]), policy="lossless", **amount)


def test_the_budget_is_the_context(make_model: MakeModel) -> None:
    assert (load(make_model(SHAPES[1]), policy="lossless", n_ctx=512).kv_budget == 512).all()


def test_the_plan_says_what_a_prompt_can_have(make_model: MakeModel) -> None:
    from pyheadkv.cli import inspect
    from pyheadkv.options import Options

    for options in ({"policy": "lossless"}, {"budget": "all"}):
        plan = inspect.make_plan(make_model(SHAPES[1]), options=Options(kv_size=64, **options), n_ctx=512)
        assert plan.policy == "lossless" and (plan.budget == 512).all()
