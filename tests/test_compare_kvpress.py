"""The comparison with kvpress, on random models: it finds what is the same, and what is not."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES, Shape, tokens, unpadded

NEEDS = "needs pip install '.[compare]'"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    kvpress = pytest.importorskip("kvpress", reason=NEEDS)
try:
    import pyheadkv  # noqa: F401
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from pyheadkv.eval.quiz import Ask  # noqa: E402

SCRIPTS = Path(__file__).parent.parent / "scripts"
WINDOW, KERNEL, N_CTX = 16, 5, 512
PROMPT = tokens(200, seed=3)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script; torch has one thread, as llama.cpp has here."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    sys.path.insert(0, str(SCRIPTS))
    import compare_kvpress

    sys.path.remove(str(SCRIPTS))
    yield compare_kvpress
    torch.set_num_threads(n_threads)


def sides(script: ModuleType, path: Path, *, kernel: int = KERNEL) -> tuple[Any, Any]:
    """``kernel`` : ours."""
    model = script.load_gguf(path, dtype=torch.float32)
    ours = script.Ours(path, window=WINDOW, kernel=kernel, n_ctx=N_CTX)
    return ours, script.Theirs(model, window=WINDOW, kernel=KERNEL)


def ask(n_steps: int = 4) -> Ask:
    prompt, grade = tuple(PROMPT), lambda text: float(bool(text))
    return Ask(kind="random", prompt=prompt, n_context=len(prompt), alone=prompt, n_steps=n_steps, grade=grade, depth=0.5)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.arch != "qwen3"], ids=lambda s: s.name)
def test_equal_definitions_keep_equal_cells(script: ModuleType, shape: Shape, make_model: Callable[..., Path]) -> None:
    ours, theirs = sides(script, make_model(shape, ftype="f32"))
    settings = script.make_settings([24, 48])
    found = script.compare_question(ours, theirs, ask(), settings, frozenset())
    assert found["n_prompt"] == len(PROMPT) - 1 and found["score_errors"][0] < 1e-3
    assert [script.Setting(**r["setting"]) for r in found["results"]] == list(settings)
    for setting, result in zip(settings, found["results"], strict=True):
        cells = result["cells"]
        if setting.kv_size and not setting.is_default:
            assert cells["n_heads"] == shape.n_layer * shape.n_head_kv
            assert cells["n_cells"] == cells["n_heads"] * (setting.kv_size - WINDOW)
        if setting.is_default or setting.floor:
            continue
        assert result["logits_nmse"] < 1e-4
        if cells:
            assert cells["n_cells_same"] > 0.98 * cells["n_cells"] and cells["gap"] < 0.02 and cells["n_unlike"] == 0


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_another_definition_keeps_other_cells(script: ModuleType, name: str, make_model: Callable[..., Path]) -> None:
    ours, theirs = sides(script, make_model(SHAPES[1], ftype="f32"), kernel=KERNEL + 4)
    setting = script.Setting(name, 48)
    ours.read(PROMPT)
    theirs.read(PROMPT, [setting])
    scores = ours.scores(), theirs.scores()
    ours.compress(setting)
    found = script.compare_cells(ours.kept(), theirs.kept(setting), scores, setting)
    assert found["n_cells_same"] < 0.98 * found["n_cells"] and found["gap"] > 0.05
    assert found["n_unlike"] == 0  # it is what we mean, though
    with pytest.raises(RuntimeError, match="not be comparable"):
        script.compare_cells(ours.kept(), [~mask for mask in theirs.kept(setting)], scores, setting)


@pytest.mark.parametrize("name", ["snapkv", "adakv", "adakv floor 0.2"])
def test_a_press_in_our_hook_is_the_press(script: ModuleType, name: str, make_model: Callable[..., Path]) -> None:
    """One reading for all presses leaves what kvpress leaves by itself, and answers alike."""
    _, theirs = sides(script, make_model(SHAPES[1], ftype="f32"))
    setting, model, token = script.Setting(name, 40), theirs.model, PROMPT[0]
    theirs.read(PROMPT, [script.Setting("snapkv", 60), setting])
    press = script.make_press(setting, len(PROMPT), window=WINDOW, kernel=KERNEL)
    cache = transformers.DynamicCache()
    with torch.inference_mode(), press(model):
        model.model(torch.tensor([PROMPT]), past_key_values=cache)
    with torch.inference_mode():
        masks = [module.masked_key_indices for module in theirs.attentions]
        position = torch.tensor([[len(PROMPT)]])
        wanted = model(torch.tensor([[token]]), past_key_values=cache, position_ids=position).logits[0, -1]
    for layer, own, masked in zip(theirs.cache(setting).layers, cache.layers, masks, strict=True):
        n = layer.keys.shape[2]
        assert n == (len(PROMPT) if name.startswith("adakv") else 40) and (masked is None) == (name == "snapkv")
        if masked is None:
            assert torch.equal(layer.keys, own.keys[:, :, :n]) and torch.equal(layer.values, own.values[:, :, :n])
    np.testing.assert_array_equal(theirs.answer(setting, token, 1, frozenset())[0], wanted)
    for mask, masked in zip(theirs.kept(setting), masks, strict=True):
        n_kept = mask.sum(axis=1) + WINDOW
        assert n_kept.sum() == 40 * len(mask)
        if masked is not None:
            dropped = np.bincount(masked[1].numpy(), minlength=len(mask))
            np.testing.assert_array_equal(n_kept, len(PROMPT) - dropped)


def test_gaps_are_those_of_cells_that_only_we_keep(script: ModuleType) -> None:
    scores = np.array([[1.0, 2.0, 4.0, 3.0], [8.0, 7.0, 6.0, 5.0]])
    theirs = script.chosen(scores, 2, is_moved=False)
    assert theirs.tolist() == [[False, False, True, True], [True, True, False, False]]
    ours = np.array([[False, True, True, False], [True, True, False, False]])
    assert script.gaps(ours, theirs, scores, is_moved=False) == [pytest.approx(1 / 3)]
    assert script.gaps(theirs, theirs, scores, is_moved=False) == []
    moved = script.chosen(scores, 2, is_moved=True)
    assert moved.tolist() == [[False] * 4, [True] * 4]
    assert sorted(script.gaps(ours, moved, scores, is_moved=True)) == [pytest.approx(1 / 5), pytest.approx(3 / 5)]


def test_weights_are_dequantised_once_for_both(script: ModuleType, make_model: Callable[..., Path]) -> None:
    import gguf

    path = make_model(SHAPES[1], ftype="q8_0")
    with script.weights(path, as_shipped=False) as made:
        a, b = gguf.GGUFReader(path), gguf.GGUFReader(made)
        assert [t.name for t in a.tensors] == [t.name for t in b.tensors]
        for x, y in zip(a.tensors, b.tensors, strict=True):
            assert y.tensor_type == gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(gguf.quants.dequantize(x.data, x.tensor_type), y.data)
        same = [name for name in a.fields if not name.startswith("GGUF.") and name != "general.file_type"]
        assert all(a.fields[name].contents() == b.fields[name].contents() for name in same)
    assert not made.exists()
    with script.weights(path, as_shipped=True) as shipped:
        assert shipped == path


def test_scores_are_those_of_float64(script: ModuleType, make_model: Callable[..., Path]) -> None:
    path = make_model(SHAPES[1], ftype="f32")
    ours, theirs = sides(script, path)
    found = script.trace_scores(path, ours, theirs, PROMPT)
    assert list(found) == ["pyheadkv", "kvpress"] and max(median for median, _ in found.values()) < 1e-5


def test_report_has_what_was_measured(script: ModuleType, make_model: Callable[..., Path], tmp_path: Path) -> None:
    path = make_model(SHAPES[1], ftype="f32")
    ours, theirs = sides(script, path)
    file, out = tmp_path / "run.jsonl", tmp_path / "report.md"
    found = script.compare_question(ours, theirs, ask(), script.make_settings([40]), frozenset())
    header = {"model": path.name, "model_sha256": "a" * 64, "as_shipped": False, "ask": "random:200", "kv_size": "40", "window": WINDOW}
    header |= {"kernel": KERNEL, "seed": 0, "versions": {"kvpress": "1"}}
    entry = {"task": "random", "length": 200, "context": 0, "questions": [found], "exact": {"pyheadkv": [1e-4, 1e-2]}}
    file.write_text(f"{json.dumps(header)}\n{json.dumps(entry)}\n")
    assert script.main(["--report", str(out), str(file), "--note", "End."]) == 0
    text = unpadded(out.read_text())
    assert str(tmp_path) not in text and text.rstrip().endswith("End.") and "| pyheadkv | 1.0e-04 | 1.0e-02 |" in text
    cells = found["results"][1]["cells"]
    assert f"| random:200 | snapkv | 40 | {100 * cells['n_heads_same'] / cells['n_heads']:.2f} % |" in text
    assert f"{100 * cells['n_cells_same'] / cells['n_cells']:.3f} %" in text
    moved = found["results"][3]["cells"]["n_moved"]
    assert f"| random:200 | 40 | {moved[0]} of {cells['n_cells']} | {moved[1]} of {cells['n_cells']} |" in text


def test_kvpress_guarantees_nothing_within_the_window(script: ModuleType, make_model: Callable[..., Path]) -> None:
    """Its safeguard counts the window; ours is a share of the cells before it."""
    ours, theirs = sides(script, make_model(SHAPES[1], ftype="f32"))
    plain, floor = script.Setting("adakv", 40), script.Setting("adakv floor 0.2", 40)
    ours.read(PROMPT)
    theirs.read(PROMPT, [plain, floor])
    assert script.n_moved(theirs.kept(floor), theirs.kept(plain)) == 0  # a fifth of 40 is less than 16
    ours.compress(floor)
    n_sure = int(0.2 * (40 - WINDOW))
    assert min(mask.sum(axis=1).min() for mask in ours.kept()) >= n_sure


@pytest.mark.parametrize(("args", "message"), [
    (["m.gguf", "-o", "x.jsonl", "--ask", "other:900"], "--ask='other:900'"),
    (["m.gguf", "-o", "x.jsonl", "--kv-size", "16"], "kv-size=16"),
])  # fmt: skip
def test_wrong_values_are_refused(
    script: ModuleType, args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(args) == 1 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
