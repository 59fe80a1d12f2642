"""Time to turn head importance into budgets, 80 layers x 64 query heads by default.

    python bench/bench_allocate.py --out bench/results/allocate_cpu.csv

One call of ``headkv_plan``: what a context does when it is created and a model is configured anew.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from pyheadkv import _lib
from pyheadkv.eval.journal import commit, machine
from pyheadkv.importance_values import Importance
from pyheadkv.options import Options
from pyheadkv.testing import random_importance


def times_ms(*, n_layer: int, n_head: int, n_head_kv: int, kv_size: int, n_calls: int) -> list[float]:
    """Milliseconds of each call."""
    importance = random_importance(n_layer=n_layer, n_head=n_head, seed=1).astype(np.float64)
    params = Options(kv_size=kv_size).to_params(Importance(importance), None)
    cells = np.zeros((n_layer, n_head_kv), dtype=np.int32)
    counts = [np.full(n_layer, n, dtype=np.int32) for n in (n_head, n_head_kv)]
    *heads, dst = [x.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)) for x in (*counts, cells)]
    times = []
    for _ in range(n_calls):
        begin = time.perf_counter()
        _lib.check(_lib.lib.headkv_plan(ctypes.byref(params), n_layer, *heads, 0, dst), ValueError)
        times.append(1000 * (time.perf_counter() - begin))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=64, metavar="N", help="per layer (default: %(default)s)")
    parser.add_argument("--kv-size", type=int, default=512, metavar="N", help="cells per head (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=1000, metavar="N", help="for each row (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="also write the table (default: none)")
    args = parser.parse_args()
    command = " ".join(["python bench/bench_allocate.py", *sys.argv[1:]])
    head = {"command": command, "commit": commit(), "machine": machine()}
    table = []
    for n_head_kv in dict.fromkeys((args.heads // 8, args.heads)):
        shape = {"n_layer": args.layers, "n_head": args.heads, "n_head_kv": n_head_kv, "kv_size": args.kv_size}
        times = times_ms(**shape, n_calls=args.calls)
        row = {**shape, "median_ms": round(statistics.median(times), 4), "max_ms": round(max(times), 4)}
        table.append({**row, "n_calls": args.calls, **head})
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if args.out is not None:
        with open(args.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
