"""``pyheadkv inspect``: importance and budgets of a GGUF, as a table and as a heat map. No weights are loaded, but for ``--prompt``."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import _lib
from ..gguf_header import read_header
from ..importance import Found, find_importance
from ..importance_values import Importance
from ..layers import ask_library, bytes_beside
from ..model import ModelShape, model_path, read_shape
from ..options import (
    AUTO,
    BY_IMPORTANCE,
    DEFAULT_BETA,
    POLICIES,
    PRESETS,
    QUESTIONS,
    Options,
    check_extra,
    check_int,
    load_importance,
)
from ..picture import draw_panel
from ..replay import known_table
from ..replay_values import ReplayTable
from ..units import format_bytes, ggml_type
from . import inspect_prompt
from .arguments import given

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGET_OPTIONS = (
    "policy",
    "budget",
    "rank",
    "fit",
    "question",
    "beta",
    "preset",
    "window",
    "recent",
    "power",
)  # of add_budget_arguments, beside kv_size
N_UBATCH = 512  # tokens, the default: windows have room for one ubatch
TOP_SHARES = (0.01, 0.05, 0.10, 0.25)  # of all query heads
BARS, BARS_ASCII = "▁▂▃▄▅▆▇█", "12345678"

REMEDY_IMPORTANCE = "measure it with 'pyheadkv score', name a score file with --importance, or use --policy snapkv (uniform budgets)"


@dataclass(frozen=True)
class Plan:
    """Budgets that a model would get.

    Attributes
    ----------
    policy : the one that "auto" stands for, if that was asked for
    importance : (n_layer, n_head) float64, not normalised; None under a policy that needs none
    origin : where it is from; empty when there is none
    budget : (n_layer, n_head_kv) int32, cells, recent ones included
    n_ctx : tokens of the full cache to compare with
    n_bytes_beside : bytes of the layers that are not compressed, for one sequence
    """

    shape: ModelShape
    options: Options
    policy: str
    importance: NDArray[np.float64] | None
    origin: str
    budget: NDArray[np.int32]
    n_ctx: int
    n_bytes_beside: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes that the cells of an ``n_ctx`` token prompt take, without generated tokens and other layers."""
        return int(np.minimum(self.budget, self.n_ctx).sum()) * self.shape.cell_bytes

    @property
    def n_bytes_full(self) -> int:
        """Bytes of an uncompressed cache of ``n_ctx`` tokens, of the layers that are compressed."""
        return self.n_ctx * self.shape.token_bytes


# command


def add_budget_arguments(parser: argparse._ActionsContainer, *, kv_size: int | None) -> None:
    """The options that decide the budgets; ``kv_size`` is the default, None = the full cache."""
    parser.add_argument(
        "--kv-size",
        type=int,
        default=kv_size,
        metavar="N",
        help=f"mean cells per KV head, recent ones included (default: {kv_size or 'full cache'})",
    )
    parser.add_argument(
        "--policy",
        metavar="NAME",
        help=f"{', '.join((AUTO, *POLICIES))}, or BUDGET/RANK or BUDGET/RANK/FIT; {', '.join(BY_IMPORTANCE)} need the importance of the "
        f"heads, the others named do not (default: {Options.policy})",
    )
    parser.add_argument(
        "--budget",
        metavar="NAME",
        help="how many cells each head keeps: uniform, importance, replay, mix, adaptive, importance+adaptive, pyramid, whole "
        "(default: that of the policy)",
    )
    parser.add_argument(
        "--rank",
        metavar="NAME",
        help="which ones: attention, value, attention*value, expected, outlying, outlying+value, attention+outlying, output, critical, sums, recent (default: that of the policy)",
    )
    parser.add_argument("--fit", metavar="NAME", help="what becomes of their values: none, mean, values (default: that of the policy)")
    parser.add_argument(
        "--question",
        choices=QUESTIONS,
        help="for policy auto: the prompt ends with the question, with the first of several, or they come later (default: known)",
    )
    parser.add_argument(
        "--beta",
        type=float,
        metavar="X",
        help=f"> 1, larger is more uniform (default: the one stored with the importance, else {DEFAULT_BETA})",
    )
    preset = PRESETS["default"]
    parser.add_argument(
        "--replay", metavar="FILE", help="score file of 'score --method replay', or a GGUF with its table (default: the model's own)"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="defaults of the options below (default: default)")
    parser.add_argument(
        "--window", type=int, metavar="N", help=f"queries of the last tokens of the prompt, which score it (default: {preset['window']})"
    )
    parser.add_argument(
        "--recent", type=int, metavar="N", help=f"last cells of the prompt that every head keeps (default: {preset['recent']})"
    )
    parser.add_argument(
        "--power",
        type=int,
        metavar="N",
        help=f"of the mean of the queries' attention: 1 = plain, up to 8 = rather the largest (default: {preset['power']})",
    )
    parser.add_argument(
        "--importance", metavar="FILE", help="score file (.json, .npy, .csv, .tsv) or a GGUF with importance (default: the model's own)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``pyheadkv inspect``."""
    parser.add_argument("model", nargs="?", metavar="MODEL.gguf", help="model (default: the embedded one)")
    add_budget_arguments(parser, kv_size=128)
    parser.add_argument(
        "--n-ctx",
        type=int,
        metavar="N",
        help="tokens of the full cache to compare with (default: the model's context length)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="also draw a heat map of importance and budgets; with --prompt of what is held (.png), or the text shaded by it (.html) "
        "(default: none)",
    )
    inspect_prompt.add_arguments(parser.add_argument_group("what is held of a prompt"))


def run(args: argparse.Namespace) -> int:
    """Print the plan of a model, or what it holds of a prompt, and draw it when asked to."""
    if inspect_prompt.is_asked(args):
        return inspect_prompt.run(args)
    if args.output is not None:
        check_extra("the heat map", "matplotlib")
    options = Options(kv_size=args.kv_size, **given(args, *BUDGET_OPTIONS))
    plan = make_plan(model_path(args.model), options=options, importance=args.importance, replay=args.replay, n_ctx=args.n_ctx)
    print(format_plan(plan))
    if args.output is not None:
        draw(plan).savefig(args.output, dpi=150)
        print(f"heat map written to {args.output}")
    return 0


# reading


def make_plan(
    path: str | os.PathLike[str],
    *,
    options: Options,
    importance: str | os.PathLike[str] | None = None,
    replay: str | os.PathLike[str] | None = None,
    n_ctx: int | None = None,
) -> Plan:
    """Budgets of a model, by the function that contexts use.

    Parameters
    ----------
    path : GGUF; only its header is read
    importance, replay : score file (JSON) or GGUF; None = the model's own
    n_ctx : tokens; None = the model's context length

    Raises
    ------
    ValueError : wrong option, damaged file, a model that cannot be compressed, or no importance for a policy that needs it
    """
    shape = read_shape(path)
    why_not = shape.why_not or (ask_library(path).why_not if read_header(path).tensors else "")
    if why_not:
        raise ValueError(f"{path}: {why_not}")
    if n_ctx is None and shape.n_ctx_train < 1:
        raise ValueError(f"{path}: {shape.arch}.context_length is missing: give --n-ctx")
    n_ctx = shape.n_ctx_train if n_ctx is None else check_int("n_ctx", n_ctx, 1, 1 << 30)
    if options.kv_size > n_ctx and not options.traits.keeps_all:
        raise ValueError(f"kv_size={options.kv_size} is above n_ctx={n_ctx}: use a smaller kv_size or a larger n_ctx")
    found = _importance(path, source=importance)
    if found is None and options.policy != AUTO and options.traits.by_importance:
        raise ValueError(f"{path}: nothing is known of the importance of its heads: {REMEDY_IMPORTANCE}")
    values = None if found is None else found.importance
    table = known_table(path, replay) if options.traits.by_replay else None
    policy = policy_of(options, values, table)
    options = replace(options, beta=options.beta or (values and values.beta) or DEFAULT_BETA)
    return Plan(
        shape=shape,
        options=options,
        policy=policy,
        importance=None if values is None else values.values,
        origin="" if found is None else found.origin,
        budget=_budget(shape, options=options, importance=values, replay=table, n_tokens=n_ctx),
        n_ctx=n_ctx,
        n_bytes_beside=_bytes_beside(path, shape, n_ctx=n_ctx),
    )


def _bytes_beside(path: str | os.PathLike[str], shape: ModelShape, *, n_ctx: int) -> int:
    if not shape.n_windowed and not shape.n_recurrent:
        return 0
    f16 = ggml_type("f16")
    return bytes_beside(path, n_ctx=n_ctx, n_ubatch=min(n_ctx, N_UBATCH), type_k=f16, type_v=f16)


def _importance(path: str | os.PathLike[str], *, source: str | os.PathLike[str] | None) -> Found | None:
    if source is None:
        return find_importance(path)
    given = load_importance(source, path)
    return None if given is None else Found(given, str(source))


def policy_of(options: Options, importance: Importance | None, replay: ReplayTable | None) -> str:
    """Name of the policy that contexts would use, never "auto"."""
    with _lib.creating(options.to_params(importance, None, replay)):
        return str(_lib.lib.headkv_get_policy(None).decode())


def _budget(
    shape: ModelShape, *, options: Options, importance: Importance | None, replay: ReplayTable | None, n_tokens: int
) -> NDArray[np.int32]:
    cells = np.zeros((shape.n_layer, shape.n_head_kv), dtype=np.int32)
    params = options.to_params(importance, None, replay)
    n_head, n_head_kv = (np.array(counts, dtype=np.int32) for counts in zip(*shape.heads, strict=True))
    heads, heads_kv, dst = (x.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)) for x in (n_head, n_head_kv, cells))
    _lib.check(_lib.lib.headkv_plan(ctypes.byref(params), shape.n_layer, heads, heads_kv, n_tokens, dst), ValueError)
    return cells


# numbers


def gini(values: NDArray[np.float64]) -> float:
    """Gini coefficient of non-negative values: 0 = all the same, towards 1 = one holds everything."""
    ordered = np.sort(values, axis=None)
    rank = np.arange(1, len(ordered) + 1)
    return float(2 * (rank * ordered).sum() / (len(ordered) * ordered.sum()) - (len(ordered) + 1) / len(ordered))


def top_shares(values: NDArray[np.float64]) -> dict[int, float]:
    """Share of the sum that the k largest values hold, for the k that make up ``TOP_SHARES`` of all."""
    cumulated = np.cumsum(np.sort(values, axis=None)[::-1])
    counts = dict.fromkeys(max(1, round(share * values.size)) for share in TOP_SHARES)
    return {k: float(cumulated[k - 1] / cumulated[-1]) for k in counts}


def importance_kv(importance: NDArray[np.float64], shape: ModelShape) -> NDArray[np.float64]:
    """Importance of each KV head, the mean over its query heads: (n_layer, n_head_kv), 0 for heads that do not exist."""
    mean = np.zeros((shape.n_layer, shape.n_head_kv))
    for row, values, (n_head, n_head_kv) in zip(mean, importance, shape.heads, strict=True):
        if n_head_kv:
            row[:n_head_kv] = values[:n_head].reshape(n_head_kv, -1).mean(axis=1)
    return mean


def printable(text: str, otherwise: str) -> str:
    """``text`` if standard output can encode it, else ``otherwise``."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return otherwise
    return text


# table


def format_plan(plan: Plan) -> str:
    """The whole report as text, without a final line break."""
    return "\n".join([*_head_lines(plan), "", *_table_lines(plan), "", *_total_lines(plan)])


def _head_lines(plan: Plan) -> list[str]:
    shape, options = plan.shape, plan.options
    heads = f"{shape.n_head} query heads, {shape.n_head_kv} KV heads" + ("" if shape.is_uniform else " at most")
    lines = [
        f"model       {shape.name} ({shape.arch}): {shape.n_layer} layers, {heads}, {shape.cell_bytes} bytes per cell",
        *([_layers_line(shape)] if shape.n_windowed or shape.n_recurrent else []),
        f"options     policy {plan.policy}, kv_size {options.kv_size}, beta {options.beta}, window {options.window}",
    ]
    if plan.importance is None:
        return [*lines, f"importance  none, policy {plan.policy} does not need it"]
    values = np.concatenate([row[:n] for row, (n, _) in zip(plan.importance, shape.heads, strict=True)])
    shares = top_shares(values)
    counts = " / ".join(map(str, shares))
    percents = " / ".join(f"{share:.1%}" for share in shares.values())
    top = f"of {values.size} query heads the top {counts} hold {percents}"
    return [*lines, f"importance  {plan.origin}; Gini {gini(values):.3f}; {top}"]


def _layers_line(shape: ModelShape) -> str:
    which = ", ".join(str(il) for il, (_, n_kv) in enumerate(shape.heads) if n_kv)
    kinds = (f"{n} {what}" for n, what in ((shape.n_windowed, "have windowed attention"), (shape.n_recurrent, "a recurrent state")) if n)
    return f"layers      {shape.n_compressed} of {shape.n_layer} are compressed: {which}; {', '.join(kinds)}"


def _table_lines(plan: Plan) -> list[str]:
    legend = "budget in cells"
    if plan.importance is not None:
        legend = "bar = importance (mean over its query heads), number = budget in cells"
    return table_lines(plan.budget, _bars(plan), legend=legend)


def table_lines(cells: NDArray[np.int32], bars: list[list[str]], *, legend: str) -> list[str]:
    """A row for each layer: a bar of one character and a number for each KV head, and the sum."""
    width = max(len(str(cells.max())), 3)
    n_sum = max(len(str(cells.sum(axis=1).max())), 5)
    lines = [f"layer | KV head: {legend}"]
    lines.append("      |" + "".join(f" {ih:>{width + 2}}" for ih in range(cells.shape[1])) + f" | {'cells':>{n_sum}}")
    for il, row in enumerate(cells):
        heads = "".join(f" {bar} {n or '-':>{width}}" for bar, n in zip(bars[il], row))
        lines.append(f"{il:>5} |{heads} | {row.sum():>{n_sum}}")
    return lines


def _bars(plan: Plan) -> list[list[str]]:
    if plan.importance is None:
        return [[" "] * plan.shape.n_head_kv] * plan.shape.n_layer
    return bars(importance_kv(plan.importance, plan.shape), [n_kv for _, n_kv in plan.shape.heads])


def bars(values: NDArray[Any], n_heads: Sequence[int]) -> list[list[str]]:
    """One character for each KV head of each layer, its height relative to the largest value; blank where there is no such head."""
    ramp = printable(BARS, BARS_ASCII)
    steps = np.rint(values / values.max() * (len(ramp) - 1)).astype(int)
    return [[ramp[step] if ih < n else " " for ih, step in enumerate(row)] for row, n in zip(steps, n_heads, strict=True)]


def _total_lines(plan: Plan) -> list[str]:
    budget = plan.budget[plan.budget > 0]  # of the heads that exist
    total = f"{budget.sum()} cells, mean {budget.mean():.2f}, smallest {budget.min()}, largest {budget.max()} per KV head"
    held, full = format_bytes(plan.n_bytes), format_bytes(plan.n_bytes_full)
    share = plan.n_bytes / plan.n_bytes_full
    lines = [
        f"budget  {total}",
        f"bytes   {held} after a prompt of {plan.n_ctx} tokens, full cache {full} (f16): {share:.2%}",
    ]
    if plan.n_bytes_beside:
        lines.append(f"beside  {format_bytes(plan.n_bytes_beside)} in the layers that are not compressed, with either cache")
    return lines


# heat map


def draw(plan: Plan) -> Figure:
    """Heat maps of importance, if there is one, and of the budgets."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    n_panels = 1 if plan.importance is None else 2
    n_inches = 1.6 + min(8.0, max(2.4, 0.2 * plan.shape.n_layer))
    figure = Figure(figsize=(1.0 + 5.0 * n_panels, n_inches), layout="constrained")
    axes = figure.subplots(1, n_panels, squeeze=False)[0]
    if plan.importance is not None:
        share = _blank(plan.importance, [n for n, _ in plan.shape.heads])
        draw_panel(
            figure,
            axes[0],
            100 * share / np.nansum(share),
            title="importance",
            x="query head (index)",
            unit="share of the total importance (%)",
        )
    title = f"budget: {plan.options.policy}, kv_size {plan.options.kv_size}, beta {plan.options.beta}"
    draw_panel(
        figure,
        axes[-1],
        _blank(plan.budget, [n for _, n in plan.shape.heads]),
        title=title,
        x="KV head (index)",
        unit="budget (cells, recent ones included)",
    )
    figure.suptitle(f"{plan.shape.name}: {format_bytes(plan.n_bytes)} of {format_bytes(plan.n_bytes_full)} at {plan.n_ctx} tokens")
    return figure


def _blank(values: NDArray[Any], n_heads: list[int]) -> NDArray[np.float64]:
    """The values of the heads that are there, NaN elsewhere, which is drawn as nothing."""
    is_there = np.arange(values.shape[1]) < np.array(n_heads)[:, None]
    return np.where(is_there, values, np.nan)
