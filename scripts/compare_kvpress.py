#!/usr/bin/env python3
"""Compare the cells that pyheadkv keeps, and the answers they give, with those of NVIDIA's kvpress on the same weights.

    python scripts/compare_kvpress.py MODEL.gguf -o FILE.jsonl --ask passkey:1024,ruler-keys:1024 --contexts 16
    python scripts/compare_kvpress.py --report OUT.md FILE.jsonl ..

Both read one GGUF whose weights were dequantised to float32, llama.cpp with float32 cells, transformers in float32, so
that only the rounding of float32 is left between them. With --as-shipped llama.cpp reads MODEL.gguf itself and has f16 cells.
Both have the same window, average pooling of the same kernel (kvpress has no other), the plain mean over window and GQA
group, and keep the window.

One protocol on both sides: the prompt without its last token is compressed, then the last token runs against what was
kept, then greedy tokens. kvpress has no separate door for that: its presses are called in a forward hook of each
attention layer, as they do it themselves, but all of them on one reading of the prompt.

Needs pip install '.[compare]'.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

try:
    import kvpress
    import torch
    import transformers
except ImportError as error:
    raise SystemExit(f"error: {error}: install torch, transformers and kvpress with pip install '.[compare]'") from None

from score_hf import exit_code, load_gguf

from pyheadkv import Llama, _lib
from pyheadkv.atomic_write import replace_file
from pyheadkv.eval import journal, trial
from pyheadkv.eval.quiz import Ask, TaskOptions
from pyheadkv.eval.report import interval, table
from pyheadkv.eval.tasks import PROSE, make_task
from pyheadkv.gguf_header import Header, read_header
from pyheadkv.options import PRESETS, check_int
from pyheadkv.score import measure as score
from pyheadkv.testing import reference

KVPRESS_WINDOW, KVPRESS_KERNEL = 64, 5  # of its SnapKVPress when nothing is said
FLOOR = 0.2  # share of its cells that a head is sure of, the default of both
N_ROOM = 128  # tokens of the context for answers
F32_CELLS = {"type_k": 0, "type_v": 0}

Kept = list[NDArray[np.bool_]]  # of each layer: whether a cell of the prefix is kept, (n_head_kv, n_prefix)
Scores = list[NDArray[np.float64]]  # of each layer: (n_head_kv, n_prefix)


@dataclass(frozen=True)
class Setting:
    """One way to compress, on both sides.

    Attributes
    ----------
    name : full, snapkv, adakv, "adakv floor 0.2" (whose floor means different things) or "defaults" (of both, snapkv)
    kv_size : cells per KV head, window included; 0 = all
    """

    name: str
    kv_size: int = 0

    @property
    def floor(self) -> float:
        return FLOOR if "floor" in self.name else 0.0

    @property
    def is_moved(self) -> bool:
        """Whether cells move between the heads of a layer."""
        return self.name.startswith("adakv")

    @property
    def is_default(self) -> bool:
        return self.name == "defaults"


def make_settings(kv_sizes: Sequence[int]) -> tuple[Setting, ...]:
    """The full cache, then every way at every size."""
    names = "snapkv", "adakv", f"adakv floor {FLOOR}", "defaults"
    return (Setting("full"), *(Setting(name, n) for name in names for n in kv_sizes))


# the weights


def strings(header: Header, key: str) -> list[bytes]:
    """Strings of an array."""
    n, raw = header.raw_strings(key)
    found: list[bytes] = []
    begin = 0
    for _ in range(n):
        end = begin + 8 + int.from_bytes(raw[begin : begin + 8], "little")
        found.append(raw[begin + 8 : end])
        begin = end
    return found


def write_f32(source: Path, target: Path) -> None:
    """Copy a GGUF with all its weights as float32."""
    header = read_header(source)
    writer = gguf.GGUFWriter(target, header.arch)
    for name, pair in header.pairs.items():
        if name == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        elif name != "general.architecture":
            items = None if pair.sub_type is None else gguf.GGUFValueType(pair.sub_type)
            value = (
                pair.value.tolist() if isinstance(pair.value, np.ndarray) else strings(header, name) if pair.value is None else pair.value
            )
            writer.add_key_value(name, value, gguf.GGUFValueType(pair.type), sub_type=items)
    for name, values in header.weights():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def weights(model: Path, *, as_shipped: bool) -> Iterator[Path]:
    """The GGUF that both sides read."""
    if as_shipped:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / model.name
        write_f32(model, path)
        yield path


# pyheadkv


class Ours:
    """A prompt in pyheadkv, read once and compressed under every setting.

    Parameters
    ----------
    window, kernel : of the scores
    """

    def __init__(self, path: Path, *, window: int, kernel: int, n_ctx: int, as_shipped: bool = False) -> None:
        self.llm = Llama(
            path, kv_size=n_ctx, policy="snapkv", window=max(window, PRESETS["default"]["window"]), prefill="token",
            n_seq_max=2, n_ctx=n_ctx, n_threads=1, n_threads_batch=1, verbose=False,
            **({} if as_shipped else F32_CELLS),
        )  # fmt: skip
        self.trial = trial.Trial(self.llm)
        self.how = {"window": window, "recent": window, "power": 1, "pool": "avg", "pool_kernel": kernel}
        self._copies: list[trial.Copy] = []
        self.n_layer, self.n_head_kv = self.llm.kv_budget.shape
        arch, about = self.llm.metadata["general.architecture"], self.llm.metadata
        self._n_head = int(about[f"{arch}.attention.head_count"])
        n_embd_head = int(about[f"{arch}.embedding_length"]) // self._n_head
        self._n_embd_head = int(about.get(f"{arch}.attention.key_length", n_embd_head))
        self._n_ring = self.llm.kv_options.window  # queries that the context keeps
        self._n = 0

    def read(self, tokens: Sequence[int]) -> None:
        self.trial.read(tokens)
        self._n = len(tokens)

    def compress(self, setting: Setting) -> None:
        """A copy of the prompt that was read, in place of the one before."""
        self.trial.drop(self._copies)
        policy = "full" if not setting.kv_size else "adakv" if setting.is_moved else "snapkv"
        how = {} if setting.is_default or not setting.kv_size else self.how
        self.llm.configure(adakv_floor=setting.floor)
        prompt = self.llm.input_ids[: self._n].tolist()
        self._copies = [self.trial.compress(trial.Setting(policy, setting.kv_size, **how), prompt)]

    def kept(self) -> Kept:
        """Cells before the window that are kept of the compressed prompt."""
        n_prefix = self._n - self.how["window"]
        masks = []
        for il in range(self.n_layer):
            mask = np.zeros((self.n_head_kv, self._n), dtype=np.bool_)
            for ih in range(self.n_head_kv):
                mask[ih, self.llm.kv_positions(il, ih, self._copies[0].seq_id)] = True
            masks.append(prefix_of(mask, n_prefix))
        return masks

    def scores(self) -> Scores:
        """By the oracle, in float64, of the engine's own queries and K."""
        n_embd_head, window, scores = self._n_embd_head, self.how["window"], []
        how = {"scale": n_embd_head**-0.5, "n_prefix": self._n - window, "pool": "avg", "pool_kernel": self.how["pool_kernel"]}
        for il in range(self.n_layer):
            q = self.llm._read_floats(_lib.lib.headkv_read_window, self._n_head * n_embd_head, self._n_ring, il)
            k = [self.llm._read_floats(_lib.lib.headkv_read_cells, n_embd_head, self._n, il, ih, False) for ih in range(self.n_head_kv)]
            q = q.reshape(len(q), self._n_head, n_embd_head)[-window:]
            scores.append(reference.score(q, np.stack(k, axis=1), **how))
        return scores

    def answer(self, token: int, n: int, stop: frozenset[int]) -> tuple[NDArray[np.float32], list[int]]:
        """Logits after ``token``, and at most n greedy tokens."""
        first = next(self.trial.follow(self._copies, [token]))[0, 0]
        best = int(first.argmax())
        if best in stop or n == 0:
            return first, []
        return first, [best, *self.trial.generate(self._copies, best, n - 1, stop=stop)[0]]


# kvpress


def make_press(setting: Setting, n_tokens: int, *, window: int, kernel: int) -> Any:
    """The press that keeps exactly ``kv_size`` cells per KV head of ``n_tokens``."""
    ratio = 1 - (setting.kv_size + 0.5) / n_tokens  # kvpress rounds the cells that are kept down
    if setting.is_default:
        return kvpress.SnapKVPress(ratio)
    press = kvpress.SnapKVPress(ratio, window_size=window, kernel_size=kernel)
    return kvpress.AdaKVPress(press, alpha_safeguard=setting.floor) if setting.is_moved else press


class Theirs:
    """A prompt in transformers, read once and compressed by the presses of every setting."""

    def __init__(self, model: transformers.PreTrainedModel, *, window: int, kernel: int) -> None:
        self.model, self.how = model, {"window": window, "kernel": kernel}
        self.attentions = [layer.self_attn for layer in model.model.layers]
        self._n = 0
        self._scores: Scores = []
        self._layers: dict[Setting, list[tuple[torch.Tensor, torch.Tensor, Any]]] = {}  # K, V and what is masked
        self._kept: dict[Setting, Kept] = {}

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], settings: Sequence[Setting]) -> None:
        self._n, self._scores = len(tokens), []
        self._layers, self._kept = defaultdict(list), defaultdict(list)
        presses = {s: make_press(s, self._n, **self.how) for s in settings if s.kv_size}
        plain = kvpress.SnapKVPress(window_size=self.how["window"], kernel_size=self.how["kernel"])

        def hook(module: Any, _: Any, kwargs: dict[str, Any], out: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            seen = module, kwargs["hidden_states"], layer.keys
            scores = plain.score(*seen, layer.values, None, kwargs)[0, :, : self._n - self.how["window"]]
            self._scores.append(scores.numpy().astype(np.float64))
            self._layers[Setting("full")].append((layer.keys, layer.values, None))
            # values that say where they were tell which cells a press gathers
            where = torch.arange(self._n, dtype=layer.values.dtype)[None, None, :, None].expand_as(layer.values)
            for setting, press in presses.items():
                module.masked_key_indices = None
                keys, values = press.compress(*seen, layer.values, None, kwargs)
                masked = module.masked_key_indices
                rows = press.compress(*seen, where, None, kwargs)[1][0, :, :, 0].long()
                mask = torch.zeros(layer.keys.shape[1:3], dtype=torch.bool).scatter_(1, rows, True)
                if masked is not None:
                    mask[masked[1], masked[2]] = False
                if not setting.is_default:
                    self._kept[setting].append(prefix_of(mask.numpy(), self._n - self.how["window"]))
                self._layers[setting].append((keys, values, masked))
            module.masked_key_indices = None

        hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in self.attentions]
        try:
            self.model.model(torch.tensor([list(tokens)]), past_key_values=transformers.DynamicCache(), use_cache=True)
        finally:
            for one in hooks:
                one.remove()

    def kept(self, setting: Setting) -> Kept:
        return self._kept[setting]

    def scores(self) -> Scores:
        return self._scores

    def cache(self, setting: Setting) -> transformers.DynamicCache:
        """What was kept; heads of their own lengths are masked, as AdaKVPress does it."""
        cache = transformers.DynamicCache()
        for module, (keys, values, masked) in zip(self.attentions, self._layers[setting], strict=True):
            cache.update(keys, values, module.layer_idx)
            module.masked_key_indices = masked
        return cache

    @torch.inference_mode()
    def answer(self, setting: Setting, token: int, n: int, stop: frozenset[int]) -> tuple[NDArray[np.float32], list[int]]:
        """Logits after ``token``, and at most n greedy tokens."""
        cache, first, out = self.cache(setting), None, []
        for position in range(self._n, self._n + n + 1):
            ids, positions = torch.tensor([[token]]), torch.tensor([[position]])
            logits = self.model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits[0, -1].float().numpy()
            first = logits if first is None else first
            token = int(logits.argmax())
            if token in stop or len(out) == n:
                break
            out.append(token)
        for module in self.attentions:
            module.masked_key_indices = None
        return first, out


# comparison


def prefix_of(mask: NDArray[np.bool_], n_prefix: int) -> NDArray[np.bool_]:
    """Kept cells before the window, all of which every head must have kept."""
    if not mask[:, n_prefix:].all():
        raise RuntimeError(f"{int((~mask[:, n_prefix:]).sum())} cells of the window were dropped: the two sides would not be comparable")
    return mask[:, :n_prefix]


def chosen(scores: NDArray[np.float64], n_each: int, *, is_moved: bool) -> NDArray[np.bool_]:
    """What the oracle keeps of a layer: the best cells of each head, or of the layer.

    Parameters
    ----------
    scores : (n_head_kv, n_prefix)
    n_each : cells per head, mean of the heads
    """
    cells = np.full(len(scores), n_each)
    if is_moved:
        cells = reference.adapt_budget(scores, cells, floor=0.0)
    mask = np.zeros(scores.shape, dtype=np.bool_)
    for ih, rows in enumerate(reference.select(scores, cells)):
        mask[ih, rows] = True
    return mask


def gaps(ours: NDArray[np.bool_], theirs: NDArray[np.bool_], scores: NDArray[np.float64], *, is_moved: bool) -> list[float]:
    """For each cell that only we keep: how far its score is below the lowest one they keep, as a share of that.

    Parameters
    ----------
    ours, theirs, scores : of a layer, (n_head_kv, n_prefix); the scores are theirs
    is_moved : whether the heads of the layer compete, else each head for itself
    """
    out: list[float] = []
    for part in [slice(None)] if is_moved else [slice(ih, ih + 1) for ih in range(len(scores))]:
        a, b, s = ours[part], theirs[part], scores[part]
        if (a & ~b).any():
            out += ((s[b].min() - s[a & ~b]) / s[b].min()).tolist()
    return out


def compare_cells(ours: Kept, theirs: Kept, scores: tuple[Scores, Scores], setting: Setting) -> dict[str, Any]:
    """How the cells of a prompt agree under a setting.

    Parameters
    ----------
    scores : ours and theirs

    Returns
    -------
    n_heads, n_heads_same : KV heads, and those with the same cells
    n_cells, n_cells_same : cells before the window that each side keeps, and those that both do
    gap : the largest of ``gaps``, 0 where the floor means different things
    n_unlike : cells that we keep, but not by the scores of our own queries and K in float64
    counts_apart : largest difference of the number of cells of a head
    """
    found: list[float] = []
    n_unlike = 0
    for a, b, s_ours, s_theirs in zip(ours, theirs, *scores, strict=True):
        if setting.floor == 0:
            found += gaps(a, b, s_theirs, is_moved=setting.is_moved)
            n_unlike += int((a & ~chosen(s_ours, int(a.sum()) // len(a), is_moved=setting.is_moved)).sum())
    a, b = np.stack(ours), np.stack(theirs)
    if a.sum() != b.sum():
        raise RuntimeError(f"{setting}: {a.sum()} cells against {b.sum()}: the two sides would not be comparable")
    return {
        "n_heads": int(a.shape[0] * a.shape[1]),
        "n_heads_same": int((a == b).all(axis=-1).sum()),
        "n_cells": int(a.sum()),
        "n_cells_same": int((a & b).sum()),
        "gap": max(found, default=0.0),
        "n_unlike": n_unlike,
        "counts_apart": int(np.abs(a.sum(-1) - b.sum(-1)).max()),
    }


def compare_scores(ours: Scores, theirs: Scores) -> tuple[float, float]:
    """Median and largest difference of the scores, as a share of theirs."""
    a, b = np.stack(ours), np.stack(theirs)
    error = np.abs(a - b) / b
    return float(np.median(error)), float(error.max())


def compare_question(ours: Ours, theirs: Theirs, ask: Ask, settings: Sequence[Setting], stop: frozenset[int]) -> dict[str, Any]:
    """Everything about one question: one line of the file."""
    *prompt, last = ask.prompt
    ours.read(prompt)
    theirs.read(prompt, settings)
    scores = ours.scores(), theirs.scores()
    kept: dict[Setting, tuple[Kept, Kept]] = {}
    results = []
    for setting in settings:
        ours.compress(setting)
        cells = None
        if setting.kv_size and not setting.is_default:
            kept[setting] = ours.kept(), theirs.kept(setting)
            cells = compare_cells(*kept[setting], scores, setting)
            if setting.floor:
                without = kept[replace(setting, name="adakv")]
                cells["n_moved"] = [n_moved(a, b) for a, b in zip(kept[setting], without, strict=True)]
        logits, said = zip(ours.answer(last, ask.n_steps, stop), theirs.answer(setting, last, ask.n_steps, stop), strict=True)
        texts = [ours.llm.detokenize(tokens).decode("utf-8", "replace").strip() for tokens in said]
        results.append({
            "setting": asdict(setting), "cells": cells, "logits_nmse": logits_nmse(*logits), "same_tokens": said[0] == said[1],
            "texts": texts, "scores": [ask.grade(text) for text in texts],
        })  # fmt: skip
    return {"kind": ask.kind, "n_prompt": len(prompt), "score_errors": compare_scores(*scores), "results": results}


def n_moved(a: Kept, b: Kept) -> int:
    """Cells of one that the other has not."""
    return int((np.stack(a) & ~np.stack(b)).sum())


# where the scores differ


def trace_scores(path: Path, ours: Ours, theirs: Theirs, prompt: Sequence[int]) -> dict[str, tuple[float, float]]:
    """``compare_scores`` of both sides with a forward pass in float64."""
    oracle = reference.ReferenceModel(path)
    oracle.weights["output.weight"] = np.zeros((1, oracle.n_embd))  # no logits are needed
    oracle.prefill(prompt)
    how = {"window": ours.how["window"], "pool": "avg", "pool_kernel": ours.how["pool_kernel"]}
    exact = [oracle.scores(il, **how) for il in range(oracle.n_layer)]
    ours.read(prompt)
    theirs.read(prompt, ())
    return {name: compare_scores(scores, exact) for name, scores in (("pyheadkv", ours.scores()), ("kvpress", theirs.scores()))}


def logits_nmse(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Mean squared error relative to what is expected."""
    return float(np.mean((found - expected) ** 2) / np.mean(expected.astype(np.float64) ** 2))


# a run


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the result: first line of the file."""
    packages = {"torch": torch.__version__, "transformers": transformers.__version__, "kvpress": version_of_kvpress()}
    return {
        "model": args.model.name, "model_sha256": journal.sha256(args.model), "as_shipped": args.as_shipped, "ask": args.ask,
        "kv_size": args.kv_size, "window": args.window, "kernel": args.kernel, "seed": args.seed,
        "versions": {**score.versions(), **packages, "commit": journal.commit()},
    }  # fmt: skip


def version_of_kvpress() -> str:
    from importlib.metadata import version

    return version("kvpress")


def parse_asks(text: str) -> list[tuple[str, int]]:
    """(task, tokens) of ``TASK:N,TASK:N``."""
    out = []
    for item in text.split(","):
        name, _, n = item.partition(":")
        if name not in PROSE or not n.isdigit():
            raise ValueError(f"--ask={item!r}: give TASK:TOKENS with a task of {', '.join(PROSE)}")
        out.append((name, check_int("--ask", int(n), 128, 1 << 16)))
    return out


def run(args: argparse.Namespace) -> None:
    """Ask what is not asked yet."""
    if args.output.exists() and not args.resume:
        raise ValueError(f"output {args.output} exists: pass --resume to go on with it, or choose another name")
    asks = parse_asks(args.ask)
    kv_sizes = [check_int("--kv-size", int(n), args.window + 1, 1 << 16) for n in args.kv_size.split(",")]
    settings = make_settings(kv_sizes)
    torch.set_num_threads(1)
    log = journal.Journal(args.output, describe(args), resume=args.resume)
    done = {(e["task"], e["length"], e["context"]) for e in log.entries}
    places = [(i, task, n) for i in range(args.contexts) for task, n in asks if (task, n, i) not in done]
    with weights(args.model, as_shipped=args.as_shipped) as path:
        how = {"window": args.window, "kernel": args.kernel}
        ours = Ours(path, n_ctx=-(-(max(n for _, n in asks) + N_ROOM) // 256) * 256, as_shipped=args.as_shipped, **how)
        theirs = Theirs(load_gguf(path, dtype=torch.float32), **how)
        for i, name, n_tokens in tqdm(places, disable=None):
            task = make_task(ours.llm, TaskOptions(name, n_tokens, n_each=1, seed=args.seed))
            found = [compare_question(ours, theirs, ask, settings, task.stop_tokens) for ask in task.quiz(i)]
            entry = {"task": name, "length": n_tokens, "context": i, "questions": found}
            if args.exact and (i, name, n_tokens) == places[0]:
                prompt = task.quiz(i)[0].prompt[:-1]
                entry["exact"] = trace_scores(path, ours, theirs, prompt)
            log.append(entry)


# report

ABOUT = """\
Both sides compress the prompt without its last token, which then runs against what was kept. full: nothing is dropped.
snapkv: SnapKV on both sides, the last cells of the window and average pooling as the commands say. adakv: the same
scores, the best cells of a layer go to whatever head has them (`adakv_floor=0`, `alpha_safeguard=0`). adakv floor 0.2: the
defaults of both, which are two definitions: pyheadkv, as the authors of Ada-KV, gives a head a fifth of its cells besides
the window and scales the rest; kvpress marks a fifth of its cells as safe, window included, so that nothing is guaranteed
while the window is larger. defaults: `policy="snapkv"` and `SnapKVPress` with nothing else said: window 64, the last 8
cells, power mean, maximum pooling against window 64, all of it kept, mean, average pooling over 5.
"""
CELLS = """\
Over all prompts, layers and KV heads; the window, which all keep, is not counted. Largest gap: how far the score of a cell
that only pyheadkv keeps is below the lowest score that kvpress keeps, as a share of it. Not by our own scores: cells that
pyheadkv keeps and that are not the best ones by scores in float64 of its own queries and K.
"""
ANSWERS = """\
Right answers with 95 % intervals (bootstrap over contexts). Same tokens: the whole greedy answers. Logit NMSE: of the
first token of the answer, relative to kvpress.
"""


def percent(part: float, whole: float, *, digits: int = 2) -> str:
    return f"{100 * part / whole:.{digits}f} %"


def write_report(path: Path, files: Sequence[Path], *, command: str, note: str) -> None:
    """Tables of kept cells and of answers as Markdown, and what ``--exact`` found."""
    runs = [journal.read_lines(file)[:2] for file in files]
    lines = ["# The same cells as kvpress?", "", f"`{command}`, each file by:", ""]
    lines += [f"- {made_by(header, entries)}" for header, entries in runs]
    lines += ["", ABOUT, "## Kept cells", "", CELLS]
    cells, moved, errors, answers = [], [], [], []
    for header, entries in runs:
        about, questions = [name_of(header), header["ask"]], [question for e in entries for question in e["questions"]]
        cells += [[*about, *rest] for rest in rows_of_cells(questions)]
        moved += [[*about, *rest] for rest in rows_of_moves(questions)]
        pairs = np.array([question["score_errors"] for question in questions])
        errors.append([*about, str(len(pairs)), f"{np.median(pairs[:, 0]):.1e}", f"{pairs[:, 1].max():.1e}"])
        answers += rows_of_answers(name_of(header), entries)
    lines += table(("model", "asked", "setting", "cells", "heads with the same cells", "cells in common", "largest gap",
                    "cells of a head, largest difference", "not by our own scores"), cells)  # fmt: skip
    lines += ["", f"What the floor of {FLOOR} changes on each side, in cells against its own floor 0:", ""]
    lines += table(("model", "asked", "cells", "pyheadkv", "kvpress"), moved)
    lines += ["", "Scores of all cells before the window, difference as a share of kvpress':", ""]
    lines += table(("model", "asked", "prompts", "median", "largest"), errors)
    lines += ["", *rows_of_traces(runs)]
    lines += ["## Answers", "", ANSWERS]
    lines += table(("model", "task", "setting", "cells", "pyheadkv", "kvpress", "same tokens", "logit NMSE, median", "largest"), answers)
    lines += ["", note, ""] if note else [""]
    replace_file(path, lambda file: file.write("\n".join(lines).encode()))


def made_by(header: dict[str, Any], entries: Sequence[dict[str, Any]]) -> str:
    """Command, model and versions of a run."""
    n = 1 + max(e["context"] for e in entries)
    versions = ", ".join(f"{name} {value}" for name, value in header["versions"].items() if value)
    flags = " --as-shipped" * header["as_shipped"] + " --exact" * any("exact" in e for e in entries)
    return (
        f"`python scripts/compare_kvpress.py {header['model']} --ask {header['ask']} --contexts {n} --kv-size {header['kv_size']} "
        f"--window {header['window']} --kernel {header['kernel']} --seed {header['seed']}{flags} -o FILE.jsonl`: sha256 "
        f"{header['model_sha256'][:16]}, {versions}"
    )


def rows_of_traces(runs: Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]]) -> list[str]:
    """What ``trace_scores`` found."""
    found = [(name_of(header), e) for header, entries in runs for e in entries if "exact" in e]
    scores = [[name, side, f"{a:.1e}", f"{b:.1e}"] for name, e in found for side, (a, b) in e["exact"].items()]
    return [] if not scores else [
        "The same against a forward pass in float64 (`pyheadkv.testing.reference`), the first prompt of each run and resumption:", "",
        *table(("model", "scores", "median", "largest"), scores), "",
    ]  # fmt: skip


def name_of(header: dict[str, Any]) -> str:
    return Path(header["model"]).stem + (", as shipped" if header["as_shipped"] else "")


def results_of(questions: Sequence[dict[str, Any]]) -> dict[Setting, list[dict[str, Any]]]:
    """By setting, in the order of the questions."""
    out: dict[Setting, list[dict[str, Any]]] = defaultdict(list)
    for question in questions:
        for result in question["results"]:
            out[Setting(**result["setting"])].append(result)
    return out


def rows_of_cells(questions: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for setting, results in results_of(questions).items():
        found = [result["cells"] for result in results if result["cells"]]
        if found:
            names = "n_heads", "n_heads_same", "n_cells", "n_cells_same", "n_unlike"
            total = {key: sum(one[key] for one in found) for key in names}
            same = setting.floor == 0
            rows.append([
                setting.name, str(setting.kv_size), percent(total["n_heads_same"], total["n_heads"]),
                percent(total["n_cells_same"], total["n_cells"], digits=3), f"{max(o['gap'] for o in found):.1e}" if same else "",
                str(max(o["counts_apart"] for o in found)), f"{total['n_unlike']} of {total['n_cells']}" if same else "",
            ])  # fmt: skip
    return rows


def rows_of_moves(questions: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for setting, results in results_of(questions).items():
        if setting.floor:
            n_all = sum(result["cells"]["n_cells"] for result in results)
            sums = np.sum([result["cells"]["n_moved"] for result in results], axis=0).tolist()
            rows.append([str(setting.kv_size), *(f"{n} of {n_all}" for n in sums)])
    return rows


def rows_of_answers(name: str, entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for task in dict.fromkeys((e["task"], e["length"]) for e in entries):
        mine = [e for e in entries if (e["task"], e["length"]) == task]
        places = [str(e["context"]) for e in mine for _ in e["questions"]]
        for setting, results in results_of([q for e in mine for q in e["questions"]]).items():
            shares = []
            for side in (0, 1):
                grades: dict[str, list[float]] = defaultdict(list)
                for place, result in zip(places, results, strict=True):
                    grades[place].append(result["scores"][side])
                mean, low, high = interval(grades)
                shares.append(f"{100 * mean:.0f} % ({100 * low:.0f}-{100 * high:.0f})")
            errors = [result["logits_nmse"] for result in results]
            n_same = sum(result["same_tokens"] for result in results)
            rows.append([
                name, f"{task[0]} {task[1]}", setting.name, str(setting.kv_size or ""), *shares, f"{n_same} of {len(results)}",
                f"{np.median(errors):.1e}", f"{max(errors):.1e}",
            ])  # fmt: skip
    return rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL.gguf")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.jsonl", help="one line per context")
    parser.add_argument("--ask", default="passkey:1024", metavar="TASK:TOKENS,..", help="(default: %(default)s)")
    parser.add_argument("--contexts", type=int, default=16, metavar="N", help="of each task (default: %(default)s)")
    parser.add_argument("--kv-size", default="64,128,256", metavar="LIST", help="cells per KV head (default: %(default)s)")
    parser.add_argument("--window", type=int, default=32, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--kernel", type=int, default=5, metavar="N", help="of the average pooling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--as-shipped", action="store_true", help="llama.cpp reads MODEL.gguf itself, and has f16 cells")
    parser.add_argument("--exact", action="store_true", help="scores of the first prompt against float64")
    parser.add_argument("--resume", action="store_true", help="go on with FILE.jsonl")
    parser.add_argument("--report", type=Path, nargs="+", metavar=("OUT.md", "FILE.jsonl"), help="only write the tables")
    parser.add_argument("--note", default="", metavar="TEXT", help="what stands below them")
    args = parser.parse_args(argv)
    if args.report is not None and len(args.report) < 2:
        parser.error("--report needs OUT.md and at least one FILE.jsonl")
    if args.report is None and (args.model is None or args.output is None):
        parser.error("give MODEL.gguf and -o FILE.jsonl, or --report")
    return args


def report(args: argparse.Namespace) -> None:
    """Write the tables of some runs."""
    out, *files = args.report
    names = " ".join(file.name for file in (out, *files))
    command = f"python scripts/compare_kvpress.py --report {names}"
    write_report(out, files, command=command, note=args.note)


def main(argv: list[str] | None = None) -> int:
    """As ``score_hf.exit_code`` says."""
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return exit_code(lambda: run(args) if args.report is None else report(args))


if __name__ == "__main__":
    sys.exit(main())
