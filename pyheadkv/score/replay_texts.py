"""Texts of five kinds that a model reads and repeats for ``pyheadkv score --method replay``, and how it is told to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..eval import needle
from ..eval.needle import speaks_needle_language
from ..eval.prose import HAYSTACK, RETRIEVAL, Prose
from .texts import OWNERS, PASSAGES, PLACES, SPANS, THINGS

if TYPE_CHECKING:
    from ..llama import Llama

REPEAT = "Repeat the text above word for word."
DATA = HAYSTACK.parent / "replay"
N_ROWS = 120  # of a table; more than any text holds
REMARKS = (
    "I had forgotten that.",
    "Thank you.",
    "Good to know.",
    "Who told you?",
    "I see.",
    "That is new to me.",
    "Really?",
    "So I thought.",
)
CITIES = ("Sandrel", "Easterby", "Holm", "Port Amity", "Tarnholt", "Merrow", "Upper Hythe", "Westry")
STATES = ("paid", "open", "sent", "returned")
TOWERS = ("Aldmoor", "Westry", "Skarn", "Brenn", "Hessel", "Orsund", "Valmora", "Greave", "Pellworth", "Averin", "Tillman", "Marrow")


@dataclass(frozen=True)
class Replay:
    """A text as a model reads it, and then repeats it.

    Attributes
    ----------
    kind : of the text
    before : tokens before it
    text : its tokens
    after : tokens between it and its repetition, at least one
    """

    name: str
    kind: str
    before: tuple[int, ...]
    text: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """All that is read, the repetition included."""
        return len(self.before) + 2 * len(self.text) + len(self.after) - 1


def make_replays(llm: Llama, *, max_tokens: int, n_texts: int | None = None, seed: int | str = 0) -> list[Replay]:
    """Texts of all kinds in turn, in the chat template of the model if it has one.

    Parameters
    ----------
    max_tokens : where a text is cut off
    n_texts : how many, None = all; at most as many as there are
    seed : where texts begin, and what tables and dialogues are made of

    Raises
    ------
    ValueError : there are not so many, or the chat template cannot be rendered
    """
    n_texts = len(TEXTS) if n_texts is None else n_texts
    if not 1 <= n_texts <= len(TEXTS):
        raise ValueError(f"{n_texts} texts to repeat: it must be in [1, {len(TEXTS)}], those that there are")
    rngs = [random.Random(f"{seed} {name}") for name in TEXTS]
    if speaks_needle_language(llm):
        documents = [
            (kind, needle.make_document(rng, n_tokens=max_tokens, kinds=[kind]))
            for kind, rng in zip([*needle.KINDS, *needle.KINDS][:n_texts], rngs)
        ]
        return [
            Replay(f"{kind}-{1 + i // len(needle.KINDS)}", kind, (), (needle.BOS, *needle.encode(document.context)), (needle.BOS,))
            for i, (kind, document) in enumerate(documents)
        ]
    before, after = map(tuple, Prose(llm).wrap(after=f"\n\n{REPEAT}"))
    made = [(name, llm.tokenize(make(rng).encode(), add_bos=False)) for (name, make), rng in zip(list(TEXTS.items())[:n_texts], rngs)]
    return [Replay(name, name.split("-")[0], before, tuple(text[:max_tokens]), after) for name, text in made]


def _prose(half: int) -> Callable[[random.Random], str]:
    def make(rng: random.Random) -> str:
        paragraphs = HAYSTACK.read_text(encoding="utf-8").splitlines()
        middle = next(i for i, paragraph in enumerate(paragraphs) if paragraph.startswith("It was a feature peculiar"))
        return "\n".join(_from_anywhere((paragraphs[:middle], paragraphs[middle:])[half], rng))

    return make


def _file(name: str, between: str = "\n\n") -> Callable[[random.Random], str]:
    def make(rng: random.Random) -> str:
        parts = (DATA / name).read_text(encoding="utf-8").strip().split(between)
        return between.join(_from_anywhere(parts, rng))

    return make


def _from_anywhere(parts: Sequence[str], rng: random.Random) -> list[str]:
    """The parts of a text from one of them on, and then those before it."""
    first = rng.randrange(len(parts))
    return [*parts[first:], *parts[:first]]


def _dialogue(half: int) -> Callable[[random.Random], str]:
    """Two people about things that one of them knows."""

    def make(rng: random.Random) -> str:
        asks, knows = rng.sample(OWNERS, 2)
        turns: list[str] = []
        for passage in rng.sample(PASSAGES[half::2], len(PASSAGES[half::2])):
            turns += [f"{knows}: Today I read something about {passage.title}.", f"{asks}: Then I have a few questions."]
            for asked in rng.sample(passage.questions, len(passage.questions)):
                answer = asked.answer[0].upper() + asked.answer[1:]
                turns += [f"{asks}: {rng.choice(('', 'And ', 'Tell me, '))}{asked.question}"]
                turns += [f"{knows}: {answer}. {passage.sentences[asked.at]}", f"{asks}: {rng.choice(REMARKS)}"]
        told = [(question, f"{before} {answer}") for question, before, answer in SPANS[half::2]]
        told += [(n.question, f"{n.before[0]} {n.answer}") for n in RETRIEVAL[half::2]]
        for question, answer in rng.sample(told, len(told)):
            turns += [f"{asks}: {question}", f"{knows}: {answer}", f"{asks}: {rng.choice(REMARKS)}"]
        return "\n".join(turns)

    return make


def _csv(rng: random.Random) -> str:
    rows = ["order,date,customer,item,pieces,price,city,state"]
    for _ in range(N_ROWS):
        number, date = rng.randrange(10000, 99999), f"2024-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"
        price = f"{rng.randrange(2, 900)}.{rng.randrange(100):02d}"
        fields = (number, date, rng.choice(OWNERS), rng.choice(THINGS), rng.randrange(1, 40), price, rng.choice(CITIES), rng.choice(STATES))
        rows.append(",".join(map(str, fields)))
    return "\n".join(rows)


def _markdown(rng: random.Random) -> str:
    rows = ["| tower | room | keeper | steps | built | what is kept there |", "|---|---|---|---|---|---|"]
    for _ in range(N_ROWS):
        fields = (rng.choice(TOWERS), rng.choice(PLACES), rng.choice(OWNERS), rng.randrange(40, 400), rng.randrange(1100, 1900))
        rows.append(f"| {' | '.join(map(str, fields))} | {rng.choice(THINGS)} |")
    return "\n".join(rows)


TEXTS: dict[str, Callable[[random.Random], str]] = {
    "prose-1": _prose(0),
    "code-1": _file("python.txt"),
    "dialogue-1": _dialogue(0),
    "table-1": _csv,
    "language-1": _file("german.txt"),
    "prose-2": _prose(1),
    "code-2": _file("cpp.txt"),
    "dialogue-2": _dialogue(1),
    "table-2": _markdown,
    "language-2": _file("french.txt"),
}
KINDS = tuple(dict.fromkeys(name.split("-")[0] for name in TEXTS))
