"""The replay table of a model: what ``pyheadkv score --method replay`` runs (KVzip's scores, once per model).

A model reads a text and repeats it word for word: the repetition is given to it, in pieces. The score of a cell of the text is the
largest probability that a query of the repetition, in any query head of the group, gives to it. One threshold for the whole model
leaves a share of all cells above it; which part of its own cells a head has there hardly depends on the text. The table has the
means of that over several texts, at several shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..eval.journal import REMEDY, Journal
from ..gguf_header import read_header
from ..layers import heads_by_layer
from ..replay_values import METHOD, check_replay
from .measure import N_SPLITS, RELIABLE, rank_correlation
from .replay_texts import Replay

if TYPE_CHECKING:
    from ..llama import Llama

SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
N_CHUNK = 256  # tokens of a repetition that are read at once: the largest window
N_COUNTED = 4  # texts; fewer, or a reliability below RELIABLE, and nothing is written


class Reader(Protocol):
    """What texts are read with: ``LlamaReader``, or the NumPy oracle in the tests."""

    @property
    def heads(self) -> Sequence[tuple[int, int]]:
        """(query heads, KV heads) of each layer."""

    def begin(self, tokens: Sequence[int]) -> None:
        """Forget everything and read."""

    def go_on(self, tokens: Sequence[int]) -> None:
        """Read more."""

    def attention_max(self, n_positions: int, n_queries: int) -> NDArray[np.float32]:
        """Of the last tokens, as ``Llama.read_attention_max`` gives it."""


class LlamaReader:
    """Reads with a ``Llama`` whose prompts are never compressed and whose window is N_CHUNK."""

    def __init__(self, llm: Llama) -> None:
        self.llm = llm
        self.heads = heads_by_layer(read_header(llm.model_path)) or []

    def begin(self, tokens: Sequence[int]) -> None:
        self.llm.reset()
        self.llm.eval(tokens)

    def go_on(self, tokens: Sequence[int]) -> None:
        self.llm.eval(tokens)

    def attention_max(self, n_positions: int, n_queries: int) -> NDArray[np.float32]:
        return self.llm.read_attention_max(n_positions, n_queries=n_queries)


@dataclass(frozen=True)
class Outcome:
    """One text, repeated.

    Attributes
    ----------
    name, kind : of the text
    n_tokens : of the text
    values : (n_share, n_layer, n_head_kv_max) nested lists
    """

    name: str
    kind: str
    n_tokens: int
    values: list[list[list[float]]]


def replay_scores(reader: Reader, replay: Replay, *, n_chunk: int = N_CHUNK) -> NDArray[np.float32]:
    """Scores of the cells of a text, (n_layer, n_head_kv_max, n)."""
    n_before, n = len(replay.before), len(replay.text)
    reader.begin([*replay.before, *replay.text, *replay.after[:-1]])
    repeated = [replay.after[-1], *replay.text[:-1]]  # those that predict the text
    best: NDArray[np.float32] | None = None
    for first in range(0, n, n_chunk):
        chunk = repeated[first : first + n_chunk]
        reader.go_on(chunk)
        found = reader.attention_max(n_before + n, len(chunk))[:, :, n_before:]
        best = found if best is None else np.maximum(best, found)
    assert best is not None
    return best


def shares_above(scores: NDArray[np.floating], heads: Sequence[tuple[int, int]], shares: Sequence[float] = SHARES) -> NDArray[np.float64]:
    """Which part of the cells of each KV head is among the best of the whole model.

    Of cells that are equal at the threshold, each counts the same part, so that the mean is the share exactly.

    Parameters
    ----------
    scores : (n_layer, n_head_kv_max, n)
    shares : of all cells of all heads

    Returns
    -------
    (n_share, n_layer, n_head_kv_max) float64, 0 where a layer has fewer KV heads
    """
    is_there = np.arange(scores.shape[1]) < np.array([n_kv for _, n_kv in heads])[:, None]
    ordered = np.sort(scores[is_there], axis=None)[::-1]
    table: NDArray[np.float64] = np.zeros((len(shares), *scores.shape[:2]))
    for row, share in zip(table, shares, strict=True):
        n_kept = share * len(ordered)
        least = ordered[int(np.ceil(n_kept)) - 1]
        part = (n_kept - (ordered > least).sum()) / (ordered == least).sum()
        row[:] = ((scores > least).mean(-1) + part * (scores == least).mean(-1)) * is_there
    return table


def head_shares(values: NDArray[np.float64], heads: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """Those of all KV heads that there are in a row, (.., n_heads)."""
    is_there = np.arange(values.shape[-1]) < np.array([n_kv for _, n_kv in heads])[:, None]
    return values[..., is_there]


def reliability(outcomes: Sequence[Outcome], heads: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """How well the ranks of the KV heads would agree with those on as many other texts, 0 to 1, at each share.

    The rank correlation (Spearman) of two halves of the texts, mean over random halves, stepped up to their whole number by the
    Spearman-Brown formula.
    """
    n = len(outcomes)
    if n < 2:
        return np.zeros(len(SHARES))
    values = head_shares(np.array([o.values for o in outcomes]), heads)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(n) for _ in range(N_SPLITS)]
    halves = [(values[order[: n // 2]].mean(0), values[order[n // 2 :]].mean(0)) for order in orders]
    r = np.maximum(0.0, np.mean([[rank_correlation(a, b) for a, b in zip(*half, strict=True)] for half in halves], axis=0))
    stepped: NDArray[np.float64] = 2 * r / (1 + r)
    return stepped


def check_reliable(outcomes: Sequence[Outcome], heads: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """Reliability of the table at each share, if it is enough to be used.

    Raises
    ------
    ValueError : fewer than N_COUNTED texts, or at one share the reliability is below RELIABLE
    """
    n, found = len(outcomes), reliability(outcomes, heads)
    if n < N_COUNTED:
        raise ValueError(f"{n} texts were repeated, at least {N_COUNTED} are needed: use more with --examples")
    if found.min() < RELIABLE:
        raise ValueError(
            f"the replay table of {n} texts has a reliability of {found.min():.2f} at a share of {SHARES[int(found.argmin())]:.3g}, at least "
            f"{RELIABLE} is needed: use longer texts with --max-tokens, or more with --examples"
        )
    return found


# a run


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; equal settings give an equal file.

    Attributes
    ----------
    n_texts : that are repeated
    max_tokens : where a text is cut off
    n_chunk : tokens of a repetition that are read at once
    model_sha256 : of the file
    fingerprint : of the model in any quantisation
    engine : threads, batch and layers on the GPU, which decide how sums are rounded
    versions : of pyheadkv and llama_cpp_python
    """

    method: str
    n_texts: int
    max_tokens: int
    n_chunk: int
    seed: int
    model_sha256: str
    fingerprint: str
    engine: dict[str, int]
    versions: dict[str, str]


def outcomes_of(journal: Journal) -> list[Outcome]:
    """The texts that a journal has."""
    return outcomes_of_entries(journal.entries, name=str(journal.path))


def outcomes_of_entries(entries: Sequence[dict[str, Any]], *, name: str) -> list[Outcome]:
    """The texts of a journal that was read.

    Raises
    ------
    ValueError : it is damaged
    """
    try:
        return [Outcome(**entry) for entry in entries]
    except TypeError as error:
        raise ValueError(f"{name} is damaged ({error}): {REMEDY}") from None


def measure(reader: Reader, replays: Sequence[Replay], journal: Journal) -> int:
    """Let the model repeat the texts that the journal does not have yet, with a progress bar.

    Returns
    -------
    tokens that were read
    """
    from tqdm import tqdm

    n_done, n_read = len(journal.entries), 0
    total, initial = (sum(replay.n_tokens for replay in some) for some in (replays, replays[:n_done]))
    with tqdm(total=total, initial=initial, desc="repeating", unit=" tokens", unit_scale=True, leave=False, disable=None) as bar:
        for replay in replays[n_done:]:
            bar.set_postfix_str(replay.name, refresh=False)
            values = shares_above(replay_scores(reader, replay), reader.heads)
            journal.append(asdict(Outcome(replay.name, replay.kind, len(replay.text), values.tolist())))
            n_read += replay.n_tokens
            bar.update(replay.n_tokens)
    return n_read


def result(settings: Settings, outcomes: Sequence[Outcome], found: NDArray[np.float64]) -> dict[str, Any]:
    """Content of the score file; ``found``: the reliability at each share."""
    shares, values = check_replay(SHARES, np.mean([o.values for o in outcomes], axis=0), name="replay table")
    how = asdict(settings)
    source = (
        f"pyheadkv {settings.versions['pyheadkv']} score, {len(outcomes)} texts up to {settings.max_tokens} tokens, seed {settings.seed}, "
        f"measured on sha256:{settings.model_sha256}"
    )
    return {
        "shares": shares.tolist(),
        "values": values.tolist(),
        "source": source,
        **how,
        "method": METHOD,
        "reliability": [round(float(r), 4) for r in found],
        "texts": [{"name": o.name, "kind": o.kind, "n_tokens": o.n_tokens} for o in outcomes],
    }
