"""Small servers on the host's loopback, each on threads of its own, for as long as a `with` block is open.

What a handler raises is raised by the block, unless it is the connection's end.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, suppress
from functools import wraps
from pathlib import Path

import anyio
import anyio.to_thread
from dnslib import AAAA, QTYPE, RCODE, RR, A, DNSRecord
from typing_extensions import ParamSpec

SECONDS = 90
"""How long anybody waits for what is there in a moment, unless this machine is busy."""
BLOCK = os.urandom(1 << 20)
"""A mebibyte that nobody could have made up."""

Serve = Callable[[socket.socket], object]
P = ParamSpec("P")


def bounded(test: Callable[P, Awaitable[None]]) -> Callable[P, Coroutine[object, object, None]]:
    """A test that waits no longer than `SECONDS`, all in all."""

    @wraps(test)
    async def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with anyio.fail_after(SECONDS):
            await test(*args, **kwargs)

    return run


async def cancelled_at_any_moment(block: Callable[[], AbstractAsyncContextManager[object]]) -> None:
    """Enter `block` and cancel that a little later each time, until it has been entered before.

    The moments are spread over the time that entering takes here and now.
    """
    start = anyio.current_time()
    async with block():
        took = anyio.current_time() - start
    for number in itertools.count():
        with anyio.move_on_after(took * number / 25):
            async with block():
                return


class Hearing:
    """Serves by listening to the end; what each connection said can be awaited."""

    def __init__(self, first: bytes = b"", last: bytes = b"") -> None:
        """`first` is said before, and that is all; `last` after."""
        self._first, self._last = first, last
        self._heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def __call__(self, sock: socket.socket) -> None:
        if self._first:
            sock.sendall(self._first)
            sock.shutdown(socket.SHUT_WR)
        heard = whole(sock)
        if self._last:
            sock.sendall(self._last)
        self._heard.put(heard)

    async def heard(self) -> bytes:
        """What the next connection said."""
        return await anyio.to_thread.run_sync(lambda: self._heard.get(timeout=SECONDS))


def _family(address: tuple[str, int]) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


@contextmanager
def tcp_server(serve: Serve, address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[int]:
    """Every connection is given to `serve` on a thread of its own, and closed after it.  Yields the port.

    Leaving the block cuts off those that are still being served: wait for them before.
    """
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []
    errors: list[BaseException] = []
    closing = threading.Event()

    def one(sock: socket.socket) -> None:
        try:
            with sock:
                serve(sock)
        except ConnectionError:
            return
        except BaseException as error:
            if not (closing.is_set() and isinstance(error, OSError)):
                errors.append(error)

    def accept(listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # shut down
            sock.settimeout(SECONDS)
            sockets.append(sock)
            threads.append(threading.Thread(target=one, args=(sock,), daemon=True))
            threads[-1].start()

    with socket.create_server(address, family=_family(address), backlog=512) as listener:
        acceptor = threading.Thread(target=accept, args=(listener,), daemon=True)
        acceptor.start()
        try:
            yield listener.getsockname()[1]
        finally:
            closing.set()
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join(SECONDS)
            for sock in sockets:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(SECONDS)
    if errors:
        raise errors[0]


def echo(sock: socket.socket) -> None:
    """What comes is sent back, until the peer has no more to say; then neither have we."""
    while data := sock.recv(1 << 16):
        sock.sendall(data)


def hello(sock: socket.socket) -> None:
    """Say so, and no more."""
    sock.sendall(b"hello")


def whole(sock: socket.socket) -> bytes:
    """All that comes."""
    chunks = []
    while data := sock.recv(1 << 18):
        chunks.append(data)
    return b"".join(chunks)


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def content(mebibytes: int) -> Iterator[bytes]:
    """So much, and no two mebibytes the same."""
    for number in range(mebibytes):
        yield number.to_bytes(8, "big") + BLOCK[8:]


def digest(mebibytes: int) -> str:
    """The sha256 of `content`."""
    sha = hashlib.sha256()
    for block in content(mebibytes):
        sha.update(block)
    return sha.hexdigest()


def http(sock: socket.socket) -> None:
    """`GET /N`: N mebibytes of `content`.  `GET /peer`: who asks.  `PUT`: the sha256 of what was put."""
    request = b""
    while b"\r\n\r\n" not in request:
        received = sock.recv(1 << 16)
        if not received:
            return
        request += received
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    method, path, _ = first.split()
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if method == "PUT":
        _reply(sock, _put(sock, fields, body).encode())
    elif path == "/peer":
        _reply(sock, sock.getpeername()[0].encode())
    else:
        mebibytes = int(path[1:].partition("?")[0])
        _reply(sock, b"", length=mebibytes << 20)
        for block in content(mebibytes):
            sock.sendall(block)


def _reply(sock: socket.socket, body: bytes, length: int | None = None) -> None:
    size = len(body) if length is None else length
    sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size + body)


def _put(sock: socket.socket, fields: dict[str, str], body: bytes) -> str:
    if fields.get("expect") == "100-continue":
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    sha, left = hashlib.sha256(body), int(fields["content-length"]) - len(body)
    while left:
        data = sock.recv(min(left, 1 << 18))
        if not data:
            raise EOFError(f"{left} bytes are missing")
        sha.update(data)
        left -= len(data)
    return sha.hexdigest()


Answer = Callable[[socket.socket, bytes, tuple[str, int]], object]


def send_back(sock: socket.socket, payload: bytes, sender: tuple[str, int]) -> None:
    """The answer of an echo server."""
    sock.sendto(payload, sender)


@contextmanager
def udp_server(answer: Answer = send_back, address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[int]:
    """Every datagram is given to `answer`, with the socket and who sent it.  Yields the port."""
    stop = b"stop" + os.urandom(16)
    errors: list[Exception] = []

    def serve(sock: socket.socket) -> None:
        while True:
            payload, sender = sock.recvfrom(1 << 16)
            if payload == stop:
                return
            try:
                answer(sock, payload, sender)
            except Exception as error:
                errors.append(error)

    with socket.socket(_family(address), socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        thread = threading.Thread(target=serve, args=(sock,), daemon=True)
        thread.start()
        try:
            yield sock.getsockname()[1]
        finally:
            with socket.socket(_family(address), socket.SOCK_DGRAM) as stopper:
                stopper.sendto(stop, sock.getsockname())
            thread.join(SECONDS)
    if errors:
        raise errors[0]


@contextmanager
def dns_server(
    names: dict[str, str], asked: list[str] | None = None, *, rcode: str = "NOERROR"
) -> Iterator[int]:
    """A resolver, UDP and TCP on one port, that knows these names' addresses.  Yields the port.

    `asked` collects the protocol and name of each question.  `rcode` is what it says of a name it knows.
    """

    def resolve(message: bytes, protocol: str) -> bytes:
        query = DNSRecord.parse(message)
        name = str(query.q.qname).rstrip(".")
        if asked is not None:
            asked.append(f"{protocol} {name}")
        reply = query.reply()
        if name not in names:
            reply.header.rcode = RCODE.NXDOMAIN
        elif rcode != "NOERROR":
            reply.header.rcode = getattr(RCODE, rcode)
        elif query.q.qtype == (QTYPE.AAAA if ":" in names[name] else QTYPE.A):
            data = AAAA(names[name]) if ":" in names[name] else A(names[name])
            reply.add_answer(RR(query.q.qname, query.q.qtype, rdata=data, ttl=60))
        packed: bytes = reply.pack()
        return packed

    def over_tcp(sock: socket.socket) -> None:
        while length := sock.recv(2, socket.MSG_WAITALL):
            size = int.from_bytes(length, "big")
            reply = resolve(sock.recv(size, socket.MSG_WAITALL), "tcp")
            sock.sendall(len(reply).to_bytes(2, "big") + reply)

    def over_udp(sock: socket.socket, message: bytes, sender: tuple[str, int]) -> None:
        sock.sendto(resolve(message, "udp"), sender)

    with ExitStack() as stack:
        while True:  # until a port is free for both
            port = stack.enter_context(tcp_server(over_tcp))
            try:
                stack.enter_context(udp_server(over_udp, ("127.0.0.1", port)))
                break
            except OSError:
                stack.close()
        yield port


@contextmanager
def dnsmasq(*options: str) -> Iterator[int]:
    """A dnsmasq on 127.0.0.1 that knows what `options` say, and asks nobody.  Yields the port."""
    port = closed_port()
    command = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--log-facility=-"]
    command += [
        f"--port={port}",
        "--listen-address=127.0.0.1",
        "--bind-interfaces",
        "--no-resolv",
        "--no-hosts",
    ]
    command += ["--edns-packet-max=4096", "--local-ttl=60", "--max-tcp-connections=100", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            said = [process.stderr.readline()]
            while b"started" not in said[-1]:
                said.append(process.stderr.readline())
                assert said[-1], f"dnsmasq has ended: {said}"
            yield port
        finally:
            process.kill()


def closed_port() -> int:
    """A TCP and UDP port that nobody on this host listens on, and that the kernel gives to nobody by itself.

    It lies below `ip_local_port_range`, whose ports any socket of any test may be given at any moment; each
    worker of pytest-xdist has ports of its own.
    """
    lowest_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    mine = range(10_000 + worker, lowest_given, workers)
    for _ in range(1000):
        port = random.SystemRandom().choice(mine)
        with socket.socket() as stream, socket.socket(type=socket.SOCK_DGRAM) as datagram, suppress(OSError):
            stream.bind(("", port))
            datagram.bind(("", port))
            return port
    raise AssertionError("no port is free")


def own_ports() -> int:
    """The first of 200 ports that no other worker of pytest-xdist uses, nor `closed_port`, nor the kernel."""
    return 7_100 + 200 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])


def port_of(sock: socket.socket) -> int:
    """The port that `sock` is bound to."""
    port: int = sock.getsockname()[1]
    return port


def sent_again(sock: socket.socket) -> int:
    """Return how many segments this socket's kernel has sent again (`tcpi_total_retrans`, linux/tcp.h).

    0 after a connect has ended means that the first SYN was answered, before the kernel sent another.
    """
    [count] = struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 100)
    return int(count)


def host_address() -> str | None:
    """An address of the host's own that is not its loopback's; None on a machine without network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return None
        address: str = sock.getsockname()[0]
    return None if address.startswith("127.") else address
