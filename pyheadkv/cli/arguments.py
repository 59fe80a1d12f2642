"""Command-line options of the compression that several commands share."""

from __future__ import annotations

import argparse
import re
from typing import Any

from ..options import SURPLUSES, Options, check_int

AMOUNTS = ("kv_size", "kv_ratio", "kv_bytes")


def add_amount_arguments(group: argparse._ActionsContainer, *, several: bool = False) -> None:
    """``--kv-ratio`` and ``--kv-bytes``; ``several``: lists, read by ``split``."""
    where = "beside --kv-size or in its place, " if several else "in place of --kv-size, "
    share, size = "shares of each prompt, up to 1" if several else "share of each prompt, up to 1", "the cells of all heads, such as 64MiB"
    group.add_argument("--kv-ratio", type=str if several else float, metavar="LIST" if several else "X", help=where + share)
    group.add_argument("--kv-bytes", metavar="LIST" if several else "SIZE", help=f"{where}bytes for {size}")


def add_keep_arguments(group: argparse._ActionsContainer) -> None:
    """``--sinks``, ``--protect`` and ``--surplus``; ``keep_kwargs`` reads them."""
    group.add_argument(
        "--sinks",
        type=int,
        metavar="N",
        help="first cells of a prompt that every head keeps (default: 4 with ranks recent, value, output, expected, outlying, outlying+value, attention*value, else 0)",
    )
    group.add_argument(
        "--protect",
        action="append",
        default=[],
        metavar="START:END",
        help="positions of a prompt whose cells every head keeps, END excluded; may be repeated (default: none)",
    )
    group.add_argument(
        "--surplus",
        choices=tuple(SURPLUSES),
        help=f"what becomes of cells that a head may keep beyond the length of the prompt (default: {Options.surplus})",
    )


def keep_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``Llama`` from what ``add_keep_arguments`` added, for a compressed cache."""
    return {"sinks": args.sinks, "protect": [parse_span(text) for text in args.protect], "surplus": args.surplus or Options.surplus}


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the arguments that were given; the others have the default of ``Options``."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def threads_kwargs(n_threads: int | None) -> dict[str, Any]:
    """Arguments of ``Llama`` for a number of threads; none for None."""
    if n_threads is None:
        return {}
    check_int("--threads", n_threads, 1, 512)
    return {"n_threads": n_threads, "n_threads_batch": n_threads}


def parse_span(text: str) -> tuple[int, int]:
    """(start, end) of ``"START:END"``.

    Raises
    ------
    ValueError : it is something else; the limits of the positions are checked by ``Options``
    """
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text.strip())
    if found is None:
        raise ValueError(f"--protect={text!r}: it must be START:END, two positions in the prompt such as 0:32")
    return int(found[1]), int(found[2])


def split(text: str | None) -> list[str]:
    """Parts of a comma-separated list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]
