"""Who may import whom: inference needs no command, no evaluation, and no package that pip does not install with it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pyheadkv"
RUNTIME = ""  # the modules of the package itself
ROOMS = {  # and the rooms that each may use beside itself
    RUNTIME: (),
    "testing": (RUNTIME,),
    "eval": (RUNTIME,),
    "score": (RUNTIME, "eval"),
    "cli": (RUNTIME, "eval", "score"),
}
NEEDED = {"numpy", "gguf", "llama_cpp", "platformdirs"}  # of other packages, at run time
EXTRA = {"matplotlib", "scipy", "tabulate"}  # what the extra "eval" installs
OTHERS = {
    RUNTIME: NEEDED,
    "testing": NEEDED,
    "eval": NEEDED | {"jinja2", *EXTRA},  # llama-cpp-python needs jinja2
    "score": NEEDED | {"tqdm"},
    "cli": NEEDED | {"tqdm", "matplotlib"},
}
DRAWS = {"pyheadkv.picture": {"matplotlib"}}  # and what one module needs of the extra, when it is called
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if "lib" not in path.relative_to(PACKAGE).parts]


def imported(source: str, name: str) -> Iterator[str]:
    """Dotted names of all that a module imports, anywhere in it; ``name`` is the module's own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    return next((part for part in name.split(".")[1:2] if part in ROOMS), RUNTIME)


def faults(source: str, name: str) -> list[str]:
    """What a module imports and may not."""
    mine, wrong = room_of(name), []
    for other in imported(source, name):
        top = other.split(".")[0]
        if top == "pyheadkv":
            is_wrong = room_of(other) not in (mine, *ROOMS[mine])
        else:
            is_wrong = top not in sys.stdlib_module_names and top not in OTHERS[mine] | DRAWS.get(name, set())
        wrong += [other] * is_wrong
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_what_its_room_may(path: Path) -> None:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)  # of __init__ too: it is beside what it imports
    assert faults(path.read_text(encoding="utf-8"), name) == []


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("pyheadkv.llama", "from .cli.inspect import gini", "pyheadkv.cli.inspect.gini"),
        ("pyheadkv.llama", "def f():\n    from . import score", "pyheadkv.score"),
        ("pyheadkv.__init__", "from .eval import trial", "pyheadkv.eval.trial"),
        ("pyheadkv.options", "import pyheadkv.testing.reference", "pyheadkv.testing.reference"),
        ("pyheadkv.options", "if x:\n    from tqdm import tqdm", "tqdm.tqdm"),
        ("pyheadkv.eval.run", "from ..cli import arguments", "pyheadkv.cli.arguments"),
        ("pyheadkv.eval.run", "from pyheadkv.score.examples import Slot", "pyheadkv.score.examples.Slot"),
        ("pyheadkv.score.measure", "from .. import cli", "pyheadkv.cli"),
        ("pyheadkv.cli.demo", "import torch", "torch"),
    ],
)
def test_an_import_that_may_not_be_is_found(name: str, source: str, wrong: str) -> None:
    allowed = "import os\nimport numpy as np\nfrom . import __version__\n"
    assert faults(allowed + source, name) == [wrong]


def test_rooms_are_the_folders_of_the_package() -> None:
    assert {path.parent.name for path in MODULES if path.parent != PACKAGE} == set(ROOMS) - {RUNTIME}


def test_what_inference_imports_is_what_pip_installs_with_it() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^\w-]", text)[0].replace("-", "_") for text in project["dependencies"]}
    assert {"llama_cpp_python", *NEEDED} - {"llama_cpp"} <= names
    assert "tqdm" in names
    assert {re.split(r"[^\w-]", text)[0] for text in project["optional-dependencies"]["eval"]} == EXTRA


LOADED = """
import sys, pyheadkv
assert not any(name == "llama_cpp" for name in sys.modules)
print(pyheadkv.Llama.__name__)
print(*sorted(sys.modules))
"""


def test_a_fresh_interpreter_loads_no_command_and_no_evaluation(library: None) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LOADED], env=env, capture_output=True, text=True, check=True)
    llama, modules = done.stdout.splitlines()
    loaded = modules.split()
    assert llama == "Llama" and "pyheadkv.llama" in loaded
    rooms = [f"pyheadkv.{room}" for room in ROOMS if room]
    unwanted = re.compile("|".join(rf"{re.escape(name)}(\..*)?" for name in (*EXTRA, "tqdm", "pytest", *rooms)))
    assert [name for name in loaded if unwanted.fullmatch(name)] == []
