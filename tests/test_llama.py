"""``pyheadkv.Llama`` as users of llama-cpp-python use it, on the embedded model."""

from __future__ import annotations

import importlib.util
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPES, Shape, load, tokens

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture(scope="module")
def llm() -> Any:
    from pyheadkv import Llama, embedded_model

    return Llama(embedded_model(), kv_size=256, n_ctx=4096, n_threads=2, n_threads_batch=2, verbose=False)


@pytest.fixture(scope="module")
def document() -> Any:
    from pyheadkv.eval import needle

    return needle.make_document(random.Random(5), n_tokens=1500, kinds=("direct",))


def complete(llm: Any, document: Any, **options: Any) -> Any:
    return llm.create_completion(document.prompt(1), max_tokens=document.n_answer_tokens, temperature=0.0, **options)


def test_a_needle_is_answered_from_the_compressed_cache(llm: Any, document: Any) -> None:
    text = complete(llm, document)["choices"][0]["text"]
    assert document.is_correct(text), (document.question, document.answer, text)
    stats = llm.kv_stats()
    assert stats.state == "compressed" and stats.bytes_staging == 0
    assert stats.bytes_store < 0.3 * stats.bytes_full


def test_a_completion_ends_with_the_context_whatever_its_size() -> None:
    """The library rounds n_ctx up to a multiple of 256, and upstream goes on to that."""
    from pyheadkv import Llama, embedded_model

    with closing(Llama(embedded_model(), kv_size=64, n_ctx=300, n_threads=1, n_threads_batch=1, verbose=False)) as short:
        prompt = short.tokenize(b"a word and another one, " * 20)[:250]
        found = short.create_completion(prompt, max_tokens=None, temperature=0.0, logit_bias={short.token_eos(): -100.0})
        assert found["choices"][0]["finish_reason"] == "length" and found["usage"]["total_tokens"] == short.n_ctx() == 512


def test_streaming_gives_the_same_text(llm: Any, document: Any) -> None:
    whole = complete(llm, document)["choices"][0]["text"]
    pieces = [chunk["choices"][0]["text"] for chunk in complete(llm, document, stream=True)]
    assert len(pieces) > 1 and "".join(pieces) == whole


def test_a_stop_string_ends_the_text_and_the_next_prompt_works(llm: Any, document: Any) -> None:
    whole = complete(llm, document)["choices"][0]["text"]
    first = whole.split()[0]
    second = whole.split()[1]
    stopped = complete(llm, document, stop=[second])["choices"][0]
    assert stopped["finish_reason"] == "stop" and first in stopped["text"] and second not in stopped["text"]
    assert complete(llm, document)["choices"][0]["text"] == whole


def test_a_grammar_constrains_the_answer(llm: Any, document: Any) -> None:
    from llama_cpp import LlamaGrammar

    grammar = LlamaGrammar.from_string('root ::= " " [0-9] [0-9] " ."', verbose=False)
    text = complete(llm, document, grammar=grammar)["choices"][0]["text"]
    assert len(text) == 5 and text.endswith(" .")


def test_chat_completion_uses_the_template_of_the_model(llm: Any, document: Any) -> None:
    answer = llm.create_chat_completion(document.messages(), max_tokens=document.n_answer_tokens, temperature=0.0)
    assert document.is_correct(answer["choices"][0]["message"]["content"])


def test_a_pickled_model_keeps_its_options(llm: Any, document: Any) -> None:
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.kv_options == llm.kv_options
    assert complete(copy, document)["choices"][0]["text"] == complete(llm, document)["choices"][0]["text"]


def run_python(code: str, *flags: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Python without what the environment says about our library, unless ``env`` does."""
    ours = ("PYTHONPATH", "PYHEADKV_LIB_PATH", "LLAMA_CPP_LIB_PATH", "PYTHONSAFEPATH")
    env = {**{k: v for k, v in os.environ.items() if k not in ours}, **env}
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_a_stock_library_that_was_loaded_first_is_an_import_error(stock_lib: Any) -> None:
    res = run_python("import llama_cpp\nimport pyheadkv", cwd=ROOT, LLAMA_CPP_LIB_PATH=str(stock_lib))
    assert res.returncode == 1 and "import pyheadkv first" in res.stderr and str(stock_lib) in res.stderr


def test_llama_cpp_may_be_imported_first_where_its_library_is_ours() -> None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not (Path(str(spec.origin)).parent / "lib").samefile(_library()):
        pytest.skip("llama_cpp has a library of its own: not the environment of make")
    res = run_python("from llama_cpp import LlamaGrammar\nfrom pyheadkv import Llama\nprint(Llama)", cwd=ROOT / "tests")
    assert res.returncode == 0 and "pyheadkv" in res.stdout, res.stderr


def test_another_library_that_was_loaded_first_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "libllama.so").touch()
    res = run_python("import llama_cpp\nimport pyheadkv", cwd=ROOT, LLAMA_CPP_LIB_PATH=str(_library()), PYHEADKV_LIB_PATH=str(tmp_path))
    assert res.returncode == 1 and f"set LLAMA_CPP_LIB_PATH={tmp_path}" in res.stderr and str(_library()) in res.stderr, res.stderr


def _library() -> Path:
    from pyheadkv import _lib

    return _lib.library_path()


def test_the_package_is_imported_in_the_checkout() -> None:
    if not (ROOT / "pyheadkv" / "lib").is_dir():
        pytest.skip("no library in the checkout: run make")
    for cwd in (ROOT, ROOT / "tests"):
        res = run_python("import pyheadkv; print(pyheadkv.__file__, pyheadkv.Llama)", cwd=cwd)
        assert res.returncode == 0 and res.stdout.startswith(str(ROOT)), res.stderr


INFERENCE = """
import sys
sys.modules["matplotlib"] = None
from pyheadkv import Llama, cli, embedded_model
llm = Llama(embedded_model(), kv_size=64, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
assert llm("the code of anna is 48 . question : the code of anna is", max_tokens=2)["choices"][0]["text"]
print(cli.main(["inspect"]), cli.main(["inspect", "-o", "a.png"]), cli.main(["eval", "needle", "-o", "a.jsonl"]))
"""


def test_inference_does_without_matplotlib_and_commands_that_draw_name_the_extra(tmp_path: Path) -> None:
    res = run_python(INFERENCE, cwd=tmp_path, PYTHONPATH=os.pathsep.join(sys.path))
    assert res.returncode == 0 and res.stdout.endswith("0 1 1\n"), res.stderr
    for what in ("heat map", "report"):
        assert f'the {what} is made with matplotlib, which is not installed: pip install "pyheadkv[eval]"' in res.stderr
    assert not list(tmp_path.iterdir())


def test_a_source_tree_without_a_library_that_hides_the_installed_package_is_named(tmp_path: Path) -> None:
    tree, site = tmp_path / "tree", tmp_path / "site"
    shutil.copytree(ROOT / "pyheadkv", tree / "pyheadkv", ignore=shutil.ignore_patterns("lib", "data", "__pycache__"))
    (site / "pyheadkv").mkdir(parents=True)
    (site / "pyheadkv-0.1.0.dist-info").mkdir()
    (site / "pyheadkv-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pyheadkv\nVersion: 0.1.0\n")
    res = run_python("import pyheadkv", "-S", cwd=tree, PYTHONPATH=str(site))
    assert res.returncode != 0 and "start Python in another folder" in res.stderr and str(site) in res.stderr, res.stderr


@pytest.mark.parametrize("kv_size", [None, 64])
def test_an_adapter_that_cannot_be_loaded_is_an_error(kv_size: int | None, tmp_path: Path) -> None:
    from pyheadkv import Llama, embedded_model

    for lora in (tmp_path / "nope.gguf", embedded_model()):
        with pytest.raises(ValueError, match="it is not an adapter of this model"):
            Llama(embedded_model(), kv_size=kv_size, n_ctx=256, n_threads=1, lora_path=str(lora), verbose=False)


@pytest.mark.parametrize("kv_size", [None, 24])
def test_tokens_longer_than_upstreams_buffer_keep_their_text(
    make_model: Callable[..., Path], library: None, monkeypatch: pytest.MonkeyPatch, kv_size: int | None
) -> None:
    import pyheadkv.llama as module

    llm = load(make_model(SHAPES[1]), kv_size=kv_size)
    ids = llm.tokenize("A long text, in tokens. é".encode(), add_bos=False)
    text = llm.detokenize(ids)
    real = module._lib.piece
    long = ids[2]

    def piece(vocab: Any, token: int, special: bool) -> bytes:
        return b"-" * 40 if token == long else real(vocab, token, special)

    monkeypatch.setattr(module._lib, "piece", piece)
    llm._pieces.clear()
    one = real(llm._model.vocab, long, False)
    found = llm.detokenize(ids)
    assert len(found) == len(text) + ids.count(long) * (40 - len(one)) and b"-" * 40 in found
    with pytest.raises(ValueError, match="999999"):
        llm.detokenize([999999])


def test_a_prompt_fills_the_context_as_it_is_rounded(make_model: Callable[..., Path], library: None) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=24, n_ctx=300)
    llm.read_prompt(tokens(400))
    assert llm.kv_stats().n_prompt == 400 and llm.n_ctx() == 512


@pytest.mark.parametrize("options", [{}, {"kv_size": 24}], ids=["stock", "compressed"])
def test_a_model_that_was_closed_says_so(make_model: Callable[..., Path], library: None, options: dict[str, Any]) -> None:
    llm = load(make_model(SHAPES[1]), **options)
    answer = llm.generate(tokens(40), temp=0.0)
    next(answer)
    llm.close()
    llm.close()
    asked: list[Callable[[], Any]] = [
        lambda: next(answer), lambda: next(llm.generate(tokens(40))), lambda: llm("a", max_tokens=1), lambda: llm.eval([5]), lambda: llm.policy,
        lambda: llm.save_state(), lambda: llm.tokenize(b"a"), lambda: llm.n_ctx(), lambda: llm.last_logits,
    ]  # fmt: skip
    if options:
        asked += [
            lambda: llm.reset(),
            lambda: llm.kv_stats(),
            lambda: llm.kv_positions(0, 0),
            lambda: llm.configure(kv_size=32),
            lambda: llm.kv_text(),
        ]
    for what in asked:
        with pytest.raises(ValueError, match="the model was closed: load it again"):
            what()


@pytest.mark.parametrize("name", ["type_k", "type_v"])
def test_types_whose_blocks_a_head_does_not_fill_are_refused_with_the_remedy(
    name: str, make_model: Callable[..., Path], library: None
) -> None:
    path = make_model(Shape("llama-80", "llama", 4, 2, head_dim=80))
    with pytest.raises(ValueError, match=f"{name}=8: q8_0 joins 32 values to a block, which heads of 80 values do not fill: use f16"):
        load(path, kv_size=24, **{name: 8})


@pytest.mark.parametrize("value", [999, -1, 5, 26, "q8_0", True])
@pytest.mark.parametrize("options", [{}, {"kv_size": 24}], ids=["stock", "compressed"])
def test_types_that_cells_cannot_have_are_refused(
    make_model: Callable[..., Path], library: None, options: dict[str, Any], value: Any
) -> None:
    for name in ("type_k", "type_v"):
        with pytest.raises(
            ValueError, match=f"{name}={value!r}: it must be the number of a type, one of 0 = f32, 1 = f16, 30 = bf16, 8 = q8_0"
        ):
            load(make_model(SHAPES[1]), **options, **{name: value})


@pytest.mark.parametrize("seq_id", [1, -1, True, "a", 0.5])
def test_a_sequence_that_is_not_there_is_refused_with_the_remedy(make_model: Callable[..., Path], library: None, seq_id: Any) -> None:
    llm = load(make_model(SHAPES[1]), kv_size=24)
    llm.read_prompt(tokens(40))
    for what in (
        lambda: llm.kv_text(seq_id=seq_id),
        lambda: llm.kv_plot(seq_id=seq_id),
        lambda: llm.kv_stats(seq_id),
        lambda: llm.kv_positions(0, 0, seq_id),
    ):
        with pytest.raises(
            ValueError, match=f"seq_id={seq_id!r}: .*in .0, 0., the sequences of the context: create Llama with a larger n_seq_max"
        ):
            what()


@pytest.mark.parametrize("option", [{"kv_generated_rank": "recent"}, {"kv_generated_scope": "all"}, {"kv_generated_slack": 8}])
def test_options_of_evictions_without_evictions_are_refused(make_model: Callable[..., Path], library: None, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give kv_generated"):
        load(make_model(SHAPES[1]), kv_size=24, **option)
    llm = load(make_model(SHAPES[1]), kv_size=24)
    with pytest.raises(ValueError, match="give kv_generated"):
        llm.configure(**option)
