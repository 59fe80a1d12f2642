"""A model with the weights of a quantised one written as f16: the same numbers, which a CPU without AVX512 reads faster.

    python scripts/weights_as_f16.py qwen25-coder-0.5b.gguf qwen25-coder-0.5b-f16.gguf

Long evaluations were run on such files where their tables say so.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import llama_cpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"error: {args.out} exists: name a new file")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_F16
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(args.model).encode(), str(args.out).encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"error: {args.model} could not be written as f16: llama.cpp says why above")


if __name__ == "__main__":
    main()
