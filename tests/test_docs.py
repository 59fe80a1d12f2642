"""The README stays short, its first snippet runs, and what the documents link to is there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
if not README.is_file():
    pytest.skip("no documents beside the tests", allow_module_level=True)
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "bench" / "README.md",
    ROOT / "cpp" / "README.md",
    ROOT / "patches" / "README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
    of_the_site = {"docs/index.md", "docs/api.md"}
    assert page != README or {f"docs/{name.name}" for name in (ROOT / "docs").glob("*.md")} - of_the_site <= set(links)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_results_that_a_page_names_are_there(page: Path) -> None:
    results = {path.name for path in (ROOT / "bench" / "results").rglob("*")}
    names = re.findall(r"(?<![\w/.*-])((?:decode|prefill|score|server|attend|allocate|kv)_\w+\.csv)\b", page.read_text(encoding="utf-8"))
    assert set(names) <= results
    assert page.name != "results.md" or len(set(names)) > 8


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) < 700


def test_the_first_snippet_runs_on_a_model_without_importance(
    make_model: Callable[..., Path], library: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    path = make_model(SHAPES[1], importance=None)
    (path.parent / "model.gguf").symlink_to(path)
    monkeypatch.chdir(path.parent)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["llm"].kv_stats().state == "compressed" and "KVStats" in capsys.readouterr().out
