"""The pages become a site without a warning: its notebook runs, its links lead somewhere, and commands on the pages are those of the program."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import SHAPES
from test_docs import PAGES, ROOT

pyheadkv = pytest.importorskip("pyheadkv", reason="pyheadkv is not installed")
pytest.importorskip("pyheadkv._lib", reason="the library is not built: run make")

from pyheadkv import _lib, cli  # noqa: E402
from pyheadkv.cli import demo_model  # noqa: E402


@pytest.fixture(scope="module")
def site(make_model: Callable[..., Path], library: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; its notebook is run with SmolLM2 where ``pyheadkv demo --fetch`` has kept it, else with a random model."""
    pytest.importorskip("sphinx", reason='sphinx is not installed: pip install ".[docs]"')
    out = tmp_path_factory.mktemp("site")
    kept = demo_model.kept_path()
    model = kept if kept.is_file() else make_model(SHAPES[1])
    env = {**os.environ, "PYHEADKV_MODEL": str(model), "MPLBACKEND": "agg"}
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        str(out / "doctrees"),
        "docs",
        str(out / "html"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_the_notebook_shows_pictures_and_the_text(site: Path) -> None:
    page = (site / "what_is_kept.html").read_text(encoding="utf-8")
    assert page.count('class="pyheadkv"') == 3 and "The pass key of the north gate" in page
    assert len(re.findall(r"<img[^>]* src=\"_images/[^\"]+\.png\"", page)) == 1
    assert re.search(r"policy \w+: \d+ cells", page) and "Traceback" not in page


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads((ROOT / "docs" / "what_is_kept.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    n_links = 0
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            path, _, anchor = unquote(unescape(link)).partition("#")
            if re.match(r"\w+:", path):
                continue
            target = site / path.split("?")[0] if path else page
            assert target.is_file(), f"{page.name}: {link}"
            if anchor and target.suffix == ".html":
                assert f'id="{anchor}"' in target.read_text(encoding="utf-8"), f"{page.name}: {link}"
            n_links += 1
    assert n_links > 300


def test_the_reference_has_what_is_public(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    names = [name for name, value in vars(pyheadkv.Llama).items() if not name.startswith("_") and inspect.getdoc(value)]
    assert len(names) > 15
    assert [name for name in names if f'id="pyheadkv.Llama.{name}"' not in page] == []
    assert all(f'id="pyheadkv.{name}"' in page for name in ("Llama", "KVStats", "KVText"))


def _commands(page: Path) -> list[str]:
    """Commands of ours on a page, in blocks and within lines, but those with something left out."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?!python|\{)\w*\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = (re.match(r"(?:\$ )?(?:\.venv/bin/)?pyheadkv ([a-z]+ .*)", line.strip()) for line in [*lines, *spans])
    return [match[1] for match in found if match and ".." not in match[1]]


COMMANDS = [(page, command) for page in PAGES for command in _commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda x: x.name if isinstance(x, Path) else x)
def test_commands_have_the_options_of_the_program(page: Path, command: str) -> None:
    args = shlex.split(command.partition(" > ")[0], comments=True)
    if args[0] != "serve":
        assert cli.parse(args).run
        return
    server = _lib.library_path() / "llama-server"
    if not server.is_file():
        pytest.skip("the library has no llama-server")
    known = subprocess.run([server, "--help"], capture_output=True, text=True, check=True).stdout
    assert [arg for arg in args if arg.startswith("-") and not re.search(rf"(?<![\w-]){re.escape(arg)}(?![\w-])", known)] == []


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 12 and len({page for page, _ in COMMANDS}) > 6
