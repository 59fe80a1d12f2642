"""What ``pyheadkv eval`` asks: contexts with needles, questions about them, and how an answer is graded.

Two languages. The embedded model is asked in its own (``pyheadkv.eval.needle``), every other model in English: sentences of
a public-domain text, shuffled, with needles between them, in the chat template of the model. The forms of the ``ruler``
kinds follow RULER (Hsieh et al. 2024, arXiv:2404.06654); the wording and the vocabulary are ours.

``multi-turn`` is a chat: ``N_TURNS`` questions about one document, one after the other, as ``Llama(kv_reuse=True)`` has
it. Compressed is once: query-aware the document with the first question, query-agnostic the document alone. Everything
after that is held as it is, uncompressed, in every head: what the model answers, the next question and so on, so that
turn k is answered from what the compression kept of the document, and from the whole chat since. The history is what was
said under the same setting, right or wrong, not the right answers; the full cache does the same. Turns are the kinds of
question, so that tables and plots show the accuracy by turn. Bytes are those after the compression.

The tasks that read files are in ``pyheadkv.eval.file_tasks``.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import metrics, needle
from .file_tasks import CLASSES, FILES
from .needle import speaks_needle_language
from .prose import REASONING, RETRIEVAL, Prose, haystack_sentences, split_at
from .quiz import Ask, Grade, Task, TaskOptions, Turn

if TYPE_CHECKING:
    from ..llama import Llama

N_SPARE = 16  # tokens that an English answer may have besides what is asked
PASS_F1 = 0.5  # a whole sentence counts as answered above it
N_TURNS = 5  # of a chat


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


class CorpusChat(Task):
    """One direct question after the other about one context, every one about another value."""

    def quiz(self, i: int) -> list[Ask]:
        document = needle.make_document(self.rng(i), n_tokens=self.options.n_tokens, kinds=["direct"] * N_TURNS)
        first, *later = document.turns
        ask = _corpus_ask(replace(document, turns=(first,)))
        turns = []
        for k, turn in enumerate(later, start=2):
            said = replace(document, turns=(turn,))
            prompt = tuple(needle.encode(turn.question))
            right = tuple(needle.encode(said.answer))
            turns.append(Turn(f"turn {k}", prompt, said.n_answer_tokens, _corpus_grade(said), turn.depths[0], right))
        return [replace(ask, kind="turn 1", turns=tuple(turns))]


def _corpus_grade(document: needle.Document) -> Grade:
    return lambda text: float(document.is_correct(text))


def _corpus_ask(document: needle.Document) -> Ask:
    first = (needle.BOS, *needle.encode(document.prompt(1)))
    whole = (needle.BOS, *needle.encode(document.prompt()))
    n_context = 1 + len(needle.encode(document.context))
    return Ask(
        kind=document.kind,
        prompt=first,
        n_context=n_context,
        alone=(needle.BOS, *whole[n_context:]),
        n_steps=document.n_answer_tokens,
        grade=_corpus_grade(document),
        depth=document.depths[0],
        more=whole[len(first) :],
        right=tuple(needle.encode(document.answer)),
        question=document.question,
        answer=document.answer,
    )


# English


@dataclass(frozen=True)
class Fact:
    """A needle and where it goes."""

    text: str
    depth: float


@dataclass(frozen=True)
class Asked:
    """A question in English; ``answer`` is shown, ``grade`` decides; ``opening``: first words of the answer, which are given."""

    kind: str
    question: str
    answer: str
    grade: Grade
    n_steps: int
    depth: float
    how: str = "Answer with the words of the text."
    opening: str = ""

    @property
    def said(self) -> str:
        """The answer, with a capital unless its first words are given."""
        return self.answer if self.opening else self.answer[0].upper() + self.answer[1:]


class ProseTask(Task):
    """Facts between the sentences of a public-domain text and questions about them."""

    def __init__(self, llm: Llama, options: TaskOptions, make: Callable[[random.Random, int, TaskOptions], _Said]) -> None:
        super().__init__(llm, options)
        self.make, self._prose = make, Prose(llm, raw=options.raw, after=options.after)

    def quiz(self, i: int) -> list[Ask]:
        rng = self.rng(i)
        facts, asked = self.make(rng, i, self.options)
        frames = [self._prose.frame(a.question, how=a.how) for a in asked]
        context = self._context(rng, frames[0][0], facts, n_asked=max(len(suffix) for _, suffix in frames))
        return [self._ask(a, context, prefix, suffix) for a, (prefix, suffix) in zip(asked, frames, strict=True)]

    def _ask(self, asked: Asked, context: list[int], prefix: list[int], suffix: list[int], turns: tuple[Turn, ...] = ()) -> Ask:
        more = self.llm.tokenize(asked.opening.encode(), add_bos=False) if asked.opening else []
        return Ask(
            kind=asked.kind,
            prompt=(*context, *suffix),
            n_context=len(context),
            alone=(*prefix, *suffix),
            n_steps=asked.n_steps,
            grade=asked.grade,
            depth=asked.depth,
            more=tuple(more),
            turns=turns,
            right=self._prose.behind([*suffix, *more], asked.said),
            question=asked.question,
            answer=asked.answer,
        )

    def _context(self, rng: random.Random, prefix: list[int], facts: list[Fact], *, n_asked: int) -> list[int]:
        said = [(fact.depth, self._prose.continued(fact.text)) for fact in facts]
        n_rest = len(prefix) + sum(len(tokens) for _, tokens in said) + n_asked
        sentences = self._prose.haystack(rng, self.options.n_tokens - n_rest)
        return [*prefix, *_interleave(sentences, said)]


class ProseChat(ProseTask):
    """The questions about one context one after the other, in one chat."""

    def quiz(self, i: int) -> list[Ask]:
        rng = self.rng(i)
        facts, (first, *later) = self.make(rng, i, self.options)
        prefix, suffix = self._prose.frame(first.question, how=first.how)
        replies = [self._prose.reply(a.question, how=a.how) for a in later]
        context = self._context(rng, prefix, facts, n_asked=len(suffix) + sum(map(len, replies)))
        turns = tuple(
            Turn(a.kind, tuple(r), a.n_steps, a.grade, a.depth, self._prose.behind(r, a.said)) for a, r in zip(later, replies, strict=True)
        )
        return [self._ask(first, context, prefix, suffix, turns)]


class QuotationTask(ProseTask):
    """How sentences of the text go on, of which the first words are given: nothing in it is special."""

    N_BEGIN, N_FOLLOWS, N_SENTENCES = 7, 12, 4

    def __init__(self, llm: Llama, options: TaskOptions) -> None:
        super().__init__(llm, options, lambda *_: ([], []))

    def quiz(self, i: int) -> list[Ask]:
        rng, prose, n_least = self.rng(i), self._prose, self.N_BEGIN + self.N_FOLLOWS + 1
        frames: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
        for sentence in prose.haystack(rng, self.options.n_tokens):
            if len(sentence) >= n_least and len(frames) < self.N_SENTENCES * self.options.n_each:
                begin = self.llm.detokenize(sentence[: self.N_BEGIN]).decode("utf-8", "ignore").strip()
                frames[tuple(sentence)] = prose.frame(f"Continue this quotation from the text: {begin}", how="")
        prefix = next(iter(frames.values()))[0]
        n_rest = len(prefix) + max(len(suffix) for _, suffix in frames.values()) + sum(map(len, frames))
        sentences = [s for s in prose.haystack(rng, self.options.n_tokens - n_rest) if tuple(s) not in frames]
        context = [*prefix, *_interleave(sentences, [(_depth(rng), list(sentence)) for sentence in frames])]
        asks = []
        for quoted, (_, suffix) in frames.items():
            follows = quoted[self.N_BEGIN : self.N_BEGIN + self.N_FOLLOWS]
            prompt, alone = (*context, *suffix), (*prefix, *suffix)
            asks.append(Ask("quotation", prompt, len(context), alone, 0, lambda text: 0.0, 0.5, follows=follows))
        return asks


class WordsTask(Task):
    """Words in random order; asked for those that come most often. Each kind of question has a list of its own."""

    N_COMMON, N_TIMES, N_FREQUENT = 10, 10, 3

    def __init__(self, llm: Llama, options: TaskOptions) -> None:
        super().__init__(llm, options)
        self._prose = Prose(llm, raw=options.raw, after=options.after)
        found = re.findall(r"\b[a-z]{4,9}\b", " ".join(haystack_sentences()))
        self._words = sorted(set(found))

    def quiz(self, i: int) -> list[Ask]:
        rng = self.rng(i)
        return [
            self._ask(rng, "common", self._common(rng), self.N_COMMON),
            self._ask(rng, "frequent", self._frequent(rng), self.N_FREQUENT),
        ]

    def _common(self, rng: random.Random) -> Iterator[str]:
        """Ten words ten times, then others once."""
        words = rng.sample(self._words, len(self._words))
        yield from words[: self.N_COMMON] * self.N_TIMES
        yield from words[self.N_COMMON :]

    def _frequent(self, rng: random.Random) -> Iterator[str]:
        """Made-up words, the k-th of them in proportion to 1/k^2 (RULER's zeta distribution), for ever."""
        words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(50)]
        credit = [0.0] * len(words)
        while True:
            for k in range(len(words)):
                credit[k] += 1 / (k + 1) ** 2
            while max(credit) >= 1:
                k = credit.index(max(credit))
                credit[k] -= 1
                yield words[k]

    def _ask(self, rng: random.Random, kind: str, words: Iterator[str], n: int) -> Ask:
        question = f"Which {n} words come most often in the list?"
        prefix, suffix = self._prose.frame(question, how="Answer with the words alone.")
        n_left = self.options.n_tokens - len(prefix) - len(suffix)
        chosen: list[str] = []
        for word in words:
            n_left -= len(self._prose.continued(word))
            if n_left < 0:
                break
            chosen.append(word)
        counts = Counter(chosen).most_common(n + 1)
        if len(counts) <= n or counts[n - 1][1] == counts[n][1]:
            raise ValueError(f"{self.options.n_tokens} tokens are too few for a list of words: use --tokens 1024 or more")
        rng.shuffle(chosen)
        context = [*prefix, *(t for word in chosen for t in self._prose.continued(word))]
        best = [word for word, _ in counts[:n]]
        n_steps = sum(len(self._prose.continued(word + ",")) for word in best) + N_SPARE
        right = self._prose.behind(suffix, ", ".join(best))
        return Ask(kind, (*context, *suffix), len(context), (*prefix, *suffix), n_steps, _has_words(best), 0.5, right=right)


class TextTask(Task):
    """Nothing is asked: how the text goes on, sentence after sentence of the original."""

    N_FOLLOWS = 64
    N_ALONE = 8  # tokens of the end that are no context

    def quiz(self, i: int) -> list[Ask]:
        sentences, n_all = haystack_sentences(), self.options.n_tokens + self.N_FOLLOWS
        start = self.rng(i).randrange(len(sentences))
        tokens = self.llm.tokenize(" ".join(sentences[start:] + sentences[:start]).encode(), add_bos=True)
        if len(tokens) < n_all:
            raise ValueError(
                f"--tokens {self.options.n_tokens}: the text of this task has {len(tokens)} and {self.N_FOLLOWS} follow, use fewer"
            )
        prompt, follows = tokens[: self.options.n_tokens], tokens[self.options.n_tokens : n_all]
        alone = tuple(prompt[-self.N_ALONE :])
        return [Ask("text", tuple(prompt), len(prompt) - 1, alone, 0, lambda text: 0.0, 1.0, follows=tuple(follows))]


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


def _has_words(words: Sequence[str]) -> Grade:
    """Share of the words that are among those of the text."""
    return lambda text: len(set(words) & set(re.findall("[a-z]+", text.lower()))) / len(words)


def _steps(text: str) -> int:
    return len(text.split()) * 2 + N_SPARE


def _depth(rng: random.Random) -> float:
    return round(rng.random(), 4)


def niah(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """One sentence about something that nothing else is about."""
    chosen = rng.choice(RETRIEVAL)
    depth = (i % options.n_depths + 0.5) / options.n_depths
    said = " ".join((*chosen.before, chosen.answer))
    return [Fact(said, depth)], [Asked("niah", chosen.question, chosen.answer, _is_sentence(chosen.answer), _steps(chosen.answer), depth)]


def second_question(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """Several such sentences in one context, one question about each."""
    facts, asked = [], []
    for chosen in rng.sample(RETRIEVAL, min(2 * options.n_each, len(RETRIEVAL))):
        depth = _depth(rng)
        facts.append(Fact(" ".join((*chosen.before, chosen.answer)), depth))
        asked.append(Asked("second-question", chosen.question, chosen.answer, _is_sentence(chosen.answer), _steps(chosen.answer), depth))
    return facts, asked


def multi_turn(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """The same, as many as a chat has turns."""
    facts, asked = second_question(rng, i, replace(options, n_each=-(-N_TURNS // 2)))
    return facts, [replace(a, kind=f"turn {k}") for k, a in enumerate(asked[:N_TURNS], start=1)]


def reasoning(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """Two sentences that could answer, two that say which one does; question and reversed question."""
    facts, asked = [], []
    for pair in rng.sample(REASONING, min(options.n_each, len(REASONING))):
        facts += [Fact(text, _depth(rng)) for text in pair.reasons]
        depths = [_depth(rng), _depth(rng)]
        facts += [Fact(text, depth) for text, depth in zip(pair.answers, depths, strict=True)]
        for which in (0, 1):
            answer = pair.answers[which]
            asked.append(Asked("reasoning", pair.questions[which], answer, _is_sentence(answer), _steps(answer), depths[which]))
    return facts, asked


def instruction(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """A rule at the beginning of the text, which the answer must follow, and a question about something else."""
    word, chosen = rng.choice(KEYS.split()), rng.choice(RETRIEVAL)
    depth = 0.2 + 0.8 * rng.random()
    rule = f"Whatever is asked about this text, the first word of the answer must be {word}."
    facts = [Fact(rule, 0.0), Fact(" ".join((*chosen.before, chosen.answer)), depth)]
    grade = lambda text: float(re.findall(r"[a-z]+", text.lower())[:1] == [word])
    return facts, [Asked("instruction", chosen.question, word, grade, N_SPARE, 0.0, "Follow the rules of the text.")]


SHORT = "Answer with the number and nothing else."
KEYS = "amber birch cedar delta ember fjord grove hazel inlet jasper kelp larch maple north opal pearl quartz river sage tide"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1000000, 10000000))


def passkey(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """A five-digit key."""
    value, depth = str(rng.randrange(10000, 100000)), _depth(rng)
    fact = Fact(f"The pass key is {value}. Remember it: {value} is the pass key.", depth)
    return [fact], [Asked("passkey", "What is the pass key?", value, _has_all([value]), N_SPARE, depth, SHORT)]


def ruler_keys(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """Numbers of several names, one of them with several numbers; asked for one, for all of a name, for two names."""
    names = rng.sample(KEYS.split(), 8)
    numbers = {name: [_number(rng)] for name in names}
    numbers[names[0]] += [_number(rng) for _ in range(3)]
    facts = [Fact(f"One of the secret numbers of {n} is {v}.", _depth(rng)) for n in names for v in numbers[n]]
    asked = []
    for name in rng.sample(names[1:], min(options.n_each, len(names) - 1)):
        depth = next(f.depth for f in facts if numbers[name][0] in f.text)
        question, (value,) = f"What is the secret number of {name}?", numbers[name]
        asked.append(Asked("multikey", question, value, _has_all([value]), N_SPARE, depth, SHORT))
    several = [v for f in sorted(facts, key=lambda f: f.depth) for v in numbers[names[0]] if v in f.text]
    how = "Answer with the numbers and nothing else."
    question = f"What are all the secret numbers of {names[0]}?"
    asked.append(Asked("multivalue", question, ", ".join(several), _has_all(several), 60, 0.5, how))
    pair = rng.sample(names[1:], 2)
    both = [numbers[n][0] for n in pair]
    question = f"What are the secret numbers of {pair[0]} and of {pair[1]}?"
    asked.append(Asked("multiquery", question, ", ".join(both), _has_all(both), 40, 0.5, how))
    return facts, asked


NAMES = "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Katya Lorenz Mira Nils Olga Pavel Rosa Sven Tilda Viktor".split()
DOES = "carving painting repairing collecting polishing drawing counting selling".split()
LIKE = "wooden striped broken silver tiny painted woollen hollow".split()
THINGS = "owls kettles lanterns kites violins boots clocks baskets".split()
WHERE = "by candlelight,in the cellar,on the roof,behind the mill,at the harbour,under the stairs,near the well,in a barn".split(",")
TOWNS = ("Ald Bram Cor Dun Esk Fal Gren Har".split(), "wick moor stead haven bury ford dale mere".split())
MONTHS = "January February March April May June July August September October November December".split()


def _hobby(rng: random.Random) -> str:
    return " ".join(rng.choice(words) for words in (DOES, LIKE, THINGS, WHERE))


def _town(rng: random.Random) -> str:
    return "".join(rng.choice(parts) for parts in TOWNS)


def _date(rng: random.Random) -> str:
    return f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1700, 2000)}"


# kind, sentence, question, value
FACTS: tuple[tuple[str, str, str, Callable[[random.Random], str]], ...] = (
    ("number", "The secret number of {} is {}.", "What is the secret number of {}?", lambda rng: str(rng.randrange(1000000, 10000000))),
    ("hobby", "The favourite hobby of {} is {}.", "What is the favourite hobby of {}?", _hobby),
    ("town", "{} was born in the town of {}.", "In which town was {} born?", _town),
    ("date", "The house of {} was built on {}.", "When was the house of {} built?", _date),
)


def facts(rng: random.Random, i: int, options: TaskOptions) -> _Said:
    """Sentences that say something of a person, of four kinds, and a question about each; the answer is given up to the value."""
    names = iter(rng.sample(NAMES, min(len(NAMES), len(FACTS) * options.n_each)))
    said, asked = [], []
    for kind, sentence, question, make in FACTS:
        for name in [next(names) for _ in range(min(options.n_each, len(NAMES) // len(FACTS)))]:
            value, depth = make(rng), _depth(rng)
            text = sentence.format(name, value)
            said.append(Fact(text, depth))
            n_steps, opening = _steps(value) + 8, text[: text.index(value)].rstrip()
            asked.append(Asked(kind, question.format(name), value, _has_all([value]), n_steps, depth, opening=opening))
    return said, asked


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
            asked.append(Asked("variables", question, ", ".join(chain), _has_all(chain), 48, depths[0], "Answer with their names."))
    return facts, asked


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
    "multi-turn": multi_turn,
    "instruction": instruction,
    "facts": facts,
    "passkey": passkey,
    "ruler-keys": ruler_keys,
    "ruler-variables": ruler_variables,
}
CORPUS_TASKS: dict[str, type[Task]] = {"niah": CorpusDepths, "multi-turn": CorpusChat}
WORDS = "ruler-words"
TEXT = "text"
QUOTATION = "quotation"
TASKS = tuple(dict.fromkeys(("needle", "niah", *CORPUS, *PROSE, QUOTATION, WORDS, TEXT, *FILES)))


def make_task(llm: Llama, options: TaskOptions) -> Task:
    """The task in the language of the model.

    Raises
    ------
    ValueError : there is no such task for this model
    """
    name = options.name
    if options.after and (name not in (*PROSE, WORDS) or speaks_needle_language(llm)):
        raise ValueError(
            f"--after {options.after!r}: it goes behind English questions of {', '.join((*PROSE, WORDS))}, not those of {name}"
        )
    if speaks_needle_language(llm):
        if options.raw:
            raise ValueError("--raw: the embedded model is asked in its own language, which has no chat template to leave out")
        if name in CORPUS_TASKS:
            return CORPUS_TASKS[name](llm, options)
        if name in CORPUS:
            return CorpusTask(llm, options, CORPUS[name])
        known: tuple[str, ...] = (*CORPUS_TASKS, *CORPUS)
    else:
        if name in PROSE:
            return (ProseChat if name == "multi-turn" else ProseTask)(llm, options, PROSE[name])
        if name == WORDS:
            return WordsTask(llm, options)
        if name == QUOTATION:
            return QuotationTask(llm, options)
        if name == TEXT:
            return TextTask(llm, options)
        if name in FILES:
            return CLASSES[name](llm, options)
        known = (*PROSE, QUOTATION, WORDS, TEXT, *FILES)
    raise ValueError(f"task={name!r}: for this model it must be one of {', '.join(known)}")
