"""The modes "socket" and "transparent": ports that lead to programs inside by sockets of the namespace."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from netns_kit import (
    AddressError,
    FeatureUnavailable,
    Forwarder,
    Limits,
    Network,
    PortForward,
    PortInUseError,
    Refusal,
    TapDevice,
    UserStack,
)
from netns_kit.forwarder.ports import Mode, UnixSocket
from netns_kit.gateway import admission
from netns_kit.gateway.setup import DriverName
from tests.support import missing, needs, needs_ipv6, needs_tun
from tests.support.connections import accepted, echoes, exactly, failure, outcome, rest, send
from tests.support.drivers import driver, net
from tests.support.events import followed
from tests.support.servers import BLOCK, bounded, host_address
from tests.support.waiting import eventually

__all__ = ["driver", "net"]  # fixtures

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.usefixtures("leaks")]

OWN, LOOPBACK, LOOPBACK6 = "10.0.2.100", "127.0.0.1", "::1"
RESET = struct.pack("ii", 1, 0)
MODES: list[Mode] = ["socket", "transparent"]


def host() -> str:
    """An address of the host's own, that is a client's address inside."""
    address = host_address()
    if address is None:
        missing("no address but the loopback's")
    return str(address)


def family(address: str) -> int:
    return int(socket.AF_INET6 if ":" in address else socket.AF_INET)


@asynccontextmanager
async def listening(net: Network, address: str, port: int = 80) -> AsyncIterator[socket.socket]:
    with await net.namespace.socket(family(address), socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(4096)
        yield sock


@asynccontextmanager
async def receiving(net: Network, address: str, port: int = 53) -> AsyncIterator[socket.socket]:
    with await net.namespace.socket(family(address), socket.SOCK_DGRAM) as sock:
        sock.bind((address, port))
        yield sock


def calling(address: str | tuple[str, int], source: str | None = None) -> socket.socket:
    """A client that is connecting, from an address of the host's; to a port, or to a unix socket."""
    kind = socket.AF_UNIX if isinstance(address, str) else family(address[0])
    sock = socket.socket(kind, socket.SOCK_STREAM)
    sock.setblocking(False)
    if source is not None:
        sock.bind((source, 0))
    assert sock.connect_ex(address) in (0, errno.EINPROGRESS)
    return sock


def local(sock: socket.socket) -> tuple[str, int]:
    address, port, *_ = sock.getsockname()
    return address, port


def remote(sock: socket.socket) -> tuple[str, int]:
    address, port, *_ = sock.getpeername()
    return address, port


async def heard(sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
    await anyio.wait_readable(sock)
    data, sender = sock.recvfrom(1 << 16)
    return data, sender[:2]


@asynccontextmanager
async def joined(
    net: Network, mode: Mode = "socket", server: str = OWN
) -> AsyncIterator[tuple[socket.socket, socket.socket, PortForward]]:
    """A connection by a published port: the client's end, the server's, and the port."""
    (forward,) = await net.forwarder.add("127.0.0.1:0:80", mode=mode)
    async with listening(net, server) as listener:
        with calling((LOOPBACK, forward.host_port)) as client, await accepted(listener) as served:
            yield client, served, forward


# -- who reaches whom, and who is seen ----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("server", ["0.0.0.0", OWN, LOOPBACK, "::", LOOPBACK6])
@bounded
async def test_a_server_is_found_at_every_address_it_may_have(net: Network, mode: Mode, server: str) -> None:
    needs_ipv6()
    (forward,) = await net.forwarder.add("0.0.0.0:0:80", mode=mode)
    async with listening(net, server) as listener:
        seen = {"0.0.0.0": OWN, "::": f"::ffff:{OWN}"}.get(server, server)
        with calling((LOOPBACK, forward.host_port)) as client, await accepted(listener) as served:
            assert remote(served)[0] == seen, "a client of the host's loopback is the namespace itself"
            await echoes(client, served)


@pytest.mark.parametrize("server", ["0.0.0.0", OWN, LOOPBACK, "::"])
@bounded
async def test_a_transparent_port_shows_who_is_there(net: Network, server: str) -> None:
    needs_ipv6()
    (forward,) = await net.forwarder.add("0.0.0.0:0:80", mode="transparent")
    async with listening(net, server) as listener:
        with calling((host(), forward.host_port)) as client, await accepted(listener) as served:
            address, port = remote(served)
            assert (address.removeprefix("::ffff:"), port) == local(client)
            await echoes(client, served)


@bounded
async def test_the_port_is_another_where_the_clients_is_taken(net: Network) -> None:
    """Two published ports lead to one, and one client's port calls both."""
    one, two = await net.forwarder.add("0.0.0.0:0:80", "0.0.0.0:0:80", mode="transparent")
    async with listening(net, OWN) as listener:
        with ExitStack() as stack:
            clients = [stack.enter_context(socket.socket()) for _ in range(2)]
            for each in clients:
                each.setblocking(False)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            clients[0].bind((host(), 0))
            clients[0].connect_ex((host(), one.host_port))
            served = [stack.enter_context(await accepted(listener))]
            clients[1].bind(local(clients[0]))
            clients[1].connect_ex((host(), two.host_port))
            served.append(stack.enter_context(await accepted(listener)))
            assert remote(served[0]) == local(clients[0]) == local(clients[1])
            assert remote(served[1])[0] == host()
            assert remote(served[1]) != remote(served[0])
            for client, server in zip(clients, served, strict=True):
                await echoes(client, server)


@bounded
async def test_answers_to_one_client_leave_by_the_port_that_it_asked(net: Network) -> None:
    """It asks two published ports from one socket, so both of its sockets inside would have one address and port."""
    ports = await net.forwarder.add("0.0.0.0:0:53/udp", "0.0.0.0:0:54/udp", mode="transparent")
    async with receiving(net, "0.0.0.0") as one, receiving(net, "0.0.0.0", 54) as two:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.bind((host(), 0))
            asked = [(host(), port.host_port) for port in ports]
            senders = []
            for address, service in zip(asked, (one, two), strict=True):
                client.sendto(b"question", address)
                senders.append((await heard(service))[1])
            assert senders[0] == local(client)
            for address, service, sender in zip(asked, (one, two), senders, strict=True):
                service.sendto(b"answer", sender)
                assert await heard(client) == (b"answer", address)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("server", ["0.0.0.0", OWN, LOOPBACK])
@bounded
async def test_datagrams_find_their_server_and_their_client(net: Network, mode: Mode, server: str) -> None:
    (forward,) = await net.forwarder.add("0.0.0.0:0:53/udp", mode=mode)
    async with receiving(net, server) as service:
        for address in (LOOPBACK, host()):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.setblocking(False)
                client.bind((address, 0))
                client.connect((address, forward.host_port))
                client.send(b"question")
                data, sender = await heard(service)
                assert data == b"question"
                if mode == "transparent" and address != LOOPBACK:
                    assert sender == local(client)
                else:
                    assert sender[0] == (OWN if server == "0.0.0.0" else server)
                for size in (0, 1, 60_000):
                    service.sendto(bytes(size), sender)
                    assert (await heard(client))[0] == bytes(size)


@pytest.mark.parametrize("guest", ["[::1]:80", "80"])
@bounded
async def test_clients_of_ipv6_reach_either_family(net: Network, guest: str) -> None:
    needs_ipv6()
    (forward,) = await net.forwarder.add(f"[::1]:0:{guest}", mode="socket")
    async with listening(net, LOOPBACK6 if guest != "80" else OWN) as listener:
        with calling((LOOPBACK6, forward.host_port)) as client, await accepted(listener) as served:
            await echoes(client, served)


@pytest.mark.parametrize("path", ["file", "abstract"])
@bounded
async def test_unix_sockets_of_the_host_and_inside(net: Network, path: str, tmp_path: Path) -> None:
    outer = UnixSocket(str(tmp_path / "published") if path == "file" else f"@{tmp_path}/published")
    inner = UnixSocket(f"@{tmp_path}/service")
    (forward,) = await net.forwarder.add(PortForward("tcp", outer, 0, inner, 0))
    assert forward.mode == "socket"
    with await net.namespace.socket(socket.AF_UNIX, socket.SOCK_STREAM) as service:
        service.bind(inner.address)
        service.listen()
        with calling(outer.address) as client, await accepted(service) as served:
            await echoes(client, served)
            client.shutdown(socket.SHUT_WR)
            assert await rest(served) == b""
    if path == "file":
        assert (tmp_path / "published").stat().st_mode & 0o777 == 0o600
        await net.forwarder.remove(forward)
        assert not (tmp_path / "published").exists()


@bounded
async def test_what_is_at_a_path_stays(net: Network, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("precious")
    with pytest.raises(PortInUseError, match="mine"):
        await net.forwarder.add(PortForward("tcp", UnixSocket(str(path)), 0, None, 80))
    assert path.read_text() == "precious"
    assert await net.forwarder.list() == ()


# -- what crosses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@bounded
async def test_much_crosses_both_ways_at_once(net: Network, mode: Mode) -> None:
    async with joined(net, mode) as (client, served, _):
        received: dict[str, bytes] = {}

        async def hear(who: str, sock: socket.socket) -> None:
            received[who] = await rest(sock)

        async def tell(sock: socket.socket) -> None:
            await send(sock, BLOCK * 8)
            sock.shutdown(socket.SHUT_WR)

        async with anyio.create_task_group() as tasks:
            for who, sock in (("client", client), ("server", served)):
                tasks.start_soon(hear, who, sock)
                tasks.start_soon(tell, sock)
        assert received == {"client": BLOCK * 8, "server": BLOCK * 8}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("who", ["client", "server"])
@bounded
async def test_a_reset_crosses(net: Network, mode: Mode, who: str) -> None:
    async with joined(net, mode) as (client, served, _):
        near, far = (client, served) if who == "client" else (served, client)
        await echoes(near, far)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        near.close()
        assert await failure(far) == errno.ECONNRESET


@pytest.mark.parametrize("mode", MODES)
@bounded
async def test_a_port_that_is_closed_inside_resets_the_client(net: Network, mode: Mode) -> None:
    (forward,) = await net.forwarder.add("0.0.0.0:0:81", mode=mode)
    for address in (LOOPBACK, host()):
        with calling((address, forward.host_port)) as client:
            assert (await outcome(client) or await failure(client)) == errno.ECONNRESET


@bounded
async def test_a_server_that_is_slow_to_accept_is_waited_for(net: Network) -> None:
    (forward,) = await net.forwarder.add("127.0.0.1:0:80", mode="socket")
    with await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as listener, ExitStack() as stack:
        listener.bind((OWN, 80))
        listener.listen(1)
        clients = [stack.enter_context(calling((LOOPBACK, forward.host_port))) for _ in range(3)]
        await anyio.sleep(0.1)
        for _ in clients:
            stack.enter_context(await accepted(listener))


@bounded
async def test_a_burst_of_clients_all_get_in(every_descriptor: int, net: Network) -> None:
    count = 200
    (forward,) = await net.forwarder.add("127.0.0.1:0:80", mode="socket")
    async with listening(net, OWN) as listener:
        with ExitStack() as stack:
            clients = [stack.enter_context(calling((LOOPBACK, forward.host_port))) for _ in range(count)]
            served = [stack.enter_context(await accepted(listener)) for _ in range(count)]
            for number, client in enumerate(clients):
                await send(client, number.to_bytes(4, "big"))
            numbers = [int.from_bytes(await exactly(each, 4), "big") for each in served]
            assert sorted(numbers) == list(range(count))


# -- what is known of it, and its end -----------------------------------------------------------------


@bounded
async def test_it_is_a_flow_like_any_other(net: Network) -> None:
    async with followed(net.stack) as events:
        async with joined(net) as (client, served, _):
            await echoes(client, served, b"12345")
            (flow,) = await net.stack.flows()
            assert (str(flow.guest), flow.state, flow.direction) == (
                f"{OWN}:80",
                "established",
                "inbound",
            )
            assert (str(flow.remote.address), flow.remote.port) == remote(served)
            assert flow.host is not None
            assert (str(flow.host.address), flow.host.port) == local(client)
            assert (flow.bytes_from_guest, flow.bytes_to_guest) == (5, 5)
            assert await net.stack.end_flow(flow.id)
            assert await failure(client) == errno.ECONNRESET
            assert await failure(served) == errno.ECONNRESET
            assert not await net.stack.end_flow(flow.id)
        opened, closed = await events.receive(), await events.receive()
        assert (opened.kind, closed.kind, closed.flow.id) == ("opened", "closed", flow.id)
        assert (closed.flow.bytes_from_guest, str(closed.flow.guest)) == (5, f"{OWN}:80")


@pytest.mark.parametrize("mode", ["stack", "socket", "transparent"])
@bounded
async def test_a_client_that_nobody_takes_is_told_of_as_refused(net: Network, mode: Mode) -> None:
    (forward,) = await net.forwarder.add("0.0.0.0:0:81", mode=mode)
    async with followed(net.stack) as events:
        with calling((LOOPBACK, forward.host_port)) as client:
            await failure(client)
        seen = [await events.receive() for _ in range(2)]
    assert [(event.kind, event.refusal) for event in seen] == [("opened", None), ("refused", Refusal.RESET)]
    await eventually(net.stack.flows, ())


@bounded
async def test_of_too_many_clients_the_silent_make_room(leaks: None) -> None:
    needs_tun()
    limits = Limits(udp_flows=2)
    async with Network(limits=limits) as net, receiving(net, OWN) as service:
        (forward,) = await net.forwarder.add("127.0.0.1:0:53/udp", mode="socket")
        with ExitStack() as stack:
            clients = [stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(3)]
            for client in (0, 1, 0, 2):
                clients[client].sendto(b"", (LOOPBACK, forward.host_port))
                await heard(service)
            known = {flow.host.port for flow in await net.stack.flows() if flow.host is not None}
            assert known == {local(clients[0])[1], local(clients[2])[1]}


@bounded
async def test_clients_of_a_udp_port_do_not_keep_all_descriptors(
    leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of them from outside would else refuse whatever the guest opens."""
    needs_tun()
    async with Network(driver="loop") as net, receiving(net, OWN) as service:
        (forward,) = await net.forwarder.add("127.0.0.1:0:53/udp", mode="socket")
        with ExitStack() as stack:
            clients = [stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(3)]
            for client in clients:
                client.sendto(b"", (LOOPBACK, forward.host_port))
                await heard(service)
            router = net.stack.gateway.router
            router.admission.most = 0  # as if no descriptor were free, from now on
            monkeypatch.setattr(admission, "most_descriptors", lambda: 0)
            assert router.make_room()
            known = [flow.host.port for flow in await net.stack.flows() if flow.host is not None]
            assert known == [local(client)[1] for client in clients[1:]]
            assert [router.make_room() for _ in range(3)] == [True, True, False]
        await net.forwarder.remove(forward)
        assert router.beside == []


@pytest.mark.parametrize("mode", ["stack", "socket", "transparent"])
@bounded
async def test_removed_with_its_connections_or_without(net: Network, mode: Mode) -> None:
    async with joined(net, mode) as (client, served, forward):
        await net.forwarder.remove(forward)
        with socket.socket() as late:
            assert late.connect_ex((LOOPBACK, forward.host_port)) == errno.ECONNREFUSED
        await echoes(client, served)
    async with joined(net, mode) as (client, served, forward):
        await echoes(client, served)
        await net.forwarder.remove(forward, cut=True)
        assert await failure(client) == errno.ECONNRESET
        assert await failure(served) == errno.ECONNRESET


async def rules(net: Network) -> str:
    result = await net.run(["sh", "-c", "ip rule; ip -6 rule"], stdout=-1)
    return result.stdout.decode()


@bounded
async def test_the_rules_of_transparent_datagrams_go_with_the_last_port(net: Network) -> None:
    needs("ip")
    one, two, three = await net.forwarder.add("0:53/udp", "0:53/udp", "0:54/udp", mode="transparent")
    assert "sport 53" in await rules(net)
    await net.forwarder.remove(one)
    assert "sport 53" in await rules(net), "the other needs it"
    await net.forwarder.remove(two)
    assert "sport 53" not in await rules(net)
    async with Forwarder(net.stack) as other:
        await other.add("0:55/udp", mode="transparent")
    assert "sport 55" not in await rules(net)
    await net.forwarder.remove(three)
    assert "sport" not in await rules(net)


@bounded
async def test_the_rule_stays_for_whoever_comes_as_the_last_one_goes(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("ip")
    (last,) = await net.forwarder.add("0:53/udp", mode="transparent")
    route = net.namespace.route_answers

    async def route_and_remove(family: int, port: int, *, wanted: bool) -> None:
        await route(family, port, wanted=wanted)
        if wanted:
            tasks.start_soon(net.forwarder.remove, last)
            await anyio.sleep(0.1)  # it would have the rule removed, since nobody listens yet

    monkeypatch.setattr(net.namespace, "route_answers", route_and_remove)
    async with anyio.create_task_group() as tasks:
        added = await net.forwarder.add("0:53/udp", mode="transparent")
    assert await net.forwarder.list() == added
    assert "sport 53" in await rules(net)


@bounded
async def test_a_rule_is_taken_back_if_its_port_is_cancelled(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("ip")
    route = net.namespace.route_answers

    async def route_and_cancel(family: int, port: int, *, wanted: bool) -> None:
        await route(family, port, wanted=wanted)
        scope.cancel()

    monkeypatch.setattr(net.namespace, "route_answers", route_and_cancel)
    with anyio.CancelScope() as scope:
        await net.forwarder.add("0:53/udp", mode="transparent")
    assert scope.cancelled_caught
    assert ("sport 53" in await rules(net)) == bool(await net.forwarder.list())


@pytest.mark.parametrize("path", ["file", "abstract"])
@pytest.mark.parametrize("way", ["add", "adopt"])
@bounded
async def test_a_unix_socket_that_is_cancelled_is_gone(
    net: Network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, way: str
) -> None:
    at = UnixSocket(str(tmp_path / "published") if path == "file" else f"@{tmp_path}/published")
    passing = net.stack.pass_socket

    async def pass_and_cancel(sock: socket.socket) -> int:
        number = await passing(sock)
        scope.cancel()
        return number

    monkeypatch.setattr(net.stack, "pass_socket", pass_and_cancel)
    with anyio.CancelScope() as scope:
        if way == "add":
            await net.forwarder.add(PortForward("tcp", at, 0, None, 80))
        else:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(at.address)
                sock.listen()
                await net.forwarder.adopt(sock, 80)
    assert scope.cancelled_caught
    assert await net.forwarder.list() == ()
    if path == "file" and way == "adopt":
        (tmp_path / "published").unlink()  # it was the caller's
    with socket.socket(socket.AF_UNIX) as late:
        assert late.connect_ex(at.address) == (errno.ENOENT if path == "file" else errno.ECONNREFUSED)
    monkeypatch.undo()
    await net.forwarder.add(PortForward("tcp", at, 0, None, 80))


@bounded
async def test_a_socket_is_published_once(net: Network) -> None:
    with socket.create_server((LOOPBACK, 0)) as sock:
        with pytest.raises(AddressError):
            await net.forwarder.adopt(sock, 80, "10.0.2.2", mode="stack")
        forward = await net.forwarder.adopt(sock, 80, mode="socket")
        with pytest.raises(PortInUseError, match="taken by another forward, which leads to 80"):
            await net.forwarder.adopt(sock, 80, mode="socket")
        assert await net.forwarder.list() == (forward,)
        await net.forwarder.remove(forward)
        assert await net.forwarder.list() == ()
        assert await net.forwarder.adopt(sock, 80, mode="socket") == forward


@bounded
async def test_ports_that_needed_nothing_are_taken_back_without_a_question(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round trip to the engine for each would make a range slow to close."""
    asked = []
    ask = net.stack.ask

    async def count(operation: Any, *arguments: object) -> Any:
        asked.append(operation.__name__)
        return await ask(operation, *arguments)

    monkeypatch.setattr(net.stack, "ask", count)
    await net.forwarder.add(*["127.0.0.1:0:80"] * 50, mode="socket")
    await net.forwarder.close()
    assert asked == ["add", "list", "remove_all"]


@pytest.mark.parametrize("mode", MODES)
@bounded
async def test_ports_come_and_go_under_traffic(net: Network, mode: Mode) -> None:
    async with joined(net, mode) as (client, served, _):
        for turn in range(60):
            forward, other = await net.forwarder.add("127.0.0.1:0:80", "127.0.0.1:0:53/udp", mode=mode)
            with calling((LOOPBACK, forward.host_port)):
                await echoes(client, served, b"%d" % turn)
            await net.forwarder.remove(forward, cut=bool(turn % 2))
            await net.forwarder.remove(other)
        await echoes(client, served)
    assert len(await net.forwarder.list()) == 1


@pytest.mark.parametrize("end", ["stack", "namespace"])
@bounded
async def test_whatever_ends_nothing_is_left(leaks: None, driver: DriverName, end: str) -> None:
    """In the middle of a transfer, with pipes that hold bytes; the fixture looks for what is left."""
    async with Network(driver=driver) as net, joined(net) as (client, served, _):
        with suppress(BlockingIOError):
            while True:
                client.send(BLOCK)
        await anyio.sleep(0.05)
        assert served.fileno() >= 0, "and reads nothing"
        if end == "stack":
            await net.stack.close()
        else:
            await net.close()
        assert await failure(client) == errno.ECONNRESET


@bounded
async def test_a_device_without_a_namespace_has_no_sockets_inside(leaks: None) -> None:
    tap, other = TapDevice.pair(mtu=1500)
    try:
        async with UserStack(tap) as stack, Forwarder(stack) as forwarder:
            with pytest.raises(FeatureUnavailable, match="no socket can be made inside"):
                await forwarder.add("127.0.0.1:0:80", mode="socket")
            assert await forwarder.list() == ()
    finally:
        await other.close()
        await tap.close()


@bounded
async def test_a_port_of_one_interface_is_reached_by_that_one(net: Network) -> None:
    (forward,) = await net.forwarder.add("0.0.0.0%lo:0:80", mode="socket")
    async with listening(net, OWN) as listener:
        with calling((LOOPBACK, forward.host_port)) as client, await accepted(listener) as served:
            await echoes(client, served)


@bounded
async def test_a_host_address_that_is_not_there_yet(net: Network) -> None:
    forward = PortForward("tcp", "192.0.2.77", 0, None, 80, freebind=True)
    (added,) = await net.forwarder.add(forward)
    assert added.host_port
