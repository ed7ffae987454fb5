"""What leaves the namespace, seen from both ends: the guest's kernel and the host's, with the stack between.

The guest's sockets are the namespace's own, opened in there by the agent and used here.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from netns_kit import Network
from netns_kit.gateway.setup import DriverName
from tests.support import missing, needs
from tests.support.connections import every_driver
from tests.support.servers import (
    bounded,
    closed_port,
    echo,
    host_address,
    send_back,
    tcp_server,
    udp_server,
)
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks"), every_driver]

UDP_SEGMENT = 103  # linux/udp.h
GATEWAY = "10.0.2.2"


@asynccontextmanager
async def udp(net: Network) -> AsyncIterator[socket.socket]:
    with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("10.0.2.100", 0))
        yield sock


async def answer(sock: socket.socket) -> bytes:
    await anyio.wait_readable(sock)
    return sock.recv(1 << 16)


async def rest(stream: anyio.abc.ByteReceiveStream) -> bytes:
    """All that comes, until the other end has said its last."""
    chunks = []
    while True:
        try:
            chunks.append(await stream.receive(1 << 18))
        except anyio.EndOfStream:
            return b"".join(chunks)


# -- TCP ----------------------------------------------------------------------------------------------


@bounded
async def test_bytes_arrive_as_they_were_sent(net: Network) -> None:
    data = os.urandom(5 << 20)
    with tcp_server(echo) as port:
        async with (
            await net.namespace.connect_tcp(GATEWAY, port) as stream,
            anyio.create_task_group() as tasks,
        ):

            async def send() -> None:
                await stream.send(data)
                await stream.send_eof()

            tasks.start_soon(send)
            assert await rest(stream) == data


@bounded
async def test_other_tasks_have_their_turns_under_load(
    net: Network, driver: DriverName, record_property: Any
) -> None:
    with ExitStack() as stack:
        port = stack.enter_context(tcp_server(_flood))

        async def load() -> None:
            async with await net.namespace.connect_tcp(GATEWAY, port) as stream:
                while True:
                    await stream.receive(1 << 18)

        async def turns() -> float:
            start = anyio.current_time()
            for _ in range(100):
                await anyio.sleep(0.002)
            return anyio.current_time() - start

        async with anyio.create_task_group() as tasks:
            quiet = await turns()
            for _ in range(4):
                tasks.start_soon(load)
            slower = await turns() / quiet
            tasks.cancel_scope.cancel()
    record_property("slower", round(slower, 1))
    assert slower < 50


def _flood(sock: socket.socket) -> None:
    block = bytes(1 << 18)
    while True:
        sock.sendall(block)


@bounded
async def test_many_short_connections(net: Network) -> None:
    with tcp_server(echo) as port:

        async def one() -> None:
            for _ in range(20):
                async with await net.namespace.connect_tcp(GATEWAY, port) as stream:
                    await stream.send(b"x")
                    assert await stream.receive() == b"x"

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(one)
    await eventually(net.stack.flows, ())  # the last FIN is on its way


# -- UDP ----------------------------------------------------------------------------------------------


@bounded
async def test_super_datagrams_are_cut_as_the_program_said(net: Network) -> None:
    received: list[bytes] = []

    def note(sock: socket.socket, payload: bytes, sender: tuple[str, int]) -> None:
        received.append(payload)
        if len(payload) < 1000:
            sock.sendto(b"done", sender)

    payload = os.urandom(20_500)
    with udp_server(note) as port:
        async with udp(net) as sock:
            sock.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1000)
            sock.sendto(payload, (GATEWAY, port))
            assert await answer(sock) == b"done"
    assert [len(part) for part in received] == [1000] * 20 + [500]
    assert b"".join(received) == payload


@bounded
async def test_nobody_at_the_other_end_is_told(net: Network) -> None:
    """ECONNREFUSED, as without us; and the other flows of the same socket go on."""
    with udp_server() as port:
        async with udp(net) as sock:
            sock.sendto(b"x", (GATEWAY, port))
            assert await answer(sock) == b"x"
            sock.connect((GATEWAY, closed_port()))
            sock.send(b"x")
            with pytest.raises(ConnectionRefusedError):
                await answer(sock)
            sock.connect((GATEWAY, port))
            for _ in range(3):
                sock.send(b"still there")
                assert await answer(sock) == b"still there"


# -- what never reaches the host ----------------------------------------------------------------------


@bounded
async def test_addresses_that_would_mean_the_host(net: Network) -> None:
    """A root of the namespace can make its kernel send them to us."""
    needs("ip")
    await net.run(
        "set -e; ip address del 127.0.0.1/8 dev lo; ip route add 127.0.0.0/8 via 10.0.2.2 src 10.0.2.100"
    )
    await net.namespace.set_sysctl("net.ipv4.conf.all.route_localnet", 1)
    reached: list[object] = []
    with (
        tcp_server(reached.append, ("0.0.0.0", 0)) as port,
        udp_server(lambda *what: reached.append(what), ("0.0.0.0", port)),
        udp_server() as known,
    ):
        for address in ("127.1.2.3", "240.0.0.1", "255.255.255.254"):
            received = (await net.stack.stats())["tap_received"]
            with await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
                assert sock.connect_ex((address, port)) == errno.EINPROGRESS
                async with udp(net) as other:
                    other.sendto(b"x", (address, port))
                    other.sendto(b"the last to be sent", (GATEWAY, known))
                    assert await answer(other) == b"the last to be sent"
                assert (await net.stack.stats())["tap_received"] >= received + 3, "it has come to us"
                if address.startswith("127."):
                    assert sock.connect_ex((address, port)) == errno.EHOSTUNREACH, "and is answered"
    assert reached == []


@bounded
async def test_the_hosts_own_address_is_like_any_other(net: Network) -> None:
    address = host_address()
    if address is None:
        missing("no address but the loopback's")
        return
    with tcp_server(echo, (address, 0)) as port, udp_server(send_back, (address, port)):
        async with await net.namespace.connect_tcp(address, port) as stream, udp(net) as sock:
            await stream.send(b"x")
            assert await stream.receive() == b"x"
            sock.sendto(b"x", (address, port))
            assert await answer(sock) == b"x"
