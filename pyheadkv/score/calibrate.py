"""Choose beta for measured importance, on examples that the importance was not measured on.

Each held-out example is answered with the full cache. Then its prompt is compressed under every beta of a grid, at the
same kv_size and so at the same bytes, and the full cache's own answer is read back: beta is the one under which this
answer surprises the model least (mean negative log likelihood per token). No question of an evaluation takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..eval.journal import Journal
from ..eval.trial import Setting, Trial
from ..importance_values import Importance
from .examples import Example, Examples, Slot, make_examples

if TYPE_CHECKING:
    from ..llama import Llama

BETAS = (1.01, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
N_COPIES = len(BETAS) + 1  # of a prompt: one for each of them, one with uniform budgets
KV_SIZES = (32, 64, 128)
N_EXAMPLES = 40
UNIFORM = "snapkv"
HELD_OUT_METHODS = ("r2", "er")  # reasoning and retrieval


@dataclass(frozen=True)
class Calibration:
    """How much the full cache's answers surprise the model under each beta.

    Attributes
    ----------
    betas, kv_sizes : the grid
    surprise : (n_examples, n_kv_sizes, n_betas + 1) nats per token; the last column is of uniform budgets
    """

    betas: tuple[float, ...]
    kv_sizes: tuple[int, ...]
    surprise: NDArray[np.float64]

    @property
    def beta(self) -> float:
        """The best one, over all sizes; of equals the larger."""
        mean = self.surprise[:, :, :-1].mean(axis=(0, 1))
        return max(b for b, value in zip(self.betas, mean, strict=True) if value == mean.min())

    def table(self) -> dict[str, Any]:
        """For the score file."""
        mean = self.surprise.mean(axis=0)
        return {
            "n_examples": len(self.surprise),
            "betas": list(self.betas),
            "surprise": {str(n): [round(float(x), 5) for x in row[:-1]] for n, row in zip(self.kv_sizes, mean, strict=True)},
            "surprise_uniform": {str(n): round(float(row[-1]), 5) for n, row in zip(self.kv_sizes, mean, strict=True)},
        }

    def lines(self) -> list[str]:
        """For people."""
        mean = self.surprise.mean(axis=0)
        out = ["kv_size  " + "".join(f"{b:>8g}" for b in self.betas) + " uniform   nats per token by beta"]
        for n, row in zip(self.kv_sizes, mean, strict=True):
            out.append(f"{n:>7}  " + "".join(f"{x:8.3f}" for x in row))
        return [*out, f"beta     {self.beta:g} chosen on {len(self.surprise)} held-out examples"]


class HeldOut:
    """Examples of retrieval and of reasoning, with haystacks of another seed than those that were scored."""

    def __init__(self, llm: Llama, *, max_tokens: int, n_examples: int, seed: int) -> None:
        n_each = [(n_examples + i) // len(HELD_OUT_METHODS) for i in range(len(HELD_OUT_METHODS))]
        self._sources: list[tuple[Examples, Slot]] = []
        self.stop: dict[Examples, frozenset[int]] = {}  # tokens that end an answer
        for method, n in zip(HELD_OUT_METHODS, n_each, strict=True):
            how: dict[str, Any] = {"method": method, "protocol": "clean", "max_tokens": max_tokens, "n_examples": n}
            source = make_examples(llm, **how, seed=f"held out {seed}")
            self._sources += [(source, slot) for slot in source.slots]
            self.stop[source] = frozenset(t for t in range(llm.n_vocab()) if source.is_stop(t))

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, i: int) -> tuple[Examples, Example]:
        source, slot = self._sources[i]
        return source, source.make(slot)


def calibrate(
    llm: Llama,
    importance: Importance,
    held_out: HeldOut,
    journal: Journal,
    *,
    kv_sizes: Sequence[int] = KV_SIZES,
    accept_above: float = 0.5,
) -> Calibration:
    """Surprise under every beta, for the examples that the journal does not have yet, with a progress bar.

    Parameters
    ----------
    llm : as a ``Trial`` needs it, for ``N_COPIES`` copies
    accept_above : examples that the full cache answers no better do not count

    Raises
    ------
    ValueError : the full cache answered none of the examples
    """
    from tqdm import tqdm

    trial = Trial(llm)
    trial.use("measured", importance)
    done = [entry for entry in journal.entries if "surprise" in entry]
    for i in tqdm(range(len(done), len(held_out)), desc="choosing beta", unit=" examples", leave=False, disable=None):
        source, example = held_out[i]
        entry = {"held_out": i, "surprise": _surprise(trial, source, example, held_out.stop[source], kv_sizes, accept_above)}
        journal.append(entry)
        done.append(entry)
    rows = [entry["surprise"] for entry in done if entry["surprise"] is not None]
    if not rows:
        raise ValueError(f"the model answered none of {len(done)} held-out examples with its full cache: try --max-tokens")
    return Calibration(BETAS, tuple(kv_sizes), np.array(rows, dtype=np.float64))


def _surprise(
    trial: Trial, source: Examples, example: Example, stop: frozenset[int], kv_sizes: Sequence[int], accept_above: float
) -> list[list[float]] | None:
    """(n_kv_sizes, n_betas + 1); None when the full cache does not know the answer."""
    last, n = example.tokens[-1], len(example.tokens) - 1
    full = trial.compress(Setting(), example.tokens)
    trial.go_on([full], n, [last])
    (answer,) = trial.generate([full], last, example.n_steps, stop=stop)
    trial.drop([full])
    if not answer or source.quality(source.text(answer), example.answer) <= accept_above:
        return None
    out = []
    for kv_size in kv_sizes:
        settings = [Setting("headkv", kv_size, beta=beta, importance="measured") for beta in BETAS]
        copies = [trial.compress(setting, example.tokens) for setting in (*settings, Setting(UNIFORM, kv_size))]
        trial.go_on(copies, n, [last])
        out.append(trial.surprise(copies, last, answer))
        trial.drop(copies)
    return out
