"""Mixed requests to llama-server with compression, and what must be true at their end.

    python scripts/soak_server.py --requests 1500 --out bench/results/soak_server.md

Clients on loopback send completions, chats, streams, requests of other sizes, with protected cells, with an adapter, whole prompts, bad bodies, and
hang up while a prompt is queued, read or compressed and while tokens are generated. With ``--archive`` as many more are turns of chats
that grow, of agents with one list of tools before them. Every answer is compared with that of a context
of its own, up to ties. No crash, no wrong answer, resident memory that does not grow, and no cell left.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from llama_server import BAD_BODIES, Server, running

import pyheadkv
from pyheadkv import Llama
from pyheadkv.eval import needle
from pyheadkv.eval.prose import render_chat_messages
from pyheadkv.eval.report import table
from pyheadkv.testing import write_random_lora

N_CTX, KV_SIZE, SIZES, N_PREDICT = 2048, 128, (32, 64), 12
TIE = 0.05  # difference of two logits that the order of additions can turn over
KINDS = (
    "completion",
    "completion",
    "sized",
    "protected",
    "whole",
    "stream",
    "chat",
    "chat stream",
    "openai",
    "lora",
    "lora",
    "hang up",
    "hang up",
    "bad body",
)


def until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(needle.EOS)] if needle.EOS in tokens else tokens


N_AGENTS, N_TURNS = 8, 8


class Expected:
    """Prompts and the answers of contexts of their own: tokens; of chats, the text after each of them."""

    def __init__(self, n_prompts: int, threads: int, lora: Path, *, agents: bool = False) -> None:
        documents = [
            needle.make_document(random.Random(i), n_tokens=300 + 150 * i, kinds=[needle.KINDS[i % len(needle.KINDS)]])
            for i in range(n_prompts)
        ]
        self.messages = [document.messages() for document in documents]
        self.prompts: list[list[int]] = []
        self.turns: list[list[int]] = []  # of one agent after the other
        self.answers: dict[tuple[str, int], list[Any]] = {}
        self.gaps: dict[tuple[str, int], list[float]] = {}  # largest minus second logit where each token of an answer was chosen
        settings: dict[str, dict[str, Any]] = {
            "completion": {},
            "chat": {},
            "protected": {"protect": [(0, 60)]},
            "whole": {"kv_size": N_CTX},
            "lora": {"lora_path": str(lora)},
        }
        settings.update({f"sized {n}": {"kv_size": n} for n in SIZES} | ({"agent": {}} if agents else {}))
        for what, options in settings.items():
            llm = Llama(
                pyheadkv.embedded_model(),
                n_ctx=N_CTX,
                n_batch=512,
                n_ubatch=512,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
                **{"kv_size": KV_SIZE, **options},
            )
            is_chat, template = what == "chat", llm.metadata["tokenizer.chat_template"]
            texts = (
                [render_chat_messages(llm, template, m) for m in self.messages]
                if is_chat
                else [document.prompt() for document in documents]
            )
            prompts = [list(llm.tokenize(text.encode(), add_bos=not is_chat, special=True)) for text in texts]
            self.prompts = prompts if what == "completion" else self.prompts
            if what == "agent":
                prompts = self.turns = _turns(prompts)
            for i, prompt in enumerate(prompts):
                llm.read_prompt(prompt)
                tokens: list[int] = []
                self.gaps[what, i] = []
                while len(tokens) < N_PREDICT and tokens[-1:] != [needle.EOS]:
                    logits = np.sort(llm.last_logits)
                    self.gaps[what, i].append(float(logits[-1] - logits[-2]))
                    tokens.append(int(llm.last_logits.argmax()))
                    llm.eval(tokens[-1:])
                tokens = until_end(tokens)
                self.answers[what, i] = [llm.detokenize(tokens[: n + 1]).decode() for n in range(len(tokens))] if is_chat else tokens
            llm.close()


def _turns(prompts: list[list[int]]) -> list[list[int]]:
    """Prompts of agents: tools, the same for all; then turn after turn, each of which begins with the one before."""
    tools, turns = prompts[-1][:700], []
    for agent in range(N_AGENTS):
        rng, chat = random.Random(agent), tools
        for _ in range(N_TURNS):
            source = rng.choice(prompts)
            start = rng.randrange(1, len(source) - 100)
            chat = [*chat, *source[start : start + rng.randrange(20, 150)]]
            turns.append(chat)
    return turns


class Soak:
    def __init__(self, server: Server, expected: Expected, n_requests: int, deadline: float) -> None:
        self.kinds = KINDS + ("agent",) * len(KINDS) * bool(expected.turns)
        self.next_turn = [0] * N_AGENTS
        self.server, self.expected, self.n_left, self.deadline = server, expected, n_requests, deadline
        self.lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.ties: list[float] = []
        self.rss: list[tuple[int, int]] = []  # (requests, bytes)
        try:
            import openai

            self.openai: Any = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
        except ImportError:
            self.openai = None

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with self.lock:
                if self.n_left == 0 or time.monotonic() > self.deadline:
                    return
                self.n_left -= 1
            what = rng.choice(self.kinds)
            try:
                wrong = self.one(what, rng)
            except Exception as e:  # any of them is a finding
                wrong = f"{type(e).__name__}: {e}"
            with self.lock:
                self.counts[what] += 1
                if wrong:
                    self.wrong.append(f"{what}: {wrong}"[:500])
                    print(self.wrong[-1], flush=True)
                n = sum(self.counts.values())
                if n % 50 == 0:
                    self.rss.append((n, self.server.status_bytes("RssAnon")))
                    print(f"{n} requests, {self.rss[-1][1] / 2**20:.1f} MiB, {len(self.wrong)} wrong", flush=True)

    def one(self, what: str, rng: random.Random) -> str:
        """What is wrong with the answer, empty = nothing."""
        i = rng.randrange(len(self.expected.prompts))
        prompt, messages = self.expected.prompts[i], self.expected.messages[i]
        if what == "completion":
            return self.compare(self.complete(prompt), "completion", i)
        if what == "agent":
            with self.lock:
                agent = rng.randrange(N_AGENTS)
                i = agent * N_TURNS + self.next_turn[agent]
                self.next_turn[agent] = (self.next_turn[agent] + 1) % N_TURNS
            return self.compare(self.complete(self.expected.turns[i]), "agent", i)
        if what == "sized":
            n = rng.choice(SIZES)
            return self.compare(self.complete(prompt, kv_size=n), f"sized {n}", i)
        if what == "protected":
            return self.compare(self.complete(prompt, kv_protect=[[0, 60]]), "protected", i)
        if what == "whole":
            return self.compare(self.complete(prompt, kv_size=0), "whole", i)
        if what == "lora":
            return self.compare(self.complete(prompt, lora=[{"id": 0, "scale": 1.0}]), "lora", i)
        if what == "stream":
            events = self.events("/completion", {"prompt": prompt, "n_predict": N_PREDICT, "temperature": 0, "return_tokens": True})
            return self.compare(until_end([token for event in events if not event["stop"] for token in event["tokens"]]), "completion", i)
        chat = {"messages": messages, "max_tokens": N_PREDICT, "temperature": 0}
        if what == "chat":
            status, answer = self.server.request("/v1/chat/completions", chat)
            return self.compare(answer["choices"][0]["message"]["content"], "chat", i) if status == 200 else f"{status}: {answer}"
        if what == "chat stream":
            events = self.events("/v1/chat/completions", chat)
            return self.compare("".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"]), "chat", i)
        if what == "openai":
            if self.openai is None:
                return ""
            stream = self.openai.chat.completions.create(model="any", stream=True, **chat)
            return self.compare("".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices), "chat", i)
        if what == "hang up":
            body = json.dumps({"prompt": prompt, "n_predict": 500, "stream": rng.random() < 0.5}).encode()
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as s:
                s.sendall(
                    b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                )
                s.sendall(body if rng.random() < 0.9 else body[: len(body) // 2])
                time.sleep(rng.choice([0, 0.01, 0.05, 0.2, 0.5, 1.0]))
            return ""
        status, answer = self.server.request(rng.choice(["/completion", "/v1/completions", "/v1/chat/completions"]), rng.choice(BAD_BODIES))
        return "" if status in (400, 500) and "message" in answer["error"] else f"{status}: {answer}"

    def compare(self, got: Any, what: str, i: int) -> str:
        """What is wrong with an answer. Where two tokens are as likely, batches of another size may choose the other one."""
        want = self.expected.answers[what, i]
        if what == "chat":
            if got.strip() == (want[-1] if want else "").strip():
                return ""
            n_same = sum(got.strip().startswith(text.strip()) for text in want)
        elif got == want:
            return ""
        else:
            n_same = next((n for n, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
        gaps = self.expected.gaps[what, i]
        if n_same < len(gaps) and gaps[n_same] < TIE:
            with self.lock:
                self.ties.append(gaps[n_same])
            return ""
        return f"prompt {i}: {got} instead of {want}, logits {gaps}"

    def complete(self, prompt: list[int], **more: Any) -> list[int]:
        return until_end(self.server.complete(prompt, N_PREDICT, **more)["tokens"])

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        with self.server.open(path, {**body, "stream": True}, timeout=600, stream=True) as response:
            response.raise_for_status()
            lines = [line[6:] for line in response.iter_lines(decode_unicode=True) if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


def ledger(server: Server) -> list[str]:
    """What is left after all requests."""
    deadline = time.monotonic() + 60
    while any(slot["is_processing"] for slot in server.request("/slots")[1]) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [
        f"slot {slot['id']}: {slot['kv']}"
        for slot in server.request("/slots")[1]
        if slot["is_processing"] or slot["kv"]["state"] != "empty"
    ]
    return left + [f"{name}: {server.metric(name)}" for name in ("kv_bytes_held", "kv_bytes_staging") if server.metric(name) != 0]


def _archived(server: Server, folder: Path) -> list[str]:
    """What the archive did and holds."""
    number = {name: server.metric(f"kv_archive_{name}") for name in (
        "tokens_restored_total", "tokens_computed_total", "evicted_blocks_total", "damaged_blocks_total", "failed_prompts_total", "bytes")}  # fmt: skip
    n_restored, n_computed = number["tokens_restored_total"], number["tokens_computed_total"]
    return [
        f"archive: {n_restored / max(1, n_restored + n_computed):.1%} of {n_restored + n_computed:.0f} prompt tokens came from it; "
        f"{number['evicted_blocks_total']:.0f} blocks evicted, {number['damaged_blocks_total']:.0f} damaged, "
        f"{number['failed_prompts_total']:.0f} prompts that could not be written; {number['bytes'] / 2**20:.1f} MiB held, "
        f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:.1f} MiB in the folder",
        "",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1800, help="no request begins later")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", default="auto")
    parser.add_argument("--archive", metavar="SIZE", help="read prompts from an archive of that size, and have agents (default: none)")
    parser.add_argument("--server", type=Path, metavar="FILE", help="another llama-server, such as that of make tsan")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        lora = write_random_lora(Path(folder) / "lora.gguf", pyheadkv.embedded_model(), seed=5)
        expected = Expected(args.prompts, args.threads, lora, agents=bool(args.archive))
        archive = Path(folder) / "kv"
        flags = [
            "-m",
            pyheadkv.embedded_model(),
            "-c",
            N_CTX * args.slots,
            "-np",
            args.slots,
            "-b",
            512,
            "-ub",
            512,
            "-t",
            args.threads,
            "-tb",
            args.threads,
            "--kv-size",
            KV_SIZE,
            "--kv-size-max",
            N_CTX,
            "--kv-prefill",
            args.prefill,
            "--lora-scaled",
            f"{lora}:0",  # applied where a request says so
            *(["--kv-archive", archive, "--kv-archive-size", args.archive] if args.archive else []),
        ]
        with running(*flags, log=log, path=args.server) as server:
            start = time.monotonic()
            soak = Soak(server, expected, args.requests, start + args.seconds)
            with ThreadPoolExecutor(args.clients) as pool:
                for done in [pool.submit(soak.client, seed) for seed in range(args.clients)]:
                    done.result()
            seconds = time.monotonic() - start
            left = ledger(server)
            crashed = server.process.poll() is not None
            compressions = server.metric("kv_compressions_total")
            archived = _archived(server, archive) if args.archive else []
        reports = re.findall(r"WARNING: ThreadSanitizer.*?SUMMARY[^\n]*", log.read_text(errors="replace"), re.S)
        races = [report for report in reports if re.search("headkv|ragged", report)]
        print(*races or reports[:1], sep="\n")
    n = sum(soak.counts.values())
    # from the first quarter on, in which every buffer has had its largest size
    later = [size for at, size in soak.rss if at >= n / 4] or [0]
    first, last = max(later[: len(later) // 3 + 1]), max(later[-(len(later) // 3 + 1) :])
    is_flat = last < 1.05 * first + 4 * 2**20
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    lines = [
        f"{n} requests from {args.clients} clients to {args.slots} slots in {seconds:.0f} s, {compressions:.0f} prompts compressed "
        f"({platform.machine()}, {args.threads} threads, commit {commit}, `python scripts/soak_server.py {' '.join(sys.argv[1:])}`)",
        "",
        *table(["request", "number"], [(what, str(count)) for what, count in sorted(soak.counts.items())]),
        "",
        f"crashed: {crashed}; wrong answers: {len(soak.wrong)}; answers that took the other one of two tokens whose logits differ by less than "
        f"{TIE}: {len(soak.ties)} (largest difference {max(soak.ties, default=0.0):.4f}); left at the end: {left or 'nothing'}; "
        f"the openai client took part: {soak.openai is not None}; reports of a thread sanitizer: "
        f"{len(races)} of our code, {len(reports) - len(races)} of upstream's alone",
        "",
        f"resident memory of no file, largest: {first / 2**20:.1f} MiB after the first quarter, {last / 2**20:.1f} MiB at the end",
        "",
        *archived,
        *soak.wrong[:20],
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines).rstrip() + "\n")
    return int(crashed or bool(races) or bool(soak.wrong) or bool(left) or not is_flat or n < args.requests)


if __name__ == "__main__":
    sys.exit(main())
