"""Rank "outlying": tokens whose values are far from those of the others, against the oracle and against itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HYBRID, SHAPES, WINDOWED, Shape, load, tokens
from test_policy_oracle import SIZES, check_kept, random_table
from test_sequences import sequences

from pyheadkv.testing import reference
from pyheadkv.testing.oracle import head_rows, heads, kept_by, kept_of, layers_of

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
POLICY = "uniform/outlying"
RANKS = pytest.mark.parametrize("rank", ["outlying", "outlying+value", "attention+outlying"])


@RANKS
@ALL_SHAPES
@SIZES
def test_kept_cells_equal_the_oracle(shape: Shape, n_prompt: int, kv_size: int, rank: str, make_model: MakeModel) -> None:
    check_kept(shape, make_model, n_prompt, kv_size=kv_size, policy="importance/attention", rank=rank)


@ALL_SHAPES
@pytest.mark.parametrize("budget", ["importance", "uniform"])
def test_half_of_a_large_budget_goes_by_attention_and_all_of_a_small_one(shape: Shape, budget: str, make_model: MakeModel) -> None:
    check_kept(shape, make_model, 1400, kv_size=300, policy=f"{budget}/attention+outlying")
    check_kept(shape, make_model, 1400, kv_size=150, policy=f"{budget}/attention+outlying")
    kept = []
    for rank in ("attention", "attention+outlying"):
        llm = load(make_model(shape), kv_size=128, policy=f"{budget}/{rank}")
        llm.read_prompt(tokens(1400))
        kept.append([rows.tolist() for of_layer in kept_by(llm, shape) for rows in of_layer])
    assert kept[0] == kept[1]


@RANKS
@pytest.mark.parametrize("budget", ["replay", "adaptive", "whole", "mix", "uniform"])
def test_every_budget_goes_with_it(budget: str, rank: str, make_model: MakeModel) -> None:
    check_kept(SHAPES[1], make_model, 300, kv_size=40, policy=f"{budget}/{rank}", replay=random_table(SHAPES[1]))
    check_kept(SHAPES[1], make_model, 300, kv_size=40, policy=f"{budget}/{rank}/mean", replay=random_table(SHAPES[1]))


@pytest.mark.parametrize("type_v", [8, 2], ids=["q8_0", "q4_0"])
def test_quantised_values(type_v: int, make_model: MakeModel) -> None:
    """They are rotated, which changes no distance."""
    shape = Shape("lengths", "llama", 8, 2, n_layer=2, head_dim=64)
    check_kept(shape, make_model, 301, kv_size=40, policy=POLICY, type_k=1, type_v=type_v)


def test_sinks_and_spans(make_model: MakeModel) -> None:
    check_kept(SHAPES[1], make_model, 300, kv_size=40, policy="importance/outlying+value", protect=[(100, 120)])
    check_kept(SHAPES[1], make_model, 1300, kv_size=300, policy="importance/attention+outlying", sinks=4, protect=[(100, 300)])
    check_kept(SHAPES[1], make_model, 300, kv_size=40, policy=POLICY, sinks=0)
    check_kept(SHAPES[1], make_model, 300, kv_size=40, policy=POLICY, sinks=2, protect=[(100, 120)], recent=3)


@pytest.mark.parametrize("shape", [WINDOWED, HYBRID], ids=lambda s: s.name)
def test_layers_that_are_not_compressed_say_nothing(shape: Shape, make_model: MakeModel) -> None:
    shape_of_ours = type("Ours", (), {**vars(shape), "layers": [1, 3]})
    llm = load(make_model(shape), kv_size=40, policy=POLICY, prefill="token")
    llm.eval(tokens(300))
    assert layers_of(shape_of_ours) == [1, 3]
    expected = kept_of(llm, shape_of_ours)
    llm.end_prompt()
    assert all((a == b).all() for mine, theirs in zip(kept_by(llm, shape_of_ours), expected) for a, b in zip(mine, theirs))


@ALL_SHAPES
def test_heads_of_a_layer_keep_the_same_and_layers_add_up(shape: Shape, make_model: MakeModel) -> None:
    llm = load(make_model(shape), kv_size=60, policy=POLICY, prefill="token")
    llm.eval(tokens(400))
    values = [head_rows(llm, shape, il, v=True) for il in range(shape.n_layer)]
    alone = [reference.outlying_scores([v], n_prefix=392) for v in values]
    llm.end_prompt()
    for il, kept in enumerate(kept_by(llm, shape)):
        assert all((rows == kept[0]).all() for rows in kept)
        sure = np.arange(392) < 4
        by_itself = reference.keep(np.where(sure, np.inf, alone[il])[None], [60], kv_size=60, recent=8, n_tokens=400)[0]
        assert (il > 0) == bool(len(np.setdiff1d(kept[0], by_itself)))  # from the second layer on it is not the layer alone


def test_what_is_far_from_the_mean_is_kept_with_its_neighbours(make_model: MakeModel) -> None:
    """In the first layer a value depends on its token alone: one other token among equal ones."""
    prompt = [7] * 200
    prompt[90] = 9
    llm = load(make_model(SHAPES[1]), kv_size=25, policy=POLICY)
    llm.read_prompt(prompt)
    kept = llm.kv_positions(0, 0).tolist()
    assert kept[:4] == [0, 1, 2, 3] and kept[4:17] == list(range(84, 97)) and kept[17:] == list(range(192, 200))


@ALL_SHAPES
def test_outcome_does_not_depend_on_threads_order_and_ubatches(shape: Shape, make_model: MakeModel) -> None:
    path, prompt, outcomes = make_model(shape), tokens(1500), []
    for prefill, n_threads, n_ubatch in (("token", 1, 512), ("layer", 1, 512), ("layer", 3, 512), ("layer", 1, 64)):
        llm = load(path, kv_size=80, policy=POLICY, prefill=prefill, n_threads=n_threads, n_threads_batch=n_threads, n_ubatch=n_ubatch)
        llm.read_prompt(prompt)
        outcomes.append([rows.tolist() for of_layer in kept_by(llm, shape) for rows in of_layer])
    assert all(other == outcomes[0] for other in outcomes[1:3])
    n_same = [len(set(a) & set(b)) for a, b in zip(outcomes[0], outcomes[3])]  # rounded otherwise, where two spans are as good
    assert np.mean(n_same) > 78


def test_copies_and_sequences(make_model: MakeModel) -> None:
    """What one prompt notes of its tokens is nothing to another, and a prompt is compressed twice alike."""
    shape, prompts = SHAPES[1], [tokens(700 + 300 * s, seed=s) for s in range(2)]
    path, expected = make_model(shape), []
    for prompt in prompts:
        with sequences(path, n_seq_max=1, rank="outlying") as one:
            for _ in range(2):
                one.read(0, prompt)
                expected.append([one.positions(0, *head) for head in heads(shape)])
                one.remove(0)
    assert expected[0] == expected[1] and expected[2] == expected[3]
    with sequences(path, n_seq_max=3, rank="outlying") as many:
        for s in (1, 0):
            many.read(s, prompts[s])
        assert [[many.positions(s, *head) for head in heads(shape)] for s in range(2)] == expected[::2]


def test_with_an_archive(make_model: MakeModel, tmp_path: Path) -> None:
    outcomes: list[Any] = []
    llm = load(make_model(SHAPES[1]), kv_size=48, policy=POLICY, kv_archive=str(tmp_path))
    for n_archived in (0, 1408):
        llm.read_prompt(tokens(1500))
        assert llm.kv_stats().n_archived == n_archived
        outcomes.append([rows.tolist() for of_layer in kept_by(llm, SHAPES[1]) for rows in of_layer])
    assert outcomes[0] == outcomes[1]
