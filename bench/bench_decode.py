"""Decode speed after a long prompt, against the stock cache, as ratios inside one run.

Two worker processes hold the same model, one with the stock cache and one with a
compressed one. They take turns, so that other load on the machine hits both; every
figure is a median over the rounds and every ratio the median of paired ratios.

    python bench/bench_decode.py --threads 2 --out bench/results/decode_cpu.csv
    python bench/bench_decode.py --device cuda0 --shape llama-3.1-8b --ftype q4_0 --prompt 32768 --out ...

The model has random weights of the shape of Llama-3.2-1B (16 layers, 32 query and
8 KV heads of 64) or Llama-3.1-8B (32 layers, heads of 128); one layer's data is
repeated. The head importance is that of Llama-3-8B-Instruct (every second layer for
1B), so that the budgets are as skewed as real ones. Prompts of the speed
measurements are random cells; ``--prefill`` reads a real one to time compression.
``--uncompressed`` also decodes with our kernel from a store that holds the whole
prompt, in turn with upstream's flash attention over as many cells.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing as mp
import statistics
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pyheadkv.eval.journal import commit, machine

ROOT = Path(__file__).resolve().parents[1]
IMPORTANCE = ROOT / "tests" / "golden" / "head_mean_llama3_8b_r2.json"


@dataclass(frozen=True)
class Shape:
    """Sizes of the random model, those of Llama-3.2-1B unless others are given."""

    n_layer: int = 16
    n_embd: int = 2048
    n_head: int = 32
    n_head_kv: int = 8
    head_dim: int = 64
    n_ff: int = 8192
    n_vocab: int = 32000


SHAPES = {"llama-3.2-1b": Shape(), "llama-3.1-8b": Shape(n_layer=32, n_embd=4096, head_dim=128, n_ff=14336)}


def make_model(path: Path, ftype: Any, name: str = "llama-3.2-1b", n_layer: int | None = None) -> None:
    """Write the random model, once; n_layer : instead of the layers of its shape."""
    from pyheadkv.testing import write_random_model

    if path.is_file():
        return
    shape = SHAPES[name] if n_layer is None else replace(SHAPES[name], n_layer=n_layer)
    mean_score = np.array(json.loads(IMPORTANCE.read_text())["mean_score"])
    importance = mean_score[:: len(mean_score) // shape.n_layer]
    write_random_model(path, arch="llama", ftype=ftype, repeat_layers=True, importance=importance, seed=1, **vars(shape))


class Peak:
    """The most memory in use on a GPU while the block runs, sampled every 2 ms: `n_bytes`."""

    def __init__(self, i_gpu: int) -> None:
        self.i_gpu, self.n_bytes, self.done = i_gpu, 0, threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        from pyheadkv import _lib

        while not self.done.is_set():
            self.n_bytes = max(self.n_bytes, _lib.gpu_bytes_used(self.i_gpu))
            self.done.wait(0.002)

    def __enter__(self) -> Peak:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def worker(conn: Any, model: str, options: dict[str, Any]) -> None:
    """Serve commands (name, argument) of the parent; answers are seconds or numbers."""
    from pyheadkv import Llama, _lib

    device = options.get("main_gpu", -1)
    llm = Llama(model, verbose=False, **options)
    conn.send("ready")

    def decode(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            llm.eval([7])
        return (time.perf_counter() - start) / n

    def fill(n: int) -> float:
        llm.reset()
        _lib.check(_lib.lib.headkv_fill_prompt(llm.ctx, 0, n, 1))
        llm.n_tokens = n
        return 0.0

    def empty(_: int) -> float:
        llm.reset()
        llm._ctx.kv_cache_clear()
        llm.eval([1])
        return 0.0

    def truncate(n: int) -> float:
        llm.n_tokens = n  # the next eval removes what is behind
        return 0.0

    def compress(_: int) -> float:
        llm.end_prompt()
        return llm.kv_stats().compress_ms / 1000

    def prefill(n: int) -> float:
        llm.reset()
        tokens = [1, *np.random.default_rng(0).integers(300, 30000, size=n - 1).tolist()]
        start = time.perf_counter()
        llm.eval(tokens)
        return time.perf_counter() - start

    def store_bytes(_: int) -> float:
        return llm.kv_stats().bytes_store

    def memory(_: int) -> float:
        return _lib.gpu_bytes_used(device)

    def peak_of_reading(n: int) -> float:
        with Peak(device) as peak:
            prefill(n)
            if "kv_size" in options:
                compress(0)
        return peak.n_bytes

    commands = {f.__name__: f for f in (decode, fill, empty, truncate, compress, prefill, store_bytes, memory, peak_of_reading)}
    while True:
        name, argument = conn.recv()
        if name == "stop":
            return
        conn.send(commands[name](argument))


class Worker:
    """A process with one model and one kind of cache."""

    def __init__(self, model: Path, **options: Any) -> None:
        context = mp.get_context("spawn")
        self.conn, child = context.Pipe()
        self.process = context.Process(target=worker, args=(child, str(model), options), daemon=True)
        self.process.start()
        self.conn.recv()

    def __call__(self, name: str, argument: int = 0) -> float:
        self.conn.send((name, argument))
        return float(self.conn.recv())

    def stop(self) -> None:
        self.conn.send(("stop", 0))
        self.process.join()


def device_options(device: str) -> tuple[dict[str, Any], int]:
    """Options of Llama for a device, and its number among the GPUs, -1 for the CPU."""
    if device == "cpu":
        return {}, -1
    from pyheadkv._lib import gpu_names

    names = [name.lower() for name in gpu_names()]
    if device.lower() not in names:
        raise SystemExit(f"--device {device}: the library has {', '.join(names) or 'no GPU'}")
    i_gpu = names.index(device.lower())
    return {"n_gpu_layers": 99, "split_mode": 0, "main_gpu": i_gpu}, i_gpu


def hardware(device: str) -> str:
    """Name of the GPU, if one is used, and of the processor."""
    from pyheadkv._lib import gpu_description

    i_gpu = device_options(device)[1]
    return (gpu_description(i_gpu) + ", " if i_gpu >= 0 else "") + machine()


def device_bytes(i_gpu: int) -> int:
    """Bytes in use on a GPU by all processes; 0 without one."""
    from pyheadkv._lib import gpu_bytes_used

    return gpu_bytes_used(i_gpu) if i_gpu >= 0 else 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures as rows of (what, ms per token, ratio of speeds to the stock cache at empty context)."""
    model = args.model or ROOT / "build" / f"bench-{args.shape.split('-')[-1]}-{args.ftype}.gguf"
    make_model(model, args.ftype, args.shape)
    options, i_gpu = device_options(args.device)
    options.update(n_ctx=args.prompt + 2048, n_threads=args.threads, n_threads_batch=args.threads, n_batch=512)
    if args.type_kv:
        options.update(type_k=args.type_kv, type_v=args.type_kv)
    # bytes on the device, weights included: those of the stock process, then what ours adds to them
    n_bytes: dict[str, float] = {}
    n_before = device_bytes(i_gpu)

    def note(what: str, who: Worker, command: str = "memory") -> None:
        if i_gpu >= 0:
            n_bytes[what] = who(command, args.prompt) - n_before

    stock = Worker(model, flash_attn=True, **options)
    note("stock, loaded", stock)
    if args.prefill:
        note("stock, peak of reading", stock, "peak_of_reading")
    n_before = device_bytes(i_gpu)
    ours = Worker(model, kv_size=args.kv_size, attend=args.attend, **options)
    note("loaded", ours)
    if args.prefill:
        note("peak of reading and compressing", ours, "peak_of_reading")

    ours("fill", args.prompt)
    note("before compression", ours)
    compress_s = ours("compress")
    note("after compression", ours)
    n_store = ours("store_bytes")
    ours("decode", 4)
    times: dict[str, list[float]] = {"stock, empty context": []}

    def rounds(what: str, restore: int, n: int) -> None:
        times[what] = []
        base = f"stock beside: {what}"
        times[base] = []
        for i in tqdm(range(args.rounds), desc=what):
            ours("truncate", restore)
            for who in (stock, ours) if i % 2 == 0 else (ours, stock):
                if who is stock:
                    stock("empty")
                    times[base].append(stock("decode", n))
                    times["stock, empty context"].append(times[base][-1])
                else:
                    times[what].append(ours("decode", n))

    rounds("ours, first 64 tokens", args.prompt, 64)
    ours("truncate", args.prompt)
    for _ in tqdm(range(0, args.generated - 64, 32), desc="generating"):
        ours("decode", 32)
    rounds(f"ours, at {args.generated} generated tokens", args.prompt + args.generated - 64, 64)
    for n in () if args.no_full else (2048, args.prompt):
        ours("fill", n)
        rounds(f"full cache (same build), {n} tokens", n, 16)

    rows = []
    if args.uncompressed:
        # every head keeps all cells; upstream's attention over a full cache beside it
        whole = Worker(model, kv_size=args.prompt + 1024, attend=args.attend, **options)
        for who in (ours, whole):
            who("fill", args.prompt)
        whole("compress")
        pairs = []
        for i in tqdm(range(args.rounds), desc="uncompressed store"):
            for who in (ours, whole):
                who("truncate", args.prompt)
            order = (ours, whole) if i % 2 == 0 else (whole, ours)
            pair = {who: who("decode", 16) for who in order}
            pairs.append((pair[ours], pair[whole]))
        whole.stop()
        rows.append(
            {
                "what": f"uncompressed store, {args.prompt} tokens; speed against upstream's flash attention over as many cells",
                "value": round(1000 * statistics.median(w for _, w in pairs), 3),
                "unit": "ms/token",
                "speed_ratio": round(statistics.median(s / w for s, w in pairs), 4),
            }
        )
    for what, values in times.items():
        if what.startswith("stock beside"):
            continue
        base = times.get(f"stock beside: {what}", values)
        ratio = statistics.median(b / v for b, v in zip(base, values))
        rows.append({"what": what, "value": round(1000 * statistics.median(values), 3), "unit": "ms/token", "speed_ratio": round(ratio, 4)})
    rows.append({"what": f"store after {args.prompt} tokens", "value": int(n_store), "unit": "bytes", "speed_ratio": ""})
    rows += [{"what": f"device memory, {what}", "value": int(n), "unit": "bytes", "speed_ratio": ""} for what, n in n_bytes.items()]
    rows.append({"what": f"compression of {args.prompt} tokens", "value": round(1000 * compress_s, 1), "unit": "ms", "speed_ratio": ""})
    if args.prefill:
        seconds = ours("prefill", args.prompt)
        compress_s = ours("compress")
        rows.append({"what": f"prefill of {args.prompt} tokens", "value": round(1000 * seconds, 1), "unit": "ms", "speed_ratio": ""})
        rows.append({"what": "compression / prefill", "value": round(compress_s / seconds, 5), "unit": "share", "speed_ratio": ""})
    stock.stop()
    ours.stop()
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda0, ... (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b", help="shape of the random model (default: %(default)s)")
    parser.add_argument("--ftype", default="q8_0", help="weights of the random model: f16, q8_0 or q4_0 (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="file of the random model, made when missing (default: build/bench-SIZE-FTYPE.gguf)")
    parser.add_argument("--attend", default="auto", help="auto, fused or composed (default: %(default)s)")
    parser.add_argument("--uncompressed", action="store_true", help="also decode from a store with all cells of the prompt")
    parser.add_argument("--prompt", type=int, default=8192, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--generated", type=int, default=1024, help="generated tokens of the second point (default: %(default)s)")
    parser.add_argument("--kv-size", type=int, default=128, help="mean cells per KV head (default: %(default)s)")
    parser.add_argument("--type-kv", type=int, default=0, help="ggml type of K and V, 8 = q8_0 (default: f16)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: %(default)s)")
    parser.add_argument("--no-full", action="store_true", help="leave out decoding from the full cache, which takes longest")
    parser.add_argument("--prefill", action="store_true", help="also read a real prompt (minutes)")
    parser.add_argument("--out", type=Path, help="CSV to write")
    args = parser.parse_args()

    rows = measure(args)
    head = {
        "command": "python bench/bench_decode.py " + " ".join(a for a in sys.argv[1:]),
        "commit": commit(),
        "machine": hardware(args.device),
    }
    out = open(args.out, "w", newline="") if args.out else sys.stdout
    writer = csv.DictWriter(out, fieldnames=[*rows[0], *head])
    writer.writeheader()
    writer.writerows({**row, **head} for row in rows)


if __name__ == "__main__":
    main()
