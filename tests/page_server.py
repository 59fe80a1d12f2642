"""Servers with the page, for the tests of its endpoint and for those with a browser."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import N_THREADS

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
import llama_server

from pyheadkv.cli import serve

N_CTX, N_UBATCH, KV_SIZE, WINDOW = 2048, 256, 96, 16
PAGE = serve.page_path()

# what would do something if it were taken for HTML, or for a part of JSON
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"></div></body>&lt;b&gt;\u2028\\u0022{{7*7}}"


@contextmanager
def running(log: Path, model: Path, *flags: Any, n_slots: int = 1, kv_size: int | None = KV_SIZE) -> Iterator[llama_server.Server]:
    """A server of the page with n_slots slots of N_CTX tokens; kv_size None = the stock cache."""
    sizes = [] if kv_size is None else ["--kv-size", kv_size, "--kv-window", WINDOW]
    common = ["-m", model, "-c", N_CTX * n_slots, "-np", n_slots, "-ub", N_UBATCH, "-b", N_UBATCH, "-t", N_THREADS, "-tb", N_THREADS]
    with llama_server.running(*common, *sizes, "--kv-page", PAGE, *flags, log=log) as server:
        server.seconds = 60
        yield server


def get(server: llama_server.Server, path: str, **headers: str) -> Any:
    """The answer to a GET with these headers, as requests has it."""
    return llama_server.HTTP.get(
        f"http://127.0.0.1:{server.port}{path}", headers={name.replace("_", "-"): value for name, value in headers.items()}, timeout=60
    )


def positions(server: llama_server.Server, query: str = "slot=0") -> Any:
    """What the endpoint tells; asked again while it is refused for being asked too often."""
    import time

    for _ in range(100):
        answer = get(server, f"/kv/positions?{query}")
        if answer.status_code != 429:
            assert answer.status_code == 200, answer.text
            return answer.json()
        time.sleep(0.1)
    raise TimeoutError("it was refused for 10 s")
