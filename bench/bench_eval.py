"""Time of an evaluation whose settings are decoded in one batch, against one setting after the other; the answers are compared.

    python bench/bench_eval.py qwen25-coder-0.5b.gguf --out bench/results/eval_batch.csv

Both ways take turns on the same contexts, with one thread. Reading the prompts is part of both, and is also named alone.
"""

from __future__ import annotations

import argparse
import csv
import time
from itertools import product
from pathlib import Path
from typing import Any

from pyheadkv.eval import run as evaluate
from pyheadkv.eval.journal import commit, machine
from pyheadkv.eval.quiz import TaskOptions
from pyheadkv.eval.trial import Setting, Trial

POLICIES, SIZES = ("headkv", "snapkv", "streaming"), (64, 128, 256, 512)


class Clock:
    """Seconds in ``Trial.read``, beside those of all."""

    def __init__(self) -> None:
        self.reading = 0.0
        read = Trial.read

        def timed(trial: Trial, *args: Any) -> None:
            start = time.perf_counter()
            read(trial, *args)
            self.reading += time.perf_counter() - start

        Trial.read = timed  # type: ignore[method-assign, assignment]


def make_worker(model: Path, n_tokens: int, task: str, n_copies: int) -> evaluate.Worker:
    """Settings in batches of ``n_copies``."""
    settings = (Setting(), *(Setting(policy, n) for policy, n in product(POLICIES, SIZES)))
    evaluate.MAX_COPIES = n_copies
    return evaluate.Worker(evaluate.Job(model, (TaskOptions(task, n_tokens),), settings, evaluate.DEFAULT_PROTOCOLS, {}, 1, 0))


def main() -> None:
    """A row for each context and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", default="niah", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--contexts", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    clock = Clock()
    workers = {n: make_worker(args.model, args.tokens, args.task, n) for n in (1, 32)}
    fields = [
        "model",
        "task",
        "tokens",
        "context",
        "copies",
        "seconds",
        "seconds_reading",
        "answers",
        "same_as_one_by_one",
        "right",
        "commit",
        "machine",
    ]
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for i in range(args.contexts):
            texts: dict[int, dict[tuple[Any, ...], str]] = {}
            for n, worker in workers.items():
                clock.reading, start = 0.0, time.perf_counter()
                answers = worker.run(0, i)["answers"]
                seconds = time.perf_counter() - start
                texts[n] = {(a["protocol"], a["setting"], a["ask"]): a["text"] for a in answers}
                writer.writerow({
                    "model": args.model.name, "task": args.task, "tokens": args.tokens, "context": i, "copies": n,
                    "seconds": round(seconds, 2), "seconds_reading": round(clock.reading, 2), "answers": len(answers),
                    "same_as_one_by_one": sum(texts[1][key] == text for key, text in texts[n].items()),
                    "right": sum(a["score"] for a in answers), "commit": commit(), "machine": machine(),
                })  # fmt: skip
                file.flush()


if __name__ == "__main__":
    main()
