"""Reverse forwards: ports and unix sockets inside that lead to the host."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address
from pathlib import Path

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from netns_kit import (
    ArgumentError,
    ArgumentTypeError,
    Endpoint,
    Follow,
    Network,
    NotFound,
    PortInUseError,
    PortSpecError,
    ReverseForward,
    UnixSocket,
)
from netns_kit.gateway.setup import DriverName
from tests.support import needs_ipv6
from tests.support.drivers import driver, net
from tests.support.servers import BLOCK, SECONDS, bounded, closed_port, echo, tcp_server, whole
from tests.support.waiting import eventually

__all__ = ["driver", "net"]  # fixtures

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]


async def said(stream: anyio.abc.ByteStream, data: bytes) -> bytes:
    """Say it and then no more; what comes back until the end."""
    answer = b""

    async def hear() -> None:
        nonlocal answer
        answer = b"".join([each async for each in stream])

    async with stream, anyio.create_task_group() as tasks:
        tasks.start_soon(hear)
        await stream.send(data)
        await stream.send_eof()
    return answer


async def first_said(net: Network, port: int) -> bytes:
    """What a client inside hears that says nothing.  Even its connect may find that it was reset."""
    sock = await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
    with sock:
        sock.connect_ex(("127.0.0.1", port))
        await anyio.wait_readable(sock)
        return sock.recv(100)


@contextmanager
def unix_server(path: str) -> Iterator[None]:
    """An echo at a unix socket of the host."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                sock.settimeout(SECONDS)
                with sock:
                    echo(sock)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(SECONDS)


async def unix_client(net: Network, address: str) -> anyio.abc.SocketStream:
    sock = await net.namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(address)
    return await anyio.abc.SocketStream.from_socket(sock)


@bounded
async def test_one_that_is_cancelled_listens_no_more(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    passing = net.stack.pass_socket

    async def pass_and_cancel(sock: socket.socket) -> int:
        number = await passing(sock)
        scope.cancel()
        return number

    monkeypatch.setattr(net.stack, "pass_socket", pass_and_cancel)
    with anyio.CancelScope() as scope:
        await net.forwarder.reverse("8080", "127.0.0.1:80")
    assert scope.cancelled_caught
    assert net.forwarder.reverses() == ()
    assert await net.namespace.listening() == ()


@bounded
async def test_a_port_inside_leads_to_a_port_of_the_host(net: Network) -> None:
    """Whatever the uplink allows: the host's loopback is closed here."""
    with tcp_server(echo) as port:
        forward = await net.forwarder.reverse("0", f"127.0.0.1:{port}")
        assert forward == ReverseForward("tcp", "127.0.0.1", forward.inside_port, "127.0.0.1", port)
        assert net.forwarder.reverses() == (forward,)
        data = BLOCK * 2
        assert await said(await net.namespace.connect_tcp("127.0.0.1", forward.inside_port), data) == data


@bounded
async def test_ipv6_leads_to_ipv4_and_back(net: Network) -> None:
    needs_ipv6()
    with tcp_server(echo) as port, tcp_server(echo, ("::1", 0)) as port6:
        for inside, to in (("[::1]:0", f"127.0.0.1:{port}"), ("127.0.0.1:0", f"[::1]:{port6}")):
            forward = await net.forwarder.reverse(inside, to)
            address = inside.rpartition(":")[0].strip("[]")
            stream = await net.namespace.connect_tcp(address, forward.inside_port)
            assert await said(stream, b"hello") == b"hello"


@bounded
async def test_where_nobody_listens_the_client_is_reset(net: Network) -> None:
    forward = await net.forwarder.reverse("0", f"127.0.0.1:{closed_port()}")
    with pytest.raises(ConnectionResetError):
        await first_said(net, forward.inside_port)


@bounded
async def test_a_reset_is_carried(net: Network) -> None:
    got = threading.Event()

    def serve(sock: socket.socket) -> None:
        try:
            whole(sock)
        except ConnectionResetError:
            got.set()

    with tcp_server(serve) as port:
        forward = await net.forwarder.reverse("0", f"127.0.0.1:{port}")
        sock = await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
        with sock:
            sock.connect_ex(("127.0.0.1", forward.inside_port))
            await anyio.wait_writable(sock)
            sock.send(b"hello")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        assert await anyio.to_thread.run_sync(got.wait, SECONDS)


@bounded
async def test_datagrams_and_their_answers(net: Network) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        forward = await net.forwarder.reverse("0", f"127.0.0.1:{server.getsockname()[1]}", protocol="udp")
        clients = [await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
        for number, client in enumerate(clients):
            with client:
                client.connect(("127.0.0.1", forward.inside_port))
                client.send(b"from %d" % number)
                await anyio.wait_readable(server)
                data, address = server.recvfrom(100)
                assert data == b"from %d" % number
                server.sendto(b"to %d" % number, address)
                await anyio.wait_readable(client)
                assert client.recv(100) == b"to %d" % number


@bounded
async def test_unix_sockets_inside_and_outside(net: Network, tmp_path: Path) -> None:
    path = f"{tmp_path}/server"
    with unix_server(path), tcp_server(echo) as port:
        for inside, to in (
            ("unix:@netns-kit", f"127.0.0.1:{port}"),
            ("unix:@netns-kit-too", f"unix:{path}"),
            (f"unix:{tmp_path}/inside", f"unix:{path}"),
        ):
            forward = await net.forwarder.reverse(inside, to)
            assert isinstance(forward.inside, UnixSocket)
            assert await said(await unix_client(net, forward.inside.address), b"hello") == b"hello"
        assert stat.S_IMODE(os.stat(f"{tmp_path}/inside").st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as outside, pytest.raises(ConnectionRefusedError):
            outside.connect("\0netns-kit")
        with pytest.raises(PortInUseError, match="unix:@netns-kit is taken"):
            await net.forwarder.reverse(UnixSocket("@netns-kit"), Endpoint("127.0.0.1", port))
        for forward in net.forwarder.reverses():
            await net.forwarder.remove(forward)
        assert os.listdir(tmp_path) == ["server"]


@bounded
async def test_a_port_inside_leads_to_a_unix_socket(net: Network, tmp_path: Path) -> None:
    with unix_server(f"{tmp_path}/server"):
        forward = await net.forwarder.reverse("127.0.0.1:0", UnixSocket(f"{tmp_path}/server"))
        stream = await net.namespace.connect_tcp("127.0.0.1", forward.inside_port)
        assert await said(stream, BLOCK) == BLOCK
    with suppress(ConnectionResetError):
        assert await first_said(net, forward.inside_port) == b""  # a worker's is served on the event loop


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
@bounded
async def test_a_port_inside_leads_to_python_code(
    net: Network, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(stream: anyio.abc.SocketStream) -> None:
        data = await stream.receive()
        if data == b"fail":
            raise error  # a bug in the handler, or the end of a task that it has waited for
        await stream.send(data.upper())

    forward = await net.forwarder.reverse("80", serve)
    assert str(forward) == "127.0.0.1:80 inside -> a handler/tcp"
    for _ in range(3):
        assert await said(await net.namespace.connect_tcp("127.0.0.1", 80), b"hello") == b"HELLO"
    assert await said(await net.namespace.connect_tcp("127.0.0.1", 80), b"fail") == b""
    await eventually(lambda: [each.exc_info[0] for each in caplog.records if each.exc_info], [error])
    assert await said(await net.namespace.connect_tcp("127.0.0.1", 80), b"again") == b"AGAIN"


@pytest.mark.parametrize("cut", [False, True])
@bounded
async def test_removing_frees_the_port_and_cuts_if_that_is_wanted(net: Network, cut: bool) -> None:
    async def serve(stream: anyio.abc.SocketStream) -> None:
        async for data in stream:
            await stream.send(data)

    with tcp_server(echo) as port:
        for to in (f"127.0.0.1:{port}", serve):
            forward = await net.forwarder.reverse("127.0.0.1:99", to)
            async with await net.namespace.connect_tcp("127.0.0.1", 99) as stream:
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
                await net.forwarder.remove(forward, cut=cut)
                async with await net.namespace.listen_tcp("127.0.0.1", 99):
                    pass
                if cut:
                    with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                        await stream.receive()
                else:
                    await stream.send(b"still here")
                    assert await stream.receive() == b"still here"
            with pytest.raises(NotFound, match="inside"):
                await net.forwarder.remove(forward)
        assert net.forwarder.reverses() == ()


@bounded
async def test_what_leads_out_is_not_followed_in(net: Network) -> None:
    """As pasta forwards a port that it has bound itself."""
    with tcp_server(echo) as port:
        await net.forwarder.reverse(f"127.0.0.1:{port}", f"127.0.0.1:{port}")
        await net.forwarder.reverse("0.0.0.0:0", f"127.0.0.1:{port}")
        assert await net.forwarder.add(Follow("tcp", "127.0.0.2")) == ()
        assert len(await net.namespace.listening()) == 2


@bounded
async def test_it_is_a_flow_among_others(net: Network) -> None:
    def serve(sock: socket.socket) -> None:
        sock.sendall(b"to you")
        whole(sock)

    with tcp_server(serve) as port:
        forward = await net.forwarder.reverse("0", f"127.0.0.1:{port}")
        async with await net.namespace.connect_tcp("127.0.0.1", forward.inside_port) as stream:
            assert await stream.receive() == b"to you"
            await stream.send(b"hello")
            (flow,) = await net.stack.flows()
            while flow.bytes_from_guest < 5:
                await anyio.lowlevel.checkpoint()
                (flow,) = await net.stack.flows()
            assert (flow.direction, flow.state) == ("outbound", "established")
            assert flow.guest == Endpoint("127.0.0.1", stream.extra(anyio.abc.SocketAttribute.local_port))
            assert flow.remote == Endpoint("127.0.0.1", forward.inside_port)
            assert flow.host is not None
            assert flow.host.address == IPv4Address("127.0.0.1")
            assert (flow.bytes_from_guest, flow.bytes_to_guest) == (5, 6)
            assert await net.stack.end_flow(flow.id)
            with pytest.raises(anyio.BrokenResourceError):
                await stream.receive()
        assert await net.stack.flows() == ()


@bounded
async def test_all_ends_with_the_network(driver: DriverName, tmp_path: Path) -> None:
    async def serve(stream: anyio.abc.SocketStream) -> None:
        await anyio.sleep_forever()

    async with Network(driver=driver) as net:
        await net.forwarder.reverse(f"unix:{tmp_path}/one", "127.0.0.1:9")
        await net.forwarder.reverse(f"unix:{tmp_path}/two", serve)
        stream = await unix_client(net, f"{tmp_path}/two")
    async with stream:
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
    assert os.listdir(tmp_path) == []


@bounded
async def test_arguments_that_make_no_sense(net: Network) -> None:
    for arguments, error, said in (
        (
            ("80", 5),
            ArgumentTypeError,
            "to=5: expected text, an Endpoint or a UnixSocket or an async function",
        ),
        (("80", "x"), PortSpecError, "to='x': expected a port"),
        (("unix:relative", "80"), PortSpecError, "inside='unix:relative': expected an absolute path"),
        (
            (ReverseForward("tcp", "127.0.0.1", 80, None),),
            ArgumentError,
            "to=None: expected a function beside",
        ),
        ((ReverseForward("tcp", "127.0.0.1", 80, "::1", 80), "80"), ArgumentError, "to='80': expected"),
    ):
        with pytest.raises(error, match=said):
            await net.forwarder.reverse(*arguments)
    with pytest.raises(PortSpecError, match="protocol='udp': expected tcp"):
        await net.forwarder.reverse("unix:@x", "80", protocol="udp")
    async with await net.namespace.listen_tcp("127.0.0.1", 80):
        with pytest.raises(PortInUseError, match="port 80/tcp in the namespace is taken by"):
            await net.forwarder.reverse("80", "80")
    assert net.forwarder.reverses() == ()
