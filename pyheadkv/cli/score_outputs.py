"""What the methods of ``pyheadkv score`` share: where files go, what is refused before hours are spent, what a run depends on."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..atomic_write import check_destination

if TYPE_CHECKING:
    from ..llama import Llama


def engine_of(llm: Llama, args: argparse.Namespace) -> dict[str, int]:
    """What decides how sums are rounded."""
    threads = {"n_threads": llm.n_threads, "n_threads_batch": llm.n_threads_batch}
    return {**threads, "n_batch": args.n_batch, "n_gpu_layers": args.n_gpu_layers}


def default_output(model: Path, beside: Path, cached: Path) -> Path:
    """Beside the model, or in the user's cache where its folder cannot be written."""
    if os.access(model.parent, os.W_OK):
        return beside
    cached.parent.mkdir(parents=True, exist_ok=True)
    return cached


def check_files(path: Path, args: argparse.Namespace, what: str, read: Callable[[Path], Any]) -> Path:
    """Refuse now what would fail after hours; the path of the journal.

    Parameters
    ----------
    what : is measured, with its article
    read : what a model has of it in its metadata, None for nothing
    """
    journal: Path = args.output.with_name(args.output.name + ".part")
    if args.output.exists() and not args.force:
        state = "is complete, there is nothing to go on with" if args.resume and not journal.exists() else "exists"
        raise ValueError(f"output {args.output} {state}: pass --force to replace it, or choose another name")
    if not args.output.parent.is_dir():
        raise ValueError(f"output {args.output} is in a folder that does not exist: choose an existing one")
    if journal.exists() and not (args.resume or args.force):
        raise ValueError(f"{journal} holds an interrupted run: pass --resume to go on, or --force to begin again")
    if args.write is not None:
        check_destination(path, args.write, force=args.force)
        if not args.force and read(path) is not None:
            raise ValueError(f"{path} has {what} already: pass --force to replace it in {args.write}")
    return journal


def largest_heads(values: NDArray[np.float64], n_heads: Sequence[int], *, n: int) -> list[tuple[int, int]]:
    """(layer, head) of the n largest values of heads that are there, the largest first.

    Parameters
    ----------
    values : (n_layer, n_head)
    n_heads : of each layer, those that are compressed
    """
    ordered = (divmod(int(i), values.shape[1]) for i in np.argsort(-values, axis=None, kind="stable"))
    return [(il, ih) for il, ih in ordered if ih < n_heads[il]][:n]
