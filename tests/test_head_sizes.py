"""Models whose K and V are of different sizes per head, against the NumPy oracle and the stock cache."""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import architectures
import gguf
import numpy as np
import pytest
from conftest import load, logits, nmse, outcome, tokens
from llama_cpp import llama_cpp

from pyheadkv.cli import plan
from pyheadkv.model import read_shape
from pyheadkv.testing import oracle

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[[Any], Path]
N_PROMPT, KV_SIZE = 300, 40
F16, Q8_0 = 1, 8


@dataclass(frozen=True)
class Shape:
    """A model of tests/architectures.py: its architecture, heads and compressed layers."""

    arch: str
    n_head: int
    n_head_kv: int
    layers: tuple[int, ...]  # the others have windows
    n_layer: int = 3
    head_dim: int = 64
    head_dim_v: int = 32


MHA = Shape("minicpm3", 4, 4, (0, 1, 2))
WINDOWED = Shape("mimo2", 4, 2, (1, 2))
BOTH = pytest.mark.parametrize("shape", [MHA, WINDOWED], ids=lambda shape: shape.arch)


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shape], Path]:
    """make_model(shape) -> path of its GGUF with random weights."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(shape: Shape) -> Path:
        _, keys = architectures.cases()[shape.arch]
        changes = {"attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim_v, "context_length": 2048}
        if len(shape.layers) < shape.n_layer:
            changes["attention.sliding_window_pattern"] = [int(il not in shape.layers) for il in range(shape.n_layer)]
        model = architectures.make_model(shape.arch, keys | changes)
        path = folder / f"{shape.arch}-{shape.head_dim_v}.gguf"
        llama_cpp.llama_model_save_to_file(model, os.fsencode(path))
        llama_cpp.llama_model_free(model)
        return path

    return make


@pytest.fixture(autouse=True)
def weights_of_any_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's forward pass knows fewer architectures; of these it takes the output matrices."""

    @functools.cache
    def weights(path: str) -> Any:
        return types.SimpleNamespace(weights={t.name: t.data for t in gguf.GGUFReader(path).tensors if "attn_output" in t.name})

    monkeypatch.setattr(oracle, "_model_of", weights)


def prompt_of(n: int) -> list[int]:
    return [token % architectures.N_VOCAB for token in tokens(n)]


def as_lists(kept: oracle.Kept) -> list[list[list[int]]]:
    return [[rows.tolist() for rows in heads] for heads in kept]


@BOTH
@pytest.mark.parametrize(
    "policy", ["snapkv", "adakv", "criticalkv", "h2o", "streaming", "uniform/output", "uniform/attention*value", "uniform/recent/mean"]
)
@pytest.mark.parametrize("attend", ["fused", "composed"])
def test_keeps_what_the_oracle_keeps(shape: Shape, policy: str, attend: str, make_model: MakeModel) -> None:
    """Both orders of prefill and both ways to attend; the rows of K and of V move unchanged, and their mean is theirs."""
    path, prompt = make_model(shape), prompt_of(N_PROMPT)
    how = {"kv_size": KV_SIZE, "policy": policy, "importance": None}
    llm = load(path, prefill="token", attend=attend, n_ubatch=64, **how)
    llm.eval(prompt)
    expected = oracle.kept_of(llm, shape)
    staged = {v: {il: oracle.head_rows(llm, shape, il, v=v) for il in shape.layers} for v in (False, True)}
    llm.end_prompt()
    assert as_lists(oracle.kept_by(llm, shape)) == as_lists(expected)
    held = {v: oracle.rows(llm, shape, v=v) for v in (False, True)}
    for (il, ih), kept in zip(oracle.heads(shape), (kept for heads in expected for kept in heads), strict=True):
        for v, dim in ((False, shape.head_dim), (True, shape.head_dim_v)):
            rows, got, real = staged[v][il][:, ih], held[v][il, ih], kept[kept >= 0]
            assert got.shape == (len(kept), dim)
            np.testing.assert_array_equal(got[len(kept) - len(real) :], rows[real])
            if len(real) < len(kept):
                mean = np.delete(rows, real, axis=0).mean(axis=0, dtype=np.float64)
                np.testing.assert_allclose(got[0], mean, rtol=2**-10, atol=1e-5)
    other = load(path, prefill="layer" if policy != "h2o" else "token", attend=attend, n_buckets=2, n_ubatch=64, **how)
    other.read_prompt(prompt)
    assert as_lists(oracle.kept_by(other, shape)) == as_lists(expected)
    for model in (llm, other):
        model.eval([9, 10])
    assert nmse(other.last_logits, llm.last_logits) < 2e-5


@BOTH
@pytest.mark.parametrize("types", [{}, {"type_k": Q8_0, "type_v": Q8_0}, {"type_k": F16, "type_v": Q8_0}], ids=["f16", "q8_0", "f16-q8_0"])
@pytest.mark.parametrize("attend", ["fused", "composed"])
def test_answers_as_the_stock_cache_when_nothing_is_evicted(
    shape: Shape, types: dict[str, int], attend: str, make_model: MakeModel
) -> None:
    path, prompt, got = make_model(shape), prompt_of(N_PROMPT), []
    for options in ({}, {"kv_size": N_PROMPT + 20, "policy": "snapkv", "importance": None, "attend": attend}):
        with closing(load(path, flash_attn=True, **types, **options)) as llm:
            if options:
                llm.read_prompt(prompt)
            else:
                llm.eval(prompt)
            for token in (9, 10, 11):
                llm.eval([token])
                got.append(logits(llm))
    assert nmse(np.array(got[3:]), np.array(got[:3])) < (2e-4 if types else 1e-5)


@BOTH
def test_fitted_values_equal_the_oracle(shape: Shape, make_model: MakeModel) -> None:
    llm = load(make_model(shape), kv_size=KV_SIZE, policy="snapkv", importance=None, fit="values", prefill="token")
    fitted, _ = oracle.fit_of(llm, shape, prompt_of(700))
    ours = oracle.rows(llm, shape, v=True)
    assert all(ours[head].shape[1] == shape.head_dim_v and nmse(ours[head], values) < 1e-7 for head, (values, *_) in fitted.items())
    assert llm.kv_stats().n_heads_fitted > 0


@BOTH
@pytest.mark.parametrize("types", [{}, {"type_k": Q8_0, "type_v": Q8_0}], ids=["f16", "q8_0"])
def test_a_restored_state_answers_as_the_saved_one(shape: Shape, types: dict[str, int], make_model: MakeModel) -> None:
    how = {"kv_size": KV_SIZE, "policy": "snapkv", "importance": None, **types}
    with closing(load(make_model(shape), **how)) as llm, closing(load(make_model(shape), attend="composed", **how)) as other:
        llm.read_prompt(prompt_of(N_PROMPT))
        llm.eval([9, 10])
        state = llm.save_state()
        llm.eval([11])
        expected = np.array(llm.last_logits)
        for to in (llm, other):
            to.load_state(state)
            to.eval([11])
        assert np.array_equal(llm.last_logits, expected) and nmse(other.last_logits, expected) < 2e-5


def test_a_state_of_other_sizes_is_refused(make_model: MakeModel) -> None:
    """One of equal sizes has the version that it always had."""
    with contextlib.ExitStack() as stack:
        llms = [stack.enter_context(closing(load(make_model(replace(MHA, head_dim_v=n)), kv_size=KV_SIZE))) for n in (32, 48, 64)]
        states = []
        for llm in llms:
            llm.read_prompt(prompt_of(N_PROMPT))
            states.append(llm.save_state())
        for to, of, error in (
            (0, 2, "its version is 5, that of this context is 7"),
            (2, 0, "its version is 7, that of this context is 5"),
            (0, 1, "its size of a V head is 48, that of this context is 32"),
        ):
            with pytest.raises(ValueError, match=error):
                llms[to].load_state(states[of])


@pytest.mark.parametrize("types", [{}, {"type_k": Q8_0, "type_v": Q8_0}, {"kv_archive_type": "q8_0"}], ids=["f16", "q8_0", "as q8_0"])
def test_a_prompt_from_the_archive_is_as_one_that_is_read(types: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    path, prompt = make_model(MHA), prompt_of(700)
    how = {"kv_size": KV_SIZE, "policy": "snapkv", "importance": None, **types}
    plain = {key: value for key, value in how.items() if key != "kv_archive_type"}
    with closing(load(path, **plain)) as llm:
        expected = outcome(llm, prompt, MHA)
    for prefill in ("layer", "token"):
        with closing(load(path, prefill=prefill, kv_archive=tmp_path, **how)) as llm:
            llm.read_prompt(prompt[:600])
            found = outcome(llm, prompt, MHA)
            assert llm.kv_stats().n_archived >= 448
        if "kv_archive_type" not in types:
            assert found == expected


@BOTH
def test_bytes_are_those_of_both_sizes(shape: Shape, make_model: MakeModel) -> None:
    path, n_heads = make_model(shape), len(shape.layers) * shape.n_head_kv
    cell = 2 * (shape.head_dim + shape.head_dim_v)
    found = read_shape(path)
    assert (found.n_embd_head_k, found.n_embd_head_v, found.cell_bytes) == (shape.head_dim, shape.head_dim_v, cell)
    with closing(load(path, kv_size=KV_SIZE, policy="snapkv", importance=None, n_tail=16)) as llm:
        llm.read_prompt(prompt_of(N_PROMPT))
        assert llm.kv_stats().bytes_store == n_heads * (KV_SIZE + 16) * cell
        assert llm.kv_stats().bytes_full == n_heads * N_PROMPT * cell


@BOTH
@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_what_a_prompt_takes_is_planned(shape: Shape, prefill: str, make_model: MakeModel) -> None:
    path, how = make_model(shape), {"kv_size": KV_SIZE, "preset": "default", "policy": "snapkv", "importance": None, "prefill": prefill}
    with closing(load(path, n_tail=128, **how)) as llm, plan.Probe(path) as probe:
        model = plan.MemoryModel(probe, n_predict=128)
        for n_prompt in (300, 1500):
            llm.read_prompt(prompt_of(n_prompt))
            measured, planned = llm.kv_stats().bytes_peak, model.footprint(prefill, n_prompt=n_prompt, kv_size=KV_SIZE)
            assert measured <= planned.ledger <= 1.01 * measured + 16384
