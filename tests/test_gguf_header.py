"""The reader of headers against gguf-py's, and when a file is parsed again. Damaged files are in test_gguf_keys.py."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from test_gguf_keys import ARRAY, STRING, U32, array, gguf_bytes, pair, string

from pyheadkv import gguf_header, importance
from pyheadkv import model as facts
from pyheadkv.gguf_header import read_header
from pyheadkv.gguf_keys import read_importance
from pyheadkv.model import read_shape
from pyheadkv.options import MissingFileError, load_importance
from pyheadkv.testing import write_random_model


def model(path: Path, **changes: object) -> Path:
    write_random_model(path, **{"n_layer": 2, "n_embd": 64, "n_head": 4, "n_head_kv": 2, "n_ff": 96, "seed": 1, **changes})
    return path


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files in the order in which they are parsed; none is fresh."""
    paths: list[Path] = []
    parse = gguf_header._parse
    monkeypatch.setattr(gguf_header, "_parse", lambda data, path, stamp: paths.append(path) or parse(data, path, stamp))
    monkeypatch.setattr(gguf_header, "FRESH_NS", 0)
    return paths


@pytest.mark.parametrize("ftype", ["f32", "f16", "q8_0", "q4_0"])
def test_keys_tensors_and_weights_are_those_of_gguf_py(ftype: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf", ftype=ftype, importance="random")
    header, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(header.pairs) == list(fields) and len(fields) > 20
    for name, field in fields.items():
        pair = header.pairs[name]
        assert [pair.type, *([] if pair.sub_type is None else [pair.sub_type])] == [int(t) for t in field.types[:2]]
        if pair.sub_type == gguf_header.STRING:
            n, raw = header.raw_strings(name)
            texts = field.contents()
            assert n == len(texts) and raw == b"".join(len(t.encode()).to_bytes(8, "little") + t.encode() for t in texts)
        else:
            np.testing.assert_array_equal(pair.value, field.contents())
    assert header.data_begin == theirs.data_offset
    weights = dict(header.weights())
    assert list(weights) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(weights[tensor.name], gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def test_a_file_is_parsed_once_for_all_that_a_start_asks(parsed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYHEADKV_CACHE", str(tmp_path / "cache"))
    path = model(tmp_path / "m.gguf")
    assert importance.find_importance(path) is None  # asked for metadata, beside the model, in the cache, in the registry
    read_shape(path)
    read_importance(str(path))
    assert parsed == [path]


def test_a_file_that_changed_is_parsed_again(parsed: list[Path], tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf")
    times = path.stat()
    assert read_header(path).arch == "llama"
    path.write_bytes(path.read_bytes().replace(b"llama", b"qwen2"))  # as many bytes
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read_header(path).arch == "qwen2" and len(parsed) == 2


def test_a_fresh_file_is_parsed_each_time(parsed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be written again before the clock of the file system moves on."""
    monkeypatch.setattr(gguf_header, "FRESH_NS", 10**18)
    path = model(tmp_path / "m.gguf")
    read_header(path)
    read_header(path)
    assert parsed == [path, path]


def test_bytes_of_another_file_than_the_parsed_one_are_refused(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf")
    header = read_header(path)
    os.replace(model(tmp_path / "other.gguf", seed=2), path)
    with pytest.raises(ValueError, match=r"m\.gguf changed while it was read: start again"):
        list(header.f32_vectors(suffix="norm.weight"))


# facts of a model


SHAPE = {"embedding_length": pair("llama.embedding_length", U32, struct.pack("<I", 48))}


def with_pairs(folder: Path, changes: dict[str, bytes | None]) -> Path:
    path = folder / "m.gguf"
    path.write_bytes(gguf_bytes({**SHAPE, **changes}))
    return path


def test_the_shape_of_a_model_is_read_from_its_header(tmp_path: Path) -> None:
    alignment = {"alignment": pair("general.alignment", U32, struct.pack("<I", 64))}
    for changes in ({}, alignment, {"key_length": pair("llama.attention.key_length", ARRAY, array(U32, "I", [16, 16]))}):
        shape = read_shape(with_pairs(tmp_path, changes))
        assert (shape.n_layer, shape.n_head, shape.n_head_kv, shape.n_embd_head_k, shape.n_ctx_train) == (2, 3, 3, 16, 0)
        assert shape.name == "m" and shape.is_uniform and shape.token_bytes == 2 * 3 * (16 + 16) * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_count": None}, "head_count is missing"),
        ({"head_count": pair("llama.attention.head_count", U32, struct.pack("<I", 0))}, "only models with attention have a KV cache"),
        ({"head_count": pair("llama.attention.head_count", ARRAY, array(U32, "I", [3, 3, 3]))}, "does not fit 2 layers"),
        ({"block_count": pair("llama.block_count", STRING, string("2"))}, r"block_count = '2' is no number in \[1, 65536\]"),
        ({"embedding_length": None}, "embedding_length is None: a whole number is needed"),
        ({"key_length": pair("llama.attention.key_length", ARRAY, array(U32, "I", [16, 8]))}, "differs between layers: one number"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_header_that_says_no_shape_is_refused(changes: dict[str, bytes | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_shape(with_pairs(tmp_path, changes))


def test_a_model_that_says_nothing_of_its_heads_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"block_count or attention\.head_count is missing"):
        importance.fingerprint(with_pairs(tmp_path, {"head_count": None}))
    found = importance.fingerprint(with_pairs(tmp_path, {"tokens": None}))
    assert found.facts == {"embedding_length": 48.0, "n_tokens": 0.0} and len(found.sketch) == 0


def test_a_gguf_without_importance_is_no_source_of_it(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"m\.gguf.*: the file has no head importance"):
        load_importance(path, path)


def test_a_missing_embedded_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(facts, "embedded_model", lambda: tmp_path / "none.gguf")
    with pytest.raises(MissingFileError, match="the embedded model is missing in this installation"):
        facts.model_path(None)
