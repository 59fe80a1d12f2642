"""Cache policies compared on tasks, at equal bytes, beside the full cache of the same engine: what ``pyheadkv eval`` runs.

Every context is read once with full attention; each setting then compresses that same prompt. Three protocols:

query-aware     the question is part of the prompt that is compressed; what follows in a chat is read against what was kept
query-agnostic  the context is compressed first, the question is read afterwards, against what was kept
archived        every question of a chat is part of a prompt that is compressed, with all that came before it: what is known
                of that is restored from an archive (``Llama(kv_archive=True)``), the rest is read with full attention

Strict in both: the last token of the question runs against the compressed cache, so that the first token of the answer
is judged too. Answers are greedy. Every answer goes to a JSON lines file as soon as its context is done, from which
``--resume`` goes on; a Markdown table and plots are made from that file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..llama import Llama
from ..options import FULL, NONE, PRESETS, policy_traits
from ..units import round_n_ctx
from .file_tasks import FILES, check_files, n_answer, read_contexts
from .journal import commit, sha256
from .quiz import Ask, TaskOptions, Turn
from .tasks import make_task
from .trial import ArchivedTrial, Copy, Held, Setting, Trial, log_softmax

PROTOCOLS = ("query-aware", "query-agnostic", "archived")
DEFAULT_PROTOCOLS = PROTOCOLS[:2]
MAX_COPIES = 32  # of a prompt at a time; each has window queries in the memory of the context
N_ROOM = 512  # tokens of the context for follow-up questions and answers


REFERRING = "uniform/value/values"  # a policy for which queries of the whole prompt are noted


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
class Likelihood:
    """Of the right answer, or of as many of its tokens as are generated at most.

    Attributes
    ----------
    n : tokens
    nll : mean negative log likelihood, nats per token
    """

    n: int
    nll: float


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
    right: Likelihood | None = None


class Worker:
    """One model in one process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.trials: dict[tuple[str, bool], Trial] = {}  # by policy, "" = any that can look at a prompt afterwards; with an archive
        self.llm = self.trial(Setting()).llm
        self.tasks = [make_task(self.llm, options) for options in job.tasks]

    def trial(self, setting: Setting, *, archived: bool = False) -> Trial:
        """Where prompts are read for a setting."""
        policy = self._reads(setting)
        if (policy, archived) not in self.trials:
            job = self.job
            several = {"prefill": "token", "n_seq_max": 1 + min(MAX_COPIES, len(job.settings))}
            self.trials[policy, archived] = (ArchivedTrial if archived else Trial)(Llama(
                job.model,
                kv_size=64,
                policy=policy or "snapkv",
                window=max(s.window or PRESETS[s.preset or "default"]["window"] for s in job.settings),
                n_ctx=round_n_ctx(max(task.n_tokens + max(N_ROOM, n_answer(task)) for task in job.tasks)),
                n_threads=job.n_threads,
                n_threads_batch=job.n_threads,
                n_gpu_layers=job.n_gpu_layers,
                verbose=False,
                **({"kv_archive": True} if archived else several),
                **job.keep,
            ))  # fmt: skip
        return self.trials[policy, archived]

    def _reads(self, setting: Setting) -> str:
        """The policy that a prompt has to be read with, "" = any; those that look at queries of all of it share a context, and others take part."""
        compressed = [s.policy for s in self.job.settings if s.policy not in (FULL, NONE)]
        if setting.policy in compressed and policy_traits(setting.policy).rank == b"sums":
            return setting.policy
        traits = [policy_traits(policy) for policy in compressed]
        return REFERRING if any(t.fit == b"values" or t.rank == b"expected" for t in traits) else ""

    def run(self, i_task: int, i_quiz: int) -> dict[str, Any]:
        """All answers about one context: one line of the output."""
        task = self.tasks[i_task]
        asks, stop = task.quiz(i_quiz), task.stop_tokens
        answers = []
        for protocol in self.job.protocols:
            run = dict(zip(PROTOCOLS, (self._aware, self._agnostic, self._archived), strict=True))[protocol]
            for answer in run(asks, stop):
                asked, held = answer.question, answer.held
                text = self.llm.detokenize(answer.tokens).decode("utf-8", "replace").strip()
                score = answer.distance.agree if isinstance(asked, Ask) and asked.follows and answer.distance else asked.grade(text)
                answers.append(
                    {"ask": answer.number, "kind": asked.kind, "depth": round(asked.depth, 4), "n_tokens": answer.n_tokens,
                     "protocol": protocol, "setting": answer.setting.name, "score": score, "n_prompt": held.n_prompt,
                     "cells": round(held.per_head, 2), "bytes": held.cells, "bytes_store": held.store, "text": text}
                    | ({"bytes_beside": held.beside} if held.beside else {})
                    | ({"distance": asdict(answer.distance)} if answer.distance else {})
                    | ({"right": asdict(answer.right)} if answer.right else {})
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
            for trial, copies in self._copies(context, question="later"):
                for i_ask, ask, expected in some:
                    rest = (*ask.prompt[ask.n_context :], *ask.more)
                    yield from self._answers(trial, copies, i_ask, ask, ask.n_context, rest, stop, expected)
            for i_ask, ask, expected in some:
                yield from self._alone(i_ask, ask, stop, expected)

    def _archived(self, asks: Sequence[Ask], stop: frozenset[int]) -> Iterator[Answer]:
        for i_ask, ask in enumerate(asks):
            expected, number = Expected(ask.follows), i_ask * (1 + len(ask.turns))
            prompt = (*ask.prompt, *ask.more)
            first = replace(ask, prompt=prompt, more=(), turns=())
            said: dict[Setting, list[int]] = {}
            for trial, copies in self._copies(prompt, archived=True):
                for answer in self._answers(trial, copies, i_ask, first, len(prompt) - 1, prompt[-1:], stop, expected):
                    said[answer.setting] = answer.tokens
                    yield replace(answer, number=number, question=ask)
            for setting, tokens in said.items():
                chat, trial = list(prompt), self.trial(setting, archived=True)
                for k, turn in enumerate(ask.turns, start=1):
                    chat += [*tokens, *turn.prompt]
                    copy = trial.compress(setting, chat)
                    trial.go_on([copy], len(chat) - 1, chat[-1:])
                    (right,) = self._likelihood(trial, [copy], turn)
                    (tokens,) = trial.generate([copy], chat[-1], turn.n_steps, stop=stop)
                    yield Answer(number + k, turn, copy.n_tokens, setting, copy.held, tokens, right=right)
                    trial.drop([copy])
            yield from self._alone(i_ask, ask, stop, expected)

    def _alone(self, i_ask: int, ask: Ask, stop: frozenset[int], expected: Expected) -> Iterator[Answer]:
        """What the model says without the context, if that is one of the settings."""
        if not any(setting.policy == NONE for setting in self.job.settings):
            return
        trial = self.trial(Setting())
        copy = trial.read_alone(ask.alone)
        yield from self._answers(trial, [copy], i_ask, ask, len(ask.alone) - 1, ask.alone[-1:], stop, expected)
        trial.drop([copy])

    def _copies(self, prompt: Sequence[int], *, archived: bool = False, question: str = "known") -> Iterator[tuple[Trial, list[Copy]]]:
        """The prompt under all settings, as many at a time as a context takes; the full cache comes first."""
        groups: dict[str, list[Setting]] = {}
        for setting in self.job.settings:
            if setting.policy != NONE:
                groups.setdefault(self._reads(setting), []).append(setting)
        for settings in groups.values():
            trial = self.trial(settings[0], archived=archived)
            for i in range(0, len(settings), trial.n_copies):
                copies = [trial.compress(setting, prompt, question=question) for setting in settings[i : i + trial.n_copies]]
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
            rights = self._likelihood(trial, copies, turn)
            said, n_steps = trial.generate(copies, turn.prompt[-1], turn.n_steps, stop=stop), turn.n_steps
            answers += [
                Answer(number + k, turn, c.n_tokens, c.setting, c.held, tokens, right=right)
                for c, tokens, right in zip(copies, said, rights, strict=True)
            ]
        if copies[0].policy == FULL and not expected.tokens:
            expected.tokens = first[0]
        if expected.tokens and (self.job.kl or ask.follows):
            trial.go_again(copies, n, rest)
            distances = measure(trial, copies, rest[-1], expected)
            answers[: len(copies)] = [replace(a, distance=d) for a, d in zip(answers, distances)]
        if self.job.kl and (right := ask.right[: ask.n_steps]):
            if right == tuple(expected.tokens):
                surprise = [d.nll for d in distances]
            else:
                trial.go_again(copies, n, rest)
                surprise = trial.surprise(copies, rest[-1], right)
            answers[: len(copies)] = [replace(a, right=Likelihood(len(right), round(s, 6))) for a, s in zip(answers, surprise)]
        yield from answers

    def _likelihood(self, trial: Trial, copies: Sequence[Copy], turn: Turn) -> list[Likelihood | None]:
        """Of the right answer of a turn whose last token is not read yet; copies stay as they are. None where they could not."""
        right = turn.right[: turn.n_steps]
        if not (self.job.kl and right and trial.is_whole):
            return [None] * len(copies)
        surprise = trial.surprise(copies, turn.prompt[-1], right)
        for copy in copies:
            trial.go_back([copy], copy.n_tokens - len(right))
        return [Likelihood(len(right), round(s, 6)) for s in surprise]


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


_worker: Worker | Exception | None = None  # of this process, or why there is none


def _begin(job: Job) -> None:
    global _worker
    try:
        _worker = Worker(job)
    except Exception as error:  # a pool does not say what ended its processes
        _worker = error


def _run(place: tuple[int, int]) -> dict[str, Any]:
    if isinstance(_worker, Exception):
        raise _worker
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

    files = {Path(file) for s in job.settings for file in (s.importance, s.replay) if file}
    files |= {f for t in job.tasks for f in (t.file, t.prompts) if f}
    return {
        "model": job.model.name,
        "model_sha256": sha256(job.model),
        "files_sha256": {file.name: sha256(file) for file in sorted(files)},
        "settings": [
            {**asdict(s), "name": s.name, "method": s.method, "budget": s.budget}
            | {"importance": Path(s.importance).name, "replay": Path(s.replay).name}
            for s in job.settings
        ],
        "keep": job.keep,
        "kl": job.kl,
        "protocols": job.protocols,
        "tasks": [{**asdict(t), "file": t.file and t.file.name, "prompts": t.prompts and t.prompts.name} for t in job.tasks],
        "engine": {"n_threads": job.n_threads, "n_gpu_layers": job.n_gpu_layers},
        "versions": {"pyheadkv": __version__, "llama_cpp_python": llama_cpp.__version__, "commit": commit()},
    }
