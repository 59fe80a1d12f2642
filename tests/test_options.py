"""Options that are misspelt, incomplete or without effect are errors that name the option, the nearest one and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPES, greedy, load, tokens

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


@pytest.mark.parametrize("policy", ["snapkv", "adakv", "razor", "lossless"])
def test_beta_without_a_policy_that_looks_at_it_is_an_error(policy: str, make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=f"policy='{policy}', beta=2: it does not look at beta"):
        load(make_model(SHAPES[1]), kv_size=None if policy == "lossless" else 64, policy=policy, beta=2)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "headkv"}, {"policy": "snapkv", "sinks": 4}, {"window": -5}, {"beta": 1.2}, {"importance": "scores.json"}, {"kv_reuse": False},
        {"protect": [(0, 4)]}, {"prefill": "layer"}, {"policy": "full", "pool": "avg"}, {"n_seq_max": 2}, {"n_tail": 64},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_of_the_compression_without_an_amount_is_an_error(options: dict[str, Any], make_model: MakeModel) -> None:
    name = next(name for name, value in options.items() if value != "full")
    with pytest.raises(ValueError, match=f"{name}=.*: nothing says how much is kept, give kv_size, kv_ratio or kv_bytes"):
        load(make_model(SHAPES[1]), **options)


@pytest.mark.parametrize("value", ["no", 1, "True"])
def test_kv_reuse_is_true_or_false(value: Any, make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=f"kv_reuse={value!r}: it must be True or False"):
        load(make_model(SHAPES[1]), kv_size=64, kv_reuse=value)


def test_a_misspelt_policy_names_the_nearest_one(make_model: MakeModel) -> None:
    for amount in ({}, {"kv_size": 64}):
        with pytest.raises(ValueError, match="policy='razr': it must be one of .*: did you mean 'razor'"):
            load(make_model(SHAPES[1]), policy="razr", **amount)


@pytest.mark.parametrize("amount", [{}, {"kv_size": 64}], ids=str)
def test_a_missing_model_is_named_as_llama_cpp_does(amount: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="^Model path does not exist: .*none.gguf$") as raised:
        load(tmp_path / "none.gguf", **amount)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("amount", [{}, {"kv_size": 64}], ids=str)
@pytest.mark.parametrize(
    ("ids", "message"), [([1, 5, 384], r"tokens\[2\]=384: it must be in \[0, 383\]"), ([-1], r"tokens\[0\]=-1"), ([1, 2.5], r"tokens\[1\]=2.5"),
                         ([1, "a"], r"tokens\[1\]='a'"), ([None], r"tokens\[0\]=None"), ([True], r"tokens\[0\]=True")], ids=str,
)  # fmt: skip
def test_a_wrong_token_is_named_with_its_place(ids: list[Any], message: str, amount: dict[str, int], make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), **amount)
    expected = greedy(llm, tokens(30), 4)
    for call in (
        llm.eval,
        llm.read_prompt if amount else llm.eval,
        lambda ids: next(llm.generate(ids)),
        lambda ids: llm.create_completion(ids),
    ):
        with pytest.raises(ValueError, match=message):
            call(ids)
    assert greedy(llm, tokens(30), 4) == expected


@pytest.mark.parametrize("amount", [{}, {"kv_size": 64}], ids=str)
def test_text_that_is_not_utf_8_is_named(amount: dict[str, int], make_model: MakeModel) -> None:
    llm, text = load(make_model(SHAPES[1]), **amount), "caf\udce9"
    with pytest.raises(ValueError, match="prompt: character 3 is '.udce9'.*encoding"):
        llm.create_completion(text)
    with pytest.raises(ValueError, match="prompt: character 3"):
        llm(text, stream=True)
    for content in (text, [{"type": "text", "text": text}]):
        with pytest.raises(ValueError, match="messages: character 3"):
            llm.create_chat_completion([{"role": "user", "content": content}])


def test_flash_attention_is_on_where_a_wrapper_passes_the_default_of_upstream(make_model: MakeModel) -> None:
    """There is no compression without it, and False says no more than that nobody asked for it."""
    path, prompt = make_model(SHAPES[1]), tokens(100)
    outcomes = [greedy(load(path, kv_size=32, **options), prompt, 6) for options in ({}, {"flash_attn": False}, {"flash_attn": True})]
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_the_full_cache_may_be_named_and_defaults_be_left_out(make_model: MakeModel) -> None:
    assert load(make_model(SHAPES[1]), policy="full").kv_options is None
    plain, spelt = load(make_model(SHAPES[1]), kv_ratio=0.5), load(make_model(SHAPES[1]), kv_ratio=0.5, window=8, pool="max", protect=[])
    assert plain.kv_options == spelt.kv_options


# the same defaults and limits in Python and in the library


def scalars(params: Any) -> dict[str, Any]:
    """Values of the C struct that are no pointers."""
    return {
        name: getattr(params, name)
        for name, kind in params._fields_
        if not name.endswith(("importance", "protect", "replay", "shares")) and name != "size"
    }


def test_defaults_are_those_of_the_library() -> None:
    from pyheadkv import _lib
    from pyheadkv.options import Options

    theirs = _lib.lib.headkv_default_params()
    ours = Options(kv_size=theirs.kv_size).to_params(None, None)
    assert scalars(ours) == scalars(theirs) and len(scalars(ours)) > 15


WHOLE = sorted({*range(-3, 41), *(sign + (1 << k) for k in range(3, 31) for sign in (-1, 0, 1))})
NAMED = {"pool": "POOLS", "attend": "ATTENDS", "prefill": "PREFILLS", "surplus": "SURPLUSES"}


@pytest.mark.parametrize(
    "name", ["kv_size", "window", "recent", "power", "pool_kernel", "n_tail", "n_buckets", "sinks", "adakv_floor", "beta", *NAMED]
)
def test_limits_are_those_of_the_library(name: str) -> None:
    """Both take the same values: Python has the better messages, the library is what servers and C callers ask."""
    import ctypes

    from pyheadkv import _lib, options

    def library_takes(value: Any) -> bool:
        params = options.Options(kv_size=options.MAX_CELLS, policy="snapkv").to_params(None, None)
        setattr(params, name, value)
        is_taken = bool(_lib.lib.headkv_set_params(ctypes.byref(params)) == 0)
        _lib.lib.headkv_set_params(None)
        return is_taken

    def python_takes(value: Any) -> bool:
        try:
            options.Options(**{"kv_size": options.MAX_CELLS, "policy": "snapkv", name: value})
        except ValueError as error:
            assert name in str(error)
            return False
        return True

    if name in NAMED:
        numbers = getattr(options, NAMED[name])
        assert [n for n in range(-2, 9) if library_takes(n)] == sorted(numbers.values())
        assert all(python_takes(text) for text in numbers)
        return
    values = [-2.0, -0.5, 0.0, 0.5, 1.0, 1.0000001, 2.0, 1e30, float("inf"), float("nan")] if name in ("adakv_floor", "beta") else WHOLE
    unset = {"sinks": -1, "adakv_floor": -1.0, "beta": 0.0}.get(name)  # of the C struct: nothing was said
    taken = {value: library_takes(value) for value in values if value != unset}
    assert {value: python_takes(value) for value in taken} == taken and set(taken.values()) == {True, False}
