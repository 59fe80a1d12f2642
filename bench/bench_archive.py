"""Time to the first token, and memory, over the turns of a chat about one document: with the archive, without it, and stock.

Every kind of cache runs in a process of its own. The turns are the same for all: a document, short questions, and answers
of a fixed length that are evaluated token by token, as if they had been generated.

    python bench/bench_archive.py MODEL.gguf --tokens 8192 --out bench/results/archive

``stock``         the stock cache, which has the whole chat in memory: its best case
``stock restart`` the same in a new process at each turn, which reads the whole chat
``again``         kv_size=128 without an archive: reads the whole chat at each turn, too
``archive``       the same with an archive in a folder
``archive restart`` the same in a new process at each turn
``reuse``, ``razor`` kv_reuse with a quarter of the prompt, what "auto" takes and whole heads: goes on in what was kept
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pyheadkv.eval.journal import commit, machine
from pyheadkv.units import format_bytes

KINDS = ("stock", "stock restart", "again", "archive", "archive restart", "reuse", "razor")
REUSE = {"reuse": "auto", "razor": "razor"}
QUESTIONS = (
    "What is the first thing that the text says?",
    "Who is mentioned most often, and why?",
    "Name a place in the text and what happened there.",
    "Is there a sentence with a question in it? Quote it.",
    "What would you ask the author?",
    "Which sentence would you leave out?",
    "What is the last thing that the text says?",
    "Summarise the text in one sentence.",
)


def chat(llm: Any, n_tokens: int, n_answer: int, n_turns: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of the turns and the answers between them."""
    from pyheadkv.eval.prose import Prose

    prose, rng = Prose(llm), random.Random(seed)
    text = [token for sentence in prose.haystack(rng, n_tokens) for token in sentence]
    while len(text) < n_tokens:
        text += [token for sentence in prose.haystack(rng, n_tokens - len(text)) for token in sentence] or text[:64]
    before, after = prose.frame(QUESTIONS[0])
    prompt, prompts, answers = [*before, *text[:n_tokens], *after], [], []
    for i in range(n_turns):
        prompts.append(prompt)
        answers.append(text[64 * i : 64 * i + n_answer])
        prompt = [*prompt, *answers[-1], *prose.reply(QUESTIONS[(i + 1) % len(QUESTIONS)])]
    return prompts, answers


def digest(llm: Any) -> str:
    """Of the logits after the prompt and of what every head kept."""
    kept = [llm.kv_positions(il, ih).tobytes() for il, ih in zip(*llm.kv_budget.nonzero(), strict=True)]
    return hashlib.sha256(b"".join([llm.last_logits.tobytes(), *kept])).hexdigest()[:16]


def rss() -> int:
    """Resident bytes of no file."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def run(args: argparse.Namespace, kind: str, folder: str, turns: range) -> list[dict[str, Any]]:
    """Some turns in this process; those before the first one are not had."""
    from pyheadkv import Llama

    options: dict[str, Any] = {}
    if kind in REUSE:
        options = {"policy": REUSE[kind], "kv_ratio": 0.25, "kv_reuse": True}
    elif not kind.startswith("stock"):
        options = {"kv_size": args.kv_size}
    if kind.startswith("archive"):
        options |= {"kv_archive": folder, "kv_archive_type": args.type}
    n_ctx = -(-(args.tokens + 1024) // 256) * 256
    llm = Llama(
        args.model, n_ctx=n_ctx, n_threads=args.threads, n_threads_batch=args.threads, flash_attn=True, seed=0, verbose=False, **options
    )
    prompts, answers = chat(llm, args.tokens, args.answer, args.turns, args.seed)
    rows = []
    for turn in turns:
        start = time.perf_counter()
        token = next(llm.generate(prompts[turn], temp=0.0))
        seconds = time.perf_counter() - start
        stats = None if llm.kv_options is None else llm.kv_stats()
        outcome = "" if stats is None or kind in REUSE else digest(llm)
        for answer in answers[turn]:
            llm.eval([answer])
        full = llm.n_ctx() * args.token_bytes
        rows.append(
            {
                "kind": kind,
                "turn": turn + 1,
                "tokens": len(prompts[turn]),
                "archived": 0 if stats is None else stats.n_archived,
                "disk": sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()),
                "seconds": round(seconds, 4),
                "first_token": token,
                "outcome": outcome,
                "kv_bytes": full if stats is None else stats.bytes_store,
                "kv_peak": full if stats is None else stats.bytes_peak,
                "rss": rss(),
            }
        )
    llm.close()
    return rows


def in_process(argv: list[str], kind: str, folder: str, turns: range) -> list[dict[str, Any]]:
    """``run`` in a new one."""
    one = json.dumps([kind, folder, turns.start, turns.stop])
    done = subprocess.run([sys.executable, __file__, *argv, "--one", one], stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(args: argparse.Namespace, argv: list[str]) -> list[dict[str, Any]]:
    """All kinds, each from its first turn; those that read all at each turn have fewer."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind in args.kinds.split(","):
            slow = kind in ("stock restart", "again")
            turns = range(min(2, args.turns) if slow else args.turns)
            if kind.endswith("restart"):
                if kind == "archive restart":
                    in_process(argv, "archive", f"{folder}/restart", range(1))
                steps = [range(i, i + 1) for i in turns if i > 0]
            else:
                steps = [turns]
            for step in steps:
                rows += in_process(argv, kind, f"{folder}/{kind.split()[-1]}", step)
                print(rows[-1], file=sys.stderr)
    return rows


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """A table: medians of the turns after the first one."""
    lines = [
        f"# {args.model.stem}, a document of {args.tokens} tokens, {args.turns} turns",
        "",
        f"{machine()}, {args.threads} threads, commit {commit()}, kv_size {args.kv_size}, "
        f"archive {args.type or 'as the cache has them'}. Seconds to the first token of a turn.",
        "",
        "| | turn 1 | later turns, median | tokens read, median | K and V held | peak of K and V | on disk | resident, last turn |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        first, later = [row for row in mine if row["turn"] == 1], [row for row in mine if row["turn"] > 1]
        n_read = [row["tokens"] - row["archived"] for row in later]
        if kind == "stock" or kind in REUSE:
            n_read = [b["tokens"] - a["tokens"] - args.answer for a, b in zip(mine, mine[1:], strict=False)]
        lines.append(
            f"| {kind} | {first[0]['seconds'] if first else '-'} | {statistics.median(row['seconds'] for row in later):.3f} | "
            f"{statistics.median(n_read):.0f} | {format_bytes(later[-1]['kv_bytes'])} | {format_bytes(max(row['kv_peak'] for row in later))} | "
            f"{format_bytes(later[-1]['disk']) if later[-1]['disk'] else '-'} | {format_bytes(later[-1]['rss'])} |"
        )
    outcomes: dict[int, set[str]] = {}
    for row in rows:
        if row["outcome"]:
            outcomes.setdefault(row["turn"], set()).add(row["outcome"])
    what = "bit-identical" if all(len(found) == 1 for found in outcomes.values()) else "DIFFERENT"
    lines += ["", f"Logits after the prompt and kept positions of all heads, with the archive and without it, turn by turn: {what}."]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Seconds, and bytes of K and V, over the turns."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    times, sizes = figure.subplots(1, 2)
    colors = {"stock": "#888888", "stock restart": "#bbbbbb", "again": "#4c72b0", "archive": "#c1440e", "archive restart": "#e39a78",
              "reuse": "#4f8f4f", "razor": "#9a6fb0"}  # fmt: skip
    for kind, color in colors.items():
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            turns = [row["turn"] for row in mine]
            times.plot(turns, [row["seconds"] for row in mine], marker="o", ms=4, color=color, label=kind)
            if "restart" not in kind:
                sizes.plot(turns, [row["kv_bytes"] / 2**20 for row in mine], marker="o", ms=4, color=color, label=kind)
    times.set(xlabel="turn", ylabel="seconds to the first token", yscale="log")
    sizes.set(xlabel="turn", ylabel="MiB of K and V held", yscale="log")
    times.set_title(title, loc="left", fontsize=10)
    times.legend(fontsize=8, frameon=False)
    for axes in (times, sizes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="of the document (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--answer", type=int, default=32, metavar="N", help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--kv-size", type=int, default=128, metavar="N", help="cells (default: %(default)s)")
    parser.add_argument("--type", help="of the archive (default: as the cache has them)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="(default: %(default)s)")
    parser.add_argument("--folder", help="on which the archive is made (default: that for temporary files)")
    parser.add_argument("--out", type=Path, metavar="PREFIX", help="of a .csv, .md and .png to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()

    from pyheadkv.model import read_shape

    args.token_bytes = read_shape(args.model).token_bytes
    if args.one:
        kind, folder, start, stop = json.loads(args.one)
        print(json.dumps(run(args, kind, folder, range(start, stop))))
        return
    rows = measure(args, sys.argv[1:])
    text = report(rows, args)
    print(text)
    if args.out:
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")
        with args.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        draw(rows, args.out.with_suffix(".png"), args.model.stem)


if __name__ == "__main__":
    main()
