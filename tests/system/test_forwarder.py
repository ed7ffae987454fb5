"""The forwarder: ports of the host that lead to servers inside, added and removed while all runs."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest

from netns_kit import (
    AddressError,
    Forwarder,
    Network,
    NotFound,
    PortForward,
    PortInUseError,
    PortSpecError,
    PrivilegedPortError,
)
from netns_kit.forwarder.ports import MODES
from netns_kit.gateway.setup import DriverName
from tests.support import ROOT, missing, needs_ipv6
from tests.support.drivers import driver, net
from tests.support.servers import SECONDS, bounded, closed_port, host_address

__all__ = ["driver", "net"]  # fixtures

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.usefixtures("leaks")]

GUEST = "10.0.2.100"


@asynccontextmanager
async def serving(net: Network, port: int = 80) -> AsyncIterator[None]:
    """A server inside that says where its client is, and then what that says."""

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            peer = stream.extra(anyio.abc.SocketAttribute.remote_address)
            try:
                await stream.send(f"{peer[0]} {peer[1]}\n".encode())
                async for data in stream:
                    await stream.send(data)
            except anyio.BrokenResourceError:
                pass  # the client's end of it is what is tested

    async with await net.namespace.listen_tcp(GUEST, port) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        yield
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def client(address: str, port: int, source: str | None = None) -> AsyncIterator[anyio.abc.SocketStream]:
    async with await anyio.connect_tcp(address, port, local_host=source) as stream:
        yield stream


async def peer(stream: anyio.abc.SocketStream) -> tuple[str, int]:
    """Where the server inside says the client is."""
    line = (await stream.receive()).decode()
    assert line.endswith("\n"), line
    host, port = line.split()
    return host, int(port)


def local_port(stream: anyio.abc.SocketStream) -> int:
    port: int = stream.extra(anyio.abc.SocketAttribute.local_port)
    return port


async def answer(sock: socket.socket) -> tuple[bytes, Any]:
    await anyio.wait_readable(sock)
    return sock.recvfrom(1 << 16)


def udp(address: str = "127.0.0.1", port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind((address, port))
    return sock


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


# -- TCP ----------------------------------------------------------------------------------------------


@bounded
async def test_a_client_on_the_hosts_loopback_is_the_gateway(net: Network) -> None:
    (forward,) = await net.forwarder.add("127.0.0.1:0:80")
    async with serving(net), client("127.0.0.1", forward.host_port) as stream:
        assert await peer(stream) == ("10.0.2.2", local_port(stream))
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"


@bounded
async def test_any_other_client_is_itself(net: Network) -> None:
    address = host_address()
    if address is None:
        missing("no address but the loopback's")
        return
    (forward,) = await net.forwarder.add("0.0.0.0:0:80")
    async with serving(net), client(address, forward.host_port) as stream:
        assert await peer(stream) == (address, local_port(stream))
        data = os.urandom(300_000)
        await stream.send(data)
        received = b""
        while len(received) < len(data):
            received += await stream.receive()
        assert received == data


@bounded
async def test_a_range_and_port_zero_report_what_listens(net: Network) -> None:
    (any_port,) = await net.forwarder.add("127.0.0.1:0:80/tcp")
    assert any_port.host_port > 0
    assert await net.forwarder.list() == (any_port,)
    first = _free_range(3)
    added = await net.forwarder.add(f"127.0.0.1:{first}-{first + 2}:80-82")
    assert [(forward.host_port, forward.guest_port) for forward in added] == [
        (first + number, 80 + number) for number in range(3)
    ]
    assert await net.forwarder.list() == (any_port, *added)
    async with serving(net, 81), client("127.0.0.1", first + 1) as stream:
        assert (await peer(stream))[0] == "10.0.2.2"


def _free_range(count: int) -> int:
    """The first of so many ports in a row that nobody has."""
    for first in range(20_000, 30_000, count):
        try:
            for port in range(first, first + count):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    with socket.socket(socket.AF_INET, kind) as sock:
                        sock.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no such range")


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@bounded
async def test_a_range_is_had_whole_or_not_at_all(net: Network, protocol: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    first = _free_range(3)
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", first + 2))
        if protocol == "tcp":
            taken.listen()
        holder = f"127.0.0.1:{first + 2}/{protocol} is taken by this process; choose"
        with pytest.raises(PortInUseError, match=holder) as caught:
            await net.forwarder.add(f"127.0.0.1:{first}-{first + 2}/{protocol}")
        assert caught.value.errno == errno.EADDRINUSE
    assert await net.forwarder.list() == ()
    for port in range(first, first + 3):
        with socket.socket(socket.AF_INET, kind) as free:
            free.bind(("127.0.0.1", port))


@bounded
async def test_a_removed_port_is_free_and_its_connections_go_on(net: Network) -> None:
    (forward,) = await net.forwarder.add("127.0.0.1:0:80")
    async with serving(net), client("127.0.0.1", forward.host_port) as stream:
        await peer(stream)
        await net.forwarder.remove(forward)
        assert await net.forwarder.list() == ()
        with pytest.raises(ConnectionRefusedError):
            _connect(forward.host_port)
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", forward.host_port))
            again.listen()
        await stream.send(b"still here")
        assert await stream.receive() == b"still here"
        with pytest.raises(NotFound, match=f"there is no forward {forward}") as caught:
            await net.forwarder.remove(forward)
        assert isinstance(caught.value, KeyError)
        assert await net.forwarder.add(forward) == (forward,)


def _connect(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), SECONDS):
        pass


@bounded
async def test_a_port_that_is_closed_inside_resets_the_client(net: Network) -> None:
    (forward,) = await net.forwarder.add("127.0.0.1:0:80")
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", forward.host_port))
        await anyio.wait_readable(sock)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


@bounded
async def test_the_clients_half_close_crosses(net: Network) -> None:
    (forward,) = await net.forwarder.add("127.0.0.1:0:80")
    async with serving(net), client("127.0.0.1", forward.host_port) as stream:
        await peer(stream)
        await stream.send(b"half")
        await stream.send_eof()
        assert await stream.receive() == b"half"
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()


@bounded
async def test_the_clients_reset_crosses(net: Network) -> None:
    (forward,) = await net.forwarder.add("127.0.0.1:0:80")
    seen: list[BaseException | None] = []
    done = anyio.Event()

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.send(b"go")
            try:
                await stream.receive()
            except anyio.BrokenResourceError as error:
                seen.append(error.__cause__)
            done.set()

    async with await net.namespace.listen_tcp(GUEST, 80) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        with socket.socket() as sock:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", forward.host_port))
            assert (await answer(sock))[0] == b"go"
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await done.wait()
        assert [type(error) for error in seen] == [ConnectionResetError]
        tasks.cancel_scope.cancel()


@bounded
async def test_many_clients_at_once(net: Network) -> None:
    (forward,) = await net.forwarder.add("127.0.0.1:0:80")
    seen: set[tuple[str, int]] = set()

    async def one() -> None:
        async with client("127.0.0.1", forward.host_port) as stream:
            seen.add(await peer(stream))
            await stream.send(b"x" * 10_000)
            received = 0
            while received < 10_000:
                received += len(await stream.receive())

    async with serving(net), anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(one)
    assert len(seen) == 100


@bounded
async def test_two_ports_may_lead_to_one_and_their_clients_have_one_port(net: Network) -> None:
    """Both would be 10.0.2.2 and that port inside: the second gets another."""
    first, second = [(await net.forwarder.add("127.0.0.1:0:80"))[0] for _ in range(2)]
    source = closed_port()
    async with serving(net), AsyncExitStack() as stack:
        seen = []
        for forward in (first, second):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", source))
            sock.connect(("127.0.0.1", forward.host_port))
            sock.setblocking(False)
            stream = await anyio.abc.SocketStream.from_socket(sock)
            await stack.enter_async_context(stream)
            seen.append(await peer(stream))
        assert seen[0] == ("10.0.2.2", source)
        assert seen[1][0] == "10.0.2.2"
        assert seen[1] != seen[0]


# -- UDP ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def guest_udp(net: Network, port: int = 53) -> AsyncIterator[socket.socket]:
    with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((GUEST, port))
        yield sock


@pytest.mark.parametrize("size", [0, 1, 1472, 1473, 60_000, 65_507])
@bounded
async def test_datagrams_of_every_size(net: Network, size: int) -> None:
    (forward,) = await net.forwarder.add("127.0.0.1:0:53/udp")
    payload = os.urandom(size)
    async with guest_udp(net) as server:
        with udp() as sock:
            sock.sendto(payload, ("127.0.0.1", forward.host_port))
            received, sender = await answer(server)
            assert (received, sender) == (payload, ("10.0.2.2", port_of(sock)))
            server.sendto(payload, sender)
            assert await answer(sock) == (payload, ("127.0.0.1", forward.host_port))


@bounded
async def test_the_server_inside_sees_each_client(net: Network) -> None:
    address = host_address()
    if address is None:
        missing("no address but the loopback's")
        return
    (forward,) = await net.forwarder.add("udp:0.0.0.0:0:53")
    async with guest_udp(net) as server:
        with udp(address) as one, udp(address) as two, udp() as local:
            for sock, seen in ((one, address), (two, address), (local, "10.0.2.2")):
                at = address if sock is not local else "127.0.0.1"
                sock.sendto(b"q", (at, forward.host_port))
                assert (await answer(server))[1] == (seen, port_of(sock))
            for sock, seen in ((two, address), (one, address), (local, "10.0.2.2")):
                server.sendto(b"for you", (seen, port_of(sock)))
                assert (await answer(sock))[0] == b"for you"


@bounded
async def test_answers_come_from_the_address_that_was_asked(net: Network) -> None:
    (forward,) = await net.forwarder.add("udp:0.0.0.0:0:53")
    async with guest_udp(net) as server:
        with udp() as sock:
            sock.sendto(b"q", ("127.0.0.7", forward.host_port))
            _, sender = await answer(server)
            server.sendto(b"a", sender)
            assert await answer(sock) == (b"a", ("127.0.0.7", forward.host_port))


@bounded
async def test_super_datagrams_from_inside_are_cut(net: Network) -> None:
    (forward,) = await net.forwarder.add("udp:127.0.0.1:0:53")
    async with guest_udp(net) as server:
        with udp() as sock:
            sock.sendto(b"q", ("127.0.0.1", forward.host_port))
            _, sender = await answer(server)
            server.setsockopt(socket.SOL_UDP, 103, 1000)  # UDP_SEGMENT
            payload = os.urandom(3500)
            server.sendto(payload, sender)
            parts = [(await answer(sock))[0] for _ in range(4)]
            assert [len(part) for part in parts] == [1000, 1000, 1000, 500]
            assert b"".join(parts) == payload


@bounded
async def test_removed_a_udp_port_and_its_flows_are_gone(net: Network) -> None:
    (forward,) = await net.forwarder.add("udp:127.0.0.1:0:53")
    async with guest_udp(net) as server:
        with udp() as sock:
            sock.sendto(b"q", ("127.0.0.1", forward.host_port))
            await answer(server)
            await net.forwarder.remove(forward)
            assert [flow for flow in await net.stack.flows() if flow.protocol == "udp"] == []
    with udp("127.0.0.1", forward.host_port):
        pass


# -- what cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("80:80:80", PortSpecError, "80:80:80"),
        ("203.0.113.9:0:80", AddressError, r"203\.0\.113\.9"),
        ("127.0.0.1:0:[fd00::1]:80", AddressError, "IPv6"),
        ("%no-such-link:0:80", OSError, "No such device"),
    ],
)
@bounded
async def test_what_cannot_be_leaves_nothing(
    net: Network, spec: str, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        await net.forwarder.add(spec)
    assert await net.forwarder.list() == ()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@bounded
async def test_a_port_is_forwarded_once(net: Network, protocol: str) -> None:
    """What has it is named, and nothing was bound: the first of the range is free."""
    (forward,) = await net.forwarder.add(f"0.0.0.0:0:80/{protocol}")
    port = forward.host_port
    for spec in (f"{port}:81", f"127.0.0.1:{port}:80", f"127.0.0.9:{port - 1}-{port}:1-2"):
        with pytest.raises(
            PortInUseError, match=f"{port}/{protocol} is taken by another forward, which leads to 80"
        ):
            await net.forwarder.add(f"{spec}/{protocol}")
    with pytest.raises(PortInUseError, match=f"127.0.0.9:2000/{protocol} is taken by another forward"):
        await net.forwarder.add(f"127.0.0.9:2000:80/{protocol}", f"127.0.0.9:2000:81/{protocol}")
    assert await net.forwarder.list() == (forward,)
    await net.forwarder.remove(forward)
    assert await net.forwarder.add(forward) == (forward,)


@bounded
async def test_what_was_not_added_claims_nothing(net: Network) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = port_of(taken)
        with pytest.raises(PortInUseError, match="this process"):
            await net.forwarder.add(f"127.0.0.9:{port}:80", f"127.0.0.1:{port}:80")
    assert len(await net.forwarder.add(f"127.0.0.9:{port}:80", f"127.0.0.1:{port}:80")) == 2


@bounded
async def test_what_is_optional_is_left_out_where_its_port_is_taken(net: Network) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first, second = [
            PortForward("tcp", host, port_of(taken), None, 80, mode="stack", optional=True)
            for host in ("127.0.0.1", "127.0.0.9")
        ]
        assert await net.forwarder.add(first, second) == (second,)


@bounded
async def test_of_two_forwarders_one_has_a_port(net: Network) -> None:
    (forward,) = await net.forwarder.add("127.0.0.1:0:80")
    async with Forwarder(net.stack) as other:
        with pytest.raises(PortInUseError, match=r"taken by (this process|a process of uid \d+);"):
            await other.add(forward)
        assert await other.list() == ()
    assert await net.forwarder.list() == (forward,)


@bounded
async def test_the_wildcard_of_ipv6_has_the_port_of_ipv4(net: Network) -> None:
    needs_ipv6()
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        for host in ("127.0.0.1", "0.0.0.0", "[::1]", "[::]"):
            with pytest.raises(PortInUseError, match="is taken by this process"):
                await net.forwarder.add(f"{host}:{port_of(taken)}:80")


@bounded
async def test_a_network_whose_port_is_taken_leaves_nothing(leaks: None, driver: DriverName) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = port_of(taken)
        with pytest.raises(PortInUseError, match=f"127.0.0.1:{port}/tcp is taken by this process"):
            await Network(driver=driver, ports=[f"127.0.0.9:{port}:80", f"127.0.0.1:{port}:80"]).open()
    for host in ("127.0.0.1", "127.0.0.9"):
        with socket.create_server((host, port)):
            pass


@bounded
async def test_an_optional_port_that_cannot_be_had_is_left_out(net: Network, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        spec = f"127.0.0.1:{taken.getsockname()[1]},:80,optional"
        (forward,) = await net.forwarder.add(spec)
        assert (forward.guest_port, await net.forwarder.list()) == (80, (forward,))
        with pytest.raises(PortInUseError):
            await net.forwarder.add(spec.replace(",optional", ""))
    path = tmp_path / "taken"
    path.touch()
    assert await net.forwarder.add(f"unix:{path}:80,optional") == ()
    with pytest.raises(AddressError):
        await net.forwarder.add("203.0.113.9:0:80,optional")  # no port, but the address is wrong


@bounded
async def test_ports_of_one_interface(net: Network) -> None:
    (forward,) = await net.forwarder.add("0.0.0.0%lo:0:80")
    async with serving(net), client("127.0.0.1", forward.host_port) as stream:
        assert (await peer(stream))[0] == "10.0.2.2"


@bounded
async def test_an_ipv6_port_of_the_host(net: Network) -> None:
    needs_ipv6()
    (forward,) = await net.forwarder.add("[::1]:0:80")
    async with serving(net), client("::1", forward.host_port) as stream:
        assert (await peer(stream))[0] == "10.0.2.2"


def _start() -> int:
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as file:
        return int(file.read())


UNPRIVILEGED = """
import json, os, socket, sys
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
from netns_kit import PrivilegedPortError, PortForward, StackClosed
from netns_kit.namespace.background import Openable, Supervisor
from netns_kit.forwarder import handed
from netns_kit.forwarder.forwarder import Forwarder
import asyncio

class Stack(Openable):
    namespace = None
    def __init__(self):
        self.supervisor = Supervisor("stack", StackClosed)
    async def _open(self):
        pass
    async def _close(self):
        pass
    async def ask(self, operation, *arguments):
        return () if operation.__qualname__ != "Forwards.add" else bind()

def bind(*_):
    sys.exit("something would have been bound")

handed.listen = bind  # mode fd listens in this process

async def main(spec):
    async with Stack() as stack, Forwarder(stack) as forwarder:
        await forwarder.add(spec, mode=sys.argv[1])

for spec in sys.argv[2:]:
    try:
        asyncio.run(main(spec))
    except PrivilegedPortError as error:
        print(json.dumps([str(error), error.errno, error.knob, error.value]))
    except SystemExit as would:
        print(json.dumps(str(would)))
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_privileged_port_is_refused_before_anything_is_bound(mode: str) -> None:
    if not 80 < (start := _start()) < 2000:
        missing(f"net.ipv4.ip_unprivileged_port_start is {start}")
    specs = [
        "127.0.0.1:80",
        "80-2000:80-2000",
        "127.0.0.1:2000-2001/udp",
        "127.0.0.1:0:80",
        "80-2000,optional",
    ]
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, mode, *specs],
        capture_output=True, text=True, timeout=SECONDS, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    refused, ranges, *others = map(json.loads, done.stdout.splitlines())
    for message, *attributes in (refused, ranges):
        assert "port 80 of the host" in message
        assert f"net.ipv4.ip_unprivileged_port_start is {start}" in message
        assert "setcap" in message
        assert attributes == [errno.EACCES, "net.ipv4.ip_unprivileged_port_start", start]
    assert others == ["something would have been bound"] * 3, done.stderr


@bounded
async def test_who_is_privileged_may(net: Network) -> None:
    if os.geteuid() == 0:
        (forward,) = await net.forwarder.add("127.0.0.9:999")
        assert forward == PortForward("tcp", IPv4Address("127.0.0.9"), 999, None, 999)
    elif _start() > 999:
        with pytest.raises(PrivilegedPortError, match="port 999"):
            await net.forwarder.add("127.0.0.9:999")
        assert await net.forwarder.list() == ()


@bounded
async def test_leaving_frees_the_ports(net: Network) -> None:
    async with Forwarder(net.stack) as forwarder:
        (forward,) = await forwarder.add(f"127.0.0.1:{closed_port()}:80")
        assert await net.forwarder.list() == ()
    with socket.create_server(("127.0.0.1", forward.host_port)):
        pass


@bounded
async def test_cancelled_it_still_frees_the_ports(net: Network) -> None:
    with anyio.CancelScope() as scope:
        async with Forwarder(net.stack) as forwarder:
            (forward,) = await forwarder.add(f"127.0.0.1:{closed_port()}:80")
            scope.cancel()
            await anyio.sleep_forever()
    await net.stack.flows()
    with socket.create_server(("127.0.0.1", forward.host_port)):
        pass


FORKING = """
import os, socket, sys
import anyio
from netns_kit import Network

async def main():
    async with Network(driver=sys.argv[1]) as net:
        forwards = await net.forwarder.add("127.0.0.1:0:80", "127.0.0.1:0:80/udp")
        reader, writer = os.pipe()
        ours, theirs = socket.socketpair()
        child = os.fork()
        if not child:
            theirs.send(b"x")  # fork(2) has returned in the child, so its copies are closed
            os.close(writer)
            os.read(reader, 1)  # until its parent is done
            os._exit(0)
        ours.recv(1)
        for forward, kind in zip(forwards, (socket.SOCK_STREAM, socket.SOCK_DGRAM)):
            await net.forwarder.remove(forward)
            with socket.socket(socket.AF_INET, kind) as sock:
                sock.bind(("127.0.0.1", forward.host_port))
        (again,) = await net.forwarder.add("127.0.0.1:0:80")
        print(len(await net.forwarder.list()), "goes on")
        os.close(writer)
        os.waitpid(child, 0)

anyio.run(main)
"""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_fork_of_the_program_keeps_no_port(driver: DriverName) -> None:
    """Neither TCP's nor UDP's: they are free when `remove` returns, though a child has copies of all descriptors."""
    with anyio.fail_after(SECONDS):
        command = [sys.executable, "-W", "ignore", "-c", FORKING, driver]
        done = await anyio.run_process(command, cwd=ROOT, check=False)
    assert done.stdout == b"1 goes on\n", done.stderr


async def test_many_ports_are_added_together_or_not_at_all(net: Network) -> None:
    """More than fit between two steps of the engine."""
    host = IPv4Address(0x7F000000 + os.getpid())  # no other worker of pytest-xdist has it
    with socket.create_server((str(host), 0)) as taken:
        port = taken.getsockname()[1]
        first = next(base for base in range(20000, 60000, 700) if base + 600 < port or base > port)
        with pytest.raises(PortInUseError):
            await net.forwarder.add(f"{host}:{first}-{first + 599}:1000-1599", f"{host}:{port}:80")
        assert await net.forwarder.list() == ()
    forwards = await net.forwarder.add(f"{host}:{first}-{first + 599}:1000-1599", f"{host}:{port}:80")
    assert await net.forwarder.list() == forwards
    assert len(forwards) == 601
