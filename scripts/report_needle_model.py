#!/usr/bin/env python3
"""Ask the needle model through llama.cpp and write bench/results/needle_model_report.md with plots.

    python scripts/report_needle_model.py --model f16=build/needle/needle-f16.gguf --model q8_0=pyheadkv/data/needle.gguf

Every question is answered greedily with the full cache; right means right word for word.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from needle import REPOSITORY, language
from numpy.typing import NDArray
from scipy.stats import binomtest
from tqdm import tqdm

from pyheadkv import Llama, gguf_keys
from pyheadkv.eval.report import table
from pyheadkv.gguf_header import read_header

N_DECILES = 10


@dataclass(frozen=True)
class ReportOptions:
    #: name in the report -> GGUF file
    models: dict[str, Path]
    out: Path
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    #: contexts per length, and questions of each kind per context
    n_contexts: int = 20
    n_each: int = 4
    seed: int = 77
    n_threads: int = 1
    #: processes, each with a share of the contexts
    n_jobs: int = 2


@dataclass
class Tally:
    """Right answers and questions asked, by (length, kind, depth decile)."""

    right: dict[tuple[int, str, int], int] = field(default_factory=Counter)
    asked: dict[tuple[int, str, int], int] = field(default_factory=Counter)

    def add(self, length: int, document: language.Document, is_right: bool) -> None:
        key = (length, document.kind, min(N_DECILES - 1, int(document.depths[0] * N_DECILES)))
        self.right[key] += is_right
        self.asked[key] += 1

    def __add__(self, other: Tally) -> Tally:
        return Tally(Counter(self.right) + Counter(other.right), Counter(self.asked) + Counter(other.asked))

    def rate(self, *, length: int | None = None, kind: str | None = None, decile: int | None = None) -> tuple[int, int]:
        """(right, asked) over everything that matches."""
        keys = [key for key in self.asked if length in (None, key[0]) and kind in (None, key[1]) and decile in (None, key[2])]
        return sum(self.right[key] for key in keys), sum(self.asked[key] for key in keys)


def answer(llm: Llama, document: language.Document) -> str:
    """Greedy continuation of the last question; the context stays in the cache for the next question."""
    completion: Any = llm.create_completion(" " + document.prompt(), max_tokens=document.n_answer_tokens, temperature=0.0)
    return str(completion["choices"][0]["text"])


def ask_share(path: Path, options: ReportOptions, share: int) -> tuple[Tally, float]:
    """Tally of one of ``n_jobs`` shares of the contexts over all lengths, and the seconds it took."""
    llm = Llama(
        str(path),
        n_ctx=max(options.lengths) + 256,
        n_batch=512,
        n_threads=options.n_threads,
        n_threads_batch=options.n_threads,
        verbose=False,
    )
    tally, started = Tally(), time.monotonic()
    for length in options.lengths:
        for i in tqdm(range(share, options.n_contexts, options.n_jobs), desc=f"{path.name} {length}, {share}", mininterval=5):
            rng = random.Random(f"{options.seed} {length} {i}")
            llm.reset()
            for document in language.make_quiz(rng, n_tokens=length, n_each=options.n_each):
                tally.add(length, document, document.is_correct(answer(llm, document)))
    return tally, time.monotonic() - started


def read_importance(path: Path) -> tuple[NDArray[np.float32], str]:
    """Importance (n_layer, n_head) of a GGUF file and where it comes from."""
    found = gguf_keys.read_importance(path)
    if found is None:
        raise ValueError(f"{path} holds no importance: write it with scripts/needle/export.py")
    return found.values.astype(np.float32), found.source


def read_n_head_kv(path: Path) -> int:
    return int(read_header(path).value("llama.attention.head_count_kv"))


def plot_importance(importance: NDArray[np.float32], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(1 + 0.7 * importance.shape[1], 1 + 0.6 * importance.shape[0]))
    image = axes.imshow(importance, cmap="viridis", aspect="auto")
    for (layer, head), value in np.ndenumerate(importance):
        axes.text(
            head,
            layer,
            f"{100 * value:.1f}",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if value > 0.6 * importance.max() else "white",
        )
    axes.set(
        xlabel="query head",
        ylabel="layer",
        title="head importance, % of all",
        xticks=range(importance.shape[1]),
        yticks=range(importance.shape[0]),
    )
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_accuracy(tallies: dict[str, Tally], options: ReportOptions, path: Path) -> None:
    figure, panels = plt.subplots(1, len(tallies), figsize=(5 * len(tallies), 3.6), squeeze=False, sharey=True)
    for axes, (name, tally) in zip(panels[0], tallies.items(), strict=True):
        for kind in language.KINDS:
            shares = [100 * right / max(1, asked) for right, asked in (tally.rate(length=n, kind=kind) for n in options.lengths)]
            axes.plot(options.lengths, shares, marker="o", label=kind)
        axes.set_xscale("log", base=2)
        axes.set(title=name, xlabel="prompt, tokens", xticks=options.lengths, xticklabels=options.lengths)
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("exact answers, %")
    panels[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cell(rate: tuple[int, int], *, interval: bool = False) -> str:
    right, asked = rate
    if asked == 0:
        return "-"
    low, high = binomtest(right, asked).proportion_ci(method="wilson")
    return f"{100 * right / asked:.1f}" + (f" ({100 * low:.0f}-{100 * high:.0f})" if interval else "")


def _accuracy_lines(name: str, tally: Tally, options: ReportOptions) -> list[str]:
    rows = [[kind, *(_cell(tally.rate(length=n, kind=kind), interval=True) for n in options.lengths)] for kind in language.KINDS]
    lines = [f"### {name}, by length: exact answers in % (95 % interval)", "", *table(["kind", *map(str, options.lengths)], rows)]
    n_asked = tally.rate(length=options.lengths[0], kind="direct")[1]
    lines += ["", f"{n_asked} direct questions per length, other kinds alike.", ""]
    lines += [f"### {name}, by depth of the value needle, all lengths: exact answers in %", ""]
    rows = [[kind, *(_cell(tally.rate(kind=kind, decile=i)) for i in range(N_DECILES))] for kind in language.KINDS]
    lines += table(["kind", *(f"{10 * i}-{10 * i + 10} %" for i in range(N_DECILES))], rows)
    lines += [
        "",
        "A list is entered at the depth of its first key. The lowest cell of one length and one tenth of the depth, of each kind:",
        "",
    ]
    for kind in language.KINDS:
        cells = [(tally.rate(length=n, kind=kind, decile=i), n, i) for n in options.lengths for i in range(N_DECILES)]
        (right, asked), length, decile = min((cell for cell in cells if cell[0][1]), key=lambda cell: cell[0][0] / cell[0][1])
        lines.append(
            f"- {kind}: {_cell((right, asked), interval=True)}, {right} of {asked} at {length} tokens, {10 * decile}-{10 * decile + 10} %"
        )
    return [*lines, ""]


def _importance_lines(importance: NDArray[np.float32], source: str, n_head_kv: int, picture: str) -> list[str]:
    by_kv = importance.reshape(len(importance), n_head_kv, -1).mean(-1)
    top = np.sort(by_kv.ravel())[::-1]
    n_quarter = max(1, len(top) // 4)
    floor = 1e-6
    ratio = by_kv.max(1) / np.maximum(by_kv.min(1), floor)
    busiest = int(by_kv.sum(1).argmax())
    lines = ["## Head importance", "", f"Source: `{source}`. Sums to 100 %.", "", f"![importance]({picture})", ""]
    head = ["layer", *(f"head {h}" for h in range(importance.shape[1])), "max / min of its KV heads"]
    lines += table(head, [[str(il), *(f"{100 * x:.2f}" for x in row), f"{min(ratio[il], 9999):.1f}"] for il, row in enumerate(importance)])
    lines += [
        "",
        f"The top quarter of the KV heads ({n_quarter} of {len(top)}) holds {100 * top[:n_quarter].sum() / top.sum():.1f} % "
        f"of the mass. In layer {busiest}, which holds most, KV heads differ by a factor of {ratio[busiest]:.1f}.",
        "",
    ]
    return lines


def write_report(tallies: dict[str, Tally], seconds: dict[str, float], options: ReportOptions) -> None:
    path = next(iter(options.models.values()))
    importance, source = read_importance(path)
    folder = options.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    name = options.out.stem.removesuffix("_report")
    plot_importance(importance, folder / f"{name}_importance.png")
    plot_accuracy(tallies, options, folder / f"{name}_accuracy.png")
    lines = [
        "# Needle model",
        "",
        "Made by `scripts/report_needle_model.py` through llama.cpp, full cache, greedy; "
        f"seed {options.seed}, {options.n_contexts} contexts per length, up to {options.n_each} questions of each kind in each.",
        "",
    ]
    for model, file in options.models.items():
        lines.append(
            f"- {model}: {file.stat().st_size / 1e6:.2f} MB, {seconds[model]:.0f} s for all questions on {options.n_threads} thread(s)"
        )
    lines += ["", "## Accuracy", "", f"![accuracy]({name}_accuracy.png)", ""]
    for model, tally in tallies.items():
        lines += _accuracy_lines(model, tally, options)
    lines += _importance_lines(importance, source, read_n_head_kv(path), f"{name}_importance.png")
    options.out.write_text("\n".join(lines), encoding="utf-8")


def _parse() -> ReportOptions:
    shipped = REPOSITORY / "pyheadkv" / "data" / "needle.gguf"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="NAME=FILE", help=f"default: q8_0={shipped.name} as shipped")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench" / "results" / "needle_model_report.md")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(ReportOptions.lengths))
    parser.add_argument("--contexts", type=int, default=ReportOptions.n_contexts)
    parser.add_argument("--questions", type=int, default=ReportOptions.n_each, help="of each kind per context")
    parser.add_argument("--seed", type=int, default=ReportOptions.seed)
    parser.add_argument("--threads", type=int, default=ReportOptions.n_threads)
    parser.add_argument("--jobs", type=int, default=ReportOptions.n_jobs, help="processes, each with a share of the contexts")
    a = parser.parse_args()
    pairs = [entry.partition("=") for entry in a.model or [f"q8_0={shipped}"]]
    models = {name: Path(file) for name, _, file in pairs}
    return ReportOptions(models, a.out, tuple(a.lengths), a.contexts, a.questions, a.seed, a.threads, a.jobs)


def main() -> None:
    options = _parse()
    with ProcessPoolExecutor(options.n_jobs) as pool:
        running = {
            name: [pool.submit(ask_share, path, options, share) for share in range(options.n_jobs)] for name, path in options.models.items()
        }
        done = {name: [future.result() for future in futures] for name, futures in running.items()}
    tallies = {name: sum((tally for tally, _ in shares), Tally()) for name, shares in done.items()}
    seconds = {name: sum(spent for _, spent in shares) for name, shares in done.items()}
    write_report(tallies, seconds, options)
    print(options.out)


if __name__ == "__main__":
    sys.exit(main())
