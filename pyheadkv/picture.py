"""What a compressed cache holds, to look at: ``Llama.kv_plot()`` and ``Llama.kv_text()``."""

from __future__ import annotations

import codecs
import html
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .atomic_write import replace_file
from .options import check_extra, check_int, check_tokens
from .units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .llama import Llama

N_BINS = 128  # columns of the panel of positions
N_SHADES = 8
GAP = " … "  # in place of what no head holds


@dataclass(frozen=True)
class Held:
    """Cells of one sequence.

    Attributes
    ----------
    heads : (n,) list of (layer, KV head), those that are compressed
    positions : of each head, ascending int32; without the cell of policy razor that stands for all that were dropped
    n_cells : (n_layer, n_head_kv) int32, that cell included; 0 where there is no such head
    n_prompt, n_past : tokens of the prompt, and of prompt and answer
    bytes_full : bytes of an uncompressed cache of ``n_past`` tokens, in the layers that are compressed
    """

    heads: list[tuple[int, int]]
    positions: list[npt.NDArray[np.int32]]
    n_cells: npt.NDArray[np.int32]
    n_prompt: int
    n_past: int
    bytes_full: int

    @property
    def share(self) -> float:
        """Cells held, of those of a full cache."""
        return float(self.n_cells.sum()) / (len(self.heads) * self.n_past)

    @property
    def bytes(self) -> int:
        """Bytes of the cells held; the library allocates somewhat more, see ``KVStats.bytes_store``."""
        return round(self.bytes_full * self.share)

    @property
    def summary(self) -> str:
        """Cells and bytes, beside those of a full cache, in one line."""
        cells = f"{self.n_cells.sum()} of {len(self.heads) * self.n_past} cells"
        return f"{cells}, {format_bytes(self.bytes)} of {format_bytes(self.bytes_full)} ({self.share:.1%}), {self.n_past} tokens"


def read_held(llm: Llama, seq_id: int = 0) -> Held:
    """Cells of a sequence that is compressed.

    Raises
    ------
    ValueError : it is not
    """
    stats = llm.kv_stats(seq_id)
    heads = [(int(il), int(ih)) for il, ih in np.argwhere(stats.n_cells > 0)]
    if not heads:
        raise ValueError(f"sequence {seq_id} holds nothing: evaluate a prompt first")
    positions = []
    for il, ih in heads:
        listed = llm.kv_positions(il, ih, seq_id)
        n_behind = int(stats.n_cells[il, ih]) - len(listed)  # the last tokens, which every head has
        positions.append(np.concatenate([listed[listed >= 0], np.arange(stats.n_past - n_behind, stats.n_past, dtype=np.int32)]))
    return Held(heads, positions, stats.n_cells, stats.n_prompt, stats.n_past, stats.bytes_full)


# text


@dataclass(frozen=True)
class KVText:
    """The text of a sequence, and how many KV heads hold each token of it. A notebook shows it shaded.

    Attributes
    ----------
    pieces : text of each token; a character of several tokens stands at the last of them
    n_heads : (n_tokens,) int32, KV heads that hold the token
    n_heads_max : of how many
    n_prompt : tokens of the prompt, the others were generated
    title : one line
    """

    pieces: list[str]
    n_heads: npt.NDArray[np.int32]
    n_heads_max: int
    n_prompt: int
    title: str

    def kept(self, n_heads: int = 1) -> str:
        """The text that at least ``n_heads`` KV heads hold, with an ellipsis where something is missing."""
        check_int("n_heads", n_heads, 1, self.n_heads_max)
        runs = groupby(zip(self.pieces, self.n_heads >= n_heads), key=lambda x: bool(x[1]))
        return "".join("".join(piece for piece, _ in run) if is_kept else GAP for is_kept, run in runs)

    def __str__(self) -> str:
        return self.kept()

    def _repr_html_(self) -> str:
        return "".join(self._html())

    def _html(self) -> Iterator[str]:
        shades = np.ceil(self.n_heads / self.n_heads_max * N_SHADES).astype(int)
        yield f"<style>{STYLE}</style>"
        yield f'<figure class="pyheadkv"><figcaption>{html.escape(self.title)}<br>'
        last = "held" if self.n_heads_max == 1 else f"by all {self.n_heads_max} KV heads"
        yield f'<span class="k0">{"not held" if self.n_heads_max == 1 else "held by none"}</span>'
        yield "".join(f'<span class="k{i}">&nbsp;</span>' for i in range(1, N_SHADES))
        yield f'<span class="k{N_SHADES}">{last}</span></figcaption><pre>'
        begin = 0
        for (n_heads, is_answer), run in groupby(zip(self.n_heads, np.arange(len(self.pieces)) >= self.n_prompt)):
            end = begin + sum(1 for _ in run)
            names = f"k{shades[begin]}" + (" answer" if is_answer else "")
            where = f"token {begin}" if end == begin + 1 else f"tokens {begin} to {end - 1}"
            text = html.escape("".join(self.pieces[begin:end]))
            yield f'<span class="{names}" title="{where}: {n_heads} of {self.n_heads_max} KV heads">{text}</span>'
            begin = end
        yield "</pre></figure>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a page of HTML that needs nothing else."""
        head = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
        view = '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark"></head><body>'
        page = f"{head}{view}{self._repr_html_()}</body></html>\n".encode()
        replace_file(Path(path), lambda file: file.write(page))


# orange over whatever is behind: light and dark pages both
STYLE = (
    ".pyheadkv{margin:0;max-width:60em}.pyheadkv figcaption{font:13px sans-serif;margin-bottom:.6em}"
    ".pyheadkv pre{font:14px/1.6 sans-serif;white-space:pre-wrap;overflow-wrap:anywhere;margin:0}"
    ".pyheadkv .k0{opacity:.55}.pyheadkv .answer{border-bottom:2px solid}"
    + "".join(f".pyheadkv .k{i}{{background:rgba(240,140,0,{0.12 + 0.63 * i / N_SHADES:.2f})}}" for i in range(1, N_SHADES + 1))
)


def make_text(llm: Llama, *, layer: int | None, head: int | None, seq_id: int, tokens: Any) -> KVText:
    """``Llama.kv_text()``."""
    held = read_held(llm, seq_id)
    chosen = _chosen(held, layer, head)
    if tokens is None:
        if seq_id != 0:
            raise ValueError(f"seq_id={seq_id}: give its tokens=, which are known of sequence 0 only")
        tokens = llm.input_ids[: held.n_past].tolist()
    if len(tokens) < held.n_past:
        raise ValueError(f"{len(tokens)} tokens: sequence {seq_id} has {held.n_past}")
    check_tokens(tokens, n_vocab=llm.n_vocab())
    n_heads = np.zeros(held.n_past, dtype=np.int32)
    for i in chosen:
        n_heads[held.positions[i]] += 1
    where = "" if layer is None else f"layer {layer}, " if head is None else f"layer {layer}, KV head {head}, "
    n_held = sum(int(held.n_cells[held.heads[i]]) for i in chosen)
    title = held.summary if layer is None else f"{where}{n_held} of {len(chosen) * held.n_past} cells"
    return KVText(_pieces(llm, tokens[: held.n_past]), n_heads, len(chosen), held.n_prompt, title)


def _chosen(held: Held, layer: int | None, head: int | None) -> list[int]:
    if layer is None and head is not None:
        raise ValueError(f"head={head} without layer=: give both")
    chosen = [i for i, (il, ih) in enumerate(held.heads) if layer in (None, il) and head in (None, ih)]
    if not chosen:
        layers = sorted({il for il, _ in held.heads})
        raise ValueError(f"layer={layer}, head={head}: no such KV head is compressed; layers {layers[0]} to {layers[-1]} have some")
    return chosen


def _pieces(llm: Llama, tokens: list[int]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(llm.detokenize([token], special=True)) for token in tokens]


# plot


def make_plot(llm: Llama, *, seq_id: int) -> Figure:
    """``Llama.kv_plot()``."""
    check_extra("kv_plot()", "matplotlib")
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    class Picture(Figure):
        def _repr_png_(self) -> bytes:  # a notebook shows it without %matplotlib
            image = io.BytesIO()
            self.savefig(image, format="png", dpi=100)
            return image.getvalue()

    held = read_held(llm, seq_id)
    n_layer = held.n_cells.shape[0]
    figure = Picture(figsize=(11.0, 1.6 + min(8.0, max(2.4, 0.2 * n_layer))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    cells = np.where(held.n_cells > 0, held.n_cells, np.nan)
    draw_panel(figure, left, cells, title="what each KV head holds", x="KV head (index)", unit="cells")
    n_bins = min(N_BINS, held.n_past)
    image = draw_panel(
        figure,
        right,
        100 * _by_position(held, n_bins),
        title="where in the text",
        x="position (token)",
        unit="kept (% of the tokens, mean over the KV heads)",
    )
    image.set_extent((0, held.n_past, n_layer - 0.5, -0.5))
    if held.n_past > held.n_prompt > 0:
        right.axvline(held.n_prompt, color="white", linestyle=":", linewidth=1.5)
        right.set_xlabel(f"position (token; the answer begins at {held.n_prompt})")
    figure.suptitle(held.summary)
    return figure


def _by_position(held: Held, n_bins: int) -> npt.NDArray[np.float64]:
    """Share of the tokens of each bin that the KV heads of a layer hold: (n_layer, n_bins), NaN where a layer has no head."""
    edges = np.linspace(0, held.n_past, n_bins + 1)
    shares = np.zeros((held.n_cells.shape[0], n_bins))
    n_heads = np.zeros(len(shares))
    for (il, _), positions in zip(held.heads, held.positions, strict=True):
        shares[il] += np.histogram(positions, edges)[0]
        n_heads[il] += 1
    n_tokens = np.histogram(np.arange(held.n_past), edges)[0]
    with np.errstate(invalid="ignore"):
        means: npt.NDArray[np.float64] = shares / n_heads[:, None] / n_tokens
    return means


def draw_panel(figure: Figure, axes: Axes, values: npt.NDArray[Any], *, title: str, x: str, unit: str) -> Any:
    """A heat map layer x ``x`` with a bar of its colours; NaN is drawn as nothing. Returns the image."""
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel("layer (index)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.colorbar(image, ax=axes, label=unit)
    return image
