"""What the tools of a developer repeat agrees: stage words, hooks, packages of the build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import STAGES

TESTS = Path(__file__).parent
ROOT = TESTS.parent
if not (ROOT / "Makefile").is_file():
    pytest.skip("no Makefile beside the tests", allow_module_level=True)


def recipe(target: str) -> list[str]:
    """Commands of a target of the Makefile."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found is not None
    return [line.replace("$(BIN)", ".venv/bin").strip() for line in found[1].splitlines()]


def test_stage_words_are_those_of_the_data_path() -> None:
    table = (ROOT / "cpp" / "README.md").read_text(encoding="utf-8")
    assert list(STAGES) == re.findall(r"^\| (\w+) \| [^|]+ \| `headkv-", table, flags=re.MULTILINE)


@pytest.mark.parametrize("word", STAGES)
def test_every_part_of_a_stage_is_in_a_file_or_name_of_a_test(word: str) -> None:
    names = [
        f"{path.name}::{name}"
        for path in TESTS.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    assert [part for part in STAGES[word] if not any(part in name for name in names)] == []


def test_hooks_run_what_make_check_runs() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"^ +entry: (.*)$", hooks, flags=re.MULTILINE) == recipe("check")


def test_make_installs_what_the_build_needs() -> None:
    (line,) = [line for line in recipe(r"\$\(VENV\)/\.tools") if "scikit-build-core" in line]
    (wanted,) = re.findall(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(re.findall(r'"([^"]+)"', line)) == sorted(set(re.findall(r'"([^"]+)"', wanted)) - {"pip"})
