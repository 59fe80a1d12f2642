"""``pyheadkv eval``: its options, the settings they stand for, and a run from the first question to the report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from ..eval.file_tasks import FILES, n_answer
from ..eval.journal import Journal, machine
from ..eval.quiz import TaskOptions
from ..eval.report import write_report
from ..eval.run import DEFAULT_PROTOCOLS, PROTOCOLS, Job, count_quizzes, describe, run_job
from ..eval.tasks import TASKS
from ..eval.trial import Setting
from ..importance_values import check_beta
from ..llama import cells_in
from ..model import model_path, read_shape
from ..options import (
    AUTO,
    DEFAULT_BETA,
    FULL,
    MAX_CELLS,
    NONE,
    POOLS,
    PRESETS,
    Options,
    check_choice,
    check_extra,
    check_int,
    check_policy,
    policy_traits,
)
from ..units import parse_bytes
from .arguments import AMOUNTS, add_amount_arguments, add_keep_arguments, keep_kwargs, split

KV_SIZES = "32,64,128"
RECENT = Options(kv_size=64).recent
SCORING = {
    "window": "last queries that score the prompt",
    "recent": "last cells that every head keeps",
    "power": "of the mean over the queries",
    "pool_kernel": "neighbours that are pooled, 0 = a quarter of the cells of a head",
}  # numbers of ``Setting``


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
    group.add_argument("--beta", default="", metavar="LIST", help=f"(default: the one stored with the importance, else {DEFAULT_BETA})")
    group.add_argument("--importance", default="", metavar="LIST", help="score files or GGUFs (default: the importance of the model)")
    group.add_argument("--replay", default="", metavar="LIST", help="replay tables, score files or GGUFs (default: the table of the model)")
    add_keep_arguments(parser.add_argument_group("cells that every head keeps, under all settings"))
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--protocol", default=",".join(DEFAULT_PROTOCOLS), metavar="LIST", help=f"of {', '.join(PROTOCOLS)} (default: %(default)s)"
    )
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
        "--kl",
        action="store_true",
        help="also what each cache makes of the full cache's answer: perplexity, divergence of the next token; and of the right answer: perplexity",
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
    """The full cache, no context if wanted, then every combination that differs; pooling, beta and tables only where they count.

    Parameters
    ----------
    n_ctx : tokens that no budget exceeds
    """
    policies = [check_policy("--policy", p, (AUTO, FULL, NONE)) for p in split(args.policy)]
    presets = [check_choice("--preset", p, tuple(PRESETS)) for p in split(args.preset)] or [""]
    pools = [check_choice("--pool", p, tuple(POOLS)) for p in split(args.pool)] or [""]
    scorings: list[dict[str, Any]] = [
        dict(zip(SCORING, values, strict=True)) for values in product(*(_numbers(args, name) for name in SCORING))
    ]
    betas = [_beta(b) for b in split(args.beta)] or [0.0]
    files = product(split(args.importance) or [""], split(args.replay) or [""])
    _check_used(args, policies)
    out = [Setting()]
    amounts = _amounts(args, model, n_ctx=n_ctx)
    for policy, amount, preset, pool, scoring, beta, (file, table) in product(policies, amounts, presets, pools, scorings, betas, files):
        if policy in (FULL, NONE):
            out += [Setting(policy)]
            continue
        traits = policy_traits(policy)
        setting = replace(amount, policy=policy)
        if traits.by_window:
            setting = replace(setting, preset=preset, pool=pool, **scoring)
            Options(
                kv_size=setting.kv_size or MAX_CELLS, preset=preset or "default", **setting.scoring
            )  # or an error that names what is wrong
        if traits.by_importance:
            setting = replace(setting, beta=beta, importance=file)
        out.append(replace(setting, replay=table) if traits.by_replay else setting)
    return tuple(dict.fromkeys(out))


def _check_used(args: argparse.Namespace, policies: Sequence[str]) -> None:
    compressed = [p for p in policies if p not in (FULL, NONE)]
    traits = [policy_traits(p) for p in compressed]
    by_importance, by_score = any(t.by_importance for t in traits), any(t.by_window for t in traits)
    used = {"preset": by_score, "pool": by_score, **dict.fromkeys(SCORING, by_score), "beta": by_importance, "importance": by_importance}
    used["replay"] = any(t.by_replay for t in traits)
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

    check_extra("the report", "matplotlib", "scipy", "tabulate")
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
    protocols = check_protocols(tuple(split(args.protocol)), path)
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
    try:
        with tqdm(total=sum(counts), initial=sum(counts) - len(places), desc="contexts", leave=False, disable=None) as bar:
            for entry in run_job(job, places, n_jobs=min(args.jobs, max(1, len(places)))):
                journal.append(entry)
                bar.update()
    except ValueError:
        if not journal.entries:  # the model cannot be asked so
            args.output.unlink()
        raise
    where = f"{machine()}; {args.jobs} processes of {args.threads} threads"
    if whole:
        where += f", {(time.perf_counter() - begin) / 60:.1f} minutes"
    report = write_report(args.output, command="pyheadkv eval " + " ".join(sys.argv[2:]), where=where)
    print(report)
    return 0


def check_protocols(protocols: tuple[str, ...], model: Path) -> tuple[str, ...]:
    """Protocols that the layers of a model allow.

    Raises
    ------
    ValueError : there is no such protocol, or the model cannot be asked so
    """
    for name in protocols:
        check_choice("--protocol", name, PROTOCOLS)
    shape = read_shape(model)
    if shape.n_recurrent and protocols != ("query-agnostic",):
        raise ValueError(
            f"--protocol={','.join(protocols)}: {shape.n_recurrent} layers of the model have a recurrent state, which cannot go back to the "
            "last token of a compressed prompt and is not archived: use --protocol query-agnostic"
        )
    return protocols


def n_questions(given: int | None, task: str) -> int:
    """Questions of each kind about one context: as many as given, else 2, or all that a file has."""
    if given is not None:
        return check_int("--questions", given, 1, 1 << 20)
    return 1 << 20 if task in FILES else 2
