"""Shorten the contexts of a file for `pyheadkv eval longbench`, so that small models on a CPU can be asked many questions.

    python scripts/shorten_longbench.py FILE.jsonl OUT.jsonl --words 1350 --contexts 5:15

A context is cut at blank lines into passages. Those that have an answer to one of its questions stay, and the others from
the beginning on, as many as fit, all in their order. Contexts that are too long without the others are left out, and so
are questions whose answers are in no passage. Rows with the same context must be consecutive, and stay so.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any


def shorten(passages: list[str], answers: list[list[str]], *, n_words: int) -> str | None:
    """A context of at most n_words, or None if the passages with answers are longer."""
    known = {i for i, passage in enumerate(passages) for some in answers if has_answer(passage, some)}
    n_left = n_words - sum(len(passages[i].split()) for i in known)
    if n_left < 0:
        return None
    for i, passage in enumerate(passages):
        if i not in known and len(passage.split()) <= n_left:
            known.add(i)
            n_left -= len(passage.split())
    return "\n\n".join(passages[i] for i in sorted(known))


def has_answer(text: str, answers: list[str]) -> bool:
    """Whether one of the answers is in the text, in any case."""
    return any(answer.lower() in text.lower() for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.jsonl")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--words", type=int, default=1350, metavar="N", help="of a context at most (default: %(default)s)")
    parser.add_argument("--contexts", default=":", metavar="START:END", help="which ones (default: all)")
    args = parser.parse_args()
    start, end = (int(n) if n else None for n in args.contexts.split(":"))
    rows = [json.loads(line) for line in args.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["context"])][start:end]
    kept: list[dict[str, Any]] = []
    for group in groups:
        asked = [row for row in group if has_answer(row["context"], row["answers"])]
        context = shorten(group[0]["context"].split("\n\n"), [row["answers"] for row in asked], n_words=args.words)
        if context is not None:
            kept += [{**row, "context": context, "length": len(context.split())} for row in asked]
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    print(f"{len(kept)} of {sum(map(len, groups))} questions about {len({row['context'] for row in kept})} of {len(groups)} contexts")


if __name__ == "__main__":
    main()
