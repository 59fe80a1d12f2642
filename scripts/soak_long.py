"""Long answers of llama-server with --kv-generated, all slots at once, and what must be true at their end.

    python scripts/soak_long.py smollm2-135m.gguf --seconds 3600 --out bench/results/soak_long.md

Each client has a slot of its own, and asks it for answers with a budget that is never exceeded, or with none, which must be those of a
context of its own without ``kv_generated``, up to ties; for answers several times as long as the context of a slot, which
must come to their end, with the evictions that their length asks for, and must begin as those of the full cache up to the first one; for turns of a
chat whose past is continued on, some of which drop what was said before; for a slot that is saved, continued, restored
and continued once more with the same answer. They send wrong values and hang up. No crash, no wrong answer, resident memory that does not
grow, and no cell left.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_server import Server, running

from pyheadkv import Llama
from pyheadkv.eval.journal import commit
from pyheadkv.eval.report import table

TEXT = Path(__file__).parent.parent / "pyheadkv" / "data" / "haystack.txt"
N_CTX, KV_SIZE, GENERATED, SLACK, WINDOW, POLICY = 1024, 128, 128, 64, 32, "headkv"
N_FULL, N_ANSWER = 512, 384  # a budget, and an answer that does not exceed it
LENGTHS = (1200, 2400)  # of answers beyond the context
OWN = (40, 64, 96, 250)  # budgets of requests
N_TURNS = 10
TIE = 0.05  # difference of two logits that the order of additions can turn over
KINDS = ("full", "full", "off", "endless", "endless", "own", "chat", "chat", "chat", "saved", "hang up", "bad")
WRONG = ({"kv_generated": WINDOW}, {"kv_generated": -1}, {"kv_generated": 10**6}, {"kv_generated": "all"}, {"kv_drop": [[5, 5]]}, {"kv_drop": 7}, {"kv_size": 3})  # fmt: skip


class Expected:
    """Prompts, and what contexts of their own say behind them without evictions."""

    def __init__(self, model: Path, n_prompts: int, threads: int) -> None:
        llm = Llama(
            model, n_ctx=N_CTX, kv_size=KV_SIZE, policy=POLICY, window=WINDOW, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        vocab = llama_cpp.llama_model_get_vocab(llm.model)
        ends = [token for token in range(llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, token)]
        self.text = list(llm.tokenize(TEXT.read_bytes(), add_bos=False))
        self.prompts = [self.text[2000 * i : 2000 * i + 250 + 40 * i] for i in range(n_prompts)]
        self.answers: list[list[int]] = []
        self.gaps: list[list[float]] = []  # largest minus second logit where each token was chosen
        for prompt in self.prompts:
            llm.read_prompt(prompt)
            answer: list[int] = []
            gaps: list[float] = []
            for _ in range(N_ANSWER):
                logits = np.array(llm.last_logits)
                logits[ends] = -np.inf
                second, first = np.partition(logits, -2)[-2:]
                gaps.append(float(first - second))
                answer.append(int(logits.argmax()))
                llm.eval(answer[-1:])
            self.answers.append(answer)
            self.gaps.append(gaps)
        llm.close()


class Soak:
    def __init__(self, server: Server, expected: Expected, deadline: float) -> None:
        self.server, self.expected, self.deadline = server, expected, deadline
        self.lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.n_tokens = self.n_compared = self.n_longest = self.n_drops = 0
        self.wrong: list[str] = []
        self.ties: list[float] = []
        self.rss: list[int] = []

    def client(self, slot: int) -> None:
        rng, chat = random.Random(slot), Chat(self, slot)
        while time.monotonic() < self.deadline:
            what = rng.choice(KINDS)
            try:
                wrong = chat.turn(rng) if what == "chat" else chat.saved(rng) if what == "saved" else self.one(what, slot, rng)
            except Exception as e:  # any of them is a finding
                wrong = f"{type(e).__name__}: {e}"
            if what not in ("chat", "saved", "bad"):
                chat.forget()  # the slot has another past now
            with self.lock:
                self.counts[what] += 1
                if wrong:
                    self.wrong.append(f"{what}: {wrong}"[:600])
                    print(self.wrong[-1], flush=True)

    def watch(self) -> None:
        """Resident memory, while there is time."""
        start = time.monotonic()
        while time.monotonic() < self.deadline:
            self.rss.append(self.server.status_bytes("RssAnon"))
            if len(self.rss) % 12 == 1:
                n = sum(self.counts.values())
                print(f"{time.monotonic() - start:.0f} s: {n} requests, {self.n_tokens} tokens, {self.rss[-1] / 2**20:.1f} MiB", flush=True)
            time.sleep(5)

    def complete(self, prompt: list[int], n: int, slot: int, **more: Any) -> dict[str, Any]:
        answer = self.server.complete(prompt, n, id_slot=slot, ignore_eos=True, **more)
        with self.lock:
            self.n_tokens += len(answer["tokens"])
        return answer

    def one(self, what: str, slot: int, rng: random.Random) -> str:
        """What is wrong with the answer, empty = nothing."""
        i = rng.randrange(len(self.expected.prompts))
        prompt, want, gaps = self.expected.prompts[i], self.expected.answers[i], self.expected.gaps[i]
        if what in ("full", "off"):
            answer = self.complete(prompt, N_ANSWER, slot, cache_prompt=False, kv_generated=N_FULL if what == "full" else 0)
            if answer["timings"]["kv"].get("generated", {}).get("evictions", 0):
                return f"prompt {i}: evictions within the budget"
            return self.compare(answer["tokens"], want, gaps)
        if what in ("endless", "own"):
            n, n_cells = (rng.choice(LENGTHS), GENERATED) if what == "endless" else (700, rng.choice(OWN))
            answer = self.complete(prompt, n, slot, cache_prompt=False, **({} if what == "endless" else {"kv_generated": n_cells}))
            with self.lock:
                self.n_longest = max(self.n_longest, len(prompt) + len(answer["tokens"]))
            n_evictions = answer["timings"]["kv"]["generated"]["evictions"]
            if len(answer["tokens"]) != n or n_evictions not in _evictions(n, n_cells):
                return f"prompt {i}: {len(answer['tokens'])} tokens of {n}, {n_evictions} evictions with {n_cells} cells"
            n_same = min(n_cells + SLACK, len(want))
            return self.compare(answer["tokens"][:n_same], want[:n_same], gaps)
        if what == "hang up":
            body = json.dumps(
                {"prompt": prompt, "n_predict": 5000, "stream": rng.random() < 0.5, "id_slot": slot, "ignore_eos": True}
            ).encode()
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as s:
                head = b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                s.sendall(head + body)
                time.sleep(rng.choice([0, 0.1, 1, 5, 20]))
            return ""
        status, error = self.server.request("/completion", {"prompt": prompt, "n_predict": 1, "id_slot": slot, **rng.choice(WRONG)})
        return "" if status == 400 and "kv_" in error["error"]["message"] else f"{status}: {error}"

    def compare(self, got: list[int], want: list[int], gaps: list[float]) -> str:
        """What is wrong with an answer. Where two tokens are as likely, batches of another size may choose the other one."""
        n_same = next((n for n, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
        with self.lock:
            self.n_compared += n_same
        if len(got) == len(want) == n_same:
            return ""
        if n_same < len(gaps) and gaps[n_same] < TIE:
            with self.lock:
                self.ties.append(gaps[n_same])
            return ""
        return f"token {n_same} of {len(got)} is another one than of {len(want)}, logits differ by {gaps[n_same : n_same + 1]}"


def _evictions(n: int, n_cells: int) -> range:
    """How many an answer of n tokens may have: one per SLACK from n_cells + SLACK on; the last token is not evaluated."""
    n_last = (n - n_cells) // SLACK
    return range(max(0, n_last - 1), n_last + 1)


class Chat:
    """One that grows turn after turn in one slot."""

    def __init__(self, soak: Soak, slot: int) -> None:
        self.soak, self.slot = soak, slot
        self.forget()

    def forget(self) -> None:
        self.tokens: list[int] = []
        self.n_turns = self.n_first = 0

    def turn(self, rng: random.Random) -> str:
        """Ask; what is wrong."""
        self.n_turns += 1
        if not self.tokens or self.n_turns > N_TURNS:
            self.forget()
            self.tokens = list(rng.choice(self.soak.expected.prompts))
            self.n_first = len(self.tokens)
            answer = self.soak.complete(self.tokens, 150, self.slot, cache_prompt=False)
        else:
            n_past = len(self.tokens)
            more: dict[str, Any] = {}
            if rng.random() < 0.5:  # what was said last leaves the store
                start = rng.randrange(self.n_first, n_past - 10)
                more["kv_drop"] = [[start, rng.randrange(start + 1, n_past - 1)]]
                with self.soak.lock:
                    self.soak.n_drops += 1
            self._ask(rng)
            answer = self.soak.complete(self.tokens, rng.randrange(50, 300), self.slot, **more)
            if answer["timings"]["kv"]["n_prompt"] != self.n_first:
                return f"turn {self.n_turns} of {len(self.tokens)} tokens was read again"
        self.tokens = [*self.tokens, *answer["tokens"]]
        return ""

    def saved(self, rng: random.Random) -> str:
        """Save the slot, ask, restore it and ask again; what is wrong."""
        if wrong := self.turn(rng):
            return wrong
        name = {"filename": f"slot{self.slot}"}
        if (found := self.soak.server.request(f"/slots/{self.slot}?action=save", name))[0] != 200:
            return f"save: {found}"
        self._ask(rng)
        first = self.soak.complete(self.tokens, 100, self.slot, n_probs=2)
        tops = [sorted((top["logprob"] for top in token["top_logprobs"]), reverse=True) for token in first["completion_probabilities"]]
        if (found := self.soak.server.request(f"/slots/{self.slot}?action=restore", name))[0] != 200:
            return f"restore of {len(self.tokens)} tokens: {found}"
        again = self.soak.complete(self.tokens, 100, self.slot)
        if again["timings"]["kv"]["n_prompt"] != self.n_first:
            return f"{len(self.tokens)} tokens were read again behind a restored slot"
        self.tokens = [*self.tokens, *again["tokens"]]
        return self.soak.compare(again["tokens"], first["tokens"], [top[0] - top[1] for top in tops])

    def _ask(self, rng: random.Random) -> None:
        start = rng.randrange(len(self.soak.expected.text) - 100)
        self.tokens = [*self.tokens, *self.soak.expected.text[start : start + rng.randrange(10, 60)]]


def left_of(server: Server, n_slots: int) -> list[str]:
    """What is left when all slots are erased."""
    deadline = time.monotonic() + 120
    while any(slot["is_processing"] for slot in server.request("/slots")[1]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for slot in range(n_slots):
        server.request(f"/slots/{slot}?action=erase", {})
    slots = server.request("/slots")[1]
    left = [f"slot {slot['id']}: {slot['kv']}" for slot in slots if slot["is_processing"] or slot["kv"]["state"] != "empty"]
    left += [f"slot {slot['id']}: n_ctx {slot['n_ctx']}" for slot in slots if slot["n_ctx"] != N_CTX]
    return left + [f"{name}: {server.metric(name)}" for name in ("kv_bytes_held", "kv_bytes_staging") if server.metric(name) != 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--seconds", type=float, default=3600, help="no request begins later (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="and clients (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--server", type=Path, metavar="FILE", help="another llama-server, such as that of make tsan")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    begun_with = commit()
    expected = Expected(args.model, args.prompts, args.threads)
    print("the answers are known", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        flags: list[Any] = ["-m", args.model, "-c", N_CTX * args.slots, "-np", args.slots, "-b", 512, "-ub", 512, "-t", args.threads, "-tb", args.threads]  # fmt: skip
        flags += [
            "--kv-size",
            KV_SIZE,
            "--kv-policy",
            POLICY,
            "--kv-window",
            WINDOW,
            "--kv-generated",
            GENERATED,
            "--kv-generated-slack",
            SLACK,
        ]
        flags += ["--kv-limit", 10**6, "--kv-reuse", "--slot-save-path", folder, "--cache-ram", 0]
        with running(*flags, log=Path(folder) / "log", path=args.server) as server:
            start = time.monotonic()
            soak = Soak(server, expected, start + args.seconds)
            with ThreadPoolExecutor(args.slots + 1) as pool:
                for done in [pool.submit(soak.watch), *(pool.submit(soak.client, slot) for slot in range(args.slots))]:
                    done.result()
            seconds = time.monotonic() - start
            left = left_of(server, args.slots)
            crashed = server.process.poll() is not None
            evictions, evicted = server.metric("kv_generated_evictions_total"), server.metric("kv_generated_cells_evicted_total")
    quarter = max(1, len(soak.rss) // 4)
    second, fourth = soak.rss[quarter : 2 * quarter] or soak.rss, soak.rss[-quarter:]
    first, last = max(second), max(fourth)
    is_flat = last < 1.05 * first + 4 * 2**20
    lines = [
        f"{sum(soak.counts.values())} requests from {args.slots} clients to {args.slots} slots of {N_CTX} tokens in {seconds:.0f} s, {soak.n_tokens} tokens "
        f"generated, the longest answer ended at token {soak.n_longest}; {evictions:.0f} evictions of {evicted:.0f} cells; {soak.n_drops} ranges dropped "
        f"({platform.machine()}, {args.threads} threads, busy machine, commit {begun_with}, `python scripts/soak_long.py {' '.join(sys.argv[1:])}`)",
        "",
        *table(["request", "number"], [(what, str(count)) for what, count in sorted(soak.counts.items())]),
        "",
        f"crashed: {crashed}; wrong answers: {len(soak.wrong)}; tokens that are those of the full cache or of the answer before the slot was restored: {soak.n_compared}; "
        f"answers that took the other one of two tokens whose logits differ by less than {TIE}: {len(soak.ties)} "
        f"(largest difference {max(soak.ties, default=0.0):.4f}); left at the end: {left or 'nothing'}",
        "",
        f"resident memory of no file, largest: {first / 2**20:.1f} MiB in the second quarter, {last / 2**20:.1f} MiB in the last; "
        f"median: {statistics.median(second) / 2**20:.1f} and {statistics.median(fourth) / 2**20:.1f} MiB",
        "",
        *soak.wrong[:20],
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines).rstrip() + "\n")
    return int(crashed or bool(soak.wrong) or bool(left) or not is_flat)


if __name__ == "__main__":
    sys.exit(main())
