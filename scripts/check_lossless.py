"""Answers with nothing evicted (``policy="lossless"``), beside those of the stock cache, on a real model.

    python scripts/check_lossless.py MODEL.gguf ... --tokens 4096 -o check_lossless.md

Each reads the same prompt, ours layer by layer; then all are given the tokens that the stock cache says next. Kernels sum in different
orders, and what is quantised anew in each layer makes more of it, so that tokens of nearly equal likelihood may change places: the stock cache
without flash attention is beside it, which is another kernel for the same thing.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from pyheadkv import Llama
from pyheadkv.eval.journal import commit, machine
from pyheadkv.eval.report import table
from pyheadkv.eval.trial import log_softmax

TEXT = Path(__file__).parent.parent / "pyheadkv" / "data" / "haystack.txt"


def read(model: Path, tokens: list[int], n_threads: int, **options: Any) -> tuple[Llama, float]:
    """The prompt in a new context, and the seconds that it took."""
    llm = Llama(
        str(model),
        n_ctx=len(tokens) + 512,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        verbose=False,
        **{"flash_attn": True, **options},
    )
    start = time.perf_counter()
    if "policy" in options:
        llm.read_prompt(tokens)
    else:
        llm.eval(tokens)
    return llm, time.perf_counter() - start


def compare(model: Path, texts: list[Path], n_tokens: int, n_next: int, n_threads: int, *, is_short: bool) -> list[str]:
    """One row; ``is_short``: without the stock cache without flash attention."""
    with closing(Llama(str(model), vocab_only=True, verbose=False)) as words:
        tokens = words.tokenize(b"\n".join(text.read_bytes() for text in texts))[:n_tokens]
    if len(tokens) < n_tokens:
        raise SystemExit(f"error: --tokens {n_tokens}: the text has {len(tokens)}, give more with --text")
    stock, seconds = read(model, tokens, n_threads)
    others = [read(model, tokens, n_threads, policy="lossless")]
    if not is_short:
        others.append(read(model, tokens, n_threads, flash_attn=False))
    same, kl, gap = [0, 0], [0.0, 0.0], [0.0, 0.0]
    for _ in range(n_next):
        a = log_softmax(stock.last_logits)
        best = int(a.argmax())
        for i, (llm, _) in enumerate(others):
            b = log_softmax(llm.last_logits)
            same[i] += int(b.argmax()) == best
            kl[i] += float((np.exp(a) * (a - b)).sum()) / n_next
            gap[i] = max(gap[i], float(a[best] - a[int(b.argmax())]))
            llm.eval([best])
        stock.eval([best])
    if not (others[0][0].kv_stats().n_cells == n_tokens + n_next).all():
        raise RuntimeError("cells are missing")
    for llm in (stock, *(llm for llm, _ in others)):
        llm.close()
    found = [f"{same[i]} of {n_next}, {kl[i]:.1e}, {gap[i]:.2f}" if i < len(others) else "-" for i in (0, 1)]
    return [model.name, str(n_tokens), *found, f"{others[0][1] / seconds:.2f}"]


def main() -> None:
    """A row for each model and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--tokens", default="4096", metavar="LIST", help="(default: %(default)s)")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[TEXT], metavar="FILE", help="one behind the other (default: the haystack of the package)"
    )
    parser.add_argument("--next", type=int, default=64, metavar="N", help="tokens that follow (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="leave out the stock cache without flash attention, which takes longest")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.md")
    args = parser.parse_args()
    head = ["model", "prompt tokens", "ours", "stock without flash attention", "time of reading, ours / stock's"]
    rows = []
    for model in args.model:
        for n in map(int, args.tokens.split(",")):
            rows.append(compare(model, args.text, n, args.next, args.threads, is_short=args.short))
            print(*rows[-1], flush=True)
    named = " ".join(m.name for m in args.model)
    names = [text.name for text in args.text]
    given = ("" if args.text == [TEXT] else f" --text {' '.join(names)}") + " --short" * args.short
    text = [
        "# Nothing evicted, beside the stock cache",
        "",
        f"`python scripts/check_lossless.py {named} --tokens {args.tokens}{given} --next {args.next} --threads {args.threads}`, {machine()}, commit",
        f"{commit()}: the first tokens of {', '.join(names)}, then what the stock cache with flash attention says next. How often the next token is the",
        "same, KL from the stock cache's distribution of it (mean, nats), and how much likelier at most the stock cache finds its own token where it is not.",
        "",
        *table(head, rows),
        "",
    ]
    args.output.write_text("\n".join(text))


if __name__ == "__main__":
    main()
