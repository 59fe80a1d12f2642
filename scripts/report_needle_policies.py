#!/usr/bin/env python3
"""Compare cache policies on the needle model at equal bytes and write bench/results/needle_policies.{md,csv,png}.

    python scripts/report_needle_policies.py --contexts 40 --jobs 2

Each question is read together with its haystack, with full attention; then each policy compresses that prompt, its last
token is evaluated again against the compressed cache (strict: the first answer token is judged too), and the answer is
generated greedily. Right means right word for word. A follow-up is asked after another question was answered, on the
cache that was compressed for that one. All policies see the same questions.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from pyheadkv import Llama, embedded_model, needle
from report_needle_model import table_row, wilson

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
#: cells before the question that are read again with it, so that the window has its queries
N_OVERLAP = 64
N_BOOTSTRAP = 4000


@dataclass(frozen=True, order=True)
class Config:
    """One way to compress."""

    policy: str
    kv_size: int = 0  # 0: everything is kept
    pool: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.policy, self.pool, str(self.kv_size or ""))))


FULL = Config("full")


@dataclass(frozen=True)
class Result:
    """One answer: context number, kind of question, whether it is right, bytes that the cells take."""

    i_context: int
    kind: str
    config: Config
    right: bool
    n_bytes: int


def greedy(llm: Llama, token: int, n: int) -> list[int]:
    """n tokens after ``token``, which is evaluated first."""
    out: list[int] = []
    while len(out) < n:
        llm.eval([token])
        token = int(llm.last_logits.argmax())
        out.append(token)
    return out


def truncate(llm: Llama, n: int) -> None:
    """Keep the first n tokens."""
    if not llm._ctx.kv_cache_seq_rm(0, n, -1):
        raise RuntimeError(f"the cache cannot be truncated to {n} tokens")
    llm.n_tokens = n


def cell_bytes(llm: Llama) -> int:
    """Bytes of K and V in all heads, without the rows that wait for generated tokens."""
    stats = llm.kv_stats()
    n_full = stats.n_cells.size * stats.n_past
    return round(stats.bytes_full * int(stats.n_cells.sum()) / n_full)


def answer(llm: Llama, document: needle.Document, config: Config) -> tuple[bool, int]:
    """Compress the prompt that is staged, up to its first question, and answer the last one."""
    first = [needle.BOS, *needle.encode(document.prompt(1))]
    whole = [needle.BOS, *needle.encode(document.prompt())]
    expected = needle.encode(document.answer)
    if config.kv_size:
        pool = {"pool": config.pool} if config.pool else {}
        llm.configure(policy=config.policy, kv_size=config.kv_size, **pool)
    else:
        llm.configure(policy="snapkv", kv_size=llm.n_ctx())
    llm.eval(first[llm.n_tokens :])
    llm.end_prompt()
    n_bytes = cell_bytes(llm)
    truncate(llm, len(first) - 1)
    if llm.n_tokens < len(whole) - 1:
        llm.eval(whole[llm.n_tokens : -1])
    right = greedy(llm, whole[-1], len(expected)) == expected
    llm.restore_prompt(len(first) - 1)
    return right, n_bytes


def ask_context(model: str, i: int, configs: list[Config], n_tokens: int, n_each: int, seed: int, n_threads: int) -> list[Result]:
    """All questions about one haystack, under all configs."""
    llm = Llama(model, kv_size=64, keep_prompt=True, n_ctx=n_tokens + 512, n_threads=n_threads, n_threads_batch=n_threads, verbose=False)
    quiz = needle.make_quiz(random.Random(f"{seed} {n_tokens} {i}"), n_tokens=n_tokens, n_each=n_each)
    haystack = [needle.BOS, *needle.encode(quiz[0].context)]
    llm.eval(haystack)
    out = []
    for document in quiz:
        truncate(llm, len(haystack) - N_OVERLAP)
        for config in configs:
            out.append(Result(i, document.kind, config, *answer(llm, document, config)))
    llm.close()
    return out


def difference(results: list[Result], a: Config, b: Config, kinds: set[str], rng: np.random.Generator) -> tuple[float, float, float]:
    """Share of right answers of ``a`` less that of ``b``, and its 95 % interval over contexts (bootstrap)."""
    gains: dict[int, list[int]] = defaultdict(list)
    for result in results:
        if result.kind in kinds and result.config in (a, b):
            gains[result.i_context].append(result.right if result.config == a else -result.right)
    sums = np.array([sum(g) for g in gains.values()], dtype=float)
    counts = np.array([len(g) / 2 for g in gains.values()])
    pick = rng.integers(len(sums), size=(N_BOOTSTRAP, len(sums)))
    shares = sums[pick].sum(1) / counts[pick].sum(1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(sums.sum() / counts.sum()), float(low), float(high)


def rate(results: list[Result], config: Config, kind: str | None = None) -> tuple[int, int]:
    """(right, asked)."""
    mine = [r.right for r in results if r.config == config and kind in (None, r.kind)]
    return sum(mine), len(mine)


def _percent(right_asked: tuple[int, int]) -> str:
    right, asked = right_asked
    low, high = np.abs(wilson(right, asked))
    return f"{100 * right / asked:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def write_markdown(path: Path, results: list[Result], configs: list[Config], command: str, args: argparse.Namespace) -> None:
    """Tables of accuracy and of paired differences."""
    kinds = [kind for kind in needle.KINDS if any(r.kind == kind for r in results)]
    n_bytes = {config: float(np.mean([r.n_bytes for r in results if r.config == config])) for config in configs}
    lines = ["# Cache policies on the needle model", "", f"`{command}`: haystacks of {args.tokens} tokens, {args.contexts} of them, "
             "strict (the last prompt token runs against the compressed cache), greedy, exact answers in % with 95 % intervals. "
             "KiB: cells held after compression, the same for all policies at one kv_size up to rounding.", "",
             "![accuracy](needle_policies.png)", "", table_row(["policy", "KiB", *kinds, "all"]), table_row(["---"] * (3 + len(kinds)))]
    for config in configs:
        cells = [_percent(rate(results, config, kind)) for kind in kinds]
        lines.append(table_row([config.name, f"{n_bytes[config] / 1024:.0f}", *cells, _percent(rate(results, config))]))
    n_asked = {kind: rate(results, FULL, kind)[1] for kind in kinds}
    lines += ["", "Questions: " + ", ".join(f"{n} {kind}" for kind, n in n_asked.items()) + ".", "",
              "## Importance against uniform budgets", "",
              "headkv less snapkv in points, same questions, same bytes; interval by bootstrap over contexts.", "",
              table_row(["pool", "kv_size", *kinds, "all"]), table_row(["---"] * (3 + len(kinds)))]
    rng = np.random.default_rng(0)
    for config in configs:
        other = Config("snapkv", config.kv_size, config.pool)
        if config.policy == "headkv" and other in configs:
            cells = []
            for chosen in [{kind} for kind in kinds] + [set(kinds)]:
                mean, low, high = difference(results, config, other, chosen, rng)
                cells.append(f"{100 * mean:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})")
            lines.append(table_row([config.pool, str(config.kv_size), *cells]))
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def plot(path: Path, results: list[Result], configs: list[Config]) -> None:
    """Accuracy over kv_size, one panel per kind of question."""
    kinds: list[str | None] = [*(k for k in needle.KINDS if any(r.kind == k for r in results)), None]
    figure, panels = plt.subplots(2, 3, figsize=(13, 7), sharey=True)
    for axes, kind in zip(panels.flat, kinds):
        for policy, pool in dict.fromkeys((c.policy, c.pool) for c in configs if c.kv_size):
            mine = sorted(c for c in configs if (c.policy, c.pool) == (policy, pool))
            shares = [100 * right / asked for right, asked in (rate(results, c, kind) for c in mine)]
            axes.plot([c.kv_size for c in mine], shares, marker="o", ls="--" if pool == "avg" else "-", label=f"{policy} {pool}".strip(),
                      color={"headkv": "C0", "snapkv": "C1", "streaming": "C2"}[policy])
        right, asked = rate(results, FULL, kind)
        axes.axhline(100 * right / asked, color="grey", ls=":", label="full cache")
        axes.set_xscale("log", base=2)
        sizes = sorted({c.kv_size for c in configs if c.kv_size})
        axes.set(title=kind or "all", xlabel="cells per KV head", xticks=sizes, xticklabels=sizes, ylim=(-3, 103))
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("exact answers, %")
    panels.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=embedded_model(), help="needle model (default: the embedded one)")
    parser.add_argument("--tokens", type=int, default=4096, help="of a prompt (default: %(default)s)")
    parser.add_argument("--contexts", type=int, default=40, help="haystacks (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=2, help="of each kind per haystack (default: %(default)s)")
    parser.add_argument("--kv-size", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="cells per KV head (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=99, help="of the haystacks (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="haystacks at the same time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="per job (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "needle_policies.md", help="report (default: %(default)s)")
    args = parser.parse_args()
    configs = [FULL, *(Config("streaming", n) for n in args.kv_size)]
    configs += [Config(policy, n, pool) for policy, pool, n in product(("snapkv", "headkv"), ("max", "avg"), args.kv_size)]
    results: list[Result] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        running = [pool.submit(ask_context, str(args.model), i, configs, args.tokens, args.questions, args.seed, args.threads)
                   for i in range(args.contexts)]
        for future in tqdm(running, desc="haystacks"):
            results += future.result()
    command = "python scripts/report_needle_policies.py " + " ".join(sys.argv[1:])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_markdown(args.out, results, configs, command.strip(), args)
    plot(args.out.with_suffix(".png"), results, configs)
    with args.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "pool", "kv_size", "kind", "right", "asked", "cell_bytes"])
        for config, kind in product(configs, needle.KINDS):
            mine = [r.n_bytes for r in results if r.config == config and r.kind == kind]
            if mine:
                writer.writerow([config.policy, config.pool, config.kv_size, kind, *rate(results, config, kind), round(float(np.mean(mine)))])
    print(args.out)


if __name__ == "__main__":
    main()
