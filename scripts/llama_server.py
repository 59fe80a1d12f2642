"""A llama-server of this build as a child process, for benchmarks and soak tests."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from pyheadkv.cli import serve

HTTP = requests.Session()
HTTP.trust_env = False  # no proxy
HTTP.headers["Connection"] = "close"  # one that is kept open holds a thread of the server

# no request, or one that is refused
BAD_BODIES: list[Any] = [
    b"{",
    b"[]",
    b"null",
    b'{"prompt": "\xff"}',
    {"prompt": {}},
    {"prompt": [1, "the", None]},
    {"prompt": [-1]},
    {"prompt": [1 << 30]},
    {"n_predict": 4},
    {"prompt": "the", "kv_size": 1},
    {"prompt": "the", "kv_size": "all"},
    {"prompt": "the", "kv_protect": [[5, 1]]},
    {"prompt": "the", "kv_protect": 7},
    {"prompt": "the", "n": 3},
    {"prompt": [5] * 3000},
    {"messages": 5},
    {"prompt": "the", "n_predict": "x"},
]


class Server:
    """A running llama-server on a port of its own.

    Attributes
    ----------
    seconds : an answer may take
    """

    seconds: float = 3600

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port

    def request(self, path: str, body: Any = None, *, timeout: float | None = None) -> tuple[int, Any]:
        """Status and parsed answer; GET without a body."""
        response = self.open(path, body, timeout=timeout)
        try:
            return response.status_code, response.json()
        except ValueError:
            return response.status_code, response.text

    def open(self, path: str, body: Any = None, *, timeout: float | None = None, stream: bool = False) -> requests.Response:
        """The answer, of a stream before its end."""
        return HTTP.request(
            "GET" if body is None else "POST",
            f"http://127.0.0.1:{self.port}{path}",
            data=body if body is None or isinstance(body, bytes) else json.dumps(body),
            headers={"Content-Type": "application/json"},
            timeout=timeout or self.seconds,
            stream=stream,
        )

    def complete(self, prompt: list[int], n: int, **more: Any) -> dict[str, Any]:
        """Answer to a greedy completion of n tokens."""
        status, answer = self.request("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True, **more})
        if status != 200:
            raise RuntimeError(f"{status}: {answer}")
        return dict(answer)

    def metric(self, name: str) -> float:
        """A number of /metrics."""
        lines = [line.split() for line in self.request("/metrics")[1].splitlines() if line.startswith(f"llamacpp:{name} ")]
        return float(lines[0][1])

    def status_bytes(self, field: str) -> int:
        """A size in /proc/PID/status: RssAnon, resident pages of no file; VmHWM, the largest resident size so far."""
        return int(Path(f"/proc/{self.process.pid}/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def running(*flags: Any, log: Path, seconds: float = 120, path: Path | None = None, by: Sequence[Any] = ()) -> Iterator[Server]:
    """Start llama-server, that of the package or another one, with these flags, wait until it answers, and end it.

    Parameters
    ----------
    by : a command that starts it, in place of ``path``
    """
    port = free_port()
    command = [*(by or [path or serve.server_path()]), "--host", "127.0.0.1", "--port", port, "--metrics", "--no-warmup", *flags]
    with log.open("wb") as out:
        process = subprocess.Popen([str(c) for c in command], stdout=out, stderr=out)
        server = Server(process, port)
        try:
            deadline = time.monotonic() + seconds
            while not is_healthy(server):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"llama-server did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_healthy(server: Server) -> bool:
    try:
        return server.request("/health", timeout=5)[0] == 200
    except OSError:  # not listening yet
        return False
