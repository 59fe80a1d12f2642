"""The reader of headers against gguf-py's, and when a file is parsed again. Damaged files are in test_gguf_keys.py."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from pyheadkv import gguf_header, importance
from pyheadkv.gguf_header import read_header
from pyheadkv.gguf_keys import read_importance
from pyheadkv.model import read_shape
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
