"""Layers on other machines: workers of ggml-rpc, behind relays that outlive them.

llama.cpp ends the process when a worker does not answer, on a thread of its own, where nothing can be caught. So it is given
the address of a relay on this machine, which passes every message on and counts the bytes. When the worker is gone the relay
answers in its place, with zeros, and notes it; whoever asked for a result looks at the note before using it (``check``).
"""

from __future__ import annotations

import ctypes
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import _lib

# Messages of protocol 7.0, ggml/src/ggml-rpc/ggml-rpc.cpp: a command (1 byte), the size of what follows (8 bytes), what follows; the
# answer, if the command has one, is its size (8 bytes) and it.
VERSION = (7, 0)
HEAD = struct.Struct("<BQ")
SIZE = struct.Struct("<Q")
N_CAPS = 24  # bytes that say which transports an end knows; zeros = TCP
FREE_BUFFER, GET_TENSOR, GRAPH_COMPUTE, HELLO, DEVICE_COUNT, GRAPH_RECOMPUTE = 4, 8, 10, 14, 15, 16
# what is answered in place of a worker that is gone, nothing that an allocation could take for memory
ANSWERS = {
    0: bytes(16),  # alloc buffer: no memory
    1: SIZE.pack(64),  # alignment
    2: SIZE.pack(1 << 62),  # largest buffer
    3: SIZE.pack(4096),  # base of a buffer
    7: b"\x01",  # set tensor by its hash: known, so that it is not sent
    9: b"\x00",  # copy tensor: not done
    11: bytes(16),  # memory of the device
    13: bytes(8),  # size of an allocation
    HELLO: bytes([*VERSION, 0, 0]) + bytes(N_CAPS),
    DEVICE_COUNT: bytes(4),
}
N_CHUNK = 1 << 20
CONNECT_S, HELLO_S = 5.0, 10.0  # a worker has to accept, and to say which version it is
BUSY = "it serves one client at a time, end the other one"


class WorkerLostError(ConnectionError):
    """A worker went away while it had a part of the model; the model is to be loaded again."""


@dataclass
class Traffic:
    """What went through a relay since it was made: bytes to and from the worker, and messages that waited for an answer."""

    bytes_sent: int = 0
    bytes_received: int = 0
    n_messages: int = 0
    n_answers: int = 0


class _End(Exception):
    """The other side of a connection is gone."""


def _recv(sock: socket.socket, n: int) -> bytes:
    """At least one byte, at most n."""
    part = sock.recv(min(n, N_CHUNK))
    if not part:
        raise _End("it closed the connection")
    return part


def _read(sock: socket.socket, n: int) -> bytes:
    parts = []
    while n > 0:
        parts.append(_recv(sock, n))
        n -= len(parts[-1])
    return b"".join(parts)


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of ``host:port``."""
    host, colon, port = endpoint.strip().rpartition(":")
    try:
        host.encode("idna")  # as connecting does
    except UnicodeError:
        host = ""
    if not colon or not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise ValueError(f"rpc_servers: {endpoint!r} is no host:port, such as 192.168.1.5:50052")
    return host, int(port)


class Relay:
    """Between llama.cpp and one worker.

    Attributes
    ----------
    endpoint : of the worker
    address : of the relay, for llama.cpp
    lost : why the worker is no longer there; empty while it is
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.lost, self.traffic, self.n_users = endpoint, "", Traffic(), 0
        host, port = parse_endpoint(endpoint)
        self._target = (host, port)
        self._probe()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name=f"rpc {endpoint}", daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those that there are end with the model."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:  # not on every system for a socket that listens
            pass
        self._listener.close()

    def check(self) -> None:
        """Raise ``WorkerLostError`` if the worker went away."""
        if self.lost:
            raise WorkerLostError(
                f"RPC worker {self.endpoint} was lost: {self.lost}. What it had of the model and of the cache is gone: "
                "start it again and load the model again"
            )

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(self._target, timeout=CONNECT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that was switched off says nothing
        for name, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        return sock

    def _probe(self) -> None:
        """Whether there is a worker that speaks our version; it serves one client at a time."""
        what = f"rpc_servers: worker {self.endpoint}"
        try:
            sock = self._connect()
        except OSError as e:
            raise ConnectionError(
                f"{what} cannot be reached ({e}): start it there with 'pyheadkv rpc-worker --host HOST --port PORT'"
            ) from None
        with sock:
            try:
                sock.settimeout(HELLO_S)
                sock.sendall(HEAD.pack(HELLO, N_CAPS) + bytes(N_CAPS))
                (n,) = SIZE.unpack(_read(sock, SIZE.size))
                version = tuple(_read(sock, min(n, 64)))[:2]
            except TimeoutError:
                raise ConnectionError(f"{what} does not answer within {HELLO_S:.0f} s: {BUSY}") from None
            except (OSError, _End) as e:
                raise ConnectionError(f"{what} does not answer as one ({e}): start 'pyheadkv rpc-worker' there") from None
        if version != VERSION:
            raise ConnectionError(
                f"{what} speaks version {version} of the protocol, this is {VERSION}: install the same pyheadkv on both machines"
            )

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client,), name=f"rpc {self.endpoint}", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        worker: socket.socket | None = None
        with client:
            try:
                if not self.lost:
                    try:
                        worker = self._connect()
                        worker.settimeout(HELLO_S)
                    except OSError as e:
                        self.lose(e)
                _Connection(self, client, worker).run()
            except (_End, OSError):  # llama.cpp is done with it
                pass
            finally:
                if worker is not None:
                    worker.close()

    def lose(self, reason: Exception) -> None:
        """Note why the worker is no longer there."""
        self.lost = self.lost or str(reason) or type(reason).__name__


class _Connection:
    """Passes messages of one connection on, until one of its ends is gone."""

    def __init__(self, relay: Relay, client: socket.socket, worker: socket.socket | None) -> None:
        self.relay, self.client, self.worker = relay, client, worker
        # A worker forgets the last graph of each device when any buffer is freed, of another model too, and hangs up when it is then
        # asked to compute it again, which llama.cpp does.
        self.graphs: dict[bytes, bytes] = {}  # device: its last graph
        self.forgotten: set[bytes] = set()

    def run(self) -> None:
        while True:
            command, size = HEAD.unpack(_read(self.client, HEAD.size))
            last = self.pass_on(command, size)
            if command in ANSWERS or command == GET_TENSOR:
                n = int(SIZE.unpack(last)[0]) if command == GET_TENSOR else len(ANSWERS[command])
                self.client.sendall(SIZE.pack(n))
                for part in self.answer(command, n):
                    self.client.sendall(part)
            if command == HELLO and self.worker is not None:
                self.worker.settimeout(None)  # how long a graph takes is not known

    def send(self, data: bytes) -> None:
        if self.worker is None or self.relay.lost:
            return
        try:
            self.worker.sendall(data)
            self.relay.traffic.bytes_sent += len(data)
        except OSError as e:
            self.relay.lose(e)

    def pass_on(self, command: int, size: int) -> bytes:
        """One message; its last bytes, where the size of a tensor that is asked for stands."""
        self.relay.traffic.n_messages += 1
        if command in (GRAPH_COMPUTE, GRAPH_RECOMPUTE, HELLO):
            data = _read(self.client, size)
            device = data[:4]
            if command == HELLO:
                data = bytes(size)  # both ends take TCP
            elif command == GRAPH_COMPUTE:
                self.graphs[device] = data
                self.forgotten.discard(device)
            elif device in self.forgotten:
                command, data = GRAPH_COMPUTE, self.graphs[device]
                self.forgotten.discard(device)
            self.send(HEAD.pack(command, len(data)) + data)
            return b""
        if command == FREE_BUFFER:
            self.forgotten.update(self.graphs)
        last, head = b"", HEAD.pack(command, size)
        while head or size > 0:
            part = _recv(self.client, size) if size > 0 else b""
            size -= len(part)
            last = (last + part)[-SIZE.size :]
            self.send(head + part)
            head = b""
        return last

    def answer(self, command: int, n: int) -> Iterator[bytes]:
        """The worker's answer in parts, and what is missing of it as ours."""
        n_left = n
        if self.worker is not None and not self.relay.lost:
            try:
                (n_got,) = SIZE.unpack(_read(self.worker, SIZE.size))
                if n_got != n:
                    raise _End(f"it answered command {command} with {n_got} bytes, not {n}")
                self.relay.traffic.n_answers += 1
                self.relay.traffic.bytes_received += SIZE.size + n
                if command == HELLO:
                    yield _read(self.worker, n)[:-N_CAPS] + bytes(N_CAPS)
                    return
                while n_left > 0:
                    part = _recv(self.worker, n_left)
                    yield part
                    n_left -= len(part)
            except TimeoutError as e:
                # before HELLO is answered there is a limit; then it is the system's, for one that says nothing any more
                self.relay.lose(TimeoutError(f"no answer within {HELLO_S:.0f} s: {BUSY}") if command == HELLO else e)
            except (OSError, _End) as e:
                self.relay.lose(e)
        if n_left > 0:
            yield ANSWERS.get(command, b"")[n - n_left :] or bytes(n_left)


_relays: dict[str, Relay] = {}  # those in use: the models of this process share the one connection that a worker serves
_relays_lock = threading.Lock()


def _take(endpoint: str) -> Relay:
    with _relays_lock:
        relay = _relays.get(endpoint)
        if relay is None or relay.lost:
            relay = _relays[endpoint] = Relay(endpoint)
        relay.n_users += 1
        return relay


def _give_back(relay: Relay) -> None:
    with _relays_lock:
        relay.n_users -= 1
        if relay.n_users == 0:
            relay.close()
            if _relays.get(relay.endpoint) is relay:
                del _relays[relay.endpoint]


class Workers:
    """The workers of one model, and the device of each for llama.cpp."""

    def __init__(self, endpoints: str | Sequence[str]) -> None:
        names = endpoints.split(",") if isinstance(endpoints, str) else list(endpoints) if isinstance(endpoints, Iterable) else []
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"rpc_servers={endpoints!r}: name host:port of at least one worker, several with commas between them")
        names = [name.strip() for name in names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rpc_servers names {', '.join(twice)} twice: a worker serves one client, name each once")
        self.relays: list[Relay] = []
        try:
            for name in names:
                self.relays.append(_take(name))
            self._devices = [device for relay in self.relays for device in _devices(relay)]
        except BaseException:
            self.close()
            raise
        found = [*self._devices, *_lib.gpus(), None]
        self._array = (ctypes.c_void_p * len(found))(*found)

    @property
    def devices(self) -> int:
        """Address of the list of devices that a model may use: those of the workers, then the GPUs of this machine."""
        return ctypes.addressof(self._array)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """What went to and from each worker."""
        return {relay.endpoint: replace(relay.traffic) for relay in self.relays}

    def guard(self, context: Any) -> None:
        """Make each ``decode`` of a context of llama_cpp fail where a worker went away before or meanwhile."""
        from llama_cpp import llama_cpp

        decode = context.decode

        def checked(batch: Any) -> None:
            self.check()
            decode(batch)
            llama_cpp.llama_synchronize(context.ctx)
            self.check()

        context.decode = checked

    def check(self) -> None:
        """Raise ``WorkerLostError`` if one of them went away: nothing that was computed since is an answer."""
        for relay in self.relays:
            relay.check()

    def close(self) -> None:
        """To be called when the model is closed."""
        while self.relays:
            _give_back(self.relays.pop())


def _devices(relay: Relay) -> list[int]:
    """ggml_backend_dev_t of each device of a worker."""
    from llama_cpp import llama_cpp

    ggml: Any = llama_cpp._lib  # its dependencies are searched too
    pointer = ctypes.c_void_p
    ggml.ggml_backend_reg_by_name.argtypes, ggml.ggml_backend_reg_by_name.restype = [ctypes.c_char_p], pointer
    ggml.ggml_backend_reg_get_proc_address.argtypes, ggml.ggml_backend_reg_get_proc_address.restype = [pointer, ctypes.c_char_p], pointer
    ggml.ggml_backend_reg_dev_count.argtypes, ggml.ggml_backend_reg_dev_count.restype = [pointer], ctypes.c_size_t
    ggml.ggml_backend_reg_dev_get.argtypes, ggml.ggml_backend_reg_dev_get.restype = [pointer, ctypes.c_size_t], pointer
    rpc = ggml.ggml_backend_reg_by_name(b"RPC")
    if not rpc:
        raise ValueError("rpc_servers: this library was built without ggml-rpc, build it with PYHEADKV_RPC=ON")
    address = ggml.ggml_backend_reg_get_proc_address(rpc, b"ggml_backend_rpc_add_server")
    add_server = ctypes.CFUNCTYPE(pointer, ctypes.c_char_p)(address)
    reg = add_server(relay.address.encode())
    relay.check()
    if not reg:
        raise ConnectionError(f"rpc_servers: worker {relay.endpoint} has no device")
    return [ggml.ggml_backend_reg_dev_get(reg, i) for i in range(ggml.ggml_backend_reg_dev_count(reg))]
