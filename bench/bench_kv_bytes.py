"""Bytes of K and V over the length of the prompt, the stock cache against kv_size=128: a CSV and the picture of the README.

    python bench/bench_kv_bytes.py MODEL.gguf --out bench/results/kv_bytes.csv --picture docs/kv_bytes.png

Prompts up to ``--read`` tokens are read. Longer ones are filled with random K and V in place of reading (``headkv_fill_prompt``) and
then compressed: what a cache holds under a policy with uniform budgets does not depend on what was read. Bytes are those of
``kv_stats()`` after the prompt: ``bytes_store``, which has room for 64 generated tokens per head, and ``bytes_full``, what the cells of as
many tokens take in a stock cache of the same types.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from pyheadkv import Llama, _lib
from pyheadkv.eval.journal import commit, machine
from pyheadkv.eval.prose import HAYSTACK
from pyheadkv.units import round_n_ctx


def measure(model: Path, n: int, *, kv_size: int, policy: str, is_read: bool, threads: int) -> dict[str, Any]:
    """Bytes after one prompt."""
    llm = Llama(model, kv_size=kv_size, policy=policy, n_ctx=round_n_ctx(n + 64), n_threads=threads, n_threads_batch=threads, verbose=False)
    if is_read:
        text = HAYSTACK.read_bytes()
        ids: list[int] = []
        while len(ids) < n:
            ids += llm.tokenize(text, add_bos=not ids)
        llm.read_prompt(ids[:n])
    else:
        _lib.check(_lib.lib.headkv_fill_prompt(llm.ctx, 0, n, 1))
        llm.n_tokens = n
        llm.end_prompt()
    stats = llm.kv_stats()
    llm.close()
    assert (stats.state, stats.n_prompt, stats.bytes_staging) == ("compressed", n, 0)
    return {
        "model": model.name,
        "policy": policy,
        "kv_size": kv_size,
        "tokens": n,
        "prompt": "read" if is_read else "filled",
        "bytes_stock": stats.bytes_full,
        "bytes_compressed": stats.bytes_store,
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Two lines, MiB over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    tokens = [row["tokens"] for row in rows]
    for name, label, color in (("bytes_stock", "stock cache", "#888888"), ("bytes_compressed", f"kv_size={rows[0]['kv_size']}", "#c1440e")):
        mib = [row[name] / 2**20 for row in rows]
        axes.plot(tokens, mib, marker="o", ms=4, color=color)
        axes.annotate(
            f"{label}: {mib[-1]:.3g} MiB", (tokens[-1], mib[-1]), xytext=(-8, 6), textcoords="offset points", ha="right", color=color
        )
    axes.set(xlabel="tokens of the prompt", ylabel="MiB of K and V", ylim=(0, 1.1 * max(row["bytes_stock"] for row in rows) / 2**20))
    axes.set_title(f"{Path(rows[0]['model']).stem}, f16 K and V", loc="left", fontsize=10)
    axes.set_xticks(tokens[-4:], [f"{n // 1024}k" for n in tokens[-4:]])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768", metavar="LIST", help="tokens (default: %(default)s)")
    parser.add_argument("--read", type=int, default=4096, metavar="N", help="longest prompt that is read (default: %(default)s)")
    parser.add_argument("--kv-size", type=int, default=128, metavar="N", help="cells (default: %(default)s)")
    parser.add_argument("--policy", default="snapkv", help="one with uniform budgets (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    parser.add_argument("--picture", type=Path, required=True, metavar="FILE.png")
    args = parser.parse_args()
    rows = []
    for n in map(int, args.lengths.split(",")):
        row = measure(args.model, n, kv_size=args.kv_size, policy=args.policy, is_read=n <= args.read, threads=args.threads)
        rows.append({**row, "machine": machine(), "commit": commit()})
        print(rows[-1], flush=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.picture)


if __name__ == "__main__":
    main()
