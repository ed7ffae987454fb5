"""Endpoints in this process, with programs in a namespace, on each driver."""

from __future__ import annotations

import errno
import socket
import sys

import anyio
import pytest

from netns_kit import FlowAttribute, GuestDatagrams, GuestStream, Network
from netns_kit.gateway.setup import DriverName
from tests.support import needs_tun
from tests.support.connections import accepted
from tests.support.drivers import driver, net
from tests.support.servers import bounded
from tests.support.waiting import eventually

__all__ = ["driver", "net"]  # fixtures

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

METADATA = "169.254.169.254"
GET = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode())
"""
RESET = """
import socket, struct, sys
client = socket.create_connection(("169.254.169.254", 80))
client.recv(1)
client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
"""


async def answer(stream: GuestStream) -> None:
    request = b""
    while b"\r\n\r\n" not in request:
        request += await stream.receive()
    path = request.split()[1]
    body = b"%s for %s" % (path, str(stream.extra(FlowAttribute.remote).address).encode())
    await stream.send(
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )


async def echo(stream: GuestStream) -> None:
    async for data in stream:
        await stream.send(data)


@bounded
async def test_a_program_inside_has_its_answer_from_here(net: Network) -> None:
    async with await net.stack.serve_tcp(METADATA, 80, answer), await net.stack.serve_tcp(None, 81, answer):
        for url in (f"http://{METADATA}/id", "http://10.0.2.2:81/id", "http://192.0.2.1:81/id"):
            done = await net.run([sys.executable, "-c", GET, url], stdout=-1)
            assert done.stdout == b"/id for 10.0.2.100\n"


@bounded
async def test_a_neighbour_that_is_served_is_found(net: Network) -> None:
    """The kernel inside asks who on the link has the address."""
    async with await net.stack.serve_tcp("10.0.2.77", 80, answer):
        done = await net.run([sys.executable, "-c", GET, "http://10.0.2.77/"], stdout=-1)
        assert done.stdout == b"/ for 10.0.2.100\n"


@bounded
async def test_a_reset_by_a_program_inside(net: Network) -> None:
    seen: list[type[BaseException]] = []
    done = anyio.Event()

    async def handler(stream: GuestStream) -> None:
        await stream.send(b".")
        try:
            await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
            seen.append(type(error))
        done.set()

    async with await net.stack.serve_tcp(METADATA, 80, handler):
        await net.run([sys.executable, "-c", RESET])
        await done.wait()
    assert seen == [anyio.BrokenResourceError]


@bounded
async def test_datagrams_are_answered_and_a_flow_ends_with_its_handler(net: Network) -> None:
    async def handler(stream: GuestDatagrams) -> None:
        async for data in stream:
            await stream.send(data[::-1])
            if data == b"last":
                return

    async with await net.stack.serve_udp(METADATA, 123, handler):
        with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.connect((METADATA, 123))
            for said in (b"abc", b"", b"x" * 65507, b"last", b"again"):
                if said == b"again":  # a datagram of the old flow would be lost
                    await eventually(net.stack.flows, ())
                client.send(said)
                await anyio.wait_readable(client)
                assert client.recv(65536) == said[::-1]
            [flow] = await net.stack.flows()
            assert flow.protocol == "udp"
        server = await net.stack.serve_udp(None, 123, handler)
        await server.aclose()
    await eventually(net.stack.flows, ())


@bounded
async def test_the_end_of_a_flow_is_that_of_its_stream(net: Network) -> None:
    ended = anyio.Event()

    async def handler(stream: GuestDatagrams) -> None:
        async for data in stream:
            await stream.send(data)
        ended.set()

    async with await net.stack.serve_udp(METADATA, 123, handler):
        with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.sendto(b".", (METADATA, 123))
            await anyio.wait_readable(client)
            [flow] = await net.stack.flows()
            await net.stack.end_flow(flow.id)
            await ended.wait()


@bounded
async def test_a_server_inside_is_reached_from_here(net: Network) -> None:
    with await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setblocking(False)
        listener.bind(("0.0.0.0", 8080))
        listener.listen()
        async with await net.stack.connect_tcp(None, 8080, source="192.0.2.7") as client:
            await anyio.wait_readable(listener)
            sock, peer = listener.accept()
            with sock:
                assert peer[0] == "192.0.2.7"
                sock.sendall(b"hello")
                assert await client.receive() == b"hello"
                await client.send_eof()
                await anyio.wait_readable(sock)
                assert sock.recv(1) == b""
        [*_] = await net.stack.flows()
    with pytest.raises(ConnectionRefusedError) as refused:
        await net.stack.connect_tcp(None, 8080)
    assert refused.value.errno == errno.ECONNREFUSED


@bounded
async def test_ipv6(driver: DriverName) -> None:
    needs_tun()
    async with (
        Network(driver=driver, ipv6=True) as net,
        await net.stack.serve_tcp("2001:db8::80", 80, answer),
    ):
        done = await net.run([sys.executable, "-c", GET, "http://[2001:db8::80]/"], stdout=-1)
        assert done.stdout == b"/ for fd00::100\n"


@bounded
async def test_each_of_several_workers_has_its_flows_served() -> None:
    needs_tun()
    async with Network(driver="worker", queues=2) as net, await net.stack.serve_tcp(METADATA, 80, echo):
        streams = [await net.namespace.connect_tcp(METADATA, 80) for _ in range(16)]
        for number, stream in enumerate(streams):
            await stream.send(b"%d" % number)
            assert await stream.receive() == b"%d" % number
        assert {flow.id % 2 for flow in await net.stack.flows()} == {0, 1}
        for stream in streams:
            await stream.aclose()
        with await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind(("0.0.0.0", 8080))
            listener.listen()
            for _ in range(8):
                async with await net.stack.connect_tcp(net.stack.subnet.guest, 8080):
                    (await accepted(listener)).close()
