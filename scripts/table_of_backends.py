#!/usr/bin/env python3
"""What ran on which backend, from result files alone: runs a check and keeps its outcome, and makes the table of all of them.

    python scripts/table_of_backends.py run avx2 ops -- build/ops/bin/test-headkv-ops -k avx2 --out {out}.json
    python scripts/table_of_backends.py run avx2 engine -- env HEADKV_KERNEL=avx2 .venv/bin/python -m pytest -q tests/test_engine.py --junitxml={out}.xml
    python scripts/table_of_backends.py run isa speed -- sh -c 'build/ops/bin/test-headkv-ops perf isa > {out}.csv'
    python scripts/table_of_backends.py table

``run`` leaves bench/results/backends/BACKEND-CHECK.json with command, commit, machine, seconds and what the command wrote. ``table``
writes bench/results/backends.md; a cell without a file says so.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import date
from pathlib import Path
from typing import Any

from pyheadkv.eval.journal import commit, machine

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench" / "results" / "backends"
TABLE = ROOT / "bench" / "results" / "backends.md"
CHECKS = {"ops": "op tests", "engine": "engine tests", "speed": "measured speed"}
BACKENDS = {
    "portable": "CPU, portable",
    "portable-qemu": "CPU, portable, qemu's Nehalem",
    "avx2": "CPU, AVX2",
    "avx2-qemu": "CPU, AVX2, qemu's Haswell",
    "avx512": "CPU, AVX512",
    "neon-qemu": "CPU, NEON, qemu's aarch64",
    "metal-on-cpu": "Metal's kernels, thread by thread on the CPU",
    "cuda-on-cpu": "CUDA's kernels, thread by thread on the CPU",
    "cuda-no-gpu": "CUDA library where there is no GPU, layers on the CPU",
    "cuda": "CUDA, a GPU",
    "metal": "Metal, a GPU",
    "vulkan-lavapipe": "Vulkan, Mesa's CPU driver",
    "rpc": "RPC, workers on the CPU",
    "wheel": "the wheel on emulated CPUs",
}
ISA = {("avx2", "speed"), ("avx512", "speed")}
AGAINST = {"rpc": "two workers against one process: ", "cuda": "", "metal": ""}
BY_HAND = {
    ("vulkan-lavapipe", "ops"): "vulkan_lavapipe.md",
    ("cuda-no-gpu", "engine"): "cuda_build.md",
}  # before there were files of results


def read_output(out: str) -> Any:
    """What the command wrote: of JSON all, of CSV its rows, of JUnit's XML the numbers of tests."""
    if Path(f"{out}.json").is_file():
        return json.loads(Path(f"{out}.json").read_text())
    if Path(f"{out}.csv").is_file():
        lines = [line for line in Path(f"{out}.csv").read_text().splitlines() if not line.startswith("#")]
        return list(csv.DictReader(lines))
    if Path(f"{out}.xml").is_file():
        suite = next(ElementTree.parse(f"{out}.xml").getroot().iter("testsuite"))
        n = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
        return {"run": n["tests"] - n["skipped"], "failed": n["failures"] + n["errors"], "skipped": n["skipped"]}
    return None


def run(backend: str, check: str, command: list[str]) -> int:
    """Run a command and keep what came of it; its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        done = subprocess.run([part.replace("{out}", f"{folder}/out") for part in command], cwd=ROOT)
        result = read_output(f"{folder}/out")
        if result is None:
            print("the command wrote none of {out}.json, {out}.csv and {out}.xml: nothing is kept", file=sys.stderr)
            return done.returncode or 1
        row = {
            "command": shlex.join(command),
            "commit": commit(),
            "machine": machine(),
            "date": date.today().isoformat(),
            "seconds": round(time.monotonic() - begin, 1),
            "exit_code": done.returncode,
            "result": result,
        }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{backend}-{check}.json").write_text(json.dumps(row, indent=1) + "\n")
    return done.returncode


def describe(backend: str, result: Any) -> str:
    """One cell."""
    if isinstance(result, dict):
        kernels = result.get("kernels", {})
        skipped = f", {result['skipped']} skipped" if result["skipped"] else ""
        own = kernels.get(backend.split("-")[0])
        of_it = f" ({own[0]} of them its kernels')" if own and own[0] != result["run"] else ""
        return f"{result['failed']} of {result['run']} failed{of_it}{skipped}"
    if result and "kernel" in result[0]:  # test-headkv-ops perf isa
        parts = []
        for op in dict.fromkeys(row["op"] for row in result):
            rows = [row for row in result if row["op"] == op and row["kernel"] == backend and row["against"]]
            ratios = [float(row["speed_ratio"]) for row in rows]
            if rows:
                name = op.replace("_", " ")
                parts.append(f"{name} {statistics.median(ratios):.2f} times {rows[0]['against']} ({min(ratios):.2f} to {max(ratios):.2f})")
        return "; ".join(parts)
    return AGAINST[backend] + "; ".join(f"{row['what']} {float(row['speed_ratio']):.2f}" for row in result if row["speed_ratio"])


def wheel_cell() -> str:
    """From the table that check_wheel.py writes."""
    lines = (ROOT / "bench" / "results" / "wheel.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| 3.")]
    n_same = sum(row[3:5] == ["the same", "the same"] for row in rows)
    where = subprocess.run(
        ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "bench/results/wheel.md"], capture_output=True, text=True
    )
    cpus = ", ".join(dict.fromkeys(row[1] for row in rows))
    return f"tokens the same in {n_same} of {len(rows)} environments ({cpus}), [{where.stdout.strip()}](wheel.md)"


def table() -> str:
    """The whole page."""
    cells: list[str] = []
    runs: dict[str, str] = {}
    for backend, title in BACKENDS.items():
        row = [title]
        for check in CHECKS:
            path = FOLDER / f"{backend}-{check}.json"
            if (backend, check) in ISA:  # measured in turn, in one run
                path = FOLDER / "isa-speed.json"
            if path.is_file():
                kept = json.loads(path.read_text())
                row.append(f"{describe(backend, kept['result'])}, [{kept['commit']}](backends/{path.name})")
                runs[path.name] = (
                    f"| {path.name} | {kept['commit']} | {kept['date']} | {kept['machine']} | {kept['seconds']} | {kept['exit_code']} "
                    f"| `{kept['command'].replace('|', chr(92) + '|')}` |"
                )
            elif (backend, check) == ("wheel", "engine"):
                row.append(wheel_cell())
            else:
                by_hand = BY_HAND.get((backend, check))
                row.append(f"not run; by hand, [earlier]({by_hand})" if by_hand else "not run")
        cells.append("| " + " | ".join(row) + " |")
    return "\n".join(
        [
            "`python scripts/table_of_backends.py table`: what ran where, each cell from the file that it names, at that commit.",
            "",
            "| backend | " + " | ".join(CHECKS.values()) + " |",
            "|---|---|---|---|",
            *cells,
            "",
            "| file | commit | date | machine | seconds | exit code | command |",
            "|---|---|---|---|---|---|---|",
            *runs.values(),
            "",
            "Seconds are those of a busy machine, but for speed. On emulated CPUs nothing is fast or slow.",
            "",
        ]
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    runner = commands.add_parser("run", help="run a check and keep its outcome")
    runner.add_argument("backend", choices=["isa", *BACKENDS])
    runner.add_argument("check", choices=CHECKS)
    runner.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command, which writes {out}.json, {out}.csv or {out}.xml")
    commands.add_parser("table", help="write the table")
    args = parser.parse_args()
    if args.what == "run":
        return run(args.backend, args.check, args.command[args.command[:1] == ["--"] :])
    TABLE.write_text(table())
    print(TABLE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
