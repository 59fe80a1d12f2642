"""Layers on workers against one process: bytes over the wire and time, for a prompt in either order and for decoding.

The workers are processes of this machine, so the wire is its loopback: the bytes are those of any network, the times are not. One
process and the workers take turns with the same number of threads in all, and every ratio is the median of paired ratios.

    python bench/bench_rpc.py build/smollm2-135m.gguf --prompt 1024 --rounds 5 --out bench/results/rpc.csv
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
from rpc_worker import Worker

from pyheadkv import Llama
from pyheadkv.eval.journal import commit, machine

N_DECODE = 32


def total(llm: Llama) -> np.ndarray[Any, Any]:
    """Bytes sent, bytes received, messages, and those that waited for an answer."""
    counts = [(t.bytes_sent, t.bytes_received, t.n_messages, t.n_answers) for t in llm.rpc_traffic.values()]
    sums: np.ndarray[Any, Any] = np.array(counts).sum(axis=0)
    return sums


def timed(f: Any, *args: Any) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    f(*args)
    return time.perf_counter() - begin


def measure(args: argparse.Namespace, endpoints: list[str]) -> list[dict[str, Any]]:
    """Rows of (what, value, unit, speed_ratio to one process)."""
    common: dict[str, Any] = {"n_ctx": args.prompt + 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    prompt = [1, *np.random.default_rng(0).integers(300, 20000, size=args.prompt - 1).tolist()]
    rows: list[dict[str, Any]] = []

    def row(what: str, value: float, unit: str, ratio: float | str = "") -> None:
        rows.append({"what": what, "value": value, "unit": unit, "speed_ratio": ratio})
        print(f"{what}: {value} {unit} {ratio}", file=sys.stderr)

    for name, options in (
        ("stock cache", {}),
        (f"kv_size={args.kv_size}, token", {"kv_size": args.kv_size, "prefill": "token"}),
        (f"kv_size={args.kv_size}, layer", {"kv_size": args.kv_size, "prefill": "layer"}),
    ):
        composed: dict[str, Any] = {"attend": "composed"} if options else {}  # the ops that a worker has
        alone = Llama(args.model, **common, **options, **composed)
        begin = time.perf_counter()
        split = Llama(args.model, **common, **options, rpc_servers=endpoints, tensor_split=[1 / len(endpoints)] * len(endpoints))
        row(f"{name}: loading, {len(endpoints)} workers", round(time.perf_counter() - begin, 2), "s")
        row(f"{name}: sent while loading", int(total(split)[0]), "bytes")

        def read(llm: Llama, compressed: bool = bool(options)) -> None:
            if compressed:
                llm.read_prompt(prompt)
            else:
                llm.reset()
                llm.eval(prompt)

        def decode(llm: Llama) -> None:
            for _ in range(N_DECODE):
                llm.eval([7])

        for what, run, n in (("reading", read, args.prompt), ("decoding", decode, N_DECODE)):
            seconds: tuple[list[float], list[float]] = ([], [])
            for i in range(args.rounds + 1):
                for k in (0, 1) if i % 2 else (1, 0):
                    if what == "decoding":  # each round behind the prompt alone
                        read((alone, split)[k])
                    before = total(split)
                    took = timed(run, (alone, split)[k])
                    if i > 0:
                        seconds[k].append(took)
                    if k == 1:
                        passed = total(split) - before
            ratio = round(statistics.median(a / b for a, b in zip(*seconds, strict=True)), 3)
            label = f"{name}: {what}" + (f" {n} tokens" if what == "reading" else "")
            row(
                label,
                round(1000 * statistics.median(seconds[1]) / (1 if what == "reading" else n), 2),
                "ms" if what == "reading" else "ms/token",
                ratio,
            )
            for unit, value in zip(("bytes sent", "bytes received", "messages", "answers waited for"), passed.tolist(), strict=True):
                row(f"{label}, {unit} per token", round(value / n, 2), unit)
        alone.close()
        split.close()
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens (default: %(default)s)")
    parser.add_argument("--kv-size", type=int, default=128, help="mean cells per KV head (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that the layers are split over (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="CSV to write")
    args = parser.parse_args()
    workers = [Worker() for _ in range(args.workers)]
    try:
        rows = measure(args, [worker.endpoint for worker in workers])
    finally:
        for worker in workers:
            worker.kill()
    head = {"command": "python bench/bench_rpc.py " + " ".join(sys.argv[1:]), "commit": commit(), "machine": machine()}
    out = open(args.out, "w", newline="") if args.out else sys.stdout
    writer = csv.DictWriter(out, fieldnames=[*rows[0], *head])
    writer.writeheader()
    writer.writerows({**row, **head} for row in rows)


if __name__ == "__main__":
    main()
