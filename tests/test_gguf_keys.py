"""Importance in GGUF metadata: what is written is read, and every damaged input is a ValueError, not a crash."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from pyheadkv import gguf_keys
from pyheadkv.gguf_keys import read_importance, write_importance
from pyheadkv.score_files import load_scores
from pyheadkv.testing import random_importance, write_random_model

SCRIPT = Path(__file__).parent.parent / "scripts" / "gguf_add_importance.py"
N_LAYER, N_HEAD = 3, 4
KEY = "llama.attention.head_importance"

U32, I32, F32, BOOL, STRING, ARRAY, U64, F64 = 4, 5, 6, 7, 8, 9, 10, 12
HUGE = 2**64 - 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_random_model(path, n_layer=N_LAYER, n_embd=64, n_head=N_HEAD, n_head_kv=2, n_ff=96, seed=1, ftype="q8_0")
    return path


def exact() -> NDArray[np.float64]:
    """Importance that float32 holds exactly."""
    return random_importance(n_layer=N_LAYER, n_head=N_HEAD, seed=1)


# round trip


def test_model_without_the_keys_has_no_importance(model: Path) -> None:
    assert read_importance(model) is None


@pytest.mark.parametrize(("divisor", "element_type"), [(1, gguf.GGUFValueType.FLOAT32), (3, gguf.GGUFValueType.FLOAT64)])
def test_written_importance_is_read_without_any_rounding(
    divisor: int, element_type: gguf.GGUFValueType, model: Path, tmp_path: Path
) -> None:
    values, out = exact() / divisor, tmp_path / "out.gguf"
    write_importance(model, out, values, method="headkv-r2", source="Prüfung é")
    found = read_importance(out)
    assert found is not None
    np.testing.assert_array_equal(found.values, values)
    assert found.values.dtype == np.float64
    assert (found.method, found.source, found.version, found.arch) == ("headkv-r2", "Prüfung é", 1, "llama")
    field = gguf.GGUFReader(out).get_field(KEY)
    assert field is not None and field.types == [gguf.GGUFValueType.ARRAY, element_type]


def test_gguf_py_reads_the_keys_with_the_agreed_types(model: Path, tmp_path: Path) -> None:
    write_importance(model, tmp_path / "out.gguf", exact(), method="m", source="s")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    types = gguf.GGUFValueType
    assert fields[KEY].contents() == exact().ravel().tolist()
    assert fields[KEY + ".shape"].contents() == [N_LAYER, N_HEAD]
    assert fields[KEY + ".shape"].types == [types.ARRAY, types.UINT32]
    assert fields[KEY + ".version"].contents() == 1 and fields[KEY + ".version"].types == [types.UINT32]
    assert fields[KEY + ".method"].contents() == "m" and fields[KEY + ".source"].contents() == "s"


def test_tensors_and_other_keys_keep_their_bytes(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    write_importance(model, out, exact() / 3)
    before, after = gguf.GGUFReader(model), gguf.GGUFReader(out)
    assert [t.name for t in before.tensors] == [t.name for t in after.tensors]
    for old, new in zip(before.tensors, after.tensors):
        assert (old.tensor_type, old.shape.tolist()) == (new.tensor_type, new.shape.tolist())
        assert old.data.tobytes() == new.data.tobytes()
    assert model.read_bytes()[before.data_offset :] == out.read_bytes()[after.data_offset :]
    for name, field in before.fields.items():
        if not name.startswith("GGUF."):
            assert (field.types, field.contents()) == (after.fields[name].types, after.fields[name].contents())
    assert len(after.fields) == len(before.fields) + 5


def test_model_written_with_importance_is_read(tmp_path: Path) -> None:
    args: dict[str, Any] = {
        "arch": "qwen2",
        "n_layer": 2,
        "n_embd": 56,
        "n_head": 7,
        "n_head_kv": 1,
        "n_ff": 8,
        "seed": 4,
    }
    write_random_model(tmp_path / "m.gguf", importance="random", **args)
    found = read_importance(tmp_path / "m.gguf")
    assert found is not None and found.values.shape == (2, 7) and found.arch == "qwen2"
    np.testing.assert_array_equal(found.values, random_importance(n_layer=2, n_head=7, seed=4))


def test_force_replaces_an_old_importance_and_an_old_file(model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.gguf", tmp_path / "2.gguf"
    write_importance(model, first, exact(), method="old")
    second.write_bytes(b"old")
    with pytest.raises(ValueError, match="--force"):
        write_importance(first, second, exact() / 3)
    second.unlink()
    with pytest.raises(ValueError, match="already there.*--force"):
        write_importance(first, second, exact() / 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.gguf"]
    second.write_bytes(b"old")
    write_importance(first, second, exact() / 3, force=True)
    found = read_importance(second)
    assert found is not None and found.method == ""
    np.testing.assert_array_equal(found.values, exact() / 3)
    write_importance(model, tmp_path / "3.gguf", exact() / 3)
    assert second.read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_output_that_is_the_input_is_refused_even_with_force(model: Path, tmp_path: Path) -> None:
    before, link = model.read_bytes(), tmp_path / "link.gguf"
    link.symlink_to(model)
    for dst in (model, link):
        with pytest.raises(ValueError, match="is the input itself"):
            write_importance(model, dst, exact(), force=True)
    assert model.read_bytes() == before


def test_output_in_a_missing_folder_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        write_importance(model, tmp_path / "none" / "out.gguf", exact())


def test_error_while_writing_leaves_no_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_importance(model, tmp_path / "out.gguf", exact())
    assert not list(tmp_path.iterdir())


def test_large_vocabulary_is_read_in_a_fraction_of_a_second(tmp_path: Path) -> None:
    args: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_head_kv": 1, "n_ff": 32, "seed": 1}
    write_random_model(tmp_path / "m.gguf", n_vocab=128256, tie_embeddings=True, importance="random", **args)
    begin = time.perf_counter()
    assert read_importance(tmp_path / "m.gguf") is not None
    assert time.perf_counter() - begin < 2  # measured 0.02 s; gguf.GGUFReader needs about 6


# wrong importance for a model


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (np.ones((N_LAYER + 1, N_HEAD)), "block_count = 3"),
        (np.ones((N_LAYER, N_HEAD - 1)), "head_count = 4"),
        (np.ones((N_HEAD, N_LAYER)), r"shape \(4, 3\)"),
        (np.ones(12), r"shape \(12,\)"),
        (np.zeros((N_LAYER, N_HEAD)), "sum 0.0"),
        (np.full((N_LAYER, N_HEAD), 1e308), "sum inf"),
        (np.where(np.eye(3, 4) > 0, np.nan, 1.0), "layer 0 head 0 is nan"),
        (np.where(np.eye(3, 4, 1) > 0, np.inf, 1.0), "layer 0 head 1 is inf"),
        (1 - 2 * np.eye(3, 4), "layer 0 head 0 is -1.0"),
        ([[1.0], [1.0, 2.0]], "no rectangle"),
        ([["1.0"]], "no rectangle"),
        ([[None]], "no rectangle"),
        ([], "shape"),
    ],
)
def test_importance_that_does_not_fit_is_refused_and_no_file_appears(importance: Any, message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_importance(model, tmp_path / "out.gguf", importance)
    assert not list(tmp_path.iterdir())


# a GGUF byte by byte, written here without the code under test


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, vtype: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", vtype) + value


def array(element_type: int, fmt: str, values: list[Any]) -> bytes:
    return struct.pack("<IQ", element_type, len(values)) + struct.pack(f"<{len(values)}{fmt}", *values)


GOOD: dict[str, bytes] = {
    "general.architecture": pair("general.architecture", STRING, string("llama")),
    "block_count": pair("llama.block_count", U32, struct.pack("<I", 2)),
    "head_count": pair("llama.attention.head_count", U32, struct.pack("<I", 3)),
    "tokens": pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("")),
    "flag": pair("tokenizer.ggml.add_bos_token", BOOL, b"\x01"),
    "importance": pair(KEY, ARRAY, array(F32, "f", [1, 0, 2, 0.5, 0, 4])),
    "shape": pair(KEY + ".shape", ARRAY, array(U32, "I", [2, 3])),
    "method": pair(KEY + ".method", STRING, string("m")),
    "source": pair(KEY + ".source", STRING, string("s")),
    "version": pair(KEY + ".version", U32, struct.pack("<I", 1)),
}


def gguf_bytes(
    change: dict[str, bytes | None] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_pairs: int | None = None,
    n_tensors: int = 0,
    tail: bytes = b"",
) -> bytes:
    pairs = [value for value in (GOOD | (change or {})).values() if value is not None]
    counts = struct.pack("<IQQ", version, n_tensors, len(pairs) if n_pairs is None else n_pairs)
    return magic + counts + b"".join(pairs) + tail


def tensor(*, name: str = "t", shape: tuple[int, ...] = (4,), n_dims: int | None = None, dtype: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack("<I", len(shape) if n_dims is None else n_dims) + struct.pack(f"<{len(shape)}Q", *shape)
    return string(name) + dims + struct.pack("<IQ", dtype, offset)


def with_tensor(n_data: int = 16, **args: Any) -> bytes:
    head = gguf_bytes(n_tensors=1, tail=tensor(**args))
    return head + bytes(-len(head) % 32 + n_data)


def test_hand_written_gguf_is_read(tmp_path: Path) -> None:
    for content in (gguf_bytes(), gguf_bytes(version=2), with_tensor()):
        (tmp_path / "m.gguf").write_bytes(content)
        found = read_importance(tmp_path / "m.gguf")
        assert found is not None and found.values.tolist() == [[1, 0, 2], [0.5, 0, 4]]


def test_head_count_may_be_an_array_of_equal_numbers(tmp_path: Path) -> None:
    per_layer = pair("llama.attention.head_count", ARRAY, array(U32, "I", [3, 3]))
    (tmp_path / "m.gguf").write_bytes(gguf_bytes({"head_count": per_layer}))
    assert read_importance(tmp_path / "m.gguf") is not None


def test_file_without_model_keys_is_a_sidecar(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_bytes({"block_count": None, "head_count": None}))
    found = read_importance(tmp_path / "m.gguf")
    assert found is not None and found.values.shape == (2, 3)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "magic": (gguf_bytes(magic=b"GGML"), "magic is b'GGML'"),
    "json": (b'{"0-0": [1.0]}', "magic"),
    "version 1": (gguf_bytes(version=1), "version = 1"),
    "big endian": (gguf_bytes(version=3 << 24), "version = 50331648"),
    "key count": (gguf_bytes(n_pairs=HUGE), f"key count = {HUGE}"),
    "key count one too many": (gguf_bytes(n_pairs=len(GOOD) + 1), "key count|are left"),
    "tensor count": (gguf_bytes(n_tensors=HUGE), f"tensor count = {HUGE}"),
    "key length": (gguf_bytes({"flag": struct.pack("<Q", HUGE)}), str(HUGE)),
    "key twice": (gguf_bytes({"flag": GOOD["version"]}), "there twice"),
    "key not utf-8": (gguf_bytes({"flag": pair(b"\xff\xfe", BOOL, b"\x01")}), "not UTF-8"),
    "value type": (gguf_bytes({"flag": pair("x", 13, b"\x01")}), "type of 'x' = 13"),
    "element type": (gguf_bytes({"flag": pair("x", ARRAY, array(13, "I", [1]))}), "element type of 'x' = 13"),
    "nested array": (gguf_bytes({"flag": pair("x", ARRAY, array(ARRAY, "I", [1]))}), "nested"),
    "string array length": (gguf_bytes({"tokens": pair("x", ARRAY, struct.pack("<IQ", STRING, HUGE))}), str(HUGE)),
    "string in array": (gguf_bytes({"tokens": pair("x", ARRAY, struct.pack("<IQQ", STRING, 1, HUGE))}), str(HUGE)),
    "no architecture": (gguf_bytes({"general.architecture": None}), "general.architecture is None"),
    "architecture type": (
        gguf_bytes({"general.architecture": pair("general.architecture", U32, bytes(4))}),
        "general.architecture is 0",
    ),
    "alignment": (gguf_bytes({"flag": pair("general.alignment", U32, struct.pack("<I", 33))}), "alignment = 33"),
    "alignment 0": (gguf_bytes({"flag": pair("general.alignment", U32, bytes(4))}), "alignment = 0"),
    "alignment huge": (gguf_bytes({"flag": pair("general.alignment", U32, struct.pack("<I", 1 << 31))}), "alignment"),
    "importance missing": (gguf_bytes({"importance": None}), f"{KEY} is missing"),
    "shape missing": (gguf_bytes({"shape": None}), "shape is missing"),
    "version missing": (gguf_bytes({"version": None}), "version is missing"),
    "method missing": (gguf_bytes({"method": None}), "method is missing"),
    "importance length": (
        gguf_bytes({"importance": pair(KEY, ARRAY, struct.pack("<IQ", F32, HUGE) + bytes(24))}),
        str(HUGE),
    ),
    "importance length wraps": (
        gguf_bytes({"importance": pair(KEY, ARRAY, struct.pack("<IQ", F32, 2**62 + 6) + bytes(24))}),
        str(2**62 + 6),
    ),
    "importance empty": (gguf_bytes({"importance": pair(KEY, ARRAY, array(F32, "f", []))}), "0 values"),
    "importance i32": (
        gguf_bytes({"importance": pair(KEY, ARRAY, array(I32, "i", [1] * 6))}),
        "array of i32.*f32 or f64",
    ),
    "importance scalar": (
        gguf_bytes({"importance": pair(KEY, F32, struct.pack("<f", 1))}),
        "is f32, expected array of",
    ),
    "importance string": (gguf_bytes({"importance": pair(KEY, STRING, string("1.0"))}), "is string"),
    "importance strings": (
        gguf_bytes({"importance": pair(KEY, ARRAY, struct.pack("<IQ", STRING, 1) + string("1"))}),
        "array of string",
    ),
    "importance nan": (
        gguf_bytes({"importance": pair(KEY, ARRAY, array(F32, "f", [1, 1, 1, 1, np.nan, 1]))}),
        "layer 1 head 1 is nan",
    ),
    "importance inf": (
        gguf_bytes({"importance": pair(KEY, ARRAY, array(F64, "d", [1, 1, 1, 1, 1, np.inf]))}),
        "layer 1 head 2 is inf",
    ),
    "importance negative": (
        gguf_bytes({"importance": pair(KEY, ARRAY, array(F32, "f", [1, -2, 1, 1, 1, 1]))}),
        "layer 0 head 1 is -2.0",
    ),
    "importance all zero": (gguf_bytes({"importance": pair(KEY, ARRAY, array(F32, "f", [0] * 6))}), "sum 0.0"),
    "importance of another length": (
        gguf_bytes({"importance": pair(KEY, ARRAY, array(F32, "f", [1] * 5))}),
        "5 values",
    ),
    "shape transposed": (
        gguf_bytes({"shape": pair(KEY + ".shape", ARRAY, array(U32, "I", [3, 2]))}),
        "block_count = 2",
    ),
    "shape flat": (gguf_bytes({"shape": pair(KEY + ".shape", ARRAY, array(U32, "I", [6]))}), r"shape = \[6\]"),
    "shape zero": (gguf_bytes({"shape": pair(KEY + ".shape", ARRAY, array(U32, "I", [0, 3]))}), r"shape = \[0, 3\]"),
    "shape 64 bit": (gguf_bytes({"shape": pair(KEY + ".shape", ARRAY, array(U64, "Q", [HUGE, HUGE]))}), "array of u64"),
    "shape too large": (
        gguf_bytes({"shape": pair(KEY + ".shape", ARRAY, array(U32, "I", [2**31, 2**31]))}),
        "6 values",
    ),
    "version 2": (gguf_bytes({"version": pair(KEY + ".version", U32, struct.pack("<I", 2))}), "version = 2"),
    "version string": (gguf_bytes({"version": pair(KEY + ".version", STRING, string("1"))}), "version is string"),
    "method number": (gguf_bytes({"method": pair(KEY + ".method", U32, bytes(4))}), "method is u32"),
    "block count": (
        gguf_bytes({"block_count": pair("llama.block_count", U32, struct.pack("<I", 4))}),
        "block_count = 4",
    ),
    "block count huge": (
        gguf_bytes({"block_count": pair("llama.block_count", U64, struct.pack("<Q", HUGE))}),
        str(HUGE),
    ),
    "head count": (
        gguf_bytes({"head_count": pair("llama.attention.head_count", U32, struct.pack("<I", 8))}),
        "head_count = 8",
    ),
    "head count per layer": (
        gguf_bytes({"head_count": pair("llama.attention.head_count", ARRAY, array(U32, "I", [3, 4]))}),
        "head_count = 4",
    ),
    "tensor data cut": (with_tensor(15), "tensor 't' needs 16 bytes"),
    "tensor shape": (with_tensor(shape=(HUGE, HUGE)), "tensor 't' needs"),
    "tensor offset": (with_tensor(offset=HUGE), "tensor 't' needs"),
    "tensor dimensions": (with_tensor(n_dims=2**32 - 1), "4294967295 dimensions"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_gguf_is_a_value_error_that_names_the_value(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_importance(path)
    assert str(path) in str(caught.value) and ": " in str(caught.value)
    with pytest.raises(ValueError):
        write_importance(path, tmp_path / "out.gguf", np.ones((2, 3)))
    assert [p.name for p in tmp_path.iterdir()] == ["damaged.gguf"]


@pytest.mark.parametrize("content", [gguf_bytes(), with_tensor()], ids=["sidecar", "model"])
def test_gguf_cut_anywhere_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for n in range(len(content)):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match="cut.gguf"):
            read_importance(path)


@pytest.mark.parametrize("value", [0x00, 0x01, 0x7F, 0xFF])
def test_gguf_with_any_byte_changed_is_read_or_a_value_error(value: int, tmp_path: Path) -> None:
    content, path = with_tensor(), tmp_path / "changed.gguf"
    for n in range(len(content)):
        path.write_bytes(content[:n] + bytes([value]) + content[n + 1 :])
        try:
            found = read_importance(path)
        except ValueError:
            continue
        assert found is None or (found.values >= 0).all()


def test_missing_file_is_the_usual_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_importance(tmp_path / "none.gguf")


def test_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.gguf"
    path.write_bytes(gguf_bytes({"flag": pair("split.count", 2, struct.pack("<H", 3))}))
    with pytest.raises(ValueError, match="split.count = 3.*--merge"):
        write_importance(path, tmp_path / "out.gguf", np.ones((2, 3)), force=True)


# JSON


def scores_file(folder: Path, content: Any) -> Path:
    path = folder / "scores.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_authors_json_gives_the_mean_of_each_list_in_any_order(tmp_path: Path) -> None:
    path = scores_file(tmp_path, {"1-0": [4], "0-1": [0, 0], "0-0": [1.0, 2, 6], "1-1": [0.5, 0.25]})
    assert load_scores(path).values.tolist() == [[3, 0], [4, 0.375]]


def test_plain_json_is_taken_as_it_is(tmp_path: Path) -> None:
    values = exact() / 3
    path = scores_file(tmp_path, {"importance": values.tolist(), "comment": "x"})
    np.testing.assert_array_equal(load_scores(path).values, values)


BAD_JSON: dict[str, tuple[Any, str]] = {
    "empty": (b"", "not readable as JSON"),
    "cut": (b'{"0-0": [1.0, 2.', "not readable as JSON"),
    "not utf-8": (b'{"\xff\xfe": [1]}', "not readable as JSON"),
    "gguf": (gguf_bytes(), "not readable as JSON"),
    "deep": (b"[" * 100000, "not readable as JSON"),
    "list": ([1, 2], "holds list"),
    "no heads": ({}, "holds dict"),
    "key word": ({"a-b": [1]}, "key 'a-b'"),
    "key sign": ({"-1-0": [1]}, "key '-1-0'"),
    "key huge": ({f"{HUGE}-0": [1]}, f"key '{HUGE}-0'"),
    "far head": ({"0-0": [1], "999999-999999": [1]}, "'0-1' is missing"),
    "head missing": ({"0-0": [1], "0-1": [1], "1-1": [1]}, "'1-0' is missing, 3 of 2 x 2"),
    "head twice": (b'{"0-0": [1], "0-0": [2]}', "'0-0' is there twice"),
    "head twice, other spelling": (b'{"0-0": [1], "0-00": [2]}', "'0-00' names head"),
    "no scores": ({"0-0": []}, "'0-0' holds list"),
    "number instead of list": ({"0-0": 1.0}, "'0-0' holds float"),
    "text in list": ({"0-0": [1, "2"]}, "'0-0' holds list"),
    "bool in list": ({"0-0": [True]}, "'0-0' holds list"),
    "null": ({"0-0": None}, "'0-0' holds NoneType"),
    "nan": (b'{"0-0": [1, NaN]}', "'0-0' holds float nan"),
    "infinite": (b'{"0-0": [Infinity]}', "'0-0' holds float inf"),
    "negative": ({"0-0": [3, -1]}, "'0-0' holds int -1"),
    "huge integer": (b'{"0-0": [1' + b"0" * 400 + b"]}", "'0-0' holds int"),
    "all zero": ({"0-0": [0.0], "0-1": [0]}, "sum 0.0"),
    "plain text": ({"importance": "abc"}, "no rectangle"),
    "plain ragged": ({"importance": [[1], [1, 2]]}, "no rectangle"),
    "plain null": ({"importance": None}, "no rectangle"),
    "plain bool": ({"importance": [[True]]}, "no rectangle"),
    "plain huge integer": (b'{"importance": [[1' + b"0" * 400 + b"]]}", "no rectangle"),
    "plain flat": ({"importance": [1.0]}, "shape"),
    "plain nan": (b'{"importance": [[NaN]]}', "layer 0 head 0 is nan"),
    "plain negative": ({"importance": [[1, -1]]}, "layer 0 head 1 is -1.0"),
    "plain zero": ({"importance": [[0]]}, "sum 0.0"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_damaged_json_is_a_value_error_that_names_the_value(name: str, tmp_path: Path) -> None:
    content, message = BAD_JSON[name]
    path = scores_file(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_scores(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


# script


def run_script(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, check=False)


def test_script_adds_the_authors_scores_to_a_model(model: Path, tmp_path: Path) -> None:
    data = {f"{il}-{ih}": [il + ih, 0.1] for il in range(N_LAYER) for ih in range(N_HEAD)}
    scores, out = scores_file(tmp_path, data), tmp_path / "out.gguf"
    done = run_script(model, scores, out, "--method", "mine")
    assert (done.returncode, done.stderr) == (0, "")
    found = read_importance(out)
    assert found is not None and found.method == "mine" and found.source.startswith("scores.json sha256:")
    np.testing.assert_array_equal(found.values, load_scores(scores).values)


@pytest.mark.parametrize("case", ["shape", "json", "model", "no model", "exists"])
def test_script_refuses_with_one_line_and_exit_code_1(case: str, model: Path, tmp_path: Path) -> None:
    n_layer = N_LAYER + 1 if case == "shape" else N_LAYER
    data = {f"{il}-{ih}": [1.0] for il in range(n_layer) for ih in range(N_HEAD)}
    scores, out = scores_file(tmp_path, b"{" if case == "json" else data), tmp_path / "out.gguf"
    source = model
    if case == "model":
        source = tmp_path / "cut.gguf"
        source.write_bytes(model.read_bytes()[:1000])
    elif case == "no model":
        source = tmp_path / "none.gguf"
    elif case == "exists":
        out.write_bytes(b"mine")
    done = run_script(source, scores, out)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    if case == "exists":
        assert out.read_bytes() == b"mine"
    else:
        assert not out.exists()


def test_key_names_are_the_agreed_ones() -> None:
    names = [field[0] for field in gguf_keys.importance_fields(exact(), arch="llama")]
    assert names == [KEY, KEY + ".shape", KEY + ".method", KEY + ".source", KEY + ".version"]


# beta


def test_beta_is_stored_with_the_importance(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    write_importance(model, out, exact(), beta=1.375)
    found = read_importance(out)
    assert found is not None and found.beta == 1.375
    again = tmp_path / "n.gguf"
    write_importance(out, again, exact(), force=True)
    found = read_importance(again)
    assert found is not None and found.beta is None


@pytest.mark.parametrize("beta", [1.0, 0.0, -2.0, math.inf, math.nan, True, "1.2"])
def test_a_wrong_beta_is_refused(beta: Any, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="beta=.*must be a finite number > 1"):
        write_importance(model, tmp_path / "m.gguf", exact(), beta=beta)
    assert list(tmp_path.glob("m.gguf*")) == []
    scores = tmp_path / "s.json"
    scores.write_text(json.dumps({"importance": exact().tolist(), "beta": beta}))
    with pytest.raises(ValueError, match="s.json: beta="):
        load_scores(scores)
