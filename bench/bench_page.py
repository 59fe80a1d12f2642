"""What the page at /kv costs the answers of llama-server: when nobody looks, when somebody does, and when it is flooded.

Two servers, one without the page, take turns; a round has each kind once, in an order that changes. Ratios are medians of those within a
round, with their quartiles.

    python bench/bench_page.py decode --model MODEL.gguf --out bench/results/page_decode.csv
    python bench/bench_page.py flood --model MODEL.gguf --out bench/results/page_flood.csv
"""

from __future__ import annotations

import argparse
import collections
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pyheadkv.cli import serve
from pyheadkv.eval.journal import append_row, commit, machine

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from llama_server import Server, running

LOOK = ("/slots", "/kv/positions?slot=0")  # what the page asks each time
TOKENS = (300, 383)  # random ones of the prompts


def flags(args: argparse.Namespace, *, page: bool) -> list[Any]:
    """Of a server with one slot; without the page its requests and notes are not there."""
    n_ctx = -(-(args.n_prompt + args.n_predict + 1) // 256) * 256
    common = ["-m", args.model, "-c", n_ctx, "-np", 1, "-t", args.threads, "-tb", args.threads, "--kv-size", args.kv_size]
    return [*common, "--kv-page", serve.page_path() if page else "off"]


def make_prompt(n: int) -> list[int]:
    return [1, *np.random.default_rng(0).integers(*TOKENS, size=n - 1).tolist()]


@contextmanager
def watched(server: Server, per_second: float) -> Iterator[list[int]]:
    """Somebody looks so often; the statuses of the answers. 0 = nobody."""
    codes: list[int] = []
    stop = threading.Event()

    def look() -> None:
        due = time.monotonic()
        while not stop.wait(max(0.0, due - time.monotonic())):
            due = max(due + 1 / per_second, time.monotonic())  # on a busy machine it does not make up for what it missed
            codes.extend(server.request(path)[0] for path in LOOK)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look) if per_second > 0 else None
        try:
            yield codes
        finally:
            stop.set()
            if looking:
                looking.result()


def answer(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    return server.complete(make_prompt(args.n_prompt), args.n_predict, ignore_eos=True, cache_prompt=False)


def decode(args: argparse.Namespace) -> None:
    """Milliseconds per generated token: without the page, with it, and with so many looks in a second."""
    rates = [float(rate) for rate in args.rates.split(",")]
    kinds = ["off", "off again", "on", *(f"{rate:g} a second" for rate in rates)]
    looks = dict(zip(kinds, [0.0, 0.0, 0.0, *rates]))
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    n_looks: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {page: stack.enter_context(running(*flags(args, page=page), log=Path(folder) / str(page))) for page in (False, True)}
        expected = [answer(server, args)["tokens"] for server in servers.values()]
        assert expected[0] == expected[1]
        for i in range(args.rounds):
            order = list(itertools.islice(itertools.cycle(kinds), i % len(kinds), i % len(kinds) + len(kinds)))
            for kind in order if i % 2 == 0 else order[::-1]:
                server = servers[not kind.startswith("off")]
                with watched(server, looks[kind]) as codes:
                    found = answer(server, args)
                assert found["tokens"] == expected[0] and set(codes) <= {200}, codes
                times[kind].append(found["timings"]["predicted_per_token_ms"])
                n_looks[kind] += len(codes) // len(LOOK)
            print(f"round {i}: " + ", ".join(f"{kind} {times[kind][-1]:.3f} ms" for kind in kinds), flush=True)
    for kind in kinds:
        ratios = [a / b for a, b in zip(times[kind], times["off"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = {"kind": kind, "rounds": args.rounds, "looks": n_looks[kind], "decode_ms": round(statistics.median(times[kind]), 4)}
        write({**row, "ratio": round(middle, 4), "ratio_25": round(low, 4), "ratio_75": round(high, 4)}, args)


def flood(args: argparse.Namespace) -> None:
    """Many questions from several clients at once while an answer is written: how many were answered, and what it cost the answer."""
    with tempfile.TemporaryDirectory() as folder, running(*flags(args, page=True), log=Path(folder) / "log") as server:
        plain = answer(server, args)
        codes: collections.Counter[int] = collections.Counter()
        slowest = 0.0
        left = iter(range(args.questions))
        lock = threading.Lock()

        def client() -> None:
            nonlocal slowest
            while True:
                with lock:
                    if next(left, None) is None:
                        return
                start = time.monotonic()
                status = server.request(LOOK[1])[0]
                with lock:
                    codes[status] += 1
                    slowest = max(slowest, time.monotonic() - start)

        start = time.monotonic()
        with ThreadPoolExecutor(args.clients + 1) as pool:
            clients = [pool.submit(client) for _ in range(args.clients)]
            answers = []
            while not all(done.done() for done in clients):
                answers.append(answer(server, args))
            for done in clients:
                done.result()
        seconds = time.monotonic() - start
        assert all(found["tokens"] == plain["tokens"] for found in answers) and server.request("/health")[0] == 200
        assert set(codes) <= {200, 429}, codes
        row = {
            "questions": args.questions,
            "clients": args.clients,
            "seconds": round(seconds, 1),
            "answered": codes[200],
            "refused": codes[429],
        }
        times = [found["timings"]["predicted_per_token_ms"] for found in answers]
        row |= {"slowest_ms": round(1000 * slowest), "answers": len(answers), "decode_ms": round(statistics.median(times), 4)}
        write({"kind": "flood", **row, "decode_ms_alone": round(plain["timings"]["predicted_per_token_ms"], 4)}, args)


def write(row: dict[str, Any], args: argparse.Namespace) -> None:
    """Append a row to the file of results."""
    sizes = {"n_prompt": args.n_prompt, "n_predict": args.n_predict, "kv_size": args.kv_size, "threads": args.threads}
    origin = {"machine": machine(), "commit": commit(), "command": f"python bench/bench_page.py {' '.join(sys.argv[1:])}"}
    row = {"model": Path(args.model).name, **row, **sizes, **origin}
    append_row(args.out, row)
    print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "flood"))
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "pyheadkv" / "data" / "needle.gguf")
    parser.add_argument("--n-prompt", type=int, default=2048)
    parser.add_argument("--n-predict", type=int, default=6000)
    parser.add_argument("--kv-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rates", default="1,10", help="looks in a second (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=10000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    {"decode": decode, "flood": flood}[args.what](args)


if __name__ == "__main__":
    main()
