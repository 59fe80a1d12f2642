"""Long answers: whether memory and speed stay what they were.

    python bench/bench_long.py MODEL.gguf --tokens 32768 --growth bench/results/long_growth.csv --speed bench/results/long_speed.csv

First a process with ``kv_size`` and ``kv_generated`` reads a prompt of ``--prompt`` tokens and generates ``--tokens`` greedy ones whose end
is ignored. Other load does no harm: a row of ``--growth`` per ``--row`` tokens says what it holds, and which share of the time evictions
took. It is long: an hour or more on two cores.

Then speed, as ratios inside one run: this process, at its end, and others take turns. New ones of the same settings, right behind the
prompt (*begin*), where each turn begins again, and at their first eviction (*full*), which go on and evict once a turn as the long one does:
turns of ``--turn`` tokens. The stock cache and ``kv_size`` alone, a quarter as long, begin at each of ``--depths`` again. Their past is
not computed, which would take hours: the stock cache holds copies of its first tokens' cells at the positions that follow, ``kv_size`` random cells,
in every head as many as it would have on average. A row of ``--speed`` is the median of a kind's turns, and that of the paired ratios of the long
process to it, with the lowest and the highest. With ``--wait FILE`` the turns begin when that file is there, so that they can
be left for a time when the machine is quiet.

``--layers N`` makes a model of random weights with the shape of Llama-3.2-1B and so many layers (its own: 16) when the file is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing as mp
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from bench_decode import make_model

from pyheadkv import Llama, _lib
from pyheadkv.eval.journal import append_row, commit, machine

TEXT = Path(__file__).parent.parent / "pyheadkv" / "data" / "haystack.txt"
MIB = 1 << 20
N_READ = 64  # tokens of what was generated that are read at a time


def rss_own() -> float:
    """Resident MiB of this process that are no file's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def text_tokens(llm: Any) -> list[int]:
    return list(llm.tokenize(TEXT.read_bytes()))


class Stock(llama_cpp.Llama):
    """The stock cache, which can be filled without computing all of it: cells of its first tokens are copied, and the positions of the copies
    are moved on."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "context_params":
            value.n_seq_max, value.kv_unified = 2, True
        super().__setattr__(name, value)

    def fill(self, tokens: list[int], n: int) -> None:
        """Hold n cells, a multiple of the tokens."""
        memory = llama_cpp.llama_get_memory(self.ctx)
        self.eval(tokens)
        size = llama_cpp.llama_state_seq_get_size(self.ctx, 0)
        state = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self.ctx, state, size, 0)
        for pos in range(len(tokens), n, len(tokens)):
            if llama_cpp.llama_state_seq_set_data(self.ctx, state, size, 1) == 0:
                raise RuntimeError(f"{len(tokens)} cells could not be copied to position {pos}")
            llama_cpp.llama_memory_seq_add(memory, 1, 0, -1, pos)
            llama_cpp.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            llama_cpp.llama_memory_seq_rm(memory, 1, -1, -1)
        self.input_ids[:n] = (tokens * (n // len(tokens)))[:n]
        self.n_tokens = n


class Generator:
    """A model, a cache, and what it holds when it begins to generate.

    Parameters
    ----------
    options : of Llama
    n_prompt : tokens of the prompt
    said : tokens that another one has generated behind it, to be read
    n_cells : instead of that, cells that every head holds; the stock cache computes those of the prompt
    goes_on : turns follow each other, instead of beginning where the first one began
    """

    def __init__(
        self, model: Path, options: dict[str, Any], *, n_prompt: int = 0, said: Sequence[int] = (), n_cells: int = 0, goes_on: bool = False
    ) -> None:
        self.is_ours, self.goes_on = "kv_size" in options, goes_on
        make: Any = Llama if self.is_ours else Stock
        self.llm = make(str(model), verbose=False, flash_attn=True, **options)
        if n_cells == 0:
            self.llm.read_prompt(text_tokens(self.llm)[:n_prompt])
            for i in range(0, len(said), N_READ):
                self.llm.eval(said[i : i + N_READ])
        elif self.is_ours:
            _lib.check(_lib.lib.headkv_fill_prompt(self.llm.ctx, 0, n_cells, 1))
            self.llm.n_tokens = n_cells
            self.llm.end_prompt()
        else:
            self.llm.fill(text_tokens(self.llm)[:n_prompt], n_cells)
        self.llm.eval([7])
        self.begin, self.end = self.llm.n_tokens, self.llm.token_eos()

    def turn(self, n: int) -> dict[str, Any]:
        """Generate n tokens; how long it took, and what is held then."""
        if not self.goes_on:
            self.llm.n_tokens = self.begin  # the next eval removes what is behind
            self.llm.eval([7])
        before = self.llm.kv_stats() if self.is_ours else None
        start = time.perf_counter()
        for _ in range(n):
            logits = np.ctypeslib.as_array(self.llm._ctx.get_logits_ith(-1), shape=(self.llm.n_vocab(),))
            logits[self.end] = -np.inf
            self.llm.eval([int(logits.argmax())])
        seconds = time.perf_counter() - start
        stats = self.llm.kv_stats() if self.is_ours else None
        return {
            "n_past": self.llm.n_tokens,
            "tokens_per_s": n / seconds,
            "seconds": seconds,
            "evict_s": (stats.evict_ms - before.evict_ms) / 1000 if stats and before else 0.0,
            "evictions": stats.n_evictions if stats else 0,
            "cells": float(stats.n_cells.mean()) if stats else float(self.llm.n_tokens),
            "store_mib": stats.bytes_store / MIB if stats else 0.0,
            "rss_mib": rss_own(),
        }

    def said(self, start: int) -> list[int]:
        """Tokens from one position on."""
        return list(self.llm.input_ids[start : self.llm.n_tokens].tolist())


def work(connection: Any, *args: Any, **kwargs: Any) -> None:
    """A process with a Generator, which does what it is told: (method, argument)."""
    generator = Generator(*args, **kwargs)
    connection.send(None)
    while (order := connection.recv()) is not None:
        connection.send(getattr(generator, order[0])(order[1]))


class Worker:
    """Such a process, from outside."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        context = mp.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=work, args=(there, *args), kwargs=kwargs, daemon=True)
        self.process.start()
        self.connection.recv()

    def __call__(self, method: str, argument: int) -> Any:
        self.connection.send((method, argument))
        return self.connection.recv()

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join()


def grow(long: Worker, args: argparse.Namespace, about: dict[str, Any]) -> None:
    """Generate, and say what is held meanwhile."""
    for _ in range(args.tokens // args.row):
        found = long("turn", args.row)
        row = {
            "model": args.model.stem,
            "n_past": found["n_past"],
            "rss_mib": round(found["rss_mib"], 1),
            "cells": round(found["cells"], 1),
            "store_mib": round(found["store_mib"], 2),
            "evictions": found["evictions"],
            "evict_share": round(found["evict_s"] / found["seconds"], 4),
        }
        print(row, f"{found['tokens_per_s']:.1f} tokens/s", flush=True)
        append_row(args.growth, {**row, **about})


def compare(long: Worker, others: dict[tuple[str, int], Worker], n_turn: int, args: argparse.Namespace, about: dict[str, Any]) -> None:
    """Turns of so many tokens of all, in an order that turns round; a row for each kind."""
    everyone = {("kv_generated", 0): long, **others}
    rounds: list[dict[tuple[str, int], dict[str, Any]]] = []
    for i in range(args.rounds):
        order = list(everyone)[:: 1 if i % 2 == 0 else -1]
        rounds.append({kind: everyone[kind]("turn", n_turn) for kind in order})
        print(
            f"round {i}:", {f"{name} {depth}": round(found["tokens_per_s"], 2) for (name, depth), found in rounds[-1].items()}, flush=True
        )
    for kind in everyone:
        turns = [found[kind] for found in rounds]
        ratios = [found["kv_generated", 0]["tokens_per_s"] / found[kind]["tokens_per_s"] for found in rounds]
        last = turns[-1]
        row = {
            "model": args.model.stem,
            "cache": kind[0],
            "depth": kind[1] or last["n_past"],
            "cells": round(last["cells"], 1),
            "tokens_per_s": round(statistics.median(turn["tokens_per_s"] for turn in turns), 3),
            "long_to_it": round(statistics.median(ratios), 4),
            "lowest": round(min(ratios), 4),
            "highest": round(max(ratios), 4),
            "evict_share": round(sum(turn["evict_s"] for turn in turns) / sum(turn["seconds"] for turn in turns), 4),
            "rounds": len(turns),
            "turn": n_turn,
        }
        print(row, flush=True)
        append_row(args.speed, {**row, **about})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--layers", type=int, metavar="N", help="make the model, with random weights, when it is missing")
    parser.add_argument("--ftype", default="q8_0", help="weights of such a model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32768, help="that the long process generates (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens before them (default: %(default)s)")
    parser.add_argument("--row", type=int, default=2048, help="tokens that a row of --growth is about (default: %(default)s)")
    parser.add_argument("--kv-size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--kv-generated", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--depths", default="2048,8192,32768", metavar="LIST", help="tokens of the past that the stock cache and kv_size are measured at (default: %(default)s)")  # fmt: skip
    parser.add_argument("--turn", type=int, default=128, help="tokens that a process generates before it is the next one's turn (default: the slack, so that each turn has an eviction)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="turns of each process (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--growth", type=Path, required=True, help="table to append to: what is held while it generates")
    parser.add_argument("--speed", type=Path, required=True, help="table to append to: the turns")
    parser.add_argument("--wait", type=Path, metavar="FILE", help="the turns begin when it is there")
    args = parser.parse_args()
    depths = [int(part) for part in args.depths.split(",")]
    if any(depth < args.prompt or depth % args.prompt for depth in depths):
        parser.error(f"--depths {args.depths}: each must be a multiple of --prompt {args.prompt}, whose cells are copied")
    if args.layers:
        make_model(args.model, args.ftype, n_layer=args.layers)
    command = f"python bench/bench_long.py {' '.join(sys.argv[1:])}"
    about = {"threads": args.threads, "machine": machine(), "commit": commit(), "command": command}

    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    bound = {"kv_size": args.kv_size, "kv_generated": args.kv_generated, "n_ctx": args.prompt + args.kv_generated + 512, **threads}
    long = Worker(args.model, bound, n_prompt=args.prompt, goes_on=True)
    grow(long, args, about)
    n_full = args.kv_generated + 128  # the slack
    near = {
        ("begin", 0): Worker(args.model, bound, n_prompt=args.prompt),
        ("full", 0): Worker(args.model, bound, n_prompt=args.prompt, said=long("said", args.prompt)[:n_full], goes_on=True),
    }
    beside = {}
    for depth in depths:
        room = {"n_ctx": depth + 1024, **threads}
        n_more = depth - args.prompt + args.kv_size
        beside["stock", depth] = Worker(args.model, room, n_prompt=args.prompt, n_cells=depth)
        beside["kv_size", depth] = Worker(args.model, {**room, "kv_size": n_more, "policy": "snapkv"}, n_cells=n_more)
    print("all are there", flush=True)
    while args.wait and not args.wait.exists():
        time.sleep(0.5)
    compare(long, near, args.turn, args, about)
    compare(long, beside, args.turn // 4, args, about)
    for worker in (long, *near.values(), *beside.values()):
        worker.stop()


if __name__ == "__main__":
    main()
