"""Pictures of what a cache holds: they hold the positions that the library reports, and nothing of a text becomes HTML."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SHAPES

pyheadkv = pytest.importorskip("pyheadkv", reason="pyheadkv is not installed")
pytest.importorskip("pyheadkv._lib", reason="the library is not built: run make")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from pyheadkv import cli  # noqa: E402
from pyheadkv.picture import read_held  # noqa: E402

N_TOKENS, KV_SIZE, N_ANSWER = 300, 24, 7


@pytest.fixture(scope="module")
def llm(make_model: Callable[..., Path], library: None) -> Iterator[pyheadkv.Llama]:
    llm = pyheadkv.Llama(make_model(SHAPES[1]), kv_size=KV_SIZE, n_ctx=512, n_threads=1, verbose=False)
    llm.read_prompt(np.random.default_rng(1).integers(3, llm.n_vocab(), N_TOKENS).tolist())
    for token in range(4, 4 + N_ANSWER):
        llm.eval([token])
    yield llm
    llm.close()


def test_the_text_shows_the_positions_of_the_library(llm: pyheadkv.Llama) -> None:
    budget = llm.kv_budget
    expected = np.zeros(N_TOKENS + N_ANSWER, dtype=int)
    for il, ih in np.argwhere(budget > 0):
        one = np.zeros_like(expected)
        one[llm.kv_positions(il, ih)] = 1
        one[N_TOKENS:] = 1  # generated, and held by all
        assert np.array_equal(llm.kv_text(il, ih).n_heads, one)
        expected += one
    text = llm.kv_text()
    assert np.array_equal(text.n_heads, expected) and text.n_heads_max == np.count_nonzero(budget)
    assert text.n_prompt == N_TOKENS and len(text.pieces) == N_TOKENS + N_ANSWER
    assert np.array_equal(sum(llm.kv_text(il).n_heads for il in range(len(budget))), expected)
    assert 0 < expected[:N_TOKENS].min(initial=99, where=expected[:N_TOKENS] > 0) < text.n_heads_max  # some heads hold what others do not


def test_the_page_has_the_text_once_in_runs_of_its_shades(llm: pyheadkv.Llama, tmp_path: Path) -> None:
    text = llm.kv_text()
    text.save(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_bytes().decode()
    spans = re.findall(r'<span class="k\d( answer)?" title="tokens? (\d+)(?: to (\d+))?: (\d+) of (\d+) KV heads">([^<]*)</span>', page)
    shown = np.concatenate([np.full(int(last or first) - int(first) + 1, int(n)) for _, first, last, n, _, _ in spans])
    assert np.array_equal(shown, text.n_heads) and {int(n) for *_, n, _ in spans} == {text.n_heads_max}
    assert "".join(html.unescape(piece) for *_, piece in spans) == "".join(text.pieces)
    assert min(int(first) for answer, first, *_ in spans if answer) == N_TOKENS
    assert text.title in html.unescape(page) and "http" not in page


def test_what_is_kept_has_an_ellipsis_for_what_is_not(llm: pyheadkv.Llama) -> None:
    text = llm.kv_text()
    every = text.kept(text.n_heads_max)
    assert every.endswith("".join(text.pieces[N_TOKENS:])) and " … " in every
    assert len(every) < len(str(text)) < len("".join(text.pieces))
    with pytest.raises(ValueError, match="n_heads=0"):
        text.kept(0)


def test_a_text_is_no_html(make_model: Callable[..., Path], library: None) -> None:
    llm = pyheadkv.Llama(make_model(SHAPES[1]), kv_size=KV_SIZE, n_ctx=512, n_threads=1, verbose=False)
    prompt = "<script>alert('1')</script> & <b>\"é世界</b>" * 3
    llm.read_prompt(llm.tokenize(prompt.encode()))
    text = llm.kv_text()
    assert "".join(text.pieces).endswith(prompt)  # characters of several tokens too
    page = text._repr_html_()
    assert not re.search(r"<(script|b)\b", page) and "&lt;" in page
    llm.close()


def test_the_plot_shows_cells_and_positions(llm: pyheadkv.Llama) -> None:
    figure = llm.kv_plot()
    cells, where = (axes.images[0] for axes in figure.axes[:2])
    assert np.array_equal(cells.get_array(), llm.kv_stats().n_cells)
    held = read_held(llm)
    n_tokens = np.histogram(np.arange(held.n_past), np.linspace(0, held.n_past, where.get_array().shape[1] + 1))[0]
    n_heads = (held.n_cells > 0).sum(axis=1)
    assert (where.get_array().filled() / 100 * n_tokens).sum(axis=1) * n_heads == pytest.approx(held.n_cells.sum(axis=1))
    assert held.summary in figure.get_suptitle() and figure._repr_png_().startswith(b"\x89PNG")
    held_bytes = llm.kv_stats().bytes_full * held.n_cells.sum() / (n_heads.sum() * held.n_past)
    assert held.bytes == pytest.approx(held_bytes, abs=1)


def test_a_cell_that_stands_for_many_is_no_token(make_model: Callable[..., Path], library: None) -> None:
    llm = pyheadkv.Llama(make_model(SHAPES[1]), kv_size=KV_SIZE, policy="razor", n_ctx=512, n_threads=1, verbose=False)
    llm.read_prompt(np.random.default_rng(1).integers(3, llm.n_vocab(), N_TOKENS).tolist())
    held = read_held(llm)
    assert any(len(held.positions[i]) == held.n_cells[head] - 1 for i, head in enumerate(held.heads))
    assert all(positions.min() >= 0 for positions in held.positions)
    llm.close()


def test_what_cannot_be_shown_is_refused(make_model: Callable[..., Path], library: None, llm: pyheadkv.Llama) -> None:
    for args, message in (
        (dict(head=0), "head=0 without layer"),
        (dict(layer=99), "layer=99"),
        (dict(layer=0, head=99), "head=99"),
        (dict(tokens=[1, 2]), "2 tokens: sequence 0 has 307"),
        (dict(tokens=[999999] * 307), r"tokens\[0\] *= *999999"),
        (dict(tokens=[-1] * 307), r"tokens\[0\] *= *-1"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.kv_text(**args)
    fresh = pyheadkv.Llama(make_model(SHAPES[1]), kv_size=KV_SIZE, n_ctx=512, n_threads=1, verbose=False)
    for look in (fresh.kv_text, fresh.kv_plot):
        with pytest.raises(ValueError, match="evaluate a prompt first|compressed"):
            look()
    fresh.close()
    stock = pyheadkv.Llama(make_model(SHAPES[1]), n_ctx=512, n_threads=1, verbose=False)
    with pytest.raises(ValueError, match="kv_size"):
        stock.kv_text()
    stock.close()


@pytest.mark.parametrize("is_chat", [False, True])
def test_inspect_shows_what_is_held_of_a_file(
    make_model: Callable[..., Path], library: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_chat: bool
) -> None:
    model = make_model(SHAPES[1])
    (tmp_path / "text.txt").write_text("a b <c> " * 60)
    command = ["inspect", str(model), "--prompt", str(tmp_path / "text.txt"), "--kv-size", "24", *["--chat"] * is_chat]
    assert cli.main([*command, "-o", str(tmp_path / "a.html")]) == 0
    out = capsys.readouterr().out
    rows = np.array([[int(n) for n in re.findall(r" \S +(\d+)", row)] for row in re.findall(r"^ +\d+ \|(.*) \| +\d+$", out, re.M)])
    cells = int(re.findall(r"held +(\d+) of", out)[0])
    assert rows.sum() == cells > 0 and "&lt;c&gt;" in (tmp_path / "a.html").read_text()
    assert cli.main([*command, "-o", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--chat"], "--chat without --prompt"),
        (["--prompt", "TEXT", "-o", "a.gif"], "a.gif"),
        (["--prompt", "EMPTY"], "empty"),
        (["--prompt", "TEXT", "--n-ctx", "256", "--kv-size", "999"], "kv_size=999"),
    ],
)
def test_inspect_refuses_in_one_line(
    make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], word: str
) -> None:
    (tmp_path / "TEXT").write_text("a b c d " * 40)
    (tmp_path / "EMPTY").write_text(" \n")
    options = [str(tmp_path / name) if (tmp_path / name).exists() else name for name in options]
    assert cli.main(["inspect", str(make_model(SHAPES[1])), *options]) == 1
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1


def test_a_page_is_written_through_links_and_into_files_alone(llm: pyheadkv.Llama, tmp_path: Path) -> None:
    text = llm.kv_text()
    (tmp_path / "real.html").write_text("")
    (tmp_path / "real.html").chmod(0o600)
    (tmp_path / "link.html").symlink_to("real.html")
    text.save(tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "real.html").stat().st_mode & 0o777 == 0o600
    assert text.title in html.unescape((tmp_path / "real.html").read_text())
    os.mkfifo(tmp_path / "pipe.html")
    with pytest.raises(ValueError, match="no regular file"):
        text.save(tmp_path / "pipe.html")
    assert not [path for path in tmp_path.iterdir() if ".part" in path.name]


def test_inspect_shows_what_a_policy_holds_that_keeps_all(
    make_model: Callable[..., Path], library: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("a b c " * 40)
    command = ["inspect", str(make_model(SHAPES[1])), "--prompt", str(tmp_path / "text.txt")]
    assert cli.main([*command, "--policy", "lossless"]) == 0
    assert "(100.0%)" in capsys.readouterr().out
    assert cli.main([*command, "--kv-size", "24", "--n-ctx", "230"]) == 0  # a context of 256
    assert cli.main([*command[:2], "-o", str(tmp_path / "a.html")]) == 1
    assert "--prompt FILE" in capsys.readouterr().err
