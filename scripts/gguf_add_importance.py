#!/usr/bin/env python3
"""Put head importance into a GGUF model: a copy with other metadata, tensors untouched.

SCORES is the authors' JSON {"layer-head": [score, ..], ..}, {"importance": [[value, ..], ..]} as pyheadkv score
writes it, a DuoAttention pattern (.tsv), or a matrix of one row per layer (.npy, .csv). A column per KV head counts for
each of its query heads.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_gguf_keys() -> ModuleType:
    """pyheadkv.gguf_keys alone: this script must not need the compiled library that the package loads."""
    path = ROOT / "pyheadkv" / "gguf_keys.py"
    if not path.exists():  # the script was copied out of the tree
        return importlib.import_module("pyheadkv.gguf_keys")
    spec = importlib.util.spec_from_file_location("_pyheadkv_gguf_keys", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded: check out the repository again")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
    gguf_keys = load_gguf_keys()
    try:
        scores = gguf_keys.load_scores(args.scores)
        values = gguf_keys.fit_heads(scores.values, args.model)
        source = args.source
        if source is None:
            source = f"{args.scores.name} sha256:{hashlib.sha256(args.scores.read_bytes()).hexdigest()}"
        gguf_keys.write_importance(args.model, args.out, values, method=args.method, source=source, beta=scores.beta, force=args.force)
    except (ValueError, OSError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    print(f"{args.out}: importance of {values.shape[0]} layers x {values.shape[1]} heads added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
