"""Cost of measuring head importance on a model of the 1B shape: seconds per 1000 haystack tokens, and memory.

    python bench/bench_score.py --out bench/results/score_cpu.csv

One example as ``pyheadkv score`` reads it: a prompt, then the answer's tokens one by one, the attention of each reduced
in the engine. Beside it the same tokens without looking at the attention.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from bench_decode import make_model
from bench_prefill import status_bytes

from pyheadkv import Llama
from pyheadkv.eval.journal import commit, machine
from pyheadkv.score.measure import LlamaReader

N_SPAN = 20  # tokens of the needle


def example(reader: LlamaReader, prompt: list[int], n_steps: int, *, look: bool) -> tuple[float, float]:
    """Seconds of the prompt and of the answer."""
    start = time.perf_counter()
    reader.begin(prompt)
    middle = time.perf_counter()
    span = len(prompt) // 2, len(prompt) // 2 + N_SPAN
    for _ in range(n_steps):
        token = reader.greedy()
        if look:
            reader.attention([span], N_SPAN, 1)
        reader.append(token)
    return middle - start, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/bench-1b-q8_0.gguf"), help="made if missing (default: %(default)s)")
    parser.add_argument("--lengths", default="1000,2000,4000", metavar="LIST", help="tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=N_SPAN, metavar="N", help="tokens of the answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="interleaved (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    args = parser.parse_args()
    if not args.model.exists():
        make_model(args.model, "q8_0")
    lengths = [int(n) for n in args.lengths.split(",")]
    rows = []
    for n in lengths:
        llm = Llama(args.model, kv_size=64, policy="snapkv", prefill="token", n_ctx=-(-(n + args.steps + 1) // 256) * 256,
                    n_threads=args.threads, n_threads_batch=args.threads, verbose=False)  # fmt: skip
        reader = LlamaReader(llm)
        prompt = [1, *np.random.default_rng(0).integers(300, 383, size=n - 1).tolist()]
        example(reader, prompt[:512], 1, look=True)
        model_bytes = status_bytes("VmRSS")
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for i in range(args.rounds):
            for look in (True, False) if i % 2 else (False, True):
                times[look].append(example(reader, prompt, args.steps, look=look))
        prompt_s, look_s = (statistics.median(t[k] for t in times[True]) for k in (0, 1))
        plain_s = statistics.median(t[1] for t in times[False])
        rows.append({
            "tokens": n, "steps": args.steps, "prompt_s_per_1000": round(1000 * prompt_s / n, 2), "answer_s": round(look_s, 3),
            "answer_s_without_looking": round(plain_s, 3), "example_s_per_1000": round(1000 * (prompt_s + look_s) / n, 2),
            "context_mib": round(llm.kv_stats().bytes_staging / 2**20, 1),
            "rss_above_short_prompt_mib": round((status_bytes("VmHWM") - model_bytes) / 2**20, 1),
            "machine": machine(), "threads": args.threads, "commit": commit(), "command": " ".join(sys.argv),
        })  # fmt: skip
        print(rows[-1])
        llm.close()
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
