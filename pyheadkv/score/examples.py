"""Examples that head importance is measured on: a haystack, a needle, a question and where the answer stands.

Four sources of examples. ``CorpusExamples`` asks the embedded model in its own language. ``ProseExamples`` (protocol
clean) puts a needle between whole sentences, tokenised piece by piece, so that the span of the answer is exact, and
wraps it in the chat template of the model; ``MixedExamples`` (method mix) also asks about several facts, passages and
functions. ``AuthorsExamples`` (protocol authors) does what the HeadKV authors'
detection scripts do, side effects included: text is tokenised, cut, decoded and tokenised again several times, which
leaves a beginning-of-sequence token before the needle; the answer is searched by overlap of token sets.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..eval import needle
from ..eval.metrics import token_f1, word_recall
from ..eval.needle import speaks_needle_language
from ..eval.prose import COPY, HAYSTACK, REASONING, RETRIEVAL, Needle, Prose, split_at
from .texts import NOUNS, OWNERS, PASSAGES, PLACES, SPANS, THINGS, VERBS, function

if TYPE_CHECKING:
    from ..llama import Llama

METHODS = ("r2", "er", "r", "mix")
PROTOCOLS = ("clean", "authors")

N_LENGTHS, N_DEPTHS = 5, 10  # the authors' grid; the lengths of protocol clean too
N_FACTS = 4  # of one example of kind "facts"
N_SPARE = 16  # tokens that an answer may begin with before it copies, method r
N_QUESTION = 128  # tokens for a question, an instruction and a chat template, at most
MIN_HAYSTACK = 64  # tokens

CORPUS_KINDS: dict[str, tuple[needle.Kind, ...]] = {
    "r": ("direct", "list"),
    "er": ("direct", "list"),
    "r2": ("direct", "two-hop", "comparison"),
    "mix": ("direct", "two-hop", "comparison", "list"),
}
# kinds of examples of method mix, in turn; as many as have no common divisor with the lengths
MIX = ("reasoning", "passage", "span", "facts", "passage", "code")


@dataclass(frozen=True)
class Slot:
    """Place of one example in a run.

    Attributes
    ----------
    name : unique in a run
    kind : of the needle
    n_tokens : length that is aimed at
    depth : where the needle goes, 0 to 1
    index : of the needle among those of its source
    """

    name: str
    kind: str
    n_tokens: int
    depth: float
    index: int


@dataclass(frozen=True)
class Example:
    """One question, tokenised.

    Attributes
    ----------
    tokens : the whole prompt
    spans : (start, end) token positions of the answer in the prompt, end excluded; none if it was not found
    n_span : length of the answer in tokens, what scores are divided by
    n_evidence : tokens of the spans together where they are more than the answer, else 0
    answer : text that the response is compared with
    n_steps : tokens to generate at most
    answer_tokens : the answer as the model would begin to say it; empty where answers cannot be forced
    """

    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    n_span: int
    answer: str
    n_steps: int
    answer_tokens: tuple[int, ...] = ()
    n_evidence: int = 0

    @property
    def n_top(self) -> int:
        """Most attended positions that methods er, r2 and mix look at."""
        return self.n_evidence or self.n_span


class Examples(ABC):
    """A source of examples.

    Attributes
    ----------
    slots : what a run consists of, in order
    scores_stop : the token that ends an answer counts like the others
    """

    slots: Sequence[Slot]
    scores_stop = False

    def __init__(self, llm: Llama) -> None:
        self.llm = llm

    @abstractmethod
    def make(self, slot: Slot) -> Example:
        """The example of a slot; the same slot always gives the same example."""

    @abstractmethod
    def is_stop(self, token: int) -> bool:
        """Whether generation ends with this token."""

    def quality(self, response: str, answer: str) -> float:
        """0 to 1; an example counts when this is above 0.5."""
        return token_f1(response, answer)

    def text(self, tokens: Sequence[int]) -> str:
        """Generated tokens as text, without special tokens."""
        return self.llm.detokenize(list(tokens)).decode("utf-8", "replace").strip()

    def is_end(self, token: int) -> bool:
        """One of the tokens that end a turn or a text."""
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(self.llm._model.vocab, token))


def make_examples(
    llm: Llama, *, method: str, protocol: str, max_tokens: int, n_examples: int | None = None, seed: int | str = 0
) -> Examples:
    """The examples for a model.

    Parameters
    ----------
    method : "r2", "er", "r" or "mix"
    protocol : "clean" or "authors"
    max_tokens : length of the longest prompt
    n_examples : None = as many as the protocol has; protocol authors has a fixed grid
    seed : of the haystacks of protocol clean

    Raises
    ------
    ValueError : the protocol does not apply to the model or to ``n_examples``
    """
    if protocol == "authors":
        if n_examples is not None:
            raise ValueError(f"n_examples={n_examples}: protocol authors has a fixed grid, use protocol clean")
        if speaks_needle_language(llm):
            raise ValueError("the model has the closed vocabulary of the needle language: use protocol clean")
        if method == "mix":
            raise ValueError("method='mix': the HeadKV authors have no such examples, use protocol clean, or method r2")
        return AuthorsExamples(llm, method=method, max_tokens=max_tokens)
    prose = MixedExamples if method == "mix" else ProseExamples
    source = CorpusExamples if speaks_needle_language(llm) else prose
    return source(llm, method=method, max_tokens=max_tokens, n_examples=n_examples, seed=seed)


def _spread(kinds: Sequence[str], *, n_examples: int, n_min: int, n_max: int) -> list[Slot]:
    """Kinds in turn, N_LENGTHS lengths up to n_max, depths that fill 0..1 evenly however many there are."""
    if n_max < n_min:
        raise ValueError(f"max_tokens leaves {n_max} tokens for a prompt: at least {n_min} are needed, raise it")
    golden = 0.6180339887498949
    slots = []
    for i in range(n_examples):
        index = i % len(kinds)
        n_tokens = max(n_min, n_max * (1 + (i + i // len(kinds)) % N_LENGTHS) // N_LENGTHS)
        depth = round((0.5 + i) * golden % 1, 4)
        slots.append(Slot(f"{kinds[index]}/{n_tokens}/{depth}/{i}", kinds[index], n_tokens, depth, index))
    return slots


# the language of the embedded model


class CorpusExamples(Examples):
    """Documents of ``pyheadkv.eval.needle``: the facts that an answer is copied from are its span."""

    N_EXAMPLES = 60
    N_MIN = 512  # the facts of a document alone take half of it

    def __init__(self, llm: Llama, *, method: str, max_tokens: int, n_examples: int | None, seed: int | str) -> None:
        super().__init__(llm)
        self._seed = seed
        n = self.N_EXAMPLES if n_examples is None else n_examples
        self.slots = _spread(CORPUS_KINDS[method], n_examples=n, n_min=self.N_MIN, n_max=max_tokens)

    def make(self, slot: Slot) -> Example:
        rng = random.Random(f"{self._seed} {slot.name}")
        kind = next(kind for kind in needle.KINDS if kind == slot.kind)
        document = needle.make_document(rng, n_tokens=slot.n_tokens, kinds=[kind], depth=slot.depth)
        spans = document.turns[-1].spans
        if kind == "two-hop":
            spans = spans[:1]  # the other fact says whose value it is, the answer is not in it
        tokens = (needle.BOS, *needle.encode(document.prompt()))
        n_span = sum(end - start for start, end in spans)
        return Example(tokens, spans, n_span, document.answer, document.n_answer_tokens, tuple(needle.encode(document.answer)))

    def is_stop(self, token: int) -> bool:
        return self.is_end(token)


# English prose


@dataclass(frozen=True)
class Hidden:
    """A text that goes into a context, tokenised.

    Attributes
    ----------
    depth : where it goes, 0 to 1
    before, span, after : ``span`` is what the attention of the answer is looked for in
    """

    depth: float
    before: list[int]
    span: list[int]
    after: list[int]

    @property
    def n_tokens(self) -> int:
        return len(self.before) + len(self.span) + len(self.after)


def hide(units: list[list[int]], hidden: Sequence[Hidden]) -> tuple[list[int], list[tuple[int, int]]]:
    """A context with hidden texts between its units (sentences, passages, functions), and where their spans are."""
    places = [len(split_at(units, h.depth)[0]) for h in hidden]
    order = sorted(range(len(hidden)), key=lambda i: (hidden[i].depth, i))
    out: list[int] = []
    spans = []
    for k, unit in enumerate([*units, []]):
        for h in (hidden[i] for i in order if places[i] == k):
            start = len(out) + len(h.before)
            spans.append((start, start + len(h.span)))
            out += [*h.before, *h.span, *h.after]
        out += unit
    return out, spans


class ProseExamples(Examples):
    """Needles between the sentences of a shuffled public-domain text."""

    N_EXAMPLES = 60

    def __init__(self, llm: Llama, *, method: str, max_tokens: int, n_examples: int | None, seed: int | str) -> None:
        super().__init__(llm)
        self._seed, self._copies = seed, method == "r"
        self._retrieval = method != "r2"
        self._prose = Prose(llm)
        n = self.N_EXAMPLES if n_examples is None else n_examples
        self.slots = _spread(self.kinds(), n_examples=n, n_min=MIN_HAYSTACK + 2 * N_QUESTION, n_max=max_tokens)

    def kinds(self) -> list[str]:
        """Of the needles, in turn."""
        return [n.kind for n in RETRIEVAL] if self._retrieval else [kind for pair in REASONING for kind in pair.kinds]

    def make(self, slot: Slot) -> Example:
        rng = random.Random(f"{self._seed} {slot.name}")
        return self.ask(slot, rng, self._needle(slot, rng))

    def ask(self, slot: Slot, rng: random.Random, needle_: Needle) -> Example:
        """About a needle in prose."""
        return self.lay_out(slot, rng, needle_.question, [self.hidden(slot.depth, needle_)], needle_.answer)

    def hidden(self, depth: float, needle_: Needle) -> Hidden:
        """A needle, tokenised."""
        texts = (needle_.before, (needle_.answer,), needle_.after)
        return Hidden(depth, *([t for text in part for t in self._prose.continued(text)] for part in texts))

    def lay_out(
        self,
        slot: Slot,
        rng: random.Random,
        question: str,
        hidden: Sequence[Hidden],
        answer: str,
        *,
        how: str = COPY,
        fill: Callable[[random.Random, int], list[list[int]]] | None = None,
        is_evidence: bool = False,
    ) -> Example:
        """A prompt with hidden texts and a question.

        Parameters
        ----------
        fill : units of at most a number of tokens, for the rest of the context; None = sentences of prose
        is_evidence : the spans are what the answer is known from, not the answer itself
        """
        prefix, suffix = self._prose.frame(question, how=how)
        n_rest = len(prefix) + sum(h.n_tokens for h in hidden) + len(suffix)
        units = (fill or self._prose.haystack)(rng, slot.n_tokens - n_rest)
        context, places = hide(units, hidden)
        spans = tuple((len(prefix) + start, len(prefix) + end) for start, end in places)
        n_found = sum(end - start for start, end in spans)
        forced = tuple(self.llm.tokenize(answer.encode(), add_bos=False))
        n_span, n_evidence = (len(forced), n_found) if is_evidence else (n_found, 0)
        n_steps = n_span + N_SPARE * (self._copies or is_evidence)
        return Example((*prefix, *context, *suffix), spans, n_span, answer, n_steps, forced, n_evidence)

    def is_stop(self, token: int) -> bool:
        return self.is_end(token)

    def _needle(self, slot: Slot, rng: random.Random) -> Needle:
        if self._retrieval:
            return RETRIEVAL[slot.index]
        return REASONING[slot.index // 2].needle(slot.index % 2, order=rng.sample(range(3), 3))


class MixedExamples(ProseExamples):
    """Of five kinds, in turn: those of method r2, sentences and numbers, several facts, passages, functions of a program."""

    def kinds(self) -> list[str]:
        return list(MIX) * (self.N_EXAMPLES // len(MIX))

    def make(self, slot: Slot) -> Example:
        rng = random.Random(f"{self._seed} {slot.name}")
        i = sum(kind == slot.kind for kind in self.kinds()[: slot.index])  # of its kind
        makers = {"reasoning": self._reasoning, "span": self._span, "facts": self._facts, "passage": self._passage, "code": self._code}
        return makers[slot.kind](slot, rng, i)

    def _reasoning(self, slot: Slot, rng: random.Random, i: int) -> Example:
        pair = REASONING[i // 2 % len(REASONING)]
        return self.ask(slot, rng, pair.needle(i % 2, order=rng.sample(range(3), 3)))

    def _span(self, slot: Slot, rng: random.Random, i: int) -> Example:
        question, before, answer = SPANS[i % len(SPANS)]
        return self.ask(slot, rng, Needle(slot.kind, question, (before,), answer))

    def _facts(self, slot: Slot, rng: random.Random, i: int) -> Example:
        """Things that somebody keeps somewhere, all asked for, among those of others."""
        (owner, *others), (place, *_) = rng.sample(OWNERS, 3), rng.sample(PLACES, 1)
        things = rng.sample(THINGS, N_FACTS + len(others))
        needles = [
            Needle(slot.kind, "", (f"In the {place} {who} keeps",), f"{thing}.") for who, thing in zip([owner] * N_FACTS + others, things)
        ]
        depths = sorted((slot.depth + k / N_FACTS) % 1 for k in range(N_FACTS))
        units = [h.before + h.span for h in (self.hidden(0, n) for n in needles[N_FACTS:])]

        def fill(rng: random.Random, n_tokens: int) -> list[list[int]]:
            sentences = self._prose.haystack(rng, n_tokens - sum(map(len, units))) + units
            return rng.sample(sentences, len(sentences))

        answer = ", ".join(things[: N_FACTS - 1]) + f" and {things[N_FACTS - 1]}."
        hidden = [self.hidden(depth, n) for depth, n in zip(depths, needles)]
        return self.lay_out(slot, rng, f"What does {owner} keep in the {place}?", hidden, answer, how="Name all of it.", fill=fill)

    def _passage(self, slot: Slot, rng: random.Random, i: int) -> Example:
        """A question about one of several passages; prose where they are too few."""
        passage = PASSAGES[i % len(PASSAGES)]
        asked = passage.questions[i // len(PASSAGES) % len(passage.questions)]
        said = [self.llm.tokenize(f"\n\n{passage.title}:".encode(), add_bos=False), *map(self._prose.continued, passage.sentences)]
        before, span, after = said[: asked.at + 1], said[asked.at + 1], said[asked.at + 2 :]
        hidden = Hidden(slot.depth, [t for part in before for t in part], span, [t for part in after for t in part])

        def fill(rng: random.Random, n_tokens: int) -> list[list[int]]:
            units = []
            for other in rng.sample(PASSAGES, len(PASSAGES)):
                text = f"\n\n{other.title}: " + " ".join(other.sentences)
                unit = self.llm.tokenize(text.encode(), add_bos=False)
                if other is not passage and len(unit) <= n_tokens:
                    units.append(unit)
                    n_tokens -= len(unit)
            prose = [t for sentence in self._prose.haystack(rng, n_tokens) for t in sentence]
            units.insert(rng.randrange(len(units) + 1), prose)
            return units

        answer = asked.answer[0].upper() + asked.answer[1:]
        return self.lay_out(
            slot, rng, asked.question, [hidden], answer, how="Only give the answer and no other words.", fill=fill, is_evidence=True
        )

    def _code(self, slot: Slot, rng: random.Random, i: int) -> Example:
        """A value or a name in one of many functions that are alike."""
        names = [f"{verb}_{noun}" for verb in VERBS for noun in NOUNS]
        name, called, *others = rng.sample(names, len(names))
        lines, question, answer, at = function(rng, name, called, i)
        parts = [self.llm.tokenize(text.encode(), add_bos=False) for text in ("".join(lines[:at]), lines[at], "".join(lines[at + 1 :]))]

        def fill(rng: random.Random, n_tokens: int) -> list[list[int]]:
            units = []
            while n_tokens > 0:
                filler, its_call = rng.sample(others, 2)
                text = "".join(function(rng, filler, its_call, 0)[0])
                units.append(self.llm.tokenize(text.encode(), add_bos=False))
                n_tokens -= len(units[-1])
            return units[:-1]

        hidden = [Hidden(slot.depth, *parts)]
        return self.lay_out(
            slot, rng, question, hidden, answer, how="Answer with the value or the name alone.", fill=fill, is_evidence=True
        )


# as the authors do it


class AuthorsExamples(Examples):
    """The detection of the HeadKV authors (FYYFU/HeadKV 0862a09), with needles of our own in the form of theirs.

    The grid is 5 lengths from 0 x 10 depths for each of 3 needles (r, er) or 2 needles (r2).
    """

    N_BUFFER = 200  # tokens that are taken off the length before the needle goes in
    N_STEPS = 50  # of method r
    SCORED_NEWLINE = 144  # token id that the scripts compare with, whatever it means to the model
    scores_stop = True

    def __init__(self, llm: Llama, *, method: str, max_tokens: int) -> None:
        super().__init__(llm)
        self._method = method
        self._bos = llm.tokenize(b"", add_bos=True)[:1]
        self._needles = _authors_needles(method)
        self._haystack = self._encode(_repeat_words(HAYSTACK.read_text(encoding="utf-8"), n_words=max_tokens))
        self._periods = {llm.tokenize(text, add_bos=False)[-1] for text in (b".", b"x.")}
        lengths = [round(max_tokens * i / (N_LENGTHS - 1)) for i in range(N_LENGTHS)]
        depths = [round(100 * i / (N_DEPTHS - 1)) for i in range(N_DEPTHS)]
        self.slots = [
            Slot(f"{i}-{needle_.kind}/{length}/{depth}", needle_.kind, length, depth / 100, i)
            for i, needle_ in enumerate(self._needles)
            for length in lengths
            for depth in depths
        ]

    def make(self, slot: Slot) -> Example:
        needle_ = self._needles[slot.index]
        said = " ".join((*needle_.before, needle_.answer, *needle_.after))
        context = self._insert(said if self._method != "r2" else " " + said, slot)
        question = f"Based on the content of the book, Question: {needle_.question}\nAnswer:"
        tokens = self._encode(context + question)
        answer = self.llm.tokenize(needle_.answer.encode(), add_bos=False)
        start = self._find(tokens, answer)
        spans = () if start < 0 else ((start, start + len(answer)),)
        n_steps = self.N_STEPS if self._method == "r" else len(answer)
        return Example(tuple(tokens), spans, len(answer), needle_.answer, n_steps)

    def is_stop(self, token: int) -> bool:
        is_newline = token == self.SCORED_NEWLINE or self.llm._model.token_get_text(token) == "<0x0A>"
        return is_newline or (self._method != "r" and token == self.llm.token_eos())

    def quality(self, response: str, answer: str) -> float:
        return token_f1(response, answer) if self._method == "r2" else word_recall(response, answer)

    def _encode(self, text: str) -> list[int]:
        """Tokens behind a BOS, which text that was decoded with one has twice."""
        return self._bos + self.llm.tokenize(text.encode(), add_bos=False, special=True)

    def _decode(self, tokens: list[int]) -> str:
        return self.llm.detokenize(tokens, special=True).decode("utf-8", "replace")

    def _insert(self, said: str, slot: Slot) -> str:
        """Cut the haystack and put the needle behind the last sentence that ends before its depth."""
        tokens_needle = self._encode(said)
        tokens = self._encode(self._decode(self._haystack[: slot.n_tokens]))
        n_room = slot.n_tokens - self.N_BUFFER
        if len(tokens) + len(tokens_needle) > n_room:
            tokens = tokens[: max(0, n_room - len(tokens_needle))]
        point = len(tokens) if slot.depth == 1 else int(len(tokens) * slot.depth)
        if slot.depth < 1:
            while point > 0 and tokens[point - 1] not in self._periods:
                point -= 1
        return self._decode(tokens[:point] + tokens_needle + tokens[point:])

    def _find(self, tokens: list[int], answer: list[int]) -> int:
        """Start of the answer, or -1."""
        n, wanted = len(answer), set(answer)
        starts = range(len(tokens) - n + 1)
        if self._method == "r2":
            return find_after_bos(tokens, answer, bos=self._bos)
        return next((i for i in starts if len(wanted & set(tokens[i : i + n])) > 0.9 * len(wanted)), -1)


def find_after_bos(tokens: Sequence[int], answer: Sequence[int], *, bos: Sequence[int]) -> int:
    """Start of the span after a BOS whose tokens overlap most with the answer, the last of equals; -1 for none.

    A model without BOS (``bos`` empty) is searched at every position.
    """
    n, wanted = len(answer), set(answer)
    starts = [i + len(bos) for i in range(len(tokens)) if list(tokens[i : i + len(bos)]) == list(bos)]
    starts = [i for i in starts if i + n <= len(tokens)]
    return max(starts, key=lambda i: (len(wanted & set(tokens[i : i + n])), i), default=-1)


def _authors_needles(method: str) -> list[Needle]:
    """Three needles to retrieve, or one pair of reasoning in the order of the authors' files: answer, wrong, reason."""
    if method != "r2":
        return list(RETRIEVAL[:3])
    return [REASONING[0].needle(which, order=(2, 1, 0)) for which in (0, 1)]


def _repeat_words(text: str, *, n_words: int) -> str:
    return text * -(-max(1, n_words) // len(text.split()))
