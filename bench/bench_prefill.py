"""Time and peak memory of reading a prompt: stock cache, token-major and layer-major.

"layer-ggml" has the attention of ggml, as the stock cache; the others that compress have ours. "h2o" sums the attention of all queries, too. Of models with windows, "stock" has rings for their layers, and "full" caches all tokens there (``swa_full``, the default of llama.h).

Every kind of cache runs in a process of its own, so that the peak of resident memory
is its own; the rounds are interleaved and ratios are medians of paired ones.

    python bench/bench_prefill.py --lengths 4096,8192 --out bench/results/prefill_cpu.csv
    python bench/bench_prefill.py --model MODEL.gguf --some-layers 2 4 --lengths 16384,32768 --kinds stock,layer --out ...
    python bench/bench_prefill.py --model GEMMA.gguf --kv-size 256 --kinds stock,full,token,layer --lengths 4096,16384 --out ...
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from bench_decode import make_model
from tqdm import tqdm

from pyheadkv.eval.journal import commit, machine


def some_layers(path: Path, n: int) -> Path:
    """A copy of a model with n of its layers, evenly spread (types of weights differ between them), made when missing."""
    out = Path("build") / f"{path.stem}-{n}-layers.gguf"
    if out.is_file():
        return out
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    n_layer = reader.fields[f"{arch}.block_count"].contents()
    number = {str(i * n_layer // n): str(i) for i in range(n)}
    writer = gguf.GGUFWriter(out, arch)
    for name, field in reader.fields.items():
        if (
            not name.startswith(("GGUF.", f"{arch}.attention.head_importance")) and name != "general.architecture"
        ):  # importance is of all layers
            value = n if name == f"{arch}.block_count" else field.contents()
            writer.add_key_value(name, value, field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        part = tensor.name.split(".")
        if part[0] == "blk":
            part[1] = number.get(part[1], "")
        if "" not in part:
            writer.add_tensor(".".join(part), tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


KINDS: dict[str, dict[str, Any]] = {
    "stock": {"flash_attn": True, "swa_full": False},
    "token": {"prefill": "token"},
    "layer": {"prefill": "layer"},
    "layer-ggml": {"prefill": "layer", "attend": "composed"},
    "h2o": {"prefill": "layer", "policy": "h2o"},
    "h2o-ggml": {"prefill": "layer", "policy": "h2o", "attend": "composed"},
    "full": {"flash_attn": True, "swa_full": True},
}
DEFAULT_KINDS = "stock,token,layer"
CELLS = {"f16": 1, "q8_0": 8, "q4_0": 2}  # enum ggml_type
FLOOR = "model"  # the stock cache of one ubatch: what the loaded model and its compute buffers take


def read(kind: str, n: int, args: argparse.Namespace) -> dict[str, float]:
    """Read one prompt, or its first n_read tokens or n_layer layers, in this process: seconds, compression ms, peak of resident bytes above the loaded model."""
    from pyheadkv import Llama

    if kind == FLOOR:
        n = args.ubatch
    options = KINDS.get(kind, KINDS["stock"])
    if "prefill" in options:
        options = {**options, "kv_size": args.kv_size}
    llm = Llama(
        args.model,
        n_ctx=n + 256,
        n_batch=args.ubatch,
        n_ubatch=args.ubatch,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        type_k=CELLS[args.cells],
        type_v=CELLS[args.cells],
        verbose=False,
        **options,
    )
    prompt = [1, *np.random.default_rng(0).integers(300, 383, size=min(n, args.read) - 1).tolist()]
    llm.read_prompt(prompt[: args.ubatch])
    llm.reset()
    if kind == "layer":
        llm.set_progress(lambda il, *_: il < args.layers)
    start = time.perf_counter()
    try:
        llm.read_prompt(prompt)
    except RuntimeError as error:
        if "aborted" not in str(error):
            raise
    seconds = time.perf_counter() - start
    stats = llm.kv_stats() if llm.kv_options else None
    return {
        "seconds": seconds,
        "compress_ms": stats.compress_ms if stats else 0.0,
        "rss_peak": status_bytes("VmHWM"),
        "rss_after": status_bytes("RssAnon"),
        "bytes_peak": stats.bytes_peak if stats else 0,
        "bytes_store": stats.bytes_store if stats else 0,
    }


def status_bytes(field: str) -> int:
    """A size in /proc/self/status: RssAnon, resident pages of no file; VmHWM, largest resident size so far."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/bench-1b-q8_0.gguf"), help="random model, made when missing")
    parser.add_argument("--lengths", default="4096,8192", help="prompt tokens (default: %(default)s)")
    parser.add_argument("--ubatch", type=int, default=512, help="tokens of a ubatch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--read",
        type=int,
        default=1 << 30,
        help="tokens to read of a context for more: the stock cache is written "
        "when it is made, so that its peak is nearly there from the beginning (default: all)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=1 << 30,
        help="layers to read layer by layer: the first two take the memory of all but for the store (default: all)",
    )
    parser.add_argument("--kinds", default=DEFAULT_KINDS, help=f"of {', '.join(KINDS)} (default: %(default)s)")
    parser.add_argument("--kv-size", type=int, default=128, help="mean cells per KV head (default: %(default)s)")
    parser.add_argument("--cells", choices=CELLS, default="f16", help="type of K and V (default: %(default)s)")
    parser.add_argument("--model-layers", type=int, help="layers of the random model, when it is made (default: those of its shape)")
    parser.add_argument(
        "--some-layers",
        type=int,
        nargs=2,
        metavar=("FEW", "MORE"),
        help="two copies of the model with so many of its layers are read, and seconds are those of one layer, by their difference (default: "
        "the model). The last layer of a model is not computed for tokens without output, so that a copy alone would say too little",
    )
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, n = args.one.split(":")
        print(json.dumps(read(kind, int(n), args)))
        return

    make_model(args.model, "q8_0", n_layer=args.model_layers)

    def run(kind: str, n: int) -> dict[str, float]:
        if not args.some_layers:
            return run_model(args.model, kind, n)
        if kind == FLOOR:
            return run_model(some_layers(args.model, args.some_layers[1]), kind, n)
        few, more = (run_model(some_layers(args.model, n_layer), kind, n) for n_layer in args.some_layers)
        n_layer = args.some_layers[1] - args.some_layers[0]
        return {
            **more,
            "seconds": (more["seconds"] - few["seconds"]) / n_layer,
            "compress_ms": (more["compress_ms"] - few["compress_ms"]) / n_layer,
        }

    def run_model(model: Path, kind: str, n: int) -> dict[str, float]:
        cmd = [
            sys.executable,
            __file__,
            "--one",
            f"{kind}:{n}",
            "--model",
            str(model),
            "--ubatch",
            str(args.ubatch),
            "--threads",
            str(args.threads),
            "--read",
            str(args.read),
            "--layers",
            str(args.layers),
            "--kv-size",
            str(args.kv_size),
            "--cells",
            args.cells,
        ]
        found: dict[str, float] = json.loads(subprocess.run(cmd, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
        return found

    floor = run(FLOOR, args.ubatch)["rss_peak"]
    rows = []
    for n in [int(x) for x in args.lengths.split(",")]:
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in args.kinds.split(",")}
        for i in tqdm(range(args.rounds), desc=f"{n} tokens"):
            for kind in list(runs)[:: 1 if i % 2 == 0 else -1]:
                runs[kind].append(run(kind, n))
        for kind, found in runs.items():

            def median(key: str, found: list[dict[str, float]] = found) -> float:
                return statistics.median(run[key] for run in found)

            row: dict[str, Any] = {"tokens": n, "prefill": kind, "seconds": round(median("seconds"), 3)}
            if "stock" in runs:
                pairs = zip(found, runs["stock"])
                row["time_ratio_to_stock"] = round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 4)
            row["compress_share"] = round(median("compress_ms") / 1000 / median("seconds"), 5)
            row["rss_peak_mib"] = round(median("rss_peak") / 2**20, 1)
            row["rss_peak_above_model_mib"] = round((median("rss_peak") - floor) / 2**20, 1)
            row["rss_anon_after_mib"] = round(median("rss_after") / 2**20, 1)
            row["ledger_peak_mib"] = round(median("bytes_peak") / 2**20, 1)
            row["store_mib"] = round(median("bytes_store") / 2**20, 2)
            rows.append(row)
    head = {"command": "python bench/bench_prefill.py " + " ".join(sys.argv[1:]), "commit": commit(), "machine": machine()}
    out = open(args.out, "w", newline="") if args.out else sys.stdout
    writer = csv.DictWriter(out, fieldnames=[*dict.fromkeys(k for row in rows for k in row), *head])
    writer.writeheader()
    writer.writerows({**row, **head} for row in rows)


if __name__ == "__main__":
    main()
