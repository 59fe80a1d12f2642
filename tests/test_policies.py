"""Policies, and changing them without reading the prompt again."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES, Shape, decode, load, logits, tokens

from pyheadkv import embedded_model
from pyheadkv.eval import needle
from pyheadkv.units import ggml_type, row_bytes

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
SHAPE = SHAPES[1]
embedded = pytest.mark.skipif(not embedded_model().is_file(), reason="the embedded model is not there yet")


def kept(llm: Any, shape: Shape = SHAPE, seq_id: int = 0) -> list[list[int]]:
    """Kept positions of every head, layer by layer."""
    return [llm.kv_positions(il, ih, seq_id).tolist() for il in range(shape.n_layer) for ih in range(shape.n_head_kv)]


def outcome(llm: Any, seq_id: int = 0) -> tuple[list[list[int]], list[bytes]]:
    """Kept positions, and logits of three tokens after the prompt."""
    positions, n_past = kept(llm, seq_id=seq_id), llm.kv_stats(seq_id).n_past
    return positions, [decode(llm, seq_id, n_past + i, token).tobytes() for i, token in enumerate((9, 10, 11))]


@pytest.mark.parametrize("prefill", ["token", "layer"])
@pytest.mark.parametrize(("n_prompt", "kv_size"), [(300, 32), (300, 9), (40, 39), (20, 32), (3, 9)])
def test_streaming_keeps_the_first_four_cells_and_the_last_ones(n_prompt: int, kv_size: int, prefill: str, make_model: MakeModel) -> None:
    """Of a budget that is smaller than 4 sinks and the window, the window comes first."""
    llm = load(make_model(SHAPE, importance=None), kv_size=kv_size, policy="streaming", prefill=prefill)
    llm.read_prompt(tokens(n_prompt))
    n_kept = min(n_prompt, kv_size)
    n_sinks = min(4, n_kept - min(8, n_kept)) if n_kept < n_prompt else 0
    expected = [*range(n_sinks), *range(n_prompt - n_kept + n_sinks, n_prompt)]
    assert kept(llm) == [expected] * (SHAPE.n_layer * SHAPE.n_head_kv)


def test_streaming_needs_no_window_queries(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=32, policy="streaming")
    llm.eval(tokens(200))
    llm._ctx.kv_cache_seq_rm(0, 198, -1)  # the queries of the last tokens are gone
    llm.n_tokens = 198
    llm.end_prompt()
    assert kept(llm)[0] == [*range(4), *range(170, 198)]


@pytest.mark.parametrize(
    "options",
    [
        {"kv_size": 24},
        {"kv_size": 96, "policy": "snapkv"},
        {"policy": "streaming"},
        {"beta": 3.0},
        {"pool": "avg", "pool_kernel": 5},
        {"policy": "pyramidkv"},
        {"policy": "pyramidkv", "kv_size": 250, "pyramid_exact": False},
        {"policy": "adakv"},
        {"policy": "headkv+adakv"},
        {"policy": "criticalkv"},
        {"sinks": 9},
        {"protect": [(3, 90)]},
        {"kv_size": 300, "surplus": "redistribute"},
    ],
    ids=str,
)
def test_a_copy_compressed_otherwise_equals_a_fresh_one(options: dict[str, Any], make_model: MakeModel) -> None:
    path, prompt, first = make_model(SHAPE), tokens(400), {"kv_size": 48, "n_ubatch": 64}
    fresh = load(path, **{**first, **options})
    fresh.read_prompt(prompt)
    expected = outcome(fresh)
    llm = load(path, n_seq_max=3, prefill="token", **first)
    llm.eval([*prompt[:320], *tokens(90, seed=5)])  # another end, which is taken back
    llm.compress_as(1)
    other = outcome(llm, 1)
    assert llm._ctx.kv_cache_seq_rm(0, 320, -1)
    llm.n_tokens = 320
    llm.configure(**options)
    llm.eval(prompt[320:])  # in the ubatches of the fresh one
    llm.compress_as(2)
    assert (llm.kv_stats(0).state, llm.kv_stats(1).state, llm.kv_stats(2).state) == ("staged", "compressed", "compressed")
    assert llm.kv_stats().bytes_staging > 0
    assert outcome(llm, 2) == expected
    assert llm._ctx.kv_cache_seq_rm(1, 410, -1) and outcome(llm, 1) == other  # beside the others
    assert llm._ctx.kv_cache_seq_rm(2, -1, -1)
    llm.compress_as(2)  # a second time
    assert outcome(llm, 2) == expected
    llm.end_prompt()
    assert llm.kv_stats().bytes_staging == 0
    assert outcome(llm) == expected


def test_configure_keeps_the_importance_that_was_given(make_model: MakeModel) -> None:
    """The model's metadata holds other scores; they do not come back unasked."""
    given = np.random.default_rng(7).random((SHAPE.n_layer, SHAPE.n_head)) ** 4
    llm = load(make_model(SHAPE), kv_size=48, importance=given)
    fresh = load(make_model(SHAPE), kv_size=24, importance=given)
    llm.configure(kv_size=24)
    assert np.array_equal(llm.kv_budget, fresh.kv_budget)
    assert not np.array_equal(llm.kv_budget, load(make_model(SHAPE), kv_size=24).kv_budget)


@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_a_copy_is_that_of_its_prompt_whatever_the_prompt_became(policy: str, make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=48, prefill="token", policy=policy, n_seq_max=3)
    llm.eval(tokens(300))
    for seq_id in (1, 2):
        llm.compress_as(seq_id)
    first = outcome(llm, 1)
    llm.reset()
    llm.eval(tokens(300))
    llm.compress_as(1)
    llm.eval(tokens(50, seed=9))
    assert outcome(llm, 1) == first
    llm.end_prompt()
    assert kept(llm) != first[0]


def test_the_window_must_be_read_again_after_a_truncation(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=48, prefill="token", n_seq_max=2)
    llm.eval(tokens(300))
    llm._ctx.kv_cache_seq_rm(0, 290, -1)
    llm.n_tokens = 290
    llm.eval([5, 6, 7])
    with pytest.raises(RuntimeError, match="queries of the last 8 tokens are missing"):
        llm.compress_as(1)
    assert (llm.kv_stats(0).state, llm.kv_stats(1).state, llm.kv_stats().bytes_store) == ("staged", "empty", 0)


def test_what_cannot_be_copied_or_configured_is_an_error(make_model: MakeModel) -> None:
    path = make_model(SHAPE)
    llm = load(path, kv_size=48, n_seq_max=2)
    with pytest.raises(RuntimeError, match="sequence 0 is not a prompt that is held as a whole"):
        llm.compress_as(1)  # nothing was read
    llm.read_prompt(tokens(300))
    with pytest.raises(RuntimeError, match="sequence 0 is not a prompt that is held as a whole"):
        llm.compress_as(1)
    for options, message in [
        ({"window": 16}, "window is 16: the context has room for the queries of the last 8"),
        ({"n_tail": 4}, "cannot change"),
        ({"kv_size": 5000}, "kv_size is 5000"),
        ({"policy": "x"}, "policy='x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            llm.configure(**options)
    assert llm.kv_options.kv_size == 48
    llm.reset()
    llm.eval(tokens(300))
    for seq_id in (0, 2):
        with pytest.raises(ValueError, match=f"seq_id={seq_id}"):
            llm.compress_as(seq_id)
    llm.compress_as(1)
    with pytest.raises(RuntimeError, match="sequence 1 is not empty: remove it first"):
        llm.compress_as(1)
    with pytest.raises(ValueError, match="seq_id=1"):
        load(path, kv_size=48).compress_as(1)


# how much is kept


@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_a_share_of_the_prompt_is_kept(prefill: str, make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_ratio=0.25, policy="snapkv", prefill=prefill)
    for n in (100, 401, 20):
        llm.read_prompt(tokens(n))
        assert set(llm.kv_stats().n_cells.ravel().tolist()) == {max(9, round(0.25 * n))}
    llm.reset()
    llm.eval(tokens(60))
    llm.eval(tokens(140, seed=2))
    llm.end_prompt()
    assert llm.kv_options.kv_size == 50 and set(llm.kv_stats().n_cells.ravel().tolist()) == {50}


@pytest.mark.parametrize("cell_type", ["f16", "q8_0"])
def test_bytes_are_kept(cell_type: str, make_model: MakeModel) -> None:
    kind, cell = ggml_type(cell_type), 2 * row_bytes(cell_type, SHAPE.head_dim)
    n_heads = SHAPE.n_layer * SHAPE.n_head_kv
    llm = load(make_model(SHAPE), kv_bytes=f"{40 * cell * n_heads / 1024}KiB", policy="snapkv", type_k=kind, type_v=kind)
    llm.read_prompt(tokens(300))
    stats = llm.kv_stats()
    assert set(stats.n_cells.ravel().tolist()) == {40}
    assert stats.bytes_full == 300 * cell * n_heads
    assert load(make_model(SHAPE), kv_bytes="1GiB", policy="snapkv").kv_options.kv_size == 2048


@pytest.mark.parametrize(("options", "message"), [
    ({"kv_ratio": 0.0}, "kv_ratio=0.0: nothing"), ({"kv_ratio": 1.5}, r"kv_ratio=1.5: it must be a number in \[0, 1\]"),
    ({"kv_ratio": "a"}, "kv_ratio='a'"), ({"kv_bytes": "much"}, "kv_bytes='much'"), ({"kv_bytes": 0}, "kv_bytes=0"),
    ({"kv_bytes": 100}, "use at least 6912 bytes"),
    ({"kv_size": 64, "policy": "full"}, "policy='full', kv_size=64"), ({"kv_size": 64, "kv_ratio": 0.5}, "kv_size=64, kv_ratio=0.5: give one of them"),
])  # fmt: skip
def test_wrong_amounts_are_errors(options: dict[str, Any], message: str, make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=message):
        load(make_model(SHAPE), **options)


@embedded
@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_the_system_message_of_a_chat_is_kept(prefill: str) -> None:
    llm = load(embedded_model(), kv_size=60, policy="snapkv", prefill=prefill)
    rng = random.Random(3)
    system, user = (" ".join(" ".join(needle.filler_sentence(rng)) for _ in range(n)) for n in (4, 60))
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    n_system = 1 + len(needle.encode(system))

    def whole(**options: Any) -> bool:
        llm.create_chat_completion(messages, max_tokens=2, temperature=0, **options)
        heads = [set(llm.kv_positions(il, ih).tolist()) for il in range(5) for ih in range(4)]
        assert {len(kept) for kept in heads} == {60}
        return all(kept >= set(range(n_system)) for kept in heads)

    assert not whole()
    assert whole(protect_system=True)
    assert llm.kv_options.protect == ()
    assert not whole()
    list(llm.create_chat_completion(messages, max_tokens=2, stream=True, protect_system=True))
    assert set(range(n_system)) <= set(llm.kv_positions(1, 1).tolist())


@pytest.mark.parametrize("amount", [{"kv_size": 64}, {"kv_ratio": 0.5}, {"kv_bytes": "100KiB"}], ids=str)
@pytest.mark.parametrize("duplicate", [lambda llm: pickle.loads(pickle.dumps(llm)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_has_what_configure_changed(duplicate: Callable[[Any], Any], amount: dict[str, Any], make_model: MakeModel) -> None:
    """And the original: a smaller kv_size takes the place of what said how much is kept."""
    llm = load(make_model(SHAPE), **amount, beta=1.5)
    assert duplicate(llm).kv_options == llm.kv_options
    scores = np.full((SHAPE.n_layer, SHAPE.n_head), 1.0)
    llm.configure(kv_size=24, policy="adakv", sinks=2, protect=[(5, 7)], importance=scores, beta=None)
    other = duplicate(llm)
    assert other.kv_options == llm.kv_options and other.kv_options.kv_size == 24 and other.kv_options.beta is None
    outcomes = []
    for model in (llm, other):
        model.read_prompt(tokens(300))
        assert model.kv_options.kv_size == 24
        outcomes.append(outcome(model))
    assert outcomes[0] == outcomes[1]
    llm.configure(policy="headkv")
    assert duplicate(llm).kv_budget.tolist() == llm.kv_budget.tolist()  # of the scores


def test_the_same_prompt_after_configure_is_compressed_anew(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=64, policy="snapkv")
    for kv_size in (64, 32):
        llm.configure(kv_size=kv_size)
        next(llm.generate(tokens(300), temp=0.0))
        assert set(llm.kv_stats().n_cells.ravel().tolist()) == {kv_size}


USER, SYSTEM = {"role": "user", "content": "anna"}, {"role": "system", "content": "the code of anna is 48 ."}


def with_template(path: Path, template: str) -> Path:
    """A copy of the embedded model with another chat template."""
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", template, str(embedded_model()), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def kept_by_all(llm: Any) -> set[int]:
    """Positions that every head of the embedded model holds."""
    return set.intersection(*(set(llm.kv_positions(il, ih).tolist()) for il in range(5) for ih in range(4)))


@embedded
@pytest.mark.parametrize("form", ["no bos", "chatml", "llama-2"])
def test_the_system_message_is_kept_whatever_the_chat_format(form: str, tmp_path: Path) -> None:
    """Its tokens are those that the format makes, with BOS or without."""
    path, options = embedded_model(), {}
    if form == "no bos":
        path = with_template(tmp_path / "m.gguf", "{% for m in messages %}{{ ' ' + m['content'] | trim }}{% endfor %}")
    else:
        options = {"chat_format": form}
    llm = load(path, kv_size=40, policy="snapkv", **options)
    rng = random.Random(3)
    user = " ".join(" ".join(needle.filler_sentence(rng)) for _ in range(40))
    messages = [SYSTEM, {"role": "user", "content": user}]
    llm.create_chat_completion(messages, max_tokens=1)
    prompt = llm.input_ids[: llm.n_tokens].tolist()
    text = needle.encode(SYSTEM["content"])[1:]  # formats differ in what stands before the first word
    start = next(i for i in range(len(prompt)) if prompt[i : i + len(text)] == text)
    assert (prompt[0] == llm.token_bos()) == (form != "no bos")
    system = set(range(start + len(text)))
    assert not system <= kept_by_all(llm)
    llm.create_chat_completion(messages, max_tokens=1, protect_system=True)
    assert llm.input_ids[: llm.n_tokens].tolist() == prompt
    assert system <= kept_by_all(llm)
    llm.create_chat_completion(messages, max_tokens=1)
    assert not system <= kept_by_all(llm)


@embedded
def test_a_chat_goes_on_behind_a_system_message_that_is_kept_already() -> None:
    llm = load(embedded_model(), kv_size=60, policy="snapkv", kv_reuse=True)
    rng = random.Random(3)
    chat = [SYSTEM, {"role": "user", "content": " ".join(" ".join(needle.filler_sentence(rng)) for _ in range(30))}]

    def read(n_turns: int, **options: Any) -> int:
        """Tokens that the compressed prompt has then."""
        llm.create_chat_completion(
            [*chat, *[{"role": role, "content": "anna"} for role in ("assistant", "user") * n_turns]], max_tokens=1, **options
        )
        return int(llm.kv_stats().n_prompt)

    n = read(0, protect_system=True)
    assert read(1, protect_system=True) == read(2, protect_system=True) == n
    assert set(range(8)) <= kept_by_all(llm)
    assert read(3) > n  # nothing is to be protected any more
    n = read(3)
    assert read(4, protect_system=True) > n


def test_a_state_of_a_share_goes_on(make_model: MakeModel) -> None:
    path, prompt, more = make_model(SHAPE), tokens(300), tokens(320, seed=9)[300:]
    options: dict[str, Any] = {"kv_ratio": 0.25, "policy": "snapkv", "kv_reuse": True}
    llm, other, larger = load(path, **options), load(path, **options), load(path, **{**options, "kv_ratio": 0.5})
    llm.read_prompt(prompt)
    state = llm.save_state()
    llm.read_prompt(tokens(200, seed=5))  # of another length
    for model, n in ((llm, 300), (other, 300), (larger, 320)):
        model.load_state(state)
        next(model.generate([*prompt, *more], temp=0.0))
        assert model.kv_stats().n_prompt == n


@pytest.mark.parametrize("duplicate", [lambda llm: pickle.loads(pickle.dumps(llm)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_forgets_what_another_preset_and_policy_did(duplicate: Callable[[Any], Any], make_model: MakeModel) -> None:
    llm = load(
        make_model(SHAPE), kv_size=64, preset="default", window=16, recent=12, pool="avg", pool_kernel=5, policy="auto", question="later"
    )
    llm.configure(preset="paper")
    assert (llm.kv_options.window, llm.kv_options.pool) == (8, "max") and duplicate(llm).kv_options == llm.kv_options
    llm.configure(policy="snapkv")
    assert llm.kv_options.question is None and duplicate(llm).kv_options == llm.kv_options
    llm.configure(policy="auto")
    assert duplicate(llm).policy == llm.policy


@embedded
def test_a_stream_that_nobody_iterates_protects_nothing(make_model: MakeModel) -> None:
    llm = load(embedded_model(), kv_size=60)
    other = "the code of bob is 12 33 . question : the code of bob is"
    expected = llm.create_completion(other, max_tokens=3, temperature=0)["choices"][0]["text"]
    never = llm.create_chat_completion([SYSTEM, USER], protect_system=True, stream=True, max_tokens=4)
    assert llm.create_completion(other, max_tokens=3, temperature=0)["choices"][0]["text"] == expected
    next(never)
    assert set(range(8)) <= kept_by_all(llm)
    assert llm.kv_options.protect == ()  # though the stream is open
    assert llm.create_completion(other, max_tokens=3, temperature=0)["choices"][0]["text"] == expected
    with pytest.raises(ValueError, match="Tool choice"):
        llm.create_chat_completion(
            [SYSTEM, USER], protect_system=True, tools=[], tool_choice={"type": "function", "function": {"name": "f"}}
        )
    assert llm.create_completion(other, max_tokens=3, temperature=0)["choices"][0]["text"] == expected


@embedded
def test_a_system_message_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    llm = load(embedded_model(), kv_size=60)
    with pytest.raises(ValueError, match="no system message"):
        llm.create_chat_completion([USER], protect_system=True)
    with pytest.raises(ValueError, match="the stock one"):
        load(embedded_model()).create_chat_completion([SYSTEM, USER], protect_system=True)
    for i, template in enumerate(
        ("{{ messages[-1]['content'] }}", "{% for m in messages | reverse %}{{ ' ' + m['content'] }}{% endfor %}")
    ):
        llm = load(with_template(tmp_path / f"{i}.gguf", template), kv_size=60)
        with pytest.raises(ValueError, match="leaves the system message out, or puts it behind"):
            llm.create_chat_completion([SYSTEM, USER], protect_system=True)


def test_policy_full_is_the_stock_cache(make_model: MakeModel) -> None:
    results = []
    for options in ({"policy": "full"}, {}):
        llm = load(make_model(SHAPE), **options)
        assert llm.kv_options is None
        llm.eval(tokens(100))
        results.append(logits(llm).tobytes())
    assert results[0] == results[1]
