"""Options that are misspelt, incomplete or without effect are errors that name the option, the nearest one and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import SHAPES, load

MakeModel = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_sise": 64}, "no option 'kv_sise': did you mean 'kv_size'"),
        ({"kv_size": 64, "polcy": "snapkv"}, "did you mean 'policy'"),
        ({"kv_size": 64, "n_gpu_layer": 1}, "did you mean 'n_gpu_layers'"),
        ({"zzz": 1}, "its options are model_path, kv_size, "),
    ],
    ids=str,
)
def test_an_unknown_option_names_the_nearest_one(options: dict[str, Any], message: str, make_model: MakeModel) -> None:
    with pytest.raises(TypeError, match=message):
        load(make_model(SHAPES[1]), **options)


def test_an_unknown_option_of_configure_names_the_nearest_one(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=64)
    before = llm.kv_options
    with pytest.raises(TypeError, match="configure.* no option 'kvsize': did you mean 'kv_size'"):
        llm.configure(kvsize=32)
    assert llm.kv_options == before


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "headkv"}, {"policy": "snapkv", "sinks": 4}, {"window": -5}, {"beta": 1.2}, {"importance": "scores.json"}, {"kv_reuse": False},
        {"protect": [(0, 4)]}, {"prefill": "layer"}, {"policy": "full", "pool": "avg"}, {"keep_prompt": True}, {"n_tail": 64},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_of_the_compression_without_an_amount_is_an_error(options: dict[str, Any], make_model: MakeModel) -> None:
    name = next(name for name, value in options.items() if value != "full")
    with pytest.raises(ValueError, match=f"{name}=.*: nothing says how much is kept, give kv_size, kv_ratio or kv_bytes"):
        load(make_model(SHAPES[1]), **options)


def test_a_misspelt_policy_names_the_nearest_one(make_model: MakeModel) -> None:
    for amount in ({}, {"kv_size": 64}):
        with pytest.raises(ValueError, match="policy='razr': it must be one of .*: did you mean 'razor'"):
            load(make_model(SHAPES[1]), policy="razr", **amount)


def test_the_full_cache_may_be_named_and_defaults_be_left_out(make_model: MakeModel) -> None:
    assert load(make_model(SHAPES[1]), policy="full").kv_options is None
    plain, spelt = load(make_model(SHAPES[1]), kv_ratio=0.5), load(make_model(SHAPES[1]), kv_ratio=0.5, window=8, pool="max", protect=[])
    assert plain.kv_options == spelt.kv_options
