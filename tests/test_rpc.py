"""Layers on other machines: what workers compute, and what happens when one of them goes away in the middle of something."""

from __future__ import annotations

import copy
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

try:
    import pyheadkv  # noqa: F401
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from conftest import Shape, greedy, load, nmse, read_prompt, tokens
from rpc_worker import Worker, free_port

from pyheadkv import rpc
from pyheadkv.cli import rpc_worker, serve
from pyheadkv.rpc import Relay, WorkerLostError, parse_endpoint

try:
    rpc_worker.worker_path()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)

SHAPE = Shape("qwen3-gqa2", "qwen3", 4, 2, n_layer=4, head_dim=64)
KV: dict[str, Any] = {"kv_size": 48, "policy": "snapkv"}


@pytest.fixture
def path(make_model: Callable[..., Path]) -> Path:
    return make_model(SHAPE)


@pytest.fixture
def own() -> Iterator[Worker]:
    """A worker that a test may kill."""
    with Worker() as started:
        yield started


def kept(llm: Any) -> list[list[int]]:
    return [llm.kv_positions(il, ih).tolist() for il in range(SHAPE.n_layer) for ih in range(SHAPE.n_head_kv)]


@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_workers_compute_what_this_machine_computes(path: Path, worker: Worker, own: Worker, prefill: str) -> None:
    prompt = tokens(500)
    with_ours = load(path, **KV, attend="composed", prefill=prefill)
    base, base_kept = read_prompt(with_ours, prompt), kept(with_ours)
    llm = load(path, **KV, prefill=prefill, rpc_servers=[worker.endpoint, own.endpoint], tensor_split=[0.5, 0.5])
    assert nmse(read_prompt(llm, prompt), base) < 1e-6 and llm.prefill_mode == prefill
    assert sum(len(set(a) ^ set(b)) for a, b in zip(kept(llm), base_kept, strict=True)) <= 2  # of equal scores another one may win
    llm.eval([9])
    with_ours.eval([9])
    assert nmse(llm.last_logits, with_ours.last_logits) < 1e-4
    traffic = llm.rpc_traffic
    assert set(traffic) == {worker.endpoint, own.endpoint}
    assert all(t.bytes_sent > 100000 and t.bytes_received > 0 and t.n_messages > t.n_answers > 0 for t in traffic.values())
    llm.close()


def test_the_stock_cache_on_a_worker_is_that_of_this_machine(path: Path, worker: Worker) -> None:
    prompt = tokens(300)
    here, there = load(path), load(path, rpc_servers=worker.endpoint)
    assert greedy(there, prompt, 6) == greedy(here, prompt, 6)
    twin = copy.deepcopy(there)  # another model of this process shares the one connection that a worker serves
    assert twin.rpc_traffic.keys() == there.rpc_traffic.keys() and greedy(twin, prompt, 6) == greedy(here, prompt, 6)
    there.close()
    assert greedy(twin, prompt, 6) == greedy(here, prompt, 6)
    twin.close()


@pytest.mark.parametrize("prefill", ["token", "layer"])
def test_the_archive_gives_workers_their_rows_back(path: Path, worker: Worker, own: Worker, tmp_path: Path, prefill: str) -> None:
    prompt = tokens(700)
    options: dict[str, Any] = {**KV, "prefill": prefill, "rpc_servers": [worker.endpoint, own.endpoint], "tensor_split": [0.5, 0.5]}
    fresh = load(path, **options)
    base, base_kept = read_prompt(fresh, prompt), kept(fresh)
    fresh.close()
    llm = load(path, **options, kv_archive=tmp_path)
    read_prompt(llm, prompt[:512])
    np.testing.assert_array_equal(read_prompt(llm, prompt), base)
    assert llm.kv_stats().n_archived >= 448 and kept(llm) == base_kept  # in upstream's order 64 of each batch are computed
    llm.close()


def test_the_log_says_why_layers_of_a_worker_are_composed(path: Path, worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    load(path, **KV, rpc_servers=worker.endpoint, verbose=True).close()
    why = "layer 0 with K heads of 64 and V heads of 64, of types f16 and f16, on RPC0"
    assert f"attend is not fused in {why}" in capfd.readouterr().err
    load(path, **KV, verbose=True).close()
    assert "attend is not fused" not in capfd.readouterr().err
    with pytest.raises(ValueError, match=f"attend 'fused' is not possible in {why}"):
        load(path, **KV, rpc_servers=worker.endpoint, attend="fused")


def killed(worker: Worker, after: float) -> threading.Timer:
    timer = threading.Timer(after, worker.kill)
    timer.start()
    return timer


@pytest.mark.parametrize("options", [{}, {**KV, "prefill": "layer"}, {**KV, "prefill": "token"}], ids=["stock", "layer", "token"])
def test_a_worker_that_dies_in_a_prompt_ends_it_with_its_name(path: Path, own: Worker, options: dict[str, Any]) -> None:
    prompt = tokens(1500)
    llm = load(path, **options, rpc_servers=own.endpoint)
    before = greedy(llm, prompt, 4)
    begin = time.perf_counter()
    read_prompt(llm, prompt)
    timer = killed(own, (time.perf_counter() - begin) / 3)
    with pytest.raises(WorkerLostError, match=f"RPC worker {own.endpoint} was lost: .*load the model again"):
        for _ in range(1000):
            llm.reset()
            read_prompt(llm, prompt)
    timer.join()
    with pytest.raises(WorkerLostError, match=own.endpoint):  # and for ever, even when it is there again
        own.start()
        greedy(llm, prompt, 1)
    llm.close()
    again = load(path, **options, rpc_servers=own.endpoint)
    assert greedy(again, prompt, 4) == before
    again.close()


@pytest.mark.parametrize("options", [{}, KV], ids=["stock", "compressed"])
def test_a_worker_that_dies_in_an_answer_ends_it_with_its_name(path: Path, own: Worker, options: dict[str, Any]) -> None:
    prompt = tokens(200)
    with_all = load(path, **options, rpc_servers=own.endpoint)
    right = greedy(with_all, prompt, 12)
    with_all.close()
    llm = load(path, **options, rpc_servers=own.endpoint)
    said: list[int] = []
    with pytest.raises(WorkerLostError, match=own.endpoint):
        for token in llm.generate(prompt, temp=0.0):
            said.append(token)
            if len(said) == 5:
                own.kill()
            assert len(said) < 12
    assert said == right[: len(said)] and len(said) >= 5  # no token after it was lost
    for what in (lambda: llm.save_state(), lambda: llm.eval([5])):
        with pytest.raises(WorkerLostError, match=own.endpoint):
            what()
    llm.close()


@pytest.mark.parametrize("options", [{}, KV], ids=["stock", "compressed"])
def test_a_worker_that_dies_while_it_gets_the_weights_is_named(
    path: Path, own: Worker, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    send = rpc._Connection.send

    def until_it_dies(self: rpc._Connection, data: bytes) -> None:
        send(self, data)
        if self.relay.traffic.bytes_sent > 100000 and own.process.poll() is None:
            own.kill()

    monkeypatch.setattr(rpc._Connection, "send", until_it_dies)
    with pytest.raises(WorkerLostError, match=own.endpoint):
        load(path, **options, rpc_servers=own.endpoint)
    monkeypatch.undo()
    own.start()
    llm = load(path, **options, rpc_servers=own.endpoint)
    assert greedy(llm, tokens(50), 2)
    llm.close()


def test_a_worker_that_answers_too_little_is_lost_in_the_middle_of_its_answer() -> None:
    # a tensor of which 10 of 100 bytes come
    with socket.create_server(("127.0.0.1", 0)) as fake:

        def run() -> None:
            probe, _ = fake.accept()
            probe.recv(9 + 24, socket.MSG_WAITALL)
            probe.sendall((28).to_bytes(8, "little") + bytes([7, 0, 0]) + bytes(25))
            probe.close()
            client, _ = fake.accept()
            client.recv(9 + 8, socket.MSG_WAITALL)
            client.sendall((100).to_bytes(8, "little") + b"x" * 10)
            client.close()

        thread = threading.Thread(target=run)
        thread.start()
        relay = Relay(f"127.0.0.1:{fake.getsockname()[1]}")
        with socket.create_connection(("127.0.0.1", int(relay.address.split(":")[1]))) as sock:
            sock.sendall(b"\x08" + (8).to_bytes(8, "little") + (100).to_bytes(8, "little"))
            got = sock.recv(108, socket.MSG_WAITALL)
            assert got == (100).to_bytes(8, "little") + b"x" * 10 + bytes(90)
            with pytest.raises(WorkerLostError, match="closed the connection"):
                relay.check()
            sock.sendall(b"\x00" + (12).to_bytes(8, "little") + bytes(12))  # memory: none
            assert sock.recv(24, socket.MSG_WAITALL) == (16).to_bytes(8, "little") + bytes(16)
        thread.join()
        relay.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rpc_servers": "nowhere"}, "'nowhere' is no host:port"),
        ({"rpc_servers": "host:99999"}, "no host:port"),
        ({"rpc_servers": "gpu..local:50052"}, "no host:port"),
        ({"rpc_servers": "127.0.0.1:\u0665"}, "no host:port"),  # a digit, of another script
        ({"rpc_servers": 50052}, "rpc_servers=50052: name host:port of at least one worker"),
        ({"rpc_servers": []}, "name host:port of at least one worker"),
        ({"rpc_servers": "127.0.0.1:1,"}, "name host:port of at least one worker"),
        ({"rpc_servers": "127.0.0.1:1, 127.0.0.1:1"}, "names 127.0.0.1:1 twice"),
        ({"rpc_servers": "127.0.0.1:1", "n_gpu_layers": 0}, "no layer would be on a worker"),
    ],
)
def test_wrong_workers_are_refused(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(path, **options)


def test_a_worker_that_is_not_there_is_named(path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"worker 127.0.0.1:1 cannot be reached .*pyheadkv rpc-worker"):
        load(path, rpc_servers="127.0.0.1:1")


def test_a_worker_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, worker: Worker) -> None:
    monkeypatch.setattr("pyheadkv.rpc.VERSION", (6, 0))
    with pytest.raises(ConnectionError, match=r"speaks version \(7, 0\) of the protocol, this is \(6, 0\)"):
        Relay(worker.endpoint)


def test_a_worker_that_serves_another_process_says_so(monkeypatch: pytest.MonkeyPatch, own: Worker) -> None:
    monkeypatch.setattr("pyheadkv.rpc.HELLO_S", 0.3)
    with socket.create_connection(("127.0.0.1", own.port)):
        with pytest.raises(ConnectionError, match="serves one client at a time"):
            Relay(own.endpoint)


def test_a_worker_that_another_model_took_meanwhile_says_so(monkeypatch: pytest.MonkeyPatch, own: Worker) -> None:
    relay = Relay(own.endpoint)
    monkeypatch.setattr("pyheadkv.rpc.HELLO_S", 0.3)
    with socket.create_connection(("127.0.0.1", own.port)):
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", int(relay.address.split(":")[1]))) as sock:
            sock.sendall(rpc.HEAD.pack(rpc.HELLO, rpc.N_CAPS) + bytes(rpc.N_CAPS))
            n = rpc.SIZE.size + len(rpc.ANSWERS[rpc.HELLO])
            assert len(sock.recv(n, socket.MSG_WAITALL)) == n
            with pytest.raises(WorkerLostError, match="no answer within 0 s: it serves one client at a time"):
                relay.check()
    relay.close()


def test_endpoints() -> None:
    assert parse_endpoint(" gpu.local:50052") == ("gpu.local", 50052)


def test_the_protocol_is_the_one_that_the_relay_knows() -> None:
    # sizes of answers and numbers of commands are read off this version of it
    from pyheadkv.rpc import ANSWERS, VERSION

    tree = Path(__file__).resolve().parents[1] / "build" / "llama" / "llama.cpp" / "ggml"
    header = tree / "include" / "ggml-rpc.h"
    if not header.is_file():
        pytest.skip("no sources of llama.cpp: run make")
    text, source = header.read_text(), (tree / "src" / "ggml-rpc" / "ggml-rpc.cpp").read_text()
    for name, number in zip(("MAJOR", "MINOR"), VERSION, strict=True):
        assert f"#define RPC_PROTO_{name}_VERSION    {number}" in text
    names = [line.split("=")[0].strip(" ,") for line in source.split("enum rpc_cmd {")[1].split("}")[0].splitlines() if "RPC_CMD_" in line]
    answered = {i for i, name in enumerate(names) if f"rpc_msg_{name[8:].lower()}_rsp {{" in source}
    assert answered == set(ANSWERS)
    for name in ("FREE_BUFFER", "GET_TENSOR", "GRAPH_COMPUTE", "HELLO", "DEVICE_COUNT", "GRAPH_RECOMPUTE"):
        assert names[getattr(rpc, name)] == f"RPC_CMD_{name}"


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyheadkv.cli import make_parser

    args = make_parser().parse_args(["rpc-worker", "--port", "1234", "--threads", "2", "--device", "CPU", "--cache"])
    assert rpc_worker.command_line(args)[1:] == "--host 127.0.0.1 --port 1234 --threads 2 --device CPU --cache".split()
    args.port = 70000
    with pytest.raises(ValueError, match="--port 70000: it must be 1 to 65535"):
        rpc_worker.command_line(args)


def test_an_address_where_a_worker_cannot_listen_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from pyheadkv.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, message in (
            ("127.0.0.1", f"--host 127.0.0.1 --port {port}: Address already in use: use another --port"),
            ("192.0.2.1", f"--host 192.0.2.1 --port {port}: "),
            ("gpu.local", "--host gpu.local: it must be an IPv4 address of this machine"),
        ):
            assert main(["rpc-worker", "--host", host, "--port", str(port)]) == 1
            assert message in capsys.readouterr().err


def start_server(path: Path, endpoint: str, *flags: str) -> tuple[subprocess.Popen[str], int]:
    port = free_port()
    command = [
        str(serve.server_path()),
        "-m",
        str(path),
        "--port",
        str(port),
        "-c",
        "2048",
        "-t",
        "1",
        "-ngl",
        "99",
        "--rpc",
        endpoint,
        *flags,
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), port


def test_the_server_answers_with_a_worker_and_ends_with_its_name(path: Path, own: Worker) -> None:
    import json
    import urllib.error
    import urllib.request

    def ask(n: int) -> Any:
        body = json.dumps({"prompt": tokens(300), "n_predict": n, "temperature": 0, "return_tokens": True}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=120))

    here = load(path, **KV, attend="composed")
    right = greedy(here, tokens(300), 4)
    server, port = start_server(path, own.endpoint, "--kv-size", "48", "--kv-policy", "snapkv", "--kv-window", "8", "--kv-power", "1",
                                "--kv-pool-kernel", "7")  # fmt: skip
    try:
        for _ in range(600):
            assert server.poll() is None, server.stderr.read() if server.stderr else ""
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        assert ask(4)["tokens"] == right
        killed(own, 0.5)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            for _ in range(1000):
                assert ask(64)["tokens"][:4] == right
        _, said = server.communicate(timeout=30)
        assert server.returncode == 1
        assert f"RPC worker {own.endpoint} was lost: this program ends." in said and "start it again" in said
    finally:
        server.kill()
        server.wait()


def test_the_server_names_a_worker_that_is_not_there(path: Path) -> None:
    server, _ = start_server(path, "127.0.0.1:1")
    _, said = server.communicate(timeout=60)
    assert server.returncode == 1 and "Failed to connect to 127.0.0.1:1" in said
    assert "--rpc: no worker was there: name HOST:PORT of one that 'pyheadkv rpc-worker' has started" in said and "is gone" not in said
