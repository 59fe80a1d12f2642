"""Settings of one or more runs of `pyheadkv eval` against one of them, question by question.

    pyheadkv eval niah MODEL.gguf --importance r2.json,mix.json --beta 1.2,2 --kv-size 64,128 -o niah.jsonl ...
    python scripts/compare_settings.py niah.jsonl keys.jsonl --base "headkv r2 beta 1.2"

Per run, protocol, budget and setting, and for all budgets and all runs together: the score, and its difference to the base in points, with
95 % intervals, by bootstrap over contexts.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from pyheadkv.eval.report import Answers, interval, table
from pyheadkv.options import FULL

Pairs = dict[str, list[tuple[float, float]]]  # by context: scores of a setting and of the base


def pairs_of(answers: Answers, base: str) -> dict[tuple[str, str, str], Pairs]:
    """By protocol, budget and method, what was scored beside the base."""
    names = {(s["method"], s["budget"]): s["name"] for s in answers.settings}
    out: dict[tuple[str, str, str], Pairs] = {}
    for protocol in answers.protocols:
        for (method, budget), name in names.items():
            if (base, budget) in names:
                pairs: Pairs = defaultdict(list)
                for a, b in zip(answers.of(protocol, name), answers.of(protocol, names[base, budget]), strict=True):
                    pairs[a.place].append((a.score, b.score))
                out[protocol, budget, method] = pairs
    return out


def compare(cells: list[str], several: list[Pairs], *, is_base: bool) -> list[str]:
    """One line: what it is, the score, and the difference to the base."""
    scores, gains = defaultdict(list), defaultdict(list)
    for pairs in several:
        for place, found in pairs.items():
            scores[place] += [a for a, _ in found]
            gains[place] += [a - b for a, b in found]
    mean, low, high = (100 * x for x in interval(scores))
    gain = "" if is_base else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in interval(gains)))
    return [*cells, f"{mean:.0f} ({low:.0f}-{high:.0f})", gain]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.jsonl")
    parser.add_argument(
        "--base", required=True, metavar="METHOD", help='as the tables name it without the budget, such as "headkv r2 beta 1.2"'
    )
    args = parser.parse_args()
    head = ["task", "protocol", "questions", "full", "budget", "setting", "score", f"points above {args.base}"]
    rows = []
    everything: dict[tuple[str, str], list[Pairs]] = defaultdict(list)
    for path in args.runs:
        answers = Answers(path)
        pairs = pairs_of(answers, args.base)
        if not pairs:
            raise SystemExit(f"error: --base {args.base!r}: {path} has {', '.join(sorted({s['method'] for s in answers.settings}))}")
        task = answers.header["tasks"][0]
        what = Path(task["file"] or task["name"]).stem
        for protocol in answers.protocols:
            n = str(len(answers.of(protocol, FULL)))
            budgets = [budget for p, budget, method in pairs if (p, method) == (protocol, args.base)]
            for some in [[budget] for budget in budgets] + [budgets] * (len(budgets) > 1):
                for method in dict.fromkeys(m for p, budget, m in pairs if p == protocol and budget in some):
                    cells = [what, protocol, n, f"{100 * answers.full(protocol):.0f}", ", ".join(some), method]
                    rows.append(compare(cells, [pairs[protocol, budget, method] for budget in some], is_base=method == args.base))
        for (protocol, _, method), found in pairs.items():
            everything[protocol, method].append({f"{path} {place}": scores for place, scores in found.items()})
    n_runs = {key: len(found) for key, found in everything.items()}
    for (protocol, method), several in everything.items():
        if len(args.runs) > 1 and n_runs[protocol, method] == n_runs[protocol, args.base]:
            rows.append(compare(["all", protocol, "", "", "all", method], several, is_base=method == args.base))
    print(*table(head, rows), sep="\n")


if __name__ == "__main__":
    main()
