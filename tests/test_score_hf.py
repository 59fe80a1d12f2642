"""Scores measured with transformers: its reader against the engine, its tokenizer as a vocabulary, the command."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES, Shape, load, nmse, tokens, unpadded

NEEDS = "needs pip install '.[hf]'"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    pytest.importorskip("accelerate", reason=NEEDS)
try:
    import pyheadkv
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from pyheadkv import cli, score_files  # noqa: E402
from pyheadkv.eval.prose import HAYSTACK  # noqa: E402
from pyheadkv.score import measure as score  # noqa: E402
from pyheadkv.score.examples import METHODS, Example, Examples, make_examples  # noqa: E402

SCRIPTS = Path(__file__).parent.parent / "scripts"

embedded = pytest.mark.skipif(not pyheadkv.embedded_model().is_file(), reason="the embedded model is not there yet")


@pytest.fixture(scope="module")
def score_hf() -> Iterator[ModuleType]:
    """The script; torch has one thread, as llama.cpp has here."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(SCRIPTS))
    import score_hf

    sys.path.remove(str(SCRIPTS))
    yield score_hf
    torch.set_num_threads(n_threads)


def native(path: Path) -> Any:
    options = {"kv_size": 64, "policy": "snapkv", "prefill": "token"}
    return load(path, **options, n_ctx=512, n_threads=1, n_threads_batch=1)


class Asked(Examples):
    """One example; no token ends it."""

    def __init__(self, example: Example) -> None:
        self.example = example

    def make(self, slot: Any) -> Example:
        return self.example

    def is_stop(self, token: int) -> bool:
        return False


@pytest.mark.parametrize(
    ("shape", "changes"),
    [*((shape, {}) for shape in SHAPES), (SHAPES[1], {"n_embd": 132}), (SHAPES[1], {"tie_embeddings": True})],
    ids=lambda value: getattr(value, "name", None) or "-".join(value) or "plain",
)
def test_reader_gives_what_the_engine_gives(
    score_hf: ModuleType, shape: Shape, changes: dict[str, Any], make_model: Callable[..., Path]
) -> None:
    path = make_model(shape, **changes)
    reader = score_hf.HFReader(score_hf.load_gguf(path, dtype=torch.float32), n_chunk=32)
    engine = score.LlamaReader(native(path))
    assert reader.shape == engine.shape == (shape.n_layer, shape.n_head)
    prompt, spans = tokens(150, seed=4), [(3, 9), (60, 80)]
    for one in (reader, engine):
        one.begin(prompt)
    for token in (17, 21):
        assert nmse(reader.last_logits, engine.llm.last_logits) < 1e-4
        for n_top, n_queries in ((1, 1), (26, 1), (26, 8), (140, 8)):
            found, expected = (one.attention(spans, n_top, n_queries) for one in (reader, engine))
            assert [values.dtype for values in found] == [np.float32, np.int32]
            # rounding decides which of two nearly equal positions is the N-th
            assert np.isclose(found[0], expected[0], atol=1e-3).mean() > 0.9
            np.testing.assert_allclose(found[0], expected[0], atol=2e-2)
            assert (found[1] == expected[1]).mean() > 0.9
        for one in (reader, engine):
            one.append(token)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_engine(score_hf: ModuleType, method: str, make_model: Callable[..., Path]) -> None:
    path = make_model(SHAPES[1])
    example = Example(tuple(tokens(70, seed=3)), ((9, 21), (40, 44)), 16, "", 6)
    readers = score_hf.HFReader(score_hf.load_gguf(path, dtype=torch.float32)), score.LlamaReader(native(path))
    (found, said), (expected, wanted) = (score.score_example(reader, example, method=method, examples=Asked(example)) for reader in readers)
    assert said == wanted
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert method == "r" or expected.any()
    forced = replace(example, answer_tokens=tuple(example.tokens[9:15]))
    found, expected = (score.score_forced(reader, forced, method=method) for reader in readers)
    np.testing.assert_allclose(found, expected, atol=5e-3)


def llama() -> Any:
    """A tiny random checkpoint."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 600}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=1))


def test_prompt_in_chunks_is_the_prompt(score_hf: ModuleType) -> None:
    prompt, results = tokens(100, seed=5), []
    for n_chunk in (1, 7, 99, 1000):
        reader = score_hf.HFReader(llama(), n_chunk=n_chunk)
        for _ in range(2):  # the second prompt does not see the first
            reader.begin(prompt)
            results.append((reader.last_logits, reader.attention([(0, 50)], 40, 3)[0]))
    for logits, mass in results[1:]:
        np.testing.assert_allclose(logits, results[0][0], atol=1e-5)
        np.testing.assert_allclose(mass, results[0][1], atol=1e-5)
    whole = reader.model(torch.tensor([prompt]), output_attentions=True)
    rows = torch.stack([torch.stack([layer[0, :, i] for layer in whole.attentions]) for i in (-3, -2, -1)])
    np.testing.assert_allclose(reader.attention([(0, 50)], 100, 3)[0], rows[..., :50].sum(-1).detach(), atol=1e-5)


def test_rows_are_reduced_by_definition(score_hf: ModuleType) -> None:
    reader = score_hf.HFReader(llama())
    reader._rows = [torch.tensor([[[0.1, 0.3, 0.3, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0, 1.0]]])]  # one layer, two heads
    mass, top = reader.attention([(2, 4)], 2, 1)
    assert mass.tolist() == [[[pytest.approx(0.3), 0]]] and top.tolist() == [[[1, 4]]]
    mass, top = reader.attention([(2, 4)], 1, 1)  # of two equal ones the first
    assert mass.tolist() == [[[0, 0]]] and top.tolist() == [[[1, 4]]]
    assert reader.attention([(2, 4), (0, 3)], 5, 1)[0].tolist() == [[[pytest.approx(0.9), 0]]]  # overlapping spans


def test_scaled_rope_of_a_gguf_is_refused(score_hf: ModuleType, tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "scaled.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="llama.rope.scaling.type"):
        score_hf.load_gguf(path, dtype=torch.float32)


# the tokenizer of a checkpoint


CHAT = "{{ bos_token }}[{{ messages[0]['content'] }}]{{ eos_token }}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte-level BPE of the haystack."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train([str(HAYSTACK)], trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    path = tmp_path_factory.mktemp("checkpoint")
    fast.save_pretrained(path)
    model = llama()
    model.generation_config.eos_token_id = [1, 2]
    model.save_pretrained(path)
    return path


@pytest.fixture
def vocab(score_hf: ModuleType, checkpoint: Path) -> Any:
    return score_hf.HFVocab(transformers.AutoTokenizer.from_pretrained(checkpoint), n_vocab=600, ends=[1, 2])


def test_vocabulary_has_the_functions_of_llama(vocab: Any) -> None:
    ids = vocab.tokenize(b" the river</s>", add_bos=False)
    assert vocab.token_eos() not in ids and vocab.detokenize(ids) == b" the river</s>"
    ids = vocab.tokenize(b"the river</s>", special=True)
    assert ids[0] == vocab.token_bos() == 0 and ids[-1] == vocab.token_eos() == 1
    assert vocab.detokenize(ids) == b"the river" and vocab.detokenize(ids, special=True) == b"<s>the river</s>"
    assert vocab.tokenize(b"", add_bos=True) == [0] and vocab.token_get_text(1) == "</s>" and vocab.n_vocab() == 600
    assert [vocab.is_end(i) for i in (0, 1, 2, 3)] == [False, True, True, False]


@pytest.mark.parametrize("method", METHODS)
def test_spans_of_the_tokenizer_are_exactly_the_answer(vocab: Any, method: str) -> None:
    examples = make_examples(vocab, method=method, protocol="clean", max_tokens=1200, n_examples=16)
    for slot in examples.slots:
        example = examples.make(slot)
        said = [vocab.detokenize(example.tokens[start:end]).decode() for start, end in example.spans]
        if slot.kind == "facts":
            assert [s.strip(" .") for s in said] == re.split(", | and ", example.answer.strip("."))
        elif slot.kind in ("passage", "code"):  # the sentence or line that has it
            assert len(said) == 1 and example.answer.lower() in said[0].lower()
        else:
            assert said == [" " + example.answer]
        assert example.tokens[0] == 0 and example.tokens.count(0) == 1 and example.tokens[-1] == 1
    if method == "mix":  # which the authors do not have
        return
    examples = make_examples(vocab, method=method, protocol="authors", max_tokens=800)
    example = examples.make(examples.slots[24])
    ((start, end),) = example.spans
    assert Examples.quality(examples, vocab.detokenize(example.tokens[start:end]).decode(), example.answer) > 0.5


# the command


def command(score_hf: ModuleType, *args: str | Path) -> int:
    return int(score_hf.main([str(arg) for arg in args]))


SHORT: Sequence[str] = ("--examples", "12", "--max-tokens", "512")


@embedded
@pytest.mark.parametrize("method", METHODS)
def test_embedded_model_scores_as_through_llama_cpp(
    score_hf: ModuleType, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, ours, theirs = pyheadkv.embedded_model(), tmp_path / "native.json", tmp_path / "hf.json"
    assert cli.main(["score", "--threads", "1", "-o", str(ours), "--method", method, *SHORT]) == 0
    options = ("-o", theirs, "--method", method, *SHORT)
    assert command(score_hf, "--from-gguf", model, *options, "--compare", ours, "--check-logits") == 0
    assert "native.json: Pearson r " in capsys.readouterr().out
    found, expected = (score_hf.read_scores(path) for path in (theirs, ours))
    assert set(found) == {*expected, "model", "model_files", "logits_nmse"}
    assert found["model"] == model.name and found["model_files"] == {model.name: expected["model_sha256"]}
    assert found["versions"]["transformers"] == transformers.__version__ and found["logits_nmse"] < 1e-4
    assert found["accepted"] == expected["accepted"] and not score_hf.differing(found, expected)
    score_files.load_scores(theirs)
    cells = score_hf.compare(found, expected)
    assert float(cells["Pearson r"]) > 0.97
    n_common, n_top = map(int, cells["top heads"].split(" of "))
    assert n_common == n_top
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf.json", "native.json"]

    report = tmp_path / "report.md"
    assert command(score_hf, "--report", report, "--pair", theirs, ours) == 0
    text = unpadded(report.read_text())
    assert f"| {model.stem} | float32 | clean | {method} | {cells['Pearson r']} | {n_top} of {n_top} |" in text
    assert str(tmp_path) not in text


def test_report_compares_like_with_like(score_hf: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"importance": [[1.0, 0.0]], "examples": [], "accepted": 1, "n_examples": 1, "model_sha256": "a"}
    content |= {"method": "r", "protocol": "clean", "answers": "forced", "max_tokens": 9, "seed": 0}
    paths = [tmp_path / "hf.json", tmp_path / "native.json", tmp_path / "report.md"]
    for path, seed in zip(paths, (0, 1), strict=False):
        path.write_text(json.dumps({**content, "seed": seed}))
    assert command(score_hf, "--report", paths[2], "--pair", *paths[:2]) == 1
    assert "differ in seed" in capsys.readouterr().err
    paths[1].write_text("{}")
    assert command(score_hf, "--report", paths[2], "--pair", *paths[:2]) == 1
    assert "has no accepted" in capsys.readouterr().err and not paths[2].exists()


@embedded
def test_checkpoint_with_the_vocabulary_of_a_gguf_reads_the_same_prompts(score_hf: ModuleType, tmp_path: Path) -> None:
    model, folder = pyheadkv.embedded_model(), tmp_path / "checkpoint"
    loaded = score_hf.load_gguf(model, dtype=torch.float32)
    del loaded.config.quantization_config
    plain = transformers.LlamaForCausalLM(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    options = ("--examples", "8", "--max-tokens", "512")
    assert command(score_hf, "--from-gguf", model, "-o", tmp_path / "a.json", *options) == 0
    assert command(score_hf, folder, "--vocab", model, "-o", tmp_path / "b.json", *options) == 0
    a, b = (score_hf.read_scores(tmp_path / name) for name in ("a.json", "b.json"))
    np.testing.assert_allclose(a["importance"], b["importance"], atol=1e-5)
    assert a["examples"] == b["examples"] and b["model"] == "checkpoint" and a["model_sha256"] != b["model_sha256"]


def test_checkpoint_is_read_with_its_own_tokenizer(
    score_hf: ModuleType, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hf.json"
    options = ("-o", out, "--examples", "2", "--max-tokens", "400")
    assert command(score_hf, checkpoint, *options, "--dtype", "bfloat16") == 1
    assert "2 of 2 examples count, at least 8 are needed" in capsys.readouterr().err and not out.exists()
    out.write_text("mine")
    assert command(score_hf, checkpoint, *options) == 1
    assert "--force" in capsys.readouterr().err and out.read_text() == "mine"
    sums = score_hf.checksums(checkpoint)
    assert list(sums) == ["model.safetensors"] and len(sums["model.safetensors"]) == 64


@pytest.mark.parametrize("args", [[], ["a", "--from-gguf", "b", "-o", "c"], ["a"], ["--report", "a"], ["a", "-o", "c", "--check-logits"]])
def test_incomplete_commands_are_refused(score_hf: ModuleType, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        score_hf.main(args)
    assert "error: " in capsys.readouterr().err
