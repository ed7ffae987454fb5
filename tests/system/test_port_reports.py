"""What users of other programs have reported of published ports, tried in each mode.

The reports are public: rootlesskit 156, 220 and 536, podman 5648 and 23737, moby 8795, gvisor-tap-vsock 441.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import get_args

import anyio
import anyio.to_thread
import pytest

from benchmarks.processes import Child, child, line
from netns_kit import Network, PortForward
from netns_kit.forwarder.ports import Mode
from tests.support import ROOT, needs_tun
from tests.support.servers import SECONDS, bounded, closed_port

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

LOOPBACK = "127.0.0.1"
MODES = [mode for mode in get_args(Mode) if mode != "fd"]  # there the port is the server's own

SERVER = """
import socket, threading

def serve(sock):
    with sock:
        while data := sock.recv(1000):
            sock.sendall(data)

def answer(sock):
    while True:
        data, client = sock.recvfrom(1000)
        sock.sendto(data, client)

names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
names.bind(("0.0.0.0", 53))
threading.Thread(target=answer, args=(names,), daemon=True).start()
server = socket.create_server(("0.0.0.0", 80), backlog=500)
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
PUBLISHER = """
import resource, sys
import anyio
from netns_kit import Network

async def main():
    limit = int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    async with Network(driver=sys.argv[4]) as net:
        await net.forwarder.add(sys.argv[1], mode=sys.argv[2])
        async with await net.popen([sys.executable, "-c", sys.argv[5]], stdout=None):
            await anyio.wait_readable(sys.stdin)

anyio.run(main)
"""


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    needs_tun()
    mode: Mode = request.param
    return mode


@asynccontextmanager
async def serving(net: Network) -> AsyncIterator[None]:
    async with await net.popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert await process.stdout.receive() == b"ready\n"
        yield


@contextmanager
def publisher(mode: Mode, port: int, *, limit: int = 1000, driver: str = "thread") -> Iterator[Child]:
    """A process of its own that publishes a port and serves it."""
    words = [f"{LOOPBACK}:{port}:80", mode, str(limit), driver, SERVER]
    with child(sys.executable, "-c", PUBLISHER, *words, cwd=ROOT) as process:
        assert line(process, SECONDS) == "ready"
        yield process


def exchange(port: int, seconds: float = SECONDS) -> bytes:
    with socket.create_connection((LOOPBACK, port), seconds) as sock:
        sock.sendall(b"hello")
        return sock.recv(10)


async def published(net: Network, mode: Mode, port: int = 0, protocol: str = "tcp") -> PortForward:
    (forward,) = await net.forwarder.add(
        f"{LOOPBACK}:{port}:{80 if protocol == 'tcp' else 53}/{protocol}", mode=mode
    )
    return forward


@bounded
async def test_connections_leave_no_descriptor(mode: Mode) -> None:
    """rootlesskit 156: two more with each connection."""
    async with Network() as net, serving(net):
        port = (await published(net, mode)).host_port
        counts = []
        for count in (40, 200):
            for _ in range(count):
                assert await anyio.to_thread.run_sync(exchange, port) == b"hello"
            counts.append(len(os.listdir("/proc/self/fd")))
        assert counts[1] < counts[0] + 100, counts  # what is kept for the next ones is bounded


@bounded
async def test_who_comes_before_the_server_spoils_nothing(mode: Mode) -> None:
    """podman 5648: once refused, a port was refused for ever."""
    async with Network() as net:
        port = (await published(net, mode)).host_port
        for _ in range(5):
            with suppress(ConnectionError):
                assert await anyio.to_thread.run_sync(exchange, port) == b""
        async with serving(net):
            assert await anyio.to_thread.run_sync(exchange, port) == b"hello"
        with suppress(ConnectionError):
            assert await anyio.to_thread.run_sync(exchange, port) == b""
        async with serving(net):
            assert await anyio.to_thread.run_sync(exchange, port) == b"hello"


@bounded
async def test_a_udp_client_goes_on_when_its_server_or_its_port_has_been_away(mode: Mode) -> None:
    """moby 8795: from the port that it had before, a client was not heard for minutes."""

    def ask(sock: socket.socket, port: int) -> bytes:
        for _ in range(40):  # no answer while the server is away
            with suppress(OSError):
                sock.sendto(b"?", (LOOPBACK, port))
                return sock.recv(10)
        return b""

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.2)
        sock.bind((LOOPBACK, 0))
        async with Network() as net:
            forward = await published(net, mode, protocol="udp")
            for _ in range(2):
                async with serving(net):
                    assert await anyio.to_thread.run_sync(ask, sock, forward.host_port) == b"?"
            async with serving(net):
                await net.forwarder.remove(forward)
                assert await net.forwarder.add(forward) == (forward,)
                assert await anyio.to_thread.run_sync(ask, sock, forward.host_port) == b"?"
        async with Network() as net, serving(net):  # all of it anew
            assert await net.forwarder.add(forward) == (forward,)
            assert await anyio.to_thread.run_sync(ask, sock, forward.host_port) == b"?"


@bounded
async def test_a_network_can_be_opened_again_at_once(mode: Mode) -> None:
    """podman 23737: with a connection open, the port was in use; and the old connection ends, it does not hang."""
    port = closed_port()
    with ExitStack() as stack:
        for _ in range(3):
            async with Network() as net, serving(net):
                await published(net, mode, port)
                sock = stack.enter_context(socket.create_connection((LOOPBACK, port), SECONDS))
                sock.sendall(b"hello")
                assert await anyio.to_thread.run_sync(sock.recv, 10) == b"hello"
            with suppress(ConnectionError):
                assert await anyio.to_thread.run_sync(sock.recv, 10) == b""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("driver", ["thread", "worker"])
@bounded
async def test_whoever_is_killed_leaves_its_port(mode: Mode, driver: str) -> None:
    """rootlesskit 220: what was left of it was in the way of the next."""
    port = closed_port()
    for _ in range(2):
        with publisher(mode, port, driver=driver) as process:
            assert await anyio.to_thread.run_sync(exchange, port) == b"hello"
            process.send_signal(signal.SIGKILL)
            process.wait(SECONDS)
            while True:  # the worker ends when it sees that we have ended
                try:
                    with socket.create_server((LOOPBACK, port)):
                        break
                except OSError:
                    await anyio.sleep(0.01)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@bounded
async def test_more_clients_than_descriptors_are_served_when_there_are_some_again(mode: Mode) -> None:
    """rootlesskit 536: accept4: too many open files, and nobody was let in any more."""
    port = closed_port()
    with publisher(mode, port, limit=120), ExitStack() as clients:
        socks = [clients.enter_context(socket.socket()) for _ in range(150)]
        for sock in socks:
            sock.setblocking(False)
            sock.connect_ex((LOOPBACK, port))
        assert await anyio.to_thread.run_sync(_is_one_served, socks)
        clients.close()
        while True:
            with suppress(OSError):
                if await anyio.to_thread.run_sync(exchange, port, 2.0) == b"hello":
                    break


def _is_one_served(clients: list[socket.socket]) -> bool:
    """Send from each; return whether one has an answer."""
    for sock in clients:
        with suppress(OSError):
            sock.sendall(b"x")
    while waiting := select.select(clients, [], [], SECONDS)[0]:
        for sock in waiting:
            with suppress(OSError):
                if sock.recv(1) == b"x":
                    return True
            clients.remove(sock)  # it was reset
    return False
