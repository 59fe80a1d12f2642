"""What the functions of cpp/headkv.h and upstream's memory functions refuse of a caller who is not this package, with the reason."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES, load, read_prompt, tokens
from test_sequences import Sequences, params_of, sequences

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
N_LAYER, N_HEAD_KV = SHAPES[1].n_layer, SHAPES[1].n_head_kv
COMPRESSED = 2
I32, F32 = ctypes.c_int32 * 8, ctypes.c_float * 8  # too small for anything


@pytest.fixture(scope="module")
def path(make_model: MakeModel) -> Path:
    return make_model(SHAPES[1])


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[Any]:
    """A context whose first sequence is compressed."""
    llm = load(path, kv_size=64, policy="snapkv", window=32)
    read_prompt(llm, tokens(200))
    yield llm
    llm.close()


@pytest.fixture
def two(path: Path) -> Iterator[Sequences]:
    """Two sequences, nothing read."""
    with sequences(path, n_seq_max=2) as made:
        yield made


def room_for_one() -> Any:
    from pyheadkv import _lib

    return (_lib.PolicyInfo * 1)()


def refused(call: Callable[[Any], int]) -> str:
    """Why a function of the library did not do it."""
    from pyheadkv import _lib

    _lib.lib.headkv_clear_error()
    assert call(_lib.lib) < 0
    return _lib.last_error()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lib, ctx: lib.headkv_policies(room_for_one(), 1), r"room for 1 policies, \d+ are needed"),
        (lambda lib, ctx: lib.headkv_configure(ctx, None), "no parameters"),
        (lambda lib, ctx: lib.headkv_get_stats(ctx, 0, None), "headkv_stats.size"),
        (lambda lib, ctx: lib.headkv_get_budget(ctx, I32(), 1), f"room for 1 values, {N_LAYER * N_HEAD_KV} are needed"),
        (lambda lib, ctx: lib.headkv_get_n_cells(ctx, 0, I32(), 1), f"room for 1 values, {N_LAYER * N_HEAD_KV} are needed"),
        (lambda lib, ctx: lib.headkv_get_footprint(ctx, None, 9, 9, 9, True, None), "headkv_footprint.size"),
        (lambda lib, ctx: lib.headkv_fill_prompt(ctx, 0, 0, 1), r"prompt of 0 tokens: it must be in \[1, n_ctx"),
        (lambda lib, ctx: lib.headkv_fill_prompt(ctx, 0, 9, 1), "only an empty sequence can be filled"),
        (lambda lib, ctx: lib.headkv_read_window(ctx, 0, 0, F32(), 8), "no window queries"),
        (lambda lib, ctx: lib.headkv_read_cells(ctx, 0, 0, 0, False, F32(), 8), r"room for 8 values, \d+ are needed"),
        (lambda lib, ctx: lib.headkv_read_attention(ctx, 0, 0, None, 0, 1, None, None, 0), r"the last 0 tokens: it must be in \[1, 32\]"),
        (lambda lib, ctx: lib.headkv_read_attention(ctx, 0, 1, None, 0, 1, F32(), I32(), 8), r"room for 8 values, \d+ are needed, and no pointer"),
        (lambda lib, ctx: lib.headkv_read_attention_max(ctx, 0, 33, 9, None, 0), r"the last 33 tokens: it must be in \[1, 32\]"),
        (lambda lib, ctx: lib.headkv_read_attention_max(ctx, 0, 1, -1, None, 0), r"the first -1 positions: it must be in \[1, n_ctx"),
        (lambda lib, ctx: lib.headkv_read_attention_max(ctx, 0, 1, 9, F32(), 8), r"room for 8 values, \d+ are needed"),
        (lambda lib, ctx: lib.headkv_limit_restore(ctx, 1, -1, 1), "must not be negative"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Callable[[Any, Any], int], message: str, llm: Any) -> None:
    assert re.search(message, refused(lambda lib: call(lib, llm.ctx)))


def test_a_footprint_of_no_prompt_is_refused(llm: Any) -> None:
    from pyheadkv import _lib

    out, params = _lib.Footprint(size=ctypes.sizeof(_lib.Footprint)), params_of()
    for n_prompt, n_predict, n_ubatch in ((0, 1, 1), (1, -1, 1), (1, 1, 0)):
        why = refused(lambda lib: lib.headkv_get_footprint(llm.ctx, params, n_prompt, n_predict, n_ubatch, True, ctypes.byref(out)))  # noqa: B023
        assert why.startswith(f"a prompt of {n_prompt} tokens in ubatches of {n_ubatch}, {n_predict} generated")


@pytest.mark.parametrize(("heads", "heads_kv"), [((4, 4), (2, 0)), ((4, 4), (2, 3)), ((4, 0), (2, -1)), ((1 << 17, 4), (1, 1))])
def test_a_plan_of_heads_that_are_no_groups_is_refused(heads: tuple[int, int], heads_kv: tuple[int, int]) -> None:
    a, b, out = ((ctypes.c_int32 * 2)(*x) for x in (heads, heads_kv, (7, 7)))
    assert "both 0, or heads a multiple of KV heads" in refused(lambda lib: lib.headkv_plan(params_of(), 2, a, b, 0, out))
    assert "no pointer NULL" in refused(lambda lib: lib.headkv_plan(params_of(), 2, a, None, 0, out))
    assert "0 layers" in refused(lambda lib: lib.headkv_plan(params_of(), 0, a, b, 0, out))
    assert list(out) == [7, 7]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, -1]], "layer 0, head 1 is -1"),
        ([[1, np.nan]], "layer 0, head 1 is nan"),
        ([[0, 0]], "sums to 0"),
        ([[1e308, 1e308]], "sums to inf"),
    ],
)
def test_an_importance_that_is_none_is_refused(values: Any, message: str) -> None:
    params, array = params_of(), np.array(values, dtype=np.float64)
    params.policy, params.importance = b"headkv", array.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
    params.n_layer, params.n_head = array.shape
    assert message in refused(lambda lib: lib.headkv_set_params(params))


KEY = b"llama.attention.head_importance"
U32, I32_TYPE, F64 = 4, 5, 12


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            KEY + b".shape" + struct.pack("<II", 9, U32),
            KEY + b".shape" + struct.pack("<II", 9, I32_TYPE),
            ".shape must be 2 uint32 values",
        ),
        (KEY + struct.pack("<II", 9, F64), KEY + struct.pack("<II", 9, 10), "must be an array of float32 or float64"),
        (struct.pack("<QII", 2, N_LAYER, 8), struct.pack("<QII", 2, N_LAYER, 9), f"24 values, .shape says {N_LAYER} layers x 9 heads"),
    ],
    ids=["shape", "type", "size"],
)
def test_a_damaged_importance_of_a_model_is_refused_by_the_library(
    old: bytes, new: bytes, message: str, path: Path, tmp_path: Path
) -> None:
    """A server reads it without Python."""
    from pyheadkv.gguf_keys import write_importance

    written = tmp_path / "m.gguf"
    write_importance(path, written, np.arange(1, 25).reshape(N_LAYER, 8) / 3, force=True)
    raw = written.read_bytes()
    assert raw.count(old) == 1
    written.write_bytes(raw.replace(old, new))
    params = params_of()
    params.policy, params.importance_gguf = b"headkv", bytes(written)
    assert message in refused(lambda lib: lib.headkv_set_params(params))


def test_a_context_for_embeddings_is_refused(two: Sequences) -> None:
    from pyheadkv import _lib

    params = two.c.llama_context_default_params()
    params.n_ctx, params.embeddings, params.flash_attn_type = 256, True, two.c.LLAMA_FLASH_ATTN_TYPE_ENABLED
    with _lib.creating(params_of()):
        assert not two.c.llama_init_from_model(two.model, params)
        assert "contexts for embeddings or reranking have no generation to speed up" in _lib.last_error()


def test_what_a_sequence_is_not_ready_for_is_refused(two: Sequences) -> None:
    assert "sequence 1 is not compressed: call headkv_end_prompt() first" in refused(
        lambda lib: lib.headkv_get_positions(two.ctx, 1, 0, 0, None, 0)
    )
    assert "sequence 1 is not compressed" in refused(lambda lib: lib.headkv_can_continue(two.ctx, 1, None))
    two.decode({1: tokens(9)})
    n = 16 * N_LAYER * SHAPES[1].n_head
    mass, top = (ctypes.c_float * n)(), (ctypes.c_int32 * n)()
    why = refused(lambda lib: lib.headkv_read_attention(two.ctx, 1, 16, None, 0, 1, mass, top, n))
    assert "attention of the last 16 tokens: it must be in [1, 9]" in why
    two.decode({1: tokens(191, seed=1)})
    assert two.c.llama_memory_seq_rm(memory(two), 1, 150, -1)  # their queries have taken the place of older ones
    why = refused(lambda lib: lib.headkv_read_attention(two.ctx, 1, 16, None, 0, 1, mass, top, n))
    assert "the queries of the last tokens are missing: evaluate them again" in why
    best = (ctypes.c_float * (9 * N_LAYER * N_HEAD_KV))()
    why = refused(lambda lib: lib.headkv_read_attention_max(two.ctx, 1, 16, 9, best, len(best)))
    assert "the queries of the last tokens are missing: evaluate them again" in why
    two.c.llama_memory_seq_add(memory(two), 1, 0, -1, 5)
    assert "positions of sequence 1 were shifted" in refused(lambda lib: lib.headkv_end_prompt(two.ctx, 1))


# upstream's memory functions


def memory(many: Sequences) -> Any:
    return many.c.llama_get_memory(many.ctx)


def test_all_sequences_but_one_are_removed(two: Sequences) -> None:
    two.read(0, tokens(150, seed=1))
    two.read(1, tokens(150, seed=2))
    kept = two.positions(1, 0, 0)
    two.c.llama_memory_seq_keep(memory(two), 1)
    assert [two.state(s) for s in range(2)] == [0, COMPRESSED] and two.positions(1, 0, 0) == kept
    assert two.c.llama_memory_seq_rm(memory(two), -1, -1, -1)  # all of them
    assert [two.state(s) for s in range(2)] == [0, 0] and two.stats(0).bytes_store == 0


@pytest.mark.parametrize("what", ["copied", "shifted", "divided"])
def test_what_cells_of_heads_cannot_do_fails_from_then_on(what: str, two: Sequences) -> None:
    """Upstream's functions return nothing: what is asked next says it, until the cache is cleared."""
    two.read(0, tokens(150))
    call = {
        "copied": lambda m: two.c.llama_memory_seq_cp(m, 0, 1, -1, -1),
        "shifted": lambda m: two.c.llama_memory_seq_add(m, 0, 10, -1, 5),
        "divided": lambda m: two.c.llama_memory_seq_div(m, 0, 0, -1, 2),
    }[what]
    call(memory(two))
    with pytest.raises(RuntimeError, match=f"{what}.*which the ragged cache cannot do"):
        two.decode({0: [5]})
    two.c.llama_memory_clear(memory(two), True)
    two.n_past = [0, 0]
    two.read(0, tokens(150))
    assert two.state(0) == COMPRESSED


def test_states_of_sequences_that_are_none_are_refused(two: Sequences) -> None:
    from pyheadkv import _lib

    two.read(0, tokens(150))
    n = two.c.llama_state_seq_get_size(two.ctx, 0)
    state = (ctypes.c_uint8 * n)()
    assert two.c.llama_state_seq_get_data(two.ctx, state, n, 0) == n
    assert two.c.llama_state_seq_get_data(two.ctx, state, n, 2) == 0 and "sequence 2, it must be in [0, 2)" in _lib.last_error()
    assert two.c.llama_state_seq_set_data(two.ctx, state, n, 2) == 0 and "sequence 2: it must be in [0, 2)" in _lib.last_error()
    assert two.c.llama_state_seq_set_data(two.ctx, state, n, 1) == n and two.positions(1, 0, 0) == two.positions(0, 0, 0)
    two.remove(1)
    assert two.read_ahead(1, tokens(1500), max_ms=0) > 0
    assert two.c.llama_state_seq_get_data(two.ctx, state, n, 1) == 0 and "sequence 1 is being read layer by layer" in _lib.last_error()


def test_a_context_of_another_thread_is_a_stock_one_with_a_word(make_model: MakeModel) -> None:
    """Parameters are those of a thread: what another one creates meanwhile is not compressed, and the log says so."""
    code = """
import sys, threading
from conftest import load
from pyheadkv import _lib
import llama_cpp
from pyheadkv.options import Options
path = sys.argv[1]
def create():
    llm = llama_cpp.Llama(path, n_ctx=256, verbose=True)
    print("compressed:", bool(_lib.lib.headkv_enabled(llm.ctx)), flush=True)
load(path, kv_size=48).close()
create()
with _lib.creating(Options(kv_size=48, policy="snapkv").to_params(None, None)):
    thread = threading.Thread(target=create)
    thread.start()
    thread.join()
create()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, make_model(SHAPES[1])], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[:3] == ["compressed: False"] * 3
    assert done.stderr.count("this context has the stock cache: headkv_set_params() was called on another thread") == 1
