"""Long answers: what bounding generated tokens costs.

    python bench/bench_long_quality.py MODEL.gguf text --out bench/results/long_quality.csv
    python bench/bench_long_quality.py MODEL.gguf chat --amounts 256,512 --out bench/results/long_chat.csv

``text``: parts of a novel stand for what a model says: their tokens are evaluated in batches of ``--batch`` behind a prompt of 256 that is
kept whole, so that all settings are measured on the same ones. Near the begin sixteen facts are said ("The secret code of Anna is
48311."). Likelihood is counted from the token on at which the largest amount begins to evict; ``nats`` is per token, ``error`` that of
the difference to all cells. Then, 4096 tokens behind the last fact, each of them is asked for, from the same state: ``right`` of
``facts`` are answered with the code.

``chat``: ``--turns`` turns of a chat that goes on from turn to turn (kv_reuse): in each one a person names a thing of theirs and
asks for another one, of the turn before, or in every second turn from the 21st on of 20 turns before, which is then some 1000 tokens ago. The model's own answers are part of the
chat. An answer is right if the thing is in it.

Settings: all cells; the same number for all heads by attention (as SnapKV), less redundancy (as R-KV), by importance (headkv), and 4 sinks
and the last ones (StreamingLLM). In ``text`` the first three bound what is generated and leave the prompt; StreamingLLM, and all of them in ``chat``, let the
prompt compete (scope all). Every head or, by importance, the mean of the heads keeps as many cells.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from pyheadkv import Llama
from pyheadkv.eval.journal import append_row, commit, machine
from pyheadkv.eval.prose import render_chat_messages

TEXT = Path(__file__).parent.parent / "pyheadkv" / "data" / "haystack.txt"
N_PROMPT, N_BETWEEN, N_AGO, SLACK = 256, 16, 4096, 128  # N_BETWEEN: tokens of the novel between two facts
NAMES = "Anna Boris Clara Dmitri Elena Felix Greta Hugo Irina Jonas Katja Lukas Maria Nikolai Olga Peter".split()
THINGS = "dog cat boat street teacher brother sister doctor garden horse bicycle village river school lamp piano clock chair knife coat bridge uncle aunt neighbour hotel island mountain baker tailor violin parrot rabbit harbour castle library market museum station tower mill".split()  # fmt: skip
WORDS = "Alder Birch Cobalt Dune Ember Falcon Granite Harvest Indigo Juniper Kestrel Lantern Marble Nectar Opal Pepper Quartz Raven Saffron Thistle Umber Velvet Willow Yarrow Zephyr Amber Basil Copper Drift Echo Fern Garnet Hazel Iris Jasper Kelp Lotus Maple Nimbus Onyx".split()  # fmt: skip


def settings_of(amounts: list[int], scope: str, kv_size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of each."""
    yield "all cells", {"policy": "lossless"}
    for amount in amounts:
        bound = {"kv_size": kv_size, "kv_generated": amount, "kv_generated_scope": scope}
        yield "attention", {**bound, "policy": "snapkv"}
        yield "redundancy", {**bound, "policy": "snapkv", "kv_generated_rank": "redundancy"}
        yield "importance", {**bound, "policy": "headkv"}
        yield "streaming", {**bound, "policy": "streaming", "kv_generated_rank": "recent", "kv_generated_scope": "all", "sinks": 4}


# text


def likelihoods(llm: Llama, tokens: list[int], n_batch: int) -> npt.NDArray[np.float64]:
    """Log-probability of each token but the first one, behind those before it."""
    n_vocab, out = llm.n_vocab(), []
    batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
    for i in range(0, len(tokens), n_batch):
        part = tokens[i : i + n_batch]
        batch.n_tokens = len(part)
        for j, token in enumerate(part):
            batch.token[j], batch.pos[j], batch.n_seq_id[j], batch.seq_id[j][0], batch.logits[j] = token, llm.n_tokens + j, 1, 0, True
        if llama_cpp.llama_decode(llm.ctx, batch) != 0:
            raise RuntimeError("a batch could not be decoded")
        llm.n_tokens += len(part)
        pointer = ctypes.cast(llama_cpp.llama_get_logits(llm.ctx), ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(pointer, shape=(len(part), n_vocab))
        following = tokens[i + 1 : i + 1 + n_batch]
        top = logits.max(axis=1)
        norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64))
        out.append(logits[np.arange(len(following)), following] - norm[: len(following)])
    llama_cpp.llama_batch_free(batch)
    return np.concatenate(out)


class Part:
    """A prompt, and what is said behind it: facts, and a part of the novel.

    Attributes
    ----------
    n_facts_end : tokens said when the last fact is
    """

    def __init__(self, llm: Llama, seed: int) -> None:
        rng = random.Random(seed)
        text = list(llm.tokenize(TEXT.read_bytes(), add_bos=False))
        begin = seed * (N_PROMPT + N_BETWEEN * len(NAMES) + N_AGO) % (len(text) - N_PROMPT - N_BETWEEN * len(NAMES) - N_AGO)
        self.prompt, rest = text[begin : begin + N_PROMPT], text[begin + N_PROMPT :]
        self.codes = {name: str(rng.randrange(10000, 99999)) for name in NAMES}
        self.said: list[int] = []
        for i, (name, code) in enumerate(self.codes.items()):
            fact = llm.tokenize(f" The secret code of {name} is {code}.".encode(), add_bos=False)
            self.said += [*rest[N_BETWEEN * i : N_BETWEEN * (i + 1)], *fact]
        self.n_facts_end = len(self.said)
        self.said += rest[N_BETWEEN * len(NAMES) : N_BETWEEN * len(NAMES) + N_AGO]

    def n_right(self, llm: Llama) -> int:
        """How many facts the model still says."""
        state, n_right = llm.save_state(), 0
        for name, code in self.codes.items():
            llm.load_state(state)
            llm.eval(llm.tokenize(f"\n\nQuestion: What is the secret code of {name}?\nAnswer: The secret code of {name} is".encode(), add_bos=False))  # fmt: skip
            answer: list[int] = []
            for _ in range(8):
                answer.append(int(llm.last_logits.argmax()))
                llm.eval(answer[-1:])
            n_right += code in llm.detokenize(answer).decode(errors="replace")
        return n_right


def text(args: argparse.Namespace, about: dict[str, Any]) -> None:
    """A row for each setting."""
    first = max(args.amounts) + SLACK  # generated tokens before the first eviction of the largest amount
    full: npt.NDArray[np.float64] | None = None
    for name, setting in settings_of(args.amounts, "generated", N_PROMPT + 1):
        options = {
            "n_ctx": N_PROMPT + N_BETWEEN * len(NAMES) + 24 * len(NAMES) + N_AGO + 512,
            "n_threads": args.threads,
            "n_threads_batch": args.threads,
        }
        llm = Llama(args.model, verbose=False, n_batch=max(512, args.batch), **options, **setting)
        parts, n_right = [], 0
        for seed in range(args.seeds):
            part = Part(llm, seed)
            llm.read_prompt(part.prompt)
            parts.append(likelihoods(llm, part.said, args.batch)[first:])
            stats = llm.kv_stats()
            n_right += part.n_right(llm)
        found = np.concatenate(parts)
        full = found if full is None else full
        blocks = (found - full)[: len(found) // 64 * 64].reshape(-1, 64).mean(axis=1)  # of neighbours, which depend on each other
        row = {
            "model": args.model.stem,
            "setting": name,
            "kv_generated": setting.get("kv_generated", "all"),
            "cells": round(float(stats.n_cells.mean()), 1),
            "counted": len(found),
            "nats": round(float(-found.mean()), 4),
            "more_than_all": round(float((full - found).mean()), 4),
            "error": round(float(blocks.std(ddof=1) / len(blocks) ** 0.5), 4),
            "facts": args.seeds * len(NAMES),
            "right": n_right,
        }
        append_row(args.out, {**row, **about})
        print(row, flush=True)
        llm.close()


# chat


def chat(args: argparse.Namespace, about: dict[str, Any]) -> None:
    """A row for each setting."""
    for name, setting in settings_of(args.amounts, "all", 128):
        options = {"n_ctx": 100 * args.turns, "n_threads": args.threads, "n_threads_batch": args.threads, "kv_reuse": True}
        llm = Llama(args.model, verbose=False, **options, **setting)
        counts = {"recent": [0, 0], "old": [0, 0]}
        n_tokens = 0
        for seed in range(args.seeds):
            rng = random.Random(seed)
            things, words = rng.sample(THINGS, args.turns), rng.sample(WORDS, args.turns)
            tokens = list(llm.tokenize(_rendered(llm, "You are a helpful assistant."), add_bos=False, special=True))
            for turn in range(args.turns):
                asked = turn - 20 if turn > 20 and turn % 2 else max(0, turn - 1)
                say = f"The name of my {things[turn]} is {words[turn]}. What is the name of my {things[asked]}?"
                tokens += llm.tokenize(f"<|im_start|>user\n{say}<|im_end|>\n<|im_start|>assistant\n".encode(), add_bos=False, special=True)
                answer: list[int] = []
                for token in llm.generate(tokens, temp=0.0):
                    if token == llm.token_eos() or len(answer) == 24:
                        break
                    answer.append(int(token))
                tokens += [*answer, *llm.tokenize(b"<|im_end|>\n", add_bos=False, special=True)]
                if turn > 0:
                    of = counts["old" if asked == turn - 20 else "recent"]
                    of[0] += words[asked].lower() in llm.detokenize(answer).decode(errors="replace").lower()
                    of[1] += 1
            stats = llm.kv_stats()
            n_tokens += len(tokens)
            llm.reset()
        row = {
            "model": args.model.stem,
            "setting": name,
            "kv_generated": setting.get("kv_generated", "all"),
            "turns": args.turns,
            "tokens": n_tokens // args.seeds,
            "cells": round(float(stats.n_cells.mean()), 1),
            "evictions": stats.n_evictions,
            "recent": counts["recent"][1],
            "recent_right": counts["recent"][0],
            "old": counts["old"][1],
            "old_right": counts["old"][0],
        }
        append_row(args.out, {**row, **about})
        print(row, flush=True)
        llm.close()


def _rendered(llm: Llama, system: str) -> bytes:
    """A system message as the model's template has it, in the form of ChatML, which turns are added to."""
    found = render_chat_messages(llm, llm.metadata["tokenizer.chat_template"], [{"role": "system", "content": system}])
    begin = found[: found.index("<|im_end|>")] + "<|im_end|>\n"
    return begin.encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("what", choices=("text", "chat"))
    parser.add_argument("--amounts", default="256,512,1024,2048", metavar="LIST", help="values of kv_generated (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="parts of the text with other facts, or chats (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=40, help="of a chat (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="tokens of the text at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="table to append to")
    args = parser.parse_args()
    args.amounts = [int(part) for part in args.amounts.split(",")]
    command = f"python bench/bench_long_quality.py {' '.join(sys.argv[1:])}"
    about = {"threads": args.threads, "machine": machine(), "commit": commit(), "command": command}
    (text if args.what == "text" else chat)(args, about)


if __name__ == "__main__":
    main()
