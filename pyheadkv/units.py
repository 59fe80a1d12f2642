"""Sizes: bytes that people read and write, bytes of cells, tokens of a context."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
CELL_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")  # as --cache-type-k of llama.cpp
N_CTX_STEP = 256  # tokens, llama.cpp rounds contexts up to it


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes of ``"8GiB"``, ``"512MiB"``, ``"6GB"`` or a plain number.

    Raises
    ------
    ValueError
        anything else, and sizes below one byte
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", str(value).strip(), flags=re.IGNORECASE)
    unit = UNITS.get(found[2].upper()) if found else None
    n_bytes = int(Fraction(found[1]) * unit) if found and unit else 0
    if n_bytes < 1:
        raise ValueError(f"{name}={value!r}: it must be a positive size such as 8GiB, 512MiB, 6GB or a number of bytes")
    return n_bytes


def ggml_type(name: str) -> int:
    """Number of a type of cells, such as ``"q8_0"``."""
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[name.upper()])


def check_cell_type(name: str, value: Any) -> None:
    """A number of a type that cells may have, or None; with others the library ends the process, or computes with whole numbers.

    Raises
    ------
    ValueError
        names those that there are
    """
    numbers = {ggml_type(cell_type): cell_type for cell_type in CELL_TYPES}
    if value is not None and (isinstance(value, (bool, float)) or value not in list(numbers)):
        known = ", ".join(f"{n} = {cell_type}" for n, cell_type in numbers.items())
        raise ValueError(f"{name}={value!r}: it must be the number of a type, one of {known}")


def row_bytes(cell_type: str | int, n_values: int) -> int:
    """Bytes of one K or one V.

    Raises
    ------
    ValueError
        the values do not fill the blocks of the type
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(ggml_type(cell_type) if isinstance(cell_type, str) else cell_type)
    n_block, n_bytes = GGML_QUANT_SIZES[kind]
    if n_values % n_block:
        raise ValueError(f"{kind.name.lower()} joins {n_block} values to a block, which heads of {n_values} values do not fill: use f16")
    return n_values // n_block * n_bytes


def format_bytes(n_bytes: float) -> str:
    """Bytes with a binary unit, e.g. ``"1.50 MiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def round_n_ctx(n_tokens: int) -> int:
    """Context that llama.cpp really allocates for so many tokens; llama_cpp.Llama wants to be told that number."""
    return -(-n_tokens // N_CTX_STEP) * N_CTX_STEP
