"""Models of which some layers are not compressed: windowed attention, recurrent states."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

try:
    import pyheadkv  # noqa: F401
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from conftest import HYBRID, SHAPES, WINDOWED, Shape, greedy, load, tokens

from pyheadkv import cli, layers
from pyheadkv.cli import inspect, plan, score
from pyheadkv.eval.trial import Setting, Trial
from pyheadkv.gguf_header import read_header
from pyheadkv.gguf_keys import read_importance, write_importance
from pyheadkv.model import read_shape
from pyheadkv.options import FULL, Options
from pyheadkv.replay_values import ReplayTable, write_replay
from pyheadkv.score import measure, replay
from pyheadkv.units import format_bytes

OURS = ((0, 0), (8, 2), (0, 0), (8, 2))  # heads of both models
N_CTX = 1024
BOTH = pytest.mark.parametrize("shape", [WINDOWED, HYBRID], ids=lambda shape: shape.name)


def header_only(path: Path, arch: str, **more: int) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    keys = {"block_count": 4, "embedding_length": 256, "context_length": 512, "attention.head_count": 4, **more}
    for name, value in keys.items():
        writer.add_uint32(f"{arch}.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


# what is known of a file


@BOTH
def test_heads_are_those_that_the_engine_compresses(make_model: Callable[..., Path], shape: Shape) -> None:
    path = make_model(shape)
    found = read_shape(path)
    assert found.heads == OURS and (found.n_layer, found.n_compressed, found.n_heads_kv, found.is_uniform) == (4, 2, 4, True)
    assert (found.n_windowed, found.n_recurrent) == ((2, 0) if shape is WINDOWED else (0, 2))
    assert found.n_embd_head_k == found.n_embd_head_v == 32 and found.token_bytes == 4 * 2 * 32 * 2
    budget = load(path, kv_size=64).kv_budget
    assert [tuple(row > 0) for row in budget] == [(n > 0, n > 0) for _, n in OURS]


def test_only_models_whose_header_does_not_tell_are_loaded(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def ask(path: Path) -> layers.Layers:
        asked.append(path)
        return layers.Layers(heads=OURS, n_embd_head_k=(0, 32, 0, 32), n_embd_head_v=(0, 32, 0, 32))

    monkeypatch.setattr(layers, "ask_library", ask)
    for shape in (*SHAPES, WINDOWED, HYBRID):
        assert read_shape(make_model(shape)).n_layer == shape.n_layer
    assert asked == [make_model(WINDOWED), make_model(HYBRID)]


def test_a_file_is_asked_about_once(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    load_model = layers.load_without_weights
    monkeypatch.setattr(layers, "load_without_weights", lambda path: loaded.append(path) or load_model(path))
    path = make_model(WINDOWED, seed=11)
    monkeypatch.setattr("pyheadkv.gguf_header.FRESH_NS", 0)
    assert read_shape(path).heads == read_shape(path).heads == OURS
    assert len(loaded) == 1


def test_a_file_that_llama_cpp_cannot_load_is_named(tmp_path: Path) -> None:
    path = header_only(tmp_path / "m.gguf", "gemma3", **{"attention.sliding_window": 32})
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: llama.cpp cannot load it: .*\S"):
        read_shape(path)


# importance and replay tables


@BOTH
def test_importance_of_other_layers_does_not_count(make_model: Callable[..., Path], shape: Shape, tmp_path: Path) -> None:
    path = make_model(shape)
    found = read_importance(path)
    assert found is not None and found.values[0].any()
    values = found.values.copy()
    values[[0, 2]] = 0
    write_importance(path, tmp_path / "m.gguf", values, force=True)
    budgets = [inspect.make_plan(p, options=Options(kv_size=64), n_ctx=N_CTX).budget for p in (path, tmp_path / "m.gguf")]
    assert budgets[0].tolist() == budgets[1].tolist() == load(path, kv_size=64, preset="default").kv_budget.tolist()
    assert budgets[0][[0, 2]].sum() == 0 and budgets[0].sum() == pytest.approx(4 * 64, abs=4)


def test_importance_per_kv_head_is_that_of_the_layers_that_have_them(make_model: Callable[..., Path]) -> None:
    from pyheadkv.importance_values import fit_heads

    per_kv = np.arange(1.0, 9.0).reshape(4, 2)
    values = fit_heads(per_kv, make_model(WINDOWED))
    assert values.shape == (4, 8) and not values[[0, 2]].any()
    assert values[[1, 3]].tolist() == np.repeat(per_kv[[1, 3]], 4, axis=1).tolist()


@BOTH
def test_a_replay_table_has_shares_of_the_compressed_layers(make_model: Callable[..., Path], shape: Shape, tmp_path: Path) -> None:
    path, shares = make_model(shape), np.array([0.1, 0.5])
    values = np.zeros((2, 4, 2))
    values[0, [1, 3]], values[1, [1, 3]] = [[0.05, 0.15], [0.1, 0.1]], [[0.4, 0.6], [0.5, 0.5]]
    write_replay(path, tmp_path / "m.gguf", ReplayTable(shares, values))
    llm = load(tmp_path / "m.gguf", kv_size=100, preset="default", policy="replay/value", n_ctx=N_CTX)
    llm.read_prompt(tokens(1000))
    cells = llm.kv_stats().n_cells
    assert llm.replay_origin and cells[[0, 2]].sum() == 0 and cells.sum() == pytest.approx(400, abs=4)
    assert cells[1, 0] < cells[3, 0] < cells[1, 1]
    values[:, 0, 0] = 0.1
    with pytest.raises(ValueError, match="gives layer 0 KV head 0 a share, but the layer has 0 that are compressed"):
        write_replay(path, tmp_path / "n.gguf", ReplayTable(shares, values))


# bytes


@BOTH
@pytest.mark.parametrize("n_ubatch", [512, 128])
def test_kv_bytes_counts_what_is_not_compressed(make_model: Callable[..., Path], shape: Shape, n_ubatch: int) -> None:
    options = dict(n_ctx=4096, n_ubatch=n_ubatch, preset="default", policy="snapkv")
    stats = load(make_model(shape), kv_size=64, **options).kv_stats()
    cell = 4 * 2 * 32 * 2  # of all heads
    llm = load(make_model(shape), kv_bytes=stats.bytes_beside + 100 * cell + cell - 1, **options)
    assert llm.kv_options.kv_size == 100 and llm.kv_stats().bytes_beside == stats.bytes_beside > 0
    least = stats.bytes_beside + 9 * cell
    assert load(make_model(shape), kv_bytes=least, **options).kv_options.kv_size == 9
    for n_bytes in (least - 1, stats.bytes_beside // 2):
        with pytest.raises(ValueError, match=f"kv_bytes={n_bytes}: {stats.bytes_beside} bytes are those of .* use at least {least} bytes"):
            load(make_model(shape), kv_bytes=n_bytes, **options)


def test_kv_bytes_of_other_types(make_model: Callable[..., Path]) -> None:
    options = dict(n_ctx=4096, preset="default", policy="snapkv", type_k=8, type_v=8)  # q8_0
    cell = 4 * 2 * 34
    beside = load(make_model(WINDOWED), kv_size=64, **options).kv_stats().bytes_beside
    assert load(make_model(WINDOWED), kv_bytes=beside + 50 * cell, **options).kv_options.kv_size == 50


@BOTH
def test_kv_ratio_is_of_the_compressed_layers(make_model: Callable[..., Path], shape: Shape) -> None:
    llm = load(make_model(shape), kv_ratio=0.25, preset="default", policy="snapkv")
    llm.read_prompt(tokens(400))
    assert llm.kv_stats().n_cells.tolist() == [[0, 0], [100, 100]] * 2
    assert llm.kv_stats().bytes_full == 400 * 4 * 2 * 32 * 2


def test_windowed_layers_hold_their_window_whatever_swa_full_says(make_model: Callable[..., Path]) -> None:
    path, prompt = make_model(WINDOWED), tokens(900)
    found = []
    for more in ({}, {"swa_full": True}, {"swa_full": False}):
        llm = load(path, kv_size=64, preset="default", **more)
        found.append((greedy(llm, prompt, 8), llm.kv_stats().bytes_beside))
    assert found[0] == found[1] == found[2]
    assert found[0][1] == 2 * 1024 * 4 * 32 * 2 * 768 // 1024  # 32 + 512 tokens, rounded up, in two layers


# commands


@BOTH
def test_inspect_says_which_layers_are_compressed(
    make_model: Callable[..., Path], shape: Shape, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_model(shape)
    assert cli.main(["inspect", str(path), "--kv-size", "64", "--n-ctx", str(N_CTX)]) == 0
    out = capsys.readouterr().out
    kind = "2 have windowed attention" if shape is WINDOWED else "2 a recurrent state"
    assert f"2 of 4 are compressed: 1, 3; {kind}\n" in out
    rows = re.findall(r"^ +(\d) \|(.+?)\| +(\d+)$", out, flags=re.MULTILINE)
    assert [(il, cells.split()) for il, cells, _ in rows if il in "02"] == [("0", ["-", "-"]), ("2", ["-", "-"])]
    assert sum(int(n) for _, _, n in rows) == load(path, kv_size=64, preset="default").kv_budget.sum()
    beside = load(path, kv_size=64, n_ctx=N_CTX).kv_stats().bytes_beside
    assert f"{format_bytes(beside)} in the layers that are not compressed" in out


def test_the_heat_map_leaves_other_layers_blank(make_model: Callable[..., Path]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = inspect.draw(inspect.make_plan(make_model(WINDOWED), options=Options(kv_size=64)))
    drawn = [np.ma.filled(axes.images[0].get_array(), np.nan) for axes in figure.axes if axes.images]
    assert len(drawn) == 2
    for values in drawn:
        assert np.isnan(values).all(axis=1).tolist() == [True, False, True, False]
    assert np.nansum(drawn[0]) == pytest.approx(100)


def test_what_cannot_be_compressed_is_refused_with_the_reason(tmp_path: Path, make_model: Callable[..., Path], monkeypatch: Any) -> None:
    path = make_model(WINDOWED)
    refused = layers.Layers(why_not="KV compression is not possible for this context: none of it")
    for module in (layers, inspect):
        monkeypatch.setattr(module, "ask_library", lambda _: refused)
    for refuse in (
        lambda: inspect.make_plan(path, options=Options(kv_size=64)),
        lambda: inspect.make_plan(make_model(SHAPES[0]), options=Options(kv_size=64)),
        lambda: plan.make_plan(path, memory=1 << 30),
        lambda: load(path, kv_bytes="1MiB"),
    ):
        with pytest.raises(ValueError, match="none of it"):
            refuse()


@BOTH
@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_the_plan_of_real_prompts_has_what_is_beside(make_model: Callable[..., Path], shape: Shape, prefill: str) -> None:
    path = make_model(shape)
    with plan.Probe(path) as probe:
        model = plan.MemoryModel(probe, n_predict=64)
        for n_prompt in (1000, 1500):
            llm = load(path, kv_size=64, preset="default", policy="snapkv", prefill=prefill, n_tail=64)
            llm.read_prompt(tokens(n_prompt))
            planned, stats = model.footprint(prefill, n_prompt=n_prompt, kv_size=64), llm.kv_stats()
            assert stats.bytes_peak <= planned.ledger <= 1.01 * stats.bytes_peak + 16384
            assert stats.bytes_beside == planned.beside == model.footprint("stock", n_prompt=n_prompt).beside
            assert planned.total == planned.weights + planned.process + planned.compute + planned.ledger + planned.beside


def test_the_plan_prints_what_is_beside(make_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(make_model(WINDOWED)), "--memory", "256MiB"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  beside +\| +384.00 KiB +384.00 KiB +384.00 KiB$", out, flags=re.MULTILINE)
    assert "2 of 4 layers are not compressed (2 with windowed attention, 0 with a recurrent state)" in out
    assert cli.main(["plan", str(make_model(SHAPES[0])), "--memory", "256MiB"]) == 0
    assert "beside" not in capsys.readouterr().out


def test_header_heads_are_as_the_file_has_them(make_model: Callable[..., Path]) -> None:
    """What the library says is asked for by those who count heads, not by those who recognise a file."""
    header = read_header(make_model(WINDOWED))
    assert header.heads_by_layer() == [(8, 2)] * 4 and layers.heads_by_layer(header) == list(OURS)


# evaluation and scores


@BOTH
def test_a_trial_asks_again_behind_a_compressed_prompt(make_model: Callable[..., Path], shape: Shape) -> None:
    """Copies go back to their prompt, which recurrent states do not without help."""
    path, prompt, rest = make_model(shape), tokens(600), [9, 10, 11]
    trial = Trial(load(path, kv_size=64, preset="default", policy="snapkv", prefill="token", n_seq_max=3))
    settings = [Setting(FULL), Setting("snapkv", 64)]
    copies = [trial.compress(setting, prompt) for setting in settings]
    said = []
    for _ in range(2):
        trial.go_on(copies, len(prompt), rest)
        said.append(trial.generate(copies, rest[-1], 8))
    assert said[0] == said[1] and said[0][0] != said[0][1]
    for kv_size, answer in ((2048, said[0][0]), (64, said[0][1])):
        llm = load(path, kv_size=kv_size, preset="default", policy="snapkv")
        llm.read_prompt(prompt)
        llm.eval(rest)
        found = []
        for _ in range(8):
            found.append(int(llm.last_logits.argmax()))
            llm.eval(found[-1:])
        assert found == answer
    stats = trial.llm.kv_stats()
    assert {copy.held.beside for copy in copies} == {stats.bytes_beside // 3}
    if shape is WINDOWED:
        trial.go_on(copies, len(prompt) - 1, rest)
    else:
        with pytest.raises(RuntimeError, match=f"cannot be truncated to {len(prompt) - 1} tokens: a recurrent state does not go back"):
            trial.go_on(copies, len(prompt) - 1, rest)
    trial.drop(copies)
    assert trial.llm.kv_stats(1).state == trial.llm.kv_stats(2).state == "empty"


@BOTH
def test_scores_are_those_of_the_compressed_layers(make_model: Callable[..., Path], shape: Shape) -> None:
    llm = load(make_model(shape), kv_size=64, policy="snapkv", prefill="token", window=64)
    for reader in (measure.LlamaReader(llm), replay.LlamaReader(llm)):
        assert reader.heads == list(OURS)
    reader = measure.LlamaReader(llm)
    assert reader.shape == (4, 8)
    reader.begin(tokens(300))
    mass, top = reader.attention([(50, 250)], 10, 1)
    assert (top[0] >= 0).all(axis=1).tolist() == (mass[0] > 0).all(axis=1).tolist() == [False, True, False, True]
    assert (top[0, [0, 2]] == -1).all() and not mass[0, [0, 2]].any()


def test_a_replay_counts_the_compressed_layers(make_model: Callable[..., Path]) -> None:
    llm = load(make_model(WINDOWED), kv_size=64, policy="snapkv", prefill="token", window=64)
    reader = replay.LlamaReader(llm)
    text = tokens(200)
    scores = replay.replay_scores(reader, replay.Replay("a", "text", [1], text, [5, 6]), n_chunk=64)
    shares = replay.shares_above(scores, reader.heads)
    assert not shares[:, [0, 2]].any()
    assert shares[:, [1, 3]].mean(axis=(1, 2)) == pytest.approx(replay.SHARES)


def test_generate_says_what_the_other_layers_hold(make_model: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["--kv-size", "16", "--policy", "snapkv"], r" in 2 of 4 layers, [0-9.]+ KiB in the others"),
        ([], r"\(full in 2 of 4 layers\)"),
    ):
        assert cli.main(["generate", str(make_model(WINDOWED)), "-p", "the code is on it", "-n", "4", *options]) == 0
        err = capfd.readouterr().err
        assert re.search(said, err) and "SWA" not in err


def test_reports_of_scores_name_heads_that_are_compressed() -> None:
    values = [[0.0] * 2] * 3 + [[0.5, 0.25]]
    scores = {
        "importance": values,
        "examples": [1],
        "accepted": 1,
        "method": "r2",
        "protocol": "clean",
        "answers": "forced",
        "reliability": 1.0,
    }
    lines = score.report(scores, [(0, 0)] * 3 + [(2, 1)], n_read=1, seconds=1.0).splitlines()
    assert "importance of 1 KV heads" in lines[1]
    assert lines[3].endswith(f"Gini {1 / 6:.3f}; largest, as layer-head: 3-0 0.5  3-1 0.25")


@BOTH
def test_eval_records_what_is_beside(
    make_model: Callable[..., Path], shape: Shape, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.jsonl"
    options = "--tokens 400 --contexts 1 --questions 1 --kv-size 64 --policy snapkv --protocol query-agnostic --raw --jobs 1 --threads 1"
    assert cli.main(["eval", "text", str(make_model(shape)), "-o", str(out), *options.split()]) == 0
    answers = [a for line in out.read_text().splitlines()[1:] for a in json.loads(line)["answers"]]
    (beside,) = {a["bytes_beside"] for a in answers}
    assert {a["setting"] for a in answers} == {"full", "snapkv 64"} and beside > 0
    rows = [[cell.strip() for cell in row.split("|")] for row in out.with_suffix(".md").read_text().splitlines() if row.startswith("| ")]
    (head,) = [row for row in rows if "beside" in row]
    assert {row[head.index("beside")] for row in rows if row[1] in ("full", "snapkv 64") and len(row) == len(head)} == {
        f"{beside / 1024:.0f}"
    }
    for protocol in ("query-aware", "query-agnostic,archived"):
        code = cli.main(["eval", "text", str(make_model(shape)), "-o", str(out), "--force", *options.split(), "--protocol", protocol])
        said = f"--protocol={protocol}: 2 layers of the model have a recurrent state" in capsys.readouterr().err
        assert (code, said) == ((0, False) if shape is WINDOWED else (1, True))
