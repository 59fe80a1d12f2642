"""Prompts read layer by layer against prompts read as upstream does, on random models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES, Shape, load, nmse, outcome, read_prompt, tokens

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)


@ALL_SHAPES
@pytest.mark.parametrize(("n_prompt", "n_ubatch"), [(2, 32), (31, 32), (700, 32), (700, 512), (1537, 512), (1537, 2048)])
def test_logits_and_kept_cells_are_identical_to_token_major(shape: Shape, n_prompt: int, n_ubatch: int, make_model: MakeModel) -> None:
    path, prompt = make_model(shape), tokens(n_prompt, seed=n_prompt)
    outcomes = []
    for prefill in ("token", "layer"):
        llm = load(path, kv_size=48, prefill=prefill, n_ubatch=n_ubatch, n_batch=2048)
        assert llm.prefill_mode == prefill
        outcomes.append(outcome(llm, prompt, shape))
        assert llm.kv_stats().bytes_staging == 0
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("type_kv", [8, 2], ids=["q8_0", "q4_0"])
def test_quantised_cells_are_identical_to_token_major(type_kv: int, make_model: MakeModel) -> None:
    shape = Shape("quant", "llama", 4, 2, n_layer=3, head_dim=64)
    path, prompt = make_model(shape), tokens(700)
    llms = [load(path, kv_size=48, prefill=prefill, type_k=type_kv, type_v=type_kv) for prefill in ("token", "layer")]
    assert outcome(llms[0], prompt, shape) == outcome(llms[1], prompt, shape)


def test_only_one_layer_is_staged(make_model: MakeModel) -> None:
    shape = Shape("peak", "llama", 8, 8, n_layer=8, head_dim=64, n_ff=128)
    path, n = make_model(shape, importance=None), 4000
    peaks = {}
    for prefill in ("token", "layer"):
        llm = load(path, kv_size=64, policy="snapkv", prefill=prefill, n_ctx=8192)
        read_prompt(llm, tokens(n))
        peaks[prefill] = llm.kv_stats().bytes_peak
    layer, hidden = n * 8 * 64 * 2 * 2, n * 512 * 4
    store, mask = llm.kv_stats().bytes_store, (n + 1024) * 512 * 2
    assert peaks["token"] >= 8 * layer
    assert peaks["layer"] <= hidden + 1.1 * layer + store + mask + (4 << 20)


@ALL_SHAPES
def test_hidden_states_in_f16_take_half_the_memory_and_change_little(shape: Shape, make_model: MakeModel) -> None:
    path, prompt = make_model(shape), tokens(1500)
    results = {}
    for hidden in ("f32", "f16"):
        llm = load(path, kv_size=48, prefill="layer", prefill_hidden=hidden, n_ubatch=256)
        results[hidden] = (read_prompt(llm, prompt), llm.kv_stats().bytes_peak)
    saved = results["f32"][1] - results["f16"][1]
    assert abs(saved - 1500 * shape.n_head * shape.head_dim * 2) < 4096
    assert 0 < nmse(results["f16"][0], results["f32"][0]) < 1e-5


def test_plain_eval_does_not_end_the_prompt(make_model: MakeModel) -> None:
    """What is evaluated in pieces is one prompt until end_prompt()."""
    path, prompt = make_model(SHAPES[1]), tokens(500)
    whole, pieces = load(path, kv_size=48), load(path, kv_size=48)
    whole.read_prompt(prompt)
    pieces.eval(prompt[:200])
    assert pieces.kv_stats().state == "staged"
    pieces.eval(prompt[200:])
    pieces.end_prompt()
    for il in range(3):
        np.testing.assert_array_equal(whole.kv_positions(il, 0), pieces.kv_positions(il, 0))


def set_progress(llm: Any, progress: Callable[..., Any] | None, door: str) -> None:
    """``Llama.set_progress``, or that of the library, in whose calls nothing may be raised."""
    if door == "python":
        llm.set_progress(progress)
        return
    from pyheadkv import _lib

    llm.callback = _lib.Progress() if progress is None else _lib.Progress(lambda *step: progress(*step[:4]) is not False)
    _lib.check(_lib.lib.headkv_set_progress(llm.ctx, llm.callback, None))


@pytest.mark.parametrize("door", ["python", "library"])
@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_abort_in_every_step_leaves_a_clean_state(prefill: str, door: str, make_model: MakeModel) -> None:
    path, prompt = make_model(SHAPES[1]), tokens(150)
    llm = load(path, kv_size=48, prefill=prefill, n_ubatch=64)
    fresh = outcome(llm, prompt, SHAPES[1])
    steps: list[tuple[int, int, int, int]] = []
    set_progress(llm, lambda *step: steps.append(step), door)
    llm.read_prompt(prompt)
    places = {"token": [(0, 1, i, 150) for i in (0, 64, 128)], "layer": [(il, 3, i, 150) for il in range(3) for i in (0, 64, 128)]}
    assert steps == places[prefill]
    for abort_at in steps:
        set_progress(llm, lambda *step, abort_at=abort_at: step != abort_at, door)
        with pytest.raises(RuntimeError, match="aborted"):
            llm.read_prompt(prompt)
        set_progress(llm, None, door)
        stats = llm.kv_stats()
        assert (stats.state, stats.n_past, stats.bytes_staging) == ("empty", 0, 0)
        assert outcome(llm, prompt, SHAPES[1]) == fresh


@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_what_progress_raises_is_raised_by_the_evaluation(prefill: str, make_model: MakeModel) -> None:
    path, prompt = make_model(SHAPES[1]), tokens(150)
    llm = load(path, kv_size=48, prefill=prefill, n_ubatch=64)
    fresh = outcome(llm, prompt, SHAPES[1])
    for error in (KeyboardInterrupt(), ZeroDivisionError("here")):
        left = [2]

        def progress(*_: int, left: list[int] = left, error: BaseException = error) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise error

        llm.set_progress(progress)
        with pytest.raises(type(error)) as raised:
            llm.read_prompt(prompt)
        assert raised.value is error and left == [-1]
        llm.set_progress(None)
        assert outcome(llm, prompt, SHAPES[1]) == fresh


def test_progress_is_that_of_prompts_alone(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=48, n_ubatch=64)
    steps: list[tuple[int, int, int, int]] = []
    llm.set_progress(lambda *step: steps.append(step))
    llm.eval(tokens(100))
    llm.eval(tokens(30)[1:])
    assert steps == [(0, 1, 0, 100), (0, 1, 64, 100), (0, 1, 100, 129)]
    llm.end_prompt()
    llm.eval([5])
    assert len(steps) == 3


@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_ctrl_c_is_handled_while_a_prompt_is_read(prefill: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one piece of it, and the next prompt is read as if nothing had been."""
    from pyheadkv import _lib, llama

    path, prompt = make_model(SHAPES[1]), tokens(600)
    llm = load(path, kv_size=48, prefill=prefill, n_ubatch=64, n_batch=64)
    fresh = outcome(llm, prompt, SHAPES[1])
    n_calls = 0
    read, name = (llm._ctx, "decode") if prefill == "token" else (_lib.lib, "headkv_read_ahead")
    call = getattr(read, name)

    def interrupted(*args: Any) -> Any:
        nonlocal n_calls
        result = call(*args)
        n_calls += 1
        if n_calls == 3:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(llama, "PIECE_MS", 0)  # one step
    monkeypatch.setattr(read, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(llm.generate(prompt, temp=0.0))
    assert n_calls == 3
    monkeypatch.undo()
    assert (llm.kv_stats().state, llm.kv_stats().bytes_staging, llm.n_tokens) == ("empty", 0, 0)
    assert outcome(llm, prompt, SHAPES[1]) == fresh


def test_logits_of_all_tokens_are_read_token_by_token(make_model: MakeModel) -> None:
    path, prompt = make_model(SHAPES[1]), tokens(100)
    llm = load(path, kv_size=48, logits_all=True)
    llm.read_prompt(prompt)
    assert llm.kv_stats().state == "compressed"
    assert np.isfinite(llm.scores[:100]).all()


def test_wrong_prefill_is_a_value_error(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="prefill='rows'"):
        load(make_model(SHAPES[1]), kv_size=48, prefill="rows")


LIMIT_SCRIPT = """
import resource, sys
from pathlib import Path
from pyheadkv import Llama
import llama_cpp
from llama_cpp._internals import LlamaModel
path, prefill, n, mib = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
options = dict(n_threads=2, n_threads_batch=2, verbose=False)
options.update({"flash_attn": True} if prefill == "stock" else {"kv_size": 64, "policy": "snapkv", "prefill": prefill})
first = Llama(path, n_ctx=512, **options)
first.read_prompt([1, 5, 6])
first.close()
model = LlamaModel(path_model=path, params=llama_cpp.llama_model_default_params(), verbose=False)  # mapped, or copied for AMX
size = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) * 1024
model.close()
resource.setrlimit(resource.RLIMIT_AS, (size + (mib << 20), resource.RLIM_INFINITY))
llm = Llama(path, n_ctx=n + 256, **options)
llm.read_prompt([1] + [5 + i % 300 for i in range(n - 1)])
llm.eval([7])
print("answered after", llm.n_tokens)
"""


@pytest.mark.parametrize(("prefill", "fits"), [("stock", False), ("token", False), ("layer", True)])
def test_a_prompt_fits_into_memory_that_is_too_small_for_its_full_cache(prefill: str, fits: bool, make_model: MakeModel) -> None:
    """6000 tokens: 188 MiB of full cache, 170 MiB of address space for everything but the weights."""
    shape = Shape("limit", "llama", 16, 16, n_layer=8, head_dim=64, n_ff=128)
    path = make_model(shape, importance=None)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), MALLOC_ARENA_MAX="1")
    cmd = [sys.executable, "-c", LIMIT_SCRIPT, str(path), prefill, "6000", "170"]
    res = subprocess.run(cmd, env=env, cwd=Path(__file__).parent, capture_output=True, text=True)
    if fits:
        assert "answered after 6001" in res.stdout, res.stderr[-2000:]
    else:  # a clean error, not a crash
        assert res.returncode == 1 and ("Error" in res.stderr), (res.returncode, res.stderr[-2000:])
