"""Files of head scores: every form is read as it was written, and damaged files are ValueErrors and nothing else."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from pyheadkv import score_files
from pyheadkv.gguf_keys import read_importance
from pyheadkv.importance_values import fit_heads
from pyheadkv.score_files import load_scores
from pyheadkv.testing import random_importance, write_random_model

SCRIPT = Path(__file__).parent.parent / "scripts" / "gguf_add_importance.py"
N_LAYER, N_HEAD, N_HEAD_KV = 3, 4, 2
VALUES = random_importance(n_layer=N_LAYER, n_head=N_HEAD, seed=1) / 3


def npy(values: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, values, **options)
    return out.getvalue()


def npy_header(text: str, *, version: tuple[int, int] = (1, 0), data: bytes = b"") -> bytes:
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text.encode() + data


def npy_shape(shape: str, *, data: bytes = b"") -> bytes:
    return npy_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n", data=data)


def rows(values: NDArray[Any], separator: str) -> bytes:
    return "\n".join(separator.join(map(repr, row)) for row in values.tolist()).encode()


def authors(values: NDArray[Any]) -> bytes:
    heads = np.ndindex(values.shape)
    return json.dumps({f"{il}-{ih}": [values[il, ih]] for il, ih in heads}).encode()


WRITERS: dict[str, Callable[[NDArray[Any]], bytes]] = {
    "authors.json": authors,
    "plain.json": lambda values: json.dumps({"importance": values.tolist()}).encode(),
    "a.npy": npy,
    "a.csv": lambda values: rows(values, ","),
    "pattern.TSV": lambda values: rows(values, "\t"),
}


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_values_that_were_written(name: str, tmp_path: Path) -> None:
    found = load_scores(written(tmp_path, name, WRITERS[name](VALUES))).values
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, VALUES)


def test_text_may_be_written_by_numpy(tmp_path: Path) -> None:
    for name, separator in (("a.tsv", "\t"), ("a.csv", ",")):
        np.savetxt(tmp_path / name, VALUES, delimiter=separator, newline="\r\n")
        np.testing.assert_allclose(load_scores(tmp_path / name).values, VALUES, rtol=1e-15)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8", "u1", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_other_types_and_orders_are_read(dtype: str, order: Any, tmp_path: Path) -> None:
    values = np.asarray(np.arange(12).reshape(3, 4), dtype=dtype, order=order)
    np.testing.assert_array_equal(load_scores(written(tmp_path, "a.npy", npy(values))).values, values)


BAD: dict[str, tuple[str, bytes]] = {
    "suffix": ("a.txt", b"1"),
    "npy empty": ("a.npy", b""),
    "npy pickled": ("a.npy", npy(np.array([[{}]]), allow_pickle=True)),
    "npy is a pickle": ("a.npy", pickle.dumps([[1.0]])),
    "npy is a zip": ("a.npy", b"PK\x03\x04" + bytes(60)),
    "npy of text": ("a.npy", npy(np.array([["1"]]))),
    "npy of bools": ("a.npy", npy(np.array([[True]]))),
    "npy of complex": ("a.npy", npy(np.array([[1j]]))),
    "npy of records": ("a.npy", npy(np.zeros((2, 2), dtype=[("x", "f8")]))),
    "npy flat": ("a.npy", npy(np.ones(3))),
    "npy cube": ("a.npy", npy(np.ones((2, 2, 2)))),
    "npy nan": ("a.npy", npy(np.array([[1, np.nan]]))),
    "npy negative": ("a.npy", npy(np.array([[1.0, -1.0]]))),
    "npy zero": ("a.npy", npy(np.zeros((2, 2)))),
    "npy no rows": ("a.npy", npy(np.zeros((0, 2)))),
    "npy longer": ("a.npy", npy(np.ones((2, 2))) + b"x"),
    "npy version 9": ("a.npy", b"\x93NUMPY\x09\x00" + npy(np.ones((2, 2)))[8:]),
    "npy expression": ("a.npy", npy_shape("__import__('os')")),
    "npy huge": ("a.npy", npy_shape(f"({1 << 40}, {1 << 30})")),
    "npy below zero": ("a.npy", npy_shape("(-1, -1)", data=bytes(8))),
    "npy python 2": ("a.npy", npy_shape("(1L, 1L)", data=bytes(8))),
    "npy unclosed": ("a.npy", npy_shape("((1, ")),
    "npy deep": ("a.npy", npy_header("(" * 9000, version=(2, 0))),
    "csv empty": ("a.csv", b""),
    "csv text": ("a.csv", b"layer,head\n0,1"),
    "csv ragged": ("a.csv", b"1,2\n3"),
    "csv gap": ("a.csv", b"1,,2"),
    "csv infinite": ("a.csv", b"1,inf"),
    "csv negative": ("a.csv", b"1,-2"),
    "csv huge number": ("a.csv", b"1,1e999"),
    "csv with tabs": ("a.csv", b"1\t2"),
    "csv not ascii": ("a.csv", "1,\u0662".encode()),
    "tsv with commas": ("a.tsv", b"1,2"),
    "tsv zero bytes": ("a.tsv", bytes(50)),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_file_is_a_value_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, *BAD[name])
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        load_scores(path)
    n_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))
    assert n_bytes < 8 << 20


def damage(raw: bytes, rng: random.Random) -> bytes:
    """One of five ways to damage a file, or several."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            del data[at : at + rng.randint(1, 16)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            data[at : at + 1] = bytes([rng.randrange(256)])
        else:
            data[at:at] = data[: rng.randint(1, 40)]
    return bytes(data)


@pytest.mark.parametrize("name", WRITERS)
def test_a_hundred_damaged_files_are_value_errors_or_scores(name: str, tmp_path: Path) -> None:
    rng, raw = random.Random(name), WRITERS[name](VALUES)
    n_refused = 0
    for _ in range(100):
        path = written(tmp_path, name, damage(raw, rng))
        try:
            found = load_scores(path).values
        except ValueError:
            n_refused += 1
        else:  # e.g. another digit: such a file is as good as any
            assert found.ndim == 2 and np.isfinite(found).all() and found.min() >= 0 and found.sum() > 0
    assert n_refused > 50


def test_file_above_the_limit_is_refused_without_reading_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "big.csv"
    with open(path, "wb") as file:
        file.truncate(score_files.MAX_SCORE_BYTES + 1)
    with pytest.raises(ValueError, match="at most"):
        load_scores(path)


# models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_random_model(path, n_layer=N_LAYER, n_embd=64, n_head=N_HEAD, n_head_kv=N_HEAD_KV, n_ff=96, seed=1)
    return path


def test_number_per_kv_head_counts_for_each_of_its_query_heads(model: Path) -> None:
    pattern = np.array([[0.1, 0.9], [0.2, 0.3], [1.0, 0.0]])
    assert fit_heads(pattern, model).tolist() == [[0.1, 0.1, 0.9, 0.9], [0.2, 0.2, 0.3, 0.3], [1, 1, 0, 0]]
    np.testing.assert_array_equal(fit_heads(VALUES, model), VALUES)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (3, 8), (4, 2), (3, 1)])
def test_other_shapes_are_refused(shape: tuple[int, int], model: Path) -> None:
    with pytest.raises(ValueError, match="the model has"):
        fit_heads(np.ones(shape), model)


@pytest.mark.parametrize(("n_head", "n_head_kv", "fits"), [(4, [2, 0, 2], True), ([4, 4, 4], [2, 0, 2], True), (4, [2, 4, 2], False)])
def test_layers_without_kv_heads_do_not_count(n_head: Any, n_head_kv: list[int], fits: bool, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(N_LAYER)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    np.testing.assert_array_equal(fit_heads(VALUES, tmp_path / "m.gguf"), VALUES)
    if fits:
        expected = np.ones((3, 4)) * (np.array(n_head_kv)[:, None] > 0)
        np.testing.assert_array_equal(fit_heads(np.ones((3, 2)), tmp_path / "m.gguf"), expected)
    else:
        with pytest.raises(ValueError, match="the model has"):
            fit_heads(np.ones((3, 2)), tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["a.npy", "a.csv", "a.tsv"])
def test_script_takes_every_form(name: str, model: Path, tmp_path: Path) -> None:
    columns = VALUES[:, :N_HEAD_KV]
    content = npy(columns) if name == "a.npy" else rows(columns, "\t" if name == "a.tsv" else ",")
    scores, out = written(tmp_path, name, content), tmp_path / "out.gguf"
    command = [sys.executable, SCRIPT, model, scores, out, "--method", "duo"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = read_importance(out)
    assert found is not None and found.method == "duo"
    np.testing.assert_array_equal(found.values, np.repeat(columns, 2, axis=1))
