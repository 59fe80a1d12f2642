"""``pyheadkv score --method replay``: a run from the first text to the table of budgets."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..eval.journal import Journal, sha256
from ..importance import fingerprint
from ..model import ModelShape, model_path, read_shape
from ..options import check_int
from ..replay import cache_path, sidecar_path
from ..replay_values import METHOD, ReplayTable, read_replay, write_replay
from ..score import replay
from ..score.measure import versions, write_json
from ..score.replay_texts import make_replays
from ..units import round_n_ctx
from .arguments import threads_kwargs
from .score_outputs import check_files, default_output, engine_of, largest_heads

MAX_TOKENS = 1536
N_FRAME = 128  # tokens for the instruction and a chat template, at most
N_TOP_HEADS = 5  # named in the report
MOST, FEW = 2 / 3, 1 / 64  # of a prompt


def run(args: argparse.Namespace) -> int:
    """Measure, write the table and the model when asked to, and report."""
    path = model_path(args.model)
    _refuse_others(args)
    if args.examples is not None:
        check_int("--examples", args.examples, replay.N_COUNTED, 1 << 20, ", so many texts are needed")
    if args.output is None:
        args.output = default_output(path, sidecar_path(path), cache_path(path))
    journal_path = check_files(path, args, "a replay table", read_replay)
    max_tokens = choose_max_tokens(args.max_tokens, n_ctx_train=read_shape(path).n_ctx_train)
    llm = _open_model(path, args, n_ctx=round_n_ctx(2 * max_tokens + N_FRAME))
    try:
        replays = make_replays(llm, max_tokens=max_tokens, n_texts=args.examples, seed=args.seed)
        settings = replay.Settings(
            method=METHOD,
            n_texts=len(replays),
            max_tokens=max_tokens,
            n_chunk=replay.N_CHUNK,
            seed=args.seed,
            model_sha256=sha256(path),
            fingerprint=fingerprint(path).key,
            engine=engine_of(llm, args),
            versions=versions(),
        )
        journal = Journal(journal_path, asdict(settings), resume=args.resume)
        begin = time.perf_counter()
        reader = replay.LlamaReader(llm)
        n_read = replay.measure(reader, replays, journal)
        seconds = time.perf_counter() - begin
    finally:
        llm.close()
    outcomes = replay.outcomes_of(journal)
    scores = replay.result(settings, outcomes, replay.check_reliable(outcomes, reader.heads))
    write_json(args.output, scores)
    if not args.keep:
        journal_path.unlink()
    if args.write is not None:
        table = ReplayTable(np.array(scores["shares"]), np.array(scores["values"]), METHOD, scores["source"])
        write_replay(path, args.write, table, force=args.force)
        print(f"replay table written to {args.write}", file=sys.stderr)
    print(report(scores, read_shape(path), n_read=n_read, seconds=seconds))
    print(f"written     {args.output}")
    return 0


def report(scores: dict[str, Any], shape: ModelShape, *, n_read: int, seconds: float) -> str:
    """What was measured, as text without a final line break."""
    kinds = Counter(text["kind"] for text in scores["texts"])
    found = scores["reliability"]
    cost = f", {1000 * seconds / n_read:.2f} s per 1000 tokens" if n_read else ""
    lines = [
        f"texts       {len(scores['texts'])} of up to {scores['max_tokens']} tokens: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}",
        f"reliability {min(found):.3f} to {max(found):.3f} (rank correlation of the KV heads' shares with those of other texts)",
        f"time        {seconds:.1f} s for {n_read} tokens{cost}",
    ]
    for share, values in zip(scores["shares"], np.array(scores["values"]), strict=True):
        heads = "  ".join(f"{il}-{ih} {values[il, ih]:.2f}" for il, ih in largest_heads(values, [n for _, n in shape.heads], n=N_TOP_HEADS))
        kept = replay.head_shares(values, shape.heads)
        lines.append(
            f"share {f'1/{1 / share:.0f}':<5} {(kept > MOST).sum()} of {kept.size} KV heads keep more than 2/3, {(kept < FEW).sum()} less than "
            f"1/64; largest, as layer-head: {heads}"
        )
    return "\n".join(lines)


def choose_max_tokens(max_tokens: int | None, *, n_ctx_train: int) -> int:
    """Where a text is cut off: the model reads it twice."""
    n_most = (n_ctx_train - N_FRAME) // 2 if n_ctx_train else MAX_TOKENS
    if max_tokens is None:
        return max(1, min(MAX_TOKENS, n_most))
    return check_int("--max-tokens", max_tokens, 64, n_most if n_ctx_train else 1 << 24)


def _refuse_others(args: argparse.Namespace) -> None:
    others = {
        "--answers": (args.answers is not None, "what is repeated is the text itself"),
        "--calibrate": (args.calibrate, "it chooses beta, which is for importance"),
        "--kv-size": (args.kv_size is not None, "the table has a budget for every size"),
        "--protocol authors": (args.protocol == "authors", "the HeadKV authors have no such method"),
    }
    for name, (is_given, why) in others.items():
        if is_given:
            raise ValueError(f"--method replay {name}: {why}, leave one of them out")


def _open_model(path: Path, args: argparse.Namespace, *, n_ctx: int) -> Any:
    from ..llama import Llama

    # any compressed cache: texts are read and never compressed
    return Llama(
        path,
        kv_size=64,
        window=replay.N_CHUNK,
        policy="snapkv",
        prefill="token",
        n_ctx=n_ctx,
        n_batch=check_int("--n-batch", args.n_batch, 1, 1 << 20),
        n_gpu_layers=args.n_gpu_layers,
        verbose=False,
        **threads_kwargs(args.threads),
    )
