"""Settings of one or more runs of `pyheadkv eval` against one of them, question by question.

    pyheadkv eval niah MODEL.gguf --importance r2.json,mix.json --beta 1.2,2 --kv-size 64,128 -o niah.jsonl ...
    python scripts/compare_settings.py niah.jsonl keys.jsonl --base "headkv r2 beta 1.2"

Per run, protocol, budget and setting, and for all budgets together: the score, and its difference to the base in points, with 95 % intervals
(bootstrap over contexts).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from pyheadkv.evaluate_report import Answers, interval
from pyheadkv.options import FULL


def rows(path: Path, base: str) -> list[str]:
    """Lines of the table for one run."""
    answers = Answers(path)
    methods = {s["method"] for s in answers.settings}
    if base not in methods:
        raise SystemExit(f"error: --base {base!r}: {path} has {', '.join(sorted(methods))}")
    names = {(s["method"], s["budget"]): s["name"] for s in answers.settings}
    budgets = [budget for method, budget in names if method == base]
    task = answers.header["tasks"][0]
    what = Path(task["file"] or task["name"]).stem
    out = []
    for protocol in answers.protocols:
        full = f"{100 * answers.full(protocol):.0f}"
        for several in [[budget] for budget in budgets] + [budgets] * (len(budgets) > 1):
            for method in dict.fromkeys(m for m, budget in names if budget in several):
                scores, gains = defaultdict(list), defaultdict(list)
                for budget in several:
                    mine, other = (answers.of(protocol, names[m, budget]) for m in (method, base))
                    for a, b in zip(mine, other, strict=True):
                        scores[a.place].append(a.score)
                        gains[a.place].append(a.score - b.score)
                mean, low, high = (100 * x for x in interval(scores))
                difference = "" if method == base else "{:+.0f} ({:+.0f} to {:+.0f})".format(*(100 * x for x in interval(gains)))
                n = len(answers.of(protocol, FULL))
                cells = [what, protocol, str(n), full, ", ".join(several), method, f"{mean:.0f} ({low:.0f}-{high:.0f})", difference]
                out.append("| " + " | ".join(cells) + " |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.jsonl")
    parser.add_argument("--base", required=True, metavar="METHOD", help='as the tables name it without the budget, such as "headkv r2 beta 1.2"')
    args = parser.parse_args()
    print(f"| task | protocol | questions | full | budget | setting | score | points above {args.base} |\n" + "|---" * 8 + "|")
    for path in args.runs:
        print("\n".join(rows(path, args.base)))


if __name__ == "__main__":
    main()
