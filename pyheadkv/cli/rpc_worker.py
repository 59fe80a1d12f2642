"""``pyheadkv rpc-worker``: the bundled worker of ggml-rpc, which takes layers of models of other machines."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
from pathlib import Path

from .._lib import library_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it listens, and with what it computes."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; whoever reaches it can use this machine (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=50052, help="port (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: half of the cores)")
    parser.add_argument("--device", help="devices to offer, with commas between them (default: the GPUs, else the CPU)")
    parser.add_argument("--cache", action="store_true", help="keep weights on disk, so that they are sent once")


def worker_path() -> Path:
    """Path of the bundled worker.

    Raises
    ------
    ValueError : this build has none
    """
    path = library_path() / ("ggml-rpc-server.exe" if os.name == "nt" else "ggml-rpc-server")
    if not path.is_file():
        raise ValueError(
            f"no ggml-rpc-server in {path.parent}: it was built with PYHEADKV_SERVER=OFF or PYHEADKV_RPC=OFF, build it with ON"
        )
    return path


def command_line(args: argparse.Namespace) -> list[str]:
    """What is run."""
    if not 0 < args.port < 65536:
        raise ValueError(f"--port {args.port}: it must be 1 to 65535")
    _check_address(args.host, args.port)
    command = [str(worker_path()), "--host", args.host, "--port", str(args.port)]
    command += [] if args.threads is None else ["--threads", str(args.threads)]
    command += [] if args.device is None else ["--device", args.device]
    return command + (["--cache"] if args.cache else [])


def _check_address(host: str, port: int) -> None:
    """That the worker can listen there, which it would say with exit code 0 if it cannot."""
    try:
        socket.inet_aton(host)
    except OSError:
        raise ValueError(f"--host {host}: it must be an IPv4 address of this machine, 127.0.0.1 or 0.0.0.0 = all of them") from None
    with socket.socket() as sock:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the worker
        try:
            sock.bind((host, port))
            sock.listen(1)
        except OSError as e:
            raise ValueError(
                f"--host {host} --port {port}: {e.strerror}: use another --port, or an address of this machine for --host"
            ) from None


def run(args: argparse.Namespace) -> int:
    """Become the worker; where a process cannot, wait for it and return its exit code."""
    command = command_line(args)
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.run(command).returncode
