"""How much the replay table of a model depends on the texts, and what it has to do with importance.

    pyheadkv score MODEL.gguf --method replay --threads 1 --keep -o RUN.json > RUN.log
    python scripts/replay_stability.py MODEL.gguf,RUN.json,RUN.log ... -o stability.md

RUN.json.part, which --keep leaves, has the table of every text. Spreads are those between texts, in percent of a head's mean, median over
the heads that keep so much (their number). Correlations are of ranks (Spearman), over the KV heads.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyheadkv.eval.journal import commit, machine, read_lines
from pyheadkv.eval.report import table
from pyheadkv.gguf_header import read_header
from pyheadkv.importance import find_importance
from pyheadkv.layers import heads_by_layer
from pyheadkv.score.measure import kv_scores, rank_correlation, write_json
from pyheadkv.score.replay import SHARES, Outcome, head_shares, outcomes_of_entries

BIG, FEW, MOST = 1 / 4, 1 / 64, 2 / 3  # of a prompt
AT = SHARES.index(1 / 8)


def spread(values: NDArray[np.float64], least: float) -> str:
    """Median of the relative s.d. between texts, over the heads that keep more than ``least``; values (n_text, n_head)."""
    mean = values.mean(0)
    chosen = mean > least
    return f"{100 * np.median(values.std(0, ddof=1)[chosen] / mean[chosen]):.0f} ({chosen.sum()})" if chosen.any() else ""


def read_run(run: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """The score file of a run, and its texts."""
    made = json.loads(run.read_text(encoding="utf-8"))
    return made, outcomes_of_entries(read_lines(run.with_name(run.name + ".part"))[1], name=str(run))


def report(model: Path, made: dict[str, Any], outcomes: Sequence[Outcome], log: Path | None) -> list[str]:
    """The tables of one model."""
    heads = heads_by_layer(read_header(model))
    found = find_importance(model)
    importance = None if found is None else kv_scores(found.importance.values, heads)
    values = head_shares(np.array([o.values for o in outcomes]), heads)
    kinds = np.array([o.kind for o in outcomes])
    names = list(dict.fromkeys(kinds))

    rows = []
    for i, share in enumerate(SHARES):
        mine, mean = values[:, i], values[:, i].mean(0)
        others = [rank_correlation(mine[kinds == k].mean(0), mine[kinds != k].mean(0)) for k in names]
        with_r2 = "" if importance is None else f"{rank_correlation(mean, importance):.2f}"
        cells = (made["reliability"][i], min(others))
        counts = [str((mean > MOST).sum()), str((mean < FEW).sum())]
        rows.append([f"1/{1 / share:.0f}", *(f"{x:.3f}" for x in cells), spread(mine, BIG), spread(mine, FEW), *counts, with_r2])
    head = ["share", "reliability", "worst kind against the others", "spread, heads above 1/4", "above 1/64"]
    lines = table([*head, "heads above 2/3", "below 1/64", "with importance"], rows)

    by_kind = [values[kinds == k, AT].mean(0) for k in names]
    against = [[a, *(f"{rank_correlation(x, y):.2f}" if a != b else "" for b, y in zip(names, by_kind))] for a, x in zip(names, by_kind)]
    what = f"{len(outcomes)} texts of up to {made['max_tokens']} tokens, {values.shape[-1]} KV heads"
    if log is not None:
        time = re.search(r"^time +(.*)$", log.read_text(encoding="utf-8"), flags=re.MULTILINE)
        user = re.search(r"^user\s+(?:(\d+)m)?([\d.]+)s?$", log.read_text(encoding="utf-8"), flags=re.MULTILINE)
        what += f"; {time[1]}" if time else ""
        what += f"; {60 * int(user[1] or 0) + float(user[2]):.0f} s of one core" if user else ""
    title = f"## {model.stem}"
    how = "" if found is None else f" Importance: {found.origin}."
    return [title, "", f"{what}.{how}", "", *lines, "", "Kinds of text against each other, at 1/8:", "", *table(["", *names], against), ""]


def write_tables(name: str, made: dict[str, Any], outcomes: Sequence[Outcome], folder: Path) -> None:
    """A replay table of each kind of text, as those of all are stored: FOLDER/NAME-KIND.json."""
    for kind in dict.fromkeys(o.kind for o in outcomes):
        values = np.mean([o.values for o in outcomes if o.kind == kind], axis=0)
        content = made | {"values": values.tolist(), "texts": [text for text in made["texts"] if text["kind"] == kind]}
        content |= {"reliability": [], "n_texts": len(content["texts"])}
        write_json(folder / f"{name}-{kind}.json", content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="MODEL.gguf,RUN.json[,RUN.log]")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="also write a table of each kind of text, for eval --replay")
    args = parser.parse_args()
    lines = ["# Replay tables: texts, kinds of text, importance", "", *(__doc__ or "").split("\n\n")[-1].strip().splitlines(), ""]
    lines += [f"Commit {commit()}, {machine()}. Seconds are those of the clock; other work may have run beside it.", ""]
    for run in args.runs:
        model, path, *log = map(Path, run.split(","))
        made, outcomes = read_run(path)
        lines += report(model, made, outcomes, log[0] if log else None)
        if args.tables is not None:
            write_tables(path.stem, made, outcomes, args.tables)
    text = "\n".join(lines).rstrip() + "\n"
    print(text, end="")
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
