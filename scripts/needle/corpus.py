"""Training sequences: many facts, many questions, some asked in mid-document, each answer token marked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from . import language

#: classes of a target token: no loss, language (low weight), then one class per kind of answer
NO_LOSS, LANGUAGE = 0, 1
ANSWER_CLASS: dict[language.Kind, int] = {"direct": 2, "two-hop": 3, "comparison": 4, "list": 5}


@dataclass(frozen=True)
class Mix:
    """What the documents of a training stage are made of; ranges are inclusive."""

    n_direct: tuple[int, int]
    #: people that the direct facts are spread over, as a share of their number: the smaller, the more the attribute
    #: in a question matters beside the name
    people_share: float = 0.5
    n_alias: tuple[int, int] = (0, 0)
    n_aged: tuple[int, int] = (0, 0)
    n_listed: tuple[int, int] = (0, 0)
    n_keys: tuple[int, int] = (2, 6)
    n_value: tuple[int, int] = (2, 8)
    n_key_value: tuple[int, int] = (2, 4)
    #: share of the values that begin as another one of the same attribute does
    twin_share: float = 0.0
    #: share of the sequence that questions and answers may take
    question_share: float = 0.4
    #: share of the questions asked in mid-document, as soon as their facts are known
    mid_share: float = 0.4
    #: share of direct and two-hop questions asked as in a chat ("what is the code of anna ?")
    chat_share: float = 0.0
    #: how often each kind is asked, relative to the others
    weights: dict[language.Kind, float] = field(default_factory=lambda: {"direct": 1.0, "two-hop": 1.0, "comparison": 1.0, "list": 0.5})


@dataclass(frozen=True)
class TrainingSequence:
    """One training sequence; all arrays have shape (n_tokens + 1,)."""

    tokens: NDArray[np.int64]
    #: class of each token as a target
    classes: NDArray[np.int64]
    #: number of the answer that a token belongs to, from 1; 0 for none
    answers: NDArray[np.int64]


_Piece = tuple[list[int], list[int], int]  # ids, classes, answer number


class Corpus:
    """Makes sequences; everything random comes from the generator given to `sequence`."""

    def __init__(self, *, seed: int, n_filler: int = 20_000) -> None:
        rng = random.Random(f"filler {seed}")
        self._filler = [self._ids(language.filler_sentence(rng)) for _ in range(n_filler)]

    @staticmethod
    def _ids(words: Sequence[str]) -> list[int]:
        return [language.WORD_ID[word] for word in words]

    def sequence(self, rng: random.Random, *, n_tokens: int, mix: Mix) -> TrainingSequence:
        """A document of n_tokens + 1 tokens, BOS included."""
        world = language.World(rng, _world_options(rng, mix))
        questions = self._choose(rng, world, mix, int(n_tokens * mix.question_share))
        pieces = [self._question(rng, question, mix, i + 1) for i, question in enumerate(questions)]
        facts = [_fact_piece(self._ids(fact.words)) for fact in world.facts]
        n_room = n_tokens - sum(len(piece[0]) for piece in pieces + facts)
        where = {id(fact): rng.random() for fact in world.facts}
        placed = [(where[id(fact)], piece) for fact, piece in zip(world.facts, facts, strict=True)]
        placed += self._place_filler(rng, n_room)
        for question, piece in zip(questions, pieces, strict=True):
            known = max(where[id(fact)] for fact in question.facts)
            asked = rng.uniform(known, 1.0) if rng.random() < mix.mid_share else 1.0 + rng.random()
            placed.append((asked, piece))
        placed.sort(key=lambda entry: entry[0])
        return _join([piece for _, piece in placed], n_tokens + 1)

    def _choose(self, rng: random.Random, world: language.World, mix: Mix, n_room: int) -> list[language.Question]:
        pools = {kind: rng.sample(pool, len(pool)) for kind, pool in world.questions.items() if pool}
        chosen: list[language.Question] = []
        while pools and n_room > 0:
            kind = rng.choices(list(pools), [mix.weights[kind] for kind in pools])[0]
            question = pools[kind].pop()
            if not pools[kind]:
                del pools[kind]
            n_room -= len(question.words) + len(question.answer) + 1
            if n_room > 0 or not chosen:
                chosen.append(question)
        return chosen

    def _question(self, rng: random.Random, question: language.Question, mix: Mix, number: int) -> _Piece:
        words, answer = question.words, question.answer
        if question.kind in ("direct", "two-hop") and rng.random() < mix.chat_share:
            said = words[2:]  # the code of anna is
            words, answer = ("what", "is", *said[:-1], "?"), (*said, *answer)
        answer_class = ANSWER_CLASS[question.kind]
        ids = self._ids(words) + self._ids(answer)
        classes = [NO_LOSS] * len(words) + [answer_class] * len(answer)
        # an answer ends its turn; prompts typed by hand go on without the mark
        if rng.random() < 0.7:
            return [*ids, language.EOS], [*classes, LANGUAGE], number
        return ids, classes, number

    def _place_filler(self, rng: random.Random, n_tokens: int) -> list[tuple[float, _Piece]]:
        placed: list[tuple[float, _Piece]] = []
        while n_tokens > 0:
            ids = rng.choice(self._filler)[-n_tokens:]
            placed.append((rng.random(), (ids, [NO_LOSS] + [LANGUAGE] * (len(ids) - 1), 0)))
            n_tokens -= len(ids)
        return placed


def _world_options(rng: random.Random, mix: Mix) -> language.WorldOptions:
    n_direct = rng.randint(*mix.n_direct)
    return language.WorldOptions(
        n_direct=n_direct,
        n_people=max(2, round(n_direct * mix.people_share)),
        n_alias=rng.randint(*mix.n_alias),
        n_aged=rng.randint(*mix.n_aged),
        n_listed=rng.randint(*mix.n_listed),
        n_keys=mix.n_keys,
        n_value=mix.n_value,
        n_key_value=mix.n_key_value,
        twin_share=mix.twin_share,
    )


def _fact_piece(ids: list[int]) -> _Piece:
    # names and values cannot be predicted: only the small words of a needle carry loss
    small = {language.WORD_ID[word] for word in ("of", "is", "'s", "equals", "key")}
    return ids, [LANGUAGE if i in small else NO_LOSS for i in ids], 0


def _join(pieces: list[_Piece], n: int) -> TrainingSequence:
    tokens, classes, answers = [language.BOS], [NO_LOSS], [0]
    for ids, piece_classes, number in pieces:
        tokens += ids
        classes += piece_classes
        answers += [number if c > LANGUAGE else 0 for c in piece_classes]
    # a crowded document can be a little too long: what is cut are questions at its end
    cut = [np.asarray(row[:n], dtype=np.int64) for row in (tokens, classes, answers)]
    return TrainingSequence(*(np.pad(row, (0, n - len(row))) for row in cut))


def skipped_positions(rng: random.Random, tokens: NDArray[np.int64], *, max_position: int) -> NDArray[np.int64]:
    """Positions with up to three random gaps at sentence ends, as in PoSE: the model sees distances far beyond
    the length of the sequence.

    Parameters
    ----------
    tokens : (n_tokens,)
    max_position : exclusive upper bound of the positions

    Returns
    -------
    (n_tokens,) int64, strictly increasing
    """
    positions = np.arange(len(tokens), dtype=np.int64)
    spare = max_position - len(tokens)
    ends = np.flatnonzero(tokens == language.WORD_ID["."])
    if spare <= 0 or len(ends) == 0 or rng.random() < 0.3:
        return positions
    n_gaps = rng.randint(1, 3)
    total = rng.randrange(spare)
    for _ in range(n_gaps):
        positions[int(rng.choice(list(ends))) + 1 :] += total // n_gaps
    return positions
