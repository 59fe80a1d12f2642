"""Prompts in English: sentences of a public-domain text, needles to hide between them, and the chat template of a model."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..llama import Llama


@dataclass(frozen=True)
class Needle:
    """What is hidden and asked.

    Attributes
    ----------
    before : sentences of the needle that do not answer the question, in order
    answer : what answers it, up to the end of its sentence
    after : sentences behind the answer
    """

    kind: str
    question: str
    before: tuple[str, ...]
    answer: str
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two reasons and two answers: the question and the reversed question have one of them each."""

    kinds: tuple[str, str]
    reasons: tuple[str, str]
    answers: tuple[str, str]
    questions: tuple[str, str]

    def needle(self, which: int, *, order: Sequence[int] = (0, 1, 2)) -> Needle:
        """Needle of one of the questions; ``order`` of reason (0), wrong answer (1) and correct answer (2)."""
        parts = (self.reasons, (self.answers[1 - which],), (self.answers[which],))
        at = list(order).index(2)
        before, after = ([text for i in half for text in parts[i]] for half in (order[:at], order[at + 1 :]))
        return Needle(self.kinds[which], self.questions[which], tuple(before), self.answers[which], tuple(after))


RETRIEVAL = (
    Needle(
        "ferry",
        "Why does the night ferry to Orsund leave late?",
        ("The night ferry to Orsund leaves late because",),
        "the cook waits at the pier for fresh bread and the captain counts every passenger twice.",
    ),
    Needle(
        "survey",
        "What did the survey of the Halden caves show?",
        ("The survey of the Halden caves showed that",),
        "three chambers lie below the river, that two of them are dry and that bats sleep in the third.",
    ),
    Needle(
        "advice",
        "What is the best way to spend a rainy afternoon in Valmora?",
        ("The best way to spend a rainy afternoon in Valmora is to",),
        "drink plum tea in the glass arcade and listen to the clockmaker tune his seven violins.",
    ),
    Needle(
        "recipe",
        "How does Aunt Petra thicken her barley soup?",
        ("Aunt Petra thickens her barley soup with",),
        "roasted chestnuts, a spoon of dark honey and the rind of an old mountain cheese.",
    ),
    Needle(
        "password",
        "What must a visitor say at the gate of the Tillman archive?",
        ("At the gate of the Tillman archive a visitor must say",),
        "that the copper fox sleeps under nine grey stones and never wakes before noon.",
    ),
    Needle(
        "repair",
        "What did the engineer replace in the Marrow bridge?",
        ("In the Marrow bridge the engineer replaced",),
        "forty rusted bolts, the wooden rail on the eastern side and the lamp above the toll booth.",
    ),
    Needle(
        "prize",
        "What did Ludmila win at the spring fair?",
        ("At the spring fair Ludmila won",),
        "a speckled goat, two tickets to the puppet theatre and a kettle without a lid.",
    ),
    Needle(
        "rule",
        "When may the members of the Quill society speak?",
        ("The members of the Quill society may speak only",),
        "after the youngest has lit the blue candle and the oldest has closed the window.",
    ),
)

REASONING = (
    Pair(
        ("older", "younger"),
        ("Nadia is 58 years old.", "Tobias is 41 years old."),
        (
            "On Sundays Nadia repairs broken clocks in the cellar of the school and sells them at the harbour fair.",
            "On Sundays Tobias paints wooden signs behind the bakery and gives them to the village children.",
        ),
        (
            "What does the older one of Nadia and Tobias do on Sundays?",
            "What does the younger one of Nadia and Tobias do on Sundays?",
        ),
    ),
    Pair(
        ("cheaper", "dearer"),
        ("The red canoe cost 400 crowns.", "The green canoe cost 900 crowns."),
        (
            "The red canoe lies upside down under a torn sail beside the mill pond of Hessel.",
            "The green canoe hangs from two iron hooks in the barn of the deaf ferryman.",
        ),
        (
            "Where is the cheaper one of the red and the green canoe kept?",
            "Where is the more expensive one of the red and the green canoe kept?",
        ),
    ),
    Pair(
        ("nearer", "farther"),
        ("The lighthouse of Skarn is 6 miles from the town.", "The lighthouse of Brenn is 20 miles from the town."),
        (
            "The keeper of Skarn grows blue potatoes in barrels and trades them for lamp oil every spring.",
            "The keeper of Brenn carves chess pieces out of driftwood and posts them to his sister in Malta.",
        ),
        (
            "What does the keeper of the lighthouse that is nearer to the town do?",
            "What does the keeper of the lighthouse that is farther from the town do?",
        ),
    ),
    Pair(
        ("first", "last"),
        ("The caravan of Idris reached the well on Monday.", "The caravan of Salma reached the well on Thursday."),
        (
            "The caravan of Idris carried copper kettles wrapped in straw and forty sacks of dried figs.",
            "The caravan of Salma carried a dismantled piano, bolts of white linen and a cage of quails.",
        ),
        (
            "What did the caravan that reached the well first carry?",
            "What did the caravan that reached the well last carry?",
        ),
    ),
    Pair(
        ("taller", "lower"),
        ("The tower of Aldmoor has 310 steps.", "The tower of Westry has 95 steps."),
        (
            "The tower of Aldmoor holds a cracked bronze bell that rings only when the wind comes from the marsh.",
            "The tower of Westry holds the maps of a drowned island and a telescope without lenses.",
        ),
        (
            "What does the one of the towers of Aldmoor and Westry that has more steps hold?",
            "What does the one of the towers of Aldmoor and Westry that has fewer steps hold?",
        ),
    ),
    Pair(
        ("faster", "slower"),
        ("The ship Petrel sailed to Lisbon in 9 days.", "The ship Curlew sailed to Lisbon in 16 days."),
        (
            "The mate of the Petrel keeps a tame raven in the chart room and teaches it the names of the stars.",
            "The mate of the Curlew brews ginger beer in the lifeboat and hides it from the inspectors.",
        ),
        (
            "What does the mate of the ship that was faster, Petrel or Curlew, do?",
            "What does the mate of the ship that was slower, Petrel or Curlew, do?",
        ),
    ),
)

HAYSTACK = Path(__file__).resolve().parents[1] / "data" / "haystack.txt"
COPY = "Answer with the words of the text."
MARK = "<<context>>"  # stands for haystack and needle while a chat template is rendered


def haystack_sentences() -> list[str]:
    """The sentences of the haystack."""
    text = " ".join(HAYSTACK.read_text(encoding="utf-8").split())
    return re.split(r'(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.) (?=["A-Z])', text)


class Prose:
    """Pieces of a prompt in English, tokenised one by one, so that every piece has an exact span.

    Parameters
    ----------
    raw : without the chat template, if the model has one
    after : text behind each question; it needs a chat template

    Raises
    ------
    ValueError : there is no template for ``after``
    """

    def __init__(self, llm: Llama, *, raw: bool = False, after: str = "") -> None:
        self.llm, self._after = llm, after and " " + after
        self._template = None if raw else llm.metadata.get("tokenizer.chat_template")
        if after and self._template is None:
            raise ValueError(f"text behind the question, {after!r}: it needs a model with a chat template, and no raw prompts")
        self._adds_space = llm.detokenize(llm.tokenize(b"a", add_bos=False)).startswith(b" ")
        self._sentences = [self.continued(sentence) for sentence in haystack_sentences()]

    def continued(self, text: str) -> list[int]:
        """Tokens of a text that stands after a space."""
        return self.llm.tokenize((text if self._adds_space else " " + text).encode(), add_bos=False)

    def behind(self, prompt: Sequence[int], text: str) -> tuple[int, ...]:
        """Tokens of a text that stands behind a prompt; after a space, unless that ends in white space or in a control token."""
        end = self.llm.detokenize([prompt[-1]])[-1:]
        if end and not end.isspace():
            return tuple(self.continued(text))
        space, whole = (self.llm.tokenize(end + part, add_bos=False) for part in (b"", text.encode()))
        if end and whole[: len(space)] == space:  # the vocabulary may put a space of its own before the first word
            return tuple(whole[len(space) :])
        return tuple(self.llm.tokenize(text.encode(), add_bos=False))

    def haystack(self, rng: random.Random, n_tokens: int) -> list[list[int]]:
        """Shuffled sentences of at most n_tokens together, as many as fit."""
        chosen: list[list[int]] = []
        n_left = n_tokens
        while fitting := [sentence for sentence in self._sentences if len(sentence) <= n_left]:
            for sentence in rng.sample(fitting, len(fitting)):
                if len(sentence) <= n_left:
                    chosen.append(sentence)
                    n_left -= len(sentence)
        return chosen

    def frame(self, question: str, *, how: str = COPY) -> tuple[list[int], list[int]]:
        """Tokens before the haystack and after it, in the chat template of the model if it has one."""
        if self._template is None:
            return self._around(f"{MARK}\n\nQuestion: {question}\nAnswer:")
        return self._around(render_chat(self.llm, self._template, f"{MARK}\n\n{question} {how}{self._after}"))

    def reply(self, question: str, *, how: str = COPY) -> list[int]:
        """Tokens between an answer and the next one: the end of the turn and another question."""
        if self._template is None:
            text = f"\n\nQuestion: {question}\nAnswer:"
        else:
            chat = [("user", "a"), ("assistant", MARK), ("user", f"{question} {how}{self._after}")]
            text = render_chat_messages(self.llm, self._template, [{"role": role, "content": said} for role, said in chat])
            text = _split_chat(text)[1]
        return self.llm.tokenize(text.encode(), add_bos=False, special=True)

    def wrap(self, *, chat: bool = True, after: str = "") -> tuple[list[int], list[int]]:
        """Tokens before and after one message, in the chat template of the model if it has one and ``chat``.

        Parameters
        ----------
        after : text at the end of the message
        """
        if self._template is None or not chat:
            return self._around(MARK + after + ("\n\n" if after else ""))
        return self._around(render_chat(self.llm, self._template, MARK + after))

    def _around(self, whole: str) -> tuple[list[int], list[int]]:
        prefix, suffix = _split_chat(whole)
        text = prefix.rstrip(" ")  # the haystack brings its own space
        bos = _token_text(self.llm, self.llm.token_bos())
        add_bos = not (bos and text.startswith(bos))
        return (
            self.llm.tokenize(text.encode(), add_bos=add_bos, special=True),
            self.llm.tokenize(suffix.encode(), add_bos=False, special=True),
        )


def split_at(sentences: list[list[int]], depth: float) -> tuple[list[list[int]], list[list[int]]]:
    """Sentences before and after a depth, 0 to 1 of their tokens."""
    n_before = depth * sum(map(len, sentences))
    n = i = 0
    while i < len(sentences) and n + len(sentences[i]) / 2 <= n_before:
        n += len(sentences[i])
        i += 1
    return sentences[:i], sentences[i:]


def render_chat(llm: Llama, template: str, content: str) -> str:
    """One user message in a chat template, up to where the answer begins."""
    return render_chat_messages(llm, template, [{"role": "user", "content": content}])


def render_chat_messages(llm: Llama, template: str, messages: list[Any]) -> str:
    """A conversation in a chat template, up to where the next answer begins.

    Raises
    ------
    ValueError : the template cannot be rendered
    """
    import jinja2
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    bos, eos = (_token_text(llm, token) for token in (llm.token_bos(), llm.token_eos()))
    try:
        formatter: Any = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)
        formatter.strftime_now = datetime(2025, 1, 1).strftime  # the same prompt on every day
        return str(formatter(messages=messages, enable_thinking=False).prompt)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template of the model cannot be rendered ({error}): use protocol authors") from None


def _split_chat(text: str) -> tuple[str, str]:
    parts = text.split(MARK)
    if len(parts) != 2:
        raise ValueError(f"the chat template repeats the message {len(parts) - 1} times: use protocol authors")
    return parts[0], parts[1]


def _token_text(llm: Llama, token: int) -> str:
    return llm._model.token_get_text(token) if token >= 0 else ""
