"""Tables and plots of ``pyheadkv eval``, from the file of answers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..options import FULL, NONE
from .journal import read_lines

N_BOOTSTRAP = 4000
RANKED_ABOVE = 0.8  # of the full cache; a task that it cannot do says nothing about policies
SHARES = (0.9, 0.97)  # of the full cache's score, for which the least cells are named


@dataclass(frozen=True)
class Answer:
    """One graded answer; ``place`` names the context."""

    task: str
    length: int
    place: str
    ask: int
    kind: str
    depth: float
    protocol: str
    setting: str
    score: float
    n_prompt: int
    cells: float
    bytes: int
    bytes_store: int
    distance: dict[str, float] | None
    bytes_beside: int = 0
    right: dict[str, float] | None = None


class Answers:
    """All answers of a run."""

    def __init__(self, path: Path) -> None:
        self.header, entries, _ = read_lines(path)
        order = {t["name"]: i for i, t in enumerate(self.header["tasks"])}
        entries = sorted(entries, key=lambda e: (order[e["task"]], e["length"], e["quiz"]))  # they are written as they are done
        self.all = [
            Answer(
                e["task"], e["length"], f"{e['task']}/{e['length']}/{e['quiz']}", a["ask"], a["kind"], a["depth"], a["protocol"],
                a["setting"], a["score"], a["n_prompt"], a["cells"], a["bytes"], a["bytes_store"], a.get("distance"),
                a.get("bytes_beside", 0), a.get("right"),
            )
            for e in entries
            for a in e["answers"]
        ]  # fmt: skip
        self.settings: list[dict[str, Any]] = self.header["settings"]
        self.kinds = list(dict.fromkeys(a.kind for a in self.all))
        self.protocols = list(dict.fromkeys(a.protocol for a in self.all))
        self._cells: dict[tuple[str, str, str], list[Answer]] = defaultdict(list)
        for a in self.all:
            self._cells[a.protocol, a.setting, a.kind].append(a)

    def of(self, protocol: str, setting: str, kind: str | None = None) -> list[Answer]:
        """Answers of one setting; kind None = all kinds."""
        kinds = self.kinds if kind is None else [kind]
        return [a for k in kinds for a in self._cells[protocol, setting, k]]

    def full(self, protocol: str, kind: str | None = None) -> float:
        """Mean score of the full cache."""
        return float(np.mean([a.score for a in self.of(protocol, FULL, kind)]))


def interval(scores: dict[str, list[float]], *, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % interval, by bootstrap over contexts.

    Parameters
    ----------
    scores : of each context
    """
    from scipy.stats import bootstrap

    sums = np.array([sum(s) for s in scores.values()], dtype=float)
    counts = np.array([len(s) for s in scores.values()], dtype=float)
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return mean, mean, mean
    found = bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=N_BOOTSTRAP,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return mean, float(found.low), float(found.high)


def by_context(answers: list[Answer]) -> dict[str, list[float]]:
    """Scores of each context."""
    out: dict[str, list[float]] = defaultdict(list)
    for a in answers:
        out[a.place].append(a.score)
    return out


def gain(a: list[Answer], b: list[Answer]) -> tuple[float, float, float]:
    """Mean of ``a`` less mean of ``b`` on the same questions, and its 95 % interval."""
    other = {(x.place, x.ask): x.score for x in b}
    out: dict[str, list[float]] = defaultdict(list)
    for x in a:
        out[x.place].append(x.score - other[x.place, x.ask])
    return interval(out)


def write_report(path: Path, *, command: str, where: str) -> Path:
    """Write FILE.md and FILE.png (and FILE_niah.png) beside FILE.jsonl; the path of the table.

    Parameters
    ----------
    command, where : that made the answers, and on which machine
    """
    answers = Answers(path)
    if not answers.all:
        raise ValueError(f"{path} has no answers: run the evaluation first")
    out = path.with_suffix(".md")
    pictures = [plot(answers, path.with_suffix(".png"))]
    if any(a.task == "niah" for a in answers.all):
        pictures.append(plot_depths(answers, path.with_name(path.stem + "_niah.png")))
    lines = _head(answers, command, where, pictures)
    for protocol in answers.protocols:
        lines += _scores(answers, protocol) + _least(answers, protocol) + _gains(answers, protocol)
    out.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return out


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    from tabulate import tabulate

    text: str = tabulate(list(rows), list(head), tablefmt="github", disable_numparse=True)
    return text.splitlines()


def _head(answers: Answers, command: str, where: str, pictures: list[Path]) -> list[str]:
    header = answers.header
    n_asked = {k: len(answers.of(answers.protocols[0], FULL, k)) for k in answers.kinds}
    asked = ", ".join(f"{n} {kind}" for kind, n in n_asked.items())
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    return [
        f"# {', '.join(dict.fromkeys(t['name'] for t in header['tasks']))}: cache policies on {header['model']}", "",
        f"`{command}`", "",
        f"{where}.", "",
        f"Model sha256 {header['model_sha256'][:16]}, {versions}. Questions per cell: {asked}. Greedy; strict: the last prompt "
        "token runs against the compressed cache. Scores in % with 95 % intervals (bootstrap over contexts). Cells: "
        "kept per KV head, and their share of the compressed prompt; KiB: K and V in them; means over the prompts. Held: allocated "
        "for them, rows for generated tokens included. Settings of one budget are compared at these bytes.", *_distances(answers),
        *_keep(header), "",
        *(f"![{picture.stem}]({picture.name})" for picture in pictures), "",
    ]  # fmt: skip


def _keep(header: dict[str, Any]) -> list[str]:
    """What every setting of the run was told to keep, if anything."""
    keep = header["keep"]
    parts = [f"sinks {keep['sinks']}"] if keep["sinks"] is not None else []
    parts += [f"protected {start}:{end}" for start, end in keep["protect"]]
    parts += [f"surplus {keep['surplus']}"] if keep["surplus"] != "lost" else []
    return ["", f"Under all settings: {', '.join(parts)}."] if parts else []


def _scores(answers: Answers, protocol: str) -> list[str]:
    kinds = answers.kinds
    has_beside = any(a.bytes_beside for a in answers.all)
    head = ["setting", "cells", "of prompt", "KiB", "held", *["beside"] * has_beside, *_labels(answers), "of full"]
    head += ["perplexity", "KL"] if _has_distances(answers) else []
    head += ["right answer"] if _has_right(answers) else []
    rows = []
    for setting in answers.settings:
        name = setting["name"]
        cells = [_cell(interval(by_context(answers.of(protocol, name, kind)))) for kind in _columns(answers)]
        mine = answers.of(protocol, name)
        n_cells, n_bytes, n_held, n_prompt = (
            float(np.mean(x)) for x in zip(*[(a.cells, a.bytes, a.bytes_store, a.n_prompt) for a in mine])
        )
        share = np.mean([a.score for a in mine]) / max(answers.full(protocol), 1e-9)
        held = [f"{n_cells:.0f}", f"{100 * n_cells / n_prompt:.1f} %", f"{n_bytes / 1024:.0f}", f"{n_held / 1024:.0f}"]
        held += [f"{np.mean([a.bytes_beside for a in mine]) / 1024:.0f}"] * has_beside
        distance = _distance(mine, is_wanted=_has_distances(answers)) + _right(mine, is_wanted=_has_right(answers))
        rows.append([name, *held, *cells, f"{100 * share:.0f} %", *distance])
    lines = [f"## {protocol}", "", *table(head, rows)]
    weak = [kind for kind in kinds if not _is_ranked(answers, protocol, kind)]
    if weak:
        why = "not above no context by more than chance" if _has_none(answers) else f"below {100 * RANKED_ABOVE:.0f} %"
        lines += ["", f"Not to be ranked, the full cache is {why}: {', '.join(weak)}."]
    return [*lines, ""]


def _columns(answers: Answers) -> list[str | None]:
    """Kinds of questions, and None for all of them if there are several."""
    return [*answers.kinds, None] if len(answers.kinds) > 1 else [*answers.kinds]


def _labels(answers: Answers) -> list[str]:
    return [kind or "all" for kind in _columns(answers)]


def _has_none(answers: Answers) -> bool:
    return any(s["policy"] == NONE for s in answers.settings)


def _is_ranked(answers: Answers, protocol: str, kind: str) -> bool:
    """Whether the full cache can do it: its interval above no context, or where that was not asked, most of it."""
    if _has_none(answers):
        return gain(answers.of(protocol, FULL, kind), answers.of(protocol, NONE, kind))[1] > 0
    return answers.full(protocol, kind) >= RANKED_ABOVE


def _has_distances(answers: Answers) -> bool:
    return any(a.distance for a in answers.all)


def _distances(answers: Answers) -> list[str]:
    """What the columns of distances are."""
    if not _has_distances(answers):
        return []
    lines = ["", "Perplexity: of the full cache's answer under the setting (task text: of how the text goes on). KL: nats per token of it, from the "
             "full cache's distribution of the next token. Score of task text: how often both find the same token the most likely."]  # fmt: skip
    if _has_right(answers):
        lines[-1] += " Right answer: perplexity of the one that the task knows to be right."
    return lines


def _distance(mine: list[Answer], *, is_wanted: bool) -> list[str]:
    """Perplexity and divergence, means over tokens."""
    if not is_wanted:
        return []
    found = [a.distance for a in mine if a.distance]
    return [f"{np.exp(_per_token(found, 'nll')):.3g}", f"{_per_token(found, 'kl'):.3f}"] if found else ["", ""]


def _has_right(answers: Answers) -> bool:
    return any(a.right for a in answers.all)


def _right(mine: list[Answer], *, is_wanted: bool) -> list[str]:
    """Perplexity of the right answers, mean over tokens."""
    if not is_wanted:
        return []
    found = [a.right for a in mine if a.right]
    return [f"{np.exp(_per_token(found, 'nll')):.3g}" if found else ""]


def _per_token(found: list[dict[str, float]], name: str) -> float:
    return sum(x["n"] * x[name] for x in found) / sum(x["n"] for x in found)


def _least(answers: Answers, protocol: str) -> list[str]:
    """The smallest budget of each method that reaches a share of the full cache's score."""
    kinds = [kind for kind in answers.kinds if _is_ranked(answers, protocol, kind)]
    curves = _curves(answers)
    if not kinds or max(map(len, curves.values()), default=0) < 2:
        return []
    rows = []
    for label, names in curves.items():
        cells = []
        for kind in kinds:
            points = [answers.of(protocol, name, kind) for name in names]
            reached = {
                share: [
                    np.mean([a.cells for a in p]) for p in points if np.mean([a.score for a in p]) >= share * answers.full(protocol, kind)
                ]
                for share in SHARES
            }
            cells.append(" / ".join(f"{min(r):.0f}" if r else "-" for r in reached.values()))
        rows.append([label, *cells])
    shares = " / ".join(f"{100 * share:.0f} %" for share in SHARES)
    text = f"Least cells per head of those above with {shares} of the full cache's score (point values, the intervals above are wide):"
    return [text, "", *table(["setting", *kinds], rows), ""]


def _cell(value: tuple[float, float, float]) -> str:
    mean, low, high = value
    return f"{100 * mean:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def _gains(answers: Answers, protocol: str) -> list[str]:
    """Every setting against snapkv with the same budget and scoring."""
    rows = []
    for setting in answers.settings:
        uniform = [s for s in answers.settings if s["policy"] == "snapkv" and s["budget"] == setting["budget"]]
        # policies that do not look at scores are set against the first of those that score in several ways
        name = next(
            (s["name"] for s in uniform if _scoring(s) == _scoring(setting)),
            uniform[0]["name"] if uniform and not _scoring(setting) else None,
        )
        if name is None or name == setting["name"]:
            continue
        cells = []
        for kind in _columns(answers):
            mean, low, high = gain(answers.of(protocol, setting["name"], kind), answers.of(protocol, name, kind))
            cells.append(f"{100 * mean:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})")
        rows.append([setting["name"], *cells])
    if not rows:
        return []
    text = "Points above uniform budgets (snapkv) of the same budget and scoring, same questions, 95 % interval:"
    return [text, "", *table(["setting", *_labels(answers)], rows), ""]


def _scoring(setting: dict[str, Any]) -> dict[str, Any]:
    """What of a setting says how a prompt is scored."""
    names = ("preset", "pool", "window", "recent", "power", "pool_kernel")
    return {name: setting[name] for name in names if setting.get(name) not in (None, "")}


def plot(answers: Answers, path: Path) -> Path:
    """Score over bytes, a row of panels per protocol, a panel per kind and one for all."""
    from matplotlib.figure import Figure

    kinds = _columns(answers)
    n_rows = len(answers.protocols)
    figure = Figure(figsize=(1.5 + 3.4 * len(kinds), 0.8 + 3.2 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, len(kinds), squeeze=False, sharey=True)
    for protocol, axes_row in zip(answers.protocols, panels, strict=True):
        for kind, axes in zip(kinds, axes_row, strict=True):
            for i, (label, names) in enumerate(_curves(answers).items()):
                cells = [answers.of(protocol, name, kind) for name in names]
                points = sorted((float(np.mean([a.bytes for a in c])) / 1024, 100 * float(np.mean([a.score for a in c]))) for c in cells)
                axes.plot(*zip(*points), marker="o", ms=4, label=label, color=f"C{i % 10}", ls="-" if i < 10 else "--")
            axes.axhline(100 * answers.full(protocol, kind), color="grey", ls=":", label="full cache")
            if _has_none(answers):
                axes.axhline(
                    100 * float(np.mean([a.score for a in answers.of(protocol, NONE, kind)])), color="grey", ls="-.", label="no context"
                )
            axes.set(xscale="log", title=f"{kind or 'all'}, {protocol}", xlabel="KiB of K and V kept", ylim=(-3, 103))
            axes.grid(alpha=0.3)
        axes_row[0].set_ylabel("score (%)")
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    return path


def _curves(answers: Answers) -> dict[str, list[str]]:
    """Names of the settings that differ in their budget only, by what they have in common."""
    lines: dict[str, list[str]] = defaultdict(list)
    for s in answers.settings:
        if s["policy"] not in (FULL, NONE):
            lines[s["method"]].append(s["name"])
    return dict(lines)


def plot_depths(answers: Answers, path: Path) -> Path:
    """Needle in a haystack: length x depth, one panel per protocol and setting."""
    from matplotlib.figure import Figure

    mine = [a for a in answers.all if a.task == "niah"]
    lengths, depths = sorted({a.length for a in mine}), sorted({a.depth for a in mine})
    names = [s["name"] for s in answers.settings]
    figure = Figure(figsize=(1 + 2.2 * len(names), 0.8 + 2.6 * len(answers.protocols)), layout="constrained")
    panels = figure.subplots(len(answers.protocols), len(names), squeeze=False, sharey=True)
    for protocol, axes_row in zip(answers.protocols, panels, strict=True):
        for name, axes in zip(names, axes_row, strict=True):
            image = axes.imshow(_grid(mine, protocol, name, lengths, depths), aspect="auto", cmap="RdYlGn", vmin=0, vmax=100)
            axes.set_title(f"{name}\n{protocol}", fontsize=8)
            axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=7, rotation=45)
            axes.set_xlabel("tokens")
        axes_row[0].set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths], fontsize=7)
        axes_row[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels, label="score (%)")
    figure.savefig(path, dpi=100)
    return path


def _grid(mine: list[Answer], protocol: str, name: str, lengths: list[int], depths: list[float]) -> NDArray[np.float64]:
    scores: dict[tuple[float, int], list[float]] = defaultdict(list)
    for a in mine:
        if (a.protocol, a.setting) == (protocol, name):
            scores[a.depth, a.length].append(100 * a.score)
    return np.array([[np.mean(scores[d, n]) if scores[d, n] else np.nan for n in lengths] for d in depths])
