"""Reading and decoding of models with windowed layers, against the stock cache, as ratios inside one run.

    python bench/bench_windowed.py --tokens 4096 --out bench/results/windowed_cpu.csv
    python bench/bench_windowed.py --tokens 4096 --model MODEL.gguf --out bench/results/windowed_cpu.csv

Without a model of yours, random models of the shape of Gemma-3-4B (12 of its 34 layers, windows of 1024, every sixth layer
attends to all tokens) and of gpt-oss-20b (4 of its 24 layers, 8 of its 32 experts, windows of 128, every second layer, sinks).
The stock cache has rings for its windowed layers too (``swa_full=False``). Both take turns, rounds are paired, every figure is a
median and every ratio the median of paired ratios. ``empty`` is the stock cache after 16 tokens: the speed that decode cannot
exceed. ``same_text`` says whether 64 greedy tokens of a real model are those of the stock cache when nothing is evicted and both
attend by the same kernel (``attend="composed"``, flash attention). Bytes are those that are allocated: ``stock_mib`` for n_ctx
tokens, ``peak_mib`` while our prompt is read, both with the rings.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pyheadkv import Llama
from pyheadkv.eval.journal import append_row, commit, machine
from pyheadkv.testing import write_random_model

SHAPES: dict[str, dict[str, Any]] = {
    "gemma-3-4b": dict(
        arch="gemma3",
        n_layer=12,
        n_embd=2560,
        n_head=8,
        n_head_kv=4,
        head_dim=256,
        n_ff=10240,
        window=1024,
        period=6,
        tie_embeddings=True,
    ),
    "gpt-oss-20b": dict(arch="gpt-oss", n_layer=4, n_embd=2880, n_head=64, n_head_kv=8, head_dim=64, n_ff=2880, window=128, period=2),
}
MIB = 1 << 20
TEXT = Path(__file__).parent.parent / "pyheadkv" / "data" / "haystack.txt"


def read(llm: Llama, prompt: list[int]) -> float:
    """Seconds for a prompt, compression included."""
    llm.reset()
    start = time.perf_counter()
    llm.eval(prompt)
    if llm.kv_options is not None:
        llm.end_prompt()
    return time.perf_counter() - start


def decode(llm: Llama, n: int) -> float:
    """Seconds per token behind what is held."""
    start = time.perf_counter()
    for i in range(n):
        llm.eval([300 + i])
    return (time.perf_counter() - start) / n


def tokens_of(llm: Llama, n: int, *, is_random: bool) -> list[int]:
    """A prompt: of a text, or any tokens where the model knows no language."""
    if is_random:
        return [int(token) for token in np.random.default_rng(1).integers(260, 384, n)]
    return list(llm.tokenize(TEXT.read_bytes()))[:n]


def greedy(llm: Llama, prompt: list[int]) -> list[int]:
    """64 tokens after a prompt."""
    llm.reset()
    out: list[int] = []
    for token in llm.generate(prompt, temp=0.0):
        out.append(token)
        if len(out) == 64:
            break
    return out


def is_same_text(path: Path, common: dict[str, Any], stock: Llama, prompt: list[int]) -> bool:
    """Whether a budget as large as the prompt gives the tokens of the stock cache."""
    whole = Llama(path, kv_size=len(prompt) + 64, policy="snapkv", attend="composed", **common)
    try:
        return greedy(whole, prompt) == greedy(stock, prompt)
    finally:
        whole.close()


def bench(name: str, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One row: medians of all rounds."""
    common = dict(
        n_ctx=args.tokens + 512,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        swa_full=False,
        flash_attn=True,
        verbose=False,
    )
    ours, stock, empty = Llama(path, kv_size=args.kv_size, policy="snapkv", **common), Llama(path, **common), Llama(path, **common)
    prompt = tokens_of(ours, args.tokens, is_random=args.model is None)
    same_text = is_same_text(path, common, stock, prompt) if args.model else "random"
    times: dict[str, list[float]] = {key: [] for key in ("read", "read_stock", "decode", "decode_stock", "decode_empty")}
    for _ in range(args.rounds):
        times["read"].append(read(ours, prompt))
        times["read_stock"].append(read(stock, prompt))
        read(empty, prompt[:16])
        for _ in range(args.rounds):
            for key, llm in (("decode", ours), ("decode_stock", stock), ("decode_empty", empty)):
                times[key].append(decode(llm, args.decode))
    stats = ours.kv_stats()

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)), 3)

    return {
        "shape": name,
        "tokens": args.tokens,
        "kv_size": args.kv_size,
        "read_s": round(statistics.median(times["read"]), 2),
        "read_of_stock": ratio("read", "read_stock"),
        "decode_ms": round(1000 * statistics.median(times["decode"]), 2),
        "decode_of_stock": ratio("decode", "decode_stock"),
        "decode_of_empty": ratio("decode", "decode_empty"),
        "same_text": same_text,
        "stock_mib": round((stats.bytes_full / stats.n_past * common["n_ctx"] + stats.bytes_beside) / MIB, 2),
        "ring_mib": round(stats.bytes_beside / MIB, 2),
        "store_mib": round(stats.bytes_store / MIB, 2),
        "peak_mib": round((stats.bytes_peak + stats.bytes_beside) / MIB, 2),
        "threads": args.threads,
        "rounds": args.rounds,
        "machine": machine(),
        "commit": commit(),
        "command": f"python bench/bench_windowed.py {' '.join(sys.argv[1:])}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--kv-size", type=int, default=128)
    parser.add_argument("--decode", type=int, default=8, help="tokens decoded in turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, help="one of them only")
    parser.add_argument("--model", type=Path, metavar="MODEL.gguf", help="a real model in their place")
    parser.add_argument("--models", type=Path, help="folder where the random models are kept, a temporary one if it is not given")
    parser.add_argument("--out", type=Path, required=True, help="table to append to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.model.stem] if args.model else [args.shape] if args.shape else SHAPES:
            path = args.model or (args.models or Path(folder)) / f"{name}-shape.gguf"
            if not path.is_file():
                write_random_model(path, n_vocab=32000, seed=1, ftype="q4_0", repeat_layers=True, **SHAPES[name])
            row = bench(name, path, args)
            append_row(args.out, row)
            print(row)


if __name__ == "__main__":
    main()
