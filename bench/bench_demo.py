"""What ``pyheadkv demo`` is to ask, how long its prompts are and how much is kept: shares of right answers over many seeds.

    python bench/bench_demo.py MODEL.gguf --ask passkey:1000,passkey:500 --seeds 20 --out bench/results/demo_seeds.csv

The first question of ``pyheadkv demo --seed 0``, ``--seed 1``, ... under every setting. "paper" is the preset of the papers: a
window of 8 queries in place of 64, which is read by a context of its own. FILE.md beside FILE.csv has the shares.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from pyheadkv.demo import answer, make_asks, open_trial
from pyheadkv.journal import commit, machine
from pyheadkv.options import AUTO, FULL
from pyheadkv.quiz import TaskOptions
from pyheadkv.tasks import make_task
from pyheadkv.trial import Setting

POLICIES = {"default": (AUTO, "snapkv", "streaming"), "paper": ("headkv", "snapkv")}


def ask_all(args: argparse.Namespace, task: str, n_tokens: int) -> list[dict[str, Any]]:
    """One row per seed and setting."""
    rows = []
    for preset, policies in POLICIES.items():
        trial = open_trial(args.model, n_tokens=n_tokens, n_threads=args.threads, preset=preset)
        settings = [Setting(policy, int(n)) for n in args.kv_size.split(",") for policy in policies]
        for seed in range(args.seeds):
            source = make_task(trial.llm, TaskOptions(task, n_tokens, n_each=1, seed=seed))
            (ask,) = make_asks(source, 1)
            for setting in [Setting(), *settings] if preset == "default" else settings:
                given = answer(trial, ask, setting, stop=source.stop_tokens)
                rows.append({
                    "task": ask.kind, "tokens": n_tokens, "seed": seed, "preset": preset, "policy": setting.policy, "used": given.policy,
                    "kv_size": setting.kv_size, "right": int(given.is_right), "bytes": given.held.cells, "answer": ask.answer,
                    "text": " ".join(given.text.split()),
                })  # fmt: skip
            print(f"{task} {n_tokens}, preset {preset}: seed {seed}", file=sys.stderr, flush=True)
        trial.llm.close()
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Shares of right answers, one line per task, length and amount."""
    shares: dict[tuple[str, int, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    full: dict[tuple[str, int], list[int]] = defaultdict(list)
    for row in rows:
        name = row["policy"] if row["preset"] == "default" else f"{row['policy']}, paper"
        if row["policy"] == FULL:
            full[row["task"], row["tokens"]].append(row["right"])
        else:
            shares[row["task"], row["tokens"], row["kv_size"]][name].append(row["right"])
    names = [name if preset == "default" else f"{name}, paper" for preset, policies in POLICIES.items() for name in policies]
    lines = ["| task | tokens | full | cells per head | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for (task, n_tokens, kv_size), right in shares.items():
        cells = [f"{100 * sum(right[name]) / len(right[name]):.0f} %" for name in names]
        whole = full[task, n_tokens]
        lines.append(f"| {task} | {n_tokens} | {100 * sum(whole) / len(whole):.0f} % | {kv_size} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--ask", default="passkey:1000", metavar="LIST", help="tasks and lengths in tokens (default: %(default)s)")
    parser.add_argument("--kv-size", default="64,80,96,128,160", metavar="LIST", help="cells per KV head (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    args = parser.parse_args()
    begin = time.perf_counter()
    pairs = [part.split(":") for part in args.ask.split(",")]
    rows = [row for task, n_tokens in pairs for row in ask_all(args, task, int(n_tokens))]
    command = "python " + " ".join([sys.argv[0], args.model.name, *sys.argv[2:]])
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "commit", "machine", "command"])
        writer.writeheader()
        writer.writerows({**row, "commit": commit(), "machine": machine(), "command": command} for row in rows)
    minutes = (time.perf_counter() - begin) / 60
    head = [f"    {command}", "", f"{args.seeds} seeds; commit {commit()}; {machine()}, {minutes:.0f} minutes", ""]
    args.out.with_suffix(".md").write_text("\n".join([*head, *table(rows)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
