"""UDP, and what is no protocol of ours, over a path of several hops with real kernels at both ends.

The numbers are rows of an inventory of what other programs do.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from netns_kit import Flow, Limits, Network, Refusal, Uplink
from tests.support import needs
from tests.support.multihop import (
    GATEWAY,
    GUEST,
    IP_MTU_DISCOVER,
    IP_RECVERR,
    IP_RECVTOS,
    IP_RECVTTL,
    MTU,
    NO_ROUTE,
    PMTUDISC_DONT,
    PMTUDISC_PROBE,
    PROHIBITED,
    R1,
    R2,
    UNREACHABLE,
    H,
    Hops,
    Icmp,
    S,
    Told,
    in_h,
    received,
    received_with,
    told,
)
from tests.support.servers import closed_port, port_of
from tests.support.waiting import eventually, gauge

DISCARD = 9  # nobody listens there
ANY = "0.0.0.0"


def network(uplink: Uplink | None = None, limits: Limits | None = None) -> Network:
    return Network(uplink=uplink or Uplink(allow_host_loopback=True), limits=limits)


async def udp(net: Network, port: int = 0) -> socket.socket:
    """A socket of the guest."""
    sock = await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((GUEST, port))
    return sock


async def ask(guest: socket.socket, server: socket.socket, payload: bytes = b"question") -> tuple[str, int]:
    """The guest sends to `server`; returns who that is as seen from there."""
    guest.sendto(payload, server.getsockname())
    data, sender = await received(server)
    assert data == payload
    return sender


async def gone(peer: socket.socket, mapping: tuple[str, int]) -> None:
    """Send to the host's port until that is closed."""
    peer.connect(mapping)
    while True:
        try:
            peer.send(b"late")
        except ConnectionRefusedError:
            return
        await anyio.sleep(0.01)


# -- 83 to 87: addresses, ports, time -----------------------------------------------------------------


@in_h()
async def test_tos_and_ecn_of_datagrams_cross_both_ways(hops: Hops) -> None:
    async with network() as net:
        with hops.udp("S") as server, await udp(net) as guest:
            mapping = await ask(guest, server)
            for end in (server, guest):
                end.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
            for tos in (0x10, 0xB8, 0x01, 0x02, 0x03, 0xFF, 0x00):
                for end in (server, guest):
                    end.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
                guest.sendto(b"there", server.getsockname())
                assert await received_with(server, socket.IP_TOS) == (b"there", tos)
                server.sendto(b"and back", mapping)
                assert await received_with(guest, socket.IP_TOS) == (b"and back", tos)


@in_h()
async def test_every_server_sees_the_same_address_and_port(hops: Hops) -> None:
    async with network() as net:
        with hops.udp("S") as one, hops.udp("S") as two, hops.udp("R2") as three, await udp(net) as guest:
            mappings = [await ask(guest, server) for server in (one, two, three, one)]
            assert len(set(mappings)) == 1
            for server in (one, two, three):
                server.sendto(b"answer", mappings[0])
                assert await received(guest) == (b"answer", server.getsockname())


@in_h()
async def test_only_a_peer_it_has_sent_to_may_answer(hops: Hops) -> None:
    async with network() as net:
        with (
            hops.udp("S") as server,
            hops.udp("S") as neighbour,
            hops.udp("R2") as stranger,
            await udp(net) as guest,
        ):
            mapping = await ask(guest, server)
            for other in (stranger, neighbour):
                other.sendto(b"nobody asked", mapping)
            server.sendto(b"answer", mapping)
            assert await received(guest) == (b"answer", server.getsockname())
            await eventually(lambda: gauge(net, "dropped_udp_filtered"), 2)
            with pytest.raises(BlockingIOError):
                guest.recv(100)


@in_h()
async def test_a_full_cone_lets_a_stranger_in(hops: Hops) -> None:
    uplink = Uplink(allow_host_loopback=True, udp_filtering="endpoint-independent")
    async with network(uplink) as net:
        with hops.udp("S") as server, hops.udp("R2") as stranger, await udp(net) as guest:
            mapping = await ask(guest, server)
            stranger.sendto(b"is anybody there?", mapping)
            assert await received(guest) == (b"is anybody there?", stranger.getsockname())
            assert await ask(guest, stranger, b"I am") == mapping
            assert await ask(guest, server, b"still here") == mapping


@in_h()
async def test_a_full_cone_keeps_the_hosts_loopback_apart(hops: Hops) -> None:
    """A port towards the outside is none for the host's own programs: an answer would leave by another."""
    uplink = Uplink(allow_host_loopback=True, udp_filtering="endpoint-independent")
    async with network(uplink) as net:
        with hops.udp("S") as server, hops.udp("H", address="127.0.0.1") as local, await udp(net) as guest:
            mapping = await ask(guest, server)
            guest.sendto(b"question", (GATEWAY, port_of(local)))
            _, loopback_mapping = await received(local)
            local.sendto(b"to the wrong port", ("127.0.0.1", mapping[1]))
            local.sendto(b"answer", loopback_mapping)
            assert await received(guest) == (b"answer", (GATEWAY, port_of(local)))
            server.sendto(b"answer", mapping)
            assert await received(guest) == (b"answer", server.getsockname())
            await eventually(lambda: gauge(net, "dropped_udp_filtered"), 1)


@in_h()
async def test_a_full_cone_minds_the_policy(hops: Hops) -> None:
    asked: list[Flow] = []

    def policy(flow: Flow) -> Refusal | None:
        asked.append(flow)
        return Refusal.PROHIBITED if flow.destination.address == IPv4Address(R2) else None

    uplink = Uplink(udp_filtering="endpoint-independent", policy=policy)
    async with network(uplink) as net:
        with (
            hops.udp("S") as server,
            hops.udp("R2") as refused,
            hops.udp("R1") as stranger,
            await udp(net) as guest,
        ):
            mapping = await ask(guest, server)
            refused.sendto(b"let me in", mapping)
            stranger.sendto(b"and me", mapping)
            assert await received(guest) == (b"and me", stranger.getsockname())
            with pytest.raises(BlockingIOError):
                guest.recv(100)
    assert {str(flow.destination.address) for flow in asked} == {S, R1, R2}
    assert {flow.source.port for flow in asked} == {mapping[1]}


@in_h()
async def test_the_guests_port_is_preserved_when_it_is_free(hops: Hops) -> None:
    async with network() as net:
        with hops.udp("S") as server, await udp(net, 41234) as guest:
            assert await ask(guest, server) == (H, 41234)


@in_h()
async def test_a_guests_port_that_is_taken_is_replaced(hops: Hops) -> None:
    async with network() as net:
        with hops.udp("S") as server, hops.udp("H") as owner, await udp(net, port_of(owner)) as guest:
            mapping = await ask(guest, server)
            assert mapping != owner.getsockname()
            assert mapping[0] == H
            server.sendto(b"answer", mapping)
            assert await received(guest) == (b"answer", server.getsockname())


def test_how_long_flows_live_by_default() -> None:
    limits = Limits()
    assert (limits.udp_one_way, limits.udp_stream, limits.udp_one_shot) == (30, 180, 10)


@in_h()
async def test_a_flow_that_is_answered_lives_longer(hops: Hops) -> None:
    async with network(limits=Limits(udp_one_way=0.2, udp_stream=30.0)) as net:
        with hops.udp("S") as server, await udp(net) as answered, await udp(net) as unanswered:
            stream = await ask(answered, server)
            server.sendto(b"answer", stream)
            assert await received(answered) == (b"answer", server.getsockname())
            start = anyio.current_time()
            one_way = await ask(unanswered, server)
            with hops.udp("R2") as other:
                await gone(other, one_way)
            assert anyio.current_time() - start >= 0.2
            server.sendto(b"later", stream)
            assert await received(answered) == (b"later", server.getsockname())


@in_h()
async def test_a_stream_ends_after_its_time(hops: Hops) -> None:
    async with network(limits=Limits(udp_one_way=30.0, udp_stream=0.2)) as net:
        with hops.udp("S") as server, await udp(net) as answered, await udp(net) as unanswered:
            one_way, stream = await ask(unanswered, server), await ask(answered, server)
            start = anyio.current_time()
            server.sendto(b"answer", stream)
            with hops.udp("R2") as other:
                await gone(other, stream)
            assert anyio.current_time() - start >= 0.2
            server.sendto(b"a slow answer", one_way)
            assert await received(unanswered) == (b"a slow answer", server.getsockname())


@in_h()
async def test_a_flow_of_one_question_and_one_answer_at_port_53_ends_soon(hops: Hops) -> None:
    async with network(limits=Limits(udp_one_way=30.0, udp_stream=30.0, udp_one_shot=0.2)) as net:
        with (
            hops.udp("S", 53) as resolver,
            hops.udp("S") as server,
            hops.udp("R2") as other,
            await udp(net) as asking,
            await udp(net) as waiting,
            await udp(net) as streaming,
        ):
            mappings = [await ask(guest, resolver) for guest in (asking, waiting)]
            stream = await ask(streaming, server)
            server.sendto(b"answer", stream)
            assert (await received(streaming))[0] == b"answer"
            start = anyio.current_time()
            resolver.sendto(b"answer", mappings[0])
            assert (await received(asking))[0] == b"answer"
            await gone(other, mappings[0])
            assert anyio.current_time() - start >= 0.2
            resolver.sendto(b"a slow answer", mappings[1])
            assert (await received(waiting))[0] == b"a slow answer"
            server.sendto(b"more", stream)
            assert (await received(streaming))[0] == b"more"


# -- 88 and 89: what ICMP says ------------------------------------------------------------------------


async def told_of(
    net: Network, destination: tuple[str, int], payload: bytes = b"hello", **options: int
) -> tuple[Told, Icmp]:
    """Send it; what the guest's socket is told, and the ICMP message that did: held to quote what was sent."""
    raw = await net.namespace.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with raw, await udp(net) as guest:
        guest.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        if "ttl" in options:
            guest.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, options["ttl"])
        if "discover" in options:
            guest.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, options["discover"])
        guest.sendto(payload, destination)
        message = Icmp.parse((await received(raw))[0])
        error = await told(guest)
        assert error.sent_to == destination
        assert error.payload
        assert payload.startswith(error.payload)
        header = message.body[:20]
        assert header[9] == socket.IPPROTO_UDP
        assert int.from_bytes(header[2:4], "big") in (28 + len(payload), 20 + len(message.body[20:]))
        assert (socket.inet_ntoa(header[12:16]), socket.inet_ntoa(header[16:20])) == (GUEST, destination[0])
        ports = message.body[20:22], message.body[22:24]
        assert tuple(int.from_bytes(port, "big") for port in ports) == (port_of(guest), destination[1])
        assert message.body[28:] == error.payload
        assert (message.sender, message.type, message.code) == (error.offender, error.type, error.code)
        return error, message


@in_h()
async def test_port_unreachable_comes_from_the_remote_host(hops: Hops) -> None:
    async with network() as net:
        error, _ = await told_of(net, (S, DISCARD))
        assert (error.errno, error.type, error.code) == (errno.ECONNREFUSED, 3, 3)
        assert error.offender == S
        with await udp(net) as guest:
            guest.connect((S, DISCARD))
            guest.send(b"x")
            with pytest.raises(ConnectionRefusedError):
                await received(guest)


@in_h()
async def test_port_unreachable_comes_from_the_mapped_gateway(hops: Hops) -> None:
    async with network() as net:
        error, _ = await told_of(net, (GATEWAY, closed_port()))
        assert (error.errno, error.type, error.code) == (errno.ECONNREFUSED, 3, 3)
        assert error.offender == GATEWAY
        with await udp(net) as guest:
            guest.connect((GATEWAY, closed_port()))
            guest.send(b"x")
            with pytest.raises(ConnectionRefusedError):
                await received(guest)


@in_h()
async def test_port_unreachable_leaves_the_other_flows_of_the_socket_alone(hops: Hops) -> None:
    async with network() as net:
        with hops.udp("S") as server, await udp(net) as guest:
            mapping = await ask(guest, server)
            for _ in range(3):
                guest.sendto(b"to nobody", (S, DISCARD))
                assert await ask(guest, server) == mapping
                server.sendto(b"answer", mapping)
                assert await received(guest) == (b"answer", server.getsockname())


@pytest.mark.parametrize(
    ("destination", "ttl", "expected", "offender"),
    [
        pytest.param(PROHIBITED[R1], 64, (errno.EHOSTUNREACH, 3, 13), R1, id="prohibited by R1"),
        pytest.param(PROHIBITED[R2], 64, (errno.EHOSTUNREACH, 3, 13), R2, id="prohibited by R2"),
        pytest.param(UNREACHABLE[R1], 64, (errno.EHOSTUNREACH, 3, 1), R1, id="host unreachable from R1"),
        pytest.param(UNREACHABLE[R2], 64, (errno.EHOSTUNREACH, 3, 1), R2, id="host unreachable from R2"),
        pytest.param(NO_ROUTE, 64, (errno.ENETUNREACH, 3, 0), R1, id="net unreachable from R1"),
        pytest.param(S, 1, (errno.EHOSTUNREACH, 11, 0), GATEWAY, id="time exceeded at the gateway"),
        pytest.param(S, 2, (errno.EHOSTUNREACH, 11, 0), R1, id="time exceeded at R1"),
        pytest.param(S, 3, (errno.EHOSTUNREACH, 11, 0), R2, id="time exceeded at R2"),
        pytest.param(S, 4, (errno.ECONNREFUSED, 3, 3), S, id="port unreachable at S"),
    ],
)
@in_h()
async def test_icmp_errors_about_datagrams_have_their_true_offender(
    hops: Hops, destination: str, ttl: int, expected: tuple[int, int, int], offender: str
) -> None:
    async with network() as net:
        error, _ = await told_of(net, (destination, DISCARD), ttl=ttl)
        assert (error.errno, error.type, error.code) == expected
        assert error.offender == offender
        assert error.info == 0


@in_h()
async def test_fragmentation_needed_comes_with_its_mtu(hops: Hops) -> None:
    async with network() as net:
        for ttl in (64, 8):  # few hops: a probe, which does not mind what has been learnt
            error, message = await told_of(net, (S, DISCARD), bytes(1472), ttl=ttl, discover=PMTUDISC_PROBE)
            assert (error.errno, error.type, error.code) == (errno.EMSGSIZE, 3, 4)
            assert (error.info, error.offender) == (MTU, R1)
            assert message.rest == MTU


@in_h()
async def test_the_guests_kernel_learns_the_mtu_and_the_next_datagram_arrives(hops: Hops) -> None:
    payload = os.urandom(1472)
    async with network() as net:
        with hops.udp("S") as server, await udp(net) as guest:
            guest.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
            guest.sendto(payload, server.getsockname())
            error = await told(guest)
            assert (error.errno, error.info, error.offender) == (errno.EMSGSIZE, MTU, R1)
            assert await ask(guest, server, payload)


@in_h()
async def test_a_datagram_that_may_be_fragmented_is(hops: Hops) -> None:
    async with network() as net:
        with hops.udp("S") as server, await udp(net) as guest:
            guest.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
            guest.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
            for _ in range(2):
                assert await ask(guest, server, os.urandom(1472))
            with pytest.raises(BlockingIOError):
                guest.recvmsg(1, 512, socket.MSG_ERRQUEUE)


# -- 90: hops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--sport=40000"], ["-U", "-p", "9"]], ids=" ".join)
@in_h()
async def test_traceroute_by_udp_shows_every_hop(hops: Hops, options: list[str]) -> None:
    needs("traceroute")
    async with network() as net:
        text = (await net.run(["traceroute", "-n", "-q", "2", "-w", "2", *options, S])).stdout.decode()
    found = [line.split()[:2] for line in text.splitlines()[1:]]
    assert found == [["1", GATEWAY], ["2", R1], ["3", R2], ["4", S]], text
    assert "*" not in text


@in_h()
async def test_the_ttl_of_datagrams_is_the_guests_less_one(hops: Hops) -> None:
    async with network() as net:
        with hops.udp("S") as server, await udp(net) as guest:
            server.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
            for ttl in (64, 4, 255, 64):
                guest.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
                guest.sendto(b"x", server.getsockname())
                assert await received_with(server, socket.IP_TTL) == (b"x", ttl - 3)


# -- 91, 93, 101: sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("mtu", [576, 1500, 65520])
@pytest.mark.parametrize("size", [65507, 1472, 1])
@in_h()
async def test_datagrams_of_the_greatest_size_both_ways(hops: Hops, mtu: int, size: int) -> None:
    payload, reply = os.urandom(size), os.urandom(size)
    async with Network(uplink=Uplink(), mtu=mtu) as net:
        with hops.udp("S") as server, await udp(net) as guest:
            guest.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
            mapping = await ask(guest, server, payload)
            server.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
            server.sendto(reply, mapping)
            assert await received(guest) == (reply, server.getsockname())


async def snmp(net: Network) -> dict[str, int]:
    """What the guest's kernel counts of IP (proc_pid_net(5))."""
    text = (await net.run(["cat", "/proc/net/snmp"])).stdout.decode()
    names, values = re.findall(r"^Ip: (.*)$", text, re.MULTILINE)
    return dict(zip(names.split(), map(int, values.split()), strict=True))


@in_h()
async def test_a_reply_beyond_the_mtu_comes_in_fragments(hops: Hops) -> None:
    reply = os.urandom(9000)
    async with network() as net:
        with hops.udp("S") as server, await udp(net) as guest:
            mapping = await ask(guest, server)
            before = await snmp(net)
            server.sendto(reply, mapping)
            assert await received(guest) == (reply, server.getsockname())
            after = await snmp(net)
    pieces = -(-(9000 + 8) // 1480)
    assert after["ReasmReqds"] - before["ReasmReqds"] == pieces
    assert after["ReasmOKs"] - before["ReasmOKs"] == 1


@in_h()
async def test_datagrams_of_no_bytes_both_ways(hops: Hops) -> None:
    async with network() as net:
        with hops.udp("S") as server, await udp(net) as guest:
            for _ in range(2):
                mapping = await ask(guest, server, b"")
                server.sendto(b"", mapping)
                assert await received(guest) == (b"", server.getsockname())


# -- 99 and 100: what goes nowhere --------------------------------------------------------------------


Dropped = Callable[[str], int]


@asynccontextmanager
async def dropping(net: Network, server: socket.socket) -> AsyncIterator[Dropped]:
    """What is sent in the block has been dealt with after it; then the answer counts what was dropped."""
    before, after = dict[str, Any](await net.stack.stats()), dict[str, Any]()
    yield lambda name: after[name] - before[name]
    with await udp(net) as guest:
        await ask(guest, server, b"the last to be sent")
    after.update(await net.stack.stats())


@in_h()
async def test_broadcast_is_dropped_and_counted(hops: Hops) -> None:
    async with network() as net:
        with hops.udp("S") as server, await udp(net) as guest, hops.udp("H", address=ANY) as host:
            guest.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            async with dropping(net, server) as dropped:
                for address in ("255.255.255.255", "10.0.2.255"):
                    guest.sendto(b"who is there?", (address, port_of(host)))
            assert dropped("dropped_udp_broadcast") == 2
            with pytest.raises(BlockingIOError):
                host.recv(100)


@in_h()
async def test_the_hosts_own_broadcast_address_reaches_nobody(hops: Hops) -> None:
    async with network() as net:
        with hops.udp("S") as server, await udp(net) as guest, hops.udp("R1", address=ANY) as neighbour:
            async with dropping(net, server):
                guest.sendto(b"who is there?", ("10.1.0.255", port_of(neighbour)))
            with pytest.raises(BlockingIOError):
                neighbour.recv(100)


@in_h()
async def test_multicast_is_dropped_and_counted(hops: Hops) -> None:
    group = socket.inet_aton("224.0.0.251") + socket.inet_aton("0.0.0.0")
    async with network() as net:
        with hops.udp("S") as server, await udp(net) as guest, hops.udp("R1", address=ANY) as neighbour:
            neighbour.setsockopt(
                socket.IPPROTO_IP,
                socket.IP_ADD_MEMBERSHIP,
                socket.inet_aton("224.0.0.251") + socket.inet_aton(R1),
            )
            async with dropping(net, server) as dropped:
                guest.sendto(b"mdns", ("224.0.0.251", port_of(neighbour)))
            assert dropped("dropped_udp_multicast") == 1
            with pytest.raises(BlockingIOError):
                neighbour.recv(100)
            guest.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)  # IGMP, in its own time
            await eventually(lambda: gauge(net, "dropped_ip_protocol"), 1)


@in_h()
async def test_other_protocols_are_dropped_and_counted(hops: Hops) -> None:
    sctp, gre = 132, 47
    async with network() as net:
        with hops.udp("S") as server:
            async with dropping(net, server) as dropped:
                for protocol in (sctp, gre):
                    with await net.namespace.socket(socket.AF_INET, socket.SOCK_RAW, protocol) as guest:
                        guest.sendto(bytes(32), (S, 0))
            assert dropped("dropped_ip_protocol") == 2
