"""``pyheadkv plan``: the longest prompt that fits into a memory. No weights are loaded.

Most memory is in use when the end of a prompt of n tokens is compressed. These parts add up then:

======== ==============================================================================================================
weights  the size of the file, which is mapped. Tensors that the CPU backend repacks (q4_0 and others) are copies; the
         pages they were read from are not needed any more and not counted
process  interpreter and libraries, the vocabulary, and per token of the context what is kept outside of ggml: lists of
         tokens, batches, positions of cells. Upper bounds of measurements, see the constants
compute  buffers of the graphs. A context that allocates nothing says what a real one would reserve, so they are right
         for every architecture. They have room for the logits of a whole ubatch, of which a prompt needs one row; the
         work memory of the CPU backend is smaller than that and not counted
cells    K and V. stock: of n + n_predict tokens in all layers; token: of n tokens in all layers; layer: in one layer.
         Rounded up to 256 cells
hidden   layer: n rows of n_embd values between the layers, F32 or F16, and the masks where attention takes any
store    in all layers kv_size cells per KV head and room for n_predict more. The budgets of every policy add up to this
         but for rounding, so that neither policy nor importance is asked for
scratch  the queries of the window in all layers, and what scores one layer
beside   layers that are not compressed, whichever cache the others have: windows of n_swa + n_ubatch tokens, recurrent states
======== ==============================================================================================================

Cells, hidden, store and scratch are those of the layers that are compressed, and what ``KVStats.bytes_peak`` counts. Everything is
on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .. import _lib
from ..gguf_header import read_header
from ..layers import any_params, create_without_memory, footprint_of, load_without_weights
from ..model import ModelShape, model_path, read_shape
from ..options import MAX_CELLS, Options, check_choice, check_int
from ..units import format_bytes, ggml_type, parse_bytes, round_n_ctx, row_bytes

PREFILLS = ("stock", "token", "layer")
HEADINGS = ("stock ", "token-major ", "layer-major ")
CELL_TYPES = ("f16", "bf16", "q8_0", "q4_0")
KV_SIZES = (64, 128, 256, 512, 1024)  # cells
PROCESS_BYTES = 64 << 20  # interpreter, NumPy and libraries with what they keep
VOCABULARY_FACTOR = 8  # bytes in memory per byte of the header, which is nearly all vocabulary
HOST_BYTES = {"stock": 256, "token": 384, "layer": 896}  # per token, outside of ggml; layer: the prompt is one batch

MAX_TOKENS = 1 << 24  # longest prompt that is looked for
MAX_PROBED = 1 << 20  # tokens of the largest context that is asked for its compute buffers; linear beyond


@dataclass(frozen=True)
class Footprint:
    """Bytes in use when the end of a prompt is compressed; the module says what each part is."""

    weights: int
    process: int
    compute: int
    cells: int
    hidden: int = 0
    store: int = 0
    scratch: int = 0
    beside: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def ledger(self) -> int:
        """The part that ``KVStats.bytes_peak`` counts."""
        return self.cells + self.hidden + self.store + self.scratch


@dataclass(frozen=True)
class Entry:
    """The longest prompt for one cache.

    Attributes
    ----------
    kv_size : cells; None for the stock cache
    prefill : "stock", "token" or "layer"
    n_prompt : tokens; 0 when no prompt longer than ``kv_size`` fits
    footprint : bytes at that prompt; None when there is none
    """

    type_k: str
    type_v: str
    kv_size: int | None
    prefill: str
    n_prompt: int
    footprint: Footprint | None


@dataclass(frozen=True)
class MemoryPlan:
    """Longest prompts of a model.

    Attributes
    ----------
    memory : bytes
    why_not_layer : why prompts cannot be read layer by layer; empty = they can
    """

    shape: ModelShape
    memory: int
    n_predict: int
    n_ubatch: int
    prefill_hidden: str
    why_not_layer: str
    entries: tuple[Entry, ...]


# command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``pyheadkv plan``."""
    parser.add_argument("model", nargs="?", metavar="MODEL.gguf", help="model (default: the embedded one)")
    parser.add_argument("--memory", required=True, metavar="SIZE", help="for the whole process, such as 8GiB or 512MiB")
    parser.add_argument(
        "--kv-size",
        default=",".join(map(str, KV_SIZES)),
        metavar="N,N,..",
        help="mean cells per KV head, recent ones included (default: %(default)s)",
    )
    for name in "kv":
        parser.add_argument(
            f"--type-{name}",
            choices=CELL_TYPES,
            default="f16",
            help=f"type of {name.upper()} in the cache, planned beside f16 (default: %(default)s)",
        )
    parser.add_argument("-n", "--n-predict", type=int, default=128, metavar="N", help="tokens to generate (default: %(default)s)")
    parser.add_argument("--n-ubatch", type=int, default=512, metavar="N", help="tokens per graph (default: %(default)s)")
    parser.add_argument(
        "--prefill-hidden",
        choices=("f32", "f16"),
        default="f32",
        help="hidden states between layers; f16 is not exact (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON, sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the longest prompts."""
    plan = make_plan(
        model_path(args.model),
        memory=parse_bytes("memory", args.memory),
        kv_sizes=parse_kv_sizes(args.kv_size),
        type_k=args.type_k,
        type_v=args.type_v,
        n_predict=args.n_predict,
        n_ubatch=args.n_ubatch,
        prefill_hidden=args.prefill_hidden,
    )
    print(json.dumps(to_dict(plan), indent=2) if args.json else format_plan(plan))
    return 0


def parse_kv_sizes(text: str) -> list[int]:
    """Ascending cells of ``"64,128"``; ValueError for anything else."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"kv_size={text!r}: it must be numbers of cells separated by commas, such as 64,128") from None


# planning


def make_plan(
    path: str | os.PathLike[str],
    *,
    memory: int,
    kv_sizes: Sequence[int] = KV_SIZES,
    type_k: str = "f16",
    type_v: str = "f16",
    n_predict: int = 128,
    n_ubatch: int = 512,
    prefill_hidden: str = "f32",
) -> MemoryPlan:
    """The longest prompts of a model with f16 cells, and with cells of the given types.

    Parameters
    ----------
    path : GGUF; only its header is read
    memory : bytes for the whole process
    kv_sizes : mean cells per KV head, recent ones included
    n_predict : tokens to generate; the store has room for them, ``Llama(n_tail=n_predict)``
    n_ubatch : tokens per graph
    prefill_hidden : "f32" or "f16"

    Raises
    ------
    ValueError : wrong option, damaged file, a model that cannot be compressed, or too little memory for any prompt
    """
    check_int("memory", memory, 1, 1 << 60)
    for n in kv_sizes:
        check_int("kv_size", n, 1, MAX_CELLS)
    entries: list[Entry] = []
    with Probe(path) as probe:
        for types in dict.fromkeys([("f16", "f16"), (type_k, type_v)]):
            model = MemoryModel(probe, *types, n_predict=n_predict, n_ubatch=n_ubatch, prefill_hidden=prefill_hidden)
            for kv_size in (None, *kv_sizes):
                for prefill in PREFILLS[:1] if kv_size is None else PREFILLS[1:]:
                    entries.append(_entry(model, prefill, kv_size, memory))
        if not any(entry.n_prompt for entry in entries):
            raise ValueError(_too_little(model, memory, min(kv_sizes)))
    return MemoryPlan(probe.shape, memory, n_predict, n_ubatch, prefill_hidden, probe.why_not_layer, tuple(entries))


def _entry(model: MemoryModel, prefill: str, kv_size: int | None, memory: int) -> Entry:
    n_prompt = model.longest(prefill, kv_size=kv_size or 0, memory=memory)
    footprint = model.footprint(prefill, n_prompt=n_prompt, kv_size=kv_size or 0) if n_prompt else None
    return Entry(model.type_k, model.type_v, kv_size, prefill, n_prompt, footprint)


def _too_little(model: MemoryModel, memory: int, kv_size: int) -> str:
    n_prompt = kv_size + 1
    needed = min(
        model.footprint("stock", n_prompt=n_prompt).total,
        model.footprint("token", n_prompt=n_prompt, kv_size=kv_size).total,
    )
    return (
        f"memory={format_bytes(memory)}: {model.probe.shape.name} needs {format_bytes(needed)} for a prompt of "
        f"{n_prompt} tokens, {format_bytes(model.probe.n_bytes_file)} of them weights: give more memory, "
        "or use a smaller model, quantisation or --n-ubatch"
    )


class MemoryModel:
    """Bytes as a function of the prompt, for one pair of cell types.

    Parameters
    ----------
    probe : the open model
    type_k, type_v : types of the cells
    n_predict, n_ubatch, prefill_hidden : see ``make_plan``
    """

    def __init__(
        self,
        probe: Probe,
        type_k: str = "f16",
        type_v: str = "f16",
        *,
        n_predict: int = 128,
        n_ubatch: int = 512,
        prefill_hidden: str = "f32",
    ) -> None:
        self.probe = probe
        self.type_k = check_choice("type_k", type_k, CELL_TYPES)
        self.type_v = check_choice("type_v", type_v, CELL_TYPES)
        row_bytes(type_k, probe.shape.n_embd_head_k), row_bytes(type_v, probe.shape.n_embd_head_v)  # blocks that do not fit are refused
        self.n_predict = check_int("n_predict", n_predict, 1, 1 << 20)
        self.n_ubatch = check_int("n_ubatch", n_ubatch, 1, 1 << 16)
        self.prefill_hidden = check_choice("prefill_hidden", prefill_hidden, ("f32", "f16"))

    def longest(self, prefill: str, *, memory: int, kv_size: int = 0) -> int:
        """Tokens of the longest prompt that fits into ``memory`` bytes; 0 if none longer than ``kv_size`` does."""
        if prefill == "layer" and self.probe.why_not_layer:
            return 0
        below, above = kv_size, MAX_TOKENS + 1
        while above - below > 1:
            n_prompt = (below + above) // 2
            if self.footprint(prefill, n_prompt=n_prompt, kv_size=kv_size).total <= memory:
                below = n_prompt
            else:
                above = n_prompt
        return below if below > kv_size else 0

    def footprint(self, prefill: str, *, n_prompt: int, kv_size: int = 0) -> Footprint:
        """Bytes in use at the end of a prompt.

        Parameters
        ----------
        prefill : "stock", "token" or "layer"
        n_prompt : tokens
        kv_size : cells; the stock cache has none
        """
        probe = self.probe
        n_ctx = round_n_ctx(n_prompt + self.n_predict)
        process = PROCESS_BYTES + VOCABULARY_FACTOR * probe.n_bytes_header + HOST_BYTES[prefill] * n_ctx
        common = probe.n_bytes_file, process, self._compute_bytes(n_ctx, as_stock=prefill == "stock")
        beside = self._beside_bytes(n_ctx)
        if prefill == "stock":
            return Footprint(*common, cells=self._ask(Options(kv_size=64), n_ctx, layered=False).staging, beside=beside)
        found = self._ask(Options(kv_size=kv_size), n_prompt, layered=prefill == "layer")
        scratch = found.ring + found.scratch
        return Footprint(*common, cells=found.staging, hidden=found.hidden, store=found.store, scratch=scratch, beside=beside)

    def _ask(self, options: Options, n_prompt: int, *, layered: bool) -> _lib.Footprint:
        options = replace(options, policy="snapkv", prefill_hidden=self.prefill_hidden)  # every policy keeps as many cells
        ctx = self.probe.context(*self._types)
        params = options.to_params(None, None)
        return footprint_of(ctx, params, n_prompt=n_prompt, n_predict=self.n_predict, n_ubatch=self.n_ubatch, layered=layered)

    def _compute_bytes(self, n_ctx: int, *, as_stock: bool) -> int:
        """Compute buffers: the chord of a convex function, hence not below it."""
        lower, upper = self._bracket(n_ctx)
        at_lower, at_upper = (self.probe.compute_bytes(n, self.n_ubatch, *self._types, as_stock=as_stock) for n in (lower, upper))
        if lower == upper:
            return at_upper
        return at_lower + -(-(at_upper - at_lower) * (n_ctx - lower) // (upper - lower))

    def _beside_bytes(self, n_ctx: int) -> int:
        """Layers that are not compressed: from a window and a ubatch on it is the same; before, not less."""
        return self.probe.bytes_beside(self._bracket(n_ctx)[1], self.n_ubatch, *self._types)

    @property
    def _types(self) -> tuple[int, int]:
        return ggml_type(self.type_k), ggml_type(self.type_v)

    def _bracket(self, n_ctx: int) -> tuple[int, int]:
        """Contexts that are asked for their sizes, not above and not below this one, but for MAX_PROBED."""
        lower = upper = round_n_ctx(self.n_ubatch)
        while upper < min(n_ctx, MAX_PROBED):
            lower, upper = upper, 2 * upper
        return lower, upper


# the model


class Probe:
    """A model without weights, whose contexts reserve memory without taking it. Use it in a ``with`` statement.

    Attributes
    ----------
    n_bytes_file, n_bytes_header : of all files of the model, and of the metadata in the first
    why_not_layer : why prompts cannot be read layer by layer; empty = they can

    Raises
    ------
    ValueError : the file is damaged or incomplete, or the engine refuses the model
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:

        self.path = Path(path)
        self.shape = read_shape(path)
        if self.shape.why_not:
            raise ValueError(f"{path}: {self.shape.why_not}; the stock cache (kv_size=None) may work")
        if not self.shape.is_uniform:
            raise ValueError(f"{path}: heads differ between layers, {list(self.shape.heads)}: only models with the same ones are planned")
        self.n_bytes_header = read_header(path).data_begin
        self.n_bytes_file = sum(part.stat().st_size for part in model_files(self.path))
        self._reserved: dict[tuple[tuple[int, ...], bool], _lib.Footprint] = {}
        self._contexts: dict[tuple[int, int], Any] = {}  # by type_k and type_v
        self._model: Any = load_without_weights(path)

    def __enter__(self) -> Probe:
        try:
            ctx = self.context(ggml_type("f16"), ggml_type("f16"))  # raises if it cannot be compressed
            self.why_not_layer = _lib.lib.headkv_why_token_prefill(ctx).decode()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        import llama_cpp

        for ctx in self._contexts.values():
            llama_cpp.llama_free(ctx)
        self._contexts.clear()
        llama_cpp.llama_model_free(self._model)
        self._model = None

    def context(self, type_k: int, type_v: int) -> Any:
        """A small context with cells of these types, of which sizes can be asked."""
        key = type_k, type_v
        if key not in self._contexts:
            self._contexts[key] = self._create(256, 256, *key)
        return self._contexts[key]

    def compute_bytes(self, *sizes: int, as_stock: bool) -> int:
        """Compute buffers of a context, by n_ctx, n_ubatch, type_k and type_v; as_stock: of one with the attention of ggml."""
        return int(self._reserve(*sizes, as_stock=as_stock).compute)

    def bytes_beside(self, *sizes: int) -> int:
        """Bytes of the layers that are not compressed, same."""
        return int(self._reserve(*sizes).beside)

    def _reserve(self, *sizes: int, as_stock: bool = False) -> _lib.Footprint:
        import llama_cpp

        key = sizes, as_stock
        if key not in self._reserved:
            ctx = self._create(*sizes, as_stock=as_stock)
            try:
                self._reserved[key] = footprint_of(ctx, any_params(), n_prompt=1)
            finally:
                llama_cpp.llama_free(ctx)
        return self._reserved[key]

    def _create(self, n_ctx: int, n_ubatch: int, type_k: int, type_v: int, *, as_stock: bool = False) -> Any:
        sizes = {"n_ctx": n_ctx, "n_ubatch": n_ubatch, "type_k": type_k, "type_v": type_v}
        return create_without_memory(self._model, self.path, as_stock=as_stock, **sizes)


def model_files(path: Path) -> list[Path]:
    """The files of a model: one, or all parts of a split one.

    Raises
    ------
    ValueError : a part is missing
    """
    found = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.gguf)", path.name)
    if not found:
        return [path]
    parts = [path.with_name(f"{found[1]}{i:05d}{found[2]}") for i in range(1, int(found[3]) + 1)]
    for part in parts:
        if not part.is_file():
            raise ValueError(f"{part}: no such file, but {path.name} is one of {len(parts)} parts: fetch the others")
    return parts


# printing


def to_dict(plan: MemoryPlan) -> dict[str, Any]:
    """The plan for JSON: sizes in bytes, lengths in tokens."""
    entries = [
        {**asdict(entry), "footprint": {**asdict(entry.footprint), "total": entry.footprint.total}} if entry.footprint else asdict(entry)
        for entry in plan.entries
    ]
    return {**asdict(plan), "entries": entries}


def format_plan(plan: MemoryPlan) -> str:
    """Longest prompts by kv_size, and where the memory goes at the largest one."""
    shape = plan.shape
    types = list(dict.fromkeys((entry.type_k, entry.type_v) for entry in plan.entries))
    kv_sizes = list(dict.fromkeys(entry.kv_size for entry in plan.entries if entry.kv_size))
    trained = f", trained on {shape.n_ctx_train:,} tokens" if shape.n_ctx_train else ""
    lines = [
        f"{shape.name} ({shape.arch}){trained}",
        f"longest prompt in {format_bytes(plan.memory)}, with {plan.n_predict} tokens generated after it:",
        "",
        _line(_label(("K", "V"), "kv_size"), HEADINGS),
    ]
    lines += [_tokens_line(plan, pair, kv_size) for pair in types for kv_size in kv_sizes]
    for pair in types:
        lines += ["", _tokens_line(plan, pair, kv_sizes[-1]), *_breakdown(_row(plan, pair, kv_sizes[-1]))]
    notes = list(_notes(plan))
    return "\n".join(lines + [""] * bool(notes) + notes)


def _row(plan: MemoryPlan, types: tuple[str, str], kv_size: int) -> list[Entry]:
    """The entries of one table row, in the order of ``PREFILLS``."""
    wanted = (None, kv_size)
    return [entry for entry in plan.entries if (entry.type_k, entry.type_v) == types and entry.kv_size in wanted]


def _label(types: tuple[str, str], kv_size: object) -> str:
    return f"{' / '.join(types):<14}{kv_size:>8}"


def _line(label: str, cells: Sequence[str]) -> str:
    # a cell ends with a mark or a space
    return (f"{label:<22} |" + "".join(f"{cell:>16}" for cell in cells)).rstrip()


def _tokens_line(plan: MemoryPlan, types: tuple[str, str], kv_size: int) -> str:
    return _line(_label(types, kv_size), [_tokens(plan, entry) for entry in _row(plan, types, kv_size)])


def _tokens(plan: MemoryPlan, entry: Entry) -> str:
    mark = "*" if _exceeds(plan, entry) else " "
    return f"{entry.n_prompt:,}{mark}" if entry.n_prompt else "- "


def _breakdown(row: Sequence[Entry]) -> Iterator[str]:
    for part in (*(field.name for field in fields(Footprint)), "total"):
        sizes = [getattr(entry.footprint, part) if entry.footprint else 0 for entry in row]
        if part == "beside" and not any(sizes):
            continue
        yield _line(f"  {part}", [f"{format_bytes(size)} " if size else "- " for size in sizes])


def _exceeds(plan: MemoryPlan, entry: Entry) -> bool:
    return 0 < plan.shape.n_ctx_train < entry.n_prompt + plan.n_predict and entry.n_prompt > 0


def _notes(plan: MemoryPlan) -> Iterator[str]:
    if any(_exceeds(plan, entry) for entry in plan.entries):
        yield f"* longer than the {plan.shape.n_ctx_train:,} tokens that the model was trained on"
    n_beside = plan.shape.n_layer - plan.shape.n_compressed
    if plan.shape.n_windowed or plan.shape.n_recurrent:
        yield (
            f"- beside: {n_beside} of {plan.shape.n_layer} layers are not compressed ({plan.shape.n_windowed} with windowed attention, "
            f"{plan.shape.n_recurrent} with a recurrent state); stock is llama.cpp's cache with windows, swa_full off"
        )
    if plan.why_not_layer:
        yield f"- layer-major: {plan.why_not_layer}"
    if any(not entry.n_prompt for entry in plan.entries if entry.prefill != "layer" or not plan.why_not_layer):
        yield "- no prompt that is longer than kv_size fits"
