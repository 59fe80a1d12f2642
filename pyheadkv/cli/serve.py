"""``pyheadkv serve``: the bundled llama-server, which has the flags of the compression."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .._lib import library_path
from ..gguf_keys import read_importance
from ..importance import IN_METADATA, find_importance, write_gguf
from ..model import model_path
from ..options import AUTO, policy_traits
from ..replay import find_replay
from ..replay_values import read_replay

#: flags of llama-server that name a model
MODEL_FLAGS = frozenset("-m --model -mu --model-url -hf -hfr --hf-repo -dr --docker-repo --models-dir --models-preset".split())
HELP_FLAGS = frozenset(("-h", "--help", "--usage"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments are those of llama-server, a model may come first."""
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT")


def server_path() -> Path:
    """Path of the bundled llama-server.

    Raises
    ------
    ValueError : this build has none
    """
    path = library_path() / ("llama-server.exe" if os.name == "nt" else "llama-server")
    if not path.is_file():
        raise ValueError(f"no llama-server in {path.parent}: it was built with PYHEADKV_SERVER=OFF, build it with ON")
    return path


def command_line(arguments: Sequence[str]) -> list[str]:
    """What is run: the first argument is a model unless it is a flag, and the embedded model is the default."""
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        model = ["-m", str(model_path(rest.pop(0)))]
    elif os.environ.get("LLAMA_ARG_MODEL") or any(flag.replace("_", "-") in MODEL_FLAGS for flag in rest):
        model = []
    else:
        model = ["-m", str(model_path(None))]
    return [str(server_path()), *_page_flags(rest), *model, *rest, *_importance_flags(model, rest)]


def page_path() -> Path:
    """Folder of the page at /kv."""
    return Path(__file__).resolve().parent.parent / "page"


def _page_flags(rest: Sequence[str]) -> list[str]:
    """``--kv-page`` with our page, unless another one, or none, is asked for."""
    is_given = any(flag.replace("_", "-") == "--kv-page" for flag in rest) or os.environ.get("LLAMA_ARG_KV_PAGE")
    return [] if is_given else ["--kv-page", str(page_path())]


def _importance_flags(model: Sequence[str], rest: Sequence[str]) -> list[str]:
    """``--kv-importance`` with what is known of the model beside its metadata, which the server reads itself, and what is given.

    It comes behind all other flags, and of one that is there twice the last counts.
    """
    flags = {flag.replace("_", "-"): value for flag, value in zip(rest, [*rest[1:], ""], strict=False)}  # as llama-server takes them
    path = model[-1] if model else flags.get("-m") or flags.get("--model") or os.environ.get("LLAMA_ARG_MODEL")
    choices = [flags.get(f"--kv-{name}") or os.environ.get(f"LLAMA_ARG_KV_{name.upper()}") for name in ("policy", "budget", "rank", "fit")]
    is_on = (flags.get("--kv-size") or os.environ.get("LLAMA_ARG_KV_SIZE") or "0") != "0"
    given = flags.get("--kv-importance") or os.environ.get("LLAMA_ARG_KV_IMPORTANCE")
    if not is_on or (given and not Path(given).is_file()) or (path and not Path(path).is_file()):
        return []
    traits = policy_traits(choices[0] or AUTO, *(name or None for name in choices[1:]))
    if not path:
        if not given and (traits.by_importance or traits.by_replay):
            print(
                "pyheadkv: without -m FILE nothing is known of a model but what its metadata has: name a file with --kv-importance",
                file=sys.stderr,
            )
        return []
    values, shares = (read_importance(given), read_replay(given)) if given else (None, None)
    found = find_importance(path) if traits.by_importance and values is None else None
    table = find_replay(path) if traits.by_replay and shares is None else None
    origins = [(what, known.origin) for what, known in (("importance", found), ("replay table", table)) if known is not None]
    if given and values is None and shares is None or all(origin == IN_METADATA for _, origin in origins):
        return []
    for what, origin in origins:
        print(f"pyheadkv: {what} from {origin}", file=sys.stderr)
    known = (values if found is None else found.importance), (shares if table is None else table.table)
    return ["--kv-importance", str(write_gguf(path, *known))]


def run(args: argparse.Namespace) -> int:
    """Become llama-server; where a process cannot, wait for it and return its exit code."""
    if not HELP_FLAGS.isdisjoint(args.arguments):
        print("usage: pyheadkv serve [MODEL.gguf] [flags of llama-server]\n", flush=True)
        sys.exit(subprocess.run([str(server_path()), "--help"]).returncode)
    command = command_line(args.arguments)
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.run(command).returncode
