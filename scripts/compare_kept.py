"""Do the kernels of all instruction sets keep the same cells? Compares what ``test-headkv-ops kept`` printed on several machines.

    build/ops/bin/test-headkv-ops kept > build/kept-x86_64.txt
    qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/bin/test-headkv-ops kept > build/kept-aarch64.txt
    python scripts/compare_kept.py build/kept-x86_64.txt build/kept-aarch64.txt --out bench/results/kept_kernels.md

The first kernel of the first file is what the others are compared with. Where cells differ, the table says how close the score of the
last kept cell was to that of the first dropped one, relative to it: rounding decides between two that are as close as that.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

Case = dict[str, tuple[str, float, float, frozenset[int]]]  # name -> input, last kept and first dropped score, cells


def read(path: Path) -> dict[str, Case]:
    """Cases of each kernel, which the stem of the file goes with."""
    found: dict[str, Case] = defaultdict(dict)
    for line in path.read_text().split("\n")[:-1]:  # the last one is complete
        parts = line.split("\t")
        if len(parts) != 5:
            continue
        name, kernel, keys, (last, first), cells = *parts[:3], parts[3].split(), parts[4].split()
        found[f"{kernel} ({path.stem.removeprefix('kept-')})"][name] = keys, float(last), float(first), frozenset(map(int, cells))
    return dict(found)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, help="file for the table (default: print it)")
    args = parser.parse_args()
    kernels: dict[str, Case] = {}
    for path in args.files:
        kernels |= read(path)
    if len(kernels) < 2:
        raise SystemExit("fewer than two kernels: nothing to compare")
    base_name, base = next(iter(kernels.items()))
    lines = [
        f"`python scripts/compare_kept.py {' '.join(sys.argv[1:])}`",
        "",
        f"Cells kept of the same queries and keys, compared with {base_name}.",
        "",
        "| kernel | heads | same keys | heads with other cells | cells that differ | kept | largest gap of the scores there |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cases in kernels.items():
        both = cases.keys() & base.keys()  # a listing may end early, emulation is slow
        if not both:
            raise SystemExit(f"{name}: other cases than {base_name}")
        same = {case for case in both if cases[case][0] == base[case][0]}
        other = {case for case in same if cases[case][3] != base[case][3]}
        n_cells = sum(len(base[case][3] - cases[case][3]) for case in other)
        n_kept = sum(len(base[case][3]) for case in same)
        gap = max((abs(base[case][1] - base[case][2]) / base[case][1] for case in other), default=0.0)
        shown = f"{gap:.1e}" if other else "-"
        lines.append(f"| {name} | {len(both)} | {len(same)} | {len(other)} | {n_cells} | {n_kept} | {shown} |")
    text = "\n".join([*lines, ""])
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
