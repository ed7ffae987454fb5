"""Host ports that come and go with what listens inside."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from typing import Any

import anyio
import anyio.abc
import pytest

from netns_kit import Follow, Forwarder, Network, NotFound, PortForward, StackClosed, UserStack
from netns_kit.errors import FeatureUnavailable
from netns_kit.forwarder import follow as following
from netns_kit.forwarder.follow import Follower
from netns_kit.forwarder.ports import Mode
from netns_kit.gateway.setup import DriverName
from netns_kit.host import sysctl
from netns_kit.namespace.listening import SocketDiagnostics
from tests.support import missing, needs_ipv6, needs_tun
from tests.support.servers import bounded, host_address, own_ports

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

HOST = IPv4Address("127.0.0.1")
AUTO = Follow("tcp", HOST)
FIRST = own_ports()

MANY = """
import socket, sys
sockets = [socket.create_server(("0.0.0.0", int(port))) for port in sys.argv[1:]]
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
async def net(leaks: None) -> AsyncIterator[Network]:
    needs_tun()
    async with Network() as net:
        yield net


def to(port: int, *, protocol: str = "tcp") -> PortForward:
    return PortForward("tcp" if protocol == "tcp" else "udp", HOST, port, None, port, mode="stack")


_waiting: list[anyio.Event] = []


@pytest.fixture(autouse=True)
def _looks(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Follower._look

    async def told(self: Follower, *, closely: bool = False) -> None:
        await look(self, closely=closely)
        while _waiting:
            _waiting.pop().set()

    monkeypatch.setattr(Follower, "_look", told)


async def looked(times: int = 2) -> None:
    """Wait until a follower has looked at its namespace as often; the first look may have begun before."""
    for _ in range(times):
        _waiting.append(event := anyio.Event())
        await event.wait()


async def until(net: Network, *forwards: PortForward) -> None:
    """Wait until these are all the forwards that there are."""
    while set(await net.forwarder.list()) != set(forwards):
        await looked(1)


async def greeting(port: int) -> bytes:
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        return await stream.receive()


async def greet(stream: anyio.abc.SocketStream) -> None:
    async with stream:
        await stream.send(b"hello")


@bounded
async def test_a_port_appears_and_vanishes_with_its_server(net: Network) -> None:
    async with await net.namespace.listen_tcp("0.0.0.0", FIRST):
        assert await net.forwarder.add(AUTO) == (to(FIRST),)  # what is there already is there at once
        async with (
            await net.namespace.listen_tcp("0.0.0.0", FIRST + 1) as second,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(second.serve, greet)
            await until(net, to(FIRST), to(FIRST + 1))
            assert net.forwarder.follows() == {AUTO: (to(FIRST), to(FIRST + 1))}
            assert await greeting(FIRST + 1) == b"hello"
            tasks.cancel_scope.cancel()
        await until(net, to(FIRST))
    await until(net)
    with socket.create_server(("127.0.0.1", FIRST + 1)):
        pass


@bounded
async def test_a_rule_ends_with_its_forwards(net: Network) -> None:
    async with await net.namespace.listen_tcp("0.0.0.0", FIRST):
        await net.forwarder.add("127.0.0.1:0:80", AUTO)
        await net.forwarder.remove(AUTO)
        (kept,) = await net.forwarder.list()
        assert kept.guest_port == 80
        assert net.forwarder.follows() == {}
        with pytest.raises(NotFound, match="auto"):
            await net.forwarder.remove(AUTO)
        assert await net.forwarder.add(AUTO) == (to(FIRST),)
        await net.forwarder.remove(to(FIRST))
        await looked()
        assert to(FIRST) not in await net.forwarder.list(), "who has removed one port does not want it back"


@bounded
async def test_only_what_is_included_and_not_excluded(net: Network) -> None:
    rule = Follow("tcp", HOST, include=[(FIRST, FIRST + 9)], exclude=[(FIRST + 1, FIRST + 1)])
    await net.forwarder.add(rule)
    async with (
        await net.namespace.listen_tcp("0.0.0.0", FIRST),
        await net.namespace.listen_tcp("0.0.0.0", FIRST + 1),
        await net.namespace.listen_tcp("0.0.0.0", FIRST + 10),
    ):
        await until(net, to(FIRST))
        await looked()
        assert await net.forwarder.list() == (to(FIRST),)


@bounded
async def test_a_port_that_is_taken_is_had_when_it_is_free(
    net: Network, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "RETRY", 0.0)
    with socket.create_server(("127.0.0.1", FIRST)):
        await net.forwarder.add(AUTO)
        async with (
            await net.namespace.listen_tcp("0.0.0.0", FIRST),
            await net.namespace.listen_tcp("0.0.0.0", FIRST + 1),
        ):
            await until(net, to(FIRST + 1))
            await looked()
            said = [each.getMessage() for each in caplog.records if each.name == following.logger.name]
            assert len(said) == 1, "once"
            assert f"127.0.0.1:{FIRST}/tcp is taken by" in said[0]
        await until(net)
    async with await net.namespace.listen_tcp("0.0.0.0", FIRST):
        await until(net, to(FIRST))


@bounded
async def test_a_port_that_needs_a_privilege_is_left_out(
    net: Network, caplog: pytest.LogCaptureFixture
) -> None:
    (start,) = sysctl.numbers("net.ipv4.ip_unprivileged_port_start")
    if start < 100 or following_may_bind():
        missing("this process may have any port")
    async with (
        await net.namespace.listen_tcp("0.0.0.0", 80),
        await net.namespace.listen_tcp("0.0.0.0", 81),
        await net.namespace.listen_tcp("0.0.0.0", FIRST),
    ):
        assert await net.forwarder.add(AUTO) == (to(FIRST),)
        (said,) = [each.getMessage() for each in caplog.records if each.name == following.logger.name]
        assert f"net.ipv4.ip_unprivileged_port_start is {start}" in said


def following_may_bind() -> bool:
    try:
        socket.create_server(("127.0.0.1", 81)).close()
    except PermissionError:
        return False
    return True


@bounded
async def test_a_hundred_servers_at_once(net: Network) -> None:
    ports = range(FIRST, FIRST + 100)
    await net.forwarder.add(AUTO)
    async with await net.popen([sys.executable, "-c", MANY, *map(str, ports)]):
        await until(net, *map(to, ports))
    await until(net)


@bounded
async def test_a_server_that_restarts_keeps_its_port(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it is looked at while it is gone."""
    removed: list[int] = []
    remove = Follower._remove_one

    async def noted(self: Follower, rule: Any, port: int, *, cut: bool = False) -> None:
        removed.append(port)
        await remove(self, rule, port, cut=cut)

    monkeypatch.setattr(Follower, "_remove_one", noted)
    await net.forwarder.add(AUTO)
    server = await net.namespace.listen_tcp("0.0.0.0", FIRST)
    await until(net, to(FIRST))
    before = socket.create_connection(("127.0.0.1", FIRST))
    for _ in range(3):
        await server.aclose()
        await looked(1)
        server = await net.namespace.listen_tcp("0.0.0.0", FIRST)
        await looked(1)
        assert await net.forwarder.list() == (to(FIRST),)
        assert removed == []
    async with server, await anyio.connect_tcp("127.0.0.1", FIRST), await server.accept():
        pass
    before.close()


@bounded
async def test_ports_that_come_and_go_all_the_time_leave_none(net: Network) -> None:
    await net.forwarder.add(AUTO)
    for number in range(60):
        async with await net.namespace.listen_tcp("0.0.0.0", FIRST + number % 7):
            await anyio.sleep(0.01)
    await until(net)


@bounded
async def test_udp_servers_are_followed_and_clients_are_not(net: Network) -> None:
    rule = Follow("udp", HOST)
    assert await net.forwarder.add(rule) == ()
    server, some_client, connected = [
        await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)
    ]
    with server, some_client, connected:
        server.bind(("0.0.0.0", FIRST))
        some_client.bind(("0.0.0.0", 0))
        connected.bind(("0.0.0.0", FIRST + 1))
        connected.connect(("10.0.2.2", 9))
        await until(net, to(FIRST, protocol="udp"))
        await looked()
        assert await net.forwarder.list() == (to(FIRST, protocol="udp"),)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
            outside.sendto(b"hello", ("127.0.0.1", FIRST))
            await anyio.wait_readable(server)
            assert server.recv(100) == b"hello"
    await until(net)


@bounded
async def test_an_ipv6_server_is_followed() -> None:
    """pasta's -t auto misses those, at times."""
    needs_tun()
    needs_ipv6()
    async with Network(ipv6=True) as net:
        await net.forwarder.add(AUTO, Follow("tcp", "::1"))
        listener = await net.namespace.socket(socket.AF_INET6, socket.SOCK_STREAM)
        with listener:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(("::", FIRST))
            listener.listen()
            guest = net.subnet.ipv6.guest if net.subnet.ipv6 else None
            await until(
                net,
                PortForward("tcp", HOST, FIRST, guest, FIRST, mode="stack"),
                PortForward("tcp", "::1", FIRST, None, FIRST, mode="stack"),
            )
            for address in "127.0.0.1", "::1":
                async with await anyio.connect_tcp(address, FIRST) as stream:
                    await anyio.wait_readable(listener)
                    accepted, _ = listener.accept()
                    with accepted:
                        accepted.send(b"hello")
                    assert await stream.receive() == b"hello"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@bounded
async def test_a_server_on_the_loopback_is_reached_by_a_socket(net: Network, address: str) -> None:
    needs_ipv6()
    await net.forwarder.add(AUTO)
    async with await net.namespace.listen_tcp(address, FIRST) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, greet)
        await until(net, PortForward("tcp", HOST, FIRST, address, FIRST, mode="socket"))
        assert await greeting(FIRST) == b"hello"
        tasks.cancel_scope.cancel()


@bounded
async def test_a_server_that_moves_is_found_where_it_is(net: Network) -> None:
    await net.forwarder.add(AUTO)
    async with await net.namespace.listen_tcp("127.0.0.1", FIRST):
        await until(net, PortForward("tcp", HOST, FIRST, "127.0.0.1", FIRST, mode="socket"))
    async with await net.namespace.listen_tcp("0.0.0.0", FIRST):
        await until(net, to(FIRST))


@pytest.mark.parametrize("mode", ["socket", "transparent"])
@bounded
async def test_our_own_sockets_inside_are_not_followed(net: Network, mode: Mode) -> None:
    """Each client of a UDP port has one; they lead inside, and nobody waits there."""
    address = host_address()
    if address is None:
        missing("no address but the loopback's")
    rule = Follow("udp", "0.0.0.0", include=[(1024, 65535)], mode=mode)
    await net.forwarder.add(rule)
    forward = PortForward("udp", "0.0.0.0", FIRST, None, FIRST, mode=mode)
    server = await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
        server.bind(("0.0.0.0", FIRST))
        await until(net, forward)
        outside.sendto(b"hello", (address, FIRST))
        await anyio.wait_readable(server)
        data, client = server.recvfrom(100)
        assert data == b"hello"
        server.sendto(b"you too", client)
        outside.setblocking(False)
        await anyio.wait_readable(outside)
        assert outside.recv(100) == b"you too"
        await looked(3)
        assert await net.forwarder.list() == (forward,)


@bounded
async def test_a_server_on_the_loopback_is_not_reached_through_the_stack(net: Network) -> None:
    await net.forwarder.add(Follow("tcp", HOST, mode="stack"))
    async with await net.namespace.listen_tcp("127.0.0.1", FIRST):
        await looked()
        assert await net.forwarder.list() == ()


@bounded
async def test_what_is_hostile_makes_no_end_of_forwards(
    net: Network, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "FORWARDS_MAX", 10)
    await net.forwarder.add(AUTO)
    async with await net.popen([sys.executable, "-c", MANY, *map(str, range(FIRST, FIRST + 30))]):
        await until(net, *map(to, range(FIRST, FIRST + 10)))
        await looked()
        assert len(await net.forwarder.list()) == 10
    assert [each.getMessage() for each in caplog.records if each.name == following.logger.name] == [
        f"{AUTO}: no more than 10 ports are forwarded"
    ]


@bounded
async def test_a_rule_that_cannot_be_had_leaves_nothing(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dump(self: SocketDiagnostics, protocols: object) -> list[bytes]:
        raise FeatureUnavailable("no socket diagnostics")

    monkeypatch.setattr(SocketDiagnostics, "dump", dump)
    with pytest.raises(FeatureUnavailable, match="no socket diagnostics"):
        await net.forwarder.add("127.0.0.1:0:80", AUTO)
    assert await net.forwarder.list() == ()
    assert net.forwarder.follows() == {}
    monkeypatch.setattr(UserStack, "namespace", None)
    async with Forwarder(net.stack) as other:
        with pytest.raises(FeatureUnavailable, match="nobody tells what listens there"):
            await other.add(AUTO)


@bounded
async def test_an_error_of_the_follower_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_tun()

    def fails(*_: object) -> object:
        raise ZeroDivisionError("a bug")

    net = await Network().open()
    await net.forwarder.add(AUTO)
    monkeypatch.setattr(following, "wanted", fails)
    async with await net.namespace.listen_tcp("0.0.0.0", FIRST):
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await net.wait_closed()
    for close in net.forwarder.close, net.close:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await close()


@pytest.mark.parametrize("driver", ["loop", "worker"])
@bounded
async def test_every_driver_follows(driver: DriverName) -> None:
    needs_tun()
    async with Network(driver=driver, ports=[AUTO]) as net:
        async with await net.namespace.listen_tcp("0.0.0.0", FIRST):
            await until(net, to(FIRST))
        await until(net)
    with pytest.raises(StackClosed):
        net.forwarder.follows()


@bounded
async def test_the_forwards_end_with_the_network(net: Network) -> None:
    async with (
        Network(ports=[Follow("tcp", "127.0.0.2")]) as other,
        await other.namespace.listen_tcp("0.0.0.0", FIRST),
    ):
        await until(other, PortForward("tcp", "127.0.0.2", FIRST, None, FIRST, mode="stack"))
    with socket.create_server(("127.0.0.2", FIRST)):
        pass
