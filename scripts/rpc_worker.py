"""Workers of this build as child processes, for tests and measurements of layers on other machines."""

from __future__ import annotations

import socket
import subprocess
import time
from types import TracebackType

from pyheadkv.cli.rpc_worker import worker_path

START_S = 30


def free_port() -> int:
    """A port that nothing listens at now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Worker:
    """A worker on this machine that computes on the CPU.

    Attributes
    ----------
    endpoint : host:port
    """

    def __init__(self, *, threads: int = 1) -> None:
        self.threads, self.port = threads, free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Begin, or begin again at the same port."""
        command = [str(worker_path()), "--host", "127.0.0.1", "--port", str(self.port), "--threads", str(self.threads), "--device", "CPU"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(START_S * 20):
            if self.process.poll() is not None:
                raise RuntimeError(f"the worker ended with {self.process.returncode}: {' '.join(command)}")
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"the worker does not listen after {START_S} s: {' '.join(command)}")

    def kill(self) -> None:
        """End it without a word, as a machine that goes away."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
