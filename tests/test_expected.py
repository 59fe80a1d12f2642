"""Rank "expected": the attention that queries like those of the prompt are expected to pay, against the oracle and against itself."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
from architectures import Context, Refused
from conftest import SHAPES, Shape, load, tokens
from llama_cpp import llama_cpp
from test_policy_oracle import SIZES, check_kept, random_table
from test_sequences import sequences

from pyheadkv import _lib, gguf_header
from pyheadkv.gguf_copy import copy_with_fields
from pyheadkv.gguf_header import read_header
from pyheadkv.testing import oracle, reference
from pyheadkv.testing.oracle import heads, kept_by, kept_of

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
POLICY = "uniform/expected"


# ---------------------------------------------------------------- the oracle


@ALL_SHAPES
@SIZES
def test_kept_cells_equal_the_oracle(shape: Shape, n_prompt: int, kv_size: int, make_model: MakeModel) -> None:
    check_kept(shape, make_model, n_prompt, kv_size=kv_size, policy=POLICY)


@ALL_SHAPES
def test_it_is_neither_the_values_nor_the_attention(shape: Shape, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would not pass with another epsilon."""
    llm = load(make_model(shape), kv_size=40, policy=POLICY, prefill="token")
    llm.eval(tokens(300))
    ours = kept_of(llm, shape)
    for epsilon in (0.0, 1e6):
        monkeypatch.setattr(reference, "EXPECTED_EPSILON", epsilon)
        n = [len(np.setdiff1d(a, b)) for mine, theirs in zip(ours, kept_of(llm, shape)) for a, b in zip(mine, theirs)]
        assert np.mean(n) > 2


@pytest.mark.parametrize("policy", ["replay/expected", "adaptive/expected", "importance/expected/mean", "pyramid/expected/values"])
def test_every_budget_goes_with_it(policy: str, make_model: MakeModel) -> None:
    shape, more = SHAPES[1], {"replay": random_table(SHAPES[1])} if policy.startswith("replay") else {}
    if not policy.endswith("values"):  # which changes rows
        check_kept(shape, make_model, 300, kv_size=40, policy=policy, **more)
        return
    llm = load(make_model(shape), kv_size=40, policy=policy, prefill="token")
    llm.eval(tokens(300))
    expected = kept_of(llm, shape)
    llm.end_prompt()
    assert all((a == b).all() for mine, theirs in zip(kept_by(llm, shape), expected) for a, b in zip(mine, theirs))
    assert llm.kv_stats().n_heads_fitted > 0


@pytest.mark.parametrize("n_prompt", [1500, 2300])
def test_prompts_with_more_tokens_than_references(n_prompt: int, make_model: MakeModel) -> None:
    check_kept(SHAPES[2], make_model, n_prompt, kv_size=100, policy=POLICY, n_ubatch=512, n_ctx=4096)


@pytest.mark.parametrize("head_dim", [16, 48, 80])
def test_heads_of_any_size(head_dim: int, make_model: MakeModel) -> None:
    check_kept(Shape(f"size{head_dim}", "llama", 4, 2, n_layer=2, head_dim=head_dim), make_model, 300, kv_size=40, policy=POLICY)


def test_group_with_fewer_references_than_query_heads(make_model: MakeModel) -> None:
    """Heads of which there is none do not count."""
    check_kept(SHAPES[2], make_model, 14, kv_size=12, policy=POLICY, recent=1)


@pytest.mark.parametrize("type_k", [8, 2], ids=["q8_0", "q4_0"])
def test_quantised_keys_are_rotated(type_k: int, make_model: MakeModel) -> None:
    """The cache turns keys and queries by a Hadamard matrix then, of which nothing is left in the scores."""
    shape = Shape("quant", "llama", 4, 2, n_layer=1, head_dim=64)
    kept = []
    for type_kv in (1, type_k):
        llm = load(make_model(shape), kv_size=60, policy=POLICY, type_k=type_kv, type_v=1)
        llm.read_prompt(tokens(300))
        kept.append(kept_by(llm, shape)[0])
    n = [len(np.intersect1d(a, b)) for a, b in zip(*kept)]
    assert min(n) > (58 if type_k == 8 else 52)


def yarn(x: Any, position: Any, *, half: int, theta: float, factor: float, n_orig: int) -> Any:
    """The RoPE of qwen2 with YaRN, without the factor on the length: low frequencies are slower, high ones stay."""
    freq = theta ** (-np.arange(half) / half)
    fast, slow = (half * np.log(n_orig / (beta * 2 * np.pi)) / np.log(theta) for beta in (32, 1))
    fast, slow = max(0, np.floor(fast)), min(2 * half - 1, np.ceil(slow))
    stays = 1 - np.clip((np.arange(half) - fast) / max(0.001, slow - fast), 0, 1)
    angle = position[:, None, None] * (freq / factor * (1 - stays) + freq * stays)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=-1)


def linear(x: Any, position: Any, *, half: int, theta: float, factor: float) -> Any:
    """The same, all of them slower."""
    return yarn(x, position / factor, half=half, theta=theta, factor=1.0, n_orig=64)


ROPES = {
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, partial(linear, half=16, factor=4.0)),
    "yarn": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
        partial(yarn, half=16, factor=4.0, n_orig=128),
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_other_rotations(name: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower ones, and YaRN, whose keys and queries are longer than they would be."""
    shape, path = SHAPES[2], tmp_path / "m.gguf"
    keys, rope = ROPES[name]
    plain = make_model(shape)
    header = read_header(plain)
    kinds = {int: gguf_header.UINT32, float: gguf_header.FLOAT32, str: gguf_header.STRING}
    fields = [(f"qwen2.{key}", kinds[type(value)], None, value) for key, value in keys.items()]
    with path.open("wb") as out:
        copy_with_fields(header, out, fields, without={key for key, *_ in fields} & header.pairs.keys())
    theta = reference.ReferenceModel(plain).rope_theta
    monkeypatch.setattr(oracle, "rope_of", lambda path: partial(rope, theta=theta))
    outcomes = []
    for of_model in (path, plain):
        llm = load(of_model, kv_size=40, policy=POLICY, prefill="token")
        llm.eval(tokens(300))
        expected = kept_of(llm, shape)
        llm.end_prompt()
        outcomes.append(all((a == b).all() for mine, theirs in zip(kept_by(llm, shape), expected) for a, b in zip(mine, theirs)))
    assert outcomes == [True, False]  # the definition of the one is not that of the other


# ---------------------------------------------------------------- itself


@ALL_SHAPES
def test_outcome_does_not_depend_on_threads_order_and_ubatches(shape: Shape, make_model: MakeModel) -> None:
    path, prompt, outcomes = make_model(shape), tokens(1500), []
    for prefill, n_threads, n_ubatch in (("token", 1, 512), ("layer", 1, 512), ("layer", 2, 512), ("layer", 3, 512), ("layer", 1, 64)):
        llm = load(path, kv_size=80, policy=POLICY, prefill=prefill, n_threads=n_threads, n_threads_batch=n_threads, n_ubatch=n_ubatch)
        assert llm.prefill_mode == prefill
        llm.read_prompt(prompt)
        outcomes.append([rows.tolist() for heads in kept_by(llm, shape) for rows in heads])
    assert all(other == outcomes[0] for other in outcomes[1:4])
    n_same = [len(set(a) & set(b)) for a, b in zip(outcomes[0], outcomes[4])]  # rounded otherwise, where two cells are as good
    assert min(n_same) >= 78 and np.mean(n_same) > 79.8


def test_copies_and_sequences(make_model: MakeModel) -> None:
    """Each by the references of its own prompt."""
    shape, prompts = SHAPES[1], [tokens(700 + 300 * s, seed=s) for s in range(2)]
    path, expected = make_model(shape), []
    for prompt in prompts:
        with sequences(path, n_seq_max=1, rank="expected") as one:
            one.read(0, prompt)
            expected.append([one.positions(0, *head) for head in heads(shape)])
    with sequences(path, n_seq_max=3, rank="expected") as many:
        for s in (1, 0):
            many.read(s, prompts[s])
        assert [[many.positions(s, *head) for head in heads(shape)] for s in range(2)] == expected


def test_saved_cells_come_back(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=48, policy=POLICY)
    llm.read_prompt(tokens(500))
    before, state = kept_by(llm, SHAPES[1]), llm.save_state()
    llm.read_prompt(tokens(400, seed=1))
    llm.load_state(state)
    assert all((a == b).all() for mine, theirs in zip(kept_by(llm, SHAPES[1]), before) for a, b in zip(mine, theirs))
    assert _lib.lib.headkv_can_continue(llm.ctx, 0, None) == 0
    llm.configure(policy="uniform/value")
    assert _lib.lib.headkv_can_continue(llm.ctx, 0, None) < 0 and "other options" in _lib.last_error()


def test_bytes_are_counted(make_model: MakeModel) -> None:
    shape, n = SHAPES[1], 1900
    llm = load(make_model(shape), kv_size=48, prefill="token", policy=POLICY)
    out = _lib.Footprint(size=ctypes.sizeof(_lib.Footprint))
    params = llm.kv_options.to_params(llm._importance, llm.model_path)
    _lib.check(_lib.lib.headkv_get_footprint(llm.ctx, ctypes.byref(params), n, 16, 512, False, ctypes.byref(out)))
    llm.read_prompt(tokens(n))
    assert 0 < llm.kv_stats().bytes_peak <= out.staging + out.ring + out.hidden + out.scratch + out.store


def test_with_an_archive_such_prompts_only_write(make_model: MakeModel, tmp_path: Path) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=48, policy=POLICY, prefill="token", kv_archive=str(tmp_path))
    for policy, n_archived in ((POLICY, 0), (POLICY, 0), ("uniform/value", 1280)):
        llm.configure(policy=policy)
        llm.read_prompt(tokens(1500))
        assert llm.kv_stats().n_archived == n_archived
    llm.reset()
    llm.eval(tokens(1500))
    llm.configure(policy=POLICY)
    with pytest.raises(RuntimeError, match="queries that rank 'expected' looks at are missing, .* configure the rank before the prompt"):
        llm.end_prompt()


# ---------------------------------------------------------------- refused


def test_a_context_that_was_made_without_cannot(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=48, policy="uniform/value")
    with pytest.raises(
        ValueError, match="rank 'expected' looks at queries of the whole prompt while it is read: create the context with it"
    ):
        llm.configure(rank="expected")


REFUSED = {
    "gpt2": 0, "bloom": 0,  # no RoPE
    "qwen2vl": 0,  # positions of three numbers
    "hunyuan-dense": 0,  # weights behind it
    "llama4": 3, "cohere2": 1, "smallthinker (sliding window)": 0,  # not in layers that attend to all tokens
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [*REFUSED, "phi3 (long RoPE factors)", "gpt-oss", "gemma2", "minicpm3", "mistral3 (attention temperature)"]
)
def test_models_whose_queries_cannot_be_turned(name: str, library: Any) -> None:
    arch, keys = architectures.cases()[name]
    model = architectures.make_model(arch, keys)
    prompt = np.random.default_rng(0).integers(0, architectures.N_VOCAB, architectures.N_PROMPT).tolist()
    try:
        if name in REFUSED:
            why = f"those of layer {REFUSED[name]} are not rotated by one RoPE of their position: use another rank"
            with pytest.raises(Refused, match=why), Context(model, architectures.KV_SIZE, policy=POLICY):
                pass
            return
        with Context(model, architectures.KV_SIZE, policy=POLICY) as context:
            context.decode(prompt, 0)
            _lib.check(_lib.lib.headkv_end_prompt(context.ctx, 0))
            assert np.isfinite(context.decode([1], len(prompt))).all()
    finally:
        llama_cpp.llama_model_free(model)
