"""Both ends of a connection in one hand: what one does and what the other makes of it stand side by side.

The guest is the namespace's kernel, the host this machine's loopback, and a test holds a socket of each.
tests/support/wire.py shows what passes between them.
"""

from __future__ import annotations

import errno
import resource
import select
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import NamedTuple

import anyio
import anyio.to_thread
import pytest

from netns_kit import Limits, Namespace, Network, Uplink
from netns_kit.arguments import Address
from netns_kit.gateway.setup import DriverName
from netns_kit.host import sysctl
from netns_kit.stack.user import Transport
from tests.support import needs_tun
from tests.support.servers import sent_again

__all__ = ["driver", "every_descriptor", "net"]  # fixtures

GATEWAY, GUEST, TAP = "10.0.2.2", "10.0.2.100", "tap0"
RESERVE = 512  # descriptors that are not for connections
PATIENCE = 10  # seconds, for what should be there at once

once = pytest.mark.parametrize("anyio_backend", ["asyncio"])
"""For tests that take their time: what they are about does not depend on the event loop."""


@pytest.fixture
def driver(anyio_backend_name: str) -> DriverName:
    """Both drivers and both event loops, not every pair of them."""
    needs_tun()
    return "thread" if anyio_backend_name == "asyncio" else "loop"


every_driver = pytest.mark.parametrize(
    ("anyio_backend", "driver"), [("asyncio", "thread"), ("trio", "loop"), ("asyncio", "worker")]
)
"""For tests of what each driver must be able to do: a worker may make few system calls."""


def network(driver: DriverName, uplink: Uplink | None = None, limits: Limits | None = None) -> Network:
    return Network(uplink=uplink or Uplink(allow_host_loopback=True), driver=driver, limits=limits)


@pytest.fixture
async def net(leaks: None, driver: DriverName) -> AsyncIterator[Network]:
    needs_tun()
    async with network(driver) as net:
        yield net


@pytest.fixture
def every_descriptor() -> Iterator[int]:
    """The process may have as many descriptors as it may at all; how many that leaves to a test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard - RESERVE
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def kernel_buffers() -> int:
    """Bytes that the kernel may hold of two connections whose reader does not read (tcp(7), tcp_rmem and tcp_wmem).

    How far a receive buffer grows depends on how full the segments are, so the largest size is the bound.
    """
    return 2 * (sysctl.numbers("net.ipv4.tcp_rmem")[2] + sysctl.numbers("net.ipv4.tcp_wmem")[2])


class Recording(Uplink):
    """Lets everything out, and remembers the sockets of the host's side in the order they were made."""

    def __init__(self) -> None:
        super().__init__(allow_host_loopback=True)
        self.opened: list[socket.socket] = []

    def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
        sock = super().open(protocol, target, port)
        self.opened.append(sock)
        return sock


# -- connections --------------------------------------------------------------------------------------


async def tcp_socket(namespace: Namespace) -> socket.socket:
    return await namespace.socket(socket.AF_INET, socket.SOCK_STREAM)


async def dial(
    namespace: Namespace, port: int, host: str = GATEWAY, *, source: int | None = None
) -> socket.socket:
    """A socket of the guest that is connecting."""
    sock = await tcp_socket(namespace)
    try:
        if source is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((GUEST, source))
        assert sock.connect_ex((host, port)) == errno.EINPROGRESS
    except BaseException:
        sock.close()
        raise
    return sock


async def outcome(sock: socket.socket) -> int:
    """The errno that connecting ends with; 0: it is connected."""
    await anyio.wait_writable(sock)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


async def accepted(listener: socket.socket) -> socket.socket:
    listener.setblocking(False)
    await anyio.wait_readable(listener)
    sock, _ = listener.accept()
    sock.setblocking(False)
    return sock


@contextmanager
def listening(backlog: int = 512) -> Iterator[tuple[socket.socket, int]]:
    """A listener of the host, and its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as listener:
        yield listener, listener.getsockname()[1]


@asynccontextmanager
async def pair(
    namespace: Namespace, host: str = GATEWAY
) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """A connection: the guest's end and the host's."""
    with listening() as (listener, port), await dial(namespace, port, host) as guest:
        assert await outcome(guest) == 0
        with await accepted(listener) as ours:
            yield guest, ours


@asynccontextmanager
async def inbound(net: Network) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """A connection through a forwarded port: the guest's end and the host's."""
    [forward] = await net.forwarder.add("127.0.0.1:0:80")
    with await tcp_socket(net.namespace) as listener, socket.socket() as ours:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((GUEST, 80))
        listener.listen()
        ours.setblocking(False)
        ours.connect_ex(("127.0.0.1", forward.host_port))
        with await accepted(listener) as guest:
            yield guest, ours


@contextmanager
def stuck() -> Iterator[tuple[socket.socket, int]]:
    """A listener of the host that lets nobody in, and its port: its queue is full.

    Who connects hangs in there, repeating the SYN, until somebody has been accepted.
    """
    with ExitStack() as stack:
        listener, port = stack.enter_context(listening(backlog=0))
        filler = stack.enter_context(socket.socket())
        filler.connect(("127.0.0.1", port))
        yield listener, port


async def send(sock: socket.socket, data: bytes) -> None:
    left = memoryview(data)
    while left:
        await anyio.wait_writable(sock)
        left = left[sock.send(left) :]


async def receive(sock: socket.socket, most: int = 1 << 18) -> bytes:
    """What there is, as soon as there is something; nothing at the end."""
    while True:
        await anyio.wait_readable(sock)
        try:
            return sock.recv(most)
        except BlockingIOError:
            continue


async def exactly(sock: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        data = await receive(sock, size - len(received))
        assert data, f"it ends after {len(received)} of {size} bytes"
        received += data
    return bytes(received)


async def rest(sock: socket.socket) -> bytes:
    """All that comes until the end."""
    received = bytearray()
    while data := await receive(sock):
        received += data
    return bytes(received)


async def echoes(near: socket.socket, far: socket.socket, data: bytes = b"still there") -> None:
    """What one end says the other hears, and the other way round."""
    await send(near, data)
    assert await exactly(far, len(data)) == data
    await send(far, data)
    assert await exactly(near, len(data)) == data


async def failure(sock: socket.socket) -> int:
    """The errno that reading ends with, all data before it thrown away; 0: an orderly end."""
    try:
        await rest(sock)
    except OSError as error:
        return error.errno or -1
    return 0


async def polled(sock: socket.socket, events: int) -> None:
    """Wait for what an event loop cannot wait for: POLLPRI, say."""
    poll = select.poll()
    poll.register(sock, events)
    assert await anyio.to_thread.run_sync(lambda: poll.poll(PATIENCE * 1000)), "it does not happen"


TCPI_OPT_TIMESTAMPS, TCPI_OPT_SACK, TCPI_OPT_WSCALE = 1, 2, 4  # linux/tcp.h


class TcpInfo(NamedTuple):
    """Of struct tcp_info (linux/tcp.h) what tests look at."""

    probes: int
    options: int
    send_scale: int
    receive_scale: int
    send_mss: int
    receive_mss: int
    retransmitted: int
    send_window: int


def tcp_info(sock: socket.socket) -> TcpInfo:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    probes, options, scales = info[3], info[5], info[6]
    send_mss, receive_mss = struct.unpack_from("=II", info, 16)
    [send_window] = struct.unpack_from("=I", info, 228)
    return TcpInfo(
        probes, options, scales & 15, scales >> 4, send_mss, receive_mss, sent_again(sock), send_window
    )
