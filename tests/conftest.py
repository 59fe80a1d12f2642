"""Fixtures: random models (made once), both libraries, and helpers around one decode step.

``pytest --device cpu,cuda0`` runs the tests of the engine once on each device (cpu, cuda0, vulkan0, metal, rpc, ...). A device
that the library does not have is a skip; rpc is a worker on this machine. PYHEADKV_TEST_BACKEND names a library with one more backend, that of tests/cpp/metal-on-cpu.h.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

N_THREADS = 1  # small models are fastest so, and more threads than free cores wait for each other
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # and where a test wants more, they do not wait by spinning: every core has a test

# tests of the engine: what load() loads in them goes to the device at hand
ENGINE = (
    "test_archive",
    "test_attention",
    "test_engine",
    "test_generated",
    "test_policies",
    "test_policy_oracle",
    "test_prefill_layer",
    "test_sequences",
)
device_options: dict[str, Any] = {}

# stages of the data path (cpp/README.md) -> parts of the files and names of their tests, beside the word itself
STAGES = {
    "importance": ("test_gguf_header", "test_gguf_keys", "test_score_files", "without_importance", "authors_scores"),
    "budget": ("equals_golden", "test_policy_oracle", "add_up", "share_of_the_prompt", "bytes_are_kept"),
    "window": ("kept_positions_equal", "q_round", "has_no_prefix"),
    "score": ("kept_positions_equal", "keeps_what_the_oracle_keeps", "pool", "softmax", "test_attention", "kernel", "group_mean"),
    "select": ("kept_positions_equal", "keeps_what_the_oracle_keeps", "test_keep_", "kept_cells", "streaming_keeps"),
    "compact": ("kept_cells", "quantised_cells", "bytes_are_those", "retain", "kv_round", "gives_its_memory_back"),
    "attend": ("decode_after", "tail", "full_budget", "decode_together", "dropped", "truncated"),
    "evict": ("test_generated", "evict", "bounds_what_it_says"),
}


@cache
def load_backend(path: str) -> None:
    """Give ggml the backend of a library, for as long as the process lives."""
    from llama_cpp import llama_cpp

    llama_cpp._lib.ggml_backend_load.argtypes, llama_cpp._lib.ggml_backend_load.restype = [ctypes.c_char_p], ctypes.c_void_p
    if not llama_cpp._lib.ggml_backend_load(path.encode()):
        raise ValueError(f"PYHEADKV_TEST_BACKEND is {path}: no backend")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="devices of the engine tests, comma-separated (default: %(default)s)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    devices = metafunc.config.getoption("device").lower().split(",")
    if devices != ["cpu"] and metafunc.module.__name__ in ENGINE:
        metafunc.parametrize("device", devices, indirect=True, scope="session")


def pytest_itemcollected(item: pytest.Item) -> None:
    """``-k`` with the word of a stage finds its tests."""
    item.extra_keyword_matches.update(word for word, parts in STAGES.items() if any(part in item.nodeid for part in parts))


@pytest.fixture(scope="session")
def worker() -> Iterator[Any]:
    """A worker for layers on another machine."""
    pytest.importorskip("pyheadkv._lib", reason="the library is not built: run make")
    from rpc_worker import Worker

    try:
        started = Worker()
    except ValueError as error:
        pytest.skip(str(error))
    with started:
        yield started


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> str:
    """Name of the device that load() uses; skips the test when the library does not have it."""
    name = str(getattr(request, "param", "cpu"))
    device_options.clear()
    if name == "rpc":
        device_options.update(n_gpu_layers=99, rpc_servers=request.getfixturevalue("worker").endpoint)
    elif name != "cpu":
        lib = pytest.importorskip("pyheadkv._lib", reason="the library is not built: run make")
        if os.environ.get("PYHEADKV_TEST_BACKEND"):
            load_backend(os.environ["PYHEADKV_TEST_BACKEND"])
        names = [n.lower() for n in lib.gpu_names()]
        found = [i for i, n in enumerate(names) if n == name or (name == "metal" and n.startswith(("metal", "mtl")))]
        if not found:
            pytest.skip(f"no device {name}: the library has {', '.join(names) or 'no GPU'}")
        device_options.update(n_gpu_layers=99, split_mode=0, main_gpu=found[0])
    elif getattr(request, "param", None):
        device_options.update(n_gpu_layers=0, op_offload=False)
    return name


@dataclass(frozen=True)
class Shape:
    """A random model: architecture, GQA ratio by heads, sizes."""

    name: str
    arch: str
    n_head: int
    n_head_kv: int
    n_layer: int = 3
    head_dim: int = 32
    n_ff: int = 192


SHAPES = [
    Shape("llama-gqa1", "llama", 4, 4),
    Shape("llama-gqa4", "llama", 8, 2),
    Shape("qwen2-gqa7", "qwen2", 7, 1),
    Shape("qwen3-gqa4", "qwen3", 8, 2, head_dim=64),
    Shape("mistral-gqa2", "llama", 8, 4, n_layer=2),
]

WINDOWED = Shape("gemma3-gqa4", "gemma3", 8, 2, n_layer=4)  # of which layers 1 and 3 attend to all tokens, the others to 32
HYBRID = Shape("lfm2-gqa4", "lfm2", 8, 2, n_layer=4)  # of which layers 1 and 3 attend, the others are recurrent


@pytest.fixture(scope="session")
def library() -> None:
    """The built library, or a skip that says so."""
    pyheadkv = pytest.importorskip("pyheadkv", reason="the library is not built: run make")
    assert pyheadkv.Llama is not None


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_model(shape, **changes) -> path of a random GGUF, written once per session."""
    from pyheadkv.testing import write_random_model

    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def make(shape: Shape, **changes: Any) -> Path:
        key = f"{shape}-{sorted(changes.items())}"
        if key not in made:
            made[key] = folder / f"{len(made)}.gguf"
            sizes = dict(
                arch=shape.arch,
                n_layer=shape.n_layer,
                n_embd=shape.n_head * shape.head_dim,
                n_head=shape.n_head,
                n_head_kv=shape.n_head_kv,
                head_dim=shape.head_dim,
                n_ff=shape.n_ff,
                seed=7,
                importance="random",
            )
            write_random_model(made[key], **{**sizes, **changes})
        return made[key]

    return make


@pytest.fixture(scope="session")
def stock_lib() -> Path:
    """Folder of the unpatched build of the same sdist."""
    path = os.environ.get("PYHEADKV_STOCK_LIB")
    if not path or not Path(path).is_dir():
        pytest.skip("no unpatched library: run make test, or make stock and set PYHEADKV_STOCK_LIB")
    return Path(path)


@pytest.fixture(scope="session")
def asan_dir() -> Path:
    """Folder of the build with sanitizers."""
    path = os.environ.get("PYHEADKV_ASAN_DIR")
    if not path or not Path(path).is_dir():
        pytest.skip("no build with sanitizers: run make test, or make sanitize and set PYHEADKV_ASAN_DIR")
    return Path(path)


def run_sanitized(cmd: list[str], **env: str) -> str:
    """Output of a command of the build with sanitizers, run in the folder of the tests; its errors are the caller's."""
    options = "detect_leaks=0:abort_on_error=0:exitcode=99:halt_on_error=1"
    env = {**os.environ, "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99", **env}
    res = subprocess.run(cmd, env=env, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert res.returncode == 0, (res.stdout + res.stderr)[-4000:]
    return res.stdout


def sanitizer_libs() -> str:
    """What Python has to preload: libstdc++ too, or the sanitizer does not find the functions of it that it wraps."""
    found = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(Path(path).is_file() for path in found):
        pytest.skip("no shared libasan and libstdc++ to preload into Python")
    return " ".join(found)


def tokens(n: int, *, seed: int = 0, n_vocab: int = 384) -> list[int]:
    """A random prompt of n tokens, BOS first, without other special tokens."""
    rng = np.random.default_rng(seed)
    return [1, *rng.integers(3, n_vocab, size=n - 1).tolist()]


def load(path: Path, **options: Any) -> Any:
    """pyheadkv.Llama, quiet, two threads; compression as in the paper, unless another preset is asked for."""
    from pyheadkv import Llama

    if any(options.get(name) is not None for name in ("kv_size", "kv_ratio", "kv_bytes")):
        options = {"preset": "paper", **options}
    options = {"n_ctx": 2048, "n_threads": N_THREADS, "n_threads_batch": N_THREADS, "verbose": False, **device_options, **options}
    return Llama(path, **options)


def logits(llm: Any) -> npt.NDArray[np.float32]:
    """Logits of the last evaluated token, (n_vocab,)."""
    return np.array(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)))


def decode(llm: Any, seq_id: int, pos: int, token: int) -> npt.NDArray[np.float32]:
    """Logits (n_vocab,) after one more token of a sequence."""
    import llama_cpp

    batch = llama_cpp.llama_batch_init(1, 0, 1)
    batch.n_tokens = 1
    batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = token, pos, 1, seq_id, True
    assert llama_cpp.llama_decode(llm.ctx, batch) == 0
    llama_cpp.llama_batch_free(batch)
    return logits(llm)


def read_prompt(llm: Any, prompt: list[int]) -> npt.NDArray[np.float32]:
    """Evaluate a whole prompt and compress it if there is compression; return the logits of its last token."""
    if hasattr(llm, "read_prompt"):
        llm.read_prompt(prompt)
    else:
        llm.eval(prompt)
    return logits(llm)


def outcome(llm: Any, prompt: list[int], shape: Shape) -> tuple[list[bytes], list[list[int]]]:
    """Logits of the prompt's end and of three more tokens, and the kept positions of every head."""
    out = [read_prompt(llm, prompt).tobytes()]
    kept = [llm.kv_positions(il, ih).tolist() for il in range(shape.n_layer) for ih in range(shape.n_head_kv)]
    for token in (9, 10, 11):
        llm.eval([token])
        out.append(logits(llm).tobytes())
    return out, kept


def greedy(llm: Any, prompt: list[int], n: int) -> list[int]:
    """n greedy tokens after the prompt."""
    out: list[int] = []
    for token in llm.generate(prompt, temp=0.0):
        out.append(token)
        if len(out) == n:
            break
    return out


def nmse(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Mean squared error of a against b, relative to the mean square of b."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.mean((x - y) ** 2) / np.mean(y**2))


def unpadded(text: str) -> str:
    """Markdown whose columns are no longer as wide as their widest cell."""
    return re.sub(r" +\|", " |", text)


def rss() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and end it when it does not."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def without_importance(source: Path, path: Path) -> None:
    """A copy of a model whose metadata has no importance."""
    from pyheadkv.gguf_copy import copy_with_fields
    from pyheadkv.gguf_header import read_header

    header = read_header(source)
    with open(path, "wb") as out:
        copy_with_fields(header, out, [], without={name for name in header.pairs if ".attention.head_importance" in name})
