"""Settings of one or more runs of `pyheadkv eval` against one of them, question by question.

    pyheadkv eval niah MODEL.gguf --importance r2.json,mix.json --beta 1.2,2 --kv-size 64,128 -o niah.jsonl ...
    python scripts/compare_settings.py niah.jsonl keys.jsonl --base "headkv r2 beta 1.2"

Per run, protocol, budget and setting: the score, and its difference to the base in points, with 95 % intervals (bootstrap over contexts).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pyheadkv.evaluate_report import Answers, by_context, gain, interval


def rows(path: Path, base: str) -> list[str]:
    """Lines of the table for one run."""
    answers = Answers(path)
    methods = {s["method"] for s in answers.settings}
    if base not in methods:
        raise SystemExit(f"error: --base {base!r}: {path} has {', '.join(sorted(methods))}")
    names = {(s["method"], s["budget"]): s["name"] for s in answers.settings}
    task = answers.header["tasks"][0]
    what = Path(task["file"] or task["name"]).stem
    out = []
    for protocol in answers.protocols:
        full = 100 * answers.full(protocol)
        for (method, budget), name in names.items():
            if (base, budget) not in names:
                continue
            mine, other = answers.of(protocol, name), answers.of(protocol, names[base, budget])
            mean, low, high = (100 * x for x in interval(by_context(mine)))
            difference = "" if method == base else "{:+.0f} ({:+.0f} to {:+.0f})".format(*(100 * x for x in gain(mine, other)))
            cells = [what, protocol, str(len(mine)), f"{full:.0f}", budget, method, f"{mean:.0f} ({low:.0f}-{high:.0f})", difference]
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
