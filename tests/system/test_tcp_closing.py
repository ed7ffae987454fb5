"""How connections end, and how they do not.  The numbers are rows of an inventory of what other programs do."""

from __future__ import annotations

import errno
import select
import socket

import anyio
import pytest

from netns_kit import Limits, Network
from netns_kit.gateway.setup import DriverName
from netns_kit.stack import tcp
from netns_kit.stack.wire.tcp import ACK, FIN, PSH, RST, SYN, Segment
from tests.support import needs
from tests.support.connections import (
    GATEWAY,
    PATIENCE,
    Recording,
    echoes,
    every_driver,
    exactly,
    failure,
    inbound,
    network,
    once,
    pair,
    polled,
    rest,
    send,
    tcp_info,
)
from tests.support.servers import bounded, closed_port, port_of, reset
from tests.support.waiting import eventually, gauge
from tests.support.wire import Frame, watching

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

TCP_REPAIR = 19  # linux/tcp.h
QUESTION, ANSWER = b"the question" * 50_000, b"the answer" * 50_000


async def say(sock: socket.socket, data: bytes) -> None:
    """That, and no more."""
    await send(sock, data)
    sock.shutdown(socket.SHUT_WR)


def is_reset_by_guest(frame: Frame, segment: Segment) -> bool:
    return frame.from_guest and bool(segment.flags & RST)


def is_fin_of_guest(frame: Frame, segment: Segment) -> bool:
    return frame.from_guest and bool(segment.flags & FIN)


async def lingers(net: Network, guest: socket.socket) -> bool:
    """Whether the guest's kernel is the one that keeps this connection in TIME-WAIT (proc_pid_net(5))."""
    table = (await net.namespace.run(["cat", "/proc/net/tcp"])).stdout.decode()
    rows = [line.split() for line in table.splitlines()[1:]]
    return any(row[1].endswith(f":{port_of(guest):04X}") and row[3] == "06" for row in rows)


# -- 67: half-close ------------------------------------------------------------------------------------


async def one_after_the_other(first: socket.socket, second: socket.socket) -> None:
    """`first` says its last and then listens; `second` hears it all, and has still all to say."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(say, first, QUESTION)
        assert await rest(second) == QUESTION
    await send(second, b"more ")
    assert await exactly(first, 5) == b"more "
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(say, second, ANSWER)
        assert await rest(first) == ANSWER


@every_driver
@bounded
async def test_the_guest_closes_its_half_first(net: Network) -> None:
    async with pair(net.namespace) as (guest, host):
        await one_after_the_other(guest, host)
        await eventually(net.stack.flows, ())


@every_driver
@bounded
async def test_the_host_closes_its_half_first(net: Network) -> None:
    async with pair(net.namespace) as (guest, host):
        await one_after_the_other(host, guest)
        await eventually(net.stack.flows, ())


@every_driver
@bounded
async def test_whose_half_is_closed_first_has_the_time_wait(net: Network) -> None:
    """Ours ends early if a FIN is sent again and the guest, who has forgotten, resets what answers it (RFC 1337)."""
    async with pair(net.namespace) as (guest, host):
        guest.shutdown(socket.SHUT_WR)
        assert await rest(host) == b""
        host.shutdown(socket.SHUT_WR)
        assert await rest(guest) == b""
        await eventually(lambda: lingers(net, guest))
        await eventually(net.stack.flows, ())
        assert await gauge(net, "tcp_time_waits") == 0
    async with pair(net.namespace) as (guest, host), watching(net.namespace) as wire:
        host.shutdown(socket.SHUT_WR)
        assert await rest(guest) == b""
        guest.shutdown(socket.SHUT_WR)
        assert await rest(host) == b""
        await eventually(net.stack.flows, ())
        assert not await lingers(net, guest)
        kept = await gauge(net, "tcp_time_waits")
        sent_again = len(wire.tcp(is_fin_of_guest)) > 1
        assert kept == 1 or (sent_again and wire.tcp(is_reset_by_guest))


@every_driver
@bounded
async def test_halves_are_closed_one_by_one_through_a_forwarded_port_too(net: Network) -> None:
    async with inbound(net) as (guest, host):
        await one_after_the_other(host, guest)
    async with inbound(net) as (guest, host):
        await one_after_the_other(guest, host)


@every_driver
@bounded
async def test_both_close_their_halves_at_once(net: Network) -> None:
    async with pair(net.namespace) as (guest, host):
        guest.shutdown(socket.SHUT_WR)
        host.shutdown(socket.SHUT_WR)
        assert await rest(guest) == await rest(host) == b""


# -- 68, 69: a reset goes through ----------------------------------------------------------------------


@every_driver
@bounded
async def test_the_hosts_reset_reaches_the_guest_behind_the_data(net: Network) -> None:
    async with pair(net.namespace) as (guest, host):
        host.send(bytes(20_000))
        reset(host)
        assert await exactly(guest, 20_000) == bytes(20_000)
        assert await failure(guest) == errno.ECONNRESET
        await eventually(net.stack.flows, ())


@every_driver
@bounded
async def test_the_hosts_reset_reaches_a_guest_that_has_closed_its_half(net: Network) -> None:
    async with pair(net.namespace) as (guest, host):
        guest.shutdown(socket.SHUT_WR)
        assert await rest(host) == b""
        reset(host)
        assert await failure(guest) == errno.ECONNRESET


@every_driver
@bounded
async def test_the_hosts_reset_reaches_the_guest_behind_the_hosts_fin(net: Network) -> None:
    """The guest has read to the end: its kernel calls a reset in this state EPIPE."""
    async with pair(net.namespace) as (guest, host):
        host.shutdown(socket.SHUT_WR)
        assert await rest(guest) == b""
        reset(host)
        await polled(guest, select.POLLHUP)
        assert guest.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EPIPE


@every_driver
@bounded
async def test_the_clients_reset_reaches_the_server_inside(net: Network) -> None:
    async with inbound(net) as (guest, host):
        await send(host, b"a request")
        reset(host)
        assert await exactly(guest, 9) == b"a request"
        assert await failure(guest) == errno.ECONNRESET


@every_driver
@bounded
async def test_the_guests_reset_reaches_the_host(net: Network) -> None:
    async with pair(net.namespace) as (guest, host):
        reset(guest)
        assert await failure(host) == errno.ECONNRESET
        await eventually(net.stack.flows, ())


@every_driver
@bounded
async def test_a_reset_in_a_half_closed_connection_reaches_the_host_behind_the_data(net: Network) -> None:
    async with pair(net.namespace) as (guest, host):
        host.shutdown(socket.SHUT_WR)
        assert await rest(guest) == b""
        await send(guest, bytes(10_000))  # what a kernel sends at once: the rest would go with the reset
        reset(guest)
        assert await exactly(host, 10_000) == bytes(10_000)
        assert await failure(host) == errno.ECONNRESET


@every_driver
@bounded
async def test_the_server_insides_reset_reaches_the_client(net: Network) -> None:
    async with inbound(net) as (guest, host):
        await send(guest, b"an answer")
        reset(guest)
        assert await exactly(host, 9) == b"an answer"
        assert await failure(host) == errno.ECONNRESET


@every_driver
@bounded
async def test_a_guest_that_does_not_read_to_the_end_resets(net: Network) -> None:
    """As when a program is killed: its kernel has bytes that nobody will read, and says so."""
    async with pair(net.namespace) as (guest, host):
        await send(host, b"unread")
        await polled(guest, select.POLLIN)
        guest.close()
        assert await failure(host) == errno.ECONNRESET


# -- 70: what belongs to no connection -----------------------------------------------------------------


@bounded
async def test_a_stray_segment_is_answered_as_rfc_9293_says(net: Network) -> None:
    """3.10.7.1: with the numbers that the segment itself asks for, from where it was sent to."""
    source, unused = 40000, closed_port()
    async with watching(net.namespace) as wire:

        async def answer(flags: int, data: bytes = b"", host: str = GATEWAY) -> Segment:
            nonlocal source
            source += 1
            wire.put(source, unused, seq=1000, ack=9000, flags=flags, data=data, host=host)
            frame, segment = await wire.next(lambda frame, _: not frame.from_guest)
            assert frame.ports == (source, unused)
            assert frame.packet.source == socket.inet_aton(host)
            return segment

        for flags in (ACK, ACK | PSH, ACK | FIN, ACK | SYN):
            reply = await answer(flags, b"data")
            assert (reply.flags, reply.seq) == (RST, 9000)
        for flags, length in {0: 4, PSH: 4, FIN: 5}.items():
            reply = await answer(flags, b"data")
            assert (reply.flags, reply.seq, reply.ack) == (RST | ACK, 0, 1000 + length)
        assert (await answer(ACK, host="192.0.2.7")).flags == RST
        for flags in (RST, RST | ACK, RST | SYN):
            wire.put(source, unused, seq=1000, ack=9000, flags=flags)
        before = source
        await answer(ACK)  # and to the resets before it: nothing
        assert source == before + 1


# -- 76, 77: nobody says anything ----------------------------------------------------------------------


def patient(sock: socket.socket, *, idle: int, interval: int, count: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, count)


@once
@bounded
async def test_the_guests_keepalives_are_answered_and_the_hosts_socket_sends_them_too(
    driver: DriverName,
) -> None:
    uplink = Recording()
    async with network(driver, uplink) as net, pair(net.namespace) as (guest, host):
        await echoes(guest, host)
        [ours] = uplink.opened
        assert not ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        async with watching(net.namespace) as wire:
            patient(guest, idle=1, interval=1, count=1)
            _, probe = await wire.next(lambda frame, _: frame.from_guest)
            _, reply = await wire.next(lambda frame, _: not frame.from_guest)
        assert (reply.flags, reply.ack) == (ACK, (probe.seq + 1) % 2**32)
        assert reply.seq == probe.ack
        info = tcp_info(guest)
        assert (info.probes, info.retransmitted) == (0, 0)
        await echoes(guest, host)
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """Limits of a stack that looks after silent guests soon, and asks them in quick succession."""
    monkeypatch.setattr(tcp, "PROBE_INTERVAL", 0.03)
    return Limits(tcp_idle=0.05)


@bounded
async def test_a_guest_that_is_gone_is_noticed(driver: DriverName, hasty: Limits) -> None:
    needs("ip")
    async with network(driver, limits=hasty) as net, pair(net.namespace) as (guest, host):
        await echoes(guest, host)
        await net.namespace.run(["ip", "link", "set", "tap0", "down"])
        assert await failure(host) == errno.ECONNRESET
        await eventually(lambda: gauge(net, "tcp_connections"), 0)


@bounded
async def test_a_guest_that_knows_of_nothing_is_noticed_at_the_first_probe(driver: DriverName) -> None:
    """Its socket has vanished without a word, as under TCP_REPAIR, and its kernel answers with a reset."""
    assert tcp.PROBE_INTERVAL > 2 * PATIENCE
    async with network(driver, limits=Limits(tcp_idle=0.05)) as net, pair(net.namespace) as (guest, host):
        await echoes(guest, host)
        guest.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        guest.close()
        with anyio.fail_after(PATIENCE):
            assert await failure(host) == errno.ECONNRESET


@bounded
async def test_a_connection_may_be_idle_for_as_long_as_the_guest_is_there(
    driver: DriverName, hasty: Limits
) -> None:
    def from_us(frame: Frame, _: Segment) -> bool:
        return not frame.from_guest

    def from_guest(frame: Frame, _: Segment) -> bool:
        return frame.from_guest

    async with network(driver, limits=hasty) as net, pair(net.namespace) as (guest, host):
        await net.namespace.set_sysctl("net.ipv4.tcp_invalid_ratelimit", 0)  # or it answers two a second
        await echoes(guest, host)
        async with watching(net.namespace) as wire:
            for _ in range(2 * tcp.PROBES):
                _, probe = await wire.next(from_us)
                _, reply = await wire.next(from_guest)
                assert (probe.flags, reply.flags, reply.ack) == (ACK, ACK, (probe.seq + 1) % 2**32)
        await echoes(guest, host)
