"""Trials, tasks, evaluation and the choice of beta: the same prompt under many settings, and honest tables of it."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import HYBRID, SHAPES, greedy, load, logits, nmse, tokens, unpadded

try:
    import pyheadkv
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from pyheadkv import cli, gguf_keys
from pyheadkv.eval import metrics, tasks
from pyheadkv.eval import report as evaluate_report
from pyheadkv.eval import run as evaluation
from pyheadkv.eval.journal import Journal
from pyheadkv.eval.prose import RETRIEVAL, Prose, haystack_sentences
from pyheadkv.eval.quiz import TaskOptions
from pyheadkv.eval.tasks import make_task
from pyheadkv.eval.trial import Copy, Held, Setting, Trial, log_softmax
from pyheadkv.score import calibrate

MakeModel = Callable[..., Path]
SHAPE = SHAPES[1]
SETTINGS = [Setting(), Setting("headkv", 24), Setting("headkv", 24, beta=3.0), Setting("snapkv", 48, "avg"), Setting("streaming", 40)]

embedded = pytest.mark.skipif(not pyheadkv.embedded_model().is_file(), reason="the embedded model is not there yet")


# trials


def positions(llm: Any, seq_id: int = 0) -> set[tuple[int, int, int]]:
    """(layer, KV head, position) of every kept cell."""
    heads = ((il, ih) for il in range(SHAPE.n_layer) for ih in range(SHAPE.n_head_kv))
    return {(il, ih, pos) for il, ih in heads for pos in llm.kv_positions(il, ih, seq_id).tolist()}


def open_trial(path: Path, *, n_copies: int, policy: str = "snapkv", **options: Any) -> Trial:
    return Trial(load(path, kv_size=64, preset="default", policy=policy, prefill="token", n_seq_max=1 + n_copies, **options))


def fresh(path: Path, setting: Setting, prompt: list[int], rest: list[int]) -> tuple[npt.NDArray[np.float32], set[tuple[int, int, int]]]:
    """Logits and kept cells after ``rest``, in a context of its own; the last token of the prompt is read again if it is in ``rest``."""
    policy = "snapkv" if setting.policy == "full" else setting.policy
    options: dict[str, Any] = {"beta": setting.beta or None, "preset": setting.preset or "default"} | (
        {"pool": setting.pool} if setting.pool else {}
    )
    llm = load(path, kv_size=setting.kv_size or 1024, policy=policy, **options)
    llm.read_prompt(prompt)
    if rest[0] == prompt[-1]:
        llm._ctx.kv_cache_seq_rm(0, len(prompt) - 1, -1)
        llm.n_tokens = len(prompt) - 1
    for token in rest:
        llm.eval([token])
    return logits(llm), positions(llm)


@pytest.mark.parametrize(
    ("policy", "settings"),
    [("snapkv", SETTINGS), ("h2o", [Setting("h2o", 24), Setting(), Setting("h2o", 64), Setting("razor", 24)])],
    ids=["any", "all tokens"],
)
def test_a_trial_gives_what_fresh_contexts_give(policy: str, settings: list[Setting], make_model: MakeModel) -> None:
    """Whatever was compressed before; prompts share beginnings of any length.

    They are read in other ubatches, so a cell may differ where two scores are equal but for rounding.
    """
    path, shared = make_model(SHAPE), tokens(256, seed=3)
    prompts = [[*shared, *tokens(n, seed=n)] for n in (30, 3, 64)] + [shared[:200], tokens(90, seed=8)]
    trial = open_trial(path, n_copies=len(settings), policy=policy, n_ubatch=512)
    for prompt in prompts:
        copies = [trial.compress(setting, prompt) for setting in settings]
        for rest in ([prompt[-1], 5, 6], [prompt[-1], 9]):
            trial.go_on(copies, len(prompt) - 1, rest)
            (last,) = trial.follow(copies, rest[-1:])
            for copy, row in zip(copies, last, strict=True):
                expected, cells = fresh(path, copy.setting, prompt, rest)
                found = positions(trial.llm, copy.seq_id)
                assert len(found) == len(cells) and len(found & cells) >= 0.99 * len(cells)
                assert nmse(row[0], expected) < (1e-5 if found == cells else 1e-2)
        trial.drop(copies)
        assert trial.llm.kv_stats().bytes_store == 0


def test_bytes_of_a_trial_are_those_of_the_kept_cells(make_model: MakeModel) -> None:
    trial = open_trial(make_model(SHAPE), n_copies=2)
    cell = 2 * 2 * SHAPE.head_dim  # K and V, f16
    n_heads = SHAPE.n_layer * SHAPE.n_head_kv

    def held(setting: Setting) -> Held:
        copy = trial.compress(setting, tokens(100))
        trial.drop([copy])
        return copy.held

    alone = held(Setting("snapkv", 24))
    assert (alone.n_prompt, alone.per_head, alone.cells) == (100, 24, 24 * n_heads * cell)
    beside = trial.compress(Setting("snapkv", 48), tokens(100))
    assert trial.llm.kv_stats().bytes_store == beside.held.store > alone.store > alone.cells
    assert held(Setting("snapkv", 24)) == alone
    assert held(Setting("snapkv", kv_ratio=0.3)).per_head == 30
    assert held(Setting("snapkv", kv_ratio=0.01)).per_head == 9  # the window and one more
    assert held(Setting()).cells == 100 * n_heads * cell


def test_surprise_is_the_mean_negative_log_likelihood(make_model: MakeModel) -> None:
    trial = open_trial(make_model(SHAPE), n_copies=2)
    prompt, answer = tokens(50), [3, 4, 5]
    copies = [trial.compress(Setting(), prompt), trial.compress(Setting("snapkv", 9), prompt)]
    trial.go_on(copies, 49, prompt[49:])
    found = trial.surprise(copies, prompt[-1], answer)
    llm = load(make_model(SHAPE), kv_size=None)
    expected, seen = [], list(prompt)
    for token in answer:
        llm.reset()
        llm.eval(seen)
        row = logits(llm).astype(np.float64)
        expected.append(np.log(np.exp(row - row.max()).sum()) - (row[token] - row.max()))
        seen.append(token)
    assert found[0] == pytest.approx(np.mean(expected), rel=1e-3)
    assert found[1] != pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("n_vocab", [1 << 24, 1])
def test_follow_gives_the_same_in_pieces(n_vocab: int, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many logits are asked for at a time: one token, or all."""
    trial = open_trial(make_model(SHAPE), n_copies=2)
    copies = [trial.compress(Setting(), tokens(50)), trial.compress(Setting("snapkv", 9), tokens(50))]
    trial.go_on(copies, 49, [1])
    (whole,) = trial.follow(copies, range(20, 40))
    trial.go_on(copies, 49, [1])
    monkeypatch.setattr(Trial, "N_LOGITS", n_vocab)
    pieces = list(trial.follow(copies, range(20, 40)))
    assert len(pieces) == (20 if n_vocab == 1 else 1)
    assert nmse(np.concatenate(pieces, axis=1), whole) < 1e-5


def test_a_batch_answers_as_one_copy_after_the_other(make_model: MakeModel) -> None:
    trial = open_trial(make_model(SHAPE), n_copies=3)
    settings, prompt = [Setting(), Setting("snapkv", 12), Setting("streaming", 20)], tokens(200)
    copies = [trial.compress(setting, prompt) for setting in settings]
    trial.go_on(copies, 199, prompt[-1:])
    said = trial.generate(copies, prompt[-1], 12)
    stop = frozenset({said[1][4]})
    trial.go_on(copies, 199, prompt[-1:])
    stopped = trial.generate(copies, prompt[-1], 12, stop=stop)
    assert stopped == [list(takewhile(lambda t: t not in stop, row)) for row in said]
    trial.drop(copies)
    assert len({tuple(row) for row in said}) == 3
    for setting, row in zip(settings, said, strict=True):
        copy = trial.compress(setting, prompt)
        trial.go_on([copy], 199, prompt[-1:])
        assert trial.generate([copy], prompt[-1], 12) == [row]
        trial.drop([copy])


def test_settings_have_replay_tables_of_their_own(make_model: MakeModel, tmp_path: Path) -> None:
    """Those of files, each beside the other and beside the model's own; another prompt changes nothing."""
    path, (n_layer, n_head_kv) = make_model(SHAPE), (SHAPE.n_layer, SHAPE.n_head_kv)
    tables = []
    for i in (0, 1):
        values = np.tile(np.array([0.125, 0.25])[:, None, None], (1, n_layer, n_head_kv))
        values *= np.where(np.arange(n_head_kv) == i, 1.5, (n_head_kv - 1.5) / (n_head_kv - 1))
        (tmp_path / f"{i}.json").write_text(json.dumps({"shares": [0.125, 0.25], "values": values.tolist()}))
        tables.append(Setting("replay/value", kv_size=48, replay=str(tmp_path / f"{i}.json")))
    assert [t.name for t in tables] == ["replay/value 0 48", "replay/value 1 48"]
    trial = open_trial(path, n_copies=3, policy="uniform/value")
    for seed in (1, 2):
        copies = [trial.compress(setting, tokens(200, seed=seed)) for setting in (*tables, tables[0])]
        cells = [trial.llm.kv_stats(copy.seq_id).n_cells for copy in copies]
        assert (cells[0][:, 0] > cells[0][:, 1]).all() and (cells[1][:, 0] < cells[1][:, 1]).all() and (cells[0] == cells[2]).all()
        trial.drop(copies)


def test_a_trial_needs_room_for_copies(make_model: MakeModel) -> None:
    for options in ({}, {"n_seq_max": 2}, {"prefill": "token"}):
        with pytest.raises(ValueError, match="prefill='token', n_seq_max=2 or more"):
            Trial(load(make_model(SHAPE), kv_size=64, **options))
    trial = open_trial(make_model(SHAPE), n_copies=1)
    trial.compress(Setting(), tokens(30))
    with pytest.raises(RuntimeError, match="1 copies are held"):
        trial.compress(Setting(), tokens(30))


# tasks


def english(make_model: MakeModel) -> Any:
    return load(make_model(SHAPE), kv_size=None, n_ctx=4096)


@pytest.mark.parametrize("name", tasks.PROSE)
def test_english_tasks_have_the_length_that_was_asked_for(name: str, make_model: MakeModel) -> None:
    llm = english(make_model)
    task = make_task(llm, TaskOptions(name, 3000, n_each=2, seed=1))
    for i in (0, 7):
        asks = task.quiz(i)
        assert asks == sorted(asks, key=asks.index) and len({a.prompt[: a.n_context] for a in asks}) == 1
        longest = max(len(a.prompt) + sum(len(turn.prompt) for turn in a.turns) for a in asks)
        assert longest <= 3000 < longest + 200
        assert [a.prompt for a in task.quiz(i)] == [a.prompt for a in asks]
        for ask in asks:
            assert 0 <= ask.depth <= 1 and ask.grade("") == 0
    assert task.quiz(1)[0].prompt != task.quiz(2)[0].prompt


def test_the_needle_is_where_it_belongs(make_model: MakeModel) -> None:
    llm = english(make_model)
    task = make_task(llm, TaskOptions("niah", 3000, n_depths=5))
    for i in range(5):
        (ask,) = task.quiz(i)
        text = llm.detokenize(list(ask.prompt[: ask.n_context])).decode()
        chosen = next(n for n in RETRIEVAL if n.answer in text)
        assert abs(text.index(chosen.answer) / len(text) - (i + 0.5) / 5) < 0.1
        assert ask.grade(chosen.answer) == 1 and ask.grade("I do not know.") == 0


def test_grades() -> None:
    rng = random.Random(1)
    facts, asked = tasks.ruler_keys(rng, 0, TaskOptions("ruler-keys", 3000))
    numbers = {
        a.question: [f.text.split()[-1].rstrip(".") for f in facts if f.text.split()[6] in a.question.replace("?", "").split()]
        for a in asked
    }
    for a in asked:
        assert a.grade(" and ".join(numbers[a.question])) == 1
    several = next(a for a in asked if a.kind == "multivalue")
    assert several.grade(numbers[several.question][0]) == 1 / 4


@pytest.mark.parametrize("n_tokens", [2000, 5000])
def test_lists_of_words_have_a_few_that_come_most_often(n_tokens: int, make_model: MakeModel) -> None:
    llm = english(make_model)
    asks = make_task(llm, TaskOptions("ruler-words", n_tokens)).quiz(2)
    assert [ask.kind for ask in asks] == ["common", "frequent"]
    for ask, n in zip(asks, (10, 3)):
        assert n_tokens - 12 < len(ask.prompt) <= n_tokens
        text = llm.detokenize(list(ask.prompt[: ask.n_context])).decode()
        counts = Counter(re.findall("[a-z]{4,}", text)).most_common(n + 1)
        assert counts[n - 1][1] > counts[n][1]
        best = [word for word, _ in counts[:n]]
        assert ask.grade(", ".join(best).title()) == 1 and ask.grade(best[0]) == 1 / n and ask.grade("") == 0
    with pytest.raises(ValueError, match="100 tokens are too few for a list of words"):
        make_task(llm, TaskOptions("ruler-words", 100)).quiz(0)


def test_raw_prompts_have_no_chat_template_and_one_stop_token(make_model: MakeModel) -> None:
    llm = english(make_model)
    llm.metadata["tokenizer.chat_template"] = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    for raw in (False, True):
        task = make_task(llm, TaskOptions("niah", 1500, raw=raw))
        text = llm.detokenize(list(task.quiz(0)[0].prompt)).decode()
        assert ("<user>" in text) == ("<assistant>" in text) == (not raw) and text.endswith("Answer:") == raw
        assert (task.stop_tokens == {llm.token_eos()}) or not raw


def test_an_instruction_stands_at_the_beginning(make_model: MakeModel) -> None:
    llm = english(make_model)
    (ask,) = make_task(llm, TaskOptions("instruction", 2000)).quiz(3)
    text = llm.detokenize(list(ask.prompt[: ask.n_context])).decode()
    assert text.index("Whatever is asked") < 40
    word = text.split("answer must be ")[1].split(".")[0]
    assert ask.grade(f"{word.capitalize()}, it is so.") == 1 and ask.grade(f"It is {word}.") == 0 and ask.grade("") == 0


def test_tasks_from_files(make_model: MakeModel, tmp_path: Path) -> None:
    llm = english(make_model)
    file = tmp_path / "f.jsonl"
    row = {"context": "a b c " * 3000, "input": "Who?", "answers": ["the old man", "him"], "dataset": "hotpotqa"}
    file.write_text(json.dumps(row) + "\n")
    (ask,) = make_task(llm, TaskOptions("longbench", 500, file=file)).quiz(0)
    assert len(ask.prompt) == 500 and ask.kind == "hotpotqa" and ask.n_steps == 32
    assert ask.grade("old man") == 1 and ask.grade("an old woman") == 0.5
    text = llm.detokenize(list(ask.prompt)).decode()
    assert text.strip().startswith("Answer the question based on the given passages.") and text.endswith("Question: Who?\nAnswer:")
    assert llm.detokenize(list(ask.prompt[ask.n_context :])).decode().strip().startswith("Answer the question")
    with pytest.raises(ValueError, match="dataset 'dureader': it must be one of narrativeqa"):
        file.write_text(json.dumps({**row, "dataset": "dureader"}))
        make_task(llm, TaskOptions("longbench", 500, file=file)).quiz(0)
    named = tmp_path / "1k_qa1.jsonl"
    named.write_text(json.dumps({"input": "Mary went to the kitchen.", "question": "Where is Mary?", "target": "kitchen"}) + "\n")
    (ask,) = make_task(llm, TaskOptions("babilong", 2000, file=named)).quiz(0)
    assert ask.grade("Mary is in the Kitchen. Not in the garden.") == 1 and ask.grade("The garden or the kitchen.") == 0
    assert ask.right == ()  # it is to be said in a sentence
    of_words = named.rename(tmp_path / "1k_qa4.jsonl")
    (word,) = make_task(llm, TaskOptions("babilong", 2000, file=of_words)).quiz(0)
    assert llm.detokenize(list(word.right)).decode().strip() == "kitchen"
    of_words.rename(named)
    text = llm.detokenize(list(ask.prompt)).decode()
    assert "<context>\nMary went to the kitchen.\n</context>\n\nQuestion: Where is Mary?" in text
    with pytest.raises(ValueError, match="says which task it is, one of qa1, qa2"):
        make_task(llm, TaskOptions("babilong", 500, file=file)).quiz(0)
    for answers in ([], "Paris", [3]):
        file.write_text(json.dumps({**row, "answers": answers}))
        with pytest.raises(ValueError, match=r"line 1: answers = .*: it must be a list of texts, one at least"):
            make_task(llm, TaskOptions("longbench", 500, file=file)).quiz(0)
    with pytest.raises(ValueError, match="line 1 has no key 'dataset'"):
        make_task(llm, TaskOptions("longbench", 500, file=named)).quiz(0)
    with pytest.raises(ValueError, match="--file"):
        make_task(llm, TaskOptions("longbench", 500))


def test_lines_with_the_same_context_are_questions_about_it(make_model: MakeModel, tmp_path: Path) -> None:
    asked = ("a b", "one"), ("a b", "two"), ("a b", "three"), ("c", "four"), ("a b", "five")
    rows = [{"context": c, "input": q, "answers": [q], "dataset": "hotpotqa"} for c, q in asked]
    llm, asks = of_lines(make_model, tmp_path / "f.jsonl", "longbench", *rows, n_each=2)
    assert [ask.grade(q) for ask, q in zip(asks, ("one", "two"), strict=True)] == [1, 1]
    assert len({ask.prompt[: ask.n_context] for ask in asks}) == 1  # compressed once where the question is not known
    task = make_task(llm, TaskOptions("longbench", 2000, file=tmp_path / "f.jsonl", n_each=9))
    assert [len(task.quiz(i)) for i in range(3)] == [3, 1, 1]


def of_lines(
    make_model: MakeModel, file: Path, name: str, *rows: dict[str, Any], n_tokens: int = 2000, **options: Any
) -> tuple[Any, list[Any]]:
    """The model and the questions of the first row of a file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    llm = english(make_model)
    return llm, make_task(llm, TaskOptions(name, n_tokens, file=file, **options)).quiz(0)


def test_loogle_rows_of_every_form(make_model: MakeModel, tmp_path: Path) -> None:
    pairs = [
        {"Q": "Who came {first}?", "A": "the old man", "type": "Timeline reorder"},
        {"Q": "How many?", "A": "7", "type": "Computation"},
    ]
    forms: list[dict[str, Any]] = [
        {"context": "a b c", "input": "Who came {first}?", "answers": ["him", "the old man"], "dataset": "timeline_reorder"},
        {"input": "a b c", "title": "t", "qa_pairs": repr(pairs)},
        {"input": "a b c", "title": "t", "qa_pairs": pairs},
    ]
    for row in forms:
        llm, asks = of_lines(make_model, tmp_path / "l.jsonl", "loogle", row)
        assert [a.kind for a in asks] == ["timeline_reorder", "computation"][: len(asks)] and len(asks) == 1 + ("qa_pairs" in row)
        assert [a.n_steps for a in asks] == [32] * len(asks)
        text = llm.detokenize(list(asks[0].prompt)).decode()
        assert text.strip() == "Please answer the question based on the long texts below. \na b c\nQuestion: Who came {first}?\nAnswer:"
        assert asks[0].grade("The old man.") == 1 and asks[0].grade("old woman") == 0.5
        assert len({a.prompt[: a.n_context] for a in asks}) == 1  # compressed once where the question is not known
    _, (ask,) = of_lines(
        make_model, tmp_path / "l.jsonl", "loogle", {**forms[0], "context": "a b c " * 3000, "dataset": "shortdep_qa"}, n_tokens=300
    )
    assert len(ask.prompt) == 300 and ask.n_steps == 64
    for wrong, word in (
        ({"input": "a", "qa_pairs": "none"}, "qa_pairs = 'none'"),
        ({"input": "a", "qa_pairs": "[open('x')]"}, "it must be a list of questions"),
        ({**forms[0], "dataset": "cloze"}, "kind of question 'cloze': it must be one of comprehension_and_reasoning"),
        ({"context": "a"}, "line 1 has no key 'input': is it a file of loogle"),
    ):
        with pytest.raises(ValueError, match=re.escape(word)):
            of_lines(make_model, tmp_path / "l.jsonl", "loogle", wrong)


@pytest.mark.parametrize(("name", "row", "n_steps", "right", "wrong"), [
    ("passkey", {"input": "What is the pass key?", "answer": ["71432"]}, 6, "71432. Remember", "7143"),
    ("number_string", {"input": "What is it?", "answer": "66556"}, 12, " 66556", "665565"),
    ("kv_retrieval", {"input": 'Key: "a1-b"', "answer": ["c2-d"]}, 50, '{"a1-b": "c2-d"}', "c2-d4"),
    ("longdialogue_qa_eng", {"input": "Who?", "answer": ["BEN", "BENJAMIN"]}, 40, "It is Benjamin.", "Benn"),
    ("math_find", {"input": "The largest number is", "answer": [42]}, 3, "42, the largest", "41 or 42"),
    ("code_run", {"input": "Give the value of func_1(3).", "answer": [-7]}, 5, "It is -7.", "-7 or 3"),
    ("code_debug", {"input": "", "answer": ["f.b"], "options": ["f.a", "f.b", "g", "h"]}, 5, "B. f.b", "A. f.a"),
    ("longbook_choice_eng", {"input": "Who?", "answer": ["Ann"], "options": ["Bob", "Cid", "Ann", "Dan"]}, 40, "The answer is C", "Dan"),
    ("longbook_qa_eng", {"input": "Where?", "answer": ["in the sea", "at sea"]}, 40, "At sea", "No"),
    ("longbook_sum_eng", {"input": "", "answer": ["a man goes to sea"]}, 1200, "a man goes to sea", "nothing"),
])  # fmt: skip
def test_infinitebench(name: str, row: dict[str, Any], n_steps: int, right: str, wrong: str, make_model: MakeModel, tmp_path: Path) -> None:
    llm, (ask,) = of_lines(make_model, tmp_path / f"{name}.jsonl", "infinitebench", {"id": 0, "context": "p q r", **row})
    assert (ask.kind, ask.n_steps) == (name, n_steps)
    text = llm.detokenize(list(ask.prompt)).decode()
    assert "\n\np q r\n\n" in text and (name.startswith(("longdialogue", "code_debug")) or row["input"] in text)
    assert all(f"\n{letter}. {option}\n" in text for letter, option in zip("ABCD", row.get("options", [])))
    assert ask.grade(right) == 1 and ask.grade(wrong) == 0 == ask.grade("")
    said = llm.detokenize(list(ask.right)).decode().strip()
    assert ask.grade(said) == 1 and (said in "ABCD") == ("options" in row)  # a letter where the prompt asks for one


def test_prompts_of_a_file_replace_those_of_the_package(make_model: MakeModel, tmp_path: Path) -> None:
    prompts = tmp_path / "p.json"
    row = {"context": "p q r", "input": "What?", "answer": ["5"]}
    prompts.write_text(json.dumps({"infinitebench": {"passkey": {"prompt": "{context} <{input}>", "max_tokens": 3}}}))
    llm, (ask,) = of_lines(make_model, tmp_path / "passkey.jsonl", "infinitebench", row, prompts=prompts)
    assert llm.detokenize(list(ask.prompt)).decode().strip() == "p q r <What?>" and ask.n_steps == 3
    with pytest.raises(ValueError, match="says which task it is, one of passkey: rename it"):
        of_lines(make_model, tmp_path / "kv_retrieval.jsonl", "infinitebench", row, prompts=prompts)
    for content in ({}, {"passkey": {"prompt": "no place", "max_tokens": 3}}, {"passkey": {"prompt": "{context}"}}):
        prompts.write_text(json.dumps({"infinitebench": content} if content else {}))
        with pytest.raises(ValueError, match="no prompts of infinitebench"):
            of_lines(make_model, tmp_path / "passkey.jsonl", "infinitebench", row, prompts=prompts)


def test_options_of_a_choice_have_the_answer(make_model: MakeModel, tmp_path: Path) -> None:
    row = {"context": "p", "input": "Who?", "answer": ["Eve"], "options": ["Bob", "Cid", "Ann", "Dan"]}
    with pytest.raises(ValueError, match="the answer 'Eve' among them"):
        of_lines(make_model, tmp_path / "longbook_choice_eng.jsonl", "infinitebench", row)


def test_metrics() -> None:
    assert metrics.choice("A dog", "A dog", ["A cat", "A dog", "x", "y"]) == 1 == metrics.choice("(B)", "b", ["a", "b", "c", "d"])
    assert metrics.choice("A cat", "A dog", ["A cat", "A dog", "x", "y"]) == 0 == metrics.choice("Apples", "a", ["a", "b", "c", "d"])
    assert metrics.first_number("about 3.50", "3.5") == 1 and metrics.first_number("none", "3") == 0
    assert metrics.last_number("it is: 12", "12") == 1 and metrics.last_number("12 it is", "12") == 0
    assert metrics.has_words("Mr. John Smith!", "john smith") == 1 and metrics.has_words("John and Smith", "john smith") == 0
    assert metrics.rouge_l("a b c d", "b x d") == pytest.approx(2 * 2 / 7) and metrics.rouge_l("", "a") == 0
    classes = ["Date", "Expiry Date", "Place"]
    assert metrics.classification("It is Date or Place", "Date", classes) == 0.5
    assert metrics.classification("Expiry Date", "Expiry Date", classes) == 1 and metrics.classification("Place", "Date", classes) == 0
    assert metrics.number_share("Paragraph 12 and 3", "Paragraph 12") == 0.5 and metrics.number_share("none", "3") == 0
    assert metrics.code_similarity("# note\nx = 1\ny", "x = 1") == 1 and metrics.code_similarity("```", "x") == 0
    assert metrics.label("In the garden", "garden", ["garden", "kitchen"], "") == 1
    assert metrics.label("kitchen, garden", "garden", ["garden", "kitchen"], "") == 0
    assert metrics.label("kitchen, garden", "garden", ["garden", "kitchen"], "left the kitchen?") == 1


def test_the_turns_of_a_chat_are_the_template_of_the_model(make_model: MakeModel) -> None:
    llm = english(make_model)
    for template in (None, "{% for m in messages %}<{{m.role}}>{{m.content}}</{{m.role}}>{% endfor %}<assistant>"):
        if template is not None:
            llm.metadata["tokenizer.chat_template"] = template
        (ask,) = make_task(llm, TaskOptions("multi-turn", 2000)).quiz(1)
        assert [turn.kind for turn in (ask, *ask.turns)] == [f"turn {k}" for k in range(1, tasks.N_TURNS + 1)]
        said = [llm.detokenize(list(turn.prompt)).decode() for turn in ask.turns]
        start, end = ("\n\nQuestion: ", "\nAnswer:") if template is None else ("</assistant><user>", "</user><assistant>")
        assert all(text.strip(" ").startswith(start) and text.endswith(end) for text in said), said
        assert len(set(said)) == len(said)


@embedded
def test_turns_are_asked_on_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed once; what is said after that stays, so that the cache grows by it in every head."""
    options = TaskOptions("multi-turn", 600)
    job = evaluation.Job(pyheadkv.embedded_model(), (options,), (Setting(), Setting("snapkv", 40)), evaluation.DEFAULT_PROTOCOLS, {}, 1, 0)
    worker = evaluation.Worker(job)
    seen: list[tuple[int, int, int]] = []
    generate = Trial.generate

    def spy(trial: Trial, copies: list[Copy], *args: Any, **kwargs: Any) -> list[list[int]]:
        out = generate(trial, copies, *args, **kwargs)
        for stats in (trial.llm.kv_stats(copy.seq_id) for copy in copies):
            seen.append((stats.n_prompt, stats.n_past, int(stats.n_cells.max())))
        return out

    monkeypatch.setattr(Trial, "generate", spy)
    answers = worker.run(0, 3)["answers"]
    assert len(answers) == len(seen) == 2 * 2 * tasks.N_TURNS
    (ask,) = worker.tasks[0].quiz(3)
    for i, (answer, (n_prompt, n_past, n_cells)) in enumerate(zip(answers, seen, strict=True)):
        turn = i // 2 % tasks.N_TURNS  # both settings, then the next one
        assert answer["ask"] == turn and answer["kind"] == f"turn {turn + 1}" and answer["n_tokens"] == n_past
        aware = answer["protocol"] == "query-aware"
        assert answer["n_prompt"] == (len(ask.prompt) if aware else ask.n_context)
        assert n_prompt == answer["n_prompt"] - aware  # strict: its last token is read again
        kept = answer["n_prompt"] if answer["setting"] == "full" else 40
        assert n_cells == kept + n_past - answer["n_prompt"]  # everything since the compression
        # answers of the embedded model take a token per word; the last one is not read yet unless the answer was stopped
        words = [len(a["text"].split()) for a in answers[i - 2 * turn : i + 1 : 2]]
        stopped = words[-1] < (ask, *ask.turns)[turn].n_steps
        assert n_past == len(ask.prompt) + sum(len(t.prompt) for t in ask.turns[:turn]) + sum(words) - (not stopped)
        assert answer["setting"] != "full" or answer["score"] == 1


@embedded
def test_a_chat_is_what_the_library_makes_of_it_with_kv_reuse() -> None:
    """The same answers as completions that continue on the compressed past."""
    llm = pyheadkv.Llama(pyheadkv.embedded_model(), kv_size=64, kv_reuse=True, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    job = evaluation.Job(pyheadkv.embedded_model(), (TaskOptions("multi-turn", 600),), (Setting("headkv", 64),), ("query-aware",), {}, 1, 0)
    worker = evaluation.Worker(job)
    (ask,) = worker.tasks[0].quiz(5)
    said = list(ask.prompt)
    for answer, turn in zip(worker.run(0, 5)["answers"], (ask, *ask.turns), strict=True):
        said += turn.prompt if turn is not ask else ()
        out = list(islice(takewhile(lambda token: token != llm.token_eos(), llm.generate(said, temp=0.0)), turn.n_steps))
        assert llm.detokenize(out).decode().strip() == answer["text"]
        assert llm.kv_stats().n_prompt == answer["n_prompt"] == len(ask.prompt)
        said += out


@embedded
@pytest.mark.parametrize("policy", ["headkv", "snapkv", "razor"])
def test_an_archived_chat_is_what_the_library_makes_of_it_with_kv_archive(policy: str) -> None:
    """Every turn is a prompt with all that came before it, which is compressed with its question known."""
    options: dict[str, Any] = {"policy": policy, "kv_size": 64, "n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    llm, fresh = (pyheadkv.Llama(pyheadkv.embedded_model(), **options, **more) for more in ({"kv_archive": True}, {}))
    job = evaluation.Job(
        pyheadkv.embedded_model(), (TaskOptions("multi-turn", 600),), (Setting(), Setting(policy, 64)), ("archived",), {}, 1, 0
    )
    worker = evaluation.Worker(job)
    (ask,) = worker.tasks[0].quiz(5)
    prompt = list(ask.prompt)
    answers = sorted((a for a in worker.run(0, 5)["answers"] if a["setting"] != "full"), key=lambda a: a["ask"])
    assert len(answers) == tasks.N_TURNS
    for answer, turn in zip(answers, (ask, *ask.turns), strict=True):
        prompt += turn.prompt if turn is not ask else ()
        for model in (llm, fresh):
            model.read_prompt(prompt)
            assert model.kv_stats().n_prompt == answer["n_prompt"] == len(prompt)
            model._ctx.kv_cache_seq_rm(0, len(prompt) - 1, -1)  # strict: the last token is read again
            model.n_tokens, token, out = len(prompt) - 1, prompt[-1], list[int]()
            while len(out) < turn.n_steps:
                model.eval([token])
                token = int(model.last_logits.argmax())
                if token == model.token_eos():
                    break
                out.append(token)
            assert llm.detokenize(out).decode().strip() == answer["text"]
        prompt += out
    assert llm.kv_stats().n_archived > 500 and worker.trial(Setting(), archived=True).llm.kv_stats().archive.n_restored > 5 * 300


@embedded
def test_tasks_that_do_not_fit_the_model_are_refused() -> None:
    llm = pyheadkv.Llama(pyheadkv.embedded_model(), n_ctx=512, verbose=False)
    with pytest.raises(ValueError, match="task='passkey': for this model it must be one of niah, multi-turn, needle"):
        make_task(llm, TaskOptions("passkey", 500))


# evaluation


def evaluate(*args: str | Path) -> int:
    return cli.main(["eval", *map(str, args)])


@embedded
def test_evaluation_writes_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "e.jsonl"
    options = ["needle,niah", "-o", out, "--policy", "headkv,snapkv", "--kv-size", "32,200", "--tokens", "700",
               "--contexts", "2", "--questions", "1", "--depths", "2"]  # fmt: skip
    assert evaluate(*options) == 0
    whole = out.read_bytes()
    header, *entries = (json.loads(line) for line in whole.splitlines())
    assert [s["name"] for s in header["settings"]] == ["full", "headkv 32", "headkv 200", "snapkv 32", "snapkv 200"]
    assert [(e["task"], e["quiz"]) for e in entries] == [("needle", 0), ("needle", 1), ("niah", 0), ("niah", 1)]
    answers = [a for e in entries for a in e["answers"]]
    assert len(answers) == (2 * 5 + 2) * 2 * 5  # questions, protocols, settings
    full = [a["score"] for a in answers if a["setting"] == "full"]
    assert np.mean(full) > 0.9
    by_size = {s: {a["bytes"] for a in answers if a["setting"] == f"snapkv {s}"} for s in (32, 200)}
    assert by_size[200] == {b * 200 // 32 for b in by_size[32]}
    table = unpadded((tmp_path / "e.md").read_text())
    assert "query-agnostic" in table and "| headkv 32 |" in table and (tmp_path / "e_niah.png").stat().st_size > 1000

    assert evaluate(*options) == 1
    assert "--resume" in capsys.readouterr().err
    out.write_bytes(whole[: len(whole) - 30])  # the last line is torn
    assert evaluate(*options, "--resume") == 0
    assert out.read_bytes() == whole
    assert evaluate(*options, "--resume", "--seed", "1") == 1
    assert "was begun with tasks" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "word"), [
    (["nothing"], "task='nothing'"),
    (["needle", "--policy", "best"], "--policy='best'"),
    (["needle", "--kv-size", "8"], "--kv-size=8"),
    (["needle", "--kv-size", "x"], "--kv-size='x'"),
    (["needle", "--protocol", "kind"], "--protocol='kind'"),
    (["needle", "--tokens", "5"], "--tokens=5"),
    (["needle", "--contexts", "0"], "--contexts=0"),
    (["needle", "--beta", "1"], "--beta='1': it must be a finite number > 1"),
    (["needle", "--beta", "x"], "--beta='x'"),
    (["needle", "--kv-ratio", "2"], "--kv-ratio='2': it must be a share of the prompt"),
    (["needle", "--kv-ratio", "x"], "--kv-ratio='x'"),
    (["needle", "--kv-bytes", "100"], "kv_bytes=100: 0 cells"),
    (["needle", "--kv-bytes", "much"], "--kv-bytes='much'"),
    (["needle", "--protect", "8"], "--protect='8': it must be START:END"),
    (["needle", "--policy", "snap"], "did you mean 'snapkv'"),
    (["needle", "--policy", "snapkv", "--beta", "2"], "--beta=2: no policy of 'snapkv' looks at it"),
    (["needle", "--policy", "razor,streaming", "--pool", "avg"], "--pool=avg: no policy"),
    (["needle", "--policy", "headkv", "--replay", "t.json"], "--replay=t.json: no policy of 'headkv' looks at it"),
    (["needle", "--policy", "full", "--kv-size", "64"], "--kv-size=64: no policy of 'full'"),
    (["needle", "--window", "x"], "--window='x': it must be a whole number"),
    (["needle", "--power", "3"], "power=3: it must be one of 1, 2, 4, 8"),
    (["needle", "--pool-kernel", "4"], "pool_kernel=4: it must be odd"),
    (["needle", "--policy", "streaming", "--window", "16"], "--window=16: no policy of 'streaming' looks at it"),
    (["needle", "--policy", "full,none", "--sinks", "0"], "--sinks=0: no policy of 'full,none'"),
    (["loogle"], "task loogle reads a file: name it with --file"),
    (["passkey"], "task='passkey': for this model it must be one of niah"),
])  # fmt: skip
@embedded
def test_wrong_options_of_the_evaluation(options: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "e.jsonl"
    assert evaluate(*options, "-o", out) == 1
    assert word in capsys.readouterr().err
    assert not out.exists()


@embedded
def test_amounts_and_kept_cells_of_the_evaluation(tmp_path: Path) -> None:
    out = tmp_path / "e.jsonl"
    options = ["--policy", "snapkv,streaming", "--kv-size", "30", "--kv-ratio", "0.1", "--kv-bytes", "500KiB", "--sinks", "2",
               "--protect", "20:24", "--surplus", "redistribute", "--tokens", "600", "--contexts", "1", "--questions", "1"]  # fmt: skip
    assert evaluate("second-question", "-o", out, "--protocol", "query-aware", *options) == 0
    header, entry = map(json.loads, out.read_bytes().splitlines())
    assert header["keep"] == {"sinks": 2, "protect": [[20, 24]], "surplus": "redistribute"}
    assert [s["name"] for s in header["settings"]][:4] == ["full", "snapkv 30", "snapkv 10%", "snapkv 500KiB"]
    n_prompt = entry["answers"][0]["n_prompt"]
    cells = {a["setting"]: a["cells"] for a in entry["answers"]}
    assert cells == {
        "full": n_prompt, "snapkv 30": 30, "snapkv 10%": round(0.1 * n_prompt), "snapkv 500KiB": 100,
        "streaming 30": 30, "streaming 10%": round(0.1 * n_prompt), "streaming 500KiB": 100,
    }  # fmt: skip
    table = unpadded(out.with_suffix(".md").read_text())
    assert "Under all settings: sinks 2, protected 20:24, surplus redistribute." in table
    assert f"| snapkv 30 | 30 | {3000 / n_prompt:.1f} % | 150 | " in table


def make_worker(path: Path, task: TaskOptions, *settings: Setting, kl: bool = False) -> evaluation.Worker:
    return evaluation.Worker(evaluation.Job(path, (task,), (Setting(), *settings), evaluation.DEFAULT_PROTOCOLS, {}, 1, 0, kl))


@pytest.mark.parametrize("name", ["passkey", "ruler-words", "text"])
def test_no_context_is_the_question_alone(name: str, make_model: MakeModel) -> None:
    path = make_model(SHAPE)
    worker = make_worker(path, TaskOptions(name, 1024, n_each=1), Setting("none"), Setting("snapkv", 64))
    answers = worker.run(0, 1)["answers"]
    llm = load(path, kv_size=None)
    for i, ask in enumerate(worker.tasks[0].quiz(1)):
        assert len(ask.alone) < 200 and list(ask.alone[-5:]) == list(ask.prompt[-5:])
        if name == "passkey":
            text = llm.detokenize(list(ask.alone)).decode()
            assert "What is the pass key?" in text and ask.answer not in text
        said = greedy(llm, list(ask.alone), ask.n_steps) if ask.n_steps else []
        said = list(takewhile(lambda token: token not in worker.tasks[0].stop_tokens, said))
        text = llm.detokenize(said).decode("utf-8", "replace").strip()
        mine = [a for a in answers if a["ask"] == i and a["setting"] == "none"]
        assert [a["text"] for a in mine] == [text, text] and all(a["cells"] == a["bytes"] == 0 for a in mine)


def test_a_question_alone_is_asked_of_a_recurrent_model(make_model: MakeModel) -> None:
    """Its state does not go back: not to before the last token of the question, and not behind an answer."""
    job = evaluation.Job(
        make_model(HYBRID), (TaskOptions("facts", 800, n_each=1),), (Setting(), Setting("none")), ("query-agnostic",), {}, 1, 0, kl=True
    )
    worker = evaluation.Worker(job)
    answers = [a for a in worker.run(0, 0)["answers"] if a["setting"] == "none"]
    llm = load(make_model(HYBRID), kv_size=None, logits_all=True)
    assert len(answers) == 4
    for answer, ask in zip(answers, worker.tasks[0].quiz(0), strict=True):
        right, n = ask.right[: ask.n_steps], len(ask.alone)
        llm.reset()
        llm.eval([*ask.alone, *right])
        log_p = log_softmax(llm.scores[n - 1 : n - 1 + len(right)])
        assert answer["right"] == {"n": len(right), "nll": pytest.approx(-log_p[range(len(right)), right].mean(), rel=2e-3)}
        said = llm.detokenize(_greedy(llm, list(ask.alone), ask.n_steps, worker.tasks[0].stop_tokens)).decode("utf-8", "replace").strip()
        assert answer["text"] == said


def test_numbers_of_the_scoring_are_settings(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "e.jsonl"
    options = ["--policy", "snapkv,streaming", "--kv-size", "40", "--window", "8,96", "--power", "1,4", "--pool-kernel", "7"]
    path = str(make_model(SHAPE))
    assert evaluate("passkey", path, "-o", out, *options, "--tokens", "400", "--contexts", "1", "--protocol", "query-aware") == 0
    header, entry = map(json.loads, out.read_bytes().splitlines())
    names = ["snapkv window 8 power 1 kernel 7 40", "snapkv window 8 power 4 kernel 7 40", "snapkv window 96 power 1 kernel 7 40",
             "snapkv window 96 power 4 kernel 7 40", "streaming 40"]  # fmt: skip
    assert [s["name"] for s in header["settings"]] == ["full", *names] and [a["setting"] for a in entry["answers"]] == ["full", *names]
    table = unpadded(out.with_suffix(".md").read_text())
    assert table.count("| streaming 40 |") == 2  # scores, and points above the first uniform one
    trial = open_trial(Path(path), n_copies=4, window=96)
    prompt = tokens(400)
    for window, power in ((8, 1), (96, 4), (96, 1), (8, 4)):
        copy = trial.compress(Setting("snapkv", 40, window=window, power=power, pool_kernel=7), prompt)
        fresh = load(Path(path), kv_size=40, policy="snapkv", preset="default", window=window, power=power, pool_kernel=7)
        fresh.read_prompt(prompt)
        found, expected = positions(trial.llm, copy.seq_id), positions(fresh)
        assert len(found) == len(expected) and len(found & expected) >= 0.99 * len(expected)


def test_text_behind_the_question(make_model: MakeModel) -> None:
    llm = english(make_model)
    with pytest.raises(ValueError, match="it needs a model with a chat template"):
        make_task(llm, TaskOptions("passkey", 500, after="Be brief."))
    llm.metadata["tokenizer.chat_template"] = "{% for m in messages %}<{{m.role}}>{{m.content}}</{{m.role}}>{% endfor %}<assistant>"
    for name in ("passkey", "multi-turn"):
        (ask,) = make_task(llm, TaskOptions(name, 500, after="Be brief.")).quiz(0)
        for turn in (ask, *ask.turns):
            assert llm.detokenize(list(turn.prompt)).decode().endswith(". Be brief.</user><assistant>")
    with pytest.raises(ValueError, match="not those of text"):
        make_task(llm, TaskOptions("text", 500, after="Be brief."))


def test_distances_are_those_of_the_logits(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_model(SHAPE)
    trial = open_trial(path, n_copies=2)
    prompt, follows = tokens(200), tokens(30, seed=4)[1:]
    copies = [trial.compress(setting, prompt) for setting in (Setting(), Setting("snapkv", 20))]
    trial.go_on(copies, 199, prompt[-1:])
    (rows,) = trial.follow(copies, [prompt[-1], *follows[:-1]])
    log_p = [row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum(axis=1, keepdims=True)) for row in rows]
    monkeypatch.setattr(Trial, "N_LOGITS", 5 * 2 * trial.llm.n_vocab())  # in pieces
    trial.generate(copies, 7, 9)
    assert trial.go_back(copies, 199) and [c.n_tokens for c in copies] == [199, 199]
    found = evaluation.measure(trial, copies, prompt[-1], evaluation.Expected(follows))
    for distance, mine in zip(found, log_p, strict=True):
        assert distance.n == len(follows)
        assert distance.nll == pytest.approx(-np.mean([row[t] for row, t in zip(mine, follows, strict=True)]), rel=1e-3)
        assert distance.kl == pytest.approx((np.exp(log_p[0]) * (log_p[0] - mine)).sum(axis=1).mean(), rel=1e-2, abs=1e-5)
        assert distance.agree == pytest.approx((log_p[0].argmax(axis=1) == mine.argmax(axis=1)).mean(), abs=1 / 29)
    assert found[0].kl == pytest.approx(0, abs=1e-5) and found[0].agree == 1 and found[1].kl > 1e-4


@pytest.mark.parametrize("name", ["text", "multi-turn"])
def test_distances_do_not_change_answers(name: str, make_model: MakeModel) -> None:
    """Chats go on from what was said."""
    task = TaskOptions(name, 600)
    with_kl, without = (make_worker(make_model(SHAPE), task, Setting("snapkv", 24), kl=kl).run(0, 2)["answers"] for kl in (True, False))
    assert any("distance" in a for a in with_kl)
    assert all(("right" in a) == (name == "multi-turn") for a in with_kl) and not any("right" in a for a in without)
    assert [a["text"] for a in with_kl] == [a["text"] for a in without]
    assert [a["n_tokens"] for a in with_kl] == [a["n_tokens"] for a in without]
    if name == "text":
        assert all(a["score"] == a["distance"]["agree"] and a["text"] == "" for a in with_kl)
        assert [a["score"] for a in with_kl if a["setting"] == "full"] == [1, 1]


@pytest.mark.parametrize("name", ["facts", "multi-turn"])
def test_the_right_answer_is_as_likely_as_a_model_alone_says(name: str, make_model: MakeModel) -> None:
    """Behind the question, and in a chat behind what was said before it."""
    path = make_model(SHAPE)
    worker = make_worker(path, TaskOptions(name, 900), kl=True)
    llm, answers = load(path, kv_size=None, n_ctx=2048, logits_all=True), worker.run(0, 1)["answers"]
    for protocol in evaluation.DEFAULT_PROTOCOLS:
        found = [a for a in answers if a["protocol"] == protocol]
        for ask in worker.tasks[0].quiz(1):
            before: list[int] = [*ask.prompt, *ask.more]
            for turn in (ask, *ask.turns):
                before += turn.prompt if turn is not ask else ()
                (mine, *found), right = found, turn.right[: turn.n_steps]
                llm.reset()
                llm.eval([*before, *right])
                log_p = log_softmax(llm.scores[len(before) - 1 : len(before) - 1 + len(right)])
                assert mine["right"] == {"n": len(right), "nll": pytest.approx(-log_p[range(len(right)), right].mean(), rel=2e-3)}
                if ask.turns:
                    before += _greedy(llm, before, turn.n_steps, worker.tasks[0].stop_tokens)
        assert not found


def _greedy(llm: Any, before: list[int], n: int, stop: frozenset[int]) -> list[int]:
    said: list[int] = []
    llm.reset()
    llm.eval(before)
    while len(said) < n and (best := int(llm.scores[llm.n_tokens - 1].argmax())) not in stop:
        said.append(best)
        llm.eval([best])
    return said


@pytest.mark.parametrize("adds_space", [False, True])
def test_an_answer_has_the_tokens_that_it_has_behind_the_prompt(adds_space: bool, make_model: MakeModel, tmp_path: Path) -> None:
    data, name = bytearray(make_model(SHAPE).read_bytes()), b"tokenizer.ggml.add_space_prefix"
    data[data.index(name) + len(name) + 4] = adds_space
    (tmp_path / "m.gguf").write_bytes(data)
    llm = load(tmp_path / "m.gguf", kv_size=None)
    prose = Prose(llm)
    for prompt, answer in (("Answer:\n", "the sea"), ("Answer:", " the sea"), ("Answer:\n\n", "71432")):
        head, whole = (llm.tokenize(text.encode(), add_bos=False) for text in (prompt, prompt + answer))
        assert whole[: len(head)] == head and prose.behind(head, answer.strip()) == tuple(whole[len(head) :])
    control = [llm.token_bos()]
    assert list(prose.behind(control, "the sea")) == llm.tokenize(b"the sea", add_bos=False)


@pytest.mark.parametrize("name", [*tasks.PROSE, "ruler-words"])
def test_right_answers_are_graded_right(name: str, make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=None)
    for ask in make_task(llm, TaskOptions(name, 2000)).quiz(2):
        for turn in (ask, *ask.turns):
            assert turn.right and turn.grade(llm.detokenize(list(turn.right)).decode()) == 1


def test_text_goes_on_as_it_does(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=None)
    (ask,) = make_task(llm, TaskOptions("text", 300)).quiz(3)
    said = llm.detokenize(list(ask.prompt[1:] + ask.follows)).decode().strip()
    assert len(ask.prompt) == 300 and len(ask.follows) == 64
    whole = " ".join(haystack_sentences())
    assert said[:200] in whole + " " + whole
    with pytest.raises(ValueError, match="the text of this task has"):
        make_task(llm, TaskOptions("text", 1 << 20)).quiz(0)


def test_the_report_ranks_what_the_full_cache_can_do_and_names_the_least_cells(tmp_path: Path) -> None:
    names = {"full": 0, "none": 0, "snapkv 32": 32, "snapkv 64": 64, "snapkv 128": 128}
    settings = [
        {"name": name, "method": name.split()[0], "policy": name.split()[0], "budget": str(n or ""), "pool": ""}
        for name, n in names.items()
    ]
    header = {
        "settings": settings, "versions": {}, "model": "m", "model_sha256": "0" * 64, "tasks": [{"name": "t"}],
        "keep": {"sinks": None, "protect": [], "surplus": "lost"},
    }  # fmt: skip
    right = {"easy": {"full": 1, "none": 0, "snapkv 32": 0.5, "snapkv 64": 0.92, "snapkv 128": 1}, "guessed": dict.fromkeys(names, 1)}
    out = tmp_path / "r.jsonl"
    lines = [header]
    for quiz in range(6):
        answers = [
            {"ask": 0, "kind": kind, "depth": 0.5, "protocol": "query-aware", "setting": name, "score": score, "n_prompt": 1000,
             "cells": names[name], "bytes": names[name], "bytes_store": names[name], "distance": {"n": 10, "nll": 2.0, "kl": 0.25, "agree": 1},
             "right": {"n": 1 + 2 * (kind == "easy"), "nll": 1.0 + 2 * (kind == "easy")}}
            for kind, scores in right.items() for name, score in scores.items()
        ]  # fmt: skip
        lines.append({"task": "t", "length": 1000, "quiz": quiz, "answers": answers})
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = unpadded(evaluate_report.write_report(out, command="c", where="w").read_text())
    assert "Not to be ranked, the full cache is not above no context by more than chance: guessed." in table
    assert "| setting | easy |" in table and "| snapkv | 64 / 128 |" in table
    assert table.count("| 7.39 | 0.250 | 12.2 |") == len(names)  # exp(10 / 4)


def test_interval_is_that_of_the_committed_tables() -> None:
    """They were drawn by these lines, before scipy drew."""
    rng = np.random.default_rng(3)
    for n in (2, 20, 48):
        scores = {str(i): rng.integers(2, size=1 + i % 4).tolist() for i in range(n)}
        sums, counts = (np.array([f(s) for s in scores.values()], dtype=float) for f in (sum, len))
        pick = np.random.default_rng(0).integers(n, size=(evaluate_report.N_BOOTSTRAP, n))
        low, high = np.quantile(sums[pick].sum(1) / counts[pick].sum(1), (0.025, 0.975))
        assert evaluate_report.interval(scores) == pytest.approx((sums.sum() / counts.sum(), low, high), abs=1e-12)
    assert evaluate_report.interval({"one": [1, 0]}) == (0.5, 0.5, 0.5)


def test_interval_covers_the_mean_and_shrinks() -> None:
    rng = np.random.default_rng(2)
    widths = []
    for n in (20, 500):
        mean, low, high = evaluate_report.interval({str(i): rng.integers(2, size=5).tolist() for i in range(n)})
        assert low < mean < high and abs(mean - 0.5) < 0.15
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_gain_pairs_the_questions() -> None:
    def answers(setting: str, scores: list[int]) -> list[evaluate_report.Answer]:
        return [
            evaluate_report.Answer("t", 1, f"{i // 2}", i % 2, "k", 0.0, "p", setting, score, 9, 1.0, 1, 1, None)
            for i, score in enumerate(scores)
        ]

    mean, low, high = evaluate_report.gain(answers("a", [1, 1, 0, 1]), answers("b", [0, 1, 0, 0])[::-1])
    assert mean == 0.5 and low == high == 0.5


# beta


@embedded
def test_beta_is_chosen_stored_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "N_EXAMPLES", 4)
    monkeypatch.setattr(calibrate, "BETAS", (1.01, 2.0, 10.0))
    first, second, model = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "m.gguf"
    options = ["score", "--threads", "1", "--examples", "8", "--max-tokens", "700", "--calibrate", "--kv-size", "24", "64"]
    assert cli.main([*options, "-o", str(first), "--write", str(model), "--force"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(first.read_bytes())
    assert f"beta     {content['beta']:g} chosen on {content['calibration']['n_examples']}" in printed
    surprise = np.array(list(content["calibration"]["surprise"].values()))
    assert surprise.shape == (2, 3) and content["beta"] == (1.01, 2.0, 10.0)[int(surprise.mean(0).argmin())]
    assert (surprise[1] <= surprise[0]).all()  # more cells never surprise more, on average
    found = gguf_keys.read_importance(model)
    assert found is not None and found.beta == content["beta"]

    append = Journal.append

    def interrupt(journal: Journal, entry: dict[str, Any]) -> None:
        append(journal, entry)
        if entry.get("held_out") == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupt)
    assert cli.main([*options, "-o", str(second)]) == 130
    monkeypatch.setattr(Journal, "append", append)
    assert cli.main([*options, "-o", str(second), "--resume"]) == 0
    assert second.read_bytes() == first.read_bytes()


def test_the_larger_of_equal_betas_is_chosen() -> None:
    surprise = np.array([[[3.0, 1.0, 1.0, 0.5]]])
    assert calibrate.Calibration((1.1, 1.5, 2.0), (64,), surprise).beta == 2.0
