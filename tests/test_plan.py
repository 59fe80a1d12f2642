"""The memory plan against the ledger, the compute buffers and the resident memory of real prompts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

try:
    import pyheadkv  # noqa: F401
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from conftest import SHAPES, Shape, load, tokens

from pyheadkv import cli, layers
from pyheadkv.cli import inspect, plan
from pyheadkv.cli.plan import MemoryModel
from pyheadkv.model import read_shape
from pyheadkv.options import Options
from pyheadkv.testing import write_random_model
from pyheadkv.units import parse_bytes

MIB = 1 << 20
KV_SIZE, N_PREDICT = 64, 64
GGML_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
READ = """
import json, sys
from pyheadkv import Llama
path, n, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
llm = Llama(path, n_ctx=n + 64, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False, **options)
next(llm.generate([1] + [300 + i % 83 for i in range(n - 1)], temp=0.0))
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.fixture(scope="module")
def path(make_model: Callable[..., Path]) -> Path:
    return make_model(SHAPES[1])


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[MemoryModel]:
    with plan.Probe(path) as probe:
        yield MemoryModel(probe, n_predict=N_PREDICT)


# sizes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GiB", 8 << 30),
        ("512MiB", 512 << 20),
        ("6GB", 6 * 10**9),
        ("1.5 gib", 3 << 29),
        ("0.1kB", 100),
        ("4096", 4096),
        ("7B", 7),
        (" 2TiB ", 2 << 40),
    ],
)
def test_memory_is_parsed(text: str, n_bytes: int) -> None:
    assert parse_bytes("memory", text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "8G", "8 Gi B", "-1GiB", "0", "0.1B", "1e9", "nan", "eight", "8GiB4"])
def test_wrong_memory_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(ValueError, match="such as 8GiB") as error:
        parse_bytes("memory", text)
    assert repr(text) in str(error.value)


def test_parts_of_a_split_model_are_found(tmp_path: Path) -> None:
    names = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names[:2]:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="00003-of-00003.*3 parts"):
        plan.model_files(tmp_path / names[0])
    (tmp_path / names[2]).touch()
    assert [part.name for part in plan.model_files(tmp_path / names[0])] == names
    assert plan.model_files(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]


# against the engine


@pytest.mark.parametrize("prefill", ["token", "layer"])
@pytest.mark.parametrize(
    ("shape", "types"),
    [
        (SHAPES[0], ("bf16", "bf16")),
        (SHAPES[1], ("f16", "f16")),
        (SHAPES[2], ("q8_0", "q4_0")),
        (SHAPES[3], ("q8_0", "q8_0")),
        (Shape("llama-gqa1-wide", "llama", 16, 16, n_layer=2), ("f16", "f16")),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_ledger_of_real_prompts_is_planned(make_model: Callable[..., Path], shape: Shape, types: tuple[str, str], prefill: str) -> None:
    path = make_model(shape)
    type_k, type_v = (GGML_TYPES[name] for name in types)
    llm = load(path, kv_size=KV_SIZE, preset="default", policy="snapkv", prefill=prefill, n_tail=N_PREDICT, type_k=type_k, type_v=type_v)
    with plan.Probe(path) as probe:
        model = MemoryModel(probe, *types, n_predict=N_PREDICT)
        for n_prompt in (KV_SIZE + 1, 300, 1500):
            llm.read_prompt(tokens(n_prompt))
            measured, planned = llm.kv_stats().bytes_peak, model.footprint(prefill, n_prompt=n_prompt, kv_size=KV_SIZE)
            assert measured <= planned.ledger <= 1.01 * measured + 16384, (n_prompt, planned)


@pytest.mark.parametrize("prefill_hidden", ["f32", "f16"])
def test_hidden_states_and_other_ubatches_are_planned(path: Path, prefill_hidden: str) -> None:
    options = {"prefill": "layer", "prefill_hidden": prefill_hidden, "n_batch": 200, "n_ubatch": 200}
    llm = load(path, kv_size=KV_SIZE, preset="default", policy="snapkv", n_tail=N_PREDICT, **options)
    llm.read_prompt(tokens(1234))
    with plan.Probe(path) as probe:
        model = MemoryModel(probe, n_predict=N_PREDICT, n_ubatch=200, prefill_hidden=prefill_hidden)
        planned = model.footprint("layer", n_prompt=1234, kv_size=KV_SIZE)
    assert llm.kv_stats().bytes_peak <= planned.ledger <= 1.03 * llm.kv_stats().bytes_peak


@pytest.mark.parametrize("beta", [1.01, 1.2, 5.0])
def test_budgets_by_importance_add_up_to_the_plan(path: Path, model: MemoryModel, beta: float) -> None:
    for kv_size in (16, 64, 257):
        budget = inspect.make_plan(path, options=Options(kv_size=kv_size, beta=beta)).budget
        assert abs(int(budget.sum()) - kv_size * budget.size) <= budget.size  # at most a cell per head is rounded
    shape = model.probe.shape
    llm = load(path, kv_size=KV_SIZE, preset="default", beta=beta, prefill="layer", n_tail=N_PREDICT)
    llm.read_prompt(tokens(1500))
    rounded = shape.n_layer * shape.n_head_kv * 2 * 2 * shape.n_embd_head_k  # a cell of f16 per head
    assert llm.kv_stats().bytes_peak <= model.footprint("layer", n_prompt=1500, kv_size=KV_SIZE).ledger + rounded


def compute_bytes_in(log: str) -> int:
    """Bytes of the compute buffers that a context has logged, at least: printed with two digits."""
    sizes = re.findall(r"compute buffer size = +([\d.]+) MiB", log)
    assert sizes
    return sum(int((float(size) - 0.005) * MIB) for size in sizes)


@pytest.mark.parametrize("kind", ["stock", "token", "layer"])
@pytest.mark.parametrize("n_ctx", [512, 1280, 4096, 7936])
def test_compute_buffers_of_real_contexts_are_planned(path: Path, model: MemoryModel, kind: str, n_ctx: int) -> None:
    options = {"flash_attn": True} if kind == "stock" else {"kv_size": KV_SIZE, "prefill": kind}
    n_prompt = n_ctx - N_PREDICT
    with layers.captured_log() as lines:
        llm = load(path, n_ctx=n_ctx, **options)
        if n_ctx < 4096 and kind != "stock":
            llm.read_prompt(tokens(n_prompt))
        llm.close()
    log = "".join(lines)
    assert "does not match expectation" not in log  # the prompt did not enlarge them
    measured = compute_bytes_in(log)
    assert measured <= model.footprint(kind, n_prompt=n_prompt, kv_size=KV_SIZE).compute <= 1.1 * measured + 0.1 * MIB


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("kind", ["stock", "token", "layer"])
def test_resident_memory_of_a_prompt_stays_below_the_plan(tmp_path: Path, kind: str) -> None:
    path, n_prompt = tmp_path / "model.gguf", 4000
    write_random_model(path, n_layer=4, n_embd=512, n_head=4, n_head_kv=4, n_ff=64, seed=1, ftype="q8_0")
    options = {} if kind == "stock" else {"kv_size": KV_SIZE, "policy": "snapkv", "prefill": kind}
    command = [sys.executable, "-c", READ, str(path), str(n_prompt), json.dumps(options)]
    # not in the checkout, whose package has no library
    done = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=120)
    measured = int(done.stdout.split()[-1]) * 1024
    with plan.Probe(path) as probe:
        planned = MemoryModel(probe, n_predict=N_PREDICT).footprint(kind, n_prompt=n_prompt, kv_size=KV_SIZE)
    assert measured <= planned.total <= measured + 24 * MIB, planned  # the slack is that of the interpreter


# the plan itself


@pytest.mark.parametrize("prefill", plan.PREFILLS)
def test_memory_grows_with_the_prompt(model: MemoryModel, prefill: str) -> None:
    lengths = np.unique(np.geomspace(KV_SIZE, plan.MAX_TOKENS, 300).astype(int)).tolist()
    totals = [model.footprint(prefill, n_prompt=n, kv_size=KV_SIZE).total for n in lengths]
    assert totals == sorted(totals)


@pytest.mark.parametrize("prefill", plan.PREFILLS)
@pytest.mark.parametrize("memory", [90 * MIB, 200 * MIB, 3000 * MIB])
def test_the_planned_prompt_is_the_longest(model: MemoryModel, prefill: str, memory: int) -> None:
    n_prompt = model.longest(prefill, memory=memory, kv_size=KV_SIZE)
    assert n_prompt > KV_SIZE
    assert model.footprint(prefill, n_prompt=n_prompt, kv_size=KV_SIZE).total <= memory
    for n_more in (1, 256):
        assert model.footprint(prefill, n_prompt=n_prompt + n_more, kv_size=KV_SIZE).total > memory


def test_more_memory_and_smaller_budgets_allow_longer_prompts(path: Path) -> None:
    def longest(memory: int, kv_size: int, prefill: str, cell_type: str = "f16") -> int:
        made = plan.make_plan(path, memory=memory, kv_sizes=[kv_size], type_k=cell_type, type_v=cell_type)
        return max(entry.n_prompt for entry in made.entries if (entry.prefill, entry.type_k) == (prefill, cell_type))

    for prefill in plan.PREFILLS:
        assert longest(128 * MIB, 64, prefill) < longest(129 * MIB, 64, prefill)
        assert longest(128 * MIB, 64, prefill, "q8_0") > longest(128 * MIB, 64, prefill)
    for prefill in ("token", "layer"):
        assert longest(128 * MIB, 1024, prefill) < longest(128 * MIB, 64, prefill)


def test_a_deep_model_reads_longer_prompts_layer_by_layer(tmp_path: Path) -> None:
    path = tmp_path / "deep.gguf"
    write_random_model(path, n_layer=24, n_embd=64, n_head=4, n_head_kv=4, n_ff=64, seed=1)
    entries = plan.make_plan(path, memory=400 * MIB, kv_sizes=[64]).entries
    stock, token, layer = (entry.n_prompt for entry in entries)
    assert stock < token < layer  # the stock cache has masks


def test_models_that_are_not_cut_at_their_layers_have_no_layer_major_prompt(
    path: Path, model: MemoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.probe, "why_not_layer", "it is a circle")
    assert model.longest("layer", memory=1 << 30, kv_size=KV_SIZE) == 0
    made = plan.make_plan(path, memory=1 << 30)
    entries = tuple(entry for entry in made.entries if entry.prefill != "layer")
    assert "it is a circle" in plan.format_plan(plan.MemoryPlan(**{**vars(made), "why_not_layer": "it is a circle", "entries": entries}))


# command


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    assert cli.main(["plan", *map(str, args)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_table_holds_the_numbers_of_the_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [path, "--memory", "256MiB", "--kv-size", "32,64", "--type-k", "q8_0", "--type-v", "q4_0"]
    made = json.loads(run(capsys, *args, "--json"))
    assert made["memory"] == 256 * MIB
    assert [entry["prefill"] for entry in made["entries"]] == 2 * ["stock", "token", "layer", "token", "layer"]
    table = run(capsys, *args)
    for entry in made["entries"]:
        parts = dict(entry["footprint"])
        assert parts.pop("total") == sum(parts.values()) <= made["memory"]
        assert f"{entry['n_prompt']:,}" in table
    for words in ("f16 / f16", "q8_0 / q4_0", "stock", "token-major", "layer-major", "total"):
        assert words in table


def test_prompts_beyond_the_trained_context_are_marked(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_shape(path).n_ctx_train == 32768
    assert "* longer than the 32,768 tokens" in run(capsys, path, "--memory", "1GiB")
    assert "*" not in run(capsys, path, "--memory", "90MiB")


def test_budgets_that_no_prompt_exceeds_are_marked(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, path, "--memory", "90MiB", "--kv-size", "64,60000")
    assert "no prompt that is longer than kv_size fits" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "lots"], ["memory='lots'", "8GiB"]),
        (["--memory", "64MiB"], ["memory=64.00 MiB", "weights", "give more memory"]),
        (["--memory", "1GiB", "--kv-size", "a"], ["kv_size='a'", "64,128"]),
        (["--memory", "1GiB", "--kv-size", "64,5"], ["kv_size=5", "9"]),
        (["--memory", "1GiB", "--kv-size", "99999999999"], ["kv_size=99999999999", "67108864"]),
        (["--memory", "1GiB", "--n-predict", "0"], ["n_predict=0"]),
        (["--memory", "1GiB", "--n-ubatch", "0"], ["n_ubatch=0"]),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert cli.main(["plan", str(path), *options]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pyheadkv: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_models_that_cannot_be_compressed_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    def add_vocab_size(writer: Any, size: int) -> None:
        writer.add_uint32(f"{writer.arch}.vocab_size", size)
        writer.add_causal_attention(False)

    path = tmp_path / "not-causal.gguf"
    monkeypatch.setattr(gguf.GGUFWriter, "add_vocab_size", add_vocab_size)
    write_random_model(path, n_layer=1, n_embd=32, n_head=1, n_head_kv=1, n_ff=32, seed=1)
    assert cli.main(["plan", str(path), "--memory", "1GiB"]) == 1
    err = capsys.readouterr().err
    assert "not-causal.gguf" in err and "not causal" in err and "kv_size=None" in err


def test_files_and_cells_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, broken = tmp_path / "narrow.gguf", tmp_path / "broken.gguf"
    write_random_model(path, n_layer=1, n_embd=32, n_head=2, n_head_kv=1, n_ff=32, seed=1)
    broken.write_bytes(path.read_bytes()[:5000])
    for args, word in (([path, "--type-k", "q8_0"], "heads of 16"), ([broken], "broken.gguf"), ([tmp_path], "no such")):
        assert cli.main(["plan", *map(str, args), "--memory", "1GiB"]) == 1
        assert word in capsys.readouterr().err
