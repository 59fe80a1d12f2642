"""The console script: output, exit codes and messages, on a random model of two layers."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

try:
    import pyheadkv
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from pyheadkv import cli
from pyheadkv.cli import generate as generate_command
from pyheadkv.cli import inspect
from pyheadkv.importance import find_importance
from pyheadkv.options import Options
from pyheadkv.testing import random_importance, write_random_model
from pyheadkv.units import format_bytes

N_LAYER, N_HEAD, N_HEAD_KV, N_EMBD_HEAD = 2, 4, 2, 16
SHAPE: dict[str, Any] = {
    "n_layer": N_LAYER,
    "n_embd": 64,
    "n_head": N_HEAD,
    "n_head_kv": N_HEAD_KV,
    "n_ff": 96,
    "n_ctx_train": 1024,
    "seed": 3,
}
PROMPT = "the code of the and in " * 12  # 10 tokens and more per repetition
STATS = re.compile(r"prompt (\d+) tokens, [\d.]+ tokens/s \| generated (\d+) tokens, [\d.]+ tokens/s \| KV cache ([\d.]+ \w+)")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with importance inside."""
    path = tmp_path_factory.mktemp("cli") / "with-importance.gguf"
    write_random_model(path, importance="random", **SHAPE)
    return path


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without importance."""
    path = tmp_path_factory.mktemp("cli") / "plain.gguf"
    write_random_model(path, **SHAPE)
    return path


def generate(*args: str | Path, n: int = 5) -> int:
    return cli.main(["generate", "-n", str(n), "--threads", "1", *map(str, args)])


def budgets_of(table: str) -> np.ndarray:
    """(n_layer, n_head_kv) numbers in the cells of the table, and whether the row sums fit."""
    rows = [line.split("|") for line in table.splitlines() if re.match(r" *\d+ \|", line)]
    budget = np.array([[int(n) for n in re.findall(r" (\d+)(?= |$)", cells)] for _, cells, _ in rows])
    assert [int(total) for _, _, total in rows] == budget.sum(axis=1).tolist()
    return budget


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a failed run: one line and nothing on standard output."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pyheadkv: error: ")
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


# generate


@pytest.mark.parametrize("kv_size", [None, 16, 64])
def test_generate_prints_text_and_numbers(model: Path, capsys: pytest.CaptureFixture[str], kv_size: int | None) -> None:
    options = [] if kv_size is None else ["--kv-size", str(kv_size)]
    assert generate(model, "-p", PROMPT, *options) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    found = STATS.search(err)
    assert found is not None, err
    assert int(found[1]) > 50 and int(found[2]) >= 5  # an incomplete UTF-8 sequence is finished
    assert ("held, full" in err) == (kv_size is not None)


def test_generate_gives_the_text_of_the_library(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "-p", PROMPT, "--kv-size", "16", "--window", "4", n=12) == 0
    llm = pyheadkv.Llama(model, kv_size=16, window=4, n_ctx=512, verbose=False, n_threads=1, n_threads_batch=1)
    completion: Any = llm.create_completion(PROMPT, max_tokens=12, temperature=0)
    expected = completion["choices"][0]["text"]
    assert capsys.readouterr().out == expected + "\n"


def test_generate_reads_the_prompt_in_steps(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "-p", PROMPT, "--kv-size", "16") == 0
    whole = capsys.readouterr().out
    assert generate(model, "-p", PROMPT, "--kv-size", "16", "--n-batch", "7") == 0
    out, err = capsys.readouterr()
    assert out == whole
    assert STATS.search(err)


def test_generate_takes_the_prompt_from_file_and_standard_input(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate(model, "-p", PROMPT) == 0
    expected = capsys.readouterr().out
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    assert generate(model, "-f", file) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert generate(model) == 0
    assert capsys.readouterr().out == expected


def test_generate_keeps_what_it_is_told_to(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    summary = generate_command._kv_summary

    def look(llm: pyheadkv.Llama, path: Path) -> str:
        kept.append((llm.kv_options, [llm.kv_positions(il, ih) for il in range(N_LAYER) for ih in range(N_HEAD_KV)]))
        return summary(llm, path)

    monkeypatch.setattr(generate_command, "_kv_summary", look)
    options = [
        "--policy",
        "snapkv",
        "--kv-size",
        "32",
        "--sinks",
        "3",
        "--protect",
        "20:24",
        "--protect",
        "40:41",
        "--surplus",
        "redistribute",
    ]
    assert generate(model, "-p", PROMPT, *options) == 0
    ((chosen, positions),) = kept
    assert (chosen.sinks, chosen.protect, chosen.surplus) == (3, ((20, 24), (40, 41)), "redistribute")
    assert all({0, 1, 2, 20, 21, 22, 23, 40} <= set(head.tolist()) for head in positions)
    assert re.search(r"KV cache 3[67] cells per head", capsys.readouterr().err)  # four or five of them generated


def test_generate_bounds_what_it_says(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kv-size", "32", "--window", "8", "--kv-generated", "12", "--kv-generated-slack", "4", "--kv-generated-rank", "recent"]
    assert generate(model, "-p", PROMPT, *options, "--kv-generated-scope", "all", n=40) == 0
    found = re.search(r"KV cache (\d+) cells per head.*, (\d+) evictions", capsys.readouterr().err)
    assert found and int(found[1]) <= 32 + 12 + 4 and int(found[2]) >= 3


@pytest.mark.parametrize("amount", [["--kv-ratio", "0.25"], ["--kv-bytes", "4KiB"]])
def test_generate_takes_a_share_or_bytes(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, amount: list[str]
) -> None:
    sizes: list[int] = []
    summary = generate_command._kv_summary

    def look(llm: pyheadkv.Llama, path: Path) -> str:
        sizes.extend([len(llm.kv_positions(0, 0)), llm.kv_stats().n_prompt])
        return summary(llm, path)

    monkeypatch.setattr(generate_command, "_kv_summary", look)
    assert generate(model, "-p", PROMPT, "--policy", "snapkv", "--preset", "paper", *amount) == 0
    n_cells, n_prompt = sizes
    cell = N_LAYER * N_HEAD_KV * 2 * N_EMBD_HEAD * 2
    assert n_cells == (round(0.25 * n_prompt) if amount[0] == "--kv-ratio" else 4096 // cell)
    assert f"KV cache {n_cells + 4} cells per head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-size", "16", "--kv-ratio", "0.1"], ["kv_size=16", "kv_ratio=0.1", "one of them"]),
        (["--kv-ratio", "1.5"], ["kv_ratio=1.5"]),
        (["--kv-bytes", "3 cats"], ["kv_bytes='3 cats'", "512MiB"]),
        (["--kv-size", "16", "--protect", "5"], ["--protect='5'", "START:END"]),
        (["--kv-size", "16", "--protect", "5:5"], ["protect end=5"]),
        (["--kv-size", "16", "--sinks", "-1"], ["sinks=-1"]),
        (["--kv-size", "0"], ["kv_size=0", "9"]),
        (["--kv-size", "-1"], ["kv_size=-1"]),
        (["--kv-size", "8"], ["kv_size=8", "recent"]),
        (["--kv-size", "300", "--n-ctx", "200"], ["300", "256"]),
        (["--kv-size", "16", "--beta", "nan"], ["beta=nan"]),
        (["--kv-size", "16", "--beta", "1"], ["beta=1"]),
        (["--kv-size", "16", "--pool-kernel", "4"], ["pool_kernel=4", "odd"]),
        (["--kv-size", "16", "--importance", "no-such-file.json"], ["no-such-file.json"]),
        (["--threads", "0"], ["--threads=0"]),
        (["--policy", "snapkv"], ["policy='snapkv'", "kv_size"]),
        (["--sinks", "4", "--prefill", "layer"], ["prefill='layer'", "sinks=4", "kv_size"]),
        (["--protect", "0:4"], ["protect=", "kv_size"]),
        (["--n-ctx", "32", "-p", 9 * PROMPT], ["context", "256"]),
    ],
)
def test_generate_refuses_wrong_options_in_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert generate(model, *([] if "-p" in options else ["-p", PROMPT]), *options) == 1
    message = error_line(capsys)
    assert all(word in message for word in words), message


def test_generate_refuses_what_it_cannot_read(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    cases: list[list[str | Path]] = [
        [tmp_path / "none.gguf", "-p", "a"],
        [broken, "-p", "a"],
        [broken, "-p", "a", "--kv-size", "16", "--n-ctx", "64"],
        [model, "-p", " "],
        [model, "-f", tmp_path / "none.txt"],
    ]
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin1"))
    for source, where in ((["-f", latin], str(latin)), (["-p", "caf\udce9"], "-p")):
        assert generate(model, *source) == 1
        message = error_line(capsys)
        assert f"the prompt from {where} is not UTF-8" in message and "iconv" in message
    for args in cases:
        assert generate(*args) == 1
        error_line(capsys)
    for name in ("", tmp_path):
        for command in (["generate", model, "-f", name], ["inspect", model, "--prompt", name]):
            assert cli.main([str(arg) for arg in command]) == 1
            assert f"the prompt from {str(name)!r}: it must be a file of text in UTF-8" in error_line(capsys)
    assert generate(model, "-p", "a", n=0) == 1
    assert "-n=0" in error_line(capsys)


def test_generate_without_importance_names_the_remedies(plain_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(plain_model, "-p", PROMPT, "--kv-size", "16", "--policy", "headkv") == 1
    assert "pyheadkv score" in error_line(capsys)
    assert generate(plain_model, "-p", PROMPT, "--kv-size", "16") == 0


# inspect


@pytest.mark.parametrize("kv_size", [16, 128])
def test_inspect_prints_the_budgets_of_the_engine(model: Path, capsys: pytest.CaptureFixture[str], kv_size: int) -> None:
    assert cli.main(["inspect", str(model), "--kv-size", str(kv_size)]) == 0
    out = capsys.readouterr().out
    llm = pyheadkv.Llama(model, kv_size=kv_size, n_ctx=256, verbose=False)
    budget = budgets_of(out)
    assert np.array_equal(budget, llm.kv_budget)
    assert f"importance  {find_importance(model).origin}; Gini" in out
    assert f"{budget.sum()} cells, mean {budget.mean():.2f}" in out
    n_bytes = int(budget.sum()) * 2 * N_EMBD_HEAD * 2
    n_bytes_full = 1024 * N_LAYER * N_HEAD_KV * 2 * N_EMBD_HEAD * 2
    held, full = format_bytes(n_bytes), format_bytes(n_bytes_full)
    assert f"{held} after a prompt of 1024 tokens, full cache {full}" in out


def test_inspect_counts_no_more_cells_than_the_prompt_has(model: Path) -> None:
    options = Options(kv_size=100)
    plan = inspect.make_plan(model, options=options, n_ctx=100)
    assert plan.budget.max() > 100
    assert plan.n_bytes <= plan.n_bytes_full


def test_inspect_writes_a_png(model: Path, plain_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name, args in (("a.png", [model]), ("b.png", [plain_model, "--policy", "snapkv"])):
        assert cli.main(["inspect", *map(str, args), "-o", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(PNG_MAGIC)
    assert cli.main(["inspect", str(model), "-o", str(tmp_path / "no-folder" / "a.png")]) == 1
    assert "no-folder" in capsys.readouterr().err


def test_inspect_takes_importance_from_another_file(
    model: Path, plain_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(model)]) == 0
    expected = budgets_of(capsys.readouterr().out)
    assert cli.main(["inspect", str(plain_model), "--importance", str(model)]) == 0
    assert np.array_equal(budgets_of(capsys.readouterr().out), expected)
    scores = tmp_path / "scores.json"
    values = random_importance(n_layer=N_LAYER, n_head=N_HEAD, seed=SHAPE["seed"])
    scores.write_text(f'{{"importance": {values.tolist()}}}')
    assert cli.main(["inspect", str(plain_model), "--importance", str(scores)]) == 0
    assert np.array_equal(budgets_of(capsys.readouterr().out), expected)


def test_inspect_without_importance_offers_snapkv(plain_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(plain_model), "--policy", "headkv"]) == 1
    message = error_line(capsys)
    assert "pyheadkv score" in message and "--policy snapkv" in message
    for policy, taken in (("auto", "adakv"), ("snapkv", "snapkv")):
        assert cli.main(["inspect", str(plain_model), "--policy", policy, "--kv-size", "40"]) == 0
        out = capsys.readouterr().out
        assert (budgets_of(out) == 40).all() and f"policy {taken}" in out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--kv-size", "8"], "kv_size=8"),
        (["--kv-size", "2000"], "n_ctx=1024"),
        (["--beta", "0.5"], "beta=0.5"),
        (["--n-ctx", "0"], "n_ctx=0"),
        (["--window", "257"], "window=257"),
        (["--power", "3"], "power=3"),
        (["--recent", "0"], "recent=0"),
    ],
)
def test_inspect_refuses_wrong_options_in_one_line(model: Path, capsys: pytest.CaptureFixture[str], options: list[str], word: str) -> None:
    assert cli.main(["inspect", str(model), *options]) == 1
    assert word in error_line(capsys)


def test_inspect_refuses_files_that_are_no_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong_shape = tmp_path / "wrong-shape.json"
    wrong_shape.write_text('{"importance": [[1.0, 2.0]]}')
    assert cli.main(["inspect", str(model), "--importance", str(wrong_shape)]) == 1
    error_line(capsys)
    for n_bytes in (0, 3, 100, 2000):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(model.read_bytes()[:n_bytes])
        assert cli.main(["inspect", str(broken)]) == 1
        assert "broken.gguf" in error_line(capsys)


def test_gini_and_top_shares_of_known_values() -> None:
    assert inspect.gini(np.ones((3, 5))) == pytest.approx(0)
    one = np.zeros((4, 25))
    one[2, 7] = 3.0
    assert inspect.gini(one) == pytest.approx(0.99)
    assert inspect.top_shares(np.ones((4, 25))) == pytest.approx({1: 0.01, 5: 0.05, 10: 0.1, 25: 0.25})
    assert inspect.top_shares(np.array([[3.0, 1.0]])) == pytest.approx({1: 0.75})


def test_printable_falls_back_on_ascii(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["inspect", str(model)]) == 0


# the script itself


def test_version_and_help_exit_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--version"], ["--help"], *([command.name, "--help"] for command in cli.COMMANDS)):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(args)
        assert exit_info.value.code == 0
    assert f"pyheadkv {pyheadkv.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["eval", "niah", "m.gguf", "--policy", "snapkv", "-o", "x"], ["eval", "niah", "--policy", "snapkv", "m.gguf", "-o", "x"]]
)
def test_a_model_may_stand_behind_options(words: list[str]) -> None:
    args = cli.parse(words)
    assert (args.task, args.model, args.policy) == ("niah", "m.gguf", "snapkv")


def test_a_second_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["eval", "niah", "m.gguf", "--policy", "snapkv", "other.gguf", "-o", "x"])
    assert "unrecognized arguments: other.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--kv-sise", "--kv-sise=64"])
def test_an_unknown_flag_names_the_nearest_one(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["generate", "-p", "a", flag])
    assert exit_info.value.code == 2
    assert "did you mean '--kv-size'" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generate_command.Meter, "_show_step", interrupt)
    monkeypatch.setattr(generate_command.Meter, "_counted_decode", interrupt)
    assert generate(model, "-p", PROMPT, "--kv-size", "16") == 130
    assert generate(model, "-p", PROMPT) == 130


def test_a_reader_that_leaves_is_no_traceback(model: Path) -> None:
    command = [sys.executable, "-m", "pyheadkv.cli", "inspect", str(model)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert "Traceback" not in run.stderr.read().decode() and run.wait() == 1
