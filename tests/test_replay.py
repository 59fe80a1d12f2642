"""The replay table: scores and shares against NumPy, its places, keys and checks, and the command that measures it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES, Shape, load, without_importance
from numpy.typing import NDArray

try:
    import pyheadkv
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from pyheadkv import cli, gguf_keys, importance
from pyheadkv import replay as places
from pyheadkv.eval.journal import Journal
from pyheadkv.gguf_header import read_header
from pyheadkv.importance_values import Importance
from pyheadkv.replay_values import ReplayTable, check_replay, load_replay, read_replay, replay_of, write_replay
from pyheadkv.score import replay
from pyheadkv.score.replay_texts import KINDS, TEXTS, Replay, make_replays
from pyheadkv.testing import random_importance
from pyheadkv.testing.reference import ReferenceModel, softmax

MakeModel = Callable[..., Path]
SHAPE = Shape("replay", "qwen2", 8, 2, n_layer=3, head_dim=16, n_ff=64)
HEADS = [(8, 2)] * 3
SCRIPTS = Path(__file__).parent.parent / "scripts"

embedded = pytest.mark.skipif(not pyheadkv.embedded_model().is_file(), reason="the embedded model is not there yet")


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model(SHAPE)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty registry, and an empty cache."""
    monkeypatch.setenv("PYHEADKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importance, "REGISTRY", tmp_path / "registry")
    (tmp_path / "registry").mkdir()
    return tmp_path / "registry"


def table(seed: int = 0, *, source: str = "a test") -> ReplayTable:
    """One that fits SHAPE."""
    scores = np.random.default_rng(seed).random((3, 2, 500), dtype=np.float32) ** np.arange(1, 7).reshape(3, 2, 1)
    return ReplayTable(np.array(replay.SHARES), replay.shares_above(scores, HEADS), source=source)


# scores


class OracleReader:
    """The NumPy model, with K and V as the cache stores them; it reads everything again."""

    def __init__(self, path: Path) -> None:
        self.model = ReferenceModel(path, kv_round=np.float16)
        self.heads = [(self.model.n_head, self.model.n_head_kv)] * self.model.n_layer
        self.tokens: list[int] = []

    def begin(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def go_on(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens

    def attention_max(self, n_positions: int, n_queries: int) -> NDArray[np.float32]:
        m, n = self.model, len(self.tokens)
        m.prefill(self.tokens)
        best = np.zeros((m.n_layer, m.n_head_kv, n_positions))
        visible = np.arange(n) <= np.arange(n - n_queries, n)[:, None]
        for il in range(m.n_layer):
            for h in range(m.n_head):
                ih = h * m.n_head_kv // m.n_head
                logits = m.scale * m.q[il][-n_queries:, h] @ m.k[il][:, ih].T
                p = softmax(np.where(visible, logits, -np.inf))
                best[il, ih] = np.maximum(best[il, ih], p.max(0)[:n_positions])
        return best.astype(np.float32)


@pytest.mark.parametrize("n_chunk", [64, 150, 300])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=lambda s: s.name)
def test_a_table_equals_numpy(shape: Shape, n_chunk: int, make_model: MakeModel) -> None:
    path = make_model(shape)
    llm = load(path, kv_size=512, window=256, prefill="token", n_batch=128)
    made = make_replays(llm, max_tokens=150, n_texts=3)[2]
    reader, oracle = replay.LlamaReader(llm), OracleReader(path)
    assert reader.heads == oracle.heads
    found, expected = replay.replay_scores(reader, made, n_chunk=n_chunk), replay.replay_scores(oracle, made, n_chunk=150)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-6)
    shares, wanted = (replay.shares_above(scores, reader.heads) for scores in (found, expected))
    np.testing.assert_allclose(shares, wanted, atol=2 / 150)
    np.testing.assert_allclose(replay.head_shares(shares, reader.heads).mean(1), replay.SHARES, rtol=1e-9)


def test_queries_of_a_repetition_are_those_that_predict_the_text() -> None:
    class Noting:
        heads = [(1, 1)]

        def __init__(self) -> None:
            self.read: list[list[int]] = []
            self.asked: list[tuple[int, int]] = []

        def begin(self, tokens: Sequence[int]) -> None:
            self.read.append(list(tokens))

        def go_on(self, tokens: Sequence[int]) -> None:
            self.read.append(list(tokens))

        def attention_max(self, n_positions: int, n_queries: int) -> NDArray[np.float32]:
            self.asked.append((n_positions, n_queries))
            row = np.zeros((1, 1, n_positions), dtype=np.float32)
            row[..., len(self.asked)] = len(self.asked)
            return row

    reader = Noting()
    made = Replay("a", "a", (1, 2), (10, 11, 12, 13, 14), (3, 4))
    np.testing.assert_array_equal(replay.replay_scores(reader, made, n_chunk=2), [[[2, 3, 0, 0, 0]]])
    assert reader.read == [[1, 2, 10, 11, 12, 13, 14, 3], [4, 10], [11, 12], [13]] and reader.asked == [(7, 2), (7, 2), (7, 1)]
    assert sum(map(len, reader.read)) == made.n_tokens


def test_shares_are_those_above_one_threshold_for_the_model() -> None:
    scores = np.array([[[9, 8, 7, 6], [5, 4, 3, 0]], [[5, 5, 2, 1], [99, 99, 99, 99]]])  # the last head is none
    heads = [(4, 2), (4, 1)]
    found = replay.shares_above(scores, heads, [1 / 12, 4 / 12, 5 / 12, 6.5 / 12, 7 / 12])
    np.testing.assert_allclose(found[0], [[0.25, 0], [0, 0]])
    np.testing.assert_allclose(found[1], [[1, 0], [0, 0]])
    np.testing.assert_allclose(found[2], [[1, 1 / 12], [2 / 12, 0]])  # one cell more, of three that are equal
    np.testing.assert_allclose(found[3], [[1, 2.5 / 12], [5 / 12, 0]])
    np.testing.assert_allclose(found[4], [[1, 0.25], [0.5, 0]])
    shuffled = np.random.default_rng(0).permuted(scores, axis=-1)
    np.testing.assert_array_equal(replay.shares_above(shuffled, heads), replay.shares_above(scores, heads))


def outcomes(n: int, *, noise: float) -> list[replay.Outcome]:
    rng = np.random.default_rng(0)
    mean = np.arange(6).reshape(3, 2) / 10
    return [replay.Outcome("a", "a", 9, (mean + noise * rng.random((6, 3, 2))).tolist()) for _ in range(n)]


def test_a_table_of_few_texts_or_of_noise_is_refused() -> None:
    assert replay.check_reliable(outcomes(4, noise=0.01), HEADS).min() == 1
    with pytest.raises(ValueError, match="3 texts were repeated, at least 4 are needed: use more with --examples"):
        replay.check_reliable(outcomes(3, noise=0.01), HEADS)
    with pytest.raises(ValueError, match=r"4 texts has a reliability of 0\.\d\d at a share of .*, at least 0\.7 is needed"):
        replay.check_reliable(outcomes(4, noise=1e6), HEADS)


# texts


def test_texts_are_of_five_kinds_and_the_same_for_a_seed(model: Path) -> None:
    llm = load(model, kv_size=64, n_ctx=256)
    made = make_replays(llm, max_tokens=3000)
    assert KINDS == ("prose", "code", "dialogue", "table", "language") and [r.name for r in made] == list(TEXTS)
    assert made == make_replays(llm, max_tokens=3000) and len({r.text for r in made}) == len(made)
    assert all(len(r.text) >= 2500 for r in made)  # bytes of this model
    said = [llm.detokenize(list(r.text)).decode("utf-8", "replace") for r in made]
    assert "def " in said[1] and "order,date" in said[3] and "der" in said[4].split() and "les" in said[9].split()
    assert all(b"Repeat the text above word for word." in llm.detokenize(list(r.after)) for r in made)
    other = make_replays(llm, max_tokens=3000, seed=1)
    assert sum(a.text != b.text for a, b in zip(made, other)) > 6  # few passages begin a text
    short = make_replays(llm, max_tokens=100, n_texts=2)
    assert [r.text for r in short] == [r.text[:100] for r in made[:2]]
    for n in (0, 11):
        with pytest.raises(ValueError, match=rf"{n} texts to repeat: it must be in \[1, 10\]"):
            make_replays(llm, max_tokens=100, n_texts=n)


# values


SHARES = [0.25, 0.5]


@pytest.mark.parametrize(
    ("shares", "values", "message"),
    [
        ([0.5, 0.25], np.zeros((2, 1, 1)), "they must ascend, above 0 and below 1"),
        ([0, 0.5], np.zeros((2, 1, 1)), "they must ascend"),
        ([0.5, 1], np.zeros((2, 1, 1)), "they must ascend"),
        ([0.5, np.nan], np.zeros((2, 1, 1)), "they must ascend"),
        (SHARES, np.zeros((3, 1, 1)), r"shares of shape \(2,\), values of shape \(3, 1, 1\)"),
        (SHARES, np.zeros((2, 1)), r"values of shape \(2, 1\)"),
        ([], [], "shares of shape"),
        (SHARES, [[[0.1]], [[1.5]]], r"share 0.5 of layer 0 KV head 0 is 1.5: it must be in \[0, 1\]"),
        (SHARES, [[[np.nan]], [[0.5]]], r"share 0.25 of layer 0 KV head 0 is nan: it must be in \[0, 1\]"),
        (SHARES, [[[0.0, 0.6]], [[0.1, 0.5]]], "share 0.5 of layer 0 KV head 1 is 0.5: it must be not below that of a smaller share"),
        (SHARES, [[[1], [2, 3]]], "no array of numbers"),
        ("ab", [], "no array of numbers"),
    ],
)
def test_what_is_no_table_is_refused(shares: Any, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_replay(shares, values, name="x")
    assert str(error.value).startswith("x") and "--method replay" in str(error.value)


def test_a_table_in_the_metadata_comes_back_and_importance_stays(model: Path, tmp_path: Path) -> None:
    assert read_replay(model) is None
    out, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_replay(model, out, table())
    found = read_replay(out)
    assert found is not None and found.source == "a test"
    np.testing.assert_array_equal(found.shares, table().shares)
    np.testing.assert_array_equal(found.values, table().values.astype(np.float32))
    before, after = gguf_keys.read_importance(model), gguf_keys.read_importance(out)
    assert before is not None and after is not None
    np.testing.assert_array_equal(before.values, after.values)
    gguf_keys.write_importance(out, again, random_importance(n_layer=3, n_head=8, seed=5), force=True)
    kept = read_replay(again)
    assert kept is not None and np.array_equal(kept.values, found.values)
    with pytest.raises(ValueError, match=r"qwen2\.attention\.head_replay is already there"):
        write_replay(out, tmp_path / "c.gguf", table(1))
    write_replay(out, again, table(1), force=True)
    new = read_replay(again)
    assert new is not None and np.array_equal(new.values, table(1).values.astype(np.float32))
    pairs = read_header(again).pairs
    prefix = "qwen2.attention.head_replay"
    assert {name: (p.type, p.sub_type) for name, p in pairs.items() if name.startswith(prefix)} == {
        prefix: (9, 6),  # array of float32
        f"{prefix}.shape": (9, 4),  # of uint32
        f"{prefix}.shares": (9, 12),  # of float64
        f"{prefix}.version": (4, None),
        f"{prefix}.source": (8, None),
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b".shape\x09\0\0\0\x04\0\0\0", b".shape\x09\0\0\0\x05\0\0\0", r"shape is array of \w+, expected array of"),
        (b".version\x04\0\0\0\x01", b".version\x04\0\0\0\x02", r"version = 2, readable is 1"),
        (b"head_replay.shares", b"head_replay.sharks", r"head_replay\.shares is missing"),
        (b"\x06\0\0\0\x03\0\0\0\x02\0\0\0", b"\x06\0\0\0\x02\0\0\0\x02\0\0\0", r"shape = \[6, 2, 2\] does not fit 36 values"),
        (b"\x06\0\0\0\x03\0\0\0\x02\0\0\0", b"\x06\0\0\0\x02\0\0\0\x03\0\0\0", r"has shape \(6, 2, 3\), the model 3 layers with up to 2"),
    ],
)
def test_damaged_keys_are_refused(old: bytes, new: bytes, message: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    write_replay(model, out, table())
    raw = out.read_bytes()
    at = raw.index(b"head_replay")
    assert raw[at:].count(old) >= 1
    out.write_bytes(raw[:at] + raw[at:].replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_replay(out)


def test_a_table_that_does_not_fit_the_model_is_refused(model: Path, tmp_path: Path) -> None:
    good = table()
    with pytest.raises(ValueError, match=r"shape \(6, 2, 2\), the model 3 layers"):
        write_replay(model, tmp_path / "a.gguf", ReplayTable(good.shares, good.values[:, :2]))
    with pytest.raises(ValueError, match=r"share 0.015625 has the mean 0.0171\d+: it must be within 2 %"):
        write_replay(model, tmp_path / "a.gguf", ReplayTable(good.shares, np.minimum(1.1 * good.values, 1)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{", "[]", '{"shares": [0.5]}', '{"shares": [0.5], "values": [[["x"]]]}', '{"a": 1, "a": 2}'])
def test_a_damaged_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json"):
        load_replay(tmp_path / "a.json")


# places


def write_file(path: Path, found: ReplayTable, fingerprint: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"shares": found.shares.tolist(), "values": found.values.tolist(), "fingerprint": fingerprint}))


def register(folder: Path, path: Path, name: str, found: ReplayTable | None, **changes: Any) -> None:
    values = Importance(random_importance(n_layer=3, n_head=8, seed=1), method="r2")
    entry = importance.registry_entry(path, values, name=name, source="a test", replay=found) | changes
    (folder / f"{name}.json").write_text(json.dumps(entry))


def found_in(path: Path) -> tuple[str, bool, int]:
    """Origin, whether of a relative, and which of the tables it is."""
    found = places.find_replay(path)
    assert found is not None
    which = [i for i in range(9) if np.allclose(found.table.values, table(i).values)]
    return found.origin, found.relative, which[0]


def test_places_are_searched_in_their_order(model: Path, tmp_path: Path, registry: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(model, path)
    assert places.find_replay(path) is None
    register(registry, path, "none", None)
    assert places.find_replay(path) is None and importance.find_registered(path) is not None
    register(registry, path, "first", table(1))
    assert found_in(path) == ("registry: first", False, 1)
    key = importance.fingerprint(path).key
    cached = places.cache_path(path)
    assert cached == tmp_path / "cache" / "replay" / f"{key}.json"
    write_file(cached, table(2), key)
    assert found_in(path) == (f"user cache: {cached}", False, 2)
    write_file(tmp_path / "m.replay.json", table(3), key)
    assert found_in(path) == (f"beside the model: {tmp_path / 'm.replay.json'}", False, 3)
    write_replay(path, tmp_path / "n.gguf", table(4))
    assert found_in(tmp_path / "n.gguf") == ("metadata of the model", False, 4)


def test_a_file_of_another_model_is_refused_and_a_relative_is_said(
    model: Path, make_model: MakeModel, tmp_path: Path, registry: Path
) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(model, path)
    write_file(places.sidecar_path(path), table(1), importance.fingerprint(make_model(SHAPE, seed=8)).key)
    with pytest.raises(ValueError, match=r"m\.replay\.json was measured on a model with the fingerprint .*--method replay --force"):
        places.find_replay(path)
    write_file(places.sidecar_path(path), ReplayTable(table().shares, table().values[:, :1]))
    with pytest.raises(ValueError, match="has shape"):
        places.find_replay(path)
    places.sidecar_path(path).unlink()
    register(registry, path, "shape", table(2), sketch=None, tokens="")
    assert found_in(path) == ("registry: shape (by shape: the weights were not compared)", True, 2)


def test_the_file_for_a_server_has_both(model: Path, registry: Path) -> None:
    given = gguf_keys.read_importance(model)
    assert given is not None
    for replayed in (None, table(3)):
        for values in (given, None):
            pairs = read_header(importance.write_gguf(model, values, replayed)).pairs
            assert ("qwen2.attention.head_importance" in pairs) == (values is not None)
            assert ("qwen2.attention.head_replay" in pairs) == (replayed is not None)


def test_tables_of_the_registry_are_sound() -> None:
    entries = [json.loads(file.read_text()) for file in importance.registered()]
    tables = {entry["name"]: (entry, entry["replay"]) for entry in entries if "replay" in entry}
    assert tables.keys() >= {"SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-1.5B-Instruct"}
    for name, (entry, member) in tables.items():
        found = replay_of(member, name=name)
        assert found.values.shape[1:] == (len(entry["heads"]), entry["heads"][0][1]) and found.source
        np.testing.assert_allclose(found.values.mean((1, 2)), found.shares, rtol=1e-3)


# the command


def run(*args: str | Path) -> int:
    return cli.main(["score", "--method", "replay", "--threads", "1", *map(str, args)])


OPTIONS = ("--examples", "4", "--max-tokens", "600")


@embedded
def test_score_writes_file_and_model_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, out = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "out.gguf"
    assert run("-o", first, *OPTIONS, "--seed", "5", "--write", out, "--keep") == 0
    printed = capsys.readouterr().out
    assert "4 of up to 600 tokens: 1 direct, 1 two-hop, 1 comparison, 1 list" in printed and "reliability" in printed
    assert "per 1000 tokens" in printed and all(f"share 1/{n} " in printed for n in (64, 32, 16, 8, 4, 2))
    assert "KV heads keep more than 2/3" in printed
    content = json.loads(first.read_bytes())
    assert content["method"] == "replay" and content["seed"] == 5 and len(content["reliability"]) == 6
    assert len(content["texts"]) == 4 and all(500 < text["n_tokens"] <= 600 for text in content["texts"])
    found, written = load_replay(first), read_replay(out)
    assert written is not None and content["model_sha256"] in written.source and gguf_keys.read_importance(out) is not None
    np.testing.assert_array_equal(written.values, found.values.astype(np.float32))

    script = [sys.executable, SCRIPTS / "replay_stability.py", f"{pyheadkv.embedded_model()},{first}", "-o", tmp_path / "a.md"]
    said = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert (tmp_path / "a.md").read_text() == said and "| 1/64 " in said and "| two-hop " in said
    (tmp_path / "a.md").unlink()
    (tmp_path / "1.json.part").unlink()

    append, done = Journal.append, []

    def interrupt(journal: Journal, o: dict[str, Any]) -> None:
        append(journal, o)
        done.append(o)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupt)
    assert run("-o", second, *OPTIONS, "--seed", "5") == 130
    assert not second.exists()
    assert run("-o", second, *OPTIONS, "--seed", "5") == 1
    assert "--resume" in capsys.readouterr().err
    assert run("-o", second, *OPTIONS, "--seed", "6", "--resume") == 1
    assert "was begun with seed = 5" in capsys.readouterr().err
    assert run("-o", second, *OPTIONS, "--seed", "5", "--resume") == 0
    assert len(done) == 4 and second.read_bytes() == first.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "2.json", "out.gguf"]


@embedded
def test_the_embedded_model_repeats_its_language_and_is_found(tmp_path: Path, registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    without_importance(pyheadkv.embedded_model(), path)
    llm = load(path, kv_size=64, n_ctx=256, policy="snapkv")
    for made in make_replays(llm, max_tokens=600):
        assert 400 < len(made.text) <= 600 and 0 not in made.text
    assert run(path, *OPTIONS) == 0
    beside = places.find_replay(path)
    assert beside is not None and beside.origin == f"beside the model: {tmp_path / 'a.replay.json'}"
    assert run(path, *OPTIONS) == 1 and run(path, *OPTIONS, "--force") == 0
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    (tmp_path / "a.replay.json").unlink()
    assert run(path, *OPTIONS) == 0
    cached = places.find_replay(path)
    assert cached is not None and cached.origin == f"user cache: {places.cache_path(path)}"
    np.testing.assert_array_equal(cached.table.values, beside.table.values)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--answers", "forced"], "--method replay --answers"),
        (["--calibrate"], "--method replay --calibrate"),
        (["--kv-size", "64"], "--method replay --kv-size"),
        (["--protocol", "authors"], "--method replay --protocol authors"),
        (["--max-tokens", "9"], "--max-tokens=9"),
        (["--max-tokens", "20000"], "--max-tokens=20000"),
        (["--examples", "11"], "11 texts to repeat"),
        (["--examples", "3"], r"--examples=3: it must be in [4, 1048576], so many texts are needed"),
        (["--n-batch", "0"], "--n-batch=0"),
        (["--write", "{folder}/none/out.gguf"], "does not exist"),
    ],
)
def test_score_refuses_wrong_options_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], word: str, model: Path
) -> None:
    assert run(model, "-o", tmp_path / "a.json", *[option.format(folder=tmp_path) for option in options]) == 1
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1
    assert not (tmp_path / "a.json").exists()


def test_score_refuses_to_replace_a_table_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path) -> None:
    path = tmp_path / "a.gguf"
    write_replay(model, path, table())
    assert run(path, "-o", tmp_path / "a.json", "--write", tmp_path / "b.gguf") == 1
    assert "has a replay table already: pass --force" in capsys.readouterr().err


def test_a_server_is_given_both(model: Path, tmp_path: Path, registry: Path) -> None:
    from pyheadkv.cli import serve

    path = tmp_path / "a.gguf"
    without_importance(model, path)
    register(registry, path, "mine", table(1))
    line = serve.command_line([str(path), "--kv-size", "64"])
    pairs = read_header(line[-1]).pairs
    assert line[-2] == "--kv-importance" and {"qwen2.attention.head_importance", "qwen2.attention.head_replay"} <= set(pairs)
    assert serve.command_line([str(path), "--kv_size", "64", "--kv_policy", "auto"])[-2] == "--kv-importance"
    given = tmp_path / "given.gguf"
    gguf_keys.write_importance(path, given, random_importance(n_layer=3, n_head=8, seed=5))
    line = serve.command_line([str(path), "--kv-size", "64", "--kv-importance", str(given)])
    known, values = gguf_keys.read_importance(line[-1]), gguf_keys.read_importance(given)
    assert line[-2] == "--kv-importance" and read_replay(line[-1]) is not None and known is not None and values is not None
    np.testing.assert_array_equal(known.values, values.values)
    line = serve.command_line([str(path), "--kv-size", "64", "--kv-policy", "headkv", "--kv-importance", str(given)])
    assert line[-1] == str(given)  # the table is not needed
    assert "--kv-importance" not in serve.command_line([str(path), "--kv_size", "64", "--kv_policy", "snapkv"])
    assert "--kv-importance" not in serve.command_line([str(path), "--kv-size", "0"])


def test_what_a_server_was_given_stays_what_it_is(
    model: Path, tmp_path: Path, registry: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that wakes up reads its file again, whatever others have been given meanwhile."""
    from pyheadkv.cli import serve

    path = tmp_path / "a.gguf"
    without_importance(model, path)
    register(registry, path, "mine", table(1))
    both = Path(serve.command_line([str(path), "--kv-size", "64"])[-1])
    content = both.read_bytes()
    other = Path(serve.command_line([str(path), "--kv-size", "64", "--kv-policy", "headkv"])[-1])
    assert read_replay(other) is None and read_replay(both) is not None and both.read_bytes() == content
    assert serve.command_line([str(path), "--kv-size", "64"])[-1] == str(both)
    capsys.readouterr()
    assert "--kv-importance" not in serve.command_line(["--models-dir", str(tmp_path), "--kv-size", "64"])
    assert "without -m FILE nothing is known of a model but what its metadata has" in capsys.readouterr().err
    monkeypatch.setenv("PYHEADKV_CACHE", str(path / "cache"))
    with pytest.raises(ValueError, match="set PYHEADKV_CACHE to a folder that can be written"):
        serve.command_line([str(path), "--kv-size", "64"])
