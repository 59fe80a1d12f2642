"""llama-server with compression against without: throughput by number of slots, and memory of 8 slots.

Without --kv-size the server is upstream's. Rounds are interleaved; ratios are medians of paired ones.

    python bench/bench_server.py throughput --slots 1,4,8 --n-prompt 8192 --out bench/results/server_throughput.csv
    python bench/bench_server.py memory --model MODEL.gguf --n-ctx 32768 --out bench/results/server_memory.csv
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pyheadkv.eval.journal import append_row, commit, machine

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from llama_server import Server, running

KINDS = ("stock", "kv")
MIB = 2**20


def flags(kind: str, args: argparse.Namespace, n_slots: int, n_ctx: int) -> list[Any]:
    """Of a server with n_slots slots of n_ctx tokens."""
    return [
        "-m",
        args.model,
        "-c",
        n_slots * n_ctx,
        "-np",
        n_slots,
        "-t",
        args.threads,
        "-tb",
        args.threads,
        "-fa",
        "on",
        "--cache-ram",
        0,
        *(["--kv-size", args.kv_size] if kind == "kv" else []),
    ]


def make_prompt(n: int, seed: int) -> list[int]:
    return [1, *np.random.default_rng(seed).integers(300, 383, size=n - 1).tolist()]


def load(server: Server, n_slots: int, args: argparse.Namespace) -> dict[str, float]:
    """As many requests at once as there are slots: seconds until the last answer, and what the server says of each."""
    start = time.perf_counter()
    with ThreadPoolExecutor(n_slots) as pool:
        answers = list(
            pool.map(
                lambda i: server.complete(make_prompt(args.n_prompt, i), args.n_predict, ignore_eos=True, cache_prompt=False),
                range(n_slots),
            )
        )
    seconds = time.perf_counter() - start
    timings = [answer["timings"] for answer in answers]
    return {
        "seconds": seconds,
        "tokens_per_s": n_slots * (args.n_prompt + args.n_predict) / seconds,
        "decode_ms": statistics.median(t["predicted_per_token_ms"] for t in timings),
    }


def throughput(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for n_slots in (int(n) for n in args.slots.split(",")):
            results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
            for i in range(args.rounds):
                for kind in KINDS if i % 2 == 0 else KINDS[::-1]:
                    n_ctx = -(-(args.n_prompt + args.n_predict + 1) // 256) * 256
                    with running(*flags(kind, args, n_slots, n_ctx), log=Path(folder) / kind) as server:
                        server.complete(make_prompt(64, 99), 2)
                        results[kind].append({**load(server, n_slots, args), "rss_peak_mib": server.status_bytes("VmHWM") / MIB})
                    print(f"{n_slots} slots, round {i}, {kind}: {results[kind][-1]}", flush=True)
            for kind in KINDS:
                row = {"slots": n_slots, "kind": kind, "n_prompt": args.n_prompt, "n_predict": args.n_predict, "rounds": args.rounds}
                for name in results[kind][0]:
                    row[name] = round(statistics.median(r[name] for r in results[kind]), 2)
                for name, ratio in (("tokens_per_s", "throughput_ratio"), ("decode_ms", "decode_ms_ratio")):
                    row[ratio] = round(statistics.median(a[name] / b[name] for a, b in zip(results[kind], results["stock"])), 3)
                write(row, args)


def memory(args: argparse.Namespace) -> None:
    """Resident memory of no file above that of a server with one slot of 256 tokens, which holds next to no cache."""
    n_slots = int(args.slots)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running(*flags("stock", args, 1, 256), log=log) as server:
            server.complete(make_prompt(64, 99), 2)
            floor = server.status_bytes("RssAnon")
        for kind in KINDS:
            reuse = ["--kv-reuse"] if kind == "kv" else []  # slots keep their cells when a request is over
            with running(*flags(kind, args, n_slots, args.n_ctx), *reuse, log=log, seconds=600) as server:
                at_start = server.status_bytes("RssAnon") - floor
                row: dict[str, Any] = {
                    "kind": kind,
                    "slots": n_slots,
                    "n_ctx": args.n_ctx,
                    "rss_at_start_mib": round(at_start / MIB, 1),
                    "prompts_read": "1 x 64",
                }
                if kind == "kv":
                    for i in range(n_slots):
                        server.complete(make_prompt(args.n_prompt, i), 2, id_slot=i, ignore_eos=True)
                    row["prompts_read"] = f"{n_slots} x {args.n_prompt}"
                else:
                    server.complete(make_prompt(64, 99), 2)
                row["rss_mib"] = round((server.status_bytes("RssAnon") - floor) / MIB, 1)
                row["rss_peak_mib"] = round((server.status_bytes("VmHWM") - server.status_bytes("RssFile") - floor) / MIB, 1)
                row["bytes_held_mib"] = round(server.metric("kv_bytes_held") / MIB, 1) if kind == "kv" else ""
                write(row, args)
                print(row, flush=True)


def write(row: dict[str, Any], args: argparse.Namespace) -> None:
    """Append a row to the file of results."""
    row = {
        "model": Path(args.model).name,
        **row,
        "kv_size": args.kv_size if row["kind"] == "kv" else "",
        "threads": args.threads,
        "machine": machine(),
        "commit": commit(),
        "command": f"python bench/bench_server.py {' '.join(sys.argv[1:])}",
    }
    append_row(args.out, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "memory"))
    parser.add_argument("--model", default="pyheadkv/data/needle.gguf")
    parser.add_argument("--slots", default="8")
    parser.add_argument("--n-prompt", type=int, default=8192)
    parser.add_argument("--n-predict", type=int, default=128)
    parser.add_argument("--n-ctx", type=int, default=32768, help="tokens of a slot, for memory")
    parser.add_argument("--kv-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    (throughput if args.what == "throughput" else memory)(args)


if __name__ == "__main__":
    main()
