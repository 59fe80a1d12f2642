"""A model between prompts: copies of it, states, adapters, and what of the last prompt is used again."""

from __future__ import annotations

import ctypes
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from conftest import SHAPES, decode, greedy, load, logits, nmse, tokens

from pyheadkv.testing import write_random_lora

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
SHAPE = SHAPES[1]


def test_a_copy_is_made_and_configured_as_its_original(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=40, kv_generated=24, kv_generated_slack=16)
    llm.configure(kv_generated=None)
    other = pickle.loads(pickle.dumps(llm))
    llm.read_prompt(tokens(300))
    other.load_state(llm.save_state())
    assert other.kv_options == llm.kv_options and decode(other, 0, 300, 9).tobytes() == decode(llm, 0, 300, 9).tobytes()


def test_an_amount_beside_a_policy_that_keeps_all_is_an_error(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), policy="lossless")
    with pytest.raises(ValueError, match="policy='lossless', kv_size=60: it keeps all cells, leave kv_size out"):
        llm.configure(kv_size=60)
    llm = load(make_model(SHAPE), kv_size=60)
    llm.configure(policy="lossless")
    assert pickle.loads(pickle.dumps(llm)).policy == llm.policy == "lossless"


def test_a_beta_that_nothing_looks_at_is_an_error(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=60, policy="snapkv")
    for options in ({"beta": 2.0}, {"policy": "uniform/value", "beta": 2.0}):
        with pytest.raises(ValueError, match="beta=2.0: it does not look at beta"):
            llm.configure(**options)
    llm.configure(policy="auto", beta=2.0)
    assert llm.kv_options.beta == 2.0


def test_a_prompt_that_does_not_fit_leaves_what_is_there(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), n_ctx=256, kv_size=40, kv_generated=48, kv_generated_slack=16, kv_reuse=True, policy="snapkv")
    assert len(greedy(llm, tokens(150), 200)) == 200
    chat, n = llm.input_ids[: llm.n_tokens].tolist(), llm.n_tokens
    with pytest.raises(ValueError, match=rf"0 \+ {n + 1} tokens do not fit into n_ctx=256"):
        next(llm.generate([7, *chat]))
    assert llm.n_tokens == n and llm.kv_stats().state == "compressed"
    next(llm.generate([*chat, 5], temp=0.0))
    assert llm.kv_stats().n_prompt == 150 and llm.n_tokens == n + 1


def test_copies_need_sequences(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=60)
    with pytest.raises(ValueError, match=r"seq_id=1: the context has one sequence, give Llama\(\.\.\., n_seq_max=2\) or more"):
        llm.compress_as(1)


def test_recent_cells_of_a_share_can_be_configured_before_a_prompt(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_ratio=0.1, policy="snapkv")
    llm.configure(recent=30)
    for n, cells in ((200, 31), (700, 70)):
        llm.read_prompt(tokens(n))
        assert set(llm.kv_stats().n_cells.ravel().tolist()) == {cells}


def test_logits_of_a_prompt_come_back_with_its_state(make_model: MakeModel) -> None:
    path, text = make_model(SHAPE), "mother was in the water and could not see " * 9
    options = {"kv_size": 40, "policy": "snapkv", "kv_reuse": True, "logits_all": True}

    def logprobs(llm: Any) -> list[float]:
        answer = llm.create_completion(text + "what is it", max_tokens=2, temperature=0, echo=True, logprobs=1)
        return [p for p in answer["choices"][0]["logprobs"]["token_logprobs"] if p is not None]

    llm, other = load(path, **options), load(path, **options)
    llm.create_completion(text, max_tokens=1, temperature=0)
    state = llm.save_state()
    expected = logprobs(llm)
    other.create_completion("hello there", max_tokens=1)
    other.load_state(state)
    assert logprobs(other) == pytest.approx(expected, abs=1e-3)
    without = load(path, **{**options, "logits_all": False})
    without.create_completion(text, max_tokens=1, temperature=0)
    with pytest.raises(ValueError, match="it has no logits of its tokens, save it with logits_all=True"):
        other.load_state(without.save_state())


def test_a_state_in_a_cache_that_cannot_be_restored_is_a_miss(make_model: MakeModel) -> None:
    from llama_cpp.llama_cache import LlamaRAMCache

    path, prompt, other = make_model(SHAPE), tokens(200), tokens(180, seed=3)
    llm, fresh = load(path, kv_size=80, policy="snapkv", kv_reuse=True), load(path, kv_size=40, policy="snapkv")
    llm.set_cache(LlamaRAMCache())
    llm.create_completion(prompt, max_tokens=2, temperature=0)
    llm.configure(kv_size=40)
    llm.create_completion(other, max_tokens=2, temperature=0)
    said, expected = (m.create_completion([*prompt, 5], max_tokens=6, temperature=0)["choices"][0]["text"] for m in (llm, fresh))
    assert said == expected and llm.kv_stats().n_prompt == 201


def test_a_state_takes_the_place_of_its_sequence_alone(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=40, n_seq_max=2, prefill="token")
    llm.eval(tokens(200))
    llm.compress_as(1)
    llm.end_prompt()
    llm.load_state(llm.save_state())
    assert llm.kv_stats(1).n_past == llm.kv_stats(0).n_past == 200
    assert decode(llm, 1, 200, 9).tobytes() == decode(llm, 0, 200, 9).tobytes()


def test_a_prompt_is_not_answered_from_logits_of_another_sequence(make_model: MakeModel) -> None:
    llm, prompt = load(make_model(SHAPE), kv_size=40, n_seq_max=2, prefill="token"), tokens(200)
    expected = greedy(load(make_model(SHAPE), kv_size=40), prompt, 4)
    llm.eval(prompt)
    llm.compress_as(1)
    llm.end_prompt()
    decode(llm, 1, 200, 9)
    assert greedy(llm, prompt, 4) == expected


@pytest.mark.parametrize("options", [{}, {"kv_reuse": True}, {"kv_archive": True}, {"prefill": "token"}], ids=str)
def test_a_prompt_is_not_answered_from_logits_of_other_adapters(options: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    path, lora, prompt = make_model(SHAPE), tmp_path / "l.gguf", tokens(300)
    write_random_lora(lora, path, seed=5)
    fresh = load(path, kv_size=40, lora_path=str(lora))
    greedy(fresh, prompt, 1)
    llm = load(path, kv_size=40, **options)
    greedy(llm, prompt, 1)
    assert nmse(logits(llm), logits(fresh)) > 1e-4
    adapter = llama_cpp.llama_adapter_lora_init(llm.model, str(lora).encode())
    llama_cpp.llama_set_adapters_lora(llm.ctx, (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(1.0))
    greedy(llm, prompt, 1)
    assert nmse(logits(llm), logits(fresh)) < 1e-9


@pytest.mark.parametrize("kv_size", [None, 40])
def test_a_model_with_an_adapter_goes_when_nobody_has_it(kv_size: int | None, make_model: MakeModel, tmp_path: Path) -> None:
    """In an order that the garbage collector chose, its adapter was freed after its model."""
    write_random_lora(tmp_path / "l.gguf", make_model(SHAPE), seed=5)
    llm = load(make_model(SHAPE), kv_size=kv_size, lora_path=str(tmp_path / "l.gguf"))
    gone = weakref.ref(llm)
    assert pickle.loads(pickle.dumps(llm)).lora_path == str(tmp_path / "l.gguf")
    del llm
    assert gone() is None


@pytest.mark.parametrize("kv_size", [None, 40])
def test_tokens_may_come_from_an_iterator(kv_size: int | None, make_model: MakeModel) -> None:
    llm, prompt = load(make_model(SHAPE), kv_size=kv_size), tokens(60)
    assert next(llm.generate(iter(prompt), temp=0.0)) == greedy(llm, prompt, 1)[0]
