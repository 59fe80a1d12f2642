"""What the page at /kv costs the answers of llama-server: when nobody looks, when somebody does, and when it is flooded.

Two servers, one without the page, take turns; a round has each kind once, in random order. Ratios are medians of those within a round,
with an interval that has the true one in it 19 times out of 20. Beside the time by the clock there is the processor time of the server, all
its threads, which other load on the machine changes less. Both servers are on the first core, with all that they do for the page, and who asks
is on the others: a first run left it to the system, which kept each server on another core, one of them busy.

    python bench/bench_page.py decode --model MODEL.gguf --out bench/results/page_decode.csv
    python bench/bench_page.py look --model MODEL.gguf --out bench/results/page_look.csv
    python bench/bench_page.py flood --model MODEL.gguf --out bench/results/page_flood.csv
"""

from __future__ import annotations

import argparse
import collections
import os
import random
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


def processor_ms(server: Server) -> float:
    """Of all threads of the server so far."""
    return 1000 * time.clock_gettime((~server.process.pid << 3) | 2)  # the clock of another process, see clock_getcpuclockid(3)


def median_and_interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and an interval of the order statistics that has the true one in it with 95 %."""
    ordered, n = sorted(values), len(values)
    reach = 0.98 * n**0.5
    return statistics.median(ordered), ordered[max(0, int(n / 2 - reach))], ordered[min(n - 1, int(n / 2 + reach))]


def decode(args: argparse.Namespace) -> None:
    """An answer without the page, with it, and with so many looks in a second."""
    rates = [float(rate) for rate in args.rates.split(",")]
    kinds = ["off", "off again", "on", *(f"{rate:g} a second" for rate in rates)]
    looks = dict(zip(kinds, [0.0, 0.0, 0.0, *rates]))
    times: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    n_looks: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:1])  # what is started has it too
        servers = {page: stack.enter_context(running(*flags(args, page=page), log=Path(folder) / str(page))) for page in (False, True)}
        os.sched_setaffinity(0, cores[1:] or cores)
        expected = [answer(server, args)["tokens"] for server in servers.values()]
        assert expected[0] == expected[1]
        for i in range(args.rounds):
            for kind in random.Random(i).sample(kinds, len(kinds)):
                server = servers[not kind.startswith("off")]
                with watched(server, looks[kind]) as codes:
                    before = processor_ms(server)
                    found = answer(server, args)
                    spent = processor_ms(server) - before
                assert found["tokens"] == expected[0] and set(codes) <= {200}, codes
                times[kind].append({"decode_ms": found["timings"]["predicted_per_token_ms"], "processor_ms": spent})
                n_looks[kind] += len(codes) // len(LOOK)
    os.sched_setaffinity(0, cores)
    for kind in kinds:
        row: dict[str, Any] = {"kind": kind, "rounds": args.rounds, "looks": n_looks[kind]}
        for name in ("decode_ms", "processor_ms"):
            row[name] = round(statistics.median(t[name] for t in times[kind]), 4)
            ratios = median_and_interval([a[name] / b[name] for a, b in zip(times[kind], times["off"])])
            row |= dict(zip((f"{name}_ratio", f"{name}_ratio_low", f"{name}_ratio_high"), (round(x, 4) for x in ratios)))
        write(row, args)


def look(args: argparse.Namespace) -> None:
    """What one look takes of the processor while nothing is computed, and the thread of the context does nothing else."""
    with tempfile.TemporaryDirectory() as folder, running(*flags(args, page=True), "--kv-reuse", log=Path(folder) / "log") as server:
        server.complete(make_prompt(args.n_prompt), 2)
        time.sleep(1)
        before, start = processor_ms(server), time.monotonic()
        time.sleep(3)
        idle = (processor_ms(server) - before) / (time.monotonic() - start)
        spent, size = [], 0
        for _ in range(args.rounds):
            before, start = processor_ms(server), time.monotonic()
            for path in LOOK:
                response = server.open(path)
                assert response.status_code == 200
                size += len(response.content)
            time.sleep(0.1)  # what it leaves behind counts too
            spent.append(processor_ms(server) - before - idle * (time.monotonic() - start))
    middle, low, high = (round(x, 3) for x in median_and_interval(spent))
    row = {"kind": "look", "rounds": args.rounds, "processor_ms": middle, "processor_ms_low": low, "processor_ms_high": high}
    write({**row, "bytes": size // args.rounds, "idle_ms_per_s": round(idle, 3)}, args)


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
    parser.add_argument("what", choices=("decode", "look", "flood"))
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "pyheadkv" / "data" / "needle.gguf")
    parser.add_argument("--n-prompt", type=int, default=1024)
    parser.add_argument("--n-predict", type=int, default=1500)
    parser.add_argument("--kv-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rates", default="1,10", help="looks in a second (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=10000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    {"decode": decode, "look": look, "flood": flood}[args.what](args)


if __name__ == "__main__":
    main()
