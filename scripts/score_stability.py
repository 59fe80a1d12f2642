"""How much the importance of a model depends on how many examples, and which, it was measured on.

    pyheadkv score MODEL.gguf --method mix --examples 60 --keep -o mix.json
    pyheadkv score MODEL.gguf --method r2 --examples 60 --keep -o r2.json
    python scripts/score_stability.py MODEL.gguf mix.json.part r2.json.part -o stability.md

Rank correlations (Spearman) of the KV heads: of each run, its first N examples and its examples of one kind against the others of it;
then the runs against each other. Examples that do not count are left out.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyheadkv.eval.journal import read_lines
from pyheadkv.eval.report import table
from pyheadkv.gguf_header import read_header
from pyheadkv.layers import heads_by_layer
from pyheadkv.score.measure import kv_scores, rank_correlation

SIZES = (4, 8, 12, 24)


def scores_of(path: Path, heads: list[tuple[int, int]]) -> tuple[str, list[str], NDArray[np.float64]]:
    """What a run was, the kinds of its examples, and their scores, (n_examples, KV heads)."""
    how, entries, _ = read_lines(path)
    counted = [e for e in entries if e.get("accepted")]
    name = f"{how['method']}, {how['answers']}, {len(counted)} of {len(entries)} count"
    return name, [e["kind"] for e in counted], np.array([kv_scores(np.asarray(e["scores"]), heads) for e in counted])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.json.part", help="of pyheadkv score --keep")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md")
    args = parser.parse_args()
    heads = heads_by_layer(read_header(args.model))
    runs = [scores_of(path, heads) for path in args.runs]
    rows = []
    for name, _, scores in runs:
        cells = [f"{rank_correlation(scores[:n].mean(0), scores[n:].mean(0)):.3f}" if n < len(scores) else "" for n in SIZES]
        rows.append([name, *cells])
    pairs = [[f"{a} / {b}", f"{rank_correlation(x.mean(0), y.mean(0)):.3f}"] for (a, _, x), (b, _, y) in combinations(runs, 2)]
    others = []
    for name, kinds, scores in runs:
        for kind in dict.fromkeys(kinds) if len(set(kinds)) > 1 else ():
            mine = np.array([k == kind for k in kinds])
            others.append([f"{name}: {kind}", f"{mine.sum()}", f"{rank_correlation(scores[mine].mean(0), scores[~mine].mean(0)):.3f}"])
    lines = table(["first examples of a run, against the others", *map(str, SIZES)], rows)
    lines += ["", *table(["runs against each other", ""], pairs)]
    lines += ["", *table(["kind of example", "examples", "against the other kinds"], others)]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
