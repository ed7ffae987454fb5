"""How connections begin, and how many there may be.

The numbers are rows of an inventory of what other programs do.
"""

from __future__ import annotations

import errno
import os
import socket
import statistics
import threading
import time
from contextlib import ExitStack
from ipaddress import IPv4Interface
from itertools import pairwise

import anyio
import anyio.to_thread
import pytest

from netns_kit import Flow, Limits, Namespace, Network, Refusal, TapDevice, Target, Uplink
from netns_kit.arguments import Address
from netns_kit.gateway.setup import DriverName
from netns_kit.stack.user import Transport
from netns_kit.stack.wire.tcp import ACK, RST, SYN
from tests.support import LONG, needs
from tests.support.connections import (
    GATEWAY,
    GUEST,
    accepted,
    dial,
    echoes,
    every_driver,
    failure,
    listening,
    network,
    once,
    outcome,
    pair,
    receive,
    send,
    stuck,
    tcp_info,
    tcp_socket,
)
from tests.support.servers import SECONDS, bounded, closed_port, port_of, reset, sent_again
from tests.support.waiting import eventually, gauge
from tests.support.wire import is_answer, watching

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

ELSEWHERE = "192.0.2.1"
A_WHILE = 0.3
"""Seconds in which nothing may happen: far fewer than a kernel waits before it repeats a SYN."""
TCP_USER_TIMEOUT = 18  # linux/tcp.h


OTHERS_WORD = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE)
SILENT = (errno.ETIMEDOUT, errno.EMSGSIZE)
NO_HOST = (
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
    errno.ENONET,
    errno.ENOPROTOOPT,
    errno.EPROTO,
    errno.EOPNOTSUPP,
)
FORBIDDEN = (errno.EACCES, errno.EPERM)  # administratively prohibited
WHAT_GUESTS_SEE = {
    **dict.fromkeys(sorted(errno.errorcode.keys() - set(SILENT)), errno.ENETUNREACH),
    **dict.fromkeys(NO_HOST + FORBIDDEN, errno.EHOSTUNREACH),
    **dict.fromkeys(OTHERS_WORD, errno.ECONNREFUSED),
}
"""By what the host's socket fails with: "refused" is what the other end says, and never a fault of ours."""


class Failing(Uplink):
    """Has no sockets for what leaves this machine."""

    def __init__(self, error: int = 0) -> None:
        super().__init__(allow_host_loopback=True)
        self.error = error

    def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
        if not target.is_loopback:
            raise OSError(self.error, os.strerror(self.error))
        return super().open(protocol, target, port)


class Refusing(Uplink):
    """Lets nothing out but to the gateway."""

    def __init__(self, refusal: Refusal = Refusal.DROP) -> None:
        super().__init__(allow_host_loopback=True)
        self.refusal = refusal

    def route(self, flow: Flow) -> Target | Refusal:
        return super().route(flow) if str(flow.destination.address) == GATEWAY else self.refusal


class Made(Uplink):
    """Gives out these sockets, one after the other."""

    def __init__(self, *sockets: socket.socket) -> None:
        super().__init__(allow_host_loopback=True)
        self.sockets = list(sockets)

    def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
        return self.sockets.pop(0)


class Watched(socket.socket):
    """Whether it has been closed can be awaited."""

    def __init__(self) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.has_been_closed = threading.Event()

    def close(self) -> None:
        super().close()
        self.has_been_closed.set()


async def connecting_fails(namespace: Namespace, port: int, host: str = GATEWAY) -> int:
    """The errno, told before the guest's kernel asks again, unless this machine has stood still for a second."""
    for _ in range(3):
        with await dial(namespace, port, host) as guest:
            error = await outcome(guest)
            if not sent_again(guest):
                return error
    raise AssertionError("told when it was asked again")


# -- 63: SYN|ACK only when the host has connected ------------------------------------------------------


@once
@bounded
async def test_the_guest_is_connected_when_the_host_is_and_not_before(net: Network) -> None:
    async with watching(net.namespace) as wire:
        with stuck() as (listener, port), await dial(net.namespace, port) as guest:
            await wire.next(lambda frame, segment: frame.from_guest and segment.flags == SYN)
            with anyio.move_on_after(A_WHILE) as hung:
                await outcome(guest)
            assert hung.cancelled_caught
            assert not wire.tcp(lambda frame, _: not frame.from_guest)
            (await accepted(listener)).close()  # that one has only filled the queue
            with await accepted(listener) as ours:
                asked = sent_again(guest)
                assert await outcome(guest) == 0
                assert sent_again(guest) == asked, "not for being asked again"
                await echoes(guest, ours)
        assert len(wire.tcp(is_answer)) == 1


# -- 64, 65: what the guest is told when the host cannot connect ---------------------------------------


@every_driver
@bounded
async def test_a_refused_connection_is_refused_at_once(net: Network) -> None:
    """By a RST that acknowledges the SYN: the guest's kernel would ignore any other (RFC 9293 3.10.7.3)."""
    async with watching(net.namespace) as wire:
        assert await connecting_fails(net.namespace, closed_port()) == errno.ECONNREFUSED
        asked = wire.tcp(lambda frame, _: frame.from_guest)
        last = asked[-1][0].ports[0]
        [syn] = [segment for frame, segment in asked if frame.ports[0] == last]
        [(_, answer)] = wire.tcp(lambda frame, _: not frame.from_guest and frame.ports[0] == last)
    assert (answer.flags, answer.seq, answer.ack) == (RST | ACK, 0, (syn.seq + 1) % 2**32)


@bounded
async def test_what_the_hosts_socket_cannot_is_what_the_guests_cannot(driver: DriverName) -> None:
    uplink = Failing()
    async with network(driver, uplink) as net:
        for error, seen in WHAT_GUESTS_SEE.items():
            uplink.error = error
            assert await connecting_fails(net.namespace, 80, ELSEWHERE) == seen, os.strerror(error)
        await eventually(lambda: gauge(net, "tcp_connections"), 0)


@bounded
async def test_each_refusal_of_the_policy_has_its_error(driver: DriverName) -> None:
    uplink = Refusing()
    async with network(driver, uplink) as net:
        for refusal, seen in {
            Refusal.RESET: errno.ECONNREFUSED,
            Refusal.NET_UNREACHABLE: errno.ENETUNREACH,
            Refusal.HOST_UNREACHABLE: errno.EHOSTUNREACH,
            Refusal.PROHIBITED: errno.EHOSTUNREACH,
        }.items():
            uplink.refusal = refusal
            assert await connecting_fails(net.namespace, 80, ELSEWHERE) == seen, refusal
        await eventually(lambda: gauge(net, "tcp_connections"), 0)


@pytest.mark.parametrize(
    "uplink", [Failing(errno.ETIMEDOUT), Refusing(Refusal.DROP)], ids=["socket", "policy"]
)
@bounded
async def test_what_times_out_or_is_dropped_is_silence(driver: DriverName, uplink: Uplink) -> None:
    async with network(driver, uplink) as net, watching(net.namespace) as wire:
        with await dial(net.namespace, 80, ELSEWHERE) as guest:
            asked_later = await connecting_fails(net.namespace, closed_port())
            assert asked_later == errno.ECONNREFUSED
            assert guest.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            unanswered = port_of(guest)
        answers = wire.tcp(lambda frame, _: not frame.from_guest and frame.ports[0] != unanswered)
        assert answers
        assert [frame for frame in wire.seen if not frame.from_guest] == [frame for frame, _ in answers]
        await eventually(lambda: gauge(net, "tcp_connections"), 0)


@once
@bounded
async def test_a_connection_that_hung_is_refused_when_the_hosts_is(net: Network) -> None:
    """The host's socket hangs, and when it repeats its SYN nobody listens any more."""
    with await tcp_socket(net.namespace) as guest:
        with stuck() as (_, port):
            assert guest.connect_ex((GATEWAY, port)) == errno.EINPROGRESS
            with anyio.move_on_after(A_WHILE) as hung:
                await outcome(guest)
            assert hung.cancelled_caught
        assert await outcome(guest) == errno.ECONNREFUSED
    await eventually(lambda: gauge(net, "tcp_connections"), 0)


@bounded
async def test_a_host_found_unreachable_later_is_told(driver: DriverName) -> None:
    """The host's socket is of a namespace where nobody answers ARP."""
    async with Namespace.create() as host, TapDevice.open(host) as nobody:
        await host.configure_link(nobody.name, address=IPv4Interface("192.0.2.2/24"))
        await host.set_sysctl(f"net.ipv4.neigh.{nobody.name}.mcast_solicit", 1)
        await host.set_sysctl(f"net.ipv4.neigh.{nobody.name}.retrans_time_ms", 50)
        async with network(driver, Made(await tcp_socket(host))) as net:
            with await dial(net.namespace, 80, ELSEWHERE) as guest:
                assert await outcome(guest) == errno.EHOSTUNREACH


@once
@bounded
async def test_a_connection_that_the_host_loses_is_reset(driver: DriverName) -> None:
    """The host's is of a namespace whose loopback goes down, and gives up soon."""
    needs("ip")
    async with Namespace.create() as host:
        await host.configure_link("lo")
        with await tcp_socket(host) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            ours = await tcp_socket(host)
            ours.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, 200)
            async with network(driver, Made(ours)) as net:
                with await dial(net.namespace, port_of(listener)) as guest:
                    assert await outcome(guest) == 0
                    with await accepted(listener) as server:
                        await echoes(guest, server)
                        await host.run(["ip", "link", "set", "lo", "down"])
                        await send(guest, b"into the void")
                        assert await failure(guest) == errno.ECONNRESET


# -- 66: many that hang --------------------------------------------------------------------------------


async def one_more(namespace: Namespace, listener: socket.socket) -> float:
    """How long it takes to connect and say something."""
    with await tcp_socket(namespace) as guest:
        began = time.perf_counter()
        guest.connect_ex((GATEWAY, port_of(listener)))
        assert await outcome(guest) == 0
        with await accepted(listener) as host:
            await echoes(guest, host)
            took = time.perf_counter() - began
            reset(guest)
            assert await failure(host) == errno.ECONNRESET  # and nothing of it is left to do
    return took


def undisturbed(costs: list[float]) -> float:
    """What it costs while nothing else runs on this machine: a quarter of them."""
    return statistics.quantiles(costs, n=4)[0]


@once
@bounded
async def test_connections_that_hang_are_in_nobodys_way(driver: DriverName, every_descriptor: int) -> None:
    many = min(3000 if LONG else 1000, every_descriptor // 2)
    with ExitStack() as stack:
        _, nowhere = stack.enter_context(stuck())
        listener, _ = stack.enter_context(listening())
        async with network(driver) as crowded, network(driver) as quiet:
            for _ in range(many):
                stack.enter_context(await dial(crowded.namespace, nowhere))
            held = 0
            while held < many:  # of so many at once the tap's queue may lose some, which come again
                await anyio.sleep(0.1)
                held = (await crowded.stack.stats())["tcp_syn_held"]
            of_many: list[float] = []
            of_few: list[float] = []
            for _ in range(200):  # one by one, in turns: what else this machine does weighs on both alike
                of_many.append(await one_more(crowded.namespace, listener))
                of_few.append(await one_more(quiet.namespace, listener))
            assert held == (await crowded.stack.stats())["tcp_syn_held"] == many
    assert undisturbed(of_many) < 1.6 * undisturbed(of_few)


@bounded
async def test_of_too_many_the_connection_that_hangs_longest_makes_room(driver: DriverName) -> None:
    async with network(driver, limits=Limits(tcp_pending=5)) as net:
        with ExitStack() as guests, stuck() as (_, nowhere):
            dialling = [guests.enter_context(await dial(net.namespace, nowhere)) for _ in range(8)]
            async with pair(net.namespace) as (guest, host):  # after them, and let in all the same
                await echoes(guest, host)
                waiting = {flow.guest.port for flow in await net.stack.flows() if flow.state == "SYN-HELD"}
                # the sixth to the eighth made room, and so did the connection that was let in
                assert waiting == {port_of(sock) for sock in dialling[4:]}
                assert (await net.stack.stats())["dropped_limit_tcp_pending"] == 4


@once
@bounded
async def test_a_connection_that_hangs_is_given_up_when_its_guest_has_given_up(driver: DriverName) -> None:
    """A kernel gives a SYN up in silence.  That is noticed; one that is repeated every second is kept."""
    limits = Limits(tcp_pending_time=2.2)
    with Watched() as forgotten, Watched() as kept, stuck() as (_, nowhere):
        async with network(driver, Made(forgotten, kept), limits=limits) as net:
            with await dial(net.namespace, nowhere) as first, await dial(net.namespace, nowhere) as second:
                first.close()
                assert await anyio.to_thread.run_sync(forgotten.has_been_closed.wait, SECONDS)
                assert not kept.has_been_closed.is_set()
                assert [flow.guest.port for flow in await net.stack.flows()] == [port_of(second)]


# -- 79, 80: numbers -----------------------------------------------------------------------------------


async def first_number(namespace: Namespace, listener: socket.socket, source: int | None = None) -> int:
    """What our side of a connection begins with."""
    async with watching(namespace) as wire:
        with await dial(namespace, port_of(listener), source=source) as guest:
            _, answer = await wire.next(is_answer)
            assert await outcome(guest) == 0
            (await accepted(listener)).close()
            reset(guest)
    return answer.seq


@bounded
async def test_first_sequence_numbers_do_not_follow_from_one_another(net: Network) -> None:
    with listening() as (listener, _):
        numbers = [await first_number(net.namespace, listener) for _ in range(12)]
    steps = [(after - before) % 2**32 for before, after in pairwise(numbers)]
    near = [
        step for step in steps if step < 2**24 or step > 2**32 - 2**24
    ]  # of 11 by chance: one in a million
    assert len(near) < 4, "a counter"
    assert numbers != sorted(numbers)


@bounded
async def test_first_sequence_numbers_of_the_same_ends_grow_with_time(
    net: Network, driver: DriverName
) -> None:
    """RFC 6528: so that what is left of an old connection is never taken for the new one's."""
    source = closed_port()
    with listening() as (listener, _):
        began = time.monotonic()
        numbers = [await first_number(net.namespace, listener, source) for _ in range(5)]
        most = (time.monotonic() - began) * 250_000
        async with network(driver) as other:
            of_another_secret = await first_number(other.namespace, listener, source)
    grown = [(number - numbers[0]) % 2**32 for number in numbers]
    assert grown == sorted(set(grown))
    assert grown[-1] <= most
    assert not 0 <= (of_another_secret - numbers[0]) % 2**32 <= 4 * most


@bounded
async def test_a_port_that_the_host_has_taken_is_the_guests_to_use(net: Network) -> None:
    """Nothing is promised of the port that the host's side sees."""
    with listening() as (listener, taken), await dial(net.namespace, taken, source=taken) as guest:
        assert await outcome(guest) == 0
        assert guest.getsockname() == (GUEST, taken)
        with await accepted(listener) as host:
            assert host.getpeername()[1] != taken
            await echoes(guest, host)


# -- 81, 82: many --------------------------------------------------------------------------------------


@bounded
async def test_none_of_a_burst_of_connects_is_lost(net: Network) -> None:
    [forward] = await net.forwarder.add("127.0.0.1:0:80")
    burst = 200
    with ExitStack() as stack:
        inside = stack.enter_context(await tcp_socket(net.namespace))
        inside.bind((GUEST, 80))
        inside.listen(2 * burst)
        hosts = [stack.enter_context(socket.socket()) for _ in range(burst)]

        def connect_all() -> None:  # while nobody accepts: it is the engine's thread that does
            for host in hosts:
                host.setblocking(False)
                host.connect_ex(("127.0.0.1", forward.host_port))

        await net.stack.local.driver.call(connect_all)
        for host in hosts:
            assert await outcome(host) == 0
            await send(host, b"%d" % port_of(host))
        heard = [await receive(stack.enter_context(await accepted(inside))) for _ in hosts]
        assert sorted(heard) == sorted(b"%d" % port_of(host) for host in hosts)
        assert not any(tcp_info(host).retransmitted for host in hosts), "a SYN was lost and repeated"


@once
@bounded
async def test_a_connection_among_many_costs_what_one_among_few_does(
    driver: DriverName, every_descriptor: int
) -> None:
    many = min(3000 if LONG else 800, every_descriptor // 3)
    with ExitStack() as stack:
        listener, port = stack.enter_context(listening())
        async with network(driver) as crowded, network(driver) as quiet:
            ends = []
            for _ in range(many):
                guest = stack.enter_context(await dial(crowded.namespace, port))
                assert await outcome(guest) == 0
                ends.append((guest, stack.enter_context(await accepted(listener))))
                await echoes(*ends[-1])
            assert (await crowded.stack.stats())["tcp_established"] == many
            of_many: list[float] = []
            of_few: list[float] = []
            for _ in range(4):  # in turns: what else this machine does weighs on both
                of_many += [await one_more(crowded.namespace, listener) for _ in range(15)]
                of_few += [await one_more(quiet.namespace, listener) for _ in range(15)]
            for guest, host in ends:
                await echoes(guest, host, b"all of them")
    assert undisturbed(of_many) < 1.6 * undisturbed(of_few)
