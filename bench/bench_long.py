"""Long answers: speed and memory while they grow, and what bounding them costs.

    python bench/bench_long.py MODEL.gguf speed --tokens 8192 --out bench/results/long_speed.csv
    python bench/bench_long.py MODEL.gguf quality --tokens 8192 --out bench/results/long_quality.csv

``speed``: a prompt of ``--prompt`` tokens, then greedy tokens whose end is ignored, in the stock cache, with ``kv_size`` alone, and with
``kv_size`` and ``kv_generated``: one process each, which take turns of ``--turn`` tokens, so that other load hits all of them. A row
is about ``--row`` tokens: the median speed of their turns, and at their end resident memory of the process that is not the model's
file and cells per head; the share of the time is that of evictions. With ``--tokens 32768`` it takes hours on two cores.

``quality``: a text is evaluated in batches of ``--batch`` tokens behind a prompt of 256 that is kept whole, and its likelihood
counted from the token on at which the smallest amount begins to evict, so that all settings are measured on the same tokens. ``nats``
is per token, ``error`` that of the difference to all cells. Budgets: the same for all heads (lossless, snapkv), by importance (headkv)
or by the text (adakv). ``all``, ``recent`` and 4 sinks are StreamingLLM, whose heads hold 256 cells more for the prompt.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing as mp
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from pyheadkv import Llama
from pyheadkv.eval.journal import append_row, commit, machine

TEXT = Path(__file__).parent.parent / "pyheadkv" / "data" / "haystack.txt"
MIB = 1 << 20
N_PROMPT = 256  # of the texts that are evaluated


def rss_own() -> float:
    """Resident MiB of this process that are no file's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def text_tokens(llm: Llama) -> list[int]:
    return list(llm.tokenize(TEXT.read_bytes()))


# speed


def work(connection: Any, model: Path, options: dict[str, Any], n_prompt: int) -> None:
    """A process that generates as many tokens as it is told."""
    llm = Llama(model, verbose=False, flash_attn=True, **options)
    is_ours = llm.kv_options is not None
    prompt = text_tokens(llm)[:n_prompt]
    llm.read_prompt(prompt) if is_ours else llm.eval(prompt)
    end = llm.token_eos()
    evict_ms = 0.0
    connection.send(None)
    while (n := connection.recv()) > 0:
        start = time.perf_counter()
        for _ in range(n):
            logits = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),))
            logits[end] = -np.inf
            llm.eval([int(logits.argmax())])
        seconds = time.perf_counter() - start
        row: dict[str, Any] = {"n_past": llm.n_tokens, "tokens_per_s": round(n / seconds, 3), "rss_mib": round(rss_own(), 1)}
        stats = llm.kv_stats() if is_ours else None
        row["cells"] = round(float(stats.n_cells.mean()), 1) if stats else llm.n_tokens
        row["store_mib"] = round(stats.bytes_store / MIB, 2) if stats else ""
        row["evictions"] = stats.n_evictions if stats else 0
        row["seconds"], row["evict_s"] = seconds, (stats.evict_ms - evict_ms) / 1000 if stats else 0.0
        evict_ms = stats.evict_ms if stats else 0.0
        connection.send(row)


def speed(args: argparse.Namespace, about: dict[str, Any]) -> None:
    """Rows of all turns."""
    bound = {"kv_size": args.kv_size, "kv_generated": args.kv_generated}
    kinds: dict[str, dict[str, Any]] = {"stock": {}, "kv_size": {"kv_size": args.kv_size}, "kv_generated": bound}
    context, workers = mp.get_context("spawn"), {}
    for name, options in kinds.items():
        n_ctx = args.prompt + 512 if name == "kv_generated" else args.prompt + args.tokens + 256
        threads = {"n_ctx": max(n_ctx, 1024), "n_threads": args.threads, "n_threads_batch": args.threads}
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, args.model, {**options, **threads}, args.prompt), daemon=True)
        process.start()
        here.recv()
        workers[name] = here
    for _ in range(args.tokens // args.row):
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
        for _ in range(args.row // args.turn):
            for name, worker in workers.items():
                worker.send(args.turn)
                turns[name].append(worker.recv())
        for name, found in turns.items():
            median = {"tokens_per_s": round(statistics.median(turn["tokens_per_s"] for turn in found), 3)}
            share = sum(turn["evict_s"] for turn in found) / sum(turn["seconds"] for turn in found)
            last = {key: value for key, value in found[-1].items() if key not in ("seconds", "evict_s")}
            row = {"model": args.model.stem, "cache": name, **last, **median, "evict_share": round(share, 4), **about}
            append_row(args.out, row)
            print({key: row[key] for key in list(row)[1:9]}, flush=True)
    for worker in workers.values():
        worker.send(0)


# quality


def likelihoods(llm: Llama, tokens: list[int], n_batch: int) -> npt.NDArray[np.float64]:
    """Log-probability of each token but the first one, behind those before it."""
    n_vocab, n_past, out = llm.n_vocab(), llm.n_tokens, []
    batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
    for i in range(0, len(tokens) - 1, n_batch):
        part = tokens[i : i + n_batch]
        batch.n_tokens = len(part)
        for j, token in enumerate(part):
            batch.token[j], batch.pos[j], batch.n_seq_id[j], batch.seq_id[j][0], batch.logits[j] = token, n_past + i + j, 1, 0, True
        if llama_cpp.llama_decode(llm.ctx, batch) != 0:
            raise RuntimeError("a batch could not be decoded")
        pointer = ctypes.cast(llama_cpp.llama_get_logits(llm.ctx), ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(pointer, shape=(len(part), n_vocab)).astype(np.float64)
        following = tokens[i + 1 : i + 1 + n_batch]
        top = logits.max(axis=1)
        norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        out.append(logits[np.arange(len(following)), following] - norm[: len(following)])
    llama_cpp.llama_batch_free(batch)
    return np.concatenate(out)


def quality(args: argparse.Namespace, about: dict[str, Any]) -> None:
    """A row for each setting."""
    amounts = [int(part) for part in args.amounts.split(",")]
    whole = {"kv_size": N_PROMPT + 1}  # keeps the prompt, and says nothing of the budgets
    settings: list[dict[str, Any]] = [{"policy": "lossless"}]
    for amount in amounts:
        ranks: list[dict[str, Any]] = [{"policy": "lossless", "kv_generated_rank": rank} for rank in ("attention", "recent", "redundancy")]
        budgets: list[dict[str, Any]] = [{**whole, "policy": policy} for policy in ("headkv", "adakv")]
        streaming = {**whole, "policy": "snapkv", "kv_generated_rank": "recent", "kv_generated_scope": "all", "sinks": 4}
        settings += [{**setting, "kv_generated": amount} for setting in (*ranks, *budgets, streaming)]
    first = min(amounts) + 128  # generated tokens before the first eviction of the smallest amount
    full: npt.NDArray[np.float64] | None = None
    for setting in settings:
        options = {"n_ctx": args.tokens + 512, "n_threads": args.threads, "n_threads_batch": args.threads, **setting}
        llm = Llama(args.model, verbose=False, **options)
        tokens = text_tokens(llm)[: args.tokens]
        llm.read_prompt(tokens[:N_PROMPT])
        found = likelihoods(llm, tokens[N_PROMPT:], args.batch)[first:]
        full = found if full is None else full
        stats = llm.kv_stats()
        blocks = (found - full)[: len(found) // 64 * 64].reshape(-1, 64).mean(axis=1)  # of neighbours, which depend on each other
        row = {
            "model": args.model.stem,
            "tokens": len(tokens),
            "counted": len(found),
            "kv_generated": setting.get("kv_generated", "all"),
            "rank": setting.get("kv_generated_rank", "attention"),
            "scope": setting.get("kv_generated_scope", "generated"),
            "policy": llm.policy,
            "cells": round(float(stats.n_cells.mean()), 1),
            "nats": round(float(-found.mean()), 4),
            "more_than_all": round(float((full - found).mean()), 4),
            "error": round(float(blocks.std(ddof=1) / len(blocks) ** 0.5), 4),
            **about,
        }
        append_row(args.out, row)
        print({key: row[key] for key in list(row)[2:11]}, flush=True)
        llm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("what", choices=("speed", "quality"))
    parser.add_argument("--tokens", type=int, default=8192, help="generated, or of the text")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--turn", type=int, default=32, help="tokens that a process generates before it is the next one's turn")
    parser.add_argument("--row", type=int, default=512, help="tokens of each process that a row of the table is about")
    parser.add_argument("--kv-size", type=int, default=128)
    parser.add_argument("--kv-generated", type=int, default=512)
    parser.add_argument("--amounts", default="256,512,1024", metavar="LIST", help="values of kv_generated whose likelihood is measured")
    parser.add_argument("--batch", type=int, default=16, help="tokens of the text at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="table to append to")
    args = parser.parse_args()
    command = f"python bench/bench_long.py {' '.join(sys.argv[1:])}"
    about = {"threads": args.threads, "machine": machine(), "commit": commit(), "command": command}
    (speed if args.what == "speed" else quality)(args, about)


if __name__ == "__main__":
    main()
