"""What leaves the namespace, seen from both ends: the guest's kernel and the host's, with the stack between.

The guest's sockets are the namespace's own, opened in there by the agent and used here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from netns_kit import Network, Uplink
from netns_kit.userstack.drivers import DriverName
from tests.support import missing, needs, needs_tun
from tests.support.servers import (
    SECONDS,
    Hearing,
    bounded,
    closed_port,
    content,
    digest,
    echo,
    host_address,
    reset,
    send_back,
    tcp_server,
    udp_server,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

UDP_SEGMENT = 103  # linux/udp.h
GATEWAY = "10.0.2.2"


@pytest.fixture(params=["thread", "loop", "worker"])
def driver(request: pytest.FixtureRequest) -> DriverName:
    needs_tun()
    driver: DriverName = request.param
    return driver


@pytest.fixture
async def net(leaks: None, driver: DriverName) -> AsyncIterator[Network]:
    async with Network(uplink=Uplink(allow_host_loopback=True), driver=driver) as net:
        yield net


@asynccontextmanager
async def udp(net: Network, *, port: int = 0) -> AsyncIterator[socket.socket]:
    with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("10.0.2.100", port))
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


async def send(sock: socket.socket, left: list[memoryview]) -> None:
    """Send what is left; cancelled, `left` says what still is."""
    while left[0]:
        await anyio.wait_writable(sock)
        left[0] = left[0][sock.send(left[0]) :]


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
async def test_the_guest_has_said_its_last_first(net: Network) -> None:
    hearing = Hearing(last=b"the answer" * 100_000)
    with tcp_server(hearing) as port:
        async with await net.namespace.connect_tcp(GATEWAY, port) as stream:
            await stream.send(b"the question" * 100_000)
            await stream.send_eof()
            assert await rest(stream) == b"the answer" * 100_000
            assert await hearing.heard() == b"the question" * 100_000


@bounded
async def test_the_host_has_said_its_last_first(net: Network) -> None:
    hearing = Hearing(first=b"the banner" * 100_000)
    with tcp_server(hearing) as port:
        async with await net.namespace.connect_tcp(GATEWAY, port) as stream:
            assert await rest(stream) == b"the banner" * 100_000
            await stream.send(b"the reply" * 100_000)
            await stream.send_eof()
            assert await hearing.heard() == b"the reply" * 100_000


@bounded
async def test_the_hosts_reset_reaches_the_guest(net: Network) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(1)
        reset(sock)

    with tcp_server(serve) as port:
        async with await net.namespace.connect_tcp(GATEWAY, port) as stream:
            await stream.send(b"x")
            with pytest.raises(anyio.BrokenResourceError) as caught:
                await stream.receive()
            assert isinstance(caught.value.__cause__, ConnectionResetError)


@bounded
async def test_the_guests_reset_reaches_the_host(net: Network) -> None:
    seen: list[BaseException] = []
    done = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.send(b"go")
        try:
            sock.recv(1)
        except ConnectionError as error:
            seen.append(error)
        done.set()

    with tcp_server(serve) as port:
        sock = await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
        assert sock.connect_ex((GATEWAY, port)) == errno.EINPROGRESS
        assert await answer(sock) == b"go"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        await anyio.to_thread.run_sync(done.wait, SECONDS)
    assert [type(error) for error in seen] == [ConnectionResetError]


@bounded
async def test_a_slow_reader_gets_it_all(net: Network, driver: DriverName, anyio_backend_name: str) -> None:
    """Nothing is read for a while that outlasts several retransmission and probe timers of either end."""
    mebibytes, pause = 30, 5.0 if (driver, anyio_backend_name) == ("thread", "asyncio") else 1.0
    sent = threading.Event()

    def serve(sock: socket.socket) -> None:
        for block in content(mebibytes):
            sock.sendall(block)
        sent.set()

    with tcp_server(serve) as port, await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        assert sock.connect_ex((GATEWAY, port)) == errno.EINPROGRESS
        await anyio.wait_readable(sock)
        with anyio.move_on_after(pause):
            await anyio.sleep_forever()
        assert not sent.is_set(), "somebody has taken it all and keeps it"
        sha = hashlib.sha256()
        while data := await answer(sock):
            sha.update(data)
    assert sha.hexdigest() == digest(mebibytes)


@bounded
async def test_a_slow_host_gets_it_all(net: Network) -> None:
    data = b"".join(content(30))
    go = threading.Event()
    hearing = Hearing()

    def serve(sock: socket.socket) -> None:
        go.wait(SECONDS)
        hearing(sock)

    with tcp_server(serve) as port, await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        assert sock.connect_ex((GATEWAY, port)) == errno.EINPROGRESS
        left = [memoryview(data)]
        with anyio.move_on_after(1) as scope:
            await send(sock, left)
        assert scope.cancelled_caught, "nobody has read it, and yet it has gone"
        go.set()
        await send(sock, left)
        sock.shutdown(socket.SHUT_WR)
        assert await hearing.heard() == data


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
    while (await net.stack.stats()).get("tcp_established"):
        await anyio.lowlevel.checkpoint()  # the last FIN is on its way


# -- UDP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1472, 1473, 60_000, 65_507])
@bounded
async def test_datagrams_of_every_size(net: Network, size: int) -> None:
    assert net.tap.mtu == 1500
    payload = os.urandom(size)
    with udp_server() as port:
        async with udp(net) as sock:
            sock.sendto(payload, (GATEWAY, port))
            assert await answer(sock) == payload


@bounded
async def test_the_programs_port_is_the_hosts_too(net: Network) -> None:
    """And one port towards everybody (RFC 4787: endpoint-independent mapping)."""
    seen: list[tuple[str, int]] = []

    def note(sock: socket.socket, payload: bytes, sender: tuple[str, int]) -> None:
        seen.append(sender)
        sock.sendto(payload, sender)

    with udp_server(note) as first, udp_server(note) as second:
        port = closed_port()
        async with udp(net, port=port) as sock:
            for server in (first, second, first):
                sock.sendto(b"x", (GATEWAY, server))
                assert await answer(sock) == b"x"
        assert seen == [("127.0.0.1", port)] * 3
        async with udp(net, port=first) as sock:  # the host's own has that one
            sock.sendto(b"x", (GATEWAY, second))
            assert await answer(sock) == b"x"
        assert seen[-1][1] not in (first, port)


@bounded
async def test_only_who_was_asked_may_answer(net: Network) -> None:
    def strangers_first(sock: socket.socket, payload: bytes, sender: tuple[str, int]) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"from a stranger", sender)
        sock.sendto(b"answer", sender)

    with udp_server(strangers_first) as port:
        async with udp(net) as sock:
            sock.sendto(b"question", (GATEWAY, port))
            assert await answer(sock) == b"answer"
            assert (await net.stack.stats())["dropped_udp_filtered"] == 1
            with pytest.raises(BlockingIOError):
                sock.recv(100)


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


@bounded
async def test_a_port_of_the_dns_address_that_is_none(net: Network) -> None:
    async with udp(net) as sock:
        sock.connect(("10.0.2.3", 54))
        sock.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            await answer(sock)


# -- what never reaches the host ----------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.1.2.3", "240.0.0.1", "255.255.255.254"])
@bounded
async def test_addresses_that_would_mean_the_host(net: Network, address: str) -> None:
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
        await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as sock,
    ):
        received = (await net.stack.stats())["tap_received"]
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
