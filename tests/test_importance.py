"""Where importance is found, and which models the registry recognises."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import without_importance

import pyheadkv
from pyheadkv import gguf_keys, importance, importance_values
from pyheadkv.gguf_header import read_header
from pyheadkv.importance_values import Importance
from pyheadkv.testing import random_importance, write_random_model

SHAPE: dict[str, Any] = {"n_layer": 3, "n_embd": 128, "n_head": 4, "n_head_kv": 2, "n_ff": 160}


def model(path: Path, **changes: Any) -> Path:
    """A random model."""
    write_random_model(path, **{**SHAPE, "seed": 1, **changes})
    return path


def scores(seed: int) -> np.ndarray:
    return random_importance(n_layer=3, n_head=4, seed=seed)


def score_file(path: Path, values: np.ndarray, fingerprint: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"importance": values.tolist(), "method": "r2", "fingerprint": fingerprint}))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and an empty registry."""
    monkeypatch.setenv("PYHEADKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importance, "REGISTRY", tmp_path / "registry")
    return tmp_path / "cache"


def register(path: Path, values: np.ndarray, name: str, **changes: Any) -> None:
    entry = importance.registry_entry(path, Importance(values, method="r2"), name=name, source="a test")
    importance.REGISTRY.mkdir(exist_ok=True)
    (importance.REGISTRY / f"{name}.json").write_text(json.dumps({**entry, **changes}))


def test_places_are_searched_in_their_order(tmp_path: Path, cache: Path) -> None:
    path = model(tmp_path / "a.gguf")
    assert importance.find_importance(path) is None
    register(path, scores(1), "first")
    found = importance.find_importance(path)
    assert found is not None and found.origin == "registry: first" and not found.relative
    np.testing.assert_array_equal(found.importance.values, scores(1))
    key = importance.fingerprint(path).key
    score_file(importance.cache_path(path), scores(2), key)
    assert importance.cache_path(path) == cache / "importance" / f"{key}.json"
    found = importance.find_importance(path)
    assert found is not None and found.origin.startswith("user cache: ")
    score_file(tmp_path / "a.importance.json", scores(3), key)
    found = importance.find_importance(path)
    assert found is not None and found.origin.startswith("beside the model: ")
    np.testing.assert_array_equal(found.importance.values, scores(3))
    gguf_keys.write_importance(path, tmp_path / "b.gguf", scores(4))
    found = importance.find_importance(tmp_path / "b.gguf")
    assert found is not None and found.origin == "metadata of the model"
    np.testing.assert_array_equal(found.importance.values, scores(4))


def test_a_file_of_another_model_is_refused_and_one_that_does_not_say_is_taken(tmp_path: Path) -> None:
    path, other = model(tmp_path / "a.gguf"), model(tmp_path / "b.gguf", seed=2)
    score_file(importance.sidecar_path(path), scores(1), importance.fingerprint(other).key)
    with pytest.raises(ValueError, match=r"a\.importance\.json was measured on a model with the fingerprint .*pyheadkv score --force"):
        importance.find_importance(path)
    score_file(importance.sidecar_path(path), scores(1))
    assert importance.find_importance(path) is not None
    score_file(importance.sidecar_path(path), np.ones((2, 4)))
    with pytest.raises(ValueError, match="block_count"):
        importance.find_importance(path)


def test_any_quantisation_of_a_model_is_the_same_model(tmp_path: Path) -> None:
    first = model(tmp_path / "f16.gguf")
    register(first, scores(1), "mine")
    for ftype in ("f32", "q8_0", "q4_0"):
        found = importance.find_importance(model(tmp_path / f"{ftype}.gguf", ftype=ftype))
        assert found is not None and found.origin == "registry: mine" and not found.relative
        assert importance.fingerprint(tmp_path / f"{ftype}.gguf").key == importance.fingerprint(first).key


def altered(source: Path, path: Path, factor: float) -> Path:
    """A copy whose norms are scaled by factors around 1, as a fine-tune changes them."""
    shutil.copy(source, path)
    rng = np.random.default_rng(0)
    header = read_header(source)
    places = [(header.data_begin + t.begin, t.shape[0]) for t in header.tensors if t.name.endswith("norm.weight")]
    data = bytearray(path.read_bytes())
    for begin, n in places:
        values = np.frombuffer(bytes(data[begin : begin + 4 * n]), dtype="<f4")
        data[begin : begin + 4 * n] = (values * (1 + factor * rng.standard_normal(n))).astype("<f4").tobytes()
    path.write_bytes(bytes(data))
    return path


def test_a_fine_tune_is_a_relative_and_anything_else_is_nothing(tmp_path: Path) -> None:
    base = model(tmp_path / "base.gguf")
    register(base, scores(1), "base")
    found = importance.find_importance(altered(base, tmp_path / "tuned.gguf", 0.01))
    assert found is not None and found.relative
    assert found.origin == "registry: base (a relative of this model: the weights differ)"
    assert importance.find_importance(altered(base, tmp_path / "far.gguf", 0.5)) is None
    for i, changes in enumerate(
        ({"n_ff": 192}, {"n_layer": 4}, {"n_head_kv": 4}, {"n_vocab": 400}, {"rope_theta": 5e5}, {"arch": "qwen2"})
    ):
        assert importance.find_importance(model(tmp_path / f"{i}.gguf", **changes)) is None, changes


def test_the_nearest_entry_is_taken(tmp_path: Path) -> None:
    base = model(tmp_path / "base.gguf")
    register(base, scores(1), "a-base")
    tuned = altered(base, tmp_path / "tuned.gguf", 0.02)
    register(tuned, scores(2), "b-tuned")
    found = importance.find_importance(tuned)
    assert found is not None and found.origin == "registry: b-tuned" and not found.relative


def test_an_entry_without_weights_matches_by_shape_and_says_so(tmp_path: Path) -> None:
    path = model(tmp_path / "a.gguf")
    register(path, scores(1), "shape", sketch=None, tokens="")
    found = importance.find_importance(path)
    assert found is not None and found.relative and "by shape: the weights were not compared" in found.origin
    register(path, scores(2), "weights")
    found = importance.find_importance(path)
    assert found is not None and not found.relative


def test_another_tokenizer_is_another_model(tmp_path: Path) -> None:
    path = model(tmp_path / "a.gguf")
    register(path, scores(1), "other", tokens="00")
    assert importance.find_importance(path) is None


def test_registry_of_the_package_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    entries = [json.loads(file.read_text()) for file in importance.registered()]
    assert {entry["name"] for entry in entries} >= {
        "SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-1.5B-Instruct", "Meta-Llama-3-8B-Instruct",
        "Mistral-7B-Instruct-v0.2",
    }  # fmt: skip
    for entry in entries:
        values = importance_values.check_importance(entry["importance"], name=entry["name"])
        assert values.shape == (len(entry["heads"]), entry["heads"][0][0])
        assert entry["source"] and entry["method"]
        assert entry["sketch"] is None or np.std(entry["sketch"]) > 0


@pytest.mark.skipif(not pyheadkv.embedded_model().is_file(), reason="the embedded model is not there yet")
def test_the_embedded_model_is_not_in_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PYHEADKV_CACHE", str(tmp_path))
    without_importance(pyheadkv.embedded_model(), tmp_path / "a.gguf")
    assert importance.find_importance(tmp_path / "a.gguf") is None


def test_fingerprint_follows_a_file_that_changes(tmp_path: Path) -> None:
    path = model(tmp_path / "a.gguf")
    before = importance.fingerprint(path)
    model(path, seed=9)
    assert importance.fingerprint(path).key != before.key
