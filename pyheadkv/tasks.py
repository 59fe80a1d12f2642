"""What ``pyheadkv eval`` asks: contexts with needles, questions about them, and how an answer is graded.

Two languages. The embedded model is asked in its own (``pyheadkv.needle``), every other model in English: sentences of
a public-domain text, shuffled, with needles between them, in the chat template of the model. The forms of the ``ruler``
kinds follow RULER (Hsieh et al. 2024, arXiv:2404.06654); the wording and the vocabulary are ours.

``longbench`` and ``babilong`` read JSON lines from a local file, ``{"dataset", "context", "input", "answers"}`` as
LongBench has them or ``{"input", "question", "target"}`` as BABILong has them, and use the prompts of these benchmarks.
"""

from __future__ import annotations

import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import metrics, needle
from .score_examples import MARK, REASONING, RETRIEVAL, Prose, speaks_needle_language, split_at

if TYPE_CHECKING:
    from .llama import Llama

N_SPARE = 16  # tokens that an English answer may have besides what is asked
PROMPTS = Path(__file__).resolve().parent / "data" / "prompts.json"
PASS_F1 = 0.5  # a whole sentence counts as answered above it

Grade = Callable[[str], float]


@dataclass(frozen=True)
class Ask:
    """One question about a context.

    Attributes
    ----------
    kind : of question
    prompt : tokens of the context and the question; query-aware compression sees all of them
    n_context : of them that are the context; query-agnostic compression sees only these
    more : tokens behind the prompt: its answer and another question, which is the one that is graded
    n_steps : tokens to generate at most
    grade : 0 to 1 for generated text
    depth : of the needle in the context, 0 to 1
    """

    kind: str
    prompt: tuple[int, ...]
    n_context: int
    n_steps: int
    grade: Grade
    depth: float
    more: tuple[int, ...] = ()


class Task(ABC):
    """A source of contexts."""

    def __init__(self, llm: Llama, options: TaskOptions) -> None:
        self.llm, self.options = llm, options

    @abstractmethod
    def quiz(self, i: int) -> list[Ask]:
        """The questions about context i; the same i always gives the same ones."""

    def rng(self, i: int) -> random.Random:
        """Source of what is random in context i."""
        options = self.options
        return random.Random(f"{options.seed} {options.name} {options.n_tokens} {i}")

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        import llama_cpp

        return frozenset(t for t in range(self.llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(self.llm._model.vocab, t))


@dataclass(frozen=True)
class TaskOptions:
    """
    Attributes
    ----------
    name : of the task
    n_tokens : length of the longest prompt
    n_each : questions of each kind per context
    n_depths : contexts i, i + n_depths, .. have their needle at the same depth (task niah)
    file : of a task that reads one
    """

    name: str
    n_tokens: int
    n_each: int = 2
    seed: int = 0
    n_depths: int = 10
    file: Path | None = None


# the language of the embedded model


class CorpusTask(Task):
    """Kinds of questions in the language of the embedded model, all about one context."""

    def __init__(self, llm: Llama, options: TaskOptions, kinds: Sequence[needle.Kind]) -> None:
        super().__init__(llm, options)
        self.kinds = kinds

    def quiz(self, i: int) -> list[Ask]:
        options = self.options
        documents = needle.make_quiz(self.rng(i), n_tokens=options.n_tokens, kinds=self.kinds, n_each=options.n_each)
        return [_corpus_ask(document) for document in documents]


class CorpusDepths(Task):
    """One direct question per context, its needle at a given depth."""

    def quiz(self, i: int) -> list[Ask]:
        depth = (i % self.options.n_depths + 0.5) / self.options.n_depths
        document = needle.make_document(self.rng(i), n_tokens=self.options.n_tokens, kinds=["direct"], depth=depth)
        return [replace(_corpus_ask(document), depth=depth)]


def _corpus_ask(document: needle.Document) -> Ask:
    first = (needle.BOS, *needle.encode(document.prompt(1)))
    whole = (needle.BOS, *needle.encode(document.prompt()))
    return Ask(
        kind=document.kind,
        prompt=first,
        n_context=1 + len(needle.encode(document.context)),
        n_steps=document.n_answer_tokens,
        grade=lambda text: float(document.is_correct(text)),
        depth=document.depths[0],
        more=whole[len(first) :],
    )


# English


@dataclass(frozen=True)
class Fact:
    """A needle and where it goes."""

    text: str
    depth: float


@dataclass(frozen=True)
class Asked:
    """A question in English."""

    kind: str
    question: str
    grade: Grade
    n_steps: int
    depth: float
    how: str = "Answer with the words of the text."


class ProseTask(Task):
    """Facts between the sentences of a public-domain text and questions about them."""

    def __init__(self, llm: Llama, options: TaskOptions, make: Callable[[random.Random, int, TaskOptions], _Said]) -> None:
        super().__init__(llm, options)
        self.make, self._prose = make, Prose(llm)

    def quiz(self, i: int) -> list[Ask]:
        rng = self.rng(i)
        facts, asked = self.make(rng, i, self.options)
        frames = [self._prose.frame(a.question, how=a.how) for a in asked]
        prefix = frames[0][0]
        said = [(fact.depth, self._prose.continued(fact.text)) for fact in facts]
        n_rest = len(prefix) + sum(len(tokens) for _, tokens in said) + max(len(suffix) for _, suffix in frames)
        sentences = self._prose.haystack(rng, self.options.n_tokens - n_rest)
        context = [*prefix, *_interleave(sentences, said)]
        return [
            Ask(a.kind, (*context, *suffix), len(context), a.n_steps, a.grade, a.depth)
            for a, (_, suffix) in zip(asked, frames, strict=True)
        ]


_Said = tuple[list[Fact], list[Asked]]


def _interleave(sentences: list[list[int]], said: list[tuple[float, list[int]]]) -> list[int]:
    out: list[int] = []
    rest, n_all = sentences, max(1, sum(map(len, sentences)))
    n_done = 0
    for depth, tokens in sorted(said):
        n_left = n_all - n_done
        head, rest = split_at(rest, (depth * n_all - n_done) / n_left if n_left > 0 else 1.0)
        n_done += sum(map(len, head))
        out += [t for sentence in head for t in sentence]
        out += tokens
    return out + [t for sentence in rest for t in sentence]


def _is_sentence(answer: str) -> Grade:
    return lambda text: float(metrics.token_f1(text, answer) > PASS_F1)


def _has_all(values: Sequence[str]) -> Grade:
    """Share of the values that the text has."""
    return lambda text: sum(value.lower() in text.lower() for value in values) / len(values)


def _steps(text: str) -> int:
    return len(text.split()) * 2 + N_SPARE


def _depth(rng: random.Random) -> float:
    return round(rng.random(), 4)


def niah(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """One sentence about something that nothing else is about."""
    chosen = rng.choice(RETRIEVAL)
    depth = (i % options.n_depths + 0.5) / options.n_depths
    said = " ".join((*chosen.before, chosen.answer))
    return [Fact(said, depth)], [Asked("niah", chosen.question, _is_sentence(chosen.answer), _steps(chosen.answer), depth)]


def second_question(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """Several such sentences in one context, one question about each."""
    facts, asked = [], []
    for chosen in rng.sample(RETRIEVAL, min(2 * options.n_each, len(RETRIEVAL))):
        depth = _depth(rng)
        facts.append(Fact(" ".join((*chosen.before, chosen.answer)), depth))
        asked.append(Asked("second-question", chosen.question, _is_sentence(chosen.answer), _steps(chosen.answer), depth))
    return facts, asked


def reasoning(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """Two sentences that could answer, two that say which one does; question and reversed question."""
    facts, asked = [], []
    for pair in rng.sample(REASONING, min(options.n_each, len(REASONING))):
        facts += [Fact(text, _depth(rng)) for text in pair.reasons]
        depths = [_depth(rng), _depth(rng)]
        facts += [Fact(text, depth) for text, depth in zip(pair.answers, depths, strict=True)]
        for which in (0, 1):
            answer = pair.answers[which]
            asked.append(Asked("reasoning", pair.questions[which], _is_sentence(answer), _steps(answer), depths[which]))
    return facts, asked


def instruction(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """A rule at the beginning of the text, which the answer must follow, and a question about something else."""
    word, chosen = rng.choice(KEYS.split()), rng.choice(RETRIEVAL)
    depth = 0.2 + 0.8 * rng.random()
    rule = f"Whatever is asked about this text, the first word of the answer must be {word}."
    facts = [Fact(rule, 0.0), Fact(" ".join((*chosen.before, chosen.answer)), depth)]
    grade = lambda text: float(re.findall(r"[a-z]+", text.lower())[:1] == [word])
    return facts, [Asked("instruction", chosen.question, grade, N_SPARE, 0.0, "Follow the rules of the text.")]


SHORT = "Answer with the number and nothing else."
KEYS = "amber birch cedar delta ember fjord grove hazel inlet jasper kelp larch maple north opal pearl quartz river sage tide"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1000000, 10000000))


def passkey(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """A five-digit key."""
    value, depth = str(rng.randrange(10000, 100000)), _depth(rng)
    fact = Fact(f"The pass key is {value}. Remember it: {value} is the pass key.", depth)
    return [fact], [Asked("passkey", "What is the pass key?", _has_all([value]), N_SPARE, depth, SHORT)]


def ruler_keys(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """Numbers of several names, one of them with several numbers; asked for one, for all of a name, for two names."""
    names = rng.sample(KEYS.split(), 8)
    numbers = {name: [_number(rng)] for name in names}
    numbers[names[0]] += [_number(rng) for _ in range(3)]
    facts = [Fact(f"One of the secret numbers of {n} is {v}.", _depth(rng)) for n in names for v in numbers[n]]
    asked = []
    for name in rng.sample(names[1:], min(options.n_each, len(names) - 1)):
        depth = next(f.depth for f in facts if numbers[name][0] in f.text)
        asked.append(Asked("multikey", f"What is the secret number of {name}?", _has_all(numbers[name]), N_SPARE, depth, SHORT))
    several = numbers[names[0]]
    how = "Answer with the numbers and nothing else."
    asked.append(Asked("multivalue", f"What are all the secret numbers of {names[0]}?", _has_all(several), 60, 0.5, how))
    pair = rng.sample(names[1:], 2)
    both = [numbers[n][0] for n in pair]
    question = f"What are the secret numbers of {pair[0]} and of {pair[1]}?"
    asked.append(Asked("multiquery", question, _has_all(both), 40, 0.5, how))
    return facts, asked


def ruler_variables(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """Chains of assignments; asked for the variables that have the value at the start of one."""
    facts, asked = [], []
    letters = rng.sample([a + b for a in "BCDFGH" for b in "JKLMNP"], 12)
    for c in range(3):
        chain, value = letters[4 * c : 4 * c + 4], _number(rng)
        depths = sorted(_depth(rng) for _ in chain)
        sources = [value, *chain[:-1]]
        facts += [Fact(f"The variable {x} is set to {y}.", d) for x, y, d in zip(chain, sources, depths, strict=True)]
        if c < options.n_each:
            question = f"Which variables have, directly or through other variables, the value {value}?"
            asked.append(Asked("variables", question, _has_all(chain), 48, depths[0], "Answer with their names."))
    return facts, asked


# from files


class FileTask(Task):
    """One context and question per line of a JSON lines file, with the prompts and metrics of its benchmark."""

    NO_CHAT = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")  # LongBench asks these without a chat template
    FIRST_LINE = ("trec", "triviaqa", "samsum")

    def __init__(self, llm: Llama, options: TaskOptions) -> None:
        super().__init__(llm, options)
        if options.file is None:
            raise ValueError(f"task {options.name} reads a file: name it with --file FILE.jsonl")
        with open(options.file, encoding="utf-8") as file:
            self._rows = [json.loads(line) for line in file if line.strip()]
        self._prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))[options.name]
        self._prose = Prose(llm)

    def quiz(self, i: int) -> list[Ask]:
        read = self._babilong if self.options.name == "babilong" else self._longbench
        try:
            return [read(self._rows[i])]
        except KeyError as error:
            raise ValueError(f"{self.options.file}: line {i + 1} has no key {error}: is it a file of {self.options.name}?") from None

    def _babilong(self, row: dict[str, Any]) -> Ask:
        found = re.search(r"qa[1-5](?!\d)", str(self.options.file and self.options.file.name))
        if found is None:
            raise ValueError(f"{self.options.file}: the name of a BABILong file says which task it is, qa1 to qa5: rename it")
        name, labels = found[0], self._prompts["labels"][found[0]]
        text = self._prompts["template"].format(context=MARK, question=row["question"], **self._prompts[name])
        answer, question = row["target"], row["question"]
        return self._ask(name, text, row["input"], 20, lambda said: metrics.label(said, answer, labels, question))

    def _longbench(self, row: dict[str, Any]) -> Ask:
        name = row["dataset"]
        if name not in self._prompts:
            raise ValueError(f"dataset {name!r}: it must be one of {', '.join(self._prompts)}")
        text = self._prompts[name]["prompt"].format(context=MARK, input=row["input"])
        answers, classes = row["answers"], row.get("all_classes") or []

        def grade(said: str) -> float:
            if name in self.FIRST_LINE:
                said = said.lstrip("\n").split("\n")[0]
            return max(_longbench_grade(name, said, answer, classes) for answer in answers)

        return self._ask(name, text, row["context"], self._prompts[name]["max_tokens"], grade, chat=name not in self.NO_CHAT)

    def _ask(self, kind: str, template: str, context: str, n_steps: int, grade: Grade, *, chat: bool = True) -> Ask:
        """A prompt with MARK in place of its context, cut in its middle when it is too long, as LongBench does."""
        prefix, suffix = self._prose.wrap(chat=chat)
        before, after = template.split(MARK)
        head, rest = (self.llm.tokenize(text.encode(), add_bos=False) for text in (before + context, after))
        n_room = self.options.n_tokens - len(prefix) - len(suffix)
        body = [*head, *rest]
        if len(body) > n_room:
            body = body[: n_room // 2] + body[len(body) - (n_room - n_room // 2) :]
        tokens = (*prefix, *body, *suffix)
        return Ask(kind, tokens, len(tokens) - len(suffix) - min(len(rest), n_room - 1), n_steps, grade, 0.5)


def _longbench_grade(name: str, said: str, answer: str, classes: Sequence[str]) -> float:
    if name == "trec":
        return metrics.classification(said, answer, classes)
    if name in ("passage_count", "passage_retrieval_en"):
        return metrics.number_share(said, answer)
    if name in ("lcc", "repobench-p"):
        return metrics.code_similarity(said, answer)
    if name in ("gov_report", "qmsum", "multi_news", "samsum"):
        return metrics.rouge_l(said, answer)
    return metrics.token_f1(said, answer)


# all of them

CORPUS: dict[str, tuple[needle.Kind, ...]] = {
    "needle": needle.KINDS,
    "reasoning": ("two-hop", "comparison"),
    "second-question": ("follow-up",),
    "list": ("list",),
}
PROSE: dict[str, Callable[[random.Random, int, TaskOptions], _Said]] = {
    "niah": niah,
    "reasoning": reasoning,
    "second-question": second_question,
    "instruction": instruction,
    "passkey": passkey,
    "ruler-keys": ruler_keys,
    "ruler-variables": ruler_variables,
}
FILES = ("longbench", "babilong")
TASKS = tuple(dict.fromkeys(("needle", "niah", *CORPUS, *PROSE, *FILES)))


def make_task(llm: Llama, options: TaskOptions) -> Task:
    """The task in the language of the model.

    Raises
    ------
    ValueError : there is no such task for this model
    """
    name = options.name
    if speaks_needle_language(llm):
        if name == "niah":
            return CorpusDepths(llm, options)
        if name in CORPUS:
            return CorpusTask(llm, options, CORPUS[name])
        known: tuple[str, ...] = ("niah", *CORPUS)
    else:
        if name in PROSE:
            return ProseTask(llm, options, PROSE[name])
        if name in FILES:
            return FileTask(llm, options)
        known = (*PROSE, *FILES)
    raise ValueError(f"task={name!r}: for this model it must be one of {', '.join(known)}")
