"""``pyheadkv score``: its options, and a run from the first example to the score file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..eval.journal import Journal, sha256
from ..eval.needle import speaks_needle_language
from ..gguf_keys import read_importance, write_importance
from ..importance import cache_path, fingerprint, sidecar_path
from ..importance_values import Importance
from ..model import model_path, read_shape
from ..options import check_int
from ..replay_values import METHOD
from ..score import calibrate
from ..score.calibrate import N_COPIES, HeldOut
from ..score.examples import METHODS, N_QUESTION, PROTOCOLS, make_examples
from ..score.measure import (
    ACCEPT_ABOVE,
    ANSWERS,
    MAX_ANSWER,
    N_COUNTED,
    N_STABLE,
    STABLE,
    LlamaReader,
    Settings,
    check_reliable,
    mean_importance,
    measure,
    outcomes_of,
    result,
    versions,
    write_json,
)
from ..units import round_n_ctx
from . import score_replay
from .arguments import threads_kwargs
from .inspect import gini
from .score_outputs import check_files, default_output, engine_of, largest_heads

if TYPE_CHECKING:
    from ..llama import Llama

MAX_TOKENS = 10000  # of the authors
CLEAN_MAX_TOKENS = 1536  # more examples say more than longer ones
CORPUS_MAX_TOKENS = 2048
N_ANSWER = 64  # tokens of the context that are left for the answer
N_TOP_HEADS = 10  # named in the report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``pyheadkv score``."""
    parser.add_argument("model", nargs="?", metavar="MODEL.gguf", help="model (default: the embedded one)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE.json",
        help="score file to write (default: MODEL.importance.json beside the model, or in the user's cache where its folder "
        "cannot be written; there it is found; with replay MODEL.replay.json)",
    )
    parser.add_argument("--write", type=Path, metavar="OUT.gguf", help="also write a copy of the model with the importance")
    parser.add_argument(
        "--method",
        choices=(*METHODS, METHOD),
        default="r2",
        help="r2 retrieval and reasoning, er retrieval, r retrieval heads by copying, mix five kinds of questions; replay: no questions, the "
        "share of a text that each KV head needs to repeat it, for prompts whose questions come later (default: %(default)s)",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="clean",
        help="clean: chat template, exact spans; authors: as the scripts of the HeadKV authors (default: %(default)s)",
    )
    parser.add_argument(
        "--answers",
        choices=ANSWERS,
        help="forced: the right answer is given, every example counts; generated: the model answers, and what it answers wrongly "
        "does not count (default: forced; generated with protocol authors)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help=f"of protocol clean (default: until the ranks of the KV heads are stable, {N_STABLE} to 60), or texts to repeat (default: all)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"longest prompt, or text to repeat (default: {CLEAN_MAX_TOKENS}, {CORPUS_MAX_TOKENS} for the embedded model, "
        f"{MAX_TOKENS} with protocol authors)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the haystacks or texts (default: %(default)s)")
    parser.add_argument("--calibrate", action="store_true", help="also choose beta on held-out examples and store it with the importance")
    parser.add_argument(
        "--kv-size",
        type=int,
        nargs="+",
        metavar="N",
        help=f"cells per KV head that --calibrate compresses to (default: {' '.join(map(str, calibrate.KV_SIZES))})",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    parser.add_argument("--force", action="store_true", help="replace files that exist and what the model has of it")
    parser.add_argument("--keep", action="store_true", help="leave FILE.json.part, which has the scores of every example or text")
    group = parser.add_argument_group("engine")
    group.add_argument("--n-batch", type=int, default=512, metavar="N", help="tokens per step (default: %(default)s)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: half of the CPUs, all for the prompts)")
    group.add_argument("--n-gpu-layers", type=int, default=0, metavar="N", help="layers on the GPU, -1 = all (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, write the score file and the model when asked to, and report."""
    if args.method == METHOD:
        return score_replay.run(args)
    path = model_path(args.model)
    if args.output is None:
        args.output = default_output(path, sidecar_path(path), cache_path(path))
    answers = choose_answers(args)
    journal_path = check_files(path, args, "an importance", read_importance)
    max_tokens = choose_max_tokens(args, n_ctx_train=read_shape(path).n_ctx_train)
    if args.examples is not None:
        check_int("--examples", args.examples, N_COUNTED, 1 << 20, ", fewer are never written")
    if args.kv_size is not None and not args.calibrate:
        raise ValueError(f"--kv-size={args.kv_size}: it is for --calibrate, scores do not depend on it")
    kv_sizes = [check_int("--kv-size", n, 9, max_tokens) for n in args.kv_size or calibrate.KV_SIZES if args.calibrate]
    n_longest = max(max_tokens, CORPUS_MAX_TOKENS) if args.max_tokens is None else max_tokens
    llm = _open_model(path, args, n_ctx=round_n_ctx(n_longest + N_QUESTION + N_ANSWER))
    try:
        if args.max_tokens is None and speaks_needle_language(llm):
            max_tokens = CORPUS_MAX_TOKENS
        examples = make_examples(
            llm,
            method=args.method,
            protocol=args.protocol,
            max_tokens=max_tokens,
            n_examples=args.examples,
            seed=args.seed,
        )
        settings = Settings(
            method=args.method,
            protocol=args.protocol,
            answers=answers,
            n_examples=len(examples.slots),
            until=STABLE if args.examples is None and args.protocol == "clean" else 0.0,
            max_tokens=max_tokens,
            seed=args.seed,
            model_sha256=sha256(path),
            fingerprint=fingerprint(path).key,
            engine=engine_of(llm, args),
            versions=versions(),
            calibration={"n_examples": calibrate.N_EXAMPLES, "kv_sizes": kv_sizes} if args.calibrate else {},
        )
        journal = Journal(journal_path, asdict(settings), resume=args.resume)
        begin = time.perf_counter()
        reader = LlamaReader(llm)
        n_read = measure(reader, examples, journal, method=args.method, answers=answers, until=settings.until)
        seconds = time.perf_counter() - begin
        outcomes, calibration = outcomes_of(journal), None
        agreement = check_reliable(outcomes, reader.heads)
        if args.calibrate:
            held_out = HeldOut(llm, max_tokens=max_tokens, n_examples=calibrate.N_EXAMPLES, seed=args.seed)
            importance = Importance(mean_importance(outcomes))
            calibration = calibrate.calibrate(llm, importance, held_out, journal, kv_sizes=kv_sizes, accept_above=ACCEPT_ABOVE)
    finally:
        llm.close()
    scores = result(settings, outcomes, agreement, calibration)
    write_json(args.output, scores)
    if not args.keep:
        journal_path.unlink()
    if args.write is not None:
        _write_model(path, args, scores)
    print(report(scores, reader.heads, n_read=n_read, seconds=seconds))
    print(f"written     {args.output}")
    if calibration is not None:
        print("\n".join(calibration.lines()))
    return 0


def report(scores: dict[str, Any], heads: Sequence[tuple[int, int]], *, n_read: int, seconds: float) -> str:
    """What was measured, as text without a final line break."""
    importance = np.asarray(scores["importance"])
    compressed = np.concatenate([row[: n * bool(n_kv)] for row, (n, n_kv) in zip(importance, heads, strict=True)])
    n_kv_heads = sum(n_kv for _, n_kv in heads)
    best = largest_heads(importance, [n * bool(n_kv) for n, n_kv in heads], n=N_TOP_HEADS)
    largest = "  ".join(f"{il}-{ih} {importance[il, ih]:.3g}" for il, ih in best)
    cost = f", {1000 * seconds / n_read:.2f} s per 1000 prompt tokens" if n_read else ""
    how = f"method {scores['method']}, protocol {scores['protocol']}, answers {scores['answers']}"
    lines = (
        f"examples    {scores['accepted']} of {len(scores['examples'])} count, {how}",
        f"reliability {scores['reliability']:.3f} (rank correlation of the importance of {n_kv_heads} KV heads with that of other examples)",
        f"time        {seconds:.1f} s for {n_read} prompt tokens{cost}",
        f"importance  Gini {gini(compressed):.3f}; largest, as layer-head: {largest}",
    )
    return "\n".join(lines)


def choose_answers(args: argparse.Namespace) -> str:
    """Where answers come from: "forced" or "generated"."""
    if args.answers == "forced" and args.protocol == "authors":
        raise ValueError("--answers forced: protocol authors does what their scripts do, use protocol clean")
    return args.answers or ("generated" if args.protocol == "authors" else "forced")


def choose_max_tokens(args: argparse.Namespace, *, n_ctx_train: int) -> int:
    """Length of the longest prompt."""
    if args.max_tokens is not None:
        return check_int("--max-tokens", args.max_tokens, 1, 1 << 24)
    if args.protocol == "authors":
        return MAX_TOKENS
    return min(CLEAN_MAX_TOKENS, n_ctx_train - N_ANSWER) if n_ctx_train else CLEAN_MAX_TOKENS


def _open_model(path: Path, args: argparse.Namespace, *, n_ctx: int) -> Llama:
    from ..llama import Llama

    # any compressed cache: prompts are read and never compressed
    return Llama(
        path,
        kv_size=2 * MAX_ANSWER,
        window=MAX_ANSWER,
        policy="snapkv",
        prefill="token",
        n_seq_max=1 + N_COPIES * args.calibrate,
        n_ctx=n_ctx,
        n_batch=check_int("--n-batch", args.n_batch, 1, 1 << 20),
        n_gpu_layers=args.n_gpu_layers,
        verbose=False,
        **threads_kwargs(args.threads),
    )


def _write_model(path: Path, args: argparse.Namespace, scores: dict[str, Any]) -> None:
    source = (
        f"pyheadkv {__version__} score, protocol {args.protocol}, {scores['accepted']} of {len(scores['examples'])} "
        f"examples up to {scores['max_tokens']} tokens, seed {args.seed}, measured on sha256:{scores['model_sha256']}"
    )
    write_importance(
        path,
        args.write,
        scores["importance"],
        method=f"headkv-{args.method}",
        source=source,
        beta=scores.get("beta"),
        force=args.force,
    )
    print(f"importance written to {args.write}", file=sys.stderr)
