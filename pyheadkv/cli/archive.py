"""``pyheadkv archive``: what an archive of prompts holds."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

from ..archive import Block, list_blocks, prune
from ..units import format_bytes, parse_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``pyheadkv archive``."""
    parser.add_argument("folder", metavar="DIR", help="folder that was given as kv_archive or --kv-archive")
    parser.add_argument("--verify", action="store_true", help="check all bytes of all blocks; the exit code is 1 if one is damaged")
    parser.add_argument("--remove-damaged", action="store_true", help="with --verify: remove those, which their next use would do too")
    parser.add_argument(
        "--prune", metavar="SIZE", help="remove what was not used for the longest time until the rest takes SIZE, such as 5GiB, or 0 = all"
    )


def run(args: argparse.Namespace) -> int:
    """Print a line for each model of the folder, and one for each damaged block."""
    if args.remove_damaged and not args.verify:
        raise ValueError("--remove-damaged: nothing was looked at, add --verify")
    if args.prune is not None:
        n_bytes = 0 if args.prune.strip() == "0" else parse_bytes("--prune", args.prune)
        print(f"{prune(args.folder, n_bytes)} blocks removed")
    found = list_blocks(args.folder, deep=args.verify)
    damaged = [block for block in found if block.damaged]
    for block in damaged:
        if args.remove_damaged:
            Path(args.folder, f"{block.name}.kv").unlink(missing_ok=True)
        print(f"{block.name}: {block.damaged}{', removed' if args.remove_damaged else ''}")
    print(_summary([block for block in found if block not in damaged]))
    return 1 if args.verify and damaged and not args.remove_damaged else 0


def _summary(found: list[Block]) -> str:
    lines = []
    n_blocks, n_bytes = Counter[str](), Counter[str]()
    used: dict[str, float] = {}
    for block in found:
        n_blocks[block.model] += 1
        n_bytes[block.model] += block.bytes
        used[block.model] = max(block.used, used.get(block.model, 0))
    for model, n in n_blocks.most_common():
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(used[model]))
        longest = max(block.n_tokens for block in found if block.model == model)
        lines.append(f"{model}: {n} blocks, {format_bytes(n_bytes[model])}, prompts of up to {longest} tokens, last used {when}")
    lines.append(f"{len(found)} blocks, {format_bytes(sum(n_bytes.values()))}")
    return "\n".join(lines)
