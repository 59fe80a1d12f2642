#!/usr/bin/env python3
"""Put head importance into a GGUF model: a copy with other metadata, tensors untouched.

SCORES is the authors' JSON {"layer-head": [score, ..], ..}, {"importance": [[value, ..], ..]} as pyheadkv score
writes it, a DuoAttention pattern (.tsv), or a matrix of one row per layer (.npy, .csv). A column per KV head counts for
each of its query heads.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent.parent / "pyheadkv"
if "pyheadkv" not in sys.modules and PACKAGE.is_dir():  # its __init__ wants the compiled library, which this script does not need
    sys.modules["pyheadkv"] = ModuleType("pyheadkv")
    sys.modules["pyheadkv"].__path__ = [str(PACKAGE)]

from pyheadkv.gguf_keys import write_importance  # noqa: E402
from pyheadkv.importance_values import fit_heads  # noqa: E402
from pyheadkv.score_files import load_scores  # noqa: E402


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="model to copy")
    parser.add_argument("scores", type=Path, metavar="SCORES", help="importance of its query heads")
    parser.add_argument("out", type=Path, metavar="OUT.gguf", help="file to write")
    parser.add_argument("--method", default="headkv-r2", help="how it was measured (default: %(default)s)")
    parser.add_argument("--source", help="where it came from (default: name and SHA-256 of SCORES)")
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf and an importance already in the model")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 refused with one line on stderr."""
    args = parse_args(argv)
    try:
        scores = load_scores(args.scores)
        values = fit_heads(scores.values, args.model)
        source = args.source
        if source is None:
            source = f"{args.scores.name} sha256:{hashlib.sha256(args.scores.read_bytes()).hexdigest()}"
        write_importance(args.model, args.out, values, method=args.method, source=source, beta=scores.beta, force=args.force)
    except (ValueError, OSError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    print(f"{args.out}: importance of {values.shape[0]} layers x {values.shape[1]} heads added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
