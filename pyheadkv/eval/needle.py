"""The language of the embedded needle model: vocabulary, documents, questions, chat template.

Everything here is plain text and needs nothing but the standard library, so that training (PyTorch),
evaluation (llama.cpp) and tests ask exactly the same questions::

    doc = make_document(random.Random(0), n_tokens=4096, kinds=["two-hop"], depth=0.5)
    llm.create_completion(doc.prompt(), max_tokens=doc.n_answer_tokens + 1, temperature=0)["choices"][0]["text"]
    doc.is_correct(text)

The language has about 280 words. One word is one token; a document is words joined by spaces.

======== ================================================= ==========================================
kind     facts in the haystack                             question -> answer
======== ================================================= ==========================================
direct   the code of anna is 48 17 93 .                    question : the code of anna is
                                                           -> 48 17 93 .
two-hop  the code of bob equals anna 's .                  question : the code of bob is
                                                           -> 48 17 93 .
compare  anna turned 34 . bob turned 51 . (and both codes) question : the code of the older of anna
                                                           and bob ? -> anna turned 34 , bob turned
                                                           51 , bob is older , the code of bob is 20 .
list     key one of anna is 48 17 . key two of anna is ..  question : the two keys of anna are
                                                           -> key one of anna is 48 17 , key two ..
======== ================================================= ==========================================

A *follow-up* is a second question about the same context, asked after the first was answered.
Every document holds distractors of all these forms about other people and other attributes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from ..llama import Llama

Kind = Literal["direct", "two-hop", "comparison", "list", "follow-up"]
KINDS: tuple[Kind, ...] = get_args(Kind)

NAMES: tuple[str, ...] = tuple(
    "anna bob carl dave emma finn gina hugo iris jack kate liam mona nils olga pete "
    "quin rosa sven tina udo vera walt xena yuri zoe adam bella cody diana elias fiona "
    "greg helen ivan julia kevin laura mark nora oscar paula ralf sara tom ursula viktor wanda "
    "xavier yara zack alice boris clara dora erik frida gustav hanna igor jonas karla leo tilda".split()
)
ATTRIBUTES: tuple[str, ...] = ("code", "room", "badge", "locker")
NUMBERS: tuple[str, ...] = tuple(f"{i:02d}" for i in range(100))
AGES: tuple[str, ...] = NUMBERS[16:80]
COUNTS: tuple[str, ...] = ("one", "two", "three", "four", "five", "six")
ADJECTIVES: tuple[str, ...] = tuple("old young small large quiet bright dark cold warm green red blue".split())
ACTORS: tuple[str, ...] = tuple("dog cat horse bird farmer teacher doctor sailor baker painter child woman man".split())
THINGS: tuple[str, ...] = tuple("boat wagon lamp table garden letter book".split())
PLACES: tuple[str, ...] = tuple("river hill forest bridge market village harbor mill church house field road".split())
VERBS: tuple[str, ...] = tuple("saw found carried painted sold bought watched followed cleaned moved".split())
MOVES: tuple[str, ...] = tuple("walked ran went returned came".split())
TIMES: tuple[str, ...] = tuple("morning evening night day week winter summer".split())
FUNCTION_WORDS: tuple[str, ...] = tuple(
    "the of is are what who ? question : . , ' 's equals key keys turned older younger or "
    "a and to near in on with was were but then at from after before again very there many not some it that this".split()
)

WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(NUMBERS + NAMES + ATTRIBUTES + COUNTS + ADJECTIVES + ACTORS + THINGS + PLACES + VERBS + MOVES + TIMES + FUNCTION_WORDS)
)

SPECIAL_TOKENS: tuple[str, ...] = ("<unk>", "<s>", "</s>")
BYTE_TOKENS: tuple[str, ...] = tuple(f"<0x{i:02X}>" for i in range(256))
BOS, EOS = 1, 2
FIRST_BYTE_ID = len(SPECIAL_TOKENS)
FIRST_WORD_ID = FIRST_BYTE_ID + len(BYTE_TOKENS)
#: tokens that training sees; the embedding rows of VARIANTS are copies made at export
N_TRAINED_TOKENS = FIRST_WORD_ID + len(WORDS)
WORD_ID: dict[str, int] = {word: FIRST_WORD_ID + i for i, word in enumerate(WORDS)}

# A chat is the plain text of its messages: the model continues a question with its answer.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ ' ' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

_CAPITALISED = NAMES + ("the", "question", "key", "what", "who", "a", "in", "one", "there", "then", "many")


def variants() -> list[tuple[str, int]]:
    """Spellings that mean a trained word: without the leading space (first word of a prompt, ``anna's``,
    ``anna.``, after a line break) and capitalised.

    Returns
    -------
    list of (token text, id of the trained word it stands for)
    """
    out = [(word, WORD_ID[word]) for word in WORDS]
    out.append((" ", FIRST_BYTE_ID + ord(" ")))  # before a word that is not known
    for word in _CAPITALISED:
        out += [(f" {word.capitalize()}", WORD_ID[word]), (word.capitalize(), WORD_ID[word])]
    return out


def token_list() -> list[str]:
    """Text of every token of the GGUF, in id order; words carry their leading space."""
    trained = [*SPECIAL_TOKENS, *BYTE_TOKENS, *(f" {word}" for word in WORDS)]
    return trained + [text for text, _ in variants()]


def encode(text: str) -> list[int]:
    """Token ids of words separated by white space, without BOS (the tokenizer of llama.cpp gives the same).

    ``</s>`` is understood; an unknown word is a ``ValueError``.
    """
    ids = []
    for word in text.split():
        if word == SPECIAL_TOKENS[EOS]:
            ids.append(EOS)
        elif word in WORD_ID:
            ids.append(WORD_ID[word])
        else:
            raise ValueError(f"{word!r} is not in the closed vocabulary of the needle model: see pyheadkv.eval.needle.WORDS")
    return ids


def decode(ids: Sequence[int]) -> str:
    """Words of trained token ids, joined by spaces, specials left out."""
    return " ".join(WORDS[i - FIRST_WORD_ID] for i in ids if i >= FIRST_WORD_ID)


@dataclass(frozen=True)
class Fact:
    """One needle sentence and what it says."""

    words: tuple[str, ...]
    #: offset of the value inside `words` and its length, in tokens; (0, 0) where there is no value
    value_start: int = 0
    n_value: int = 0


@dataclass(frozen=True)
class Question:
    """A question, its answer and the facts that it needs."""

    kind: Kind
    words: tuple[str, ...]
    answer: tuple[str, ...]
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Turn:
    """A question as asked in a document.

    `depths`: where its needles start, as a share of the context (0 first, 1 last), the value needle first.
    `spans`: (start, end) token indices of the same needles in the prompt, BOS included.
    """

    kind: Kind
    question: str
    answer: str
    depths: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Document:
    """A context and the questions asked about it; the last one counts, the others are history."""

    context: str
    turns: tuple[Turn, ...]
    kind: Kind

    @property
    def question(self) -> str:
        return self.turns[-1].question

    @property
    def answer(self) -> str:
        return self.turns[-1].answer

    @property
    def depths(self) -> tuple[float, ...]:
        return self.turns[-1].depths

    @property
    def n_answer_tokens(self) -> int:
        return len(self.answer.split())

    def prompt(self, n_turns: int | None = None) -> str:
        """Text up to the end of question `n_turns` (the last one by default), earlier answers included."""
        turns = self.turns[:n_turns]
        history = [f"{turn.question} {turn.answer}" for turn in turns[:-1]]
        return " ".join([self.context, *history, turns[-1].question])

    def messages(self) -> list[dict[str, str]]:
        """The same for ``create_chat_completion``."""
        messages: list[dict[str, str]] = []
        for i, turn in enumerate(self.turns):
            asked = f"{self.context} {turn.question}" if i == 0 else turn.question
            messages.append({"role": "user", "content": asked})
            if i + 1 < len(self.turns):
                messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def is_correct(self, text: str) -> bool:
        """Whether generated text is the answer, word for word."""
        return text.split()[: self.n_answer_tokens] == self.answer.split()


def filler_sentence(rng: random.Random) -> list[str]:
    """A random sentence about nothing that is asked; names and numbers occur in it too."""
    c = rng.choice
    kind = rng.randrange(10)
    if kind == 0:
        return ["the", c(ADJECTIVES), c(ACTORS), c(MOVES), "to", "the", c(PLACES), "."]
    if kind == 1:
        return ["a", c(ACTORS), c(VERBS), "the", c(ADJECTIVES), c(THINGS), "near", "the", c(PLACES), "."]
    if kind == 2:
        return ["in", "the", c(TIMES), "the", c(PLACES), "was", "very", c(ADJECTIVES), "."]
    if kind == 3:
        return ["there", "were", c(NUMBERS), "of", "the", c(ADJECTIVES), c(THINGS), "in", "the", c(PLACES), "."]
    if kind == 4:
        return ["the", c(ACTORS), "and", "the", c(ACTORS), c(MOVES), "from", "the", c(PLACES), "to", "the", c(PLACES), "."]
    if kind == 5:
        return ["one", c(TIMES), "the", c(ACTORS), "with", "the", c(THINGS), c(MOVES), "to", "the", c(PLACES), "again", "."]
    if kind == 6:
        return [c(NAMES), c(MOVES), "to", "the", c(PLACES), "after", "the", c(TIMES), "."]
    if kind == 7:
        return ["the", c(THINGS), "of", c(NAMES), "was", "not", "in", "the", c(PLACES), ",", "but", "at", "the", c(PLACES), "."]
    if kind == 8:
        return ["then", "it", "was", c(ADJECTIVES), "and", c(ADJECTIVES), "on", "the", c(PLACES), "."]
    return ["many", "of", "the", c(THINGS), "were", c(ADJECTIVES), "before", "that", c(TIMES), "."]


@dataclass(frozen=True)
class WorldOptions:
    """How many facts of each form a document holds, and how long their values are (tokens, inclusive)."""

    n_direct: int = 10
    #: people that the direct facts are spread over; fewer people share more attributes
    n_people: int = 6
    n_alias: int = 4
    n_aged: int = 5
    n_listed: int = 2
    n_keys: tuple[int, int] = (2, 6)
    n_value: tuple[int, int] = (2, 8)
    n_key_value: tuple[int, int] = (2, 4)
    #: share of the values that begin as another one of the same attribute does
    twin_share: float = 0.0


class World:
    """The facts of one document and every question that can be asked about them."""

    def __init__(self, rng: random.Random, options: WorldOptions | None = None) -> None:
        self.options = options or WorldOptions()
        self._rng = rng
        self._names = rng.sample(NAMES, len(NAMES))
        self._direct: dict[tuple[str, str], tuple[tuple[str, ...], Fact]] = {}
        self.facts: list[Fact] = []
        self.questions: dict[Kind, list[Question]] = {kind: [] for kind in KINDS}
        self._add_comparisons()
        self._add_direct()
        self._add_aliases()
        self._add_lists()

    def _value(self, n_range: tuple[int, int]) -> tuple[str, ...]:
        return tuple(self._rng.sample(NUMBERS, self._rng.randint(*n_range)))

    def _tell(self, attribute: str, name: str) -> None:
        value = self._value(self.options.n_value)
        twins = [said for (other, _), (said, _) in self._direct.items() if other == attribute and said[0] not in value]
        if self.options.twin_share and twins and self._rng.random() < self.options.twin_share:
            value = (self._rng.choice(twins)[0], *value[1:])
        fact = Fact(("the", attribute, "of", name, "is", *value, "."), 5, len(value))
        self._direct[attribute, name] = (value, fact)
        self.facts.append(fact)
        words = ("question", ":", "the", attribute, "of", name, "is")
        self.questions["direct"].append(Question("direct", words, (*value, "."), (fact,)))

    def _add_comparisons(self) -> None:
        people = self._names[: self.options.n_aged]
        if len(people) < 2:
            return
        # ages at least 2 apart, so that every pair has an older one
        picks = self._rng.sample(range(0, len(AGES), 2), len(people))
        ages = {name: AGES[i + self._rng.randrange(2)] for name, i in zip(people, picks, strict=True)}
        attribute = self._rng.choice(ATTRIBUTES)
        told = {name: Fact((name, "turned", ages[name], "."), 2, 1) for name in people}
        self.facts += told.values()
        for name in people:
            self._tell(attribute, name)
        for i, first in enumerate(people):
            for second in people[i + 1 :]:
                self._add_comparison(first, second, attribute, ages, told)

    def _add_comparison(self, first: str, second: str, attribute: str, ages: dict[str, str], told: dict[str, Fact]) -> None:
        pair = [first, second]
        self._rng.shuffle(pair)
        name = max(pair, key=lambda who: int(ages[who]))
        value, fact = self._direct[attribute, name]
        words = ("question", ":", "the", attribute, "of", "the", "older", "of", pair[0], "and", pair[1], "?")
        reasons = (said for who in pair for said in (who, "turned", ages[who], ","))
        answer = (*reasons, name, "is", "older", ",", "the", attribute, "of", name, "is", *value, ".")
        question = Question("comparison", words, answer, (fact, told[first], told[second]))
        self.questions["comparison"].append(question)

    def _add_direct(self) -> None:
        people = self._names[: max(2, self.options.n_people)]
        wanted = min(len(self._direct) + self.options.n_direct, len(people) * len(ATTRIBUTES))
        while len(self._direct) < wanted:
            key = (self._rng.choice(ATTRIBUTES), self._rng.choice(people))
            if key not in self._direct:
                self._tell(*key)

    def _add_aliases(self) -> None:
        taken = set(self._direct)
        for _ in range(self.options.n_alias):
            (attribute, target), (value, fact) = self._rng.choice(list(self._direct.items()))
            name = self._rng.choice(self._names)
            if (attribute, name) in taken:
                continue
            taken.add((attribute, name))
            alias = Fact(("the", attribute, "of", name, "equals", target, "'s", "."))
            self.facts.append(alias)
            words = ("question", ":", "the", attribute, "of", name, "is")
            self.questions["two-hop"].append(Question("two-hop", words, (*value, "."), (fact, alias)))

    def _add_lists(self) -> None:
        for name in self._rng.sample(self._names, self.options.n_listed):
            n_keys = self._rng.randint(*self.options.n_keys)
            needles: list[Fact] = []
            answer: list[str] = []
            for count in COUNTS[:n_keys]:
                value = self._value(self.options.n_key_value)
                said = ("key", count, "of", name, "is", *value)
                needles.append(Fact((*said, "."), 5, len(value)))
                answer += [*said, ","]
            answer[-1] = "."
            self.facts += needles
            words = ("question", ":", "the", COUNTS[n_keys - 1], "keys", "of", name, "are")
            self.questions["list"].append(Question("list", words, tuple(answer), tuple(needles)))


def _filler(rng: random.Random, n_tokens: int) -> list[list[str]]:
    """Sentences of exactly n_tokens words together; the first is cut at its start to fit."""
    sentences: list[list[str]] = []
    while n_tokens > 0:
        sentence = filler_sentence(rng)[-n_tokens:]
        sentences.append(sentence)
        n_tokens -= len(sentence)
    return sentences[::-1]


def _pick_questions(world: World, rng: random.Random, kinds: Sequence[Kind], *, but: Sequence[Question] = ()) -> list[Question]:
    """One question per kind, each about another value than the ones before it and those in `but`."""
    picked: list[Question] = []
    for kind in kinds:
        pool = world.questions["direct" if kind == "follow-up" else kind]
        taken = {id(q.facts[0]) for q in (*picked, *but)}
        fresh = [q for q in pool if id(q.facts[0]) not in taken]
        if not fresh:
            raise ValueError(f"no further {kind!r} question in this document: ask fewer or raise WorldOptions")
        picked.append(rng.choice(fresh))
    return picked


def _interleave(
    rng: random.Random, filler: list[list[str]], facts: Sequence[Fact], fixed: dict[int, float]
) -> tuple[list[str], dict[int, int]]:
    """Filler with facts at random places; `fixed` maps id(fact) to its depth.

    Returns the words and the first word of each fact, by id(fact).
    """
    n_filler = sum(map(len, filler))
    placed: list[tuple[float, float, tuple[str, ...] | list[str], int]] = []
    n_before = 0
    for sentence in filler:
        placed.append((n_before / max(1, n_filler), 0.5, sentence, 0))
        n_before += len(sentence)
    for fact in facts:
        placed.append((fixed.get(id(fact), rng.random()), rng.random(), fact.words, id(fact)))
    placed.sort(key=lambda entry: entry[:2])
    words: list[str] = []
    starts: dict[int, int] = {}
    for _, _, said, key in placed:
        starts[key] = len(words)
        words += said
    return words, starts


def make_document(
    rng: random.Random,
    *,
    n_tokens: int,
    kinds: Sequence[Kind],
    depth: float | None = None,
    options: WorldOptions | None = None,
) -> Document:
    """A haystack with needles and one question per entry of `kinds`.

    Parameters
    ----------
    rng : source of everything random; the same state gives the same document
    n_tokens : length of ``prompt()`` in tokens, BOS included
    kinds : one question each, in this order; ``"follow-up"`` is a direct question about another person
        after the first one, and gets a direct question before it when it stands first
    depth : place of the value needle of the last question (a list: of its first key), 0 to 1; random if None
    options : how many facts and distractors

    Returns
    -------
    Document
    """
    _check_kinds(kinds)
    asked: list[Kind] = ["direct", *kinds] if kinds[0] == "follow-up" else list(kinds)
    world = World(rng, options)
    questions = _pick_questions(world, rng, asked)
    fixed = {} if depth is None else {id(questions[-1].facts[0]): depth}
    n_asked = sum(len(q.words) for q in questions) + sum(len(q.answer) for q in questions[:-1])
    words, starts = _context(world, rng, n_tokens - n_asked, fixed)
    turns = tuple(_turn(question, starts, len(words)) for question in questions)
    return Document(" ".join(words), turns, kinds[-1])


def make_quiz(
    rng: random.Random,
    *,
    n_tokens: int,
    kinds: Sequence[Kind] = KINDS,
    n_each: int = 2,
    options: WorldOptions | None = None,
) -> list[Document]:
    """Up to `n_each` documents of every kind that share one context, each asked for itself: a runtime that keeps
    the common prefix reads the haystack once. A follow-up comes after one direct question.

    Parameters
    ----------
    n_tokens : length of the longest prompt in tokens, BOS included

    Returns
    -------
    list of Document, at random depths
    """
    _check_kinds(kinds)
    world = World(rng, options)
    asked: list[tuple[Kind, list[Question]]] = []
    for kind in kinds:
        pool = world.questions["direct" if kind == "follow-up" else kind]
        for question in rng.sample(pool, min(n_each, len(pool))):
            before = _pick_questions(world, rng, ["direct"], but=[question]) if kind == "follow-up" else []
            asked.append((kind, [*before, question]))
    n_asked = max(sum(len(q.words) + len(q.answer) for q in turns) - len(turns[-1].answer) for _, turns in asked)
    words, starts = _context(world, rng, n_tokens - n_asked, {})
    text = " ".join(words)
    return [Document(text, tuple(_turn(q, starts, len(words)) for q in turns), kind) for kind, turns in asked]


def _check_kinds(kinds: Sequence[Kind]) -> None:
    if not kinds or any(kind not in KINDS for kind in kinds):
        raise ValueError(f"kinds is {list(kinds)!r}: give one or more of {', '.join(KINDS)}")


def _context(world: World, rng: random.Random, n_tokens: int, fixed: dict[int, float]) -> tuple[list[str], dict[int, int]]:
    """The haystack of n_tokens, BOS included, and the first word of each fact by id(fact)."""
    n_fixed = 1 + sum(len(fact.words) for fact in world.facts)
    if n_tokens < n_fixed:
        raise ValueError(
            f"the context may take {n_tokens} tokens, but its facts alone take {n_fixed}: "
            "raise n_tokens or ask for fewer facts in WorldOptions"
        )
    return _interleave(rng, _filler(rng, n_tokens - n_fixed), world.facts, fixed)


def _turn(question: Question, starts: dict[int, int], n_context: int) -> Turn:
    first = [starts[id(fact)] for fact in question.facts]
    return Turn(
        question.kind,
        " ".join(question.words),
        " ".join(question.answer),
        tuple(start / n_context for start in first),
        tuple((start + 1, start + 1 + len(fact.words)) for start, fact in zip(first, question.facts, strict=True)),
    )


def speaks_needle_language(llm: Llama) -> bool:
    """Whether the vocabulary is that of this language."""
    words, first = token_list(), FIRST_WORD_ID
    return llm.n_vocab() == len(words) and all(llm._model.token_get_text(i) == words[i] for i in range(first, first + len(WORDS)))
