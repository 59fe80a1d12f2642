"""The patches: call sites only, complete headers, applying without fuzz to the pinned tree."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

PATCHES = Path(__file__).resolve().parents[1] / "patches"
GUARDED = (
    "}",
    "return inp;",
    "return cur;",
    "return mem;",
    "return true;",
    "return false;",
    "return;",
    "prompt_clear();",
    "return build_attn(inp_kv, wo, wo_b, wo_s, q_cur, k_cur, v_cur, kq_b, sinks, v_mla, kq_scale, il);",
)
FIELDS = ("Subject: ", "Why: ", "Hooks: ", "Drop-when: ", "Test: ")


def apply_module() -> ModuleType:
    """patches/apply.py as a module."""
    spec = importlib.util.spec_from_file_location("apply", PATCHES / "apply.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SERIES = apply_module().series()
# lines of patches that call nothing of ours: they do what upstream does everywhere else, or mend what gives wrong answers
REPLACED = {
    "lfm2-take-states-from-input.patch": {
        "const auto * mctx_cur = static_cast<const mem_hybrid_ctx *>(mctx)->get_recr();": "const auto * mctx_cur = inp_recr->mctx;"
    },
    "ggml-amx-share-weights.patch": {
        "const int M = dst->ne[1];": "const int M = ggml_nrows(dst);",
        "const int64_t n_batch = ne2 * dst->ne[3];": "const int64_t n_batch = 1;",
    },
}

ALL_PATCHES = pytest.mark.parametrize("patch", SERIES, ids=lambda p: p.stem)


def added(patch: Path) -> list[str]:
    """Lines that a patch adds."""
    return [line[1:] for line in patch.read_text().splitlines() if re.match(r"\+(?!\+\+)", line)]


@pytest.fixture(scope="session")
def pristine() -> Path:
    """The unpatched tree of the stock build."""
    lib = os.environ.get("PYHEADKV_STOCK_LIB")
    if not lib:
        pytest.skip("no pristine tree: run make test")
    tree = Path(lib).parents[1] / "llama" / "llama.cpp-stock"
    assert tree.is_dir(), "the stock build has no source tree"
    return tree


def test_the_series_lists_every_patch_once() -> None:
    assert sorted(SERIES) == sorted(PATCHES.glob("*.patch"))
    assert len(set(SERIES)) == len(SERIES)


@ALL_PATCHES
def test_header_says_why_where_until_when_and_which_test(patch: Path) -> None:
    text = patch.read_text()
    for field in FIELDS:
        assert re.search(rf"^{field}\S", text, re.M), f"{patch.name} lacks '{field}'"
    test = re.search(r"^Test: (\S+)$", text, re.M)
    assert test and (PATCHES.parent / test[1]).is_file()


@ALL_PATCHES
def test_patch_adds_only_an_include_and_guards_that_call_headkv(patch: Path) -> None:
    body = [line.strip() for line in added(patch) if line.strip()]
    removed = re.findall(r"^-(?!--)\s*(.+)$", patch.read_text().split("\n---\n", 1)[1], re.M)
    if patch.name in REPLACED:
        assert dict(zip(removed, body, strict=True)) == REPLACED[patch.name]
        return
    assert removed == [], "a patch removes nothing"
    for line in body:
        assert line.startswith('#include "headkv-') or "headkv_" in line or line in GUARDED, line


def test_core_patches_stay_under_100_added_lines() -> None:
    assert sum(len(added(p)) for p in SERIES) < 100


def test_every_patch_applies_without_fuzz_to_the_pristine_tree(pristine: Path, tmp_path: Path) -> None:
    git = shutil.which("git")
    if not git:
        pytest.skip("git is not installed")
    for folder in ("src", "ggml", "common", "tools"):
        shutil.copytree(pristine / folder, tmp_path / folder)
    env = dict(os.environ, GIT_CEILING_DIRECTORIES=str(tmp_path.parent))
    for patch in SERIES:
        subprocess.run([git, "apply", "--verbose", str(patch)], cwd=tmp_path, env=env, check=True, capture_output=True)
        for target in re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.M):
            text = (tmp_path / target).read_text()
            assert all(line in text for line in REPLACED.get(patch.name, {"": "headkv"}).values()), f"{patch.name} was skipped"


def test_pin_is_the_llama_cpp_python_that_is_installed() -> None:
    import importlib.metadata

    pin = apply_module().read_pin()
    assert importlib.metadata.version(pin["package"]) == pin["version"]
    assert re.fullmatch("[0-9a-f]{64}", pin["sha256"])
    project = (PATCHES.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"llama-cpp-python(.*?)"', project) == [f"=={pin['version']}"]


def test_an_sdist_with_another_checksum_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "sdist.tar.gz"
    wrong.write_bytes(b"not the sdist")
    with pytest.raises(SystemExit, match="sha256"):
        apply_module().find_sdist(tmp_path, str(wrong))
    with pytest.raises(SystemExit, match="no such file"):
        apply_module().find_sdist(tmp_path, str(tmp_path / "missing"))


def test_an_edited_patch_touches_only_the_files_that_change(tmp_path: Path) -> None:
    source, tree = tmp_path / "source", tmp_path / "tree"
    for name, text in {"same": "1", "a/changed": "1", "gone": "1"}.items():
        for root in (source, tree):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
            os.utime(root / name, (1, 1))
    (source / "a/changed").write_text("2")
    (source / "gone").unlink()
    (source / "b").mkdir()
    (source / "b/new").write_text("3")
    apply_module().sync(source, tree)
    assert {str(p.relative_to(tree)): p.read_text() for p in tree.rglob("*") if p.is_file()} == {
        "same": "1",
        "a/changed": "2",
        "b/new": "3",
    }
    assert (tree / "same").stat().st_mtime == 1 and (tree / "a/changed").stat().st_mtime > 1


def test_the_canary_tells_what_moved_and_what_is_gone(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PATCHES))
    import canary

    for hunk in (h for patch in SERIES for h in canary.hunks(patch)):
        (tmp_path / hunk.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pristine / hunk.file, tmp_path / hunk.file)
    found = canary.look(tmp_path)
    n_headers = sum(len(re.findall(r"^@@ ", patch.read_text(), re.M)) for patch in SERIES)
    assert len(found) == n_headers and {f.state for f in found} == {"fits"}

    model = tmp_path / "src" / "llama-model.cpp"
    model.write_text("// one\n// two\n" + model.read_text())
    last = [f for f in found if f.hunk.file == "common/arg.cpp"][-1]
    arg = (tmp_path / last.hunk.file).read_text().splitlines()
    arg[last.line] = arg[last.line] + " // changed"
    (tmp_path / last.hunk.file).write_text("\n".join(arg))
    changed = [f for f in canary.look(tmp_path) if f.state != "fits"]
    moved = [f for f in changed if f.hunk.file == "src/llama-model.cpp"]
    assert moved and all(f.state == "moved" and f.line == f.hunk.line + 2 for f in moved)
    (gone,) = (f for f in changed if f not in moved)
    assert gone.state == "gone" and gone.hunk == last.hunk and gone.line == last.line
    assert "// changed" in gone.text()
    with pytest.raises(SystemExit, match="no llama.cpp is there"):
        canary.look(tmp_path / "src")
