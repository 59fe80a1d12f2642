"""llama-server with compression: flags, slots, reuse, requests that fail, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

try:
    import pyheadkv
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from conftest import HYBRID, N_THREADS, WINDOWED, Shape, greedy, load, stop_process, without_importance

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import llama_server
from llama_server import free_port

from pyheadkv import gguf_keys, importance, replay_values
from pyheadkv.cli import serve
from pyheadkv.eval import needle
from pyheadkv.testing import write_random_lora, write_random_model

MODEL = pyheadkv.embedded_model()
if not MODEL.is_file():
    pytest.skip("the embedded model is not there yet", allow_module_level=True)
try:
    SERVER = serve.server_path()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)

N_CTX, N_UBATCH, KV_SIZE, WINDOW = 2048, 512, 128, 8
SECONDS = 300  # for the server to start, and for one answer
FLAGS = {
    "--kv-size": "0",
    "--kv-policy": "auto",
    "--kv-budget": "that of the policy",
    "--kv-rank": "that of the policy",
    "--kv-fit": "that of the policy",
    "--kv-question": "later with --kv-reuse where the replay table is known, else known",
    "--kv-beta": "1.2",
    "--kv-window": "64",
    "--kv-recent": "8",
    "--kv-power": "4",
    "--kv-pool": "max",
    "--kv-pool-kernel": "0",
    "--kv-importance": "the model",
    "--kv-prefill": "auto",
    "--kv-reuse": "disabled",
    "--kv-size-max": "--kv-size",
    "--kv-archive": "off",
    "--kv-archive-size": "20GiB, of ram a quarter of it",
    "--kv-archive-type": "as the cache has them",
    "--kv-sinks": "4 with the ranks recent, value, output, expected, outlying, outlying+value and attention*value, else 0",
    "--kv-generated": "0",
    "--kv-generated-scope": "generated",
    "--kv-generated-rank": "attention",
    "--kv-generated-slack": "128",
    "--kv-limit": "those that the model was trained with",
    "--kv-page": "off, with pyheadkv serve its own",
    "--kv-positions": "auto",
}  # and their defaults


class Server(llama_server.Server):
    """A running llama-server.

    Parameters
    ----------
    log : file of its output
    """

    seconds = SECONDS

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        super().__init__(process, port)
        self.log = log

    def complete(self, prompt: Any, n: int, **more: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True, **more}
        status, answer = self.request("/completion", body)
        assert status == 200, answer
        return dict(answer)

    def tokens(self, prompt: Sequence[int], n: int, **more: Any) -> list[int]:
        return until_end(self.complete(list(prompt), n, **more)["tokens"])

    def get(self, path: str) -> Any:
        status, answer = self.request(path)
        assert status == 200, answer
        return answer

    def metric(self, name: str) -> float:
        lines = [line.split() for line in self.get("/metrics").splitlines() if line.startswith(f"llamacpp:{name} ")]
        assert len(lines) == 1, name
        return float(lines[0][1])

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, text: str, *, behind: int = 0) -> bool:
        """Whether its log has a text behind so many characters, or gets it soon: a thread of its own writes it."""
        deadline = time.monotonic() + SECONDS
        while text not in self.output()[behind:] and time.monotonic() < deadline:
            time.sleep(0.05)
        return text in self.output()[behind:]


@contextmanager
def running(log: Path, *flags: Any, model: Path = MODEL, n_slots: int = 1, environ: dict[str, str] | None = None) -> Iterator[Server]:
    """A server with n_slots slots of N_CTX tokens."""
    port = free_port()
    command = [
        SERVER,
        "-m",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "-c",
        N_CTX * n_slots,
        "-np",
        n_slots,
        "-b",
        N_UBATCH,
        "-ub",
        N_UBATCH,
        "-t",
        N_THREADS,
        "-tb",
        N_THREADS,
        "--no-warmup",
        "--metrics",
        *flags,
    ]
    with log.open("wb") as out:
        process = subprocess.Popen([str(c) for c in command], stdout=out, stderr=out, env={**os.environ, **(environ or {})})
        server = Server(process, port, log)
        try:
            wait_until_healthy(server)
            yield server
            assert process.poll() is None, f"llama-server ended with {process.returncode}: {server.output()[-2000:]}"
        finally:
            stop_process(process)


def wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert server.process.poll() is None, f"llama-server ended with {server.process.returncode}: {server.output()[-2000:]}"
        try:
            if server.request("/health", timeout=5)[0] == 200:
                return
        except OSError:  # not listening yet
            pass
        time.sleep(0.05)
    raise TimeoutError(f"llama-server did not answer within {SECONDS} s")


def refusal(*flags: Any, model: Path = MODEL, environ: dict[str, str] | None = None) -> str:
    """Output of a server that must not start."""
    command = [SERVER, "-m", model, "--host", "127.0.0.1", "--port", free_port(), "-c", 512, "-np", 1, "-t", 1, "--no-warmup", *flags]
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS, env={**os.environ, **(environ or {})}
    )
    assert done.returncode == 1
    return done.stdout.decode(errors="replace")


def until_end(tokens: Sequence[int]) -> list[int]:
    return list(tokens[: tokens.index(needle.EOS)]) if needle.EOS in tokens else list(tokens)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def llm() -> Any:
    return load(MODEL, preset="default", kv_size=KV_SIZE, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH)


def prompt_ids(llm: Any, seed: int, n_tokens: int = 1000) -> list[int]:
    kind = needle.KINDS[seed % len(needle.KINDS)]
    text = needle.make_document(random.Random(seed), n_tokens=n_tokens, kinds=[kind]).prompt()
    return list(llm.tokenize(text.encode()))


def words(llm: Any, text: str) -> list[int]:
    return list(llm.tokenize(f" {text}".encode(), add_bos=False))


def expected(llm: Any, prompt: Sequence[int], n: int) -> list[int]:
    """What the library generates with a context of its own."""
    llm.reset()
    return until_end(greedy(llm, list(prompt), n))


# flags


def test_the_help_has_every_flag_its_variable_and_its_default() -> None:
    text = subprocess.run([SERVER, "--help"], capture_output=True, text=True, timeout=SECONDS).stdout
    for flag, default in FLAGS.items():
        _, _, after = text.partition(f"\n{flag} ") if f"\n{flag} " in text else text.partition(f"\n{flag},")
        entry = " ".join(after.split("LLAMA_ARG_")[0].split())
        assert default in entry, flag
        assert f"(env: LLAMA_ARG_{flag[2:].upper().replace('-', '_')})" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-size", "many"], "'many': it must be an integer"),
        (["--kv-size", "128x"], "'128x': it must be an integer"),
        (["--kv-size", "-1"], "'-1': it must be more than --kv-recent"),
        (["--kv-size", "8"], "--kv-size is 8: it counts the 8 recent cells, so it must be at least 9"),
        (["--kv-size", "4096"], "kv_size is 4096: it must not be larger than n_ctx = 512"),
        (["--kv-policy", "nope"], "--kv-policy is 'nope': it must be one of headkv"),
        (["--kv-beta", "1"], "--kv-beta is 1: it must be a finite number > 1"),
        (["--kv-beta", "large"], "'large': it must be a number"),
        (["--kv-window", "257"], "--kv-window is 257: it must be in [1, 256]"),
        (["--kv-power", "3"], "--kv-power is 3: it must be 1, 2, 4 or 8"),
        (["--kv-policy", "lossless"], "--kv-policy lossless: it keeps all cells, leave --kv-size out"),
        (["--kv-pool", "min"], "'min': it must be one of max, avg"),
        (["--kv-pool-kernel", "4"], "--kv-pool-kernel is 4: it must be odd"),
        (["--kv-prefill", "row"], "'row': it must be one of auto, token, layer"),
        (["--kv-importance", "missing.gguf"], "--kv-importance missing.gguf: it cannot be read"),
        (["--kv-importance", "missing.gguf", "--kv-policy", "snapkv"], "--kv-importance missing.gguf: it cannot be read"),
        (["--kv-beta", "2", "--kv-policy", "uniform/outlying"], "--kv-beta 2: policy uniform/outlying does not look at it"),
        (["--kv-beta", "2", "--kv-budget", "uniform"], "--kv-beta 2: policy snapkv does not look at it"),
        (["--kv-recent", "0"], "--kv-recent is 0: it must be in [1, 1048576]"),
        (["--kv-size-max", "0"], "'0': it must be at least --kv-size"),
        (["--kv-size-max", "63"], "--kv-size-max 63: it must be at least --kv-size 64"),
        (["--kv-size-max", "513"], "kv_size is 513: it must not be larger than n_ctx = 512"),
        (["--kv-archive", ""], "an empty name: it must be a folder, or ram"),
        (["--kv-archive", "/proc/nothing"], "--kv-archive: /proc/nothing: "),
        (["--kv-archive", "ram", "--kv-reuse"], "--kv-archive: with --kv-reuse prompts continue on the compressed past"),
        (["--kv-archive", "ram", "--kv-archive-size", "much"], "'much': it must be a positive size such as 20GiB"),
        (["--kv-archive", "ram", "--kv-archive-type", "q9"], "'q9': it must be one of f16, bf16, q8_0, q4_0"),
        (["--kv-archive-size", "1GiB"], "--kv-archive-size, --kv-archive-type: there is no archive"),
        (["--kv-sinks", "-2"], "--kv-sinks is -2"),
        (["--kv-generated", "64"], "--kv-generated is 64: it counts the last 64 tokens"),
        (["--kv-sinks", "513"], "sinks or protect reach to position 513: they must end at or before n_ctx = 512"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_wrong_value_is_refused_with_its_range(flags: list[str], message: str) -> None:
    size = [] if flags[0] == "--kv-size" else ["--kv-size", "64"]
    assert message in refusal(*size, *flags)


def test_flags_without_a_size_are_refused() -> None:
    assert "--kv-policy has no effect without --kv-size" in refusal("--kv-policy", "snapkv")


def test_a_model_without_importance_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.gguf"
    write_random_model(path, n_layer=2, n_embd=64, n_head=4, n_head_kv=2, n_ff=96, n_ctx_train=1024, seed=3)
    assert "needs the importance of each head" in refusal("--kv-size", 64, "--kv-policy", "headkv", model=path)


def test_lossless_keeps_all_cells_and_refuses_an_amount(llm: Any, log: Path) -> None:
    prompt, n = prompt_ids(llm, 6), 24
    lossless = load(MODEL, policy="lossless", n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH)
    with closing(lossless), running(log, "--kv-policy", "lossless") as server:
        assert server.tokens(prompt, n) == expected(lossless, prompt, n)
        props = server.get("/props")["kv"]
        assert (props["size"], props["policy"]) == (0, "lossless")
        status, error = server.request("/completion", {"prompt": prompt, "n_predict": 1, "kv_size": 64})
        assert status == 400 and "the server keeps all cells (--kv-policy lossless)" in error["error"]["message"]
        status, answer = server.request("/completion", {"prompt": prompt, "n_predict": 1})
        assert status == 200 and answer["timings"]["kv"]["cells"]["min"] >= len(prompt)


def test_auto_says_what_it_chose(llm: Any, log: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.gguf"
    without_importance(MODEL, plain)
    for model, policy in ((MODEL, "headkv"), (plain, "adakv")):
        with running(log, "--kv-size", KV_SIZE, model=model) as server:
            assert server.get("/props")["kv"]["policy"] == policy
            assert server.says(f"compression: policy {policy} (question known), --kv-size {KV_SIZE}")


def with_table(path: Path) -> Path:
    """The model with a replay table in its metadata, by which the first layer needs most."""
    heads, shares = importance.fingerprint(MODEL).heads, np.array([1 / 16, 1 / 4])
    values = np.ones((2, len(heads), heads[0][1]))
    values[:, 0] = 3
    values *= (shares / values.mean(axis=(1, 2)))[:, None, None]
    replay_values.write_replay(MODEL, path, replay_values.ReplayTable(shares, values))
    return path


def test_a_request_says_when_its_question_comes(llm: Any, log: Path, tmp_path: Path) -> None:
    prompt, n = prompt_ids(llm, 1), 12
    options = {"preset": "default", "kv_size": KV_SIZE, "n_ctx": N_CTX, "n_batch": N_UBATCH, "n_ubatch": N_UBATCH, "question": "later"}
    both = with_table(tmp_path / "both.gguf")
    with closing(load(MODEL, **options)) as later, closing(load(both, **options)) as by_table:
        answers = expected(llm, prompt, n), expected(later, prompt, n), expected(by_table, prompt, n)
        assert (later.policy, by_table.policy) == ("importance/outlying", "mix/outlying+value")
        later.configure(question="both")
        by_table.configure(question="both")
        first = {model: expected(llm, prompt, n) for model, llm in ((MODEL, later), (both, by_table))}
    for model, flags, policy, other, default in (
        (MODEL, (), "importance/outlying", answers[1], answers[0]),
        (both, (), "mix/outlying+value", answers[2], answers[0]),
        (both, ("--kv-question", "later"), "mix/outlying+value", answers[2], answers[2]),
    ):
        with running(log, "--kv-size", KV_SIZE, *flags, model=model) as server:
            props = server.get("/props")["kv"]
            assert (props["policy_known"], props["policy_later"]) == ("headkv", policy)
            assert props["policy_both"] == ("mix/attention+outlying" if model == both else "importance/attention+outlying")
            assert props["policy"] == (policy if flags else "headkv")
            assert server.tokens(prompt, n) == server.tokens(prompt, n, kv_question=None) == default
            assert server.tokens(prompt, n, kv_question="later") == other
            assert server.tokens(prompt, n, kv_question="known") == answers[0]
            assert server.tokens(prompt, n, kv_question="both") == first[model]
            for wrong in ("never", 1, ["later"], ""):
                status, answer = server.request("/completion", {"prompt": prompt, "n_predict": 1, "kv_question": wrong})
                assert status == 400 and answer["error"]["message"].startswith("kv_question is ")


def test_a_file_adds_to_what_the_model_has(log: Path, tmp_path: Path) -> None:
    both = with_table(tmp_path / "both.gguf")
    alone, nothing = importance.write_gguf(both, None, replay_values.read_replay(both)), tmp_path / "nothing.gguf"
    for model, given in ((MODEL, alone), (both, MODEL)):
        with running(log, "--kv-size", KV_SIZE, "--kv-importance", given, model=model) as server:
            props = server.get("/props")["kv"]
            assert (props["policy_known"], props["policy_later"]) == ("headkv", "mix/outlying+value")
    without_importance(MODEL, nothing)
    done = subprocess.run(
        [SERVER, "-m", MODEL, "--kv-size", "64", "--kv-importance", nothing], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode != 0 and f"{nothing} has neither importance nor a replay table of heads" in done.stdout + done.stderr


def test_later_is_what_reuse_means_where_the_table_is_known(log: Path, tmp_path: Path) -> None:
    for model, flags, policy in (
        (MODEL, (), "headkv"),
        (with_table(tmp_path / "both.gguf"), (), "mix/outlying+value"),
        (tmp_path / "both.gguf", ("--kv-question", "known"), "headkv"),
    ):
        with running(log, "--kv-size", KV_SIZE, "--kv-reuse", *flags, model=model) as server:
            assert server.get("/props")["kv"]["policy"] == policy
        with closing(load(model, kv_size=KV_SIZE, policy="auto", kv_reuse=True, question=flags[1] if flags else None)) as llm:
            assert llm.policy == policy


def test_wrong_choices_end_the_server_with_what_is_known(log: Path) -> None:
    for flags, message in (
        (("--kv-rank", "values"), "rank is 'values': it must be one of attention, value"),
        (("--kv-budget", "none"), "budget is 'none': it must be one of uniform, importance"),
        (("--kv-policy", "mix/value/values/x"), "fit is 'values/x'"),
        (("--kv-policy", "replay/value"), "needs the replay table of each head"),
        (("--kv-question", "never"), "'never': it must be one of known, both, later"),
        (("--kv-question", "later", "--kv-policy", "snapkv"), "--kv-question: a policy that is named does not look at it"),
        (
            ("--kv-question", "later", "--kv-budget", "uniform", "--kv-rank", "value"),
            "--kv-question: a policy that is named does not look at it",
        ),
    ):
        done = subprocess.run([SERVER, "-m", MODEL, "--kv-size", "64", *flags], capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode != 0 and message in done.stdout + done.stderr


def test_serve_finds_the_importance_that_python_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, given = tmp_path / "plain.gguf", ["--kv-size", "64"]
    without_importance(MODEL, plain)
    monkeypatch.setenv("PYHEADKV_CACHE", str(tmp_path / "cache"))
    assert serve.command_line([str(plain), *given])[3:] == ["-m", str(plain), *given]
    values = gguf_keys.read_importance(MODEL)
    importance.sidecar_path(plain).write_text(json.dumps({"importance": values.values.tolist(), "method": "r2"}))
    command = serve.command_line([str(plain), *given])
    assert command[3:-2] == ["-m", str(plain), *given] and command[-2] == "--kv-importance"
    np.testing.assert_array_equal(gguf_keys.read_importance(command[-1]).values, values.values)
    for more in (["--kv-policy", "snapkv"], ["--kv-importance", "a.gguf"]):
        assert (
            "--kv-importance" not in serve.command_line([str(plain), *given, *more])[-1:]
            and serve.command_line([str(plain), *given, *more])[-2:] == more
        )
    assert serve.command_line([str(plain)])[-1] == str(plain)  # no compression
    assert serve.command_line([str(MODEL), *given])[-2:] == given  # in its metadata


@pytest.mark.parametrize(
    "flags",
    [
        ["--context-shift"],
        ["--embeddings"],
        ["--reranking"],
        ["--cache-reuse", "64"],
        ["--slot-save-path", "."],
        ["--cache-ram", "100"],
        ["--ctx-checkpoints", "4"],
        ["--ctx-checkpoints", "4", "--kv-reuse"],
        ["--spec-type", "ngram-mod"],
        ["--spec-default"],
        ["--swa-full"],
        ["-fa", "off"],
        ["--pooling", "mean"],
        ["--model-draft", str(MODEL)],
        ["--spec-type", "draft-mtp"],
        ["--mmproj", "missing.gguf"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_combined_is_refused_by_name(flags: list[str]) -> None:
    output = refusal("--kv-size", 64, *flags)
    named = {"--reranking": "--reranking", "--spec-default": "--spec-type"}.get(flags[0], flags[0])
    assert "not possible with --kv-size 64" in output and named in output.split("not possible")[1]


def test_split_modes_and_group_attention_are_refused() -> None:
    assert "split modes 'row' and 'tensor' are not supported" in refusal("--kv-size", 64, "-sm", "row")
    assert "--grp-attn-n" in refusal("--kv-size", 64, "--grp-attn-n", "2")  # upstream's server has no such flag any more


def test_a_model_that_cannot_be_compressed_is_refused(tmp_path: Path) -> None:
    """A model whose attention is not causal."""
    import gguf

    path, other = tmp_path / "llama.gguf", tmp_path / "other.gguf"
    write_random_model(path, n_layer=4, n_embd=64, n_head=4, n_head_kv=2, n_ff=96, n_ctx_train=1024, seed=3, tie_embeddings=True)
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(other, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            element = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], element)
    writer.add_causal_attention(False)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    output = refusal("--kv-size", 64, "--kv-policy", "snapkv", model=other)
    assert re.search("KV compression is not possible for .*llama.*: the attention is not causal", output)


def test_what_a_compressing_server_has_no_answer_for_is_an_error(small_server: Server) -> None:
    for path, body in (
        ("/embedding", {"content": "the"}),
        ("/v1/embeddings", {"input": "the"}),
        ("/rerank", {"query": "a", "documents": ["b"]}),
        ("/slots/0?action=save", {"filename": "x"}),
        ("/slots/0?action=restore", {"filename": "x"}),
    ):
        status, answer = small_server.request(path, body)
        assert status == 501 and answer["error"]["type"] == "not_supported_error", path
    small_server.complete("the", 2, n_cache_reuse=64)
    assert "cache reuse is not supported - ignoring n_cache_reuse = 64" in small_server.output()


def test_what_is_switched_off_is_said_once(log: Path) -> None:
    for flags, said in (([], ["--cache-ram", "--ctx-checkpoints"]), (["--kv-reuse"], ["--ctx-checkpoints"])):
        with running(log, "--kv-size", 64, *flags) as server:
            lines = [line for line in server.output().splitlines() if "switched off" in line]
            assert len(lines) == len(said) and all(any(flag in line for line in lines) for flag in said)


def test_sampling_on_the_backend(llm: Any, log: Path) -> None:
    prompts = [prompt_ids(llm, seed) for seed in range(3)]
    answers = [expected(llm, prompt, 12) for prompt in prompts]
    with running(log, "--kv-size", KV_SIZE, "--backend-sampling", n_slots=2) as server, ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda prompt: server.tokens(prompt, 12, backend_sampling=True, top_k=1), prompts)) == answers


# off


def test_off_is_upstream(log: Path) -> None:
    stock = load(MODEL, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH, flash_attn=True)
    prompts = [prompt_ids(stock, seed) for seed in range(2)]
    answers = [expected(stock, prompt, 16) for prompt in prompts]
    with running(log) as server:
        for prompt, answer in zip(prompts, answers):
            result = server.complete(prompt, 16, kv_size="not looked at")
            assert until_end(result["tokens"]) == answer
            assert "kv" not in result["timings"]
        assert "kv" not in server.get("/props") and "kv" not in server.get("/slots")[0]
        assert "llamacpp:kv" not in server.get("/metrics")
        again = server.complete([*prompts[1], *answers[1]], 4)
        assert again["timings"]["cache_n"] >= len(prompts[1]) - 1
    assert "compression" not in server.output()


# slots


@pytest.mark.parametrize("prefill", ["auto", "layer", "token"])
@pytest.mark.parametrize("n_slots", [1, 2, 4, 8])
def test_slots_give_what_single_runs_give(n_slots: int, prefill: str, llm: Any, log: Path) -> None:
    """Prompts of different lengths and kinds, all at once, more of them than slots."""
    n = 24
    prompts = [prompt_ids(llm, seed, 900 + 50 * seed) for seed in range(n_slots + 2)]
    answers = [expected(llm, prompt, n) for prompt in prompts]
    with running(log, "--kv-size", KV_SIZE, "--kv-prefill", prefill, n_slots=n_slots) as server:
        with ThreadPoolExecutor(len(prompts)) as pool:
            got = list(pool.map(lambda prompt: server.tokens(prompt, n), prompts))
        assert got == answers
        assert server.metric("kv_compressions_total") == len(prompts)


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that needs seconds for a prompt."""
    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    write_random_model(
        path, n_layer=12, n_embd=512, n_head=8, n_head_kv=8, n_ff=2048, n_vocab=384, n_ctx_train=2 * N_CTX, seed=3, importance="random"
    )
    return path


SHORT, LONG = ([20 + seed + (7 * i) % 300 for i in range(n)] for seed, n in ((1, 100), (2, 1900)))


@contextmanager
def stream_of(server: Server, prompt: Sequence[int], n: int, **more: Any) -> Iterator[Iterator[tuple[float, str]]]:
    """The lines of a streamed completion, each with the seconds since the request; the headers come first, as an empty line."""
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "stream": True, "return_tokens": True, "ignore_eos": True, **more}
    start = time.monotonic()
    with server.open("/completion", body, stream=True) as response:
        seconds = time.monotonic() - start
        response.raise_for_status()

        def lines() -> Iterator[tuple[float, str]]:
            yield seconds, ""
            for line in response.iter_lines():
                yield time.monotonic() - start, line.decode().strip()

        yield lines()


def data_of(lines: Iterator[tuple[float, str]]) -> list[tuple[float, dict[str, Any]]]:
    return [(seconds, json.loads(line[6:])) for seconds, line in lines if line.startswith("data: ")]


def tokens_of(lines: Iterator[tuple[float, str]]) -> list[int]:
    return [token for _, event in data_of(lines) if not event.get("stop", True) for token in event["tokens"]]


def test_others_decode_on_while_a_prompt_is_read_layer_by_layer(slow_model: Path, log: Path) -> None:
    """No stream waits for the whole prompt of another slot."""
    with closing(load(slow_model, preset="default", kv_size=KV_SIZE, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH)) as slow:
        answer = greedy(slow, list(LONG), 4)
    with running(log, "--kv-size", KV_SIZE, model=slow_model, n_slots=2) as server, ThreadPoolExecutor(1) as pool:
        with stream_of(server, SHORT, 1500) as stream:
            first = next(seconds for seconds, line in stream if line)
            times = [first]
            reading = pool.submit(server.complete, LONG, 4)
            while not reading.done():
                times += [seconds for seconds, line in [next(stream)] if line]
            seconds = reading.result()["timings"]["prompt_ms"] / 1000
        assert reading.result()["tokens"] == answer
        times = [t for t in times if t < first + seconds]
        longest = max(b - a for a, b in zip(times, [*times[1:], first + seconds]))
        assert len(times) > 3 and longest < 0.6 * seconds, (times, seconds)


def test_a_prompt_of_one_token_waits_for_one_that_is_read_layer_by_layer(slow_model: Path, log: Path) -> None:
    """It cannot be read layer by layer, and does not join the batch of one that is."""
    with running(log, "--kv-size", KV_SIZE, "-t", 1, "-tb", 1, model=slow_model, n_slots=3) as server, ThreadPoolExecutor(3) as pool:
        answers = [server.tokens(prompt, 4) for prompt in (LONG, [30])]
        long = pool.submit(server.tokens, LONG, 4, id_slot=0)
        while not any(slot["kv"]["state"] in ("staged", "layered") for slot in server.get("/slots")):
            assert not long.done()
        short = [pool.submit(server.tokens, [30], 4, id_slot=i) for i in (1, 2)]
        assert [future.result() for future in (long, *short)] == [answers[0], answers[1], answers[1]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read_cancels_it(stream: bool, slow_model: Path, log: Path) -> None:
    flags = ["--kv-size", KV_SIZE, "-t", 1, "-tb", 1, "-c", 2 * N_CTX]  # some seconds for the prompt
    with running(log, *flags, model=slow_model) as server:
        answer = server.complete(LONG * 2, 4)["tokens"]
        data = json.dumps({"prompt": LONG * 2, "n_predict": 4, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as s:
            s.sendall(
                b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
            )
            deadline = time.monotonic() + SECONDS
            while not any(slot["kv"]["state"] in ("staged", "layered") for slot in server.get("/slots")):
                assert time.monotonic() < deadline
            assert server.metric("kv_bytes_staging") > 0
        assert server.says("cancel task")  # upstream looks a second after its last result of any request
        assert_nothing_left(server)
        assert server.metric("kv_compressions_total") == 1
        assert server.complete(LONG * 2, 4)["tokens"] == answer


@pytest.mark.parametrize("prefill", ["layer", "token"])
def test_a_stream_begins_at_once_and_pings_while_its_prompt_is_read(prefill: str, slow_model: Path, log: Path) -> None:
    flags = ["--kv-size", KV_SIZE, "--kv-prefill", prefill, "--sse-ping-interval", 1, "-t", 1, "-tb", 1, "-c", 2 * N_CTX]
    with running(log, *flags, model=slow_model) as server, stream_of(server, LONG * 2, 1) as stream:
        lines = list(stream)
        whole = next(seconds for seconds, line in lines if line.startswith("data: "))
        assert lines[0][0] < 0.3 * whole
        assert sum(line == ":" and seconds < whole for seconds, line in lines) >= (1 if whole > 4 else 0), (lines, whole)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_progress_is_that_of_the_layers_read(beside: bool, slow_model: Path, log: Path) -> None:
    """return_progress counts tokens; a layer of the prompt counts as its share of them. Timings and metrics cover all of it."""
    with running(log, "--kv-size", KV_SIZE, "-t", 1, "-tb", 1, model=slow_model, n_slots=2) as server, ExitStack() as stack:
        if beside:
            next(line for _, line in stack.enter_context(stream_of(server, SHORT, 1500)) if line)
        before = server.metric("prompt_seconds_total")
        with stream_of(server, LONG, 2, return_progress=True) as stream:
            events = data_of(stream)
        timings = events[-1][1]["timings"]
        assert server.metric("prompt_seconds_total") - before == pytest.approx(timings["prompt_ms"] / 1000, rel=0.9 if beside else 0.2)
        progress = [(seconds, event["prompt_progress"]) for seconds, event in events if "prompt_progress" in event]
        assert all(p["total"] == len(LONG) and p["cache"] == 0 and p["time_ms"] / 1000 < seconds + 0.1 for seconds, p in progress)
        processed = [p["processed"] for _, p in progress]
        assert processed == sorted(processed) and processed[0] == 0 and processed[-1] == len(LONG)
        assert max(b - a for a, b in zip(processed, processed[1:])) < 0.6 * len(LONG), processed
        with stream_of(server, SHORT, 2) as stream:
            assert not any("prompt_progress" in event for _, event in data_of(stream))


def test_progress_says_what_came_from_the_archive(slow_model: Path, log: Path) -> None:
    longer = [*LONG, *SHORT]
    with running(log, "--kv-size", KV_SIZE, "--kv-archive", "ram", "-t", 1, "-tb", 1, model=slow_model) as server:
        server.complete(LONG, 1)
        with stream_of(server, longer, 2, return_progress=True) as stream:
            events = [event for _, event in data_of(stream)]
        n = events[-1]["timings"]["cache_n"]
        assert n >= len(LONG) - 64 and events[-1]["timings"]["kv"]["n_archived"] == n
        progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
        assert progress[-1]["cache"] == n and progress[-1]["processed"] == len(longer)
        assert all(p["cache"] in (0, n) for p in progress)


def test_slots_share_one_pool_of_positions(llm: Any, log: Path) -> None:
    """Upstream's default: every slot may use the whole context. Prompts that do not fit together are read in turn."""
    prompts = [prompt_ids(llm, seed, 1400) for seed in range(4)]
    answers = [expected(llm, prompt, 8) for prompt in prompts]
    flags = ["--kv-size", KV_SIZE, "--kv-unified", "-c", N_CTX]
    with running(log, *flags, n_slots=4) as server, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: server.tokens(prompt, 8), prompts)) == answers


def test_a_new_request_never_continues_on_a_compressed_past(llm: Any, log: Path) -> None:
    a, b, c = prompt_ids(llm, 1), words(llm, "the code of anna is"), words(llm, "the room of bob is")
    asked = [a, [*a, *b], [*a, *c], a]
    answers = [expected(llm, prompt, 16) for prompt in asked]
    with running(log, "--kv-size", KV_SIZE) as server:
        for prompt, answer in zip(asked, answers):
            result = server.complete(prompt, 16)
            assert until_end(result["tokens"]) == answer
            assert result["timings"]["cache_n"] == 0 and result["timings"]["kv"]["n_prompt"] == len(prompt)


def test_reuse_continues_on_the_compressed_past(llm: Any, log: Path) -> None:
    a, b, c = prompt_ids(llm, 1), words(llm, "the code of anna is"), words(llm, "the room of bob is")
    reusing = load(MODEL, preset="default", kv_size=KV_SIZE, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH, kv_reuse=True)
    answers = [expected(reusing, a, 4)]
    longer = [*a, *answers[0], *b]
    leaving = [a, [*a[:-2], *c], [*a[: -WINDOW // 2], *c], [*a[: -WINDOW - 1], *c]]
    reusing.reset()
    greedy(reusing, a, 4)
    answers += [until_end(greedy(reusing, prompt, 8)) for prompt in (longer, *leaving)]
    with running(log, "--kv-size", KV_SIZE, "--kv-reuse") as server:
        assert server.tokens(a, 4) == answers[0]
        result = server.complete(longer, 8)
        assert until_end(result["tokens"]) == answers[1]
        assert result["timings"]["cache_n"] >= len(a) and result["timings"]["kv"]["n_prompt"] == len(a)
        assert server.says("tokens are continued on the compressed past")
        # the prompt itself, and one that leaves it within the window, whose cells all heads have; as the library does
        for prompt, answer, n_past in zip(leaving, answers[2:], (len(a) - 1, len(a) - 2, len(a) - WINDOW // 2, 0)):
            result = server.complete(prompt, 8)
            assert until_end(result["tokens"]) == answer and result["timings"]["cache_n"] == n_past
        assert answers[-1] == expected(llm, leaving[-1], 8)
        assert server.says(
            f"the prompt is read from its beginning: its first {len(a) - WINDOW - 1} tokens are those of the compressed past, which cannot be "
            f"cut to fewer than {len(a) - WINDOW + 1}"
        )
        assert server.complete([*a[:-2], *c, *b], 4, cache_prompt=False)["timings"]["cache_n"] == 0


def test_a_request_that_is_refused_leaves_the_slot_what_it_has(llm: Any, log: Path) -> None:
    a, b = prompt_ids(llm, 1), words(llm, "the code of anna is")
    with running(log, "--kv-size", KV_SIZE, "--kv-reuse") as server:
        answer = server.tokens(a, 4)
        status, failed = server.request("/completion", {"prompt": a * 3, "n_predict": 4})
        assert status == 400 and failed["error"]["type"] == "exceed_context_size_error"
        assert server.complete([*a, *answer, *b], 4)["timings"]["cache_n"] >= len(a)


def test_a_server_that_sleeps_holds_nothing(llm: Any, log: Path) -> None:
    prompt = prompt_ids(llm, 1)
    with running(log, "--kv-size", KV_SIZE, "--kv-reuse", "--sleep-idle-seconds", 1) as server:
        answer = server.tokens(prompt, 8)
        assert server.says("server is entering sleeping state")
        props = server.get("/props")
        assert props["is_sleeping"] and props["kv"]["bytes_held"] == 0 and props["kv"]["slots"][0]["state"] == "empty"
        assert server.metric("kv_bytes_held") == 0 and server.metric("kv_compressions_total") == 1
        assert server.tokens(prompt, 8) == answer


@pytest.mark.parametrize("prefill", ["layer", "token"])
def test_every_turn_of_a_chat_is_read_from_where_it_differs(prefill: str, llm: Any, log: Path, tmp_path: Path) -> None:
    """From a folder, two slots and a server that is started again: the tokens are those of a server that reads everything."""
    document, other = prompt_ids(llm, 0), prompt_ids(llm, 1)
    flags = ["--kv-size", KV_SIZE, "--kv-prefill", prefill, "--kv-archive", tmp_path / "kv"]
    turns = [document]
    for i in range(4):
        turns.append([*turns[-1], *expected(llm, turns[-1], 12), *other[100 * i + 1 : 100 * i + 91]])
    wanted = [expected(llm, turn, 12) for turn in turns]
    n_restored = n_all = 0
    for part in (range(3), range(1, 5)):
        with running(log, *flags, n_slots=2) as server:
            n_restored = n_all = 0
            for i in part:
                answer = server.complete(turns[i], 12, id_slot=i % 2)
                assert until_end(answer["tokens"]) == wanted[i]
                n = answer["timings"]["kv"]["n_archived"]
                least = (
                    0
                    if i == 0 and part.start == 0
                    else len(turns[max(i - 1, part.start)]) // 2 - 256
                    if prefill == "token"
                    else len(turns[i]) - 256
                )
                assert least <= n <= len(turns[i]) - WINDOW and n % 64 == 0
                assert (answer["timings"]["cache_n"], answer["timings"]["prompt_n"]) == (n, len(turns[i]) - n)
                n_restored, n_all = n_restored + n, n_all + len(turns[i])
            assert server.metric("kv_archive_tokens_restored_total") == n_restored > 0
            assert server.metric("kv_archive_tokens_computed_total") == n_all - n_restored
            assert server.metric("prompt_tokens_total") == n_all - n_restored
            assert server.metric("prompt_tokens_cached_total") == n_restored
            archive = server.get("/props")["kv"]["archive"]
            assert archive["blocks"] == len(list((tmp_path / "kv").glob("*.kv"))) == server.metric("kv_archive_blocks")
            assert (archive["damaged"], archive["failed"]) == (0, 0)
            assert server.get("/slots")[turns.index(turns[part[-1]]) % 2]["kv"]["state"] == "empty"


def test_slots_share_an_archive_in_memory_while_others_generate(llm: Any, log: Path) -> None:
    """Eight growing chats with one beginning, four slots: each answer is that of a fresh prompt."""
    head = prompt_ids(llm, 0)[:700]
    chats = [[*head, *prompt_ids(llm, seed)[1:200]] for seed in range(1, 9)]
    longer = [[*chat, *prompt_ids(llm, seed)[1:150]] for seed, chat in enumerate(chats, 20)]
    wanted = [expected(llm, prompt, 16) for prompt in [*chats, *longer]]
    with running(log, "--kv-size", KV_SIZE, "--kv-archive", "ram", n_slots=4) as server, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: server.tokens(prompt, 16), chats)) == wanted[:8]
        assert list(pool.map(lambda prompt: server.tokens(prompt, 16), longer)) == wanted[8:]
        assert server.metric("kv_archive_tokens_restored_total") > 7 * 512 + 8 * 700


def test_an_archive_knows_the_adapters_of_a_request(llm: Any, adapters: list[Any], log: Path, tmp_path: Path) -> None:
    prompt = prompt_ids(llm, 3)
    cases = [[], [{"id": 0, "scale": 1.0}], [{"id": 1, "scale": 1.0}], [{"id": 0, "scale": 0.5}]]
    answers: list[Any] = []
    for archive in ([], ["--kv-archive", tmp_path]):
        with running(log, "--kv-size", KV_SIZE, "--lora-init-without-apply", *adapters, *archive) as server:
            answers.append([server.complete(prompt, 12, ignore_eos=True, lora=lora) for _ in range(2) for lora in cases])
    assert [a["tokens"] for a in answers[0]] == [a["tokens"] for a in answers[1]]
    assert [a["timings"]["kv"]["n_archived"] > 0 for a in answers[1]] == [False] * 4 + [True] * 4


def test_a_request_that_is_cancelled_leaves_the_archive_as_it_was(llm: Any, log: Path, tmp_path: Path) -> None:
    prompt = prompt_ids(llm, 2, 1800)
    with running(log, "--kv-size", KV_SIZE, "--kv-archive", tmp_path, "-ub", 64) as server:
        with pytest.raises(OSError):
            server.request("/completion", {"prompt": prompt, "n_predict": 4}, timeout=0.05)
        assert server.tokens(prompt, 12) == expected(llm, prompt, 12)
        assert not list(tmp_path.glob("*.part"))


def test_reuse_has_the_size_and_the_protected_cells_of_the_request(llm: Any, log: Path) -> None:
    """A past that was compressed in another way is not continued, and the log says why."""
    document, question = prompt_ids(llm, 1), words(llm, "the code of anna is")
    asked, spans, n = [*document, *question], [[0, 40], [500, 560]], 8
    large = 2 * KV_SIZE
    requests: dict[str, dict[str, Any]] = {
        "none": {},
        "its own": {"kv_size": KV_SIZE, "kv_protect": []},
        "small": {"kv_size": 32},
        "large": {"kv_size": large},
        "protect": {"kv_protect": spans},
        "merged": {"kv_protect": [[500, 530], [0, 40], [520, 560]]},
        "in the question": {"kv_protect": [*spans, [len(document) + 1, len(document) + 3]]},
        "part": {"kv_protect": spans[:1]},
    }
    same = [("none", "its own"), ("its own", "none"), ("protect", "merged"), ("protect", "in the question")]
    reasons = {
        "small": "it was compressed with kv_size 128, that of now is 32",
        "protect": "it was compressed with other protected cells than those of now",
    }
    with running(log, "--kv-size", KV_SIZE, "--kv-size-max", large) as server:
        fresh = {name: server.complete(asked, n, **request) for name, request in requests.items()}
    with running(log, "--kv-size", KV_SIZE, "--kv-size-max", large, "--kv-reuse") as server:
        for first, second in [
            *same,
            *(("none", name) for name in requests if name != "its own"),
            ("large", "none"),
            ("protect", "part"),
            ("part", "protect"),
        ]:
            server.complete(document, 1, cache_prompt=False, **requests[first])
            n_read = len(server.output())
            result = server.complete(asked, n, **requests[second])
            if (first, second) in same or first == second:
                assert result["timings"]["cache_n"] == len(document)
                assert server.says("tokens are continued on the compressed past", behind=n_read)
            else:
                assert result["timings"]["cache_n"] == 0 and result["tokens"] == fresh[second]["tokens"], (first, second)
                assert result["timings"]["kv"]["cells"] == fresh[second]["timings"]["kv"]["cells"]
                assert server.says(reasons.get(second, "read from its beginning: it was compressed with"), behind=n_read)
        # a past that is whole is what any size would leave that keeps it whole
        short = document[:100]
        server.complete(short, 1, cache_prompt=False)
        for size in (KV_SIZE, large, 0):
            assert server.complete([*short, *question], 1, kv_size=size)["timings"]["cache_n"] >= len(short)
        assert server.complete([*short, *question], 1, kv_size=len(short) - 1)["timings"]["cache_n"] == 0
        # one that is short is not the past of a long prompt, which would not be compressed
        server.complete(document[:20], 1, cache_prompt=False)
        result = server.complete(document, n)
        assert result["timings"]["cache_n"] == 0 and until_end(result["tokens"]) == expected(llm, document, n)
        assert server.says(f"every head would keep {len(document) - 20} new tokens behind 20 of the compressed past, kv_size is {KV_SIZE}")


# adapters


def scaled(*scales: float) -> list[dict[str, Any]]:
    """Field "lora" of a request."""
    return [{"id": i, "scale": scale} for i, scale in enumerate(scales)]


WHOLE = ["--kv-size", N_CTX, "--kv-policy", "snapkv"]  # every cell is kept: what upstream's cache holds


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Flags with two adapters."""
    folder = tmp_path_factory.mktemp("lora")
    return [flag for seed in (5, 6) for flag in ("--lora", write_random_lora(folder / f"{seed}.gguf", MODEL, seed=seed))]


@pytest.fixture(scope="module")
def of_stock(llm: Any, log: Path, adapters: list[Any]) -> list[tuple[list[int], list[dict[str, Any]], list[int]]]:
    """Prompts, adapters, and what upstream's server generates with them."""
    cases = [
        (prompt_ids(llm, 1, 600 + 50 * i), scaled(*scales)) for i, scales in enumerate([(1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (0.4, 0.8)])
    ]
    with running(log, *adapters) as server:
        answers = [server.tokens(prompt, 12, ignore_eos=True, lora=lora) for prompt, lora in cases]
    assert len({str(answer) for answer in answers}) == len(cases)
    return [(*case, answer) for case, answer in zip(cases, answers)]


@pytest.mark.parametrize("prefill", ["auto", "layer", "token"])
def test_a_prompt_is_read_with_the_adapters_of_its_request(prefill: str, adapters: list[Any], of_stock: list[Any], log: Path) -> None:
    """One after the other, and at once on two slots, where batches of other requests come in between."""
    with running(log, *WHOLE, *adapters, "--kv-prefill", prefill, n_slots=2) as server, ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            for prompt, lora, answer in of_stock:
                assert server.tokens(prompt, 12, ignore_eos=True, lora=lora) == answer
            got = list(pool.map(lambda case: server.tokens(case[0], 12, ignore_eos=True, lora=case[1]), of_stock))
            assert got == [answer for _, _, answer in of_stock]


def test_an_activated_adapter_begins_where_it_is_invoked(llm: Any, log: Path, tmp_path: Path) -> None:
    """aLoRA: the prompt before the invocation is computed without it, as by upstream's server; by layers it is refused."""
    invocation = words(llm, "the code of")
    path = write_random_lora(tmp_path / "alora.gguf", MODEL, seed=5, invocation=invocation)
    document = [t for t in prompt_ids(llm, 1, 600) if t not in invocation]
    prompts = [[*document, *invocation, *words(llm, "anna is")], document]
    request: dict[str, Any] = dict(n=12, ignore_eos=True, lora=scaled(3.0))
    with running(log, "--lora", path) as server:
        answers = [server.tokens(prompt, **request) for prompt in prompts]
        assert answers[0] != server.tokens(prompts[0], **{**request, "lora": scaled(0.0)})
    for prefill in ("auto", "token"):
        with running(log, *WHOLE, "--lora", path, "--kv-prefill", prefill) as server:
            assert [server.tokens(prompt, **request) for prompt in prompts] == answers
    with running(log, *WHOLE, "--lora", path, "--kv-prefill", "layer") as server:
        status, answer = server.request("/completion", {"prompt": prompts[0], "n_predict": 1, "lora": scaled(3.0)})
        assert status == 500 and "--kv-prefill layer" in answer["error"]["message"] and "aLoRA" in answer["error"]["message"]
        assert_nothing_left(server)
        assert server.tokens(prompts[1], **request) == answers[1]


def test_reuse_continues_only_with_the_adapters_of_the_past(llm: Any, adapters: list[Any], log: Path) -> None:
    """In the slot, and in the prompt cache."""
    document, other, question = prompt_ids(llm, 1), prompt_ids(llm, 2), words(llm, "the code of anna is")
    asked = [*document, *question]
    flags = ["--kv-size", KV_SIZE, *adapters]
    with running(log, *flags) as server:
        fresh = {scale: server.tokens(asked, 12, ignore_eos=True, lora=scaled(scale, 0.0)) for scale in (1.0, 0.0)}
    with running(log, *flags, "--kv-reuse", "--cache-ram", 64) as server:
        for away in (False, True):
            for scale, cached in ((0.0, False), (1.0, True), (0.5, False)):
                server.complete(document, 1, lora=scaled(1.0, 0.0), cache_prompt=False)
                if away:  # the document leaves the slot for the cache
                    server.complete(other, 1, lora=scaled(0.0, 1.0))
                result = server.complete(asked, 12, ignore_eos=True, lora=scaled(scale, 0.0))
                assert (result["timings"]["cache_n"] > 0) == cached, (away, scale)
                assert cached or scale not in fresh or result["tokens"] == fresh[scale]
        # "lora" left out: those of the server, both with scale 1
        assert server.complete(document, 1)["timings"]["cache_n"] == 0
        assert server.complete(asked, 1, lora=scaled(1.0, 1.0))["timings"]["cache_n"] > 0
        assert server.says("--kv-reuse: the prompt is read from its beginning: it was computed with other adapters")


# saved slots


def slot_action(server: Server, action: str, *, slot: int = 0, **body: Any) -> tuple[int, Any]:
    return server.request(f"/slots/{slot}?action={action}", body)


def test_a_document_is_read_once_and_asked_across_restarts(llm: Any, log: Path, tmp_path: Path) -> None:
    """Saved, restored by a new server into another slot, asked twice, erased, restored again."""
    document = prompt_ids(llm, 1)
    questions = [words(llm, f"the {what} is") for what in ("code of anna", "room of bob", "code of anna")]
    reusing = load(MODEL, preset="default", kv_size=KV_SIZE, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH, kv_reuse=True)
    answers = []
    for question in questions:
        reusing.reset()
        greedy(reusing, document, 1)
        answers.append(until_end(greedy(reusing, [*document, *question], 8)))
    flags = ["--kv-size", KV_SIZE, "--kv-reuse", "--slot-save-path", tmp_path]
    with running(log, *flags) as server:
        server.complete(document, 1)
        status, saved = slot_action(server, "save", filename="document")
        assert status == 200 and saved["n_saved"] == len(document)
        held = server.get("/slots")[0]["kv"]["bytes"]
    size = (tmp_path / "document").stat().st_size
    assert saved["n_written"] == size < 1.1 * held + 4 * len(document) + 1000
    with running(log, *flags, n_slots=2) as server:
        for _ in range(2):
            status, restored = slot_action(server, "restore", slot=1, filename="document")
            assert status == 200 and restored["n_restored"] == len(document) and restored["n_read"] == size
            kv = server.get("/slots")[1]["kv"]
            assert kv["state"] == "compressed" and kv["bytes"] == held and kv["n_prompt"] == kv["n_tokens"] == len(document)
            for question, answer in zip(questions, answers):
                result = server.complete([*document, *question], 8)
                assert until_end(result["tokens"]) == answer and result["timings"]["cache_n"] >= len(document)
            assert server.metric("kv_compressions_total") == 0
            assert slot_action(server, "erase", slot=1)[0] == 200
            assert_nothing_left(server)
        # the document itself continues but for its last token; what leaves it is read again
        assert slot_action(server, "restore", slot=0, filename="document")[0] == 200
        assert server.complete(document, 8, id_slot=0)["timings"]["cache_n"] == len(document) - 1
        prompt = [*document[:500], *questions[1]]
        result = server.complete(prompt, 8, id_slot=0)
        assert until_end(result["tokens"]) == expected(llm, prompt, 8) and result["timings"]["cache_n"] == 0


def test_a_saved_slot_belongs_to_the_adapters_of_the_server(llm: Any, adapters: list[Any], log: Path, tmp_path: Path) -> None:
    """POST /lora-adapters sets them; a request that names the same ones continues too."""
    document, question = prompt_ids(llm, 1), words(llm, "the code of anna is")
    flags = ["--kv-size", KV_SIZE, "--kv-reuse", "--slot-save-path", tmp_path, *adapters]
    with running(log, *flags) as server:
        server.complete(document, 1)
        assert slot_action(server, "save", filename="document")[0] == 200
        answer = server.tokens([*document, *question], 12, ignore_eos=True)
    with running(log, *flags) as server:
        for request in ({}, {"lora": scaled(1.0, 1.0)}):
            assert slot_action(server, "restore", filename="document")[0] == 200
            result = server.complete([*document, *question], 12, ignore_eos=True, **request)
            assert result["tokens"] == answer and result["timings"]["cache_n"] == len(document)
        server.request("/lora-adapters", scaled(1.0, 0.0))
        status, error = slot_action(server, "restore", filename="document")
        assert status == 400 and "the state cannot be restored: it was computed with other adapters" in error["error"]["message"]
        server.request("/lora-adapters", scaled(1.0, 1.0))
        assert slot_action(server, "restore", filename="document")[0] == 200


def test_a_file_that_is_no_saved_slot_is_a_400_and_leaves_the_slot_as_it_is(llm: Any, log: Path, tmp_path: Path) -> None:
    prompt, question = prompt_ids(llm, 1, 300), words(llm, "the code of anna is")
    flags = ["--kv-reuse", "--slot-save-path", tmp_path]
    with running(log, "--kv-size", 256, *flags) as server:
        server.complete(prompt, 1)
        assert slot_action(server, "save", filename="large")[0] == 200
        server.complete(prompt_ids(llm, 1, 1200), 1, kv_size=200)
        assert slot_action(server, "save", filename="long")[0] == 200
        server.complete(prompt, 1, kv_size=200, kv_protect=[[0, 240]])
        assert slot_action(server, "save", filename="protected")[0] == 200
    with running(log, "--kv-size", KV_SIZE, "--kv-size-max", 200, "-c", 1024, *flags) as server:
        server.complete(prompt, 1)
        assert slot_action(server, "save", filename="good")[0] == 200
        good = (tmp_path / "good").read_bytes()
        rng = random.Random(0)
        cut, wrong = {f"cut{n}": good[:n] for n in rng.sample(range(len(good)), 12)}, {}
        for i in range(12):
            at = rng.randrange(len(good) - len(good) // 2, len(good))
            wrong[f"wrong{i}"] = good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :]
        for name, data in {**cut, **wrong, "empty": b"", "text": b"the" * 999}.items():
            (tmp_path / name).write_bytes(data)
        why = {
            **dict.fromkeys(wrong, "the state cannot be restored: it is damaged (checksum)"),
            "missing": "the file cannot be read",
            "large": "the state cannot be restored: it was compressed with kv_size 256, the limit is 200",
            "long": "the state cannot be restored: it holds 1200 tokens",
            "protected": "the state cannot be restored: every head keeps 240 protected cells, the limit is 192",
        }
        server.complete(prompt, 1, cache_prompt=False)
        held = server.get("/slots")[0]["kv"]
        assert held["state"] == "compressed" and held["n_tokens"] == len(prompt)
        for name in [*cut, *wrong, "empty", "text", "large", "long", "protected", "missing"]:
            status, answer = slot_action(server, "restore", filename=name)
            assert status == 400 and f"Unable to restore slot: {why.get(name, '')}" in answer["error"]["message"], name
            assert server.get("/slots")[0]["kv"] == held, name
        asked = server.complete([*prompt, *question], 8)
        assert asked["timings"]["cache_n"] == len(prompt)
        assert slot_action(server, "restore", filename="good")[0] == 200
        assert server.complete([*prompt, *question], 8)["tokens"] == asked["tokens"]
        # the tokens of the file are not those of its cells: nobody knows before they are put in
        cells = good[12 + 4 * int.from_bytes(good[8:12], "little") :]
        (tmp_path / "fewer").write_bytes(good[:8] + b"".join(n.to_bytes(4, "little") for n in [len(prompt) - 1, *prompt[:-1]]) + cells)
        status, answer = slot_action(server, "restore", filename="fewer")
        assert status == 400 and "it names" in answer["error"]["message"]
        assert_nothing_left(server)


def test_the_prompt_cache_holds_compressed_prompts(llm: Any, log: Path) -> None:
    """Three documents take turns on one slot: each is read once, and asked on its compressed past."""
    documents = [prompt_ids(llm, seed, 800) for seed in range(3)]
    question = words(llm, "the code of anna is")
    reusing = load(MODEL, preset="default", kv_size=KV_SIZE, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH, kv_reuse=True)
    answers = []
    for document in documents:
        reusing.reset()
        greedy(reusing, document, 1)
        answers.append(until_end(greedy(reusing, [*document, *question], 8)))
    for flags in ([], ["--kv-unified", "-c", N_CTX]):
        with running(log, "--kv-size", KV_SIZE, "--kv-reuse", "--cache-ram", 64, *flags) as server:
            for document in documents:
                server.complete(document, 1)
            for _ in range(2):
                for document, answer in zip(documents, answers):
                    result = server.complete([*document, *question], 8)
                    assert until_end(result["tokens"]) == answer and result["timings"]["cache_n"] >= len(document)
            assert server.metric("kv_compressions_total") == len(documents)
            kv = server.get("/slots")[0]["kv"]
            assert kv["state"] == "compressed" and kv["n_prompt"] == len(documents[-1])
            assert server.complete(documents[0], 8)["timings"]["cache_n"] == len(documents[0]) - 1


# requests


def test_a_request_has_its_own_size(llm: Any, log: Path) -> None:
    prompt = prompt_ids(llm, 2)
    small = load(MODEL, preset="default", kv_size=32, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH)
    with running(log, "--kv-size", KV_SIZE, n_slots=2) as server:
        with ThreadPoolExecutor(4) as pool:
            sizes = [32, KV_SIZE, 32, None]
            results = list(pool.map(lambda size: server.complete(prompt, 16, kv_size=size), sizes))
        for size, result in zip(sizes, results):
            assert until_end(result["tokens"]) == expected(small if size == 32 else llm, prompt, 16)
        held = [result["timings"]["kv"]["bytes"] for result in results]
        assert held[0] == held[2] < held[1] == held[3]


@pytest.mark.parametrize("size", [WINDOW, KV_SIZE + 1, -5, 1.5, "64", True, [64], 1 << 40])
def test_a_wrong_size_is_a_400_with_field_value_and_range(size: Any, small_server: Server) -> None:
    messages = [{"role": "user", "content": "the"}]
    bodies: dict[str, dict[str, Any]] = {
        "/completion": {"prompt": "the"},
        "/v1/chat/completions": {"messages": messages},
        "/v1/messages": {"messages": messages, "max_tokens": 1},
    }
    for path, body in bodies.items():
        status, answer = small_server.request(path, {**body, "kv_size": size, "n_predict": 1})
        assert status == 400
        assert f"kv_size is {json.dumps(size, separators=(',', ':'))}: it must be an integer in [9, 128]" in answer["error"]["message"]


@pytest.mark.parametrize("name", ["kv_sise", "kv_generated_slack", "kv_policy"])
def test_a_field_that_is_none_of_ours_is_a_400_that_names_them(name: str, small_server: Server) -> None:
    messages = [{"role": "user", "content": "the"}]
    for path, body in {
        "/completion": {"prompt": "the"},
        "/v1/chat/completions": {"messages": messages},
        "/v1/messages": {"messages": messages},
    }.items():
        status, answer = small_server.request(path, {**body, name: 32, "max_tokens": 1})
        assert status == 400
        assert f"{name}: there is no such field, those of a request are kv_size, kv_protect, " in answer["error"]["message"]


@pytest.mark.parametrize(
    ("protect", "why"),
    [
        ("all", "it must be a list of at most 64 [start, end) ranges of tokens"),
        ([[0, 1]] * 65, "at most 64"),
        ([5], "each range must be two integers"),
        ([[0, 1.5]], "each range must be two integers"),
        ([[0, 1, 2]], "each range must be two integers"),
        ([[-1, 4]], "lie in [0, 200]"),
        ([[4, 4]], "lie in [0, 200]"),
        ([[0, 201]], "lie in [0, 200]"),
        ([[0, 1 << 60]], "lie in [0, 200]"),
        ([[0, 60], [70, 131]], "121 tokens, it may be up to 120"),
    ],
    ids=str,
)
def test_wrong_protected_ranges_are_a_400(protect: Any, why: str, small_server: Server) -> None:
    status, answer = small_server.request("/completion", {"prompt": [300] * 200, "kv_protect": protect, "n_predict": 1})
    assert status == 400 and answer["error"]["message"].startswith("kv_protect is ") and why in answer["error"]["message"]


def test_a_protected_cell_of_two_ranges_counts_once(small_server: Server) -> None:
    body = {"prompt": [300] * 200, "kv_protect": [[30, 110], [20, 100], [0, 40]], "n_predict": 1}
    status, answer = small_server.request("/completion", body)
    assert status == 200 and answer["timings"]["kv"]["cells"]["min"] >= 110


def test_a_request_protects_cells_of_its_prompt(llm: Any, log: Path) -> None:
    prompt = prompt_ids(llm, 2)
    spans = [(0, 40), (500, 560)]
    protecting = load(MODEL, preset="default", kv_size=KV_SIZE, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH, protect=spans)
    with running(log, "--kv-size", KV_SIZE, n_slots=2) as server, ThreadPoolExecutor(3) as pool:
        results = list(
            pool.map(lambda protect: server.complete(prompt, 16, kv_protect=protect), [spans, None, [list(span) for span in spans]])
        )
    assert [until_end(result["tokens"]) for result in results] == [expected(some, prompt, 16) for some in (protecting, llm, protecting)]
    cells = [result["timings"]["kv"]["cells"]["min"] for result in results]
    assert cells[0] == cells[2] >= 100 + WINDOW > cells[1]


def test_a_request_keeps_its_whole_prompt_where_the_server_allows_it(llm: Any, log: Path) -> None:
    prompt, longer = prompt_ids(llm, 2, 700), prompt_ids(llm, 2, 1000)
    stock = load(MODEL, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH, flash_attn=True)
    with running(log, "--kv-size", KV_SIZE, "--kv-size-max", len(prompt), n_slots=2) as server, ThreadPoolExecutor(2) as pool:
        whole, small = pool.map(lambda size: server.complete(prompt, 16, kv_size=size), [0, None])
        assert until_end(whole["tokens"]) == expected(stock, prompt, 16) and until_end(small["tokens"]) == expected(llm, prompt, 16)
        kv = whole["timings"]["kv"]
        assert kv["cells"]["min"] == kv["cells"]["max"] == len(prompt) and kv["bytes"] == kv["bytes_full"] > small["timings"]["kv"]["bytes"]
        status, answer = server.request("/completion", {"prompt": longer, "kv_size": 0})
        assert status == 400
        assert (
            f"kv_size is 0: this keeps the whole prompt, which is possible for prompts of up to {len(prompt)} tokens (--kv-size-max), "
            f"this one has {len(longer)}" in answer["error"]["message"]
        )
        assert server.tokens(longer, 8, kv_size=300) != []
        assert_nothing_left(server)


def test_several_completions_of_one_prompt_are_a_400(small_server: Server) -> None:
    status, answer = small_server.request("/v1/completions", {"prompt": "the", "max_tokens": 1, "n": 2})
    assert status == 400 and "n is 2: it must be 1 with --kv-size" in answer["error"]["message"]


def test_a_prompt_alone_gives_what_upstream_gives(llm: Any, log: Path) -> None:
    """n_predict 0, with which documents are read: upstream samples a token after the prompt and does not evaluate it."""
    answers = []
    for flags in ([], [*WHOLE, "--kv-reuse"]):
        with running(log, *flags) as server:
            result = server.complete(prompt_ids(llm, 1), 0)
            answers.append([result[key] for key in ("tokens", "content", "tokens_predicted", "tokens_cached", "stop_type", "truncated")])
            assert result["tokens_cached"] == len(prompt_ids(llm, 1))
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("small") / "log", "--kv-size", KV_SIZE, n_slots=2) as server:
        yield server


def test_a_prompt_that_does_not_fit_is_a_400(small_server: Server) -> None:
    status, answer = small_server.request("/completion", {"prompt": [5] * (N_CTX + 1), "n_predict": 1})
    assert status == 400 and answer["error"]["type"] == "exceed_context_size_error"


@pytest.mark.parametrize("prompt", ["", [1], [1, 300], list(range(300, 300 + WINDOW)), [300] * 128])
def test_short_prompts(prompt: Any, small_server: Server) -> None:
    status, answer = small_server.request("/completion", {"prompt": prompt, "n_predict": 4, "temperature": 0})
    assert status == 200, answer


def test_requests_of_another_size_need_no_file_of_importance(llm: Any, log: Path, tmp_path: Path) -> None:
    """It is read once, with the context, not for each request that chooses its own size."""
    importance = tmp_path / "importance.gguf"
    importance.write_bytes(MODEL.read_bytes())
    prompt = prompt_ids(llm, 3)
    small = load(MODEL, preset="default", kv_size=32, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH)
    with running(log, "--kv-size", KV_SIZE, "--kv-importance", importance) as server:
        importance.unlink()
        assert until_end(server.tokens(prompt, 8, kv_size=32)) == expected(small, prompt, 8)
        assert server.tokens(prompt, 8) == expected(llm, prompt, 8)
        assert_nothing_left(server)


def allocations_until_now(server: Server, count: Path) -> int:
    """Disarms the preloaded fail-alloc.c: large allocations since it was armed."""
    count.unlink(missing_ok=True)
    os.kill(server.process.pid, signal.SIGUSR2)
    deadline = time.monotonic() + 10
    while not count.exists() or count.stat().st_size < struct.calcsize("l"):
        assert time.monotonic() < deadline, "fail-alloc.c is not preloaded"
        time.sleep(0.01)
    return int(struct.unpack("l", count.read_bytes())[0])


@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_a_failed_allocation_is_an_error_and_the_server_goes_on(prefill: str, llm: Any, log: Path, tmp_path: Path) -> None:
    """Each large allocation of a request fails in turn, beside a slot that generates. That one goes on, unless upstream's own lists
    of the batch cannot be allocated, which ends every request in it."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or not compiler:
        pytest.skip("replacing malloc needs Linux and a C compiler")
    preload = tmp_path / "fail-alloc.so"
    source = Path(__file__).parent / "cpp" / "fail-alloc.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(preload), str(source), "-ldl"], check=True)
    prompt, other, n, n_other = prompt_ids(llm, 1, 1200), prompt_ids(llm, 2, 600), 4, 60
    answer, answer_of_other = expected(llm, prompt, n), expected(llm, other, n_other)
    errors, ended_both, count = 0, 0, tmp_path / "count"
    flags = ["--kv-size", KV_SIZE, "--kv-prefill", prefill]
    body = {"n_predict": n, "temperature": 0, "return_tokens": True}
    environ = {"LD_PRELOAD": str(preload), "FAIL_ALLOC_COUNT": str(count)}
    with running(log, *flags, n_slots=2, environ=environ) as server, ThreadPoolExecutor(1) as pool:
        for k in range(1, 100):
            beside = pool.submit(server.request, "/completion", {**body, "prompt": other, "n_predict": n_other})
            while not beside.done() and all(slot["kv"]["state"] != "compressed" for slot in server.get("/slots")):
                time.sleep(0.01)
            os.kill(server.process.pid, signal.SIGUSR1)
            status, result = server.request("/completion", {**body, "prompt": prompt})
            status_of_other, other_result = beside.result()
            n_allocations = allocations_until_now(server, count)
            if status == 200:
                assert until_end(result["tokens"]) == answer
            else:
                errors += 1
                assert status == 500 and re.search("not enough memory|bad_alloc", result["error"]["message"])
            if status_of_other == 200:
                assert until_end(other_result["tokens"]) == answer_of_other
            else:
                ended_both += 1
                assert status == 500 and "bad_alloc" in result["error"]["message"]
            assert_nothing_left(server)
            if n_allocations < k:
                break  # each has failed
        else:
            pytest.fail("the allocations of a request do not end")
        assert errors > ended_both  # how many there are is the machine's
        assert server.tokens(prompt, n) == answer


def short_of_memory(server: Server, n_bytes: int | None) -> None:
    """Leave a server no more than so many bytes of address space; None = as many as there are."""
    import resource

    limit = resource.RLIM_INFINITY if n_bytes is None else server.status_bytes("VmSize") + n_bytes
    resource.prlimit(server.process.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose cells are large: 8 KiB in each of 4 layers. Skips where the memory of a server cannot be limited."""
    if sys.platform != "linux":
        pytest.skip("the limit of another process needs Linux")
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    write_random_model(
        path,
        n_layer=4,
        n_embd=2048,
        n_head=16,
        n_head_kv=16,
        n_ff=256,
        n_ctx_train=4 * N_CTX,
        seed=3,
        importance="random",
        repeat_layers=True,
    )
    return path


ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_a_prompt_without_memory_ends_alone(prefill: str, wide_model: Path, log: Path) -> None:
    """Beside a slot that generates, for as long as memory is short; the error names it."""
    n, long = 300, (LONG * 5)[:8000]
    flags = ["--kv-size", KV_SIZE, "--kv-prefill", prefill, "-c", 8 * N_CTX, "-t", 1, "-tb", 1]
    with running(log, *flags, model=wide_model, n_slots=2, environ=ONE_ARENA) as server:
        with stream_of(server, SHORT, n) as stream:
            answer = tokens_of(stream)
        with stream_of(server, SHORT, n) as stream:
            next(line for _, line in stream if line)
            short_of_memory(server, 48 << 20)
            for _ in range(2):
                status, error = server.request("/completion", {"prompt": long, "n_predict": 1})
                assert status == 500 and "not enough memory for a prompt of 8000 tokens" in error["error"]["message"]
            short_of_memory(server, None)
            assert tokens_of(stream) == answer[1:]
        assert server.tokens(LONG, 4) == server.tokens(LONG, 4) != []
        assert_nothing_left(server)


def test_a_token_without_memory_ends_its_request_alone(wide_model: Path, log: Path) -> None:
    """The rows of one slot have to grow and cannot; the other one goes on."""
    n, whole, short = 300, (LONG * 4)[:6000], SHORT[:20]
    flags = ["--kv-size", KV_SIZE, "--kv-size-max", len(whole) + 1, "-c", 8 * N_CTX, "-t", 1, "-tb", 1]
    with running(log, *flags, model=wide_model, n_slots=2, environ=ONE_ARENA) as server, ExitStack() as stack:
        # when one reaches the end of its free rows, every pool has to be made anew, with all rows of the large one
        large, small = (stack.enter_context(stream_of(server, prompt, n, kv_size=size)) for prompt, size in [(whole, 0), (short, None)])
        for stream in (large, small):
            next(line for _, line in stream if line)
        short_of_memory(server, 32 << 20)
        with ThreadPoolExecutor(2) as pool:
            ends = [events[-1][1] for events in pool.map(data_of, (large, small))]
        errors, answers = [end["error"] for end in ends if "error" in end], [end for end in ends if "error" not in end]
        assert len(errors) == 1 and re.search(r"not enough memory for \d+ generated tokens", errors[0]["message"])
        assert len(answers) == 1 and answers[0]["tokens_predicted"] == n
        assert_nothing_left(server)


def test_a_question_without_memory_leaves_no_half_of_it(wide_model: Path, log: Path) -> None:
    """--kv-reuse: what the slot holds after the error is what its tokens say."""
    document, question = LONG * 3, [40 + i % 300 for i in range(600)]
    flags = ["--kv-size", len(document) + 1, "--kv-policy", "snapkv", "--kv-reuse", "-c", 4 * N_CTX, "-t", 1, "-tb", 1]
    with running(log, *flags, model=wide_model, environ=ONE_ARENA) as server:
        server.complete(document, 1)
        short_of_memory(server, 8 << 20)
        status, error = server.request("/completion", {"prompt": [*document, *question], "n_predict": 1})
        assert status == 500 and re.search(r"not enough memory for \d+ generated tokens", error["error"]["message"])
        assert_nothing_left(server)
        short_of_memory(server, None)
        result = server.complete([*document, *question], 8, ignore_eos=True)
        assert len(result["tokens"]) == 8 and result["timings"]["cache_n"] == 0


# reports


def test_slots_props_timings_and_metrics_say_what_is_held(llm: Any, log: Path) -> None:
    prompt = prompt_ids(llm, 5)
    llm.reset()
    llm.read_prompt(prompt)
    stats = llm.kv_stats()
    with running(log, "--kv-size", KV_SIZE, "--kv-reuse") as server:
        kv = server.complete(prompt, 1)["timings"]["kv"]
        assert kv["state"] == "compressed" and kv["n_prompt"] == kv["n_tokens"] == len(prompt)
        cells = sorted(stats.n_cells.ravel().tolist())
        assert kv["cells"] == {"min": cells[0], "median": cells[len(cells) // 2], "max": cells[-1]}
        assert kv["bytes_full"] == stats.bytes_full
        assert kv["bytes"] == pytest.approx(stats.bytes_full * sum(cells) / (len(cells) * len(prompt)), abs=1)
        assert kv["compress_ms"] > 0
        props, slots = server.get("/props")["kv"], server.get("/slots")
        assert props["slots"] == [slots[0]["kv"]] and slots[0]["kv"]["cells"] == kv["cells"]
        assert (props["size"], props["window"], props["policy"], props["reuse"]) == (KV_SIZE, 64, "headkv", True)
        assert props["bytes_held"] == server.metric("kv_bytes_held") >= kv["bytes"]
        assert props["bytes_staging"] == server.metric("kv_bytes_staging") == 0
        assert server.metric("kv_compressions_total") == 1
        assert server.metric("kv_cells_evicted_total") == len(cells) * len(prompt) - sum(cells)
        assert server.metric("kv_compress_seconds_total") == pytest.approx(kv["compress_ms"] / 1000)
    assert server.says("switched off")


def test_environment_variables_set_the_same(log: Path) -> None:
    environ = {"LLAMA_ARG_KV_SIZE": "96", "LLAMA_ARG_KV_POLICY": "snapkv", "LLAMA_ARG_KV_WINDOW": "16", "LLAMA_ARG_KV_REUSE": "1"}
    with running(log, environ=environ) as server:
        kv = server.get("/props")["kv"]
        assert (kv["size"], kv["policy"], kv["window"], kv["reuse"]) == (96, "snapkv", 16, True)


# load


def assert_nothing_left(server: Server) -> None:
    deadline = time.monotonic() + 10
    while any(slot["is_processing"] for slot in server.get("/slots")) and time.monotonic() < deadline:
        time.sleep(0.05)
    for slot in server.get("/slots"):
        assert not slot["is_processing"]
        assert slot["kv"] == {"state": "empty", "n_tokens": 0, "bytes": 0, "bytes_full": 0}
    assert server.metric("kv_bytes_held") == server.metric("kv_bytes_staging") == 0


def hang_up(server: Server, body: dict[str, Any], seconds: float) -> None:
    """Send a request and leave before its answer is complete."""
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as s:
        s.sendall(
            b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        time.sleep(seconds)


def test_mixed_load_leaves_nothing_behind(llm: Any, log: Path) -> None:
    """Completions, streams, sizes, hang-ups in all phases and bad bodies from six clients."""
    n, seconds, n_clients = 12, 20, 6
    prompts = [prompt_ids(llm, seed, 400 + 150 * seed) for seed in range(6)]
    answers = [expected(llm, prompt, n) for prompt in prompts]
    wrong: list[str] = []
    counts = dict.fromkeys(("complete", "stream", "sized", "hang-up", "bad"), 0)
    with running(log, "--kv-size", KV_SIZE, n_slots=4) as server:
        deadline = time.monotonic() + seconds
        lock = threading.Lock()

        def client(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < deadline:
                what, i = rng.choice(list(counts)), rng.randrange(len(prompts))
                if what == "complete" and server.tokens(prompts[i], n) != answers[i]:
                    wrong.append(f"prompt {i}")
                elif what == "stream":
                    status, text = server.request(
                        "/completion", {"prompt": prompts[i], "n_predict": n, "temperature": 0, "stream": True, "return_tokens": True}
                    )
                    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
                    got = until_end([token for event in events if not event["stop"] for token in event["tokens"]])
                    if status != 200 or got != answers[i]:
                        wrong.append(f"stream of prompt {i}: {status}")
                elif what == "sized":
                    server.complete(prompts[i], n, kv_size=rng.choice([16, 40, KV_SIZE]))
                elif what == "hang-up":
                    hang_up(
                        server,
                        {"prompt": prompts[i], "n_predict": 1000, "stream": rng.random() < 0.5},
                        rng.choice([0, 0.01, 0.05, 0.2, 0.5]),
                    )
                elif what == "bad":
                    path = rng.choice(["/completion", "/v1/completions", "/v1/chat/completions"])
                    status, answer = server.request(path, rng.choice(llama_server.BAD_BODIES))
                    if status not in (400, 500) or "message" not in answer["error"]:
                        wrong.append(f"bad body: {status} {answer}")
                with lock:
                    counts[what] += 1

        with ThreadPoolExecutor(n_clients) as pool:
            for done in [pool.submit(client, seed) for seed in range(n_clients)]:
                done.result()
        assert not wrong
        assert min(counts.values()) > 0, counts
        assert_nothing_left(server)
        assert server.tokens(prompts[5], n) == answers[5]


def test_the_openai_client_streams_a_chat(small_server: Server) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{small_server.port}/v1", api_key="none")
    document = needle.make_document(random.Random(0), n_tokens=600, kinds=["direct"])
    stream = client.chat.completions.create(model="any", messages=document.messages(), max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


# command


def run_serve(*args: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyheadkv.cli", "serve", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=Path(__file__).parent,
    )  # not the checkout, whose package has no libraries


def test_serve_passes_every_flag_on() -> None:
    page = ["--kv-page", str(serve.page_path())]
    assert serve.command_line([]) == [str(SERVER), *page, "-m", str(MODEL)]
    assert serve.command_line(["--kv-size", "64", "-c", "512"]) == [str(SERVER), *page, "-m", str(MODEL), "--kv-size", "64", "-c", "512"]
    assert serve.command_line([str(MODEL), "-np", "2"]) == [str(SERVER), *page, "-m", str(MODEL), "-np", "2"]
    for flags in (["--model", "other.gguf"], ["-hf", "user/repo"], ["-c", "512", "--hf_repo", "user/repo"]):
        assert serve.command_line(flags) == [str(SERVER), *page, *flags]
    assert serve.command_line(["-m", "other.gguf", "--kv-page", "off"]) == [str(SERVER), "-m", "other.gguf", "--kv-page", "off"]
    with pytest.raises(ValueError, match="missing.gguf.*no such file"):
        serve.command_line(["missing.gguf"])


def test_serve_becomes_the_server() -> None:
    text = run_serve("model.gguf", "--help").stdout
    assert text.startswith("usage: pyheadkv serve [MODEL.gguf]") and "--kv-size" in text
    done = run_serve("--kv-size", "8", "--port", free_port())
    assert done.returncode == 1 and "--kv-size is 8" in done.stdout + done.stderr
    done = run_serve("missing.gguf", "--port", "1")
    assert done.returncode == 1 and done.stderr.startswith("pyheadkv: error: model='missing.gguf'")


# models of which some layers are not compressed


@pytest.fixture(scope="module", params=[WINDOWED, HYBRID], ids=lambda shape: shape.name)
def mixed(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> tuple[Path, Shape]:
    return make_model(request.param), request.param


def random_ids(seed: int, n: int) -> list[int]:
    return [1, *np.random.default_rng(seed).integers(3, 384, n - 1).tolist()]


def test_an_archive_of_a_hybrid_model_ends_the_server(make_model: Callable[..., Path], tmp_path: Path) -> None:
    command = [SERVER, "-m", make_model(HYBRID), "--kv-size", str(KV_SIZE), "--kv-archive", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (
        done.returncode != 0
        and "has recurrent layers, whose state is right at one position alone: leave it out" in done.stdout + done.stderr
    )


@pytest.mark.parametrize("prefill", ["layer", "token"])
def test_an_archived_chat_of_a_windowed_model_is_that_of_a_fresh_one(
    prefill: str, make_model: Callable[..., Path], log: Path, tmp_path: Path
) -> None:
    """In slots that take turns, and in a server that is started again."""
    path = make_model(WINDOWED)
    turns = [random_ids(1, n) for n in (700, 1000, 1300)]
    with closing(load(path, preset="default", kv_size=KV_SIZE, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH)) as fresh:
        answers = [greedy(fresh, prompt, 12) for prompt in turns]
    flags = ["--kv-size", KV_SIZE, "--kv-archive", tmp_path, "--kv-prefill", prefill]
    with running(log, *flags, model=path, n_slots=2) as server:
        for i in (0, 1):
            found = server.complete(turns[i], 12, id_slot=i, ignore_eos=True)
            assert found["tokens"] == answers[i] and (found["timings"]["kv"]["n_archived"] > 500) == (i > 0)
    with running(log, *flags, model=path, n_slots=2) as server:
        found = server.complete(turns[2], 12, id_slot=0, ignore_eos=True)
        assert found["tokens"] == answers[2] and found["timings"]["kv"]["n_archived"] > 700


@pytest.mark.parametrize("prefill", ["layer", "token"])
def test_slots_of_windowed_and_hybrid_models_give_what_single_runs_give(mixed: tuple[Path, Shape], prefill: str, log: Path) -> None:
    path, _ = mixed
    with closing(load(path, preset="default", kv_size=KV_SIZE, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH)) as single:
        prompts = [random_ids(seed, 700 + 100 * seed) for seed in range(6)]
        answers = [greedy(single, prompt, 16) for prompt in prompts]
        stats = single.kv_stats()
    with running(log, "--kv-size", KV_SIZE, "--kv-prefill", prefill, model=path, n_slots=2) as server, ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda prompt: server.complete(prompt, 16, ignore_eos=True), prompts))
        assert [answer["tokens"] for answer in got] == answers
        kv = got[-1]["timings"]["kv"]
        assert kv["bytes_full"] == len(prompts[-1]) * stats.bytes_full // stats.n_past and kv["bytes"] < 0.2 * kv["bytes_full"]
        said = f"a recurrent state are not compressed, they take {2 * stats.bytes_beside / (1 << 20):.2f} MiB for all slots"
        assert server.output().count(said) == 1 and not re.search("swa.full|full-size SWA", server.output())
        assert kv["bytes_beside"] == stats.bytes_beside and {slot["kv"].get("bytes_beside") for slot in server.get("/slots")} <= {
            None,
            stats.bytes_beside,
        }
        assert server.get("/props")["kv"]["bytes_beside"] == server.metric("kv_bytes_beside") == 2 * stats.bytes_beside > 0
        assert server.metric("kv_compressions_total") == len(prompts)


def test_a_chat_of_windowed_and_hybrid_models_continues_and_is_saved(mixed: tuple[Path, Shape], log: Path, tmp_path: Path) -> None:
    """On the compressed past, and in another slot of a server that is started again. What cannot be cut is read again: recurrent states,
    and windows that were saved."""
    path, shape = mixed
    first, more = random_ids(1, 900), random_ids(2, 40)[1:]
    cut = [*first[:-4], *more]
    options = dict(preset="default", kv_size=KV_SIZE, n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH)
    with closing(load(path, kv_reuse=True, **options)) as reusing:
        answer = greedy(reusing, first, 12)
        longer = [*first, *answer, *more]
        again = greedy(reusing, longer, 12)
        assert reusing.kv_stats().n_prompt == len(first)
        after_cut = greedy(reusing, cut, 12)
        assert reusing.kv_stats().n_prompt == (len(first) - 4 if shape is WINDOWED else len(cut))
        reusing.reset()
        fresh = greedy(reusing, cut, 12)
    assert (after_cut == fresh) == (shape is HYBRID)
    flags = ["--kv-size", KV_SIZE, "--kv-reuse", "--slot-save-path", tmp_path]
    with running(log, *flags, model=path, n_slots=2) as server:
        assert server.complete(first, 12, id_slot=0, ignore_eos=True)["tokens"] == answer
        assert slot_action(server, "save", filename="chat")[0] == 200
        found = server.complete(longer, 12, id_slot=0, ignore_eos=True)
        assert found["tokens"] == again and found["timings"]["cache_n"] >= len(first)
        found = server.complete(cut, 12, id_slot=0, ignore_eos=True)
        assert found["tokens"] == after_cut and found["timings"]["cache_n"] == (len(first) - 4 if shape is WINDOWED else 0)
    with running(log, *flags, model=path, n_slots=2) as server:
        for slot, prompt, tokens, n_least in ((1, longer, again, len(first)), (0, cut, fresh, 0)):
            status, restored = slot_action(server, "restore", slot=slot, filename="chat")
            assert status == 200, restored
            found = server.complete(prompt, 12, id_slot=slot, ignore_eos=True)
            assert found["tokens"] == tokens and (found["timings"]["cache_n"] >= n_least > 0 or n_least == found["timings"]["cache_n"] == 0)
