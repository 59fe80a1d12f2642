"""The Metal kernels, without a Mac: Clang reads them with address spaces as types, and the engine runs with them.

What they compute is checked op by op in ``tests/cpp/test-headkv-ops.cpp``, where their text is compiled for the CPU and runs thread by
thread in both orders, and where every barrier is left out once (``test_sanitizers.py`` runs it).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Shape, run_sanitized, sanitizer_libs

ROOT = Path(__file__).resolve().parents[1]
METAL = ROOT / "cpp" / "ggml-metal"
LANGUAGE = Path(__file__).parent / "metal_as_clang_sees_it.h"
TYPES = {"HEADKV_F16": 1, "HEADKV_BF16": 2, "HEADKV_Q8_0": 3}
SIZES = {"HEADKV_F16": (80, 128), "HEADKV_BF16": (128,), "HEADKV_Q8_0": (64, 256)}  # what is unlike in the others are numbers
SPACES = {"device", "constant", "threadgroup", "thread"}
WHERE = (  # the last parameters of every kernel
    "uint3 group [[threadgroup_position_in_grid]]",
    "uint thread_index [[thread_index_in_threadgroup]]",
    "uint simd_index [[simdgroup_index_in_threadgroup]]",
    "uint lane_index [[thread_index_in_simdgroup]]",
)


def kernel_text(name: str) -> str:
    """The text that Metal gets, without the definitions before it: headkv-metal-source.cpp.in, headkv-metal.cpp."""
    parts = ("headkv-args.h", "headkv-device.metal", f"headkv-{name}.metal")
    text = "".join((METAL / part).read_text(encoding="utf-8") for part in parts).replace("#pragma once", "")
    return "#include <metal_stdlib>\nusing namespace metal;\n" + text


def programs() -> list[tuple[str, str]]:
    """Kernel and definitions of sources that the backend puts together."""
    res = [("select", ""), ("compact", "")]
    for kind, sizes in SIZES.items():
        for d in sizes:
            for name, nq in (("score", 0), ("attend", 4), ("attend", 8)):
                res.append((name, f"#define HEADKV_TYPE {TYPES[kind]}\n#define HEADKV_D {d}\n#define HEADKV_NQ {nq}\n"))
    return res


def findings(text: str) -> list[str]:
    """What Metal would refuse in a source, as far as Clang can say: C++14, no double, address spaces, no recursion, no lambda."""
    cindex = pytest.importorskip("clang.cindex", reason="libclang is not installed: run make")
    text = re.sub(r"\[\[.*?\]\]", "", text).replace("#include <metal_stdlib>", f'#include "{LANGUAGE}"')
    args = ["-x", "c++", "-std=c++14", "-nostdinc", "-D__METAL_VERSION__=310", "-Wall", "-Wdouble-promotion", "-Wno-unknown-attributes"]
    unit = cindex.Index.create().parse("kernel.cpp", args=args, unsaved_files=[("kernel.cpp", text)])
    res = [str(d) for d in unit.diagnostics if d.severity >= cindex.Diagnostic.Warning]

    kinds = cindex.CursorKind
    declared = (kinds.PARM_DECL, kinds.VAR_DECL, kinds.FIELD_DECL)
    pointers = (cindex.TypeKind.POINTER, cindex.TypeKind.LVALUEREFERENCE, cindex.TypeKind.RVALUEREFERENCE)
    refused = (kinds.LAMBDA_EXPR, kinds.CXX_NEW_EXPR, kinds.CXX_DELETE_EXPR, kinds.GOTO_STMT, kinds.CXX_TRY_STMT, kinds.CXX_THROW_EXPR)

    def walk(cursor: object, function: str) -> None:
        for c in cursor.get_children():  # type: ignore[attr-defined]
            if not c.location.file or c.location.file.name != "kernel.cpp":
                continue
            if c.kind in refused:
                res.append(f"{c.location.line}: {c.kind.name}")
            before_name = re.split(r"[(,;{]", text[: c.location.offset])[-1]
            if c.kind in declared and c.type.get_canonical().kind in pointers and not SPACES & set(before_name.split()):
                res.append(f"{c.location.line}: no address space: {before_name.strip()} {c.spelling}")
            if c.kind in declared and c.type.get_canonical().spelling.endswith(("double", "long double")):
                res.append(f"{c.location.line}: double")
            if c.kind == kinds.CALL_EXPR and c.spelling == function:
                res.append(f"{c.location.line}: {function} calls itself")
            is_function = c.kind in (kinds.FUNCTION_DECL, kinds.FUNCTION_TEMPLATE, kinds.CXX_METHOD)
            walk(c, c.spelling if is_function else function)

    walk(unit.cursor, "")
    # what the compiler may assume away, and what is not in the language
    for word in ("INFINITY", "NAN", "isnan", "isinf", "double", "std::", "virtual", "static_cast", "dynamic_cast"):
        res += [f"{word} is used" for line in text.splitlines() if re.search(rf"\b{word}", line.split("//")[0])]
    return res


@pytest.mark.parametrize(("name", "definitions"), programs(), ids=lambda x: re.sub(r"#define HEADKV_|\n", "", x).replace(" ", "="))
def test_clang_finds_nothing_in_a_source(name: str, definitions: str) -> None:
    assert findings(definitions + kernel_text(name)) == []


MISTAKES = {
    "a threadgroup's pointer is a device's": ("attend", "threadgroup float * p [[threadgroup(1)]]", "device float * p [[buffer(9)]]"),
    "an argument is in no address space": (
        "attend",
        "constant headkv_metal_attend & a, int range, int j",
        "headkv_metal_attend & a, int range, int j",
    ),
    "a constant is written": ("select", "uint limit = 0;", "uint limit = 0; a.n_recent = 1;"),
    "a double": ("score", "float sum = 0.0f;", "double sum = 0.0f;"),
    "a double by its digits": ("score", "float res = 0.0f;", "float res = 0.5 * a.scale;"),
    "an infinity": ("score", "float m = LOWEST;", "float m = -INFINITY;"),
    "a lambda": ("select", "uint limit = 0;", "const auto f = [](int i) { return i; }; uint limit = f(0);"),
    "a function that calls itself": ("select", "return bits & 0x80000000u ?", "return bits == 7 ? score_key(bits) : bits & 0x80000000u ?"),
    "something of the standard library": ("select", "uint limit = 0;", "uint limit = std::min(0u, 1u);"),
    "what is read is written": ("compact", "((device Word *) to)[w] = t;", "((device const Word *) from)[w] = t;"),
    "too few parameters": ("attend", "simd_shuffle(sum - n, (ushort) found)", "simd_shuffle(sum - n)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_clang_finds_a_mistake(mistake: str) -> None:
    name, old, new = MISTAKES[mistake]
    text = kernel_text(name)
    assert text.count(old) >= 1
    definitions = "#define HEADKV_TYPE 1\n#define HEADKV_D 64\n#define HEADKV_NQ 8\n" if name not in ("select", "compact") else ""
    assert findings(definitions + text.replace(old, new)) != []


def kernels() -> dict[str, tuple[str, list[str]]]:
    """Threads and parameters of each kernel."""
    res = {}
    for name in ("attend", "score", "select", "compact"):
        text = re.sub(r"//.*", "", (METAL / f"headkv-{name}.metal").read_text(encoding="utf-8"))
        for threads, kernel, rest in re.findall(
            r"\[\[kernel, max_total_threads_per_threadgroup\((\w+)\)\]\] void (\w+)\((.*?)\) \{", text, re.S
        ):
            res[kernel] = threads, [" ".join(p.split()) for p in re.split(r",(?![^(\[]*[\])])", rest)]
    return res


def test_parameters_are_where_the_host_puts_them() -> None:
    """The CPU runs the kernels by the order of their parameters, Metal by what stands behind them: both are the same."""
    host = (METAL / "headkv-metal.cpp").read_text(encoding="utf-8")
    found = kernels()
    assert set(found) == set(re.findall(r'"(headkv_\w+)"', host)) and len(found) == 6
    for kernel, (threads, parameters) in found.items():
        assert tuple(parameters[-4:]) == WHERE, kernel
        shared = [p for p in parameters if p.startswith("threadgroup ")]
        buffers = parameters[: -4 - len(shared)]
        assert [re.findall(r"\[\[buffer\((\d+)\)\]\]$", p) for p in buffers] == [[str(i)] for i in range(len(buffers))]
        assert [re.findall(r"\[\[threadgroup\((\d+)\)\]\]$", p) for p in shared] == [[str(i)] for i in range(len(shared))]
        # the last argument of its dispatch
        dispatch = re.search(rf'dispatch\(enc, all, "{kernel}"\)(.*?);', host, re.S)
        assert dispatch and dispatch[1].rstrip().endswith(f", {threads})"), kernel


def test_our_c_interface_is_upstreams() -> None:
    """No Objective-C: what our code calls is declared in one header of upstream's, which is plain C."""
    header = ROOT / "build" / "llama" / "llama.cpp" / "ggml" / "src" / "ggml-metal" / "ggml-metal-device.h"
    if not header.is_file():
        pytest.skip("no patched source tree: run make")
    declared = set(re.findall(r"\b(ggml_metal_\w+) *\(", header.read_text(encoding="utf-8")))
    called = set(re.findall(r"\b(ggml_metal_\w+)\(", (METAL / "headkv-metal.cpp").read_text(encoding="utf-8")))
    assert called and called <= declared
    assert [p.name for p in METAL.iterdir() if p.suffix in (".m", ".mm")] == []


ENGINE = (
    "(qwen3 and (decode_after_compression or truncated_down or (kept_positions_equal_the_oracle and 512 and power))) "
    "or quantised_cells_move or (llama-gqa4 and composed and decode_after_compression)"
)


def test_the_engine_attends_scores_selects_and_compacts_on_metal(asan_dir: Path, tmp_path: Path) -> None:
    """Heads of 64 by our kernels, of 32 by existing ops."""
    report = tmp_path / "report"
    out = run_sanitized(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "test_engine.py", "--device", "metal", "-k", ENGINE],
        LD_PRELOAD=sanitizer_libs(),
        PYHEADKV_LIB_PATH=str(asan_dir),
        PYHEADKV_TEST_BACKEND=str(asan_dir / "libggml-metal-on-cpu.so"),
        METAL_ON_CPU_REPORT=str(report),
        PYTHONMALLOC="malloc",
    )
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed[1]) >= 8
    dispatches = dict(line.split() for line in report.read_text().splitlines())
    assert set(dispatches) == set(kernels())


GRAPHS = """
import ctypes, os, sys
from conftest import device_options, load, load_backend, tokens
from pyheadkv import _lib

path = os.environ["PYHEADKV_TEST_BACKEND"]
load_backend(path)
device_options.update(n_gpu_layers=99, split_mode=0, main_gpu=_lib.gpu_names().index("MTL0"))
n_graphs = ctypes.CDLL(path).metal_on_cpu_n_graphs
for options in ({"attend": "fused"}, {"type_k": 2, "type_v": 2}, {"attend": "composed"}):
    llm = load(sys.argv[1], kv_size=40, **options)
    llm.eval(tokens(300))
    before = n_graphs()
    llm.end_prompt()
    print(n_graphs() - before)
"""


def test_a_layer_is_compressed_by_two_graphs(make_model: Callable[..., Path], asan_dir: Path) -> None:
    """Its scores, then what all of its heads keep; of cells that no kernel reads (q4_0) and with existing ops alone each head has its own."""
    shape = Shape("heads", "qwen3", 8, 4, head_dim=64)
    out = run_sanitized(
        [sys.executable, "-c", GRAPHS, str(make_model(shape))],
        LD_PRELOAD=sanitizer_libs(),
        PYHEADKV_LIB_PATH=str(asan_dir),
        PYHEADKV_TEST_BACKEND=str(asan_dir / "libggml-metal-on-cpu.so"),
        PYTHONMALLOC="malloc",
    )
    fused, unread, composed = (int(n) for n in out.split())
    assert fused == 2 * shape.n_layer
    assert unread == (shape.n_head_kv + 1) * shape.n_layer
    assert composed >= 2 * shape.n_layer * shape.n_head_kv


def test_heads_that_no_kernel_has_are_refused(asan_dir: Path) -> None:
    with pytest.raises(AssertionError, match="attend 'fused' is not possible in layer 0 with K heads of 32 .* on MTL0"):
        run_sanitized(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_engine.py", "--device", "metal"]
            + ["-k", "llama-gqa4 and fused and decode_after_compression"],
            LD_PRELOAD=sanitizer_libs(),
            PYHEADKV_LIB_PATH=str(asan_dir),
            PYHEADKV_TEST_BACKEND=str(asan_dir / "libggml-metal-on-cpu.so"),
            PYTHONMALLOC="malloc",
        )


def test_the_check_for_a_mac_says_where_it_runs(tmp_path: Path) -> None:
    if sys.platform == "darwin":
        pytest.skip("it would build")
    for backend, said in (("metal", "only macOS has it"), ("none", "use cuda, metal, vulkan or cpu")):
        env = {**os.environ, "GPU_CHECK_BACKEND": backend}
        res = subprocess.run(["sh", str(ROOT / "scripts" / "gpu_check.sh"), "all", str(tmp_path)], env=env, capture_output=True, text=True)
        assert res.returncode == 2 and said in res.stderr
