"""Generated tokens that are bounded (kv_generated): which cells stay, what is saved, what can be taken back."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HYBRID, SHAPES, WINDOWED, Shape, greedy, load, logits, nmse, tokens
from test_sequences import params_of, sequences

from pyheadkv import _lib
from pyheadkv.testing import generated
from pyheadkv.testing.oracle import layers_of

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
GQA4 = SHAPES[1]
SMALL: dict[str, Any] = {"kv_size": 40, "kv_generated": 24, "kv_generated_slack": 16, "importance": None}


def held(llm: Any, shape: Shape) -> list[list[list[int]]]:
    return [[generated.positions_of(llm, il, ih).tolist() for ih in range(shape.n_head_kv)] for il in layers_of(shape)]


def rows(llm: Any, shape: Shape) -> dict[tuple[int, int, bool, int], bytes]:
    """Bytes of every cell, by layer, head, K or V, and position."""
    res = {}
    for il in layers_of(shape):
        for ih in range(shape.n_head_kv):
            at = generated.positions_of(llm, il, ih).tolist()
            for v in (False, True):
                values = llm._read_floats(_lib.lib.headkv_read_cells, shape.head_dim, len(at), il, ih, v)
                res |= {(il, ih, v, pos): row.tobytes() for pos, row in zip(at, values, strict=True)}
    return res


def say(llm: Any, shape: Shape, n: int, *, n_batch: int = 1, seed: int = 3) -> int:
    """Evaluate n tokens and compare each eviction with the definition; returns how many there were."""
    options, n_prompt, found = llm.kv_options, llm.kv_stats().n_prompt, 0
    text = tokens(n + 1, seed=seed)[1:]
    for i in range(0, n, n_batch):
        before = llm.kv_stats()
        n_tail = int(before.n_cells[layers_of(shape)[0], 0]) - len(llm.kv_positions(layers_of(shape)[0], 0))
        due = generated.is_due(
            llm.n_tokens,
            n_prompt=n_prompt,
            n_settled=llm.n_tokens - n_prompt - n_tail,
            kv_generated=options.kv_generated,
            slack=options.kv_generated_slack,
            window=options.window,
        )
        expected = (
            [[row.tolist() for row in heads] for heads in generated.kept_of(llm, shape, len(text[i : i + n_batch]))]
            if due
            else held(llm, shape)
        )
        bytes_before = rows(llm, shape) if due else {}
        part = text[i : i + n_batch]
        new = list(range(llm.n_tokens, llm.n_tokens + len(part)))
        llm.eval(part)
        after = llm.kv_stats()
        assert held(llm, shape) == [[[*row, *new] for row in heads] for heads in expected]
        assert after.n_evictions == before.n_evictions + due
        if due:
            found += 1
            assert after.n_evicted > before.n_evicted
            now = rows(llm, shape)
            assert all(now[key] == bytes_before[key] for key in now if key[3] not in new)  # rows moved unchanged
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "snapkv", "kv_generated_rank": "recent"},
        {"policy": "snapkv", "kv_generated_rank": "redundancy"},
        {"policy": "adakv"},
        {"policy": "headkv", "kv_generated_scope": "all"},
        {"policy": "streaming", "kv_generated_rank": "recent", "kv_generated_scope": "all", "sinks": 4},
        {"policy": "headkv", "kv_generated_scope": "all", "protect": [(50, 60)], "preset": "default", "window": 16},
        {"policy": "pyramidkv", "pool_kernel": 0, "power": 4},
        {"policy": "headkv+adakv", "attend": "composed", "n_buckets": 2},
        {"type_k": 8, "type_v": 8},
        {"attend": "composed"},
    ],
    ids=lambda o: " ".join(map(str, o.values())) or "default",
)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=lambda s: s.name)
def test_evictions_keep_what_the_definition_keeps(shape: Shape, options: dict[str, Any], make_model: MakeModel) -> None:
    with closing(load(make_model(shape), **{**SMALL, **options})) as llm:
        llm.read_prompt(tokens(200))
        assert say(llm, shape, 24 + 16 + 16 * 4 + 3) == 5
        stats = llm.kv_stats()
        n_most = 40 + 24 + 16 + 3 + 8 * ("protect" in options)
        assert stats.n_cells[layers_of(shape)].mean() <= n_most and stats.n_past == 200 + 107


@pytest.mark.parametrize("shape", [WINDOWED, HYBRID], ids=lambda s: s.name)
def test_layers_that_are_not_compressed_go_on(shape: Shape, make_model: MakeModel) -> None:
    shape_of_ours = type("Of", (), {**vars(shape), "layers": [1, 3]})()
    with closing(load(make_model(shape), **SMALL)) as llm:
        llm.read_prompt(tokens(200))
        assert say(llm, shape_of_ours, 100) == 4
        assert np.isfinite(logits(llm)).all()


@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(5, 512), (24, 7), (24, 512), (40, 16)])
def test_batches_of_several_tokens(n_batch: int, n_ubatch: int, make_model: MakeModel) -> None:
    """A continued chat: an eviction comes before a batch, never within it."""
    with closing(load(make_model(GQA4), n_batch=max(64, n_batch), n_ubatch=n_ubatch, **SMALL)) as llm:
        llm.read_prompt(tokens(150))
        assert say(llm, GQA4, 200, n_batch=n_batch) >= 3


def test_the_same_whatever_the_ubatch_and_the_threads(make_model: MakeModel) -> None:
    outcomes = set()
    for n_ubatch, n_threads, attend in [(512, 1, "fused"), (3, 2, "fused"), (16, 4, "fused"), (512, 2, "composed")]:
        options = {**SMALL, "attend": attend, "n_ubatch": n_ubatch, "n_threads": n_threads, "n_threads_batch": n_threads}
        with closing(load(make_model(GQA4), **options)) as llm:
            llm.read_prompt(tokens(200))
            for i in range(0, 130, 10):
                llm.eval(tokens(131, seed=9)[1 + i : 11 + i])
            outcomes.add(str(held(llm, GQA4)))
            assert llm.kv_stats().n_evictions >= 3
    assert len(outcomes) == 1


@pytest.mark.parametrize("options", [{}, {"attend": "composed"}, {"type_k": 8, "type_v": 8}], ids=str)
def test_an_amount_that_is_never_exceeded_changes_nothing(options: dict[str, Any], make_model: MakeModel) -> None:
    prompt, text = tokens(200), tokens(61, seed=2)[1:]
    outcomes = []
    for more in ({}, {"kv_generated": 60}):
        with closing(load(make_model(GQA4), kv_size=40, **more, **options)) as llm:
            llm.read_prompt(prompt)
            out = []
            for token in text:
                llm.eval([token])
                out.append(logits(llm).tobytes())
            outcomes.append((out, held(llm, GQA4), llm.kv_stats().n_evictions))
            assert (llm.kv_stats().bytes_queries > 0) == bool(more)  # without an amount no query is kept
    assert outcomes[0] == outcomes[1]


def test_saved_between_two_evictions(make_model: MakeModel, tmp_path: Path) -> None:
    """The queries of the last tokens are part of a state: the next eviction is the same in another context."""
    path, text = make_model(GQA4), tokens(200, seed=6)[1:]
    options = {**SMALL, "n_ubatch": 64}
    with (
        closing(load(path, **options)) as llm,
        closing(load(path, **{**options, "window": 32, "kv_generated": 40, "n_threads": 2})) as other,
    ):
        other.configure(window=8, kv_generated=24)
        llm.read_prompt(tokens(200))
        for n in (0, 3, 41, 50):  # before and after the first eviction
            llm.eval(text[:n])
            state = llm.save_state()
            for to in (llm, other):
                to.load_state(state)
                assert to.save_state().llama_state == state.llama_state
                for token in text[n : n + 60]:
                    to.eval([token])
            assert held(llm, GQA4) == held(other, GQA4)
            assert (logits(llm) == logits(other)).all()
            assert llm.kv_stats().n_evictions == other.kv_stats().n_evictions >= 2
            llm.load_state(state)


def test_states_that_do_not_fit_are_refused(make_model: MakeModel) -> None:
    path = make_model(GQA4)
    with closing(load(path, **SMALL)) as llm, closing(load(path, kv_size=40)) as off:
        llm.read_prompt(tokens(200))
        for token in tokens(50):
            llm.eval([token])
        state = llm.save_state()
        with pytest.raises(
            ValueError, match="its version is 9, that of this context is 5: it was saved with kv_generated, which this context has not"
        ):
            off.load_state(state)
        off.read_prompt(tokens(200))
        with pytest.raises(
            ValueError, match="its version is 5, that of this context is 9: it was saved without kv_generated, which this context has"
        ):
            llm.load_state(off.save_state())
        llm.configure(policy="snapkv", power=2)
        with pytest.raises(ValueError, match="bounded by the budgets of another policy"):
            llm.load_state(state)
        llm.configure(policy="auto", power=1)
        llm.load_state(state)
        rng = np.random.default_rng(1)
        for i in rng.integers(0, state.llama_state_size, size=60).tolist():  # a byte that is not what it was
            bad = bytearray(state.llama_state)
            bad[i] ^= 1 << int(rng.integers(8))
            broken = type(state)(**{**vars(state), "llama_state": bytes(bad)})
            with pytest.raises(ValueError, match="the state cannot be restored"):
                llm.load_state(broken)
            assert llm.kv_stats().state == "empty"


def test_tokens_are_taken_back_as_far_as_all_heads_have_them(make_model: MakeModel) -> None:
    """What is drafted and refused: within the tail; the eviction after it waits for its queries."""
    with closing(load(make_model(GQA4), **SMALL)) as llm, closing(load(make_model(GQA4), **SMALL)) as other:
        llm.read_prompt(tokens(200))
        assert say(llm, GQA4, 24 + 16 + 5) == 1
        begin = llm.n_tokens - 5 - 8  # the window of the eviction, and what came after it
        assert not llm._ctx.kv_cache_seq_rm(0, begin - 1, -1)
        n_cells = llm.kv_stats().n_cells.copy()
        for n in (5, 13):
            other.reset()
            other.load_state(llm.save_state())
            assert other._ctx.kv_cache_seq_rm(0, other.n_tokens - n, -1)
            other.n_tokens -= n
            assert (other.kv_stats().n_cells == n_cells - n).all()
            again = tokens(n + 60, seed=11)
            for token in again:
                other.eval([token])
            assert other.kv_stats().n_evictions >= 4 and np.isfinite(logits(other)).all()
        # a draft of three tokens that are all refused leaves what was there
        state, text = llm.save_state(), tokens(40, seed=12)
        for token in text:
            llm.eval([token])
        want = logits(llm), held(llm, GQA4)
        llm.load_state(state)
        for token in text[:-1]:
            llm.eval([7, 8, 9])
            llm._ctx.kv_cache_seq_rm(0, llm.n_tokens - 3, -1)
            llm.n_tokens -= 3
            llm.eval([token])
        llm.eval(text[-1:])
        assert llm.kv_stats().n_evictions == 3
        assert np.isfinite(logits(llm)).all() and len(held(llm, GQA4)[0][0]) <= len(want[1][0][0]) + 16


BOUND: dict[str, Any] = {"preset": "paper", "kv_generated": 24, "kv_generated_slack": 16}


@pytest.mark.parametrize("attend", ["fused", "composed"])
def test_sequences_evict_each_by_its_own_clock(attend: str, make_model: MakeModel) -> None:
    """Together they keep what they keep alone; one of them is not bounded, and one comes and goes."""
    path, text = make_model(GQA4), tokens(200, seed=8)
    prompts = [tokens(120 + 30 * s, seed=s) for s in range(3)]
    alone = []
    for s, prompt in enumerate(prompts):
        with sequences(path, n_seq_max=1, attend=attend, **BOUND) as one:
            one.announce(0, len(prompt), params=params_of(policy="snapkv", preset="paper", kv_size=40, attend=attend) if s == 2 else None)
            one.decode({0: prompt})
            one.end_prompt(0)
            for token in text[: 100 - 15 * s]:
                out = one.decode({0: [token]})
            alone.append((out[0], one.positions(0, 1, 1), one.stats(0).n_evictions))
    with sequences(path, n_seq_max=4, attend=attend, **BOUND) as many:
        for s, prompt in enumerate(prompts):
            many.announce(s, len(prompt), params=params_of(policy="snapkv", preset="paper", kv_size=40, attend=attend) if s == 2 else None)
            many.decode({s: prompt})
            many.end_prompt(s)
        outs: dict[int, Any] = {}
        for i in range(100):
            new = {s: [text[i]] for s in range(3) if i < 100 - 15 * s}
            if i % 25 == 7:
                many.read(3, tokens(90, seed=i), **{})
            outs |= many.decode({**new, **({3: [text[i]]} if many.n_past[3] else {})})
            if i % 25 == 20:
                many.remove(3)
        for s, (out, positions, n_evictions) in enumerate(alone):
            assert many.positions(s, 1, 1) == positions and many.stats(s).n_evictions == n_evictions
            assert nmse(outs[s], out) < 1e-6
        assert [n for _, _, n in alone] == [4, 3, 0]
        assert many.stats(2).kv_generated == 0 and many.stats(0).kv_generated == 24
        many.remove(0)
        assert many.stats(0).n_evictions == 0


def test_what_is_not_possible_says_why(make_model: MakeModel) -> None:
    path = make_model(GQA4)
    for options, why in [
        ({"kv_generated": 8}, r"kv_generated=8: it must be in \[9, "),
        ({"kv_generated": 24, "policy": "razor"}, "kv_generated is 24: with fit 'mean' .policy 'razor'."),
        ({"kv_generated": 24, "kv_generated_scope": "prompt"}, "kv_generated_scope='prompt': it must be one of 'generated', 'all'"),
        ({"kv_generated": 24, "kv_generated_rank": "rkv"}, "kv_generated_rank='rkv': it must be one of"),
        ({"kv_generated": 24, "kv_generated_slack": 0}, "kv_generated_slack=0"),
        (
            {"kv_generated": 2000},
            "kv_generated is 2000, 2128 with kv_generated_slack: it must be less than n_ctx = 2048, use a smaller one or leave it out",
        ),
        ({"kv_limit": 100}, "kv_limit=100: completions end with n_ctx"),
        (
            {"kv_limit": 3000, "kv_generated": 24, "logits_all": True},
            "kv_limit=3000: with logits_all or a draft_model completions end with n_ctx",
        ),
        (
            {"kv_generated": 24, "kv_size": None, "policy": "lossless", "kv_generated_scope": "all", "preset": "paper"},
            "kv_generated_scope is 'all': policy 'lossless' keeps all",
        ),
        ({"kv_generated": 24, "kv_size": None}, "kv_generated=24: nothing says how much is kept"),
    ]:
        with pytest.raises(ValueError, match=why):
            load(path, **{"kv_size": 40, **options})
    with closing(load(path, kv_size=40)) as llm, pytest.raises(ValueError, match="create it with kv_generated"):
        llm.configure(kv_generated=24)


def test_prompts_that_are_kept_whole(make_model: MakeModel) -> None:
    with closing(load(make_model(GQA4), policy="lossless", preset="paper", kv_generated=24, kv_generated_slack=16)) as llm:
        llm.read_prompt(tokens(100))
        assert say(llm, GQA4, 80) == 3
        assert (llm.kv_stats().n_cells == 100 + 24 + 8).all()


def test_a_head_holds_no_more_than_the_context(make_model: MakeModel) -> None:
    """Where the budget gives one head nearly everything, it keeps what n_ctx has room for."""
    importance = np.full((GQA4.n_layer, GQA4.n_head), 1e-3)
    importance[0, :4] = 1.0
    options = {"kv_size": 40, "kv_generated": 150, "kv_generated_slack": 16, "policy": "headkv", "beta": 1.01}
    with closing(load(make_model(GQA4), n_ctx=256, **options, importance=importance)) as llm:
        llm.read_prompt(tokens(200))
        for token in tokens(600, seed=5):
            llm.eval([token])
        stats = llm.kv_stats()
        assert stats.n_evictions > 20 and stats.n_cells[0, 0] > 240 - 16 and stats.n_cells.max() <= 256
        assert np.isfinite(logits(llm)).all()


def test_sinks_stay_where_a_prompt_was_kept_whole(make_model: MakeModel) -> None:
    options = {"kv_size": 101, "policy": "snapkv", "kv_generated": 24, "kv_generated_slack": 16, "kv_generated_scope": "all", "sinks": 4}
    for rank in ("recent", "attention"):
        with closing(load(make_model(GQA4), **options, kv_generated_rank=rank, protect=[(90, 94)])) as llm:
            llm.read_prompt(tokens(100))
            state = llm.save_state()
            assert say(llm, GQA4, 150) >= 4
            kept = held(llm, GQA4)
            assert all({0, 1, 2, 3, 90, 91, 92, 93} <= set(row) for heads in kept for row in heads)
            llm.load_state(state)
            for token in tokens(151, seed=3)[1:]:
                llm.eval([token])
            assert held(llm, GQA4) == kept


def test_positions_go_on_beyond_n_ctx(make_model: MakeModel) -> None:
    """n_ctx bounds what is held; a completion ends with the length that was trained, or with kv_limit."""
    path = make_model(GQA4, n_ctx_train=700)
    options = {**SMALL, "n_ctx": 256}
    with closing(load(path, **options)) as llm:
        llm.read_prompt(tokens(200))
        n_bytes = None
        for i in range(4):
            assert say(llm, GQA4, 160, seed=i) >= 8
            n_bytes = n_bytes or llm.kv_stats().bytes_store
            assert llm.kv_stats().bytes_store == n_bytes  # flat
        assert llm.kv_stats().n_past == 840 and llm.n_ctx() == 256
        llm.reset()
        with pytest.raises(ValueError, match="do not fit into n_ctx=256"):
            llm.read_prompt(tokens(257))
        llm.create_completion(tokens(200), max_tokens=None, temperature=0.0, logit_bias={2: -1e9})
        assert 699 <= llm.n_tokens <= 702  # upstream finishes a character
    with closing(load(path, **options, kv_limit=300)) as llm:
        choice = llm.create_completion(tokens(200), max_tokens=None, temperature=0.0, logit_bias={2: -1e9})
        assert choice["choices"][0]["finish_reason"] == "length" and 299 <= llm.n_tokens <= 302
        for stream in (False, True):
            with pytest.raises(
                ValueError, match=r"310 tokens of a prompt: completions end at 300 .*: use a larger kv_limit or a shorter prompt"
            ):
                answer = llm.create_completion(tokens(310), max_tokens=4, stream=stream)
                next(answer)


ON_AND_ON: dict[str, Any] = {"temperature": 0.0, "logit_bias": {2: -1e9}}  # without an end


def test_a_stream_and_a_grammar_go_on_behind_evictions(make_model: MakeModel) -> None:
    from llama_cpp import LlamaGrammar

    prompt = tokens(200)
    with closing(load(make_model(GQA4), **SMALL)) as llm:
        text = llm.create_completion(prompt, max_tokens=150, **ON_AND_ON)["choices"][0]["text"]
        said, n_evictions = llm._input_ids.tolist(), llm.kv_stats().n_evictions
        pieces = [chunk["choices"][0]["text"] for chunk in llm.create_completion(prompt, max_tokens=150, stream=True, **ON_AND_ON)]
        assert llm._input_ids.tolist() == said and llm.kv_stats().n_evictions == n_evictions >= 6
        # upstream's streams lose characters of several bytes that come byte by byte
        assert len(pieces) > 50 and "".join(filter(str.isascii, "".join(pieces))) == "".join(filter(str.isascii, text))
        grammar = LlamaGrammar.from_string("root ::= ([a-z]{7} [0-9]){30}", verbose=False)
        choice = llm.create_completion(prompt, max_tokens=400, temperature=0.0, grammar=grammar)["choices"][0]
        assert re.fullmatch("([a-z]{7}[0-9]){30}", choice["text"]) and choice["finish_reason"] == "stop"
        assert llm.kv_stats().n_evictions >= 3


def test_drafts_that_are_taken_back_between_evictions(make_model: MakeModel) -> None:
    """A draft model of llama-cpp-python: within the budget the answer of a context without it, beyond it evictions go on."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    prompt = tokens(40) * 5
    draft = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=6)
    options = {**SMALL, "n_ctx": 512}
    answers = []
    for more in ({"kv_generated": 150}, {"draft_model": draft, "kv_generated": 150}, {"draft_model": draft}):
        with closing(load(make_model(GQA4), **{**options, **more})) as llm:
            answers.append(greedy(llm, prompt, 120))
            n_evictions = llm.kv_stats().n_evictions
            if "draft_model" in more:
                ascii_only = {2: -1e9} | {3 + byte: -1e9 for byte in range(128, 256)}  # upstream goes on until a character is complete
                choice = llm.create_completion(prompt, max_tokens=None, temperature=0.0, logit_bias=ascii_only)["choices"][0]
                assert choice["finish_reason"] == "length" and 500 < llm.n_tokens <= 512
    assert answers[0] == answers[1] and len(answers[2]) == 120 and n_evictions >= 4


def test_a_chat_continues_on_what_is_left(make_model: MakeModel) -> None:
    """kv_reuse: what was said is one text with what is asked, evicted or not; another amount reads it again."""
    prompt, answers = tokens(150), []
    with closing(load(make_model(GQA4), kv_reuse=True, **SMALL)) as llm:
        for turn in range(6):
            answers.append(greedy(llm, prompt, 20))
            prompt = [*llm._input_ids.tolist(), *tokens(12, seed=turn)[1:]]
            stats = llm.kv_stats()
            assert stats.n_prompt == 150 and stats.n_past == 150 + 19 + 30 * turn
            assert stats.n_cells.mean() <= 40 + 24 + 16 + 12
        assert stats.n_evictions >= 6
        llm.configure(kv_generated=30)
        greedy(llm, prompt, 2)
        assert llm.kv_stats().n_prompt == len(prompt)


def test_copies_and_archived_prompts(make_model: MakeModel, tmp_path: Path) -> None:
    """compress_as() makes a sequence with a clock of its own; with an archive generated tokens are bounded all the same."""
    path = make_model(GQA4)
    with closing(load(path, prefill="token", n_seq_max=2, **SMALL)) as llm:
        llm.eval(tokens(200))
        llm.compress_as(1)
        assert llm.kv_stats(1).n_past == 200 and llm._stats(1).kv_generated == 24 and llm._stats(0).kv_generated == 0
    outcomes = []
    for archive in (None, tmp_path, tmp_path):
        with closing(load(path, kv_archive=archive, **SMALL)) as llm:
            llm.read_prompt(tokens(600))
            assert say(llm, GQA4, 70) == 2
            outcomes.append((held(llm, GQA4), logits(llm).tobytes()))
            assert (llm.kv_stats().n_archived > 0) == (archive is not None and len(outcomes) == 3)
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize("attend", ["fused", "composed"])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=lambda s: s.name)
def test_tokens_in_the_middle_are_dropped(shape: Shape, attend: str, make_model: MakeModel) -> None:
    """Of the prompt, across its end, of what is left by evictions, of the tail: the others stay as they are, and evictions go on."""
    with closing(load(make_model(shape), attend=attend, **SMALL)) as llm, closing(load(make_model(shape), **SMALL)) as other:
        for n_said, start, end in [
            (30, 20, 120),
            (30, 190, 205),
            (30, 210, 229),
            (70, 100, 180),
            (70, 180, 240),
            (70, 240, 266),
            (70, 0, 269),
        ]:
            llm.read_prompt(tokens(200))
            say(llm, shape, n_said)
            before, positions = rows(llm, shape), held(llm, shape)
            n_bytes = llm.kv_stats().bytes_store
            llm.drop(start, end)
            left = [[[pos for pos in row if not start <= pos < end] for row in heads] for heads in positions]
            assert held(llm, shape) == left
            now = rows(llm, shape)
            assert now == {key: value for key, value in before.items() if not start <= key[3] < end}
            assert llm.n_tokens == llm.kv_stats().n_past == 200 + n_said and llm.kv_stats().bytes_store == n_bytes
            other.load_state(llm.save_state())
            assert held(other, shape) == left
            for to in (llm, other):
                to.eval([7])
            assert nmse(logits(llm), logits(other)) < 1e-4
            assert say(llm, shape, 60) >= 1
            llm.drop(start, end)  # there is nothing any more
            assert not llm._ctx.kv_cache_seq_rm(0, max(start, 1), -1) or start >= 200


def test_a_question_behind_what_was_dropped(make_model: MakeModel) -> None:
    """A prompt that is read without a cell is another one than a dropped cell; kv_reuse goes on behind what is left."""
    prompt = tokens(150)
    with closing(load(make_model(GQA4), kv_reuse=True, **SMALL)) as llm:
        answer = greedy(llm, prompt, 30)
        llm.drop(150, 170)
        chat = [*prompt, *answer[:-1], *tokens(12, seed=1)[1:]]
        greedy(llm, chat, 2)
        stats = llm.kv_stats()
        assert stats.n_prompt == 150 and not {*range(150, 170)} & {pos for heads in held(llm, GQA4) for row in heads for pos in row}
        llm.reset()
        greedy(llm, prompt, 1)
        llm.drop(10, 140)
        assert greedy(llm, prompt, 30) != answer  # it was said to go on behind what is left


def test_what_cannot_be_dropped_says_why(make_model: MakeModel) -> None:
    with closing(load(make_model(GQA4), kv_size=40)) as llm:
        llm.read_prompt(tokens(100))
        with pytest.raises(ValueError, match="without kv_generated"):
            llm.drop(3, 5)
        assert not llm._ctx.kv_cache_seq_rm(0, 3, 5)
    with closing(load(make_model(GQA4), **SMALL)) as llm:
        llm.eval(tokens(100))
        with pytest.raises(ValueError, match="it is not compressed"):
            llm.drop(3, 5)
        llm.read_prompt(tokens(100))
        for start, end, why in [
            (5, 5, "must not be empty"),
            (7, 5, "must not be empty"),
            (-1, 5, "start=-1"),
            (90, 100, "end=100"),
            (1.5, 3, "start=1.5"),
        ]:
            with pytest.raises(ValueError, match=why):
                llm.drop(start, end)
    with closing(load(make_model(WINDOWED), **SMALL)) as llm:
        llm.read_prompt(tokens(100))
        with pytest.raises(ValueError, match="layers with windows or recurrent states have seen them"):
            llm.drop(3, 5)


def test_a_state_of_an_answer_beyond_the_context_is_restored(make_model: MakeModel) -> None:
    options = {**SMALL, "n_ctx": 512}
    with closing(load(make_model(GQA4), **options)) as llm, closing(load(make_model(GQA4), **options)) as other:
        llm.read_prompt(tokens(200))
        for token in tokens(400, seed=2):
            llm.eval([token])
        assert llm.n_tokens > llm.n_ctx()
        other.load_state(llm.save_state())
        for each in (llm, other):
            each.eval([7])
        assert (
            np.array_equal(logits(llm), logits(other))
            and other.input_ids[: other.n_tokens].tolist() == llm.input_ids[: llm.n_tokens].tolist()
        )
