"""What ``pyheadkv demo`` is to ask, how long its prompts are and how much is kept: right answers over many seeds.

    python bench/bench_demo.py MODEL.gguf --ask passkey:1000,passkey:500 --seeds 20 --out bench/results/demo_seeds.csv

The first questions of ``pyheadkv demo --seed 0``, ``--seed 1``, ... under every setting. "paper" is the preset of the
papers: a window of 8 queries in place of 64. FILE.md beside FILE.csv has the shares.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from pyheadkv.cli.demo import answer, make_asks, open_trial
from pyheadkv.eval.journal import commit, machine
from pyheadkv.eval.quiz import TaskOptions
from pyheadkv.eval.report import table as markdown
from pyheadkv.eval.tasks import make_task
from pyheadkv.eval.trial import Setting
from pyheadkv.options import AUTO, FULL

METHODS = ((AUTO, ""), ("snapkv", ""), ("headkv", "paper"), ("snapkv", "paper"), ("streaming", ""))  # policies and presets

COLUMNS = ("task", "tokens", "seed", "method", "used", "kv_size", "right", "bytes", "answer", "text", "commit", "machine")


def ask_all(args: argparse.Namespace, task: str, n_tokens: int) -> Iterator[dict[str, Any]]:
    """One row per seed and setting."""
    trial = open_trial(args.model, n_tokens=n_tokens, n_threads=args.threads)
    sizes = [int(n) for n in args.kv_size.split(",")]
    settings = [Setting(), *(Setting(policy, n, preset=preset) for n in sizes for policy, preset in METHODS)]
    for seed in range(args.first, args.first + args.seeds):
        source = make_task(trial.llm, TaskOptions(task, n_tokens, n_each=1, seed=seed))
        for ask, setting in product(make_asks(source, args.questions), settings):
            given = answer(trial, ask, setting, stop=source.stop_tokens)
            yield {
                "task": ask.kind, "tokens": n_tokens, "seed": seed, "method": setting.method, "used": given.policy,
                "kv_size": setting.kv_size, "right": int(given.is_right), "bytes": given.held.cells, "answer": ask.answer,
                "text": " ".join(given.text.split()),
            }  # fmt: skip
        print(f"{task} {n_tokens}: seed {seed}", file=sys.stderr, flush=True)
    trial.llm.close()


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Shares of right answers, one line per task, length and amount."""
    right: dict[tuple[str, int, int, str], list[int]] = defaultdict(list)
    for row in rows:
        right[row["task"], row["tokens"], row["kv_size"], row["method"]].append(row["right"])
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != FULL))
    lines = []
    for task, n_tokens, kv_size in dict.fromkeys(place[:3] for place in right if place[3] != FULL):
        places = [(task, n_tokens, 0, FULL), *((task, n_tokens, kv_size, method) for method in methods)]
        shares = [f"{100 * sum(right[place]) / len(right[place]):.0f} %" for place in places]
        lines.append([task, str(n_tokens), str(kv_size), *shares])
    return markdown(["task", "tokens", "cells per head", "full", *methods], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--ask", default="passkey:1000", metavar="LIST", help="tasks and lengths in tokens (default: %(default)s)")
    parser.add_argument("--kv-size", default="64,80,88,96,128,160", metavar="LIST", help="cells per KV head (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--questions", type=int, default=1, metavar="N", help="of each seed (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first seed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    args = parser.parse_args()
    begin = time.perf_counter()
    command = "python " + " ".join([sys.argv[0], args.model.name, *sys.argv[2:]])
    rows: list[dict[str, Any]] = []
    where = {"commit": commit(), "machine": machine()}
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for part in args.ask.split(","):
            task, n_tokens = part.split(":")
            for row in ask_all(args, task, int(n_tokens)):
                rows.append(row)
                writer.writerow({**row, **where})
                file.flush()
    minutes = (time.perf_counter() - begin) / 60
    head = [
        f"    {command}",
        "",
        f"seeds {args.first} to {args.first + args.seeds - 1}, {args.questions} questions each; commit {where['commit']}; {where['machine']}, {minutes:.0f} minutes",
        "",
    ]
    args.out.with_suffix(".md").write_text("\n".join([*head, *table(rows)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
