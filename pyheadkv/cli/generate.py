"""``pyheadkv generate``: continue a prompt."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..archive import TYPES
from ..model import model_path, read_shape
from ..options import GENERATED_RANKS, POOLS, PREFILLS, PRESETS, SCOPES, Options, check_int
from ..units import format_bytes, round_n_ctx
from . import inspect
from .arguments import AMOUNTS, add_amount_arguments, add_keep_arguments, given, parse_span, threads_kwargs
from .inspect import BUDGET_OPTIONS

if TYPE_CHECKING:
    from ..llama import Llama

ARCHIVE = ("kv_archive", "kv_archive_size", "kv_archive_type")
GENERATED = ("kv_generated", "kv_generated_scope", "kv_generated_rank", "kv_generated_slack")
N_CHAT_TEMPLATE = 256  # tokens that a chat template may add to one message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``pyheadkv generate``."""
    parser.add_argument("model", nargs="?", metavar="MODEL.gguf", help="model (default: the embedded one)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", help="prompt (default: standard input)")
    source.add_argument("-f", "--file", metavar="FILE", help="file that holds the prompt, UTF-8")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user message of the model's chat template")
    parser.add_argument(
        "-n",
        "--n-predict",
        type=int,
        default=128,
        metavar="N",
        help="tokens to generate at most (default: %(default)s)",
    )
    parser.add_argument("--temp", type=float, default=0.0, metavar="X", help="temperature, 0 = greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: %(default)s)")
    _add_cache_arguments(parser.add_argument_group("KV cache"))
    _add_engine_arguments(parser.add_argument_group("engine"))


def _add_cache_arguments(group: argparse._ArgumentGroup) -> None:
    inspect.add_budget_arguments(group, kv_size=None)
    add_amount_arguments(group)
    add_keep_arguments(group)
    group.add_argument("--pool", choices=tuple(POOLS), help=f"pooling of the scores (default: {PRESETS['default']['pool']})")
    group.add_argument(
        "--pool-kernel",
        type=int,
        metavar="N",
        help=f"scores, odd, 1 = none, 0 = by each head's cells (default: {PRESETS['default']['pool_kernel']})",
    )
    group.add_argument(
        "--prefill",
        choices=tuple(PREFILLS),
        help=f"order in which the prompt is read; layer keeps one layer's full cache at a time (default: {Options.prefill})",
    )
    add_generated_arguments(group)
    add_archive_arguments(group)


def add_generated_arguments(group: argparse._ActionsContainer) -> None:
    """``--kv-generated``, its scope, rank and slack."""
    group.add_argument(
        "--kv-generated", type=int, metavar="N", help="cells per KV head that generated tokens may hold on average (default: all stay)"
    )
    group.add_argument(
        "--kv-generated-scope",
        choices=tuple(SCOPES),
        help=f"which cells compete then: of generated tokens, or all (default: {Options.kv_generated_scope})",
    )
    group.add_argument(
        "--kv-generated-rank", choices=tuple(GENERATED_RANKS), help=f"which of them stay (default: {Options.kv_generated_rank})"
    )
    group.add_argument(
        "--kv-generated-slack",
        type=int,
        metavar="N",
        help=f"tokens from one eviction to the next (default: {Options.kv_generated_slack})",
    )


def add_archive_arguments(group: argparse._ActionsContainer) -> None:
    """``--kv-archive``, its size and its type."""
    group.add_argument(
        "--kv-archive",
        metavar="DIR",
        help="folder where K and V of all prompt tokens are kept: a later prompt that begins the same is read from where it differs (default: none)",
    )
    group.add_argument("--kv-archive-size", metavar="SIZE", help="bytes that it may take (default: 20GiB)")
    group.add_argument("--kv-archive-type", choices=TYPES, help="what it rounds K and V to (default: as the cache has them)")


def _add_engine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--n-ctx",
        type=int,
        metavar="N",
        help="context in tokens, rounded up to a multiple of 256 "
        "(default: what the prompt and -n need, at most the context length of the model)",
    )
    group.add_argument("--n-batch", type=int, default=512, metavar="N", help="prompt tokens per step (default: %(default)s)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: half of the CPUs, all for the prompt)")
    group.add_argument("--n-gpu-layers", type=int, default=0, metavar="N", help="layers on the GPU, -1 = all (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Stream a completion to standard output and one line of numbers to standard error."""
    check_int("-n", args.n_predict, 1, 1 << 30)
    check_int("--n-batch", args.n_batch, 1, 1 << 20)
    path, prompt = model_path(args.model), _read_prompt(args)
    if args.n_ctx is None:
        n_ctx = fit_n_ctx(path, prompt, n_more=_n_more(args), kv_size=args.kv_size)
    else:
        n_ctx = round_n_ctx(check_int("--n-ctx", args.n_ctx, 1, 1 << 30))
    llm = _open_model(path, args, n_ctx=n_ctx)
    try:
        meter = Meter(llm)
        for text in _stream(llm, prompt, args, meter):
            print(text, end="", flush=True)
        print(flush=True)
        print(f"{meter.summary()} | {_kv_summary(llm, path)}", file=sys.stderr)
    finally:
        llm.close()
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return checked_prompt("-p", lambda: str(args.prompt))
    return read_prompt(args.file)


def read_prompt(file: str | None) -> str:
    """The text of a file, or of standard input for None.

    Raises
    ------
    ValueError : it is empty, not UTF-8, or no file
    """
    if file is None:
        return checked_prompt("standard input", sys.stdin.read)
    if not file or Path(file).is_dir():
        raise ValueError(f"the prompt from {file!r}: it must be a file of text in UTF-8")
    return checked_prompt(file, lambda: Path(file).read_text(encoding="utf-8"))


def checked_prompt(where: str, read: Callable[[], str]) -> str:
    """What ``read`` returns, if it is a prompt."""
    try:
        prompt = read()
        prompt.encode("utf-8")  # bytes that are none come as surrogates in arguments, and from standard input in some locales
    except UnicodeError as error:
        raise ValueError(f"the prompt from {where} is not UTF-8 ({error}): convert it, such as with iconv -f latin1 -t utf-8") from None
    if not prompt.strip():
        raise ValueError("the prompt is empty: give one with -p, -f or on standard input")
    return prompt


def _open_model(path: Path, args: argparse.Namespace, *, n_ctx: int) -> Llama:
    from ..llama import Llama

    return Llama(
        path,
        **given(
            args,
            *AMOUNTS,
            *BUDGET_OPTIONS,
            "pool",
            "pool_kernel",
            "importance",
            "replay",
            "prefill",
            "sinks",
            "surplus",
            *ARCHIVE,
            *GENERATED,
        ),
        protect=[parse_span(text) for text in args.protect] or None,
        n_ctx=n_ctx,
        n_batch=args.n_batch,
        n_gpu_layers=args.n_gpu_layers,
        swa_full=False,  # there is one prompt: windowed layers hold their window, with either cache
        seed=args.seed,
        verbose=False,
        **threads_kwargs(args.threads),
    )


def _n_more(args: argparse.Namespace) -> int:
    """Tokens beside those of the prompt that the context holds at most."""
    n_held: int = args.n_predict
    if args.kv_generated is not None:  # n_ctx bounds what is held
        n_held = min(n_held, args.kv_generated + (args.kv_generated_slack or Options.kv_generated_slack) + 1)
    return n_held + N_CHAT_TEMPLATE * int(args.chat)


def fit_n_ctx(path: Path, prompt: str, *, n_more: int, kv_size: int | None) -> int:
    """Tokens that a prompt and ``n_more`` need, up to what the model was trained on."""
    import llama_cpp
    from llama_cpp._internals import LlamaModel
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    vocab = LlamaModel(path_model=str(path), params=params, verbose=False)
    n_tokens = len(vocab.tokenize(prompt.encode(), True, True)) + n_more
    vocab.close()
    n_ctx = round_n_ctx(max(n_tokens, kv_size or 0))
    n_ctx_train = _n_ctx_train(path)
    return min(n_ctx, n_ctx_train) if n_ctx_train else n_ctx


def _n_ctx_train(path: Path) -> int:
    try:
        return read_shape(path).n_ctx_train
    except ValueError:  # not a plain transformer, which the stock cache may still serve
        return 0


def _stream(llm: Llama, prompt: str, args: argparse.Namespace, meter: Meter) -> Iterator[str]:
    options: dict[str, Any] = {
        "max_tokens": args.n_predict,
        "temperature": args.temp,
        "seed": args.seed,
        "stream": True,
    }
    if args.chat:
        chunks: Any = llm.create_chat_completion([{"role": "user", "content": prompt}], **options)
    else:
        chunks = llm.create_completion(prompt, **options)
    for chunk in chunks:
        choice = chunk["choices"][0]
        meter.stopped = choice["finish_reason"] == "stop"
        yield choice["delta"].get("content") or "" if args.chat else choice["text"]


class Meter:
    """Times the evaluations of a ``Llama`` and shows a progress bar while the prompt is read.

    Attributes
    ----------
    n_prompt, n_decoded : tokens evaluated, of the prompt and one by one after it
    seconds_prompt, seconds_decode : the time they took, sampling included
    stopped : the last token ended the text, it is not counted as generated
    """

    def __init__(self, llm: Llama) -> None:
        self.n_prompt = self.n_decoded = 0
        self.seconds_prompt = self.seconds_decode = 0.0
        self.stopped = False
        self._eval, self._decode = llm.eval, llm._ctx.decode
        self._bar: Any = None
        self._prompt_end = 0.0
        llm.eval = self._timed_eval  # type: ignore[method-assign]
        if llm.kv_options is None:
            llm._ctx.decode = self._counted_decode  # type: ignore[method-assign]
        else:
            llm.set_progress(self._show_step)

    def _timed_eval(self, tokens: Sequence[int]) -> None:
        if self.n_prompt == 0:
            self._read_prompt(tokens)
            return
        self._eval(tokens)
        self.n_decoded += len(tokens)
        self.seconds_decode = time.perf_counter() - self._prompt_end

    def _read_prompt(self, tokens: Sequence[int]) -> None:
        from tqdm import tqdm

        begin = time.perf_counter()
        # disable=None: no bar unless standard error is a terminal
        with tqdm(total=len(tokens), desc="reading the prompt", unit=" tokens", leave=False, disable=None) as self._bar:
            self._eval(tokens)
        self._bar = None
        self._prompt_end = time.perf_counter()
        self.n_prompt, self.seconds_prompt = len(tokens), self._prompt_end - begin

    def _counted_decode(self, batch: Any) -> None:
        self._decode(batch)
        if self._bar is not None:
            self._bar.update(batch.n_tokens())

    def _show_step(self, il: int, n_layer: int, i_token: int, n_tokens: int) -> None:
        if self._bar is not None:
            self._bar.n = (il * n_tokens + i_token) // n_layer
            self._bar.set_postfix_str(f"layer {il + 1}/{n_layer}" if n_layer > 1 else "", refresh=False)
            self._bar.refresh()

    def summary(self) -> str:
        """Tokens and tokens per second, of the prompt and of what was generated."""
        n_generated = self.n_decoded + 1 - self.stopped  # the last token is sampled but not evaluated
        return (
            f"prompt {self.n_prompt} tokens, {_rate(self.n_prompt, self.seconds_prompt)} | "
            f"generated {n_generated} tokens, {_rate(self.n_decoded, self.seconds_decode)}"
        )


def _rate(n_tokens: int, seconds: float) -> str:
    return f"{n_tokens / seconds:.1f} tokens/s" if seconds > 0 else "- tokens/s"


def _kv_summary(llm: Llama, path: Path) -> str:
    """Cells of each KV head, bytes of K and V held now, and of the same tokens in a full cache; of the other layers, what they hold."""
    try:
        shape = read_shape(path)
    except ValueError:  # without a compressed cache
        return "KV cache full"
    which = f" in {shape.n_compressed} of {shape.n_layer} layers" if shape.n_windowed or shape.n_recurrent else ""
    if llm.kv_options is None:
        return "KV cache full" if shape.why_not else f"KV cache {format_bytes(llm.n_tokens * shape.token_bytes)} (full{which})"
    stats = llm.kv_stats()
    beside = f"{which}, {format_bytes(stats.bytes_beside)} in the others" if which else ""
    n_held = stats.bytes_store + stats.bytes_staging
    n_cells = stats.n_cells[stats.n_cells > 0].mean()
    evicted = f", {stats.n_evictions} evictions" if stats.n_evictions else ""
    archived = f", {stats.n_archived} tokens from the archive" if stats.archive is not None else ""
    return (
        f"KV cache {n_cells:.0f} cells per head, {format_bytes(n_held)} held, full {format_bytes(stats.bytes_full)} "
        f"({n_held / max(1, stats.bytes_full):.1%}){beside}{archived}{evicted}"
    )
