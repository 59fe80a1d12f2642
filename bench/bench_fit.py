"""Cost of fitting values, as a share of reading the prompt, and what the fit does to the residual.

    python bench/bench_fit.py qwen25-coder-0.5b.gguf --out bench/results/fit.md

Both times are those of one reading, so that other load counts for both. Beside it the same prompt without the fit: what reading takes
in memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from pyheadkv import Llama
from pyheadkv.eval.journal import commit, machine


def text_of(folder: Path) -> str:
    """Prose of this repository."""
    files = [folder / "README.md", folder / "CONTRIBUTING.md", folder / "CHANGELOG.md", *sorted((folder / "docs").glob("*.md"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def row_of(model: Path, prompt: list[int], n_threads: int, args: argparse.Namespace) -> str:
    """One line of the table."""
    reads, fits, compressions, peaks = [], [], [], {}
    for fit in ("none", "values"):
        llm = Llama(model, n_ctx=len(prompt) + 16, kv_ratio=args.share, rank=args.rank, fit=fit, n_threads=n_threads,
                    n_threads_batch=n_threads, verbose=False)  # fmt: skip
        for _ in range(args.rounds if fit == "values" else 1):
            start = time.perf_counter()
            llm.read_prompt(prompt)
            if fit == "values":
                reads.append(time.perf_counter() - start)
                fits.append(llm.kv_stats().fit_ms / 1000)
                compressions.append(llm.kv_stats().compress_ms / 1000)
        stats = llm.kv_stats()
        peaks[fit] = stats.bytes_peak
        llm.close()
    shares = [fit / (read - fit) for fit, read in zip(fits, reads)]
    return (
        f"| {len(prompt)} | {n_threads} | {statistics.median(reads):.1f} | {statistics.median(compressions):.2f} | "
        f"{statistics.median(fits):.2f} | **{100 * statistics.median(shares):.1f}** ({100 * min(shares):.1f}-{100 * max(shares):.1f}) | "
        f"{stats.n_heads_fitted} | {stats.fit_before:.3f} | {stats.fit_after:.3f} | "
        f"{peaks['none'] / 2**20:.1f} | {peaks['values'] / 2**20:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", default="2048,8192", metavar="LIST", help="tokens (default: %(default)s)")
    parser.add_argument("--threads", default="1,2", metavar="LIST", help="(default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.06, metavar="X", help="of the cells that is kept (default: %(default)s)")
    parser.add_argument("--rank", default="value", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md")
    args = parser.parse_args()

    lengths, threads = ([int(n) for n in text.split(",")] for text in (args.lengths, args.threads))
    vocabulary = Llama(args.model, n_ctx=256, vocab_only=True, verbose=False)
    text = text_of(Path(__file__).resolve().parents[1])
    tokens = vocabulary.tokenize(text.encode())
    vocabulary.close()
    tokens *= -(-max(lengths) // len(tokens))
    lines = [
        f"# Fitting values: {args.model.stem}, {args.share:.0%} of the cells",
        "",
        f"`python bench/{' '.join(Path(a).name for a in sys.argv)}`, commit {commit()}, {machine()}. Prose of this",
        f"repository; median of {args.rounds} readings, smallest and largest in parentheses. Residuals: what the kept cells miss of the answers of",
        "all cells to queries of the prompt that are held out, mean squares relative to these, mean over the heads that dropped cells.",
        "",
        "| tokens | threads | reading, s | of it compression, s | of it fit, s | fit, % of the rest | heads fitted | residual before | after | "
        "peak without, MiB | with |",
        "|" + "---|" * 11,
    ]
    for n in lengths:
        for n_threads in threads:
            lines.append(row_of(args.model, tokens[:n], n_threads, args))
            print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
