"""``pyheadkv demo``: needle questions to the embedded model, with the full cache and with small budgets."""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import needle
from .arguments import add_amount_arguments, add_keep_arguments, keep_kwargs, split
from .inspect import format_bytes, model_path, printable, read_shape
from .options import FULL, check_int

if TYPE_CHECKING:
    from .llama import Llama

KV_SIZES = "64,128,256"
N_DECODE = 96  # tokens decoded per question at least, so that the speed can be measured
N_TAIL = 16  # cells per head that the store grows by; answers are short
N_CTX_STEP = 256  # tokens, llama.cpp rounds contexts up to it
MAX_THREADS = 4  # the embedded model is too small for more


@dataclass(frozen=True)
class Case:
    """One cache to ask: the full one, or a compressed one of which so much is kept.

    Attributes
    ----------
    amount : name and value of ``kv_size``, ``kv_ratio`` or ``kv_bytes``
    """

    policy: str = FULL
    amount: tuple[str, Any] | None = None

    @property
    def label(self) -> str:
        if self.amount is None:
            return "full cache"
        name, value = self.amount
        return f"{self.policy} {100 * value:g}%" if name == "kv_ratio" else f"{self.policy} {value}"


@dataclass(frozen=True)
class Answer:
    """What one question got.

    Attributes
    ----------
    text : generated, up to the end of the text or the length of the right answer
    n_bytes, n_bytes_full : K and V held at the end of the answer, and what the same tokens take in a full cache
    seconds : time of each token decoded after the first one
    """

    text: str
    is_right: bool
    n_bytes: int
    n_bytes_full: int
    seconds: tuple[float, ...]


# command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``pyheadkv demo``."""
    parser.add_argument(
        "--kv-size",
        metavar="N,N,..",
        help=f"mean cells per KV head, recent ones included, one run each (default: {KV_SIZES} if no amount is given)",
    )
    add_amount_arguments(parser, several=True)
    add_keep_arguments(parser)
    parser.add_argument(
        "--tokens", type=int, default=2048, metavar="N", help="length of a prompt in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--questions", type=int, default=4, metavar="N", help="questions, of mixed kinds (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the haystack and the questions (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help=f"CPU threads (default: all CPUs, at most {MAX_THREADS})"
    )


def run(args: argparse.Namespace) -> int:
    """Ask every cache and print one table row each; 1 if the full cache gets fewer than half right."""
    amounts, keep = _parse_amounts(args), keep_kwargs(args)
    check_int("--questions", args.questions, 1, 1000)
    path = model_path(None)
    documents = _documents(n_tokens=args.tokens, n_questions=args.questions, seed=args.seed)
    cases = [Case(), *(Case("headkv", amount) for amount in amounts), Case("snapkv", amounts[0])]
    _print_questions(documents, n_tokens=args.tokens)
    full: list[Answer] = []
    for case in cases:
        answers = ask(path, documents, case=case, n_tokens=args.tokens, n_threads=args.threads, keep=keep)
        full = full or answers
        _print_row(case, answers, documents)
    n_right = sum(answer.is_right for answer in full)
    if 2 * n_right < len(documents):
        print(
            f"pyheadkv: error: the full cache answered {n_right} of {len(documents)} questions: "
            "the model or the engine is broken",
            file=sys.stderr,
        )
        return 1
    return 0


def threads_kwargs(n_threads: int | None) -> dict[str, Any]:
    """Arguments of ``Llama`` for a number of threads; none for None."""
    if n_threads is None:
        return {}
    check_int("--threads", n_threads, 1, 512)
    return {"n_threads": n_threads, "n_threads_batch": n_threads}


def round_n_ctx(n_tokens: int) -> int:
    """Context that llama.cpp really allocates for so many tokens; llama_cpp.Llama wants to be told that number."""
    return -(-n_tokens // N_CTX_STEP) * N_CTX_STEP


def _parse_amounts(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Of cells, the fewest first, then shares and bytes."""
    sizes = KV_SIZES if args.kv_size is None and not args.kv_ratio and not args.kv_bytes else args.kv_size
    try:
        amounts: list[tuple[str, Any]] = [("kv_size", n) for n in sorted({int(part) for part in sizes.split(",")})] if sizes is not None else []
        amounts += [("kv_ratio", float(part)) for part in split(args.kv_ratio)]
    except ValueError:
        raise ValueError(
            f"--kv-size={args.kv_size!r}, --kv-ratio={args.kv_ratio!r}: they must be numbers separated by commas, such as 16,32 or 0.01,0.05"
        ) from None
    return [*amounts, *(("kv_bytes", part) for part in split(args.kv_bytes))]


def _documents(*, n_tokens: int, n_questions: int, seed: int) -> list[needle.Document]:
    """Questions about one haystack, their kinds in turn."""
    n_each = -(-n_questions // len(needle.KINDS))
    quiz = needle.make_quiz(random.Random(seed), n_tokens=n_tokens, n_each=n_each)
    by_kind = [[document for document in quiz if document.kind == kind] for kind in needle.KINDS]
    mixed = [documents[i] for i in range(n_each) for documents in by_kind if i < len(documents)]
    return mixed[:n_questions]


# asking


def ask(
    path: Path,
    documents: Sequence[needle.Document],
    *,
    case: Case,
    n_tokens: int,
    n_threads: int | None = None,
    keep: dict[str, Any] | None = None,
) -> list[Answer]:
    """Ask all questions with one cache.

    The full cache reads the common haystack once. A compressed one reads it again for every question, because the
    question decides which cells are kept.

    Parameters
    ----------
    n_tokens : length of the longest prompt
    n_threads : CPU threads; None = all CPUs, at most ``MAX_THREADS``
    keep : sinks, protected spans and surplus of compressed caches, as ``Llama`` takes them
    """
    from tqdm import tqdm

    from .llama import Llama

    options: dict[str, Any] = {}
    if case.amount is not None:
        options = {"policy": case.policy, "n_tail": N_TAIL, case.amount[0]: case.amount[1], **(keep or {})}
    n_longest = max(document.n_answer_tokens for document in documents)
    llm = Llama(
        path,
        n_ctx=round_n_ctx(n_tokens + max(N_DECODE, n_longest + 2)),
        verbose=False,
        **options,
        **threads_kwargs(min(_n_cpus(), MAX_THREADS) if n_threads is None else n_threads),
    )
    token_bytes = read_shape(path).token_bytes
    try:
        bar = tqdm(documents, desc=case.label, unit=" questions", leave=False, disable=None)
        return [_ask_one(llm, document, token_bytes=token_bytes) for document in bar]
    finally:
        llm.close()


def _ask_one(llm: Llama, document: needle.Document, *, token_bytes: int) -> Answer:
    """Greedy answer; decoding goes on after it for the sake of the timing."""
    n_answer = document.n_answer_tokens + 1
    stream = llm.generate(llm.tokenize(document.prompt().encode()), temp=0.0)
    tokens, seconds = [next(stream)], []
    n_bytes = n_bytes_full = 0
    while len(tokens) < max(N_DECODE, n_answer + 1):
        if len(tokens) == n_answer:
            n_bytes, n_bytes_full = _kv_bytes(llm, token_bytes=token_bytes)
        begin = time.perf_counter()
        tokens.append(next(stream))
        seconds.append(time.perf_counter() - begin)
    stream.close()
    text = _text(llm, tokens[:n_answer])
    return Answer(text, document.is_correct(text), n_bytes, n_bytes_full, tuple(seconds))


def _kv_bytes(llm: Llama, *, token_bytes: int) -> tuple[int, int]:
    """Bytes of K and V held now, and what the same tokens take in a full cache."""
    if llm.kv_options is None:
        return llm.n_tokens * token_bytes, llm.n_tokens * token_bytes
    stats = llm.kv_stats()
    return stats.bytes_store + stats.bytes_staging, stats.bytes_full


def _text(llm: Llama, tokens: list[int]) -> str:
    if llm.token_eos() in tokens:
        tokens = tokens[: tokens.index(llm.token_eos())]
    return llm.detokenize(tokens).decode("utf-8", "replace").strip()


def _n_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# printing


def _print_questions(documents: Sequence[needle.Document], *, n_tokens: int) -> None:
    print(f"a haystack of {n_tokens} tokens; {len(documents)} questions about it:")
    for i, document in enumerate(documents, start=1):
        print(f"  {i}  {document.kind:<10}  {document.question} -> {document.answer}")
    marks = " ".join(f"{i:>2}" for i in range(1, len(documents) + 1))
    print(f"\n{'cache':<12} {'KV held':>12} {'of full':>8} {'decode':>14}  {marks}  right")


def _print_row(case: Case, answers: Sequence[Answer], documents: Sequence[needle.Document]) -> None:
    n_bytes = sum(answer.n_bytes for answer in answers)
    share = n_bytes / sum(answer.n_bytes_full for answer in answers)
    speed = 1 / statistics.median(second for answer in answers for second in answer.seconds)
    right, wrong = printable("✓", "+"), printable("✗", "-")
    marks = " ".join(f"{right if answer.is_right else wrong:>2}" for answer in answers)
    n_right = sum(answer.is_right for answer in answers)
    print(
        f"{case.label:<12} {format_bytes(n_bytes / len(answers)):>12} {share:>8.1%} {speed:>7.1f} token/s  "
        f"{marks}  {n_right}/{len(answers)}",
        flush=True,
    )
    for i, (answer, document) in enumerate(zip(answers, documents), start=1):
        if not answer.is_right:
            print(f"             {i}: expected {document.answer!r}, got {answer.text!r}", flush=True)
