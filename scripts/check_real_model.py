"""Kept cells and fitted values of a real model, beside the NumPy definition of the engine.

    python scripts/check_real_model.py MODEL.gguf --tokens 600,1500 -o check_real_model.md

The definition (pyheadkv/testing/reference.py) is given the engine's own queries, keys and values. Two cells whose scores are nearly
equal may change places, since the engine sums in f32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyheadkv import Llama
from pyheadkv.eval.report import table
from pyheadkv.model import read_shape
from pyheadkv.testing import oracle

TEXT = Path(__file__).parent.parent / "pyheadkv" / "data" / "haystack.txt"
POLICIES = "headkv,replay/value,mix/attention*value,uniform/value"
FITTED = "replay/value/values"
F16, F32 = 1, 0


@dataclass(frozen=True)
class Heads:
    """Of a model whose compressed layers are alike."""

    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    head_dim_v: int
    layers: tuple[int, ...]  # that are compressed


def heads_of(path: Path) -> Heads:
    shape = read_shape(path)
    layers = tuple(il for il, heads in enumerate(shape.heads) if heads != (0, 0))
    if len({shape.heads[il] for il in layers}) != 1:
        raise SystemExit(f"{path}: layers have different heads: name another model")
    return Heads(shape.n_layer, shape.n_head, shape.n_head_kv, shape.n_embd_head_k, shape.n_embd_head_v, layers)


def open_model(path: Path, policy: str, args: argparse.Namespace, *, n_tokens: int, type_kv: int = F16) -> Llama:
    return Llama(
        path,
        kv_size=args.kv_size,
        policy=policy,
        prefill="token",
        n_ctx=n_tokens + 64,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        type_k=type_kv,
        type_v=type_kv,
        verbose=False,
    )


def check_kept(llm: Llama, heads: Heads, prompt: Sequence[int]) -> list[str]:
    """One line of the table: positions beside those of the definition."""
    llm.eval(prompt)
    expected = [rows.tolist() for layer in oracle.kept_of(llm, heads) for rows in layer]
    llm.end_prompt()
    got = [rows.tolist() for layer in oracle.kept_by(llm, heads) for rows in layer]
    n = sum(len(rows) for rows in expected)
    n_equal = sum(len(set(a) & set(b)) for a, b in zip(got, expected, strict=True))
    n_alike = sum(a == b for a, b in zip(got, expected, strict=True))
    counts = "equal" if [len(a) for a in got] == [len(a) for a in expected] else "DIFFERENT"
    return [llm.policy, str(len(prompt)), str(n), f"{100 * n_equal / n:.3f} %", f"{n_alike} of {len(expected)}", counts]


def check_fitted(llm: Llama, heads: Heads, prompt: Sequence[int]) -> list[str]:
    """One line: values of every head beside the ridge regression of the definition."""
    expected, before = oracle.fit_of(llm, heads, prompt)
    ours, stats = oracle.rows(llm, heads, v=True), llm.kv_stats()
    errors = [np.mean((ours[h] - values) ** 2) / np.mean(values**2) for h, (values, *_) in expected.items()]
    largest = max(np.abs(ours[h] - values).max() / np.sqrt(np.mean(values**2)) for h, (values, *_) in expected.items())
    moved = np.median([np.mean((before[h] - values) ** 2) / np.mean(values**2) for h, (values, *_) in expected.items()])
    dropped = [h for h in expected if len(expected[h][0]) < len(prompt)]
    residuals = [np.mean([expected[h][i] for h in dropped]) for i in (1, 2)]
    n_fitted = sum(expected[h][2] < expected[h][1] for h in dropped)
    return [
        {F16: "f16", F32: "f32"}[llm.context_params.type_v],
        str(len(prompt)),
        f"{stats.n_heads_fitted}, {n_fitted}",
        f"{max(errors):.1e}",
        f"{largest:.1e}",
        f"{moved:.1e}",
        f"{stats.fit_before:.5f} -> {stats.fit_after:.5f}",
        f"{residuals[0]:.5f} -> {residuals[1]:.5f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--tokens", default="600,1500", metavar="LIST", help="of the text (default: %(default)s)")
    parser.add_argument("--kv-size", type=int, default=96, metavar="N", help="mean cells per KV head (default: %(default)s)")
    parser.add_argument("--policies", default=POLICIES, metavar="LIST", help="(default: %(default)s)")
    parser.add_argument("--fitted", default=FITTED, metavar="POLICY", help="one whose values are fitted (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="also write it there")
    args = parser.parse_args()
    heads, lengths = heads_of(args.model), [int(n) for n in args.tokens.split(",")]

    kept, fitted = [], []
    for n in lengths:
        for policy in args.policies.split(","):
            llm = open_model(args.model, policy, args, n_tokens=n)
            prompt = llm.tokenize(TEXT.read_bytes())[:n]
            kept.append(check_kept(llm, heads, prompt))
            print(*kept[-1], sep=" | ", flush=True)
            llm.close()
        for type_kv in (F16, F32):
            llm = open_model(args.model, args.fitted, args, n_tokens=n, type_kv=type_kv)
            fitted.append(check_fitted(llm, heads, prompt))
            print(*fitted[-1], sep=" | ", flush=True)
            llm.close()
    other = "".join(
        f" --{name} {value}" for name, value in (("policies", args.policies), ("fitted", args.fitted)) if value not in (POLICIES, FITTED)
    )
    text = "\n".join(
        [
            "# A real model beside the NumPy definition\n",
            f"`python scripts/check_real_model.py {args.model.name} --tokens {args.tokens} --kv-size {args.kv_size}"
            f"{other}`: the first tokens of "
            f"`pyheadkv/data/haystack.txt`, {len(heads.layers)} of {heads.n_layer} layers, {heads.n_head} query and {heads.n_head_kv} KV heads of {heads.head_dim}. "
            "The definition is given the engine's own queries, keys and values.\n",
            "Kept cells of all heads:\n",
            *table(["policy", "tokens", "cells", "equal positions", "heads that are equal", "cells per head"], kept),
            f"\nValues that `{args.fitted}` fits. Errors are relative to the mean square, or its root, of the values of a head; moved: what the "
            "old values would have, median over the heads. Residuals of the queries that are held out, before and after.\n",
            *table(
                [
                    "cache",
                    "tokens",
                    "heads fitted, ours and theirs",
                    "worst NMSE of a head",
                    "largest error",
                    "moved",
                    "residuals, ours",
                    "theirs",
                ],
                fitted,
            ),
            "",
        ]
    )
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
