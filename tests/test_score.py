"""Measuring head importance: formulas by hand and against the oracle, examples, resuming, the embedded model."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES, load, tokens, unpadded, without_importance
from numpy.typing import NDArray

try:
    import pyheadkv
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from pyheadkv import cli, gguf_keys, importance, score_files
from pyheadkv.eval import needle, prose
from pyheadkv.eval.journal import Journal
from pyheadkv.eval.metrics import token_f1, word_recall
from pyheadkv.score import examples as score_examples
from pyheadkv.score import measure as score
from pyheadkv.score import texts as score_texts
from pyheadkv.score.examples import Example, Examples, Slot, make_examples
from pyheadkv.testing import write_random_model
from pyheadkv.testing.reference import ReferenceModel, softmax

N_LAYER, N_HEAD = 2, 4
METHODS = ("r2", "er", "r")

embedded = pytest.mark.skipif(not pyheadkv.embedded_model().is_file(), reason="the embedded model is not there yet")


def reduce_rows(rows: NDArray[np.floating], spans: Sequence[tuple[int, int]], n_top: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """What the engine gives for rows of attention (n_layer, n_head, n_tokens), by definition."""
    order = np.argsort(-rows, axis=-1, kind="stable")[..., :n_top]
    inside = np.zeros(rows.shape[-1], dtype=bool)
    for start, end in spans:
        inside[start:end] = True
    mass = (np.take_along_axis(rows, order, -1) * inside[order]).sum(-1)
    return mass.astype(np.float32), order[..., 0].astype(np.int32)


class RowsReader:
    """Attention rows and greedy tokens that were written down."""

    def __init__(self, rows: Sequence[NDArray[np.floating]], greedy: Sequence[int]) -> None:
        self.rows, self.tokens = rows, greedy
        self.shape = rows[0].shape[:2]
        self.heads = [(self.shape[1], self.shape[1])] * self.shape[0]
        self.appended: list[int] = []
        self.prompt: list[int] = []

    def begin(self, prompt: Sequence[int]) -> None:
        self.prompt, self.appended = list(prompt), []

    def append(self, token: int) -> None:
        self.appended.append(token)

    def attention(self, spans: Sequence[tuple[int, int]], n_top: int, n_queries: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        first = len(self.appended)
        found = [reduce_rows(rows, spans, n_top) for rows in self.rows[first : first + n_queries]]
        return np.stack([mass for mass, _ in found]), np.stack([top for _, top in found])

    def greedy(self) -> int:
        return self.tokens[len(self.appended)]


class OracleReader:
    """The NumPy model, with K and V as the cache stores them."""

    def __init__(self, path: Path) -> None:
        self.model = ReferenceModel(path, kv_round=np.float16)
        self.shape = self.model.n_layer, self.model.n_head
        self.heads = [(self.model.n_head, self.model.n_head_kv)] * self.model.n_layer

    def begin(self, prompt: Sequence[int]) -> None:
        self.logits = self.model.prefill(prompt)[-1]

    def append(self, token: int) -> None:
        self.logits = self.model.decode(token)

    def attention(self, spans: Sequence[tuple[int, int]], n_top: int, n_queries: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        m = self.model
        heads = [h * m.n_head_kv // m.n_head for h in range(m.n_head)]
        found = []
        for i in range(-n_queries, 0):
            rows = []
            for q, k in zip(m.q, m.k, strict=True):
                n = len(k) + i + 1
                row = softmax(np.einsum("hd,thd->ht", q[i], k[:n, heads]) * m.scale)
                rows.append(np.pad(row, ((0, 0), (0, len(k) - n))))
            found.append(reduce_rows(np.array(rows), spans, n_top))
        return np.stack([mass for mass, _ in found]), np.stack([top for _, top in found])

    def greedy(self) -> int:
        return int(self.logits.argmax())


@dataclass
class Fixed(Examples):
    """The same example again and again; token `stop` ends its answer."""

    example: Example
    n: int = 1
    stop: int = -1
    scores_stop: bool = False

    def __post_init__(self) -> None:
        self.slots = [Slot(f"{i}", "fixed", len(self.example.tokens), 0.5, 0) for i in range(self.n)]

    def make(self, slot: Slot) -> Example:
        return self.example

    def is_stop(self, token: int) -> bool:
        return token == self.stop

    def text(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


# formulas


def test_copying_counts_where_the_most_attended_token_is_the_generated_one() -> None:
    top = np.array([[1, 2, 3, -1], [4, 5, 0, 6]], dtype=np.int32)
    prompt = [7, 8, 9, 8, 8, 9, 8]
    scores = score.copy_scores(top, token=8, tokens=prompt, spans=[(1, 3), (4, 6)], n_span=4)
    # position 1 and 4 are in a span and hold 8; 3 and 6 hold 8 outside, 2 and 5 are inside and hold 9
    assert scores.tolist() == [[0.25, 0, 0, 0], [0.25, 0, 0, 0]]


def example_of(n_tokens: int, *, n_steps: int, spans: tuple[tuple[int, int], ...] = ((1, 3),)) -> Example:
    n_span = sum(end - start for start, end in spans)
    return Example(tuple(range(10, 10 + n_tokens)), spans, n_span, "11 12", n_steps)


ROWS = [np.array([[[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]]]), np.array([[[0.1, 0.2, 0.6, 0.1], [0.0, 0.9, 0.05, 0.05]]])]


def test_scores_of_written_rows_are_those_worked_out_by_hand() -> None:
    reader, examples = RowsReader(ROWS, [11, 12]), Fixed(example_of(4, n_steps=2))
    scores, response = score.score_example(reader, examples.example, method="r2", examples=examples)
    # the two largest of each row, those at positions 1 and 2, divided by 2
    assert scores == pytest.approx(np.array([[(0.3 + 0.6 + 0.2) / 2, (0.3 + 0.9 + 0.05) / 2]]))
    assert response == [11, 12]
    assert reader.appended == [11]  # nothing is asked after the last token
    scores, _ = score.score_example(reader, examples.example, method="r", examples=examples)
    # step 1 generates 11 (position 1): nobody looks there; step 2 generates 12 (position 2): head 0 does
    assert scores.tolist() == [[0.5, 0]]


def test_forced_answer_scores_as_if_the_model_had_said_it_and_is_read_in_one_pass() -> None:
    reader, example = RowsReader(ROWS, [99, 99]), replace(example_of(4, n_steps=2), answer_tokens=(11, 12))
    scores = score.score_forced(reader, example, method="r2")
    assert scores == pytest.approx(np.array([[(0.3 + 0.6 + 0.2) / 2, (0.3 + 0.9 + 0.05) / 2]]))
    assert reader.prompt == [10, 11, 12, 13, 11] and reader.appended == []  # the last token of the answer is not read
    assert score.score_forced(reader, example, method="r").tolist() == [[0.5, 0]]
    outcome = score.measure_one(reader, Fixed(example), Slot("0", "fixed", 4, 0.5, 0), method="r2", answers="forced")
    assert outcome.accepted and outcome.scores == scores.tolist()


def test_reliability_is_that_of_the_ranks_of_kv_heads() -> None:
    rng = np.random.default_rng(1)
    truth, heads = rng.random((4, 8)), [(8, 2)] * 3 + [(4, 4)]
    truth[3, 4:] = 0  # a layer with fewer heads
    noisy = lambda noise, n: [outcome(1.0, np.maximum(0, truth + noise * rng.standard_normal(truth.shape)).tolist()) for _ in range(n)]
    assert score.kv_scores(truth, heads).shape == (10,)
    assert score.kv_scores(truth, heads)[1] == truth[0, 4:].mean()
    sure, few, many = (score.reliability(o, heads) for o in (noisy(0.01, 8), noisy(1.0, 8), noisy(1.0, 200)))
    assert sure > 0.95 and few < many and many > 0.8
    assert score.reliability(noisy(0.1, 1), heads) == 0
    assert score.rank_correlation(np.array([1.0, 2, 2, 3]), np.array([10.0, 20, 20, 90])) == pytest.approx(1)
    assert score.rank_correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert score.rank_correlation(np.ones(3), np.arange(3.0)) == 0


def test_a_run_ends_when_the_importance_is_stable_and_never_writes_an_unreliable_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = [np.tile(np.linspace(0.1, 0.9, 40)[None, :, None], (1, 1, 4))] * 2
    examples = Fixed(replace(example_of(4, n_steps=2), answer_tokens=(11, 12)), n=40)
    reader, journal = RowsReader(rows, []), Journal(tmp_path / "a.part", asdict(SETTINGS), resume=False)
    score.measure(reader, examples, journal, method="r2", answers="forced", until=0.9)
    outcomes = score.outcomes_of(journal)
    assert len(outcomes) == score.N_STABLE
    assert score.check_reliable(outcomes, reader.heads) == pytest.approx(1)
    with pytest.raises(ValueError, match=rf"7 of 7 examples count, at least {score.N_COUNTED}"):
        score.check_reliable(outcomes[:7], reader.heads)
    noise = [outcome(1.0, rng.random((1, 40)).tolist()) for _ in range(20)]
    with pytest.raises(ValueError, match=r"reliability of 0\.\d\d, at least 0\.7"):
        score.check_reliable(noise, reader.heads)


@pytest.mark.parametrize("scores_stop", [False, True])
def test_token_that_ends_the_answer_is_no_response_and_counts_for_the_authors(scores_stop: bool) -> None:
    examples = Fixed(example_of(4, n_steps=2), stop=12, scores_stop=scores_stop)
    scores, response = score.score_example(RowsReader(ROWS, [11, 12]), examples.example, method="er", examples=examples)
    second = (0.6 + 0.2) / 2 if scores_stop else 0
    assert scores[0, 0] == pytest.approx(0.3 / 2 + second)
    assert response == [11]


def test_answer_that_was_not_found_scores_nothing() -> None:
    examples = Fixed(replace(example_of(4, n_steps=2), spans=()))
    for method in METHODS:
        reader = RowsReader(ROWS, [11, 12])
        scores, response = score.score_example(reader, examples.example, method=method, examples=examples)
        assert not scores.any() and response == [11, 12]


def test_token_f1_of_known_texts() -> None:
    assert token_f1("The red fox.", "a Red fox") == 1
    assert token_f1("red fox", "red hen runs") == pytest.approx(2 / 5)
    assert token_f1("red red", "red") == pytest.approx(2 / 3)
    assert token_f1("", "red") == 0
    assert word_recall("it is the red, red fox!", "red hen the") == pytest.approx(2 / 3)
    assert word_recall("", "red") == 0


def outcome(quality: float, scores: list[list[float]]) -> score.Outcome:
    return score.Outcome("a", "k", 5, quality, quality > 0.5, "r", "a", scores)


def test_importance_is_the_mean_over_the_answered_examples() -> None:
    outcomes = [outcome(0.9, [[1.0, 0.0]]), outcome(0.5, [[9.0, 9.0]]), outcome(1.0, [[0.0, 0.5]])]
    assert score.mean_importance(outcomes).tolist() == [[0.5, 0.25]]
    with pytest.raises(ValueError, match="none of 1 examples.*0.50"):
        score.mean_importance(outcomes[1:2])
    with pytest.raises(ValueError, match="above 0"):
        score.mean_importance([outcome(1.0, [[0.0, 0.0]])])


@pytest.mark.parametrize("shape", SHAPES[1:4], ids=lambda shape: shape.name)
def test_scores_of_the_engine_are_those_of_the_oracle(shape: Any, make_model: Callable[..., Path]) -> None:
    path = make_model(shape)
    example = Example(tuple(tokens(70, seed=2)), ((9, 21), (40, 44)), 16, "", 6)
    examples = Fixed(example)
    llm = load(path, kv_size=64, policy="snapkv", prefill="token", n_ctx=256, n_threads=1, n_threads_batch=1)
    for method in METHODS:
        found, said = score.score_example(score.LlamaReader(llm), example, method=method, examples=examples)
        expected, wanted = score.score_example(OracleReader(path), example, method=method, examples=examples)
        assert said == wanted
        assert found.shape == (shape.n_layer, shape.n_head)
        # rounding decides which of two nearly equal positions is the N-th
        assert np.isclose(found, expected, atol=1e-4).mean() > 0.9
        np.testing.assert_allclose(found, expected, atol=5e-3)
        if method != "r":
            assert expected.any()
        forced = replace(example, answer_tokens=tuple(example.tokens[9:15]))
        found, expected = (score.score_forced(r, forced, method=method) for r in (score.LlamaReader(llm), OracleReader(path)))
        assert np.isclose(found, expected, atol=1e-4).mean() > 0.9
        np.testing.assert_allclose(found, expected, atol=1 / 16 if method == "r" else 5e-3)  # of two nearly equal ones either is the top


# examples


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model; its tokens are letters, so texts are long."""
    path = tmp_path_factory.mktemp("score") / "random.gguf"
    write_random_model(path, n_layer=N_LAYER, n_embd=64, n_head=N_HEAD, n_head_kv=2, n_ff=96, seed=3)
    return path


@pytest.fixture(scope="module")
def llm(model: Path) -> Any:
    return load(model, kv_size=64, policy="snapkv", prefill="token", n_threads=1, n_threads_batch=1)


def text_of(llm: Any, ids: Sequence[int]) -> str:
    return str(llm.detokenize(list(ids), special=True).decode())


CHAT = "{{ bos_token }}[{{ messages[0]['content'] }}]{{ eos_token }}"


@pytest.mark.parametrize("template", [None, CHAT])
@pytest.mark.parametrize("method", METHODS)
def test_clean_spans_are_exactly_the_answer(llm: Any, monkeypatch: pytest.MonkeyPatch, method: str, template: str | None) -> None:
    if template is not None:
        monkeypatch.setitem(llm.metadata, "tokenizer.chat_template", template)
    examples = make_examples(llm, method=method, protocol="clean", max_tokens=1600)
    assert len({slot.name for slot in examples.slots}) == len(examples.slots) == 60
    kinds = {slot.kind for slot in examples.slots}
    assert len(kinds) >= 8
    for slot in examples.slots:
        example = examples.make(slot)
        ((start, end),) = example.spans
        assert text_of(llm, example.tokens[start:end]) == " " + example.answer
        assert example.n_span == end - start and example.n_steps >= example.n_span
        assert 0.9 * slot.n_tokens < len(example.tokens) <= max(slot.n_tokens, 800)
        assert example == examples.make(slot)
        assert example.tokens[0] == llm.token_bos() and example.tokens.count(llm.token_bos()) == 1
        assert text_of(llm, example.tokens).endswith("</s>" if template else "\nAnswer:")


def test_clean_examples_spread_over_lengths_depths_and_kinds(llm: Any) -> None:
    slots = make_examples(llm, method="r2", protocol="clean", max_tokens=4000, n_examples=120).slots
    for kind in {slot.kind for slot in slots}:
        of_kind = [slot for slot in slots if slot.kind == kind]
        assert {slot.n_tokens for slot in of_kind} == {800, 1600, 2400, 3200, 4000}
        assert min(slot.depth for slot in of_kind) < 0.25 and max(slot.depth for slot in of_kind) > 0.75


def test_question_and_reversed_question_have_different_answers_in_one_needle() -> None:
    for pair in prose.REASONING:
        needles = [pair.needle(which, order=order) for which in (0, 1) for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0))]
        said = [sorted((*n.before, n.answer, *n.after)) for n in needles]
        assert all(sentences == said[0] for sentences in said)
        assert token_f1(*pair.answers) < 0.5
        assert needles[0].answer != needles[-1].answer and needles[0].question != needles[-1].question


@pytest.mark.parametrize("template", [None, CHAT])
def test_mixed_examples_have_their_answer_in_their_spans(llm: Any, monkeypatch: pytest.MonkeyPatch, template: str | None) -> None:
    if template is not None:
        monkeypatch.setitem(llm.metadata, "tokenizer.chat_template", template)
    examples = make_examples(llm, method="mix", protocol="clean", max_tokens=3000)
    asked = set()
    for slot in examples.slots:
        example = examples.make(slot)
        assert example == examples.make(slot) and len(example.tokens) <= max(slot.n_tokens, 1200)
        said = [text_of(llm, example.tokens[start:end]) for start, end in example.spans]
        n_spans = sum(end - start for start, end in example.spans)
        assert text_of(llm, example.answer_tokens) == example.answer
        if slot.kind in ("reasoning", "span"):
            assert said == [" " + example.answer]
        elif slot.kind == "facts":
            assert len(said) == score_examples.N_FACTS
            assert [s.strip(" .") for s in said] == re.split(", | and ", example.answer.strip("."))
        else:
            assert len(said) == 1 and example.answer.lower() in said[0].lower()
            assert example.n_evidence == n_spans == example.n_top and example.n_span == len(example.answer_tokens)
            # what is asked is known from these spans alone
            rest = text_of(llm, [*example.tokens[: example.spans[0][0]], *example.tokens[example.spans[0][1] :]])
            assert slot.kind == "passage" or f"={example.answer})" not in rest and f"or {example.answer}\n" not in rest
        if slot.kind in ("reasoning", "span", "facts"):
            assert example.n_top == example.n_span == n_spans
        asked.add(text_of(llm, example.tokens[-250:]))
    assert len(asked) > 50  # questions differ
    kinds = [slot.kind for slot in examples.slots]
    assert {kind: kinds.count(kind) for kind in kinds} == {kind: 10 * score_examples.MIX.count(kind) for kind in score_examples.MIX}
    for kind in set(kinds):  # no kind has a length of its own
        assert len({slot.n_tokens for slot in examples.slots if slot.kind == kind}) == 5


def test_passages_answer_their_questions_in_one_sentence_and_evaluation_has_others() -> None:
    sentences = [s for passage in score_texts.PASSAGES for s in passage.sentences]
    for passage in score_texts.PASSAGES:
        assert len({q.question for q in passage.questions}) == len(passage.questions) == 3
        for asked in passage.questions:
            assert asked.answer in passage.sentences[asked.at]
            assert sum(asked.answer in s for s in sentences) == 1 or len(asked.answer) < 6, asked
    evaluated = {n.question for n in prose.RETRIEVAL} | {n.answer for n in prose.RETRIEVAL}
    assert not evaluated & {text for span in score_texts.SPANS for text in span}


@pytest.mark.parametrize("which", range(4))
def test_functions_of_the_examples_do_what_is_said_of_them(which: int) -> None:
    rng = random.Random(which)
    for _ in range(8):
        lines, question, answer, at = score_texts.function(rng, "trim_seeds", "rank_tiles", which)
        assert answer in lines[at] and "trim_seeds" in question
        failures = {name: type(name, (Exception,), {}) for name in re.findall(r"raise (\w+)", "".join(lines))}
        called: list[int] = []
        scope: dict[str, Any] = {**failures, "rank_tiles": lambda x, called=called: called.append(x) or 0}
        exec("".join(lines), scope)
        default = inspect.signature(scope["trim_seeds"]).parameters
        (limit,) = [p for p in default.values() if p.default is not p.empty]
        assert scope["trim_seeds"]([1, 2]) == int(re.findall(r"or (\d+)", lines[4])[0]) and called == [1, 2]
        with pytest.raises(tuple(failures.values())) as caught:
            scope["trim_seeds"]([0] * 1000)
        known = (str(scope["trim_seeds"]([])), str(limit.default), caught.type.__name__, "rank_tiles")
        assert answer == known[which]


def test_short_answer_counts_as_much_as_a_long_one() -> None:
    """Of evidence of three tokens an answer of two: the mean of the mass over the answer, among the three largest."""
    reader = RowsReader(ROWS, [99, 99])
    example = replace(example_of(4, n_steps=2, spans=((0, 3),)), n_span=2, n_evidence=3, answer_tokens=(11, 12))
    scores = score.score_forced(reader, example, method="mix")
    assert scores == pytest.approx(np.array([[(0.5 + 0.3 + 0.2 + 0.1 + 0.2 + 0.6) / 2, (0.2 + 0.3 + 0.9 + 0.05) / 2]]))


def test_seed_decides_the_examples(llm: Any) -> None:
    options: dict[str, Any] = {"method": "r2", "protocol": "clean", "max_tokens": 900}
    first, second, other = (make_examples(llm, **options, seed=seed) for seed in (1, 1, 2))
    slot = first.slots[3]
    assert first.make(slot) == second.make(slot) != other.make(slot)


@pytest.mark.parametrize(("method", "n"), [("r2", 100), ("er", 150), ("r", 150)])
def test_authors_protocol_has_their_grid_and_their_side_effects(llm: Any, method: str, n: int) -> None:
    examples = make_examples(llm, method=method, protocol="authors", max_tokens=1600)
    assert len(examples.slots) == n
    assert {slot.n_tokens for slot in examples.slots} == {0, 400, 800, 1200, 1600}
    assert [round(100 * slot.depth) for slot in examples.slots[:10]] == [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]
    assert len({examples.make(slot) for slot in examples.slots[:10]}) == 1  # without haystack the depth is nothing
    example = examples.make(examples.slots[23])
    text = text_of(llm, example.tokens)
    assert text.count("<s>") >= 2
    assert "Based on the content of the book, Question: " in text
    ((start, end),) = example.spans
    found = text_of(llm, example.tokens[start:end])
    assert token_f1(found, example.answer) > 0.5
    if method == "r2":
        assert example.tokens[start - 1] == llm.token_bos()
        assert example.n_steps == example.n_span


def test_authors_protocol_takes_the_last_of_equal_spans_behind_bos() -> None:
    prompt = [1, 5, 6, 7, 1, 6, 5, 8, 1, 9, 9]
    assert score_examples.find_after_bos(prompt, [5, 6], bos=[1]) == 5
    assert score_examples.find_after_bos(prompt, [9, 4], bos=[1]) == 9
    assert score_examples.find_after_bos(prompt, [6, 7], bos=[]) == 2
    assert score_examples.find_after_bos([5, 6], [5, 6], bos=[1]) == -1


def test_protocols_refuse_what_they_cannot_do(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fixed grid"):
        make_examples(llm, method="r2", protocol="authors", max_tokens=1000, n_examples=5)
    with pytest.raises(ValueError, match="method='mix'.*use protocol clean"):
        make_examples(llm, method="mix", protocol="authors", max_tokens=1000)
    with pytest.raises(ValueError, match="raise it"):
        make_examples(llm, method="r2", protocol="clean", max_tokens=100)
    cases = (("{{ raise_exception('no') }}", "cannot be rendered"), ("nothing", "0 times"), ("{{", "cannot"))
    for template, word in cases:
        monkeypatch.setitem(llm.metadata, "tokenizer.chat_template", template)
        examples = make_examples(llm, method="r2", protocol="clean", max_tokens=1000)
        with pytest.raises(ValueError, match=word):
            examples.make(examples.slots[0])


# runs


SETTINGS = score.Settings("r2", "clean", "generated", 4, 0.0, 100, 0, "00", "", {"n_threads": 1}, {"pyheadkv": "0"})
MEASURE = {"method": "r2", "answers": "generated", "until": 0.0}


class Interrupted(RowsReader):
    """Ctrl-C while example number `n` is read."""

    def __init__(self, n: int) -> None:
        super().__init__(ROWS, [11, 12])
        self.n = n

    def begin(self, prompt: Sequence[int]) -> None:
        super().begin(prompt)
        if self.n == 0:
            raise KeyboardInterrupt
        self.n -= 1


def finished(path: Path, *, interrupt: int | None = None, tear: bool = False) -> bytes:
    """Journal of four examples, with an interruption on the way."""
    examples = Fixed(example_of(4, n_steps=2), n=4)
    if interrupt is not None:
        with pytest.raises(KeyboardInterrupt):
            score.measure(Interrupted(interrupt), examples, Journal(path, asdict(SETTINGS), resume=False), **MEASURE)
        if tear:
            path.write_bytes(path.read_bytes() + b'{"name": "2", "ki')
    journal = Journal(path, asdict(SETTINGS), resume=interrupt is not None)
    assert len(journal.entries) == (interrupt or 0)
    score.measure(RowsReader(ROWS, [11, 12]), examples, journal, **MEASURE)
    assert score.result(SETTINGS, score.outcomes_of(journal), 1.0)["accepted"] == 4
    return path.read_bytes()


@pytest.mark.parametrize("tear", [False, True])
@pytest.mark.parametrize("interrupt", [0, 2, 3])
def test_resumed_run_writes_what_an_uninterrupted_one_writes(tmp_path: Path, interrupt: int, tear: bool) -> None:
    expected = finished(tmp_path / "a.part")
    assert finished(tmp_path / "b.part", interrupt=interrupt, tear=tear) == expected


def test_journal_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.part"
    whole = finished(path)
    with pytest.raises(ValueError, match="seed = 0, not 1"):
        Journal(path, asdict(replace(SETTINGS, seed=1)), resume=True)
    for damaged in (b"", b"\n", b"[]\n", b"{}\n", b"\xff\n", whole.replace(b'"kind"', b'"knid"'), whole[40:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged|was begun with"):
            score.outcomes_of(Journal(path, asdict(SETTINGS), resume=True))


def run(*args: str | Path) -> int:
    return cli.main(["score", "--threads", "1", *map(str, args)])


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.argsort(np.argsort(values, axis=None, kind="stable"), kind="stable").astype(np.float64)


@embedded
@pytest.mark.parametrize("method", [*METHODS, "mix"])
def test_embedded_model_ranks_its_heads_as_its_metadata_does(method: str, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    assert run("-o", out, "--method", method, "--examples", "12", "--max-tokens", "1024") == 0
    inside = gguf_keys.read_importance(pyheadkv.embedded_model())
    assert inside is not None
    found = score_files.load_scores(out).values
    if method == "r":  # most heads never copy, they have no rank among each other
        assert np.corrcoef(found.ravel(), inside.values.ravel())[0, 1] > 0.8
    else:
        assert np.corrcoef(ranks(found), ranks(inside.values))[0, 1] > 0.8


@embedded
def test_embedded_model_is_asked_in_its_language(tmp_path: Path) -> None:
    llm = load(pyheadkv.embedded_model(), kv_size=64, policy="snapkv", prefill="token", n_ctx=256)
    examples = make_examples(llm, method="r2", protocol="clean", max_tokens=1000, n_examples=9)
    assert {slot.kind for slot in examples.slots} == {"direct", "two-hop", "comparison"}
    for slot in examples.slots:
        example = examples.make(slot)
        assert len(example.tokens) == slot.n_tokens
        assert text_of(llm, example.tokens).startswith("<s>")
        said = " ".join(text_of(llm, example.tokens[start:end]) for start, end in example.spans)
        assert set(example.answer.split()) & set(needle.NUMBERS) <= set(said.split())
    with pytest.raises(ValueError, match="closed vocabulary"):
        make_examples(llm, method="r2", protocol="authors", max_tokens=1000)


SCRIPTS = Path(__file__).parent.parent / "scripts"


def script(name: str, *args: str | Path) -> str:
    """What a script prints."""
    found = subprocess.run([sys.executable, SCRIPTS / name, *map(str, args)], capture_output=True, text=True, check=True)
    return found.stdout


@embedded
def test_kept_journal_says_how_many_examples_are_enough(tmp_path: Path) -> None:
    options = ["--examples", "9", "--max-tokens", "600", "--keep"]
    for method in ("r2", "mix"):
        assert run("-o", tmp_path / f"{method}.json", "--method", method, *options) == 0
    parts = [tmp_path / "r2.json.part", tmp_path / "mix.json.part"]
    entries = [json.loads(line) for line in parts[0].read_text().splitlines()[1:]]
    np.testing.assert_allclose(np.mean([e["scores"] for e in entries], axis=0), score_files.load_scores(tmp_path / "r2.json").values)
    out = tmp_path / "a.md"
    assert script("score_stability.py", pyheadkv.embedded_model(), *parts, "-o", out) == out.read_text()
    table = dict(re.findall(r"^\| (\w+, forced[^|:]+) \|[ |]*(-?[01]\.\d+)", unpadded(out.read_text()), re.MULTILINE))
    assert set(table) == {"r2, forced, 9 of 9 count", "mix, forced, 9 of 9 count", "r2, forced, 9 of 9 count / mix, forced, 9 of 9 count"}
    assert all(-1 <= float(value) <= 1 for value in table.values()) and float(table["r2, forced, 9 of 9 count"]) > 0.5


@embedded
def test_settings_are_compared_with_one_of_them(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    options = ["--kv-size", "32,64", "--beta", "1.2,9", "--contexts", "3", "--tokens", "600", "--protocol", "query-aware"]
    assert cli.main(["eval", "niah", "--policy", "headkv,snapkv", *options, "-o", str(out)]) == 0
    lines = script("compare_settings.py", out, "--base", "headkv beta 1.2").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    methods = ("headkv beta 1.2", "headkv beta 9", "snapkv")
    assert {(row[5], row[4]) for row in rows[2:]} == {(method, n) for method in methods for n in ("32", "64", "32, 64")}
    scores = {(row[5], row[4]): float(row[6].split()[0]) for row in rows[2:]}
    for method in methods:
        assert scores[method, "32, 64"] == pytest.approx((scores[method, "32"] + scores[method, "64"]) / 2, abs=1.01)
    for row in rows[2:]:
        of, base = scores[row[5], row[4]], scores["headkv beta 1.2", row[4]]
        assert (row[7] == "") if row[5] == "headkv beta 1.2" else float(row[7].split()[0]) == pytest.approx(of - base, abs=1.01)


def written_run(path: Path, scores: Sequence[tuple[float, float]], *, n_each: int) -> Path:
    """Answers of "headkv a 64" and "headkv b 64", n_each questions per context."""
    settings = [{"name": f"{m} 64", "method": m, "budget": "64", "policy": "headkv"} for m in ("headkv a", "headkv b")]
    full = {"name": "full", "method": "full", "budget": "", "policy": "full"}
    lines: list[dict[str, Any]] = [{"settings": [full, *settings], "tasks": [{"name": "t", "file": None}]}]
    for i, pair in enumerate(scores):
        how = {
            "ask": i % n_each,
            "kind": "k",
            "depth": 0.5,
            "protocol": "query-aware",
            "n_prompt": 9,
            "cells": 9,
            "bytes": 1,
            "bytes_store": 1,
        }
        said = [{**how, "setting": name, "score": x} for name, x in zip(("full", "headkv a 64", "headkv b 64"), (1.0, *pair), strict=True)]
        lines.append({"task": "t", "length": 9, "quiz": i // n_each, "answers": said})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_runs_are_joined_and_questions_about_one_context_drawn_together(tmp_path: Path) -> None:
    scores = [(0.0, 1.0), (0.0, 0.0)] * 4
    first = written_run(tmp_path / "1.jsonl", scores, n_each=1)
    second = written_run(tmp_path / "2.jsonl", [(0.5, 0.0)] * 8, n_each=1)
    base = ["--base", "headkv a"]
    alone = unpadded(script("compare_settings.py", first, second, *base)).splitlines()
    gains = [line.split(" | ")[-1] for line in alone if "headkv b" in line]
    assert gains[:2] == ["+50.0 (+12.5 to +87.5) |", "-50.0 (-50.0 to -50.0) |"]
    assert re.match(r"\+0\.0 \(-\d", gains[2]) and len(gains) == 3
    together = unpadded(script("compare_settings.py", written_run(tmp_path / "3.jsonl", scores, n_each=2), *base)).splitlines()
    assert together[-1].endswith("| headkv b | 50 (50-50) | +50.0 (+50.0 to +50.0) |")  # every context has one of each


def test_shortened_contexts_keep_what_answers(tmp_path: Path) -> None:
    passages = [f"Passage {i}:\nword{i} " + "filler " * 40 for i in range(12)]
    rows = [
        {"dataset": "hotpotqa", "context": "\n\n".join(passages), "input": "?", "answers": [answer], "_id": answer}
        for answer in ("WORD7 ", "word10 ", "nowhere")
    ]
    rows.append({**rows[0], "context": "word7 " * 500})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = script("shorten_longbench.py", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--words", "180")
    assert "2 of 4 questions about 1 of 2 contexts" in said
    kept = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [row["_id"] for row in kept] == ["WORD7 ", "word10 "]
    for row in kept:
        assert row["context"].split("\n\n") == [passages[i] for i in (0, 1, 7, 10)]
        assert row["length"] == len(row["context"].split()) <= 180
    script("shorten_longbench.py", tmp_path / "a.jsonl", tmp_path / "c.jsonl", "--contexts", "1:")
    assert [json.loads(line)["_id"] for line in (tmp_path / "c.jsonl").read_text().splitlines()] == ["WORD7 "]


@embedded
def test_score_writes_file_and_model_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--examples", "9", "--max-tokens", "600", "--seed", "5"]
    first, second, out = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "out.gguf"
    assert run("-o", first, *options, "--write", out, "--force") == 0
    printed = capsys.readouterr().out
    assert "9 of 9 count" in printed and "reliability" in printed and "per 1000 prompt tokens" in printed
    content = json.loads(first.read_bytes())
    assert content["method"] == "r2" and content["protocol"] == "clean" and content["seed"] == 5
    assert content["n_examples"] == content["accepted"] == len(content["examples"]) == 9
    assert content["answers"] == "forced" and score.RELIABLE < content["reliability"] <= 1
    assert len(content["model_sha256"]) == 64 and content["versions"]["pyheadkv"] == pyheadkv.__version__
    written = gguf_keys.read_importance(out)
    assert written is not None and written.method == "headkv-r2" and content["model_sha256"] in written.source
    np.testing.assert_array_equal(written.values, score_files.load_scores(first).values)

    append, done = Journal.append, []

    def interrupt(journal: Journal, o: dict[str, Any]) -> None:
        append(journal, o)
        done.append(o)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupt)
    assert run("-o", second, *options) == 130
    assert not second.exists()
    assert run("-o", second, *options) == 1
    assert "--resume" in capsys.readouterr().err
    assert run("-o", second, *options, "--resume") == 0
    assert len(done) == 9
    assert second.read_bytes() == first.read_bytes()
    assert run("-o", second, *options, "--resume") == 1
    assert "is complete, there is nothing to go on with" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "2.json", "out.gguf"]


def test_score_of_a_model_that_answers_nothing_is_an_error(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    assert run(model, "-o", out, "--examples", "8", "--max-tokens", "600", "--answers", "generated") == 1
    assert "0 of 8 examples count, at least 8 are needed: use --answers forced" in capsys.readouterr().err
    assert not out.exists()


@embedded
def test_score_without_an_output_writes_where_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = tmp_path / "models" / "a.gguf", tmp_path / "cache"
    model.parent.mkdir()
    without_importance(pyheadkv.embedded_model(), model)
    monkeypatch.setenv("PYHEADKV_CACHE", str(cache))
    options = ["--examples", "9", "--max-tokens", "600"]
    assert importance.find_importance(model) is None
    assert run(model, *options) == 0
    beside = importance.find_importance(model)
    assert beside is not None and beside.origin == f"beside the model: {tmp_path / 'models' / 'a.importance.json'}"
    first = importance.sidecar_path(model).read_bytes()
    assert run(model, *options) == 1
    assert run(model, *options, "--force") == 0
    assert importance.sidecar_path(model).read_bytes() == first  # twice the same
    importance.sidecar_path(model).unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert run(model, *options) == 0
    cached = importance.find_importance(model)
    assert cached is not None and str(cache) in cached.origin and not importance.sidecar_path(model).exists()
    np.testing.assert_array_equal(cached.importance.values, beside.importance.values)


@embedded
@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--examples", "0"], "--examples=0"),
        (["--examples", "7"], "--examples=7: it must be in [8, 1048576], fewer are never written"),
        (["--max-tokens", "0"], "--max-tokens=0"),
        (["--max-tokens", "100"], "max_tokens"),
        (["--protocol", "authors"], "closed vocabulary"),
        (["--write", "{folder}/out.gguf"], "--force"),
        (["--n-batch", "0"], "--n-batch=0"),
    ],
)
def test_score_refuses_wrong_options_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], word: str) -> None:
    options = [option.format(folder=tmp_path) for option in options]
    assert run("-o", tmp_path / "a.json", *options) == 1
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@embedded
def test_score_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    out.write_text("mine")
    assert run("-o", out) == 1
    assert "--force" in capsys.readouterr().err and out.read_text() == "mine"
    assert run("-o", tmp_path / "none" / "a.json") == 1
