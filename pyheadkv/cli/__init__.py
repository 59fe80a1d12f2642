"""Console script ``pyheadkv``. A sub-command is a module of this package and one entry of ``COMMANDS``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..options import nearest
from . import archive, demo, evaluate, generate, inspect, plan, rpc_worker, score, serve

EXIT_ERROR, EXIT_INTERRUPT = 1, 130


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Attributes
    ----------
    add_arguments : adds its options to a parser
    run : does the work, returns the exit code
    passes_on : nothing is a flag of ours, all arguments are positional
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    passes_on: bool = False


COMMANDS = (
    Command("generate", "continue a prompt", generate.add_arguments, generate.run),
    Command("inspect", "show importance and budgets of a GGUF", inspect.add_arguments, inspect.run),
    Command("score", "measure the importance of the heads of a model", score.add_arguments, score.run),
    Command("eval", "compare cache policies at equal bytes", evaluate.add_arguments, evaluate.run),
    Command("archive", "list, verify or prune an archive of prompts", archive.add_arguments, archive.run),
    Command("plan", "find the longest prompt that fits into a memory", plan.add_arguments, plan.run),
    Command(
        "demo",
        "ask a model for what stands in a long text, with the full cache and small budgets",
        demo.add_arguments,
        demo.run,
    ),
    Command(
        "serve",
        "start llama-server, with the embedded model unless a MODEL.gguf comes first; takes the flags of llama-server",
        serve.add_arguments,
        serve.run,
        passes_on=True,
    ),
    Command("rpc-worker", "lend this machine to models of others (rpc_servers=, serve --rpc)", rpc_worker.add_arguments, rpc_worker.run),
)


def make_parser() -> argparse.ArgumentParser:
    """Parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="pyheadkv", description="llama.cpp with a KV-cache budget for every head")
    parser.add_argument("--version", action="version", version=f"pyheadkv {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        raw: dict[str, Any] = {"prefix_chars": "\0", "add_help": False} if command.passes_on else {}
        sub = commands.add_parser(command.name, help=command.help, description=command.help, **raw)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run, parser=sub)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of a sub-command; an unknown flag ends the process with the nearest one that is known."""
    args, unknown = make_parser().parse_known_args(argv)
    if len(unknown) == 1 and not unknown[0].startswith("-") and getattr(args, "model", "") is None:
        args.model = unknown.pop()  # behind options, argparse takes the second word of a command for left out
    if unknown:
        flag = next((text for text in unknown if text.startswith("-")), unknown[0])
        known = re.findall(r"(?<![\w-])--?[a-z][\w-]*", args.parser.format_help())
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(flag.split('=')[0], known)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Parameters
    ----------
    argv : arguments without the program name; None = those of the process

    Returns
    -------
    exit code: 0, 1 after an error (one line on standard error), 130 after Ctrl-C
    """
    args = parse(argv)
    try:
        return int(args.run(args))
    except BrokenPipeError:  # the reader of our output has gone, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except (ValueError, RuntimeError, OSError) as error:
        print(f"pyheadkv: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPT
