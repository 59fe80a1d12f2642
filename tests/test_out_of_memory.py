"""Every large allocation while a prompt is read, compressed and continued fails once: a clear error, and the next prompt works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Shape

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
TESTS = Path(__file__).parent

SCRIPT = """
import ctypes, json, sys
from conftest import load, logits, tokens

hook = ctypes.CDLL(None)
hook.fail_alloc_arm.argtypes = [ctypes.c_long]
hook.fail_alloc_disarm.restype = ctypes.c_long
options = json.loads(sys.argv[2])
llm = load(sys.argv[1], kv_size=400, window=32, policy="snapkv", n_ctx=4096, n_tail=8, n_ubatch=512, **options)
prompt, answer = tokens(2000), list(range(20, 100))

def run():
    llm.read_prompt(prompt)
    for token in answer:  # the tails grow
        llm.eval([token])
    kept = [llm.kv_positions(il, ih).tolist() for il in range(3) for ih in range(2)]
    return logits(llm).tobytes(), kept

expected = run()
llm.reset()
hook.fail_alloc_arm(0)
assert run() == expected
n = hook.fail_alloc_disarm()
outcomes = []
for k in range(1, n + 1):
    llm.reset()
    hook.fail_alloc_arm(k)
    try:
        run()
        outcomes.append("")
    except (MemoryError, RuntimeError) as error:
        outcomes.append(f"{type(error).__name__}: {error}")
    hook.fail_alloc_disarm()
    stats = llm.kv_stats()
    llm.reset()
    assert run() == expected, (k, outcomes[-1])
    assert llm.kv_stats().bytes_staging == 0
print(json.dumps(outcomes))
"""


SHORTAGE_SCRIPT = """
import ctypes, sys
from contextlib import contextmanager
from test_sequences import sequences
from conftest import tokens

hook = ctypes.CDLL(None)
hook.fail_alloc_arm.argtypes = [ctypes.c_long]
hook.fail_alloc_disarm.restype = ctypes.c_long

@contextmanager
def shortage():
    hook.fail_alloc_all(1)
    try:
        yield
    except RuntimeError as error:
        assert "llama_decode returned 1: " in str(error) and "not enough memory" in str(error), error
    else:
        assert False, "nothing failed"
    finally:
        hook.fail_alloc_all(0)

prompt, other = tokens(2000), tokens(300, seed=1)
with sequences(sys.argv[1], n_seq_max=2, n_tail=8) as many:
    memory = many.c.llama_get_memory(many.ctx)
    expected = many.read(0, other)[0].tobytes()
    many.remove(0)

    def next_prompt_works():
        many.remove(0)
        assert many.state(0) == 0 and many.stats(0).bytes_staging == many.stats(0).bytes_store == 0
        many.decode({0: prompt[:20]})
        assert many.state(0) == 1 and many.stats(0).bytes_store == 0
        many.remove(0)
        assert many.read(0, other)[0].tobytes() == expected and many.state(0) == 2
        many.remove(0)

    # the last layer of a prompt waits for its compression
    many.announce(0, len(prompt))
    many.decode({0: prompt})
    assert many.state(0) == 3
    with shortage():
        many.decode({0: [5]})
    next_prompt_works()

    # the tails of a compressed prompt have to grow
    many.read(0, other)
    with shortage():
        many.decode({0: prompt[:400]})
    next_prompt_works()

    # a prompt that is not staged yet
    many.announce(0, len(prompt), whole=False)
    with shortage():
        many.decode({0: prompt[:400]})
    next_prompt_works()

    # removing one of two compressed prompts needs no memory
    many.read(0, other)
    many.read(1, prompt)
    both = many.stats(0).bytes_store
    hook.fail_alloc_all(1)
    assert many.c.llama_memory_seq_rm(memory, 1, -1, -1)
    hook.fail_alloc_all(0)
    many.n_past[1] = 0
    logits = many.decode({0: [5, 6]})[0].tobytes()
    many.remove(0)
    assert many.stats(0).bytes_store == 0
    many.read(0, other)
    assert many.decode({0: [5, 6]})[0].tobytes() == logits
    alone = many.stats(0).bytes_store
    many.read(1, prompt)
    assert many.stats(0).bytes_store == both > alone
    many.remove(1)
    assert many.stats(0).bytes_store == alone
    many.read(1, prompt)
    many.c.llama_memory_clear(memory, True)
    assert many.stats(0).bytes_store == many.stats(0).bytes_staging == 0

    # functions of our own: nothing that is thrown crosses the border to C
    hook.fail_alloc_arm(0)
    assert many.headkv.lib.headkv_fill_prompt(many.ctx, 1, 2000, 1) == 0
    n = hook.fail_alloc_disarm()
    assert n > 10
    for k in range(1, n + 1):
        many.remove(1)
        hook.fail_alloc_arm(k)
        code = many.headkv.lib.headkv_fill_prompt(many.ctx, 1, 2000, 1)
        hook.fail_alloc_disarm()
        assert code < 0 and "memory" in many.headkv.last_error(), (k, n, code, many.headkv.last_error())
"""


EVICTION_SCRIPT = """
import ctypes, json, sys
from conftest import load, logits, tokens

hook = ctypes.CDLL(None)
hook.fail_alloc_arm.argtypes = [ctypes.c_long]
hook.fail_alloc_disarm.restype = ctypes.c_long
bound = dict(kv_size=400, window=16, n_ctx=2048, kv_generated=600, kv_generated_slack=20, n_tail=8)
llm = load(sys.argv[1], **{**bound, **json.loads(sys.argv[2])})
llm.read_prompt(tokens(700))
llm.eval(tokens(611, seed=1)[1:])  # ten tokens before the first eviction
state, answer = llm.save_state(), tokens(61, seed=2)[1:]

def run(k):
    errors = []
    llm.load_state(state)
    hook.fail_alloc_arm(k)
    for token in answer:
        try:
            llm.eval([token])
        except (MemoryError, RuntimeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
            assert len(errors) == 1, errors
            llm.eval([token])  # it can be said again
    n = hook.fail_alloc_disarm()
    stats = llm.kv_stats()
    kept = [llm.kv_positions(il, ih).tolist() for il in range(2) for ih in range(32)]
    return errors, n, (logits(llm).tobytes(), kept, stats.n_evictions, stats.n_evicted, stats.n_cells.tolist())

run(0)
no_errors, n, expected = run(0)
assert no_errors == [] and expected[2] == 3
outcomes = []
for k in range(1, n + 1, 1 + n // 50):
    errors, _, found = run(k)
    assert found == expected, (k, errors)
    outcomes += errors
print(json.dumps([n, outcomes]))
"""


@pytest.fixture(scope="module")
def fail_alloc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if sys.platform != "linux" or not compiler:
        pytest.skip("replacing malloc needs Linux and a C compiler")
    path = tmp_path_factory.mktemp("preload") / "fail-alloc.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(path), str(TESTS / "cpp" / "fail-alloc.c"), "-ldl"], check=True)
    return path


@pytest.mark.parametrize(
    "options",
    [{"prefill": "token"}, {"prefill": "layer"}, {"prefill": "token", "attend": "composed"}, {"fit": "values"}],
    ids=["token", "layer", "composed", "fit"],
)
def test_each_failed_allocation_is_an_error_and_the_next_prompt_works(
    options: dict[str, Any], fail_alloc: Path, make_model: MakeModel
) -> None:
    path = make_model(Shape("memory", "llama", 4, 2, n_layer=3, head_dim=128, n_ff=128))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([*sys.path, str(TESTS)]), LD_PRELOAD=str(fail_alloc), MALLOC_ARENA_MAX="1")
    res = subprocess.run([sys.executable, "-c", SCRIPT, str(path), json.dumps(options)], env=env, cwd=TESTS, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-3000:]
    outcomes = json.loads(res.stdout.splitlines()[-1])
    failed = [text for text in outcomes if text]
    assert len(failed) >= 10
    assert all("memory" in text.lower() for text in failed), failed


@pytest.mark.parametrize("options", ["", "attend='composed', n_buckets=2"], ids=["fused", "composed"])
def test_a_shortage_that_lasts_leaves_nothing_pending(options: str, fail_alloc: Path, make_model: MakeModel) -> None:
    """What a failed batch wanted is not done for the next one, sequences can be removed, and memory is given back."""
    path = make_model(Shape("shortage", "llama", 8, 8, n_layer=3, head_dim=128, n_ff=128))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([*sys.path, str(TESTS)]), LD_PRELOAD=str(fail_alloc), MALLOC_ARENA_MAX="1")
    script = SHORTAGE_SCRIPT.replace("n_tail=8", f"n_tail=8, {options}")
    res = subprocess.run([sys.executable, "-c", script, str(path)], env=env, cwd=TESTS, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-3000:]


@pytest.mark.parametrize(
    "options",
    [{"policy": "snapkv"}, {"policy": "adakv"}, {"policy": "snapkv", "kv_generated_rank": "redundancy"}],
    ids=["uniform", "adaptive", "redundancy"],
)
def test_an_eviction_that_fails_leaves_all_cells_and_is_done_with_the_next_token(
    options: dict[str, Any], fail_alloc: Path, make_model: MakeModel
) -> None:
    """Large allocations of three evictions in turn, of more than fifty ones evenly spread: nothing is lost, and the answer is what it would have been."""
    path = make_model(Shape("evictions", "llama", 32, 32, n_layer=2, head_dim=64, n_ff=128))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([*sys.path, str(TESTS)]), LD_PRELOAD=str(fail_alloc), MALLOC_ARENA_MAX="1")
    command = [sys.executable, "-c", EVICTION_SCRIPT, str(path), json.dumps(options)]
    res = subprocess.run(command, env=env, cwd=TESTS, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-3000:]
    n, errors = json.loads(res.stdout.splitlines()[-1])
    assert n >= len(errors) >= 10 and all("memory" in text.lower() for text in errors), (
        n,
        errors,
    )  # a graph that is not reserved is computed without
    assert any("to evict generated tokens of sequence 0" in text for text in errors), errors
