"""A question, where it stands and how its answer is graded: what every task of ``pyheadkv eval`` makes."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..llama import Llama

Grade = Callable[[str], float]


@dataclass(frozen=True)
class Turn:
    """One more question of a chat.

    Attributes
    ----------
    kind : of question
    prompt : tokens between the answer before it and its own: the end of that turn, the question
    n_steps, grade, depth, right : as those of ``Ask``
    """

    kind: str
    prompt: tuple[int, ...]
    n_steps: int
    grade: Grade
    depth: float
    right: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ask:
    """One question about a context.

    Attributes
    ----------
    kind : of question
    prompt : tokens of the context and the question; query-aware compression sees all of them
    n_context : of them that are the context; query-agnostic compression sees only these
    alone : tokens of the same question without the context
    more : tokens behind the prompt: its answer and another question, which is the one that is graded
    n_steps : tokens to generate at most
    grade : 0 to 1 for generated text
    depth : of the needle in the context, 0 to 1
    turns : asked after the answer, one after the other, each on what the cache holds then; no ``more`` beside them
    follows : tokens that come after the prompt, where nothing is asked: the score is the share of them for which the cache
        predicts what the full cache predicts
    right : tokens of a right answer, as they would come behind the prompt and ``more``; empty where none is known
    question, answer : for people; empty where the task has no single ones
    """

    kind: str
    prompt: tuple[int, ...]
    n_context: int
    alone: tuple[int, ...]
    n_steps: int
    grade: Grade
    depth: float
    more: tuple[int, ...] = ()
    turns: tuple[Turn, ...] = ()
    follows: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    question: str = ""
    answer: str = ""


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
        """Tokens that end an answer; with ``raw`` the end of the text alone."""
        import llama_cpp

        if self.options.raw:
            return frozenset({self.llm.token_eos()})
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
    prompts : JSON file in place of ``data/prompts.json``, for such a task
    after : text behind the question, in the same message
    raw : as the HeadKV authors ask: no chat template, and only one token ends an answer
    """

    name: str
    n_tokens: int
    n_each: int = 2
    seed: int = 0
    n_depths: int = 10
    file: Path | None = None
    prompts: Path | None = None
    raw: bool = False
    after: str = ""
