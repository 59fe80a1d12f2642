"""Importance of every query head, measured on the model itself: what ``pyheadkv score`` runs.

Each example is a prompt with a needle, read with full attention, and an answer. The attention of the tokens that produce
the answer is reduced inside the engine. Three formulas, per query head and example (N = tokens of the needle):

====== ============================================================================================= ==================
method score                                                                                         examples
====== ============================================================================================= ==================
r      for each token of the answer: 1/N if the most attended position is in the needle and holds it retrieval
er     for each token of the answer: mass of those of the N most attended positions in the needle,   retrieval
       by N
r2     the same                                                                                      reasoning
mix    the same; of passages and functions the mass in the sentence or line that has the answer,       five kinds
       by the tokens of the answer
====== ============================================================================================= ==================

The answer is the right one, whatever the model would say (teacher forcing: one pass over prompt and answer, and every
example counts), or with ``--answers generated``, as the HeadKV authors do it, what the model generates, and examples that
it answers wrongly do not count. Importance is the mean over the examples that count. Examples are added until the
importance is stable: until the ranks of the KV heads in two halves of the examples agree.

What an example gave is appended to a file beside the output as soon as it is there, from which ``--resume`` goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..atomic_write import replace_file
from ..eval.journal import REMEDY, Journal
from ..gguf_header import read_header
from ..importance_values import check_importance
from ..layers import heads_by_layer
from .calibrate import Calibration
from .examples import N_QUESTION, Example, Examples, Slot

if TYPE_CHECKING:
    from ..llama import Llama

ACCEPT_ABOVE = 0.5
ANSWERS = ("forced", "generated")
STABLE = 0.95  # reliability at which a run ends
N_STABLE = 12  # examples before it may
N_COUNTED, RELIABLE = 8, 0.7  # below one of these nothing is written
N_SPLITS = 50
MAX_ANSWER = 64  # tokens of an answer that are forced at most: the largest window


class Reader(Protocol):
    """What examples are read with: ``LlamaReader``, or the NumPy oracle in the tests.

    Attributes
    ----------
    shape : (n_layer, n_head)
    heads : (query heads, KV heads) of each layer
    """

    shape: tuple[int, int]

    @property
    def heads(self) -> Sequence[tuple[int, int]]:
        """Of each layer."""

    def begin(self, tokens: Sequence[int]) -> None:
        """Forget everything and read a prompt."""

    def append(self, token: int) -> None:
        """Read one generated token."""

    def attention(self, spans: Sequence[tuple[int, int]], n_top: int, n_queries: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Attention of the last tokens, as ``Llama.read_attention`` gives it."""

    def greedy(self) -> int:
        """The most likely next token."""


class LlamaReader:
    """Reads with a ``Llama`` whose prompts are never compressed."""

    def __init__(self, llm: Llama) -> None:
        import llama_cpp

        self.llm = llm
        heads = heads_by_layer(read_header(llm.model_path))
        n_layer, n_head, n_head_kv = (
            f(llm.model) for f in (llama_cpp.llama_model_n_layer, llama_cpp.llama_model_n_head, llama_cpp.llama_model_n_head_kv)
        )
        self.heads = heads or [(n_head, n_head_kv)] * n_layer
        self.shape = n_layer, max(n for n, _ in self.heads)

    def begin(self, tokens: Sequence[int]) -> None:
        self.llm.reset()
        self.llm.eval(tokens)

    def append(self, token: int) -> None:
        self.llm.eval([token])

    def attention(self, spans: Sequence[tuple[int, int]], n_top: int, n_queries: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        return self.llm.read_attention(spans, n_top, n_queries=n_queries)

    def greedy(self) -> int:
        return int(self.llm.last_logits.argmax())


@dataclass(frozen=True)
class Outcome:
    """One example, measured.

    Attributes
    ----------
    name, kind : of the example
    n_tokens : of its prompt
    quality : of the response, 0 to 1; 1 for a forced answer
    accepted : the scores count
    response : what was generated; "" for a forced answer
    scores : (n_layer, n_head) nested lists
    """

    name: str
    kind: str
    n_tokens: int
    quality: float
    accepted: bool
    response: str
    answer: str
    scores: list[list[float]]


# formulas


def copy_scores(
    top: NDArray[np.int32], *, token: int, tokens: Sequence[int], spans: Sequence[tuple[int, int]], n_span: int
) -> NDArray[np.float64]:
    """Method r, one generated token: 1/n_span where a head looks most at this token inside a span.

    Parameters
    ----------
    top : (n_layer, n_head) most attended positions, -1 for none
    token : the generated one
    tokens : the prompt
    """
    copied = [i for start, end in spans for i in range(start, end) if tokens[i] == token]
    return np.isin(top, copied) / n_span


def mass_scores(mass: NDArray[np.float32], *, n_span: int) -> NDArray[np.float64]:
    """Methods er and r2, one generated token: mass in the spans among the n_span largest, divided by n_span."""
    return mass.astype(np.float64) / n_span


def score_forced(reader: Reader, example: Example, *, method: str) -> NDArray[np.float64]:
    """Scores of all heads in one example whose answer is given, (n_layer, n_head)."""
    answer = example.answer_tokens[:MAX_ANSWER]
    reader.begin([*example.tokens, *answer[:-1]])
    n_top = 1 if method == "r" else example.n_top
    mass, top = reader.attention(example.spans, n_top, len(answer))
    if method == "r":
        scores = np.array([_copy(t, example, token) for t, token in zip(top, answer, strict=True)])
    else:
        scores = mass_scores(mass, n_span=example.n_span)
    total: NDArray[np.float64] = scores.sum(axis=0)
    return total


def score_example(reader: Reader, example: Example, *, method: str, examples: Examples) -> tuple[NDArray[np.float64], list[int]]:
    """Scores of all heads in one example that the model answers.

    Returns
    -------
    (n_layer, n_head) float64; the generated tokens without the one that ended them
    """
    reader.begin(example.tokens)
    total: NDArray[np.float64] = np.zeros(reader.shape)
    response: list[int] = []
    for _ in range(example.n_steps):
        token = reader.greedy()
        stopped = examples.is_stop(token)
        if example.spans and (not stopped or examples.scores_stop):
            mass, top = reader.attention(example.spans, 1 if method == "r" else example.n_top, 1)
            total += _copy(top[0], example, token) if method == "r" else mass_scores(mass[0], n_span=example.n_span)
        if stopped:
            break
        response.append(token)
        if len(response) < example.n_steps:
            reader.append(token)
    return total, response


def _copy(top: NDArray[np.int32], example: Example, token: int) -> NDArray[np.float64]:
    return copy_scores(top, token=token, tokens=example.tokens, spans=example.spans, n_span=example.n_span)


def mean_importance(outcomes: Sequence[Outcome]) -> NDArray[np.float64]:
    """Mean of the scores of the accepted examples, (n_layer, n_head).

    Raises
    ------
    ValueError : no example was accepted, or no head ever scored
    """
    accepted = [np.asarray(o.scores) for o in outcomes if o.accepted]
    if not accepted:
        best = max((o.quality for o in outcomes), default=0.0)
        raise ValueError(
            f"the model answered none of {len(outcomes)} examples (best quality {best:.2f}, above {ACCEPT_ABOVE} is "
            "needed): try shorter ones with --max-tokens, or another protocol"
        )
    return check_importance(np.mean(accepted, axis=0), name="importance")


def reliability(outcomes: Sequence[Outcome], heads: Sequence[tuple[int, int]]) -> float:
    """How well the ranks of the KV heads would agree with those of as many other examples, 0 to 1.

    The rank correlation (Spearman) of two halves of the examples, mean over random halves, stepped up to their whole number
    by the Spearman-Brown formula.
    """
    scores = np.array([kv_scores(np.asarray(o.scores), heads) for o in outcomes if o.accepted])
    n = len(scores)
    if n < 2:
        return 0.0
    rng = np.random.default_rng(0)
    found = []
    for _ in range(N_SPLITS):
        order = rng.permutation(n)
        found.append(rank_correlation(scores[order[: n // 2]].mean(0), scores[order[n // 2 :]].mean(0)))
    r = max(0.0, float(np.mean(found)))
    return 2 * r / (1 + r)


def kv_scores(scores: NDArray[np.float64], heads: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """Means over the GQA groups, of all KV heads in a row: what decides their budgets."""
    rows = [row[:n].reshape(n_kv, -1).mean(1) for row, (n, n_kv) in zip(scores, heads, strict=True) if n_kv]
    return np.concatenate(rows)


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's, ties by their mean rank; 0 where one of them is constant."""
    x, y = (_ranks(v) for v in (a, b))
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 0 else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


# a run


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; equal settings give an equal file.

    Attributes
    ----------
    answers : "forced" or "generated"
    n_examples : at most
    until : reliability at which it ends before; 0 = it does not
    max_tokens : length of the longest prompt
    model_sha256 : of the file
    fingerprint : of the model in any quantisation
    engine : threads, batch and layers on the GPU, which decide how sums are rounded
    versions : of pyheadkv and llama_cpp_python
    calibration : examples and cache sizes that beta is chosen on; empty = it is not
    """

    method: str
    protocol: str
    answers: str
    n_examples: int
    until: float
    max_tokens: int
    seed: int
    model_sha256: str
    fingerprint: str
    engine: dict[str, int]
    versions: dict[str, str]
    calibration: dict[str, Any] = field(default_factory=dict)


def outcomes_of(journal: Journal) -> list[Outcome]:
    """The examples that a journal has."""
    try:
        return [Outcome(**entry) for entry in journal.entries if "scores" in entry]
    except TypeError as error:
        raise ValueError(f"{journal.path} is damaged ({error}): {REMEDY}") from None


def measure(reader: Reader, examples: Examples, journal: Journal, *, method: str, answers: str, until: float) -> int:
    """Score the examples that the journal does not have yet, until their reliability, with a progress bar.

    Returns
    -------
    prompt tokens that were read
    """
    from tqdm import tqdm

    outcomes = outcomes_of(journal)
    n_done, n_read = len(outcomes), 0
    lengths = [max(slot.n_tokens, N_QUESTION) for slot in examples.slots]
    total, initial = sum(lengths), sum(lengths[:n_done])
    look: dict[str, Any] = {"desc": "scoring", "unit": " tokens", "unit_scale": True, "leave": False, "disable": None}
    with tqdm(total=total, initial=initial, **look) as bar:
        for slot, n_planned in zip(examples.slots[n_done:], lengths[n_done:], strict=True):
            n_accepted = sum(o.accepted for o in outcomes)
            agreement = reliability(outcomes, reader.heads)
            if until and n_accepted >= N_STABLE and agreement >= until:
                break
            bar.set_postfix_str(f"{n_accepted} examples count, reliability {agreement:.2f}", refresh=False)
            outcome = measure_one(reader, examples, slot, method=method, answers=answers)
            journal.append(asdict(outcome))
            outcomes.append(outcome)
            n_read += outcome.n_tokens
            bar.update(n_planned)
    return n_read


def measure_one(reader: Reader, examples: Examples, slot: Slot, *, method: str, answers: str) -> Outcome:
    """Make one example, give it its answer or let the model find one, and score its heads."""
    example = examples.make(slot)
    if answers == "forced":
        scores, response, quality = score_forced(reader, example, method=method), "", 1.0
    else:
        scores, tokens = score_example(reader, example, method=method, examples=examples)
        response = examples.text(tokens)
        quality = examples.quality(response, example.answer)
    return Outcome(
        name=slot.name,
        kind=slot.kind,
        n_tokens=len(example.tokens),
        quality=quality,
        accepted=quality > ACCEPT_ABOVE,
        response=response,
        answer=example.answer,
        scores=scores.tolist(),
    )


def check_reliable(outcomes: Sequence[Outcome], heads: Sequence[tuple[int, int]]) -> float:
    """Reliability of the importance, if it is enough to be used.

    Raises
    ------
    ValueError : fewer than N_COUNTED examples count, or their reliability is below RELIABLE
    """
    n, agreement = sum(o.accepted for o in outcomes), reliability(outcomes, heads)
    if n < N_COUNTED:
        forced = "" if n == len(outcomes) else "--answers forced, which counts every example, or "
        raise ValueError(f"{n} of {len(outcomes)} examples count, at least {N_COUNTED} are needed: use {forced}more with --examples")
    if agreement < RELIABLE:
        raise ValueError(f"the importance from {n} examples has a reliability of {agreement:.2f}, at least {RELIABLE} is needed: "
                         "use more with --examples")  # fmt: skip
    return agreement


def result(settings: Settings, outcomes: Sequence[Outcome], agreement: float, calibration: Calibration | None = None) -> dict[str, Any]:
    """Content of the score file."""
    how = asdict(settings)
    del how["calibration"]
    if calibration is not None:
        how |= {"beta": calibration.beta, "calibration": calibration.table()}
    examples = [{name: value for name, value in asdict(o).items() if name != "scores"} for o in outcomes]
    return {
        "importance": mean_importance(outcomes).tolist(),
        **how,
        "accepted": sum(o.accepted for o in outcomes),
        "reliability": round(agreement, 4),
        "examples": examples,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One line per value, and per element of a list."""
    lines = [f"{json.dumps(name)}: {_json_lines(value)}" for name, value in content.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    replace_file(path, lambda out: out.write(text.encode()))


def _json_lines(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n " + ",\n ".join(map(json.dumps, value)) + "\n]"


def versions() -> dict[str, str]:
    """Of what scores depend on."""
    import llama_cpp

    return {"pyheadkv": __version__, "llama_cpp_python": llama_cpp.__version__}
