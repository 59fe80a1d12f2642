"""Head importance as GGUF metadata: names and types of the keys, reading and writing them.

=========================================  ==============  =======================================================
key                                        type            meaning
=========================================  ==============  =======================================================
``{arch}.attention.head_importance``        array of F32    n_layer * n_head values, row-major, >= 0, not normalised
                                            or F64
``{arch}.attention.head_importance.shape``   array of U32    [n_layer, n_head]
``{arch}.attention.head_importance.method``  string          how it was measured, e.g. "headkv-r2"
``{arch}.attention.head_importance.source``  string          where it came from
``{arch}.attention.head_importance.version`` U32             1
``{arch}.attention.head_importance.beta``    F64             beta that suits these scores; may be missing
=========================================  ==============  =======================================================

Values that float32 cannot hold exactly are stored as F64: rounding the authors' Mistral R2 importance to float32
changes one head's budget at kv_size 512, beta 2, and in about 4 % of all settings.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .atomic_write import check_destination, replace_file
from .gguf_copy import Field, copy_with_fields
from .gguf_header import ARRAY, FLOAT32, FLOAT64, STRING, TYPE_NAMES, UINT32, Header, PathLike, read_header
from .importance_values import VERSION, Importance, check_beta, check_importance, check_model_heads

if TYPE_CHECKING:
    import gguf

KEY_IMPORTANCE = "{arch}.attention.head_importance"
KEY_SHAPE = KEY_IMPORTANCE + ".shape"
KEY_METHOD = KEY_IMPORTANCE + ".method"
KEY_SOURCE = KEY_IMPORTANCE + ".source"
KEY_VERSION = KEY_IMPORTANCE + ".version"
KEY_BETA = KEY_IMPORTANCE + ".beta"

REMEDY_WRITE = "write it with 'pyheadkv score MODEL.gguf --write OUT.gguf'"


def read_importance(path: PathLike) -> Importance | None:
    """Importance stored in a GGUF; None when it has no such keys.

    Raises
    ------
    ValueError : the file or its keys are damaged, or do not fit the model's block_count and head_count
    """
    return _importance_of(read_header(path))


def write_importance(
    src: PathLike,
    dst: PathLike,
    importance: ArrayLike,
    *,
    method: str = "",
    source: str = "",
    beta: float | None = None,
    force: bool = False,
) -> None:
    """Copy a GGUF and set its importance; other keys and all tensors keep their bytes.

    The copy is written beside ``dst``, flushed to the disk and then renamed: after an error there is no new file.

    Parameters
    ----------
    src : model to copy
    dst : file to write, another one than ``src``
    importance : (n_layer, n_head), >= 0, at least one > 0
    beta : that suits it; None = not stored
    force : replace an existing ``dst`` and an importance that ``src`` already has
    """
    src, dst = Path(src), Path(dst)
    check_destination(src, dst, force=force)
    header = read_header(src)
    values = check_importance(importance, name="importance")
    if header.value("split.count") not in (None, 0, 1):
        raise ValueError(f"{src}: split.count = {header.value('split.count')}: merge the parts with llama-gguf-split --merge")
    old_keys = {name for name in header.pairs if name.startswith(KEY_IMPORTANCE.format(arch=header.arch))}
    if old_keys and not force:
        raise ValueError(f"{src}: {sorted(old_keys)[0]} is already there: pass force=True (--force) to replace it")
    check_model_heads(header, values)
    fields = importance_fields(values, arch=header.arch, method=method, source=source, beta=beta)
    replace_file(dst, lambda out: copy_with_fields(header, out, fields, without=old_keys))


def add_importance_keys(
    writer: gguf.GGUFWriter, importance: ArrayLike, *, n_layer: int, n_head: int, method: str = "", source: str = ""
) -> None:
    """Set the importance of a model that a gguf.GGUFWriter is about to write.

    Parameters
    ----------
    importance : (n_layer, n_head), >= 0, at least one > 0
    """
    import gguf

    values = check_importance(importance, name="importance")
    if values.shape != (n_layer, n_head):
        raise ValueError(f"importance has shape {values.shape}, the model {(n_layer, n_head)}: pass (n_layer, n_head)")
    for key, vtype, sub_type, value in importance_fields(values, arch=writer.arch, method=method, source=source):
        sub = None if sub_type is None else gguf.GGUFValueType(sub_type)
        writer.add_key_value(key, value, gguf.GGUFValueType(vtype), sub)


def importance_fields(
    values: NDArray[np.float64], *, arch: str, method: str = "", source: str = "", beta: float | None = None
) -> list[Field]:
    """The keys to write, each as (name, GGUF type, type of array elements or None, value)."""
    with np.errstate(over="ignore", under="ignore"):
        exact = np.array_equal(values.astype(np.float32).astype(np.float64), values)
    fields: list[Field] = [
        (KEY_IMPORTANCE.format(arch=arch), ARRAY, FLOAT32 if exact else FLOAT64, values.ravel().tolist()),
        (KEY_SHAPE.format(arch=arch), ARRAY, UINT32, list(values.shape)),
        (KEY_METHOD.format(arch=arch), STRING, None, method),
        (KEY_SOURCE.format(arch=arch), STRING, None, source),
        (KEY_VERSION.format(arch=arch), UINT32, None, VERSION),
    ]
    if beta is not None:
        fields.append((KEY_BETA.format(arch=arch), FLOAT64, None, check_beta(beta, name="beta")))
    return fields


def _importance_of(header: Header) -> Importance | None:
    prefix = KEY_IMPORTANCE.format(arch=header.arch)
    if not any(name == prefix or name.startswith(prefix + ".") for name in header.pairs):
        return None
    version = typed(header, KEY_VERSION, (UINT32,))
    if version != VERSION:
        raise ValueError(f"{header.path}: {prefix}.version = {version}, readable is {VERSION}: update pyheadkv or {REMEDY_WRITE}")
    flat = typed(header, KEY_IMPORTANCE, (FLOAT32, FLOAT64), array=True)
    shape = tuple(typed(header, KEY_SHAPE, (UINT32,), array=True).tolist())
    if len(shape) != 2 or math.prod(shape) != len(flat):
        raise ValueError(f"{header.path}: {prefix}.shape = {list(shape)} does not fit {len(flat)} values: {REMEDY_WRITE}")
    values = check_importance(flat.reshape(shape), name=f"{header.path}: {prefix}")
    check_model_heads(header, values)
    method, source = (typed(header, key, (STRING,)) for key in (KEY_METHOD, KEY_SOURCE))
    beta = None
    if KEY_BETA.format(arch=header.arch) in header.pairs:
        beta = check_beta(typed(header, KEY_BETA, (FLOAT64,)), name=f"{header.path}: {prefix}.beta")
    return Importance(values, method, source, version, header.arch, beta)


def typed(header: Header, key: str, types: tuple[int, ...], *, array: bool = False, remedy: str = REMEDY_WRITE) -> Any:
    """Value of a key that must be there with one of these types (of its elements, for an array)."""
    name = key.format(arch=header.arch)
    pair = header.pairs.get(name)
    wanted = " or ".join(TYPE_NAMES[t] for t in types)
    if pair is None:
        raise ValueError(f"{header.path}: key {name} is missing, expected {wanted}: {remedy}")
    found = pair.sub_type if pair.type == ARRAY else pair.type
    if found not in types or (pair.type == ARRAY) != array:
        kind = "array of " if pair.type == ARRAY else ""
        want_kind = "array of " if array else ""
        raise ValueError(f"{header.path}: key {name} is {kind}{TYPE_NAMES[found or 0]}, expected {want_kind}{wanted}: {remedy}")
    return pair.value
