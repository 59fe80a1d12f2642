"""``pyheadkv eval``: compare cache policies on tasks, at equal bytes, beside the full cache of the same engine.

Every context is read once with full attention; each setting then compresses that same prompt. Two protocols:

query-aware     the question is part of the prompt that is compressed
query-agnostic  the context is compressed first, the question is read afterwards, against what was kept

Strict in both: the last token of the question runs against the compressed cache, so that the first token of the answer
is judged too. Answers are greedy. Every answer goes to a JSON lines file as soon as its context is done, from which
``--resume`` goes on; a Markdown table and plots are made from that file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .cli.arguments import AMOUNTS, add_amount_arguments, add_keep_arguments, check_drawing, keep_kwargs, split
from .evaluate_report import write_report
from .file_tasks import FILES, check_files, n_answer, read_contexts
from .gguf_keys import check_beta
from .journal import Journal, commit, machine, sha256
from .llama import Llama, cells_in
from .model import model_path
from .options import (
    AUTO,
    BY_ALL_TOKENS,
    BY_IMPORTANCE,
    FULL,
    MAX_CELLS,
    NONE,
    POLICIES,
    POOLS,
    PRESETS,
    UNPOOLED,
    Options,
    check_choice,
    check_int,
)
from .quiz import Ask, TaskOptions, Turn
from .tasks import TASKS, make_task
from .trial import Copy, Held, Setting, Trial, log_softmax
from .units import parse_bytes, round_n_ctx

PROTOCOLS = ("query-aware", "query-agnostic")
KV_SIZES = "32,64,128"
RECENT = Options(kv_size=64).recent
MAX_COPIES = 32  # of a prompt at a time; each has window queries in the memory of the context
SCORING = {
    "window": "last queries that score the prompt",
    "recent": "last cells that every head keeps",
    "power": "of the mean over the queries",
    "pool_kernel": "neighbours that are pooled, 0 = a quarter of the cells of a head",
}  # numbers of ``Setting``
N_ROOM = 512  # tokens of the context for follow-up questions and answers


@dataclass(frozen=True)
class Job:
    """What a worker needs; ``keep``: sinks, protected spans and surplus, the same for all settings."""

    model: Path
    tasks: tuple[TaskOptions, ...]
    settings: tuple[Setting, ...]
    protocols: tuple[str, ...]
    keep: dict[str, Any]
    n_threads: int
    n_gpu_layers: int
    kl: bool = False  # measure distances from the full cache beside the answers


@dataclass
class Expected:
    """What the full cache says, and what it expects at each token of it.

    Attributes
    ----------
    tokens : its answer, or those that follow the prompt where nothing is asked
    log_p : of each token float32 (n_vocab,), natural logarithms of its probabilities
    """

    tokens: Sequence[int]
    log_p: list[NDArray[np.float32]] = field(default_factory=list)


@dataclass(frozen=True)
class Distance:
    """From the full cache, over the tokens of ``Expected``.

    Attributes
    ----------
    n : tokens
    nll : mean negative log likelihood, nats per token
    kl : mean Kullback-Leibler divergence from the full cache's distribution of the next token, nats
    agree : share of the tokens for which both find the same one the most likely
    """

    n: int
    nll: float
    kl: float
    agree: float


@dataclass(frozen=True)
class Answer:
    """What was generated for a question under a setting."""

    number: int  # of the question about its context
    question: Ask | Turn
    n_tokens: int
    setting: Setting
    held: Held
    tokens: list[int]
    distance: Distance | None = None


class Worker:
    """One model in one process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.trials: dict[str, Trial] = {}  # by policy, "" = any that can look at a prompt afterwards
        self.llm = self.trial(Setting()).llm
        self.tasks = [make_task(self.llm, options) for options in job.tasks]

    def trial(self, setting: Setting) -> Trial:
        """Where prompts are read for a setting."""
        policy = self._reads(setting)
        if policy not in self.trials:
            job = self.job
            self.trials[policy] = Trial(Llama(
                job.model,
                kv_size=64,
                policy=policy or "snapkv",
                prefill="token",
                n_seq_max=1 + min(MAX_COPIES, len(job.settings)),
                window=max(s.window or PRESETS[s.preset or "default"]["window"] for s in job.settings),
                n_ctx=round_n_ctx(max(task.n_tokens + max(N_ROOM, n_answer(task)) for task in job.tasks)),
                n_threads=job.n_threads,
                n_threads_batch=job.n_threads,
                n_gpu_layers=job.n_gpu_layers,
                verbose=False,
                **job.keep,
            ))  # fmt: skip
        return self.trials[policy]

    @staticmethod
    def _reads(setting: Setting) -> str:
        """The policy that a prompt has to be read with, "" = any."""
        return setting.policy if setting.policy in BY_ALL_TOKENS else ""

    def run(self, i_task: int, i_quiz: int) -> dict[str, Any]:
        """All answers about one context: one line of the output."""
        task = self.tasks[i_task]
        asks, stop = task.quiz(i_quiz), task.stop_tokens
        answers = []
        for protocol in self.job.protocols:
            run = self._aware if protocol == PROTOCOLS[0] else self._agnostic
            for answer in run(asks, stop):
                asked, held = answer.question, answer.held
                text = self.llm.detokenize(answer.tokens).decode("utf-8", "replace").strip()
                score = answer.distance.agree if isinstance(asked, Ask) and asked.follows and answer.distance else asked.grade(text)
                answers.append(
                    {"ask": answer.number, "kind": asked.kind, "depth": round(asked.depth, 4), "n_tokens": answer.n_tokens,
                     "protocol": protocol, "setting": answer.setting.name, "score": score, "n_prompt": held.n_prompt,
                     "cells": round(held.per_head, 2), "bytes": held.cells, "bytes_store": held.store, "text": text}
                    | ({"distance": asdict(answer.distance)} if answer.distance else {})
                )  # fmt: skip
        return {"task": task.options.name, "length": task.options.n_tokens, "quiz": i_quiz, "answers": answers}

    def _aware(self, asks: Sequence[Ask], stop: frozenset[int]) -> Iterator[Answer]:
        for i_ask, ask in enumerate(asks):
            expected = Expected(ask.follows)
            for trial, copies in self._copies(ask.prompt):
                rest = (ask.prompt[-1], *ask.more)
                yield from self._answers(trial, copies, i_ask, ask, len(ask.prompt) - 1, rest, stop, expected)
            yield from self._alone(i_ask, ask, stop, expected)

    def _agnostic(self, asks: Sequence[Ask], stop: frozenset[int]) -> Iterator[Answer]:
        by_context: dict[tuple[int, ...], list[tuple[int, Ask, Expected]]] = {}
        for i_ask, ask in enumerate(asks):
            by_context.setdefault(ask.prompt[: ask.n_context], []).append((i_ask, ask, Expected(ask.follows)))
        for context, some in by_context.items():
            for trial, copies in self._copies(context):
                for i_ask, ask, expected in some:
                    rest = (*ask.prompt[ask.n_context :], *ask.more)
                    yield from self._answers(trial, copies, i_ask, ask, ask.n_context, rest, stop, expected)
            for i_ask, ask, expected in some:
                yield from self._alone(i_ask, ask, stop, expected)

    def _alone(self, i_ask: int, ask: Ask, stop: frozenset[int], expected: Expected) -> Iterator[Answer]:
        """What the model says without the context, if that is one of the settings."""
        if not any(setting.policy == NONE for setting in self.job.settings):
            return
        trial = self.trial(Setting())
        copy = trial.read_alone(ask.alone)
        yield from self._answers(trial, [copy], i_ask, ask, len(ask.alone) - 1, ask.alone[-1:], stop, expected)
        trial.drop([copy])

    def _copies(self, prompt: Sequence[int]) -> Iterator[tuple[Trial, list[Copy]]]:
        """The prompt under all settings, as many at a time as a context takes; the full cache comes first."""
        groups: dict[str, list[Setting]] = {}
        for setting in self.job.settings:
            if setting.policy != NONE:
                groups.setdefault(self._reads(setting), []).append(setting)
        for settings in groups.values():
            trial = self.trial(settings[0])
            for i in range(0, len(settings), trial.n_copies):
                copies = [trial.compress(setting, prompt) for setting in settings[i : i + trial.n_copies]]
                yield trial, copies
                trial.drop(copies)

    def _answers(
        self,
        trial: Trial,
        copies: Sequence[Copy],
        i_ask: int,
        ask: Ask,
        n: int,
        rest: Sequence[int],
        stop: frozenset[int],
        expected: Expected,
    ) -> Iterator[Answer]:
        """To a question and to those that follow it in the same chat: ``rest`` comes after the first n tokens of the prompt."""
        number, n_steps = i_ask * (1 + len(ask.turns)), ask.n_steps
        trial.go_on(copies, n, rest)
        first = said = trial.generate(copies, rest[-1], n_steps, stop=stop)
        answers = [Answer(number, ask, c.n_tokens, c.setting, c.held, tokens) for c, tokens in zip(copies, said, strict=True)]
        for k, turn in enumerate(ask.turns, start=1):
            # of an answer that was not stopped, the last token is not read yet
            trial.say(copies, [[*tokens[n_steps - 1 :], *turn.prompt[:-1]] for tokens in said])
            said, n_steps = trial.generate(copies, turn.prompt[-1], turn.n_steps, stop=stop), turn.n_steps
            answers += [Answer(number + k, turn, c.n_tokens, c.setting, c.held, tokens) for c, tokens in zip(copies, said, strict=True)]
        if copies[0].policy == FULL and not expected.tokens:
            expected.tokens = first[0]
        if expected.tokens and (self.job.kl or ask.follows):
            trial.go_on(copies, n, rest)
            distances = measure(trial, copies, rest[-1], expected)
            answers[: len(copies)] = [replace(a, distance=d) for a, d in zip(answers, distances)]
        yield from answers


def measure(trial: Trial, copies: Sequence[Copy], last: int, expected: Expected) -> list[Distance]:
    """Distances of copies from the full cache after ``last``, which is read first; the first call is that with the full cache.

    It is the first copy then, and fills ``expected.log_p``.
    """
    wanted, n = expected.tokens, len(expected.tokens)
    sums, i = np.zeros((3, len(copies))), 0
    is_full = not expected.log_p
    for logits in trial.follow(copies, [last, *wanted[:-1]]):
        log_p = log_softmax(logits)
        if is_full:
            expected.log_p += list(log_p[0].astype(np.float32))
        full = np.stack(expected.log_p[i : i + log_p.shape[1]])
        here = wanted[i : i + log_p.shape[1]]
        sums[0] -= log_p[:, range(len(here)), here].sum(axis=1)
        sums[1] += (np.exp(full) * (full - log_p)).sum(axis=(1, 2))
        sums[2] += (log_p.argmax(axis=2) == full.argmax(axis=1)).sum(axis=1)
        i += len(here)
    return [Distance(n, *(round(float(x) / n, 6) for x in column)) for column in sums.T]


_worker: Worker | None = None  # of this process


def _begin(job: Job) -> None:
    global _worker
    _worker = Worker(job)


def _run(place: tuple[int, int]) -> dict[str, Any]:
    assert _worker is not None
    return _worker.run(*place)


def run_job(job: Job, places: Sequence[tuple[int, int]], *, n_jobs: int) -> Iterator[dict[str, Any]]:
    """Answers of each (task, context), as they are done, computed by ``n_jobs`` processes."""
    with ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(job,)) as pool:
        try:
            waiting = {pool.submit(_run, place): i for i, place in enumerate(places)}
            while waiting:
                done = wait(waiting, return_when=FIRST_COMPLETED).done
                for future in sorted(done, key=waiting.__getitem__):
                    del waiting[future]
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``pyheadkv eval``."""
    parser.add_argument("task", metavar="TASK[,TASK..]", help=f"one or more of {', '.join(TASKS)}")
    parser.add_argument("model", nargs="?", metavar="MODEL.gguf", help="model (default: the embedded one)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.jsonl", help="answers; tables and plots stand beside it")
    group = parser.add_argument_group("settings to compare, comma-separated; the full cache is always one of them")
    group.add_argument(
        "--policy", default="auto,snapkv,streaming", metavar="LIST", help="(default: %(default)s); none = the question without its context"
    )
    group.add_argument(
        "--kv-size", metavar="LIST", help=f"mean cells per KV head, recent ones included (default: {KV_SIZES} if no amount is given)"
    )
    add_amount_arguments(group, several=True)
    group.add_argument(
        "--preset", default="", metavar="LIST", help="of window, recent, power and pooling: default, paper (default: default)"
    )
    group.add_argument("--pool", default="", metavar="LIST", help="max, avg (default: that of the preset)")
    for name, what in SCORING.items():
        group.add_argument(f"--{name.replace('_', '-')}", default="", metavar="LIST", help=f"{what} (default: that of the preset)")
    group.add_argument("--beta", default="", metavar="LIST", help="(default: the one stored with the importance, else 1.2)")
    group.add_argument("--importance", default="", metavar="LIST", help="score files or GGUFs (default: the importance of the model)")
    add_keep_arguments(parser.add_argument_group("cells that every head keeps, under all settings"))
    group = parser.add_argument_group("questions")
    group.add_argument("--protocol", default=",".join(PROTOCOLS), metavar="LIST", help="query-aware, query-agnostic (default: both)")
    group.add_argument("--tokens", default="4096", metavar="LIST", help="lengths of the prompts (default: %(default)s)")
    group.add_argument("--contexts", type=int, default=20, metavar="N", help="per task and length (default: %(default)s)")
    group.add_argument("--questions", type=int, metavar="N", help="of each kind about one context (default: 2; of a file all)")
    group.add_argument("--depths", type=int, default=10, metavar="N", help="of the needle, task niah (default: %(default)s)")
    group.add_argument("--file", type=Path, metavar="FILE.jsonl", help=f"of the tasks {', '.join(FILES)}")
    group.add_argument("--prompts", type=Path, metavar="FILE.json", help="of these tasks (default: those of the package)")
    group.add_argument("--after", default="", metavar="TEXT", help="instructions behind each question (English tasks in a chat template)")
    group.add_argument("--raw", action="store_true", help="no chat template, and one stop token, as the HeadKV authors ask (English tasks)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--kl", action="store_true", help="also what each cache makes of the full cache's answer: perplexity, divergence of the next token"
    )
    group = parser.add_argument_group("run")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="contexts at the same time (default: %(default)s)")
    group.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of each (default: %(default)s)")
    group.add_argument("--n-gpu-layers", type=int, default=0, metavar="N", help="layers on the GPU, -1 = all (default: %(default)s)")
    group.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    group.add_argument("--force", action="store_true", help="replace the output")


def _numbers(args: argparse.Namespace, name: str) -> list[int | None]:
    texts = split(getattr(args, name))
    for text in texts:
        if not text.isdigit():
            raise ValueError(f"--{name.replace('_', '-')}={text!r}: it must be a whole number")
    return [*map(int, texts)] or [None]


def _beta(text: str) -> float:
    try:
        return check_beta(float(text), name="--beta")
    except ValueError:
        raise ValueError(f"--beta={text!r}: it must be a finite number > 1 (larger = more uniform budgets)") from None


def make_settings(args: argparse.Namespace, model: Path, *, n_ctx: int) -> tuple[Setting, ...]:
    """The full cache, no context if wanted, then every combination that differs; pooling, beta and importance only where they count.

    Parameters
    ----------
    n_ctx : tokens that no budget exceeds
    """
    policies = [check_choice("--policy", p, (AUTO, FULL, NONE, *POLICIES)) for p in split(args.policy)]
    presets = [check_choice("--preset", p, tuple(PRESETS)) for p in split(args.preset)] or [""]
    pools = [check_choice("--pool", p, tuple(POOLS)) for p in split(args.pool)] or [""]
    scorings: list[dict[str, Any]] = [
        dict(zip(SCORING, values, strict=True)) for values in product(*(_numbers(args, name) for name in SCORING))
    ]
    betas = [_beta(b) for b in split(args.beta)] or [0.0]
    files = split(args.importance) or [""]
    _check_used(args, policies)
    out = [Setting()]
    amounts = _amounts(args, model, n_ctx=n_ctx)
    for policy, amount, preset, pool, scoring, beta, file in product(policies, amounts, presets, pools, scorings, betas, files):
        if policy in (FULL, NONE):
            out += [Setting(policy)]
            continue
        by_importance, by_score = policy in (AUTO, *BY_IMPORTANCE), policy not in UNPOOLED
        setting = replace(amount, policy=policy)
        if by_score:
            setting = replace(setting, preset=preset, pool=pool, **scoring)
            Options(
                kv_size=setting.kv_size or MAX_CELLS, preset=preset or "default", **setting.scoring
            )  # or an error that names what is wrong
        out.append(replace(setting, beta=beta, importance=file) if by_importance else setting)
    return tuple(dict.fromkeys(out))


def _check_used(args: argparse.Namespace, policies: Sequence[str]) -> None:
    compressed = [p for p in policies if p not in (FULL, NONE)]
    by_importance, by_score = any(p in (AUTO, *BY_IMPORTANCE) for p in compressed), any(p not in UNPOOLED for p in compressed)
    used = {"preset": by_score, "pool": by_score, **dict.fromkeys(SCORING, by_score), "beta": by_importance, "importance": by_importance}
    used |= dict.fromkeys((*AMOUNTS, "sinks", "protect", "surplus"), bool(compressed))
    for name, is_used in used.items():
        value = getattr(args, name)
        if not is_used and value not in (None, "", []):
            raise ValueError(
                f"--{name.replace('_', '-')}={value}: no policy of {args.policy!r} looks at it: add one that does, or leave it out"
            )


def _amounts(args: argparse.Namespace, model: Path, *, n_ctx: int) -> list[Setting]:
    """Settings that say nothing but how much is kept."""
    given = args.kv_size or args.kv_ratio or args.kv_bytes
    sizes = split(args.kv_size if given else KV_SIZES)
    out = [Setting(kv_size=check_int("--kv-size", int(n) if n.isdigit() else n, RECENT + 1, n_ctx)) for n in sizes]
    for text in split(args.kv_ratio):
        out.append(Setting(kv_ratio=_ratio(text)))
    for text in split(args.kv_bytes):
        kv_size = cells_in(parse_bytes("--kv-bytes", text), model, recent=RECENT, n_ctx=n_ctx)
        out.append(Setting(kv_size=kv_size, kv_bytes=text.replace(" ", "")))
    return out


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"--kv-ratio={text!r}: it must be a share of the prompt, above 0 and at most 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Ask everything that is not answered yet, and write the report."""
    from tqdm import tqdm

    check_drawing("the report")
    path = model_path(args.model)
    if args.output.suffix != ".jsonl" or not args.output.parent.is_dir():
        raise ValueError(f"output {args.output}: name a file that ends in .jsonl, in a folder that exists")
    if args.output.exists() and not (args.resume or args.force):
        raise ValueError(f"output {args.output} exists: pass --resume to go on with it, or --force to replace it")
    lengths = [check_int("--tokens", int(n) if n.isdigit() else n, 64, 1 << 24) for n in split(args.tokens)]
    tasks = tuple(
        TaskOptions(
            check_choice("task", name, TASKS),
            n,
            n_questions(args.questions, name),
            args.seed,
            args.depths,
            args.file,
            args.prompts,
            args.raw,
            args.after,
        )
        for name in split(args.task)
        for n in lengths
    )
    for task in tasks:
        n_answer(task)  # files that are needed are there
    protocols = tuple(check_choice("--protocol", p, PROTOCOLS) for p in split(args.protocol))
    settings = make_settings(args, path, n_ctx=max(lengths))
    job = Job(
        path, tasks, settings, protocols, keep_kwargs(args), check_int("--threads", args.threads, 1, 1024), args.n_gpu_layers, args.kl
    )
    check_int("--contexts", args.contexts, 1, 1 << 20)
    check_int("--jobs", args.jobs, 1, 1024)
    journal = Journal(args.output, describe(job), resume=args.resume)
    done = {(e["task"], e["length"], e["quiz"]) for e in journal.entries}
    counts = count_quizzes(job, args.contexts)
    places = [(i, k) for i, task in enumerate(tasks) for k in range(counts[i]) if (task.name, task.n_tokens, k) not in done]
    begin, whole = time.perf_counter(), not journal.entries
    with tqdm(total=sum(counts), initial=sum(counts) - len(places), desc="contexts", leave=False, disable=None) as bar:
        for entry in run_job(job, places, n_jobs=min(args.jobs, max(1, len(places)))):
            journal.append(entry)
            bar.update()
    where = f"{machine()}; {args.jobs} processes of {args.threads} threads"
    if whole:
        where += f", {(time.perf_counter() - begin) / 60:.1f} minutes"
    report = write_report(args.output, command="pyheadkv eval " + " ".join(sys.argv[2:]), where=where)
    print(report)
    return 0


def n_questions(given: int | None, task: str) -> int:
    """Questions of each kind about one context: as many as given, else 2, or all that a file has."""
    if given is not None:
        return check_int("--questions", given, 1, 1 << 20)
    return 1 << 20 if task in FILES else 2


def count_quizzes(job: Job, n_contexts: int) -> list[int]:
    """Contexts of each task: as many as are wanted, or as a file has."""
    counts = []
    for options in job.tasks:
        n = n_contexts
        if options.name in FILES:
            n = min(n, len(read_contexts(check_files(options)[0])))
        counts.append(n)
    return counts


def describe(job: Job) -> dict[str, Any]:
    """What decides the answers: first line of the output."""
    import llama_cpp

    files = {Path(s.importance) for s in job.settings if s.importance} | {f for t in job.tasks for f in (t.file, t.prompts) if f}
    return {
        "model": job.model.name,
        "model_sha256": sha256(job.model),
        "files_sha256": {file.name: sha256(file) for file in sorted(files)},
        "settings": [
            {**asdict(s), "name": s.name, "method": s.method, "budget": s.budget, "importance": Path(s.importance).name}
            for s in job.settings
        ],
        "keep": job.keep,
        "kl": job.kl,
        "protocols": job.protocols,
        "tasks": [{**asdict(t), "file": t.file and t.file.name, "prompts": t.prompts and t.prompts.name} for t in job.tasks],
        "engine": {"n_threads": job.n_threads, "n_gpu_layers": job.n_gpu_layers},
        "versions": {"pyheadkv": __version__, "llama_cpp_python": llama_cpp.__version__, "commit": commit()},
    }
