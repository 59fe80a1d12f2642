"""``pyheadkv inspect --prompt FILE``: what the heads of a model hold of a text."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ..model import model_path
from ..options import AUTO, check_extra, check_int, policy_traits
from ..picture import read_held
from .arguments import given, threads_kwargs

SUFFIXES = (".png", ".svg", ".pdf", ".html")
ONLY = ("chat", "threads")  # options that mean nothing without a prompt


def add_arguments(group: argparse._ActionsContainer) -> None:
    """``--prompt`` and what belongs to it."""
    group.add_argument("--prompt", metavar="FILE", help="read this text (UTF-8, - = standard input), and show what each head kept of it")
    group.add_argument("--chat", action="store_true", help="as a user message of the model's chat template")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")


def is_asked(args: argparse.Namespace) -> bool:
    """A prompt is to be read.

    Raises
    ------
    ValueError : it is not, but options of it are given
    """
    if args.prompt is None:
        for name in ONLY:
            if getattr(args, name):
                raise ValueError(f"--{name} without --prompt: name the text with --prompt FILE")
        if args.output is not None and args.output.endswith(".html"):
            raise ValueError(f"output {args.output} without --prompt: a page shows a text, name it with --prompt FILE, or draw to FILE.png")
    return args.prompt is not None


def run(args: argparse.Namespace) -> int:
    """Read the text, print what each head holds, draw it when asked to."""
    from tqdm import tqdm

    from ..llama import Llama
    from . import generate, inspect

    output = _output(args.output)
    path = model_path(args.model)
    text = generate.read_prompt(None if args.prompt == "-" else args.prompt)
    if args.n_ctx is None:
        n_ctx = generate.fit_n_ctx(path, text, n_more=1 + generate.N_CHAT_TEMPLATE * args.chat, kv_size=args.kv_size)
    else:
        n_ctx = check_int("--n-ctx", args.n_ctx, 1, 1 << 30)
    options = given(args, "kv_size", *inspect.BUDGET_OPTIONS, "importance", "replay")
    if policy_traits(args.policy or AUTO, args.budget, args.rank, args.fit).keeps_all:
        del options["kv_size"]  # it has a default
    llm = Llama(path, **options, n_ctx=n_ctx, verbose=False, **threads_kwargs(args.threads))
    try:
        begin = time.perf_counter()
        # disable=None: no bar unless standard error is a terminal
        with tqdm(desc="reading the prompt", unit=" tokens", leave=False, disable=None) as bar:

            def show(il: int, n_layer: int, i_token: int, n_tokens: int) -> None:
                bar.total = n_tokens
                bar.update((il * n_tokens + i_token) // n_layer - bar.n)

            llm.set_progress(show)
            if args.chat:
                llm.create_chat_completion([{"role": "user", "content": text}], max_tokens=1)
            else:
                llm.read_prompt(llm.tokenize(text.encode(), special=True))
        seconds = time.perf_counter() - begin
        held = read_held(llm)
        amount = f", kv_size {options['kv_size']}" if "kv_size" in options else ""
        print(f"prompt  {held.n_prompt} tokens of {args.prompt}, read in {seconds:.1f} s with policy {llm.policy}{amount}")
        print(f"held    {held.summary}\n")
        bars = inspect.bars(held.n_cells, [int((row > 0).sum()) for row in held.n_cells])
        print("\n".join(inspect.table_lines(held.n_cells, bars, legend="cells held")))
        if output is not None:
            if output.suffix == ".html":
                llm.kv_text().save(output)
            else:
                llm.kv_plot().savefig(output, dpi=150)
            print(f"picture written to {output}", file=sys.stderr)
    finally:
        llm.close()
    return 0


def _output(name: str | None) -> Path | None:
    if name is None:
        return None
    output = Path(name)
    if output.suffix not in SUFFIXES or not output.parent.is_dir() or output.is_dir():
        raise ValueError(f"output {output}: name a file that ends in {', '.join(SUFFIXES)}, in a folder that exists")
    if output.suffix != ".html":
        check_extra("the picture", "matplotlib")
    return output
