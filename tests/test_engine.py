"""The engine against upstream and against the NumPy oracle, on random models."""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import SHAPES, Shape, greedy, load, logits, nmse, read_prompt, rss, tokens

from pyheadkv import gguf_header, gguf_keys, score_files
from pyheadkv.cli import inspect
from pyheadkv.options import Options
from pyheadkv.testing import random_importance, reference, write_random_model

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)

WINDOW = 8
MAX_GAP = 1e-4  # of scores, for devices that sum in another order
DIGEST_SCRIPT = """
import sys, ctypes, hashlib, numpy as np
if sys.argv[2] == "ours":
    from pyheadkv import Llama
else:
    from llama_cpp import Llama
prompt = [int(t) for t in sys.argv[3].split(",")]
for flash_attn in (False, True):
    llm = Llama(sys.argv[1], n_ctx=1024, n_batch=96, n_ubatch=32, n_threads=2, n_threads_batch=2, verbose=False, flash_attn=flash_attn)
    digest = hashlib.sha256()
    for chunk in (prompt, [5], [6], [7]):
        llm.eval(chunk)
        digest.update(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).tobytes())
    print(digest.hexdigest())
"""


def head_cells(llm: Any, il: int, ih: int, *, v: bool = False) -> npt.NDArray[np.float32]:
    """K or V rows of one head as the cache holds them, (n_cells, head_dim) float32."""
    from pyheadkv import _lib

    dim = llm.n_embd() // int(llm.metadata[f"{llm.metadata['general.architecture']}.attention.head_count"])
    key = f"{llm.metadata['general.architecture']}.attention.key_length"
    return llm._read_floats(_lib.lib.headkv_read_cells, int(llm.metadata.get(key, dim)), llm.n_ctx(), il, ih, v)


def window(llm: Any, il: int, n_head: int, head_dim: int) -> npt.NDArray[np.float32]:
    """The window queries of a layer, (n_window, n_head, head_dim) float32."""
    from pyheadkv import _lib

    return llm._read_floats(_lib.lib.headkv_read_window, n_head * head_dim, llm.kv_options.window, il).reshape(-1, n_head, head_dim)


# ---------------------------------------------------------------- off means off


@ALL_SHAPES
def test_without_kv_size_logits_are_those_of_the_unpatched_library(shape: Shape, make_model: MakeModel, stock_lib: Path) -> None:
    prompt = ",".join(map(str, tokens(200)))

    def digests(which: str, lib: str | None) -> list[str]:
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
        if lib:
            env["LLAMA_CPP_LIB_PATH"] = lib
        cmd = [sys.executable, "-c", DIGEST_SCRIPT, str(make_model(shape)), which, prompt]
        # not in the checkout, whose package has no library
        return subprocess.run(cmd, env=env, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True).stdout.split()

    ours = digests("ours", None)
    assert ours == digests("stock", str(stock_lib))
    assert len(set(ours)) == 2  # with and without flash attention: the digests do depend on the logits


# ---------------------------------------------------------------- budget >= prompt


@ALL_SHAPES
def test_full_budget_gives_the_greedy_tokens_of_the_stock_cache(shape: Shape, make_model: MakeModel) -> None:
    """Over 200 tokens. Where the two best logits of the stock cache are closer than its own rounding (0.5 % of their
    spread; its values are summed in f16) either of them is right, and the sequence goes on with the stock token."""
    path, prompt = make_model(shape), tokens(300)
    stock, llm = load(path, flash_attn=True), load(path, kv_size=512)
    stock.eval(prompt)
    read_prompt(llm, prompt)
    n_ties = 0
    for _ in range(200):
        token = int(logits(stock).argmax())
        for model in (stock, llm):
            model.eval([token])
        theirs, ours = logits(stock), logits(llm)
        if ours.argmax() != theirs.argmax():
            n_ties += 1
            assert theirs.max() - theirs[ours.argmax()] < 5e-3 * theirs.std()
    assert n_ties <= 4
    assert llm.kv_stats().state == "compressed"
    assert (llm.kv_stats().n_cells == 500).all()


@ALL_SHAPES
def test_full_budget_is_at_least_as_close_to_float64_as_the_stock_cache(shape: Shape, make_model: MakeModel) -> None:
    path, prompt = make_model(shape), tokens(300)
    oracle = reference.ReferenceModel(path)
    oracle.prefill(prompt)
    errors: dict[str, float] = {}
    expected = [oracle.decode(token) for token in (11, 12, 13, 14)]
    for name, options in {"stock": {"flash_attn": True}, "ours": {"kv_size": 512}}.items():
        llm = load(path, **options)
        read_prompt(llm, prompt)
        got = []
        for token in (11, 12, 13, 14):
            llm.eval([token])
            got.append(logits(llm))
        errors[name] = nmse(got, expected)
    assert errors["ours"] <= 1.02 * errors["stock"], errors
    assert errors["ours"] < 1e-5


def test_prompt_logits_do_not_change_with_compression(make_model: MakeModel) -> None:
    """The prompt's attention of ggml is upstream's, ours differs by rounding, which f16 cells make larger."""
    path, prompt = make_model(SHAPES[1]), tokens(700)
    llm = load(path, flash_attn=True)
    llm.eval(prompt)
    stock = logits(llm).astype(np.float64)
    assert (read_prompt(load(path, kv_size=32, attend="composed"), prompt) == stock).all()
    assert ((read_prompt(load(path, kv_size=32), prompt) - stock) ** 2).sum() < 1e-5 * (stock**2).sum()


# ---------------------------------------------------------------- kept cells


Kept = list[list[npt.NDArray[np.int32]]]


def oracle_positions(llm: Any, shape: Shape) -> tuple[Kept, list[npt.NDArray[np.float64]]]:
    """Kept positions by the oracle, from the engine's own window queries and keys, and the scores of each layer."""
    n, options = llm.n_tokens, llm.kv_options
    kept, all_scores = [], []
    for il in range(shape.n_layer):
        k = np.stack([head_cells(llm, il, ih) for ih in range(shape.n_head_kv)], axis=1)
        n_prefix = max(0, n - options.recent)
        kernel = options.pool_kernel or reference.pool_kernels(np.minimum(llm.kv_budget[il] - options.recent, n_prefix))
        scores = reference.score(
            window(llm, il, shape.n_head, shape.head_dim),
            k,
            scale=shape.head_dim**-0.5,
            n_prefix=n_prefix,
            power=options.power,
            pool=options.pool,
            pool_kernel=kernel,
        )
        kept.append(reference.keep(scores, llm.kv_budget[il], kv_size=options.kv_size, recent=options.recent, n_tokens=n))
        all_scores.append(scores)
    return kept, all_scores


def assert_kept(kept: npt.NDArray[np.int32], expected: npt.NDArray[np.int32], scores: npt.NDArray[np.float64], *, is_exact: bool) -> None:
    """The same cells; on a device that sums in another order also one whose score is as good as equal to that of the one it replaces."""
    if is_exact or np.array_equal(kept, expected):
        np.testing.assert_array_equal(kept, expected)
        return
    gained, lost = np.setdiff1d(kept, expected), np.setdiff1d(expected, kept)
    assert len(gained) == len(lost) <= 1 + len(kept) // 50
    assert scores[gained].min() >= (1 - MAX_GAP) * scores[lost].max()


@ALL_SHAPES
@pytest.mark.parametrize("n_ubatch", [1, 32, 512])
@pytest.mark.parametrize(
    ("n_prompt", "options"),
    [
        (5, {"kv_size": 32}),
        (8, {"kv_size": 32}),
        (30, {"kv_size": 32}),
        (31, {"kv_size": 16}),
        (300, {"kv_size": 9}),
        (300, {"kv_size": 32}),
        (701, {"kv_size": 96, "pool": "avg"}),
        (300, {"kv_size": 32, "preset": "default"}),
        (40, {"kv_size": 16, "preset": "default"}),
        (300, {"kv_size": 48, "window": 5, "recent": 20, "power": 2}),
        (700, {"kv_size": 160, "preset": "default", "pool": "avg"}),
        (300, {"kv_size": 40, "window": 70, "recent": 1, "power": 8, "pool_kernel": 1}),
    ],
    ids=str,
)
def test_kept_positions_equal_the_oracle(
    shape: Shape, n_ubatch: int, n_prompt: int, options: dict[str, Any], make_model: MakeModel, device: str
) -> None:
    llm = load(make_model(shape), n_ubatch=n_ubatch, **options)
    llm.eval(tokens(n_prompt, seed=n_prompt))
    expected, scores = oracle_positions(llm, shape)
    rows = {
        (il, ih, v): head_cells(llm, il, ih, v=v) for il in range(shape.n_layer) for ih in range(shape.n_head_kv) for v in (False, True)
    }
    llm.end_prompt()
    for il in range(shape.n_layer):
        for ih in range(shape.n_head_kv):
            kept = llm.kv_positions(il, ih)
            assert_kept(kept, expected[il][ih], scores[il][ih], is_exact=device == "cpu")
            for v in (False, True):  # the rows moved unchanged
                np.testing.assert_array_equal(head_cells(llm, il, ih, v=v), rows[il, ih, v][kept])


@ALL_SHAPES
def test_kept_positions_equal_a_whole_oracle_forward_pass_up_to_rounding(shape: Shape, make_model: MakeModel) -> None:
    """Swaps are allowed only between cells whose scores differ by less than 0.2 % of the head's threshold score."""
    path, prompt = make_model(shape), tokens(400, seed=3)
    llm = load(path, kv_size=48)
    read_prompt(llm, prompt)
    oracle = reference.ReferenceModel(path, kv_round=np.float16)
    oracle.prefill(prompt)
    for il in range(shape.n_layer):
        scores = oracle.scores(il, window=WINDOW)
        for ih, expected in enumerate(reference.keep(scores, llm.kv_budget[il], kv_size=48, recent=WINDOW, n_tokens=400)):
            kept = llm.kv_positions(il, ih)
            assert len(kept) == len(expected)
            swapped = np.setxor1d(kept, expected)
            if swapped.size:
                prefix = expected[expected < 400 - WINDOW]
                threshold = scores[ih, prefix].min()
                assert np.abs(scores[ih, swapped] / threshold - 1).max() < 2e-3, (il, ih, swapped)


@ALL_SHAPES
@pytest.mark.parametrize("attend", ["fused", "composed"])
def test_decode_after_compression_equals_the_oracle(shape: Shape, attend: str, make_model: MakeModel) -> None:
    path, prompt = make_model(shape), tokens(400, seed=4)
    llm = load(path, kv_size=40, attend=attend, n_buckets=1 if shape.n_head_kv < 4 else 3)
    read_prompt(llm, prompt)
    oracle = reference.ReferenceModel(path, kv_round=np.float16)
    oracle.prefill(prompt)
    oracle.retain([[llm.kv_positions(il, ih) for ih in range(shape.n_head_kv)] for il in range(shape.n_layer)])
    for chunk in ([11], [12], [13, 14, 15], [16]):  # several tokens at once see the cache and one another
        llm.eval(chunk)
        for token in chunk:
            expected = oracle.decode(token)
        assert nmse(logits(llm), expected) < 2e-5
    full = reference.ReferenceModel(path, kv_round=np.float16)
    full.prefill([*prompt, 11, 12, 13, 14, 15])
    assert nmse(full.decode(16), expected) > 1e-3  # the full cache answers otherwise: the comparison can fail


@ALL_SHAPES
@pytest.mark.parametrize("attend", ["fused", "composed"])
def test_a_compressed_prompt_can_be_truncated_down_to_its_window(shape: Shape, attend: str, make_model: MakeModel) -> None:
    path, prompt = make_model(shape), tokens(400, seed=4)
    llm = load(path, kv_size=40, attend=attend, n_tail=4)
    read_prompt(llm, prompt)
    before = [[llm.kv_positions(il, ih) for ih in range(shape.n_head_kv)] for il in range(shape.n_layer)]
    llm.eval([5, 6])
    assert not llm._ctx.kv_cache_seq_rm(0, 400 - WINDOW - 1, -1)
    for n in (397, 393):
        assert llm._ctx.kv_cache_seq_rm(0, n, -1)
        llm.n_tokens = n
        assert llm.kv_stats().n_prompt == llm.kv_stats().n_past == n
    kept = [[llm.kv_positions(il, ih) for ih in range(shape.n_head_kv)] for il in range(shape.n_layer)]
    assert all((a == b[b < 393]).all() for rows, rows_before in zip(kept, before) for a, b in zip(rows, rows_before))
    oracle = reference.ReferenceModel(path, kv_round=np.float16)
    oracle.prefill(prompt[:393])
    oracle.retain(kept)
    for chunk in ([prompt[393]], [12, 13, 14], list(range(20, 40))):
        llm.eval(chunk)
        for token in chunk:
            expected = oracle.decode(token)
        assert nmse(logits(llm), expected) < 2e-5
    assert not llm._ctx.kv_cache_seq_rm(0, 391, -1)
    assert llm._ctx.kv_cache_seq_rm(0, 392, -1)


def test_a_prompt_that_was_kept_whole_can_be_truncated_anywhere(make_model: MakeModel) -> None:
    path, prompt = make_model(SHAPES[1]), tokens(100)
    llm, fresh = load(path, kv_size=200), load(path, kv_size=200)
    read_prompt(llm, prompt)
    assert llm._ctx.kv_cache_seq_rm(0, 30, -1)
    llm.n_tokens = 30
    read_prompt(fresh, prompt[:30])
    for model in (llm, fresh):
        model.eval([9])
    assert nmse(logits(llm), logits(fresh)) < 1e-5


def test_tail_grows_and_answers_do_not_change(make_model: MakeModel) -> None:
    path, prompt = make_model(SHAPES[1]), tokens(300)
    outputs = [greedy(load(path, kv_size=40, n_tail=n_tail), prompt, 150) for n_tail in (1, 64, 512)]
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("n_buckets", [1, 2])
def test_tail_of_the_composed_path_grows(n_buckets: int, make_model: MakeModel) -> None:
    """Its rounding depends on the padding of the views, so logits are compared and not tokens."""
    path, prompt = make_model(SHAPES[1]), tokens(300)
    answers = tokens(60, seed=12)
    results = []
    for options in ({}, {"attend": "composed", "n_tail": 1, "n_buckets": n_buckets}):
        llm = load(path, kv_size=40, **options)
        read_prompt(llm, prompt)
        for token in answers:
            llm.eval([token])
        results.append(logits(llm))
    assert nmse(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("option", [{"n_threads": 1, "n_threads_batch": 1}, {"n_threads": 3, "n_threads_batch": 4}, {"n_batch": 64}])
def test_kept_cells_and_logits_do_not_depend_on_threads_or_batches(option: dict[str, int], make_model: MakeModel) -> None:
    path, prompt = make_model(SHAPES[4]), tokens(600, seed=5)
    results = []
    for options in ({}, option):
        llm = load(path, kv_size=64, n_ubatch=64, **options)
        read_prompt(llm, prompt)
        llm.eval([9])
        results.append(([llm.kv_positions(il, ih).tolist() for il in range(2) for ih in range(4)], logits(llm)))
    assert results[0][0] == results[1][0]
    assert (results[0][1] == results[1][1]).all()


@pytest.mark.parametrize("type_kv", [8, 2, 30], ids=["q8_0", "q4_0", "bf16"])
def test_quantised_cells_move_unchanged_and_decode(type_kv: int, make_model: MakeModel) -> None:
    """type_k, type_v of staging and store; rows must be the same bytes, hence the same floats, before and after."""
    shape = Shape("quant", "llama", 4, 2, n_layer=2, head_dim=64)
    path, prompt = make_model(shape), tokens(300, seed=6)
    llm = load(path, kv_size=40, type_k=type_kv, type_v=type_kv)
    llm.eval(prompt)
    rows = {(il, ih, v): head_cells(llm, il, ih, v=v) for il in range(2) for ih in range(2) for v in (False, True)}
    llm.end_prompt()
    for (il, ih, v), before in rows.items():
        np.testing.assert_array_equal(head_cells(llm, il, ih, v=v), before[llm.kv_positions(il, ih)])
    llm.eval([9])
    outputs = [logits(llm)]
    for options in ({"attend": "composed"}, {}):
        other = load(path, kv_size=40, **options, **({"type_k": type_kv, "type_v": type_kv} if options else {}))
        read_prompt(other, prompt)
        other.eval([9])
        outputs.append(logits(other))
    assert nmse(outputs[0], outputs[1]) < 1e-3  # composed path on the same types
    assert nmse(outputs[0], outputs[2]) < {8: 1e-2, 2: 0.3, 30: 1e-2}[type_kv]  # f16 cells


# ---------------------------------------------------------------- sequences


def test_tail_can_be_truncated_but_not_the_prompt(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=32)
    read_prompt(llm, tokens(200))
    llm.eval([9])
    after_one = logits(llm)
    llm.eval([10, 11, 12])
    assert llm._ctx.kv_cache_seq_rm(0, 201, -1)
    llm.n_tokens = 201
    assert not llm._ctx.kv_cache_seq_rm(0, 191, -1)
    assert not llm._ctx.kv_cache_seq_rm(0, 50, 60)
    assert llm.kv_stats().n_past == 201
    assert llm._ctx.kv_cache_seq_rm(0, 200, -1)
    llm.n_tokens = 200
    llm.eval([9])
    assert (logits(llm) == after_one).all()


def test_second_prompt_with_the_same_prefix_is_answered_like_a_fresh_one(make_model: MakeModel) -> None:
    path = make_model(SHAPES[1])
    a = tokens(200)
    b, c = a + tokens(40, seed=8)[1:], a + tokens(30, seed=9)[1:]
    llm = load(path, kv_size=32)
    for prompt in (a, b, c, a, a):
        assert greedy(llm, prompt, 20) == greedy(load(path, kv_size=32), prompt, 20)


def test_generate_without_reset_continues_on_what_was_evaluated(make_model: MakeModel) -> None:
    """A part of the prompt that is not compressed yet, as upstream does; and a compressed past, as eval does."""
    path, document, question = make_model(SHAPES[1]), tokens(100), tokens(20, seed=3)[1:]

    def ask(llm: Any, prompt: list[int], *, positional: bool = False) -> list[int]:
        args = (40, 0.95, 0.05, 1.0, 0.0, 1.0, False) if positional else ()
        stream = llm.generate(prompt, *args, **{} if positional else {"temp": 0.0, "reset": False})
        return [next(stream) for _ in range(8)]

    stock, ours, whole = load(path, flash_attn=True), load(path, kv_size=256), load(path, kv_size=32)
    for llm in (stock, ours):
        llm.eval(document)
    answer = ask(stock, question)
    assert ask(ours, question, positional=True) == answer and ours.n_tokens == stock.n_tokens == 119 + 7
    assert ours.kv_stats().n_prompt == 119

    pieces = load(path, kv_size=32)
    pieces.eval(document)
    first = ask(pieces, question)
    assert first == greedy(whole, [*document, *question], 8)
    for il, ih in np.ndindex(3, 2):
        np.testing.assert_array_equal(pieces.kv_positions(il, ih), whole.kv_positions(il, ih))
    second = ask(pieces, question)
    assert pieces.kv_stats().n_prompt == 119 and pieces.n_tokens == 119 + 7 + 19 + 7
    whole.eval(question)
    assert second[0] == int(logits(whole).argmax())
    assert ask(load(path, kv_size=32), document) == greedy(load(path, kv_size=32), document, 8)  # nothing was evaluated


def test_kv_reuse_continues_on_the_compressed_past(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=32, kv_reuse=True)
    a = tokens(200)
    out = greedy(llm, a, 10)
    kept = llm.kv_positions(0, 0)
    greedy(llm, [*a, *out, 20, 21, 22], 5)
    assert llm.kv_stats().n_prompt == 200
    assert (llm.kv_positions(0, 0) == kept).all()
    assert llm.kv_stats().n_past == 200 + 10 + 3 + 4


def test_removed_window_queries_are_an_error_and_not_a_wrong_answer(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=32)
    llm.eval(tokens(200))
    llm._ctx.kv_cache_seq_rm(0, 195, -1)
    llm.n_tokens = 195
    llm.eval([9, 10])
    with pytest.raises(RuntimeError, match="evaluate the prompt again"):
        llm.end_prompt()
    llm.eval([11, 12, 13, 14, 15, 16])
    llm.end_prompt()
    assert llm.kv_stats().n_prompt == 203


def test_context_full_is_an_error_and_the_next_prompt_works(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=32, n_ctx=256)
    with pytest.raises(ValueError, match="n_ctx=256"):
        llm.eval(tokens(257))
    assert len(greedy(llm, tokens(250), 7)) == 7
    with pytest.raises((RuntimeError, ValueError), match="n_ctx"):
        llm.eval([9, 9, 9])
    assert len(greedy(llm, tokens(20), 5)) == 5


def test_shifting_positions_is_refused_from_then_on(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=32)
    read_prompt(llm, tokens(100))
    llm._ctx.kv_cache_seq_shift(0, 0, -1, 5)
    with pytest.raises(RuntimeError, match="shifted"):
        llm.eval([9])
    assert len(greedy(llm, tokens(100), 3)) == 3  # a new prompt clears the cache


# ---------------------------------------------------------------- bytes


def test_bytes_are_those_of_the_cells_and_staging_is_released(make_model: MakeModel) -> None:
    shape = Shape("bytes", "llama", 8, 4, n_layer=4, head_dim=64)
    llm = load(make_model(shape, importance=None), kv_size=256, policy="snapkv", n_ctx=8192, n_tail=16)
    llm.reset()
    llm.eval(tokens(4000))
    assert llm.kv_stats().bytes_staging >= 4000 * 4 * 4 * 64 * 2 * 2
    llm.end_prompt()
    stats = llm.kv_stats()
    row = 64 * 2 * 2  # one cell: K and V in f16
    assert stats.bytes_staging == 0
    assert (stats.n_cells == 256).all()
    cells, tail = 256 * 16 * row, 16 * 16 * row
    assert cells + tail <= stats.bytes_store <= 1.05 * cells + tail
    assert stats.bytes_full == 4000 * 16 * row


def test_process_memory_holds_what_stats_say_at_32k_context(make_model: MakeModel) -> None:
    """RSS with 16 MiB of noise: 256 MiB of full cache at n_ctx, 110 MiB while 14000 tokens are read, then a few MiB."""
    shape = Shape("rss", "llama", 16, 16, n_layer=2, head_dim=64, n_ff=128)
    llm = load(make_model(shape, importance=None), kv_size=128, policy="snapkv", n_ctx=32768, n_batch=512)
    from pyheadkv import _lib

    read_prompt(llm, tokens(600))  # compute buffers are touched once
    llm.reset()
    before = rss()
    _lib.check(_lib.lib.headkv_fill_prompt(llm.ctx, 0, 14000, 1))
    staged = rss() - before
    llm.end_prompt()
    after = rss() - before
    stats = llm.kv_stats()
    noise = 16 << 20
    assert stats.bytes_store < 2 << 20
    assert abs(staged - 14000 * 2 * 16 * 64 * 2 * 2) < noise
    assert after < stats.bytes_store + noise


def test_a_thousand_short_completions_leave_memory_flat(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=32, n_ctx=4096)

    def run(n: int, seed: int) -> None:
        for i in range(n):
            greedy(llm, tokens(30 + i % 50, seed=seed + i), 3)

    run(200, 0)
    before = rss()
    run(1000, 1000)
    assert rss() - before < 4 << 20


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_size": 0}, "kv_size=0"),
        ({"kv_size": -1}, "kv_size=-1"),
        ({"kv_size": 8}, "kv_size=8"),
        ({"kv_size": 4096, "n_ctx": 2048}, "n_ctx = 2048"),
        ({"kv_size": 64, "n_ctx": 32}, "n_ctx = 32"),
        ({"kv_size": "abc"}, "kv_size='abc'"),
        ({"kv_size": 128.5}, "kv_size=128.5"),
        ({"kv_size": 64, "beta": 1.0}, "beta=1.0"),
        ({"kv_size": 64, "beta": float("nan")}, "beta=nan"),
        ({"kv_size": 64, "pool_kernel": 6}, "pool_kernel=6"),
        ({"kv_size": 64, "pool": "sum"}, "pool='sum'"),
        ({"kv_size": 64, "policy": "magic"}, "policy='magic'"),
        ({"kv_size": 64, "window": 0}, "window=0"),
        ({"kv_size": 64, "importance": np.ones((2, 2))}, "2 layers x 2 heads"),
        ({"kv_size": 64, "importance": -np.ones((3, 8))}, "layer 0 head 0 is -1.0: every value must be >= 0"),
        ({"kv_size": 64, "importance": np.zeros((3, 8))}, "sum 0.0: it must be above 0"),
        ({"kv_size": 64, "importance": np.full((3, 8), np.nan)}, "is nan: every value must be finite"),
        ({"kv_size": 64, "importance": "/no/such/file.json"}, "no such file"),
        ({"kv_size": 64, "embedding": True}, "embedding=True"),
    ],
    ids=lambda v: None if isinstance(v, str) else "-".join(f"{k}={x}" for k, x in v.items())[:40],
)
def test_wrong_options_are_value_errors_that_name_value_and_limit(options: dict[str, Any], message: str, make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=message):
        load(make_model(SHAPES[1]), **options)
    assert len(greedy(load(make_model(SHAPES[1])), [1, 5, 6], 2)) == 2  # nothing sticks


def test_a_model_without_importance_is_refused_with_the_remedy(make_model: MakeModel) -> None:
    path = make_model(SHAPES[1], importance=None)
    with pytest.raises(ValueError, match="pyheadkv score"):
        load(path, kv_size=64, policy="headkv")
    assert load(path, kv_size=64).kv_budget.tolist() == [[64, 64]] * 3


def test_corrupt_files_are_value_errors(make_model: MakeModel, tmp_path: Path) -> None:
    good = make_model(SHAPES[1]).read_bytes()
    for i, data in enumerate([b"", b"GGUF", good[:100], good[: len(good) // 2], b"\0" * 5000]):
        bad = tmp_path / f"{i}.gguf"
        bad.write_bytes(data)
        with pytest.raises(ValueError):
            load(bad, kv_size=64)


def test_c_api_checks_its_arguments(make_model: MakeModel) -> None:
    from pyheadkv import _lib

    lib = _lib.lib
    llm = load(make_model(SHAPES[1]), kv_size=32)
    plain = load(make_model(SHAPES[1]))
    assert lib.headkv_enabled(llm.ctx) and not lib.headkv_enabled(plain.ctx)
    assert lib.headkv_end_prompt(llm.ctx, 0) < 0 and "empty" in _lib.last_error()
    assert lib.headkv_end_prompt(llm.ctx, 1) < 0 and "sequence 1" in _lib.last_error()
    assert lib.headkv_end_prompt(llm.ctx, -1) < 0
    assert lib.headkv_end_prompt(plain.ctx, 0) < 0 and "headkv_set_params" in _lib.last_error()
    assert lib.headkv_begin_prompt(llm.ctx, 0, 1 << 30, False, None) < 0
    params = lib.headkv_default_params()
    params.size = 8
    assert lib.headkv_set_params(ctypes.byref(params)) < 0 and "size" in _lib.last_error()
    read_prompt(llm, tokens(100))
    for il, ih in ((-1, 0), (3, 0), (0, 2), (0, -1)):
        assert lib.headkv_get_positions(llm.ctx, 0, il, ih, None, 0) < 0
    room = (ctypes.c_int32 * 1)()
    assert lib.headkv_get_positions(llm.ctx, 0, 0, 0, room, 1) < 0 and "room for 1" in _lib.last_error()


def test_c_budgets_equal_the_oracle_on_the_golden_cases() -> None:
    """The oracle itself is checked against the golden file in test_budget.py."""
    import json

    from pyheadkv import _lib

    golden = Path(__file__).parent / "golden"
    for case in json.loads((golden / "head_capacity_r2.json").read_text())["cases"]:
        scores = np.ascontiguousarray(json.loads((golden / f"head_mean_{case['scores']}.json").read_text())["mean_score"], dtype=np.float64)
        params = _lib.lib.headkv_default_params()
        params.kv_size, params.beta = case["kv_size"], case["beta"]
        params.importance = scores.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
        params.n_layer, params.n_head = scores.shape
        for n_head_kv in (32, 8):  # 32: the authors' own granularity
            got = np.zeros((32, n_head_kv), dtype=np.int32)
            counts = [np.full(32, n, dtype=np.int32) for n in (32, n_head_kv)]
            *heads, dst = (x.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)) for x in (*counts, got))
            _lib.check(_lib.lib.headkv_plan(ctypes.byref(params), 32, *heads, 0, dst))
            caps = reference.budget(scores, kv_size=case["kv_size"], recent=WINDOW, beta=case["beta"])
            np.testing.assert_array_equal(got, reference.budget_kv(caps, n_head_kv=n_head_kv, recent=WINDOW))


@pytest.mark.parametrize("name", ["llama3_8b_r2", "mistral_7b_r2"])
def test_the_authors_scores_go_through_gguf_and_engine_to_their_budgets(name: str, tmp_path: Path) -> None:
    """A model of their 32 layers x 32 heads, without GQA: the budget of a KV head is theirs, the window on top."""
    golden = Path(__file__).parent / "golden"
    scores, bare, path = tmp_path / "scores.json", tmp_path / "bare.gguf", tmp_path / "model.gguf"
    scores.write_bytes(gzip.decompress((golden / f"head_score_{name}.json.gz").read_bytes()))
    write_random_model(bare, n_layer=32, n_embd=256, n_head=32, n_head_kv=32, head_dim=8, n_ff=32, seed=1)
    gguf_keys.write_importance(bare, path, score_files.load_scores(scores).values)
    cases = [c for c in json.loads((golden / "head_capacity_r2.json").read_text())["cases"] if c["scores"] == name and c["kv_size"] <= 1024]
    assert len(cases) == 5 * 8
    llm = load(path, kv_size=64, n_ctx=1024)
    for case in cases:
        llm.configure(kv_size=case["kv_size"], beta=case["beta"])
        caps = llm.kv_budget - WINDOW
        digest = hashlib.sha256(",".join(map(str, caps.ravel().tolist())).encode()).hexdigest()
        assert (caps.sum(), digest) == (case["total_without_window"], case["sha256"])


def test_beta_comes_with_the_importance_unless_it_is_given(make_model: MakeModel, tmp_path: Path) -> None:
    shape = SHAPES[1]
    values = random_importance(n_layer=shape.n_layer, n_head=shape.n_head, seed=3)
    bare = make_model(shape, importance=None)
    stored, scores = tmp_path / "stored.gguf", tmp_path / "scores.json"
    gguf_keys.write_importance(bare, stored, values, beta=2.5)
    scores.write_text(json.dumps({"importance": values.tolist(), "beta": 2.5}))

    def budget(path: Path, **options: Any) -> list[list[int]]:
        cells = load(path, kv_size=48, **options).kv_budget
        if "policy" not in options:
            plan = inspect.make_plan(path, options=Options(kv_size=48, beta=options.get("beta")), importance=options.get("importance"))
            assert plan.budget.tolist() == cells.tolist()
        return cells.tolist()

    expected = budget(bare, importance=values, beta=2.5)
    assert budget(stored) == budget(bare, importance=scores) == budget(bare, importance=stored) == expected
    assert budget(bare, importance=values) == budget(stored, beta=1.2) != expected
    assert budget(stored, policy="snapkv") != expected
    llm = load(stored, kv_size=48, beta=1.2)
    llm.configure(beta=None)
    assert llm.kv_budget.tolist() == expected


def test_another_version_of_the_importance_is_refused_by_the_library(make_model: MakeModel, tmp_path: Path) -> None:
    from pyheadkv import _lib
    from pyheadkv.options import Options

    path, key = tmp_path / "m.gguf", b".attention.head_importance.version"
    raw = make_model(SHAPES[1]).read_bytes()
    old = key + struct.pack("<II", gguf_header.UINT32, 1)
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, key + struct.pack("<II", gguf_header.UINT32, 2)))
    with pytest.raises(ValueError, match="version is not 1"), _lib.creating(Options(kv_size=48).to_params(None, str(path))):
        pass


@pytest.mark.parametrize(
    ("value", "message", "said"),
    [
        (1.0, "beta is 1:", "beta=1.0: it must be"),
        (math.nan, "beta is -?nan:", "beta=nan: it must be"),
        (None, "must be a float64", "is u64"),
    ],
)
def test_a_damaged_beta_in_the_model_is_refused_by_python_and_library(
    value: float | None, message: str, said: str, make_model: MakeModel, tmp_path: Path
) -> None:
    from pyheadkv import _lib
    from pyheadkv.options import Options

    path = tmp_path / "m.gguf"
    values = random_importance(n_layer=SHAPES[1].n_layer, n_head=SHAPES[1].n_head, seed=3)
    gguf_keys.write_importance(make_model(SHAPES[1], importance=None), path, values, beta=2.5)
    raw = path.read_bytes()
    old = struct.pack("<I", gguf_header.FLOAT64) + struct.pack("<d", 2.5)
    new = struct.pack("<I", 10) + old[4:] if value is None else old[:4] + struct.pack("<d", value)  # 10 = u64
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))
    with pytest.raises(ValueError, match=said):
        load(path, kv_size=48)
    with pytest.raises(ValueError, match=message), _lib.creating(Options(kv_size=48).to_params(None, str(path))):
        pass


def test_a_sequence_that_the_context_does_not_have_is_empty(make_model: MakeModel) -> None:
    import llama_cpp

    llm = load(make_model(SHAPES[1]), kv_size=48)
    llm.read_prompt(tokens(100))
    memory = llama_cpp.llama_get_memory(llm.ctx)
    for look in (llama_cpp.llama_memory_seq_pos_min, llama_cpp.llama_memory_seq_pos_max):
        assert look(memory, 1) == look(memory, -1) == -1 != look(memory, 0)


@pytest.mark.parametrize("prefill", ["token", "layer"])
@pytest.mark.parametrize(("setter", "on", "off", "said"), [
    ("llama_set_causal_attn", True, False, "causal attention was switched off"),
    ("llama_set_embeddings", False, True, "embeddings were asked for"),
])  # fmt: skip
def test_what_is_switched_after_the_creation_is_refused(
    setter: str, on: bool, off: bool, said: str, prefill: str, make_model: MakeModel
) -> None:
    """A prompt that is read layer by layer has a causal mask of its own, whatever the context says."""
    import llama_cpp

    llm = load(make_model(SHAPES[1]), kv_size=48, prefill=prefill)
    llm.read_prompt(tokens(100))
    expected = logits(llm)
    getattr(llama_cpp, setter)(llm.ctx, off)
    with pytest.raises(RuntimeError, match=said):
        llm.read_prompt(tokens(100))
    getattr(llama_cpp, setter)(llm.ctx, on)
    llm.read_prompt(tokens(100))
    assert np.array_equal(logits(llm), expected)


def test_a_prompt_whose_end_is_pending_tells_what_its_layers_hold(make_model: MakeModel) -> None:
    from pyheadkv import _lib

    shape = SHAPES[1]
    llm = load(make_model(shape), kv_size=24, policy="snapkv", prefill="layer")
    ids = np.array(tokens(200), dtype=np.int32)
    pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    _lib.check(_lib.lib.headkv_read_prompt(llm.ctx, 0, pointer, len(ids)))
    stats = llm.kv_stats()
    assert stats.state == "layered"
    assert stats.n_cells.tolist() == [[24] * shape.n_head_kv] * (shape.n_layer - 1) + [[200] * shape.n_head_kv]
    row = np.zeros((200, shape.head_dim), dtype=np.float32)
    code = _lib.lib.headkv_read_cells(llm.ctx, 0, 0, 0, False, row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), row.size)
    assert code < 0 and "is not compressed yet: call headkv_end_prompt() first" in _lib.last_error()
    _lib.check(_lib.lib.headkv_end_prompt(llm.ctx, 0))
    assert (llm.kv_stats().n_cells == 24).all()
