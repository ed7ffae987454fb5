"""What an unlucky host, a hostile guest or a broken policy may do to the gateway.  Each of these once went wrong."""

from __future__ import annotations

import logging
import resource
import socket
from collections.abc import Iterator

import pytest

from netns_kit.engine import EDGE, IN, OUT, Engine
from netns_kit.stack import Closed, Refusal
from netns_kit.stack.wire import ethernet, icmp, ip, udp, virtio
from netns_kit.uplink import Flow, Target, Uplink
from tests.servers import reset
from tests.test_gateway import (
    GATEWAY,
    GATEWAY_MAC,
    GUEST,
    GUEST_MAC,
    PORT,
    RESOLVER,
    Bench,
    Make,
    datagram,
    listener,
    make,
    opened,
    port_of,
    syn,
)

__all__ = ["listener", "make"]  # fixtures

OUTSIDE = bytes((192, 0, 2, 1))


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


def prohibited(bench: Bench) -> bool:
    bench.settle()
    [answer] = bench.answers()
    return answer.protocol == ip.ICMP and bytes(answer.payload[:2]) == bytes(
        (icmp.UNREACHABLE, icmp.PROHIBITED)
    )


def raising(flow: Flow) -> Refusal | None:
    raise ValueError("a bug in the policy")


def wrong(flow: Flow) -> Refusal | None:
    return True  # type: ignore[return-value]  # as callers who check no types do


class Nowhere(Uplink):
    def route(self, flow: Flow) -> Target | Refusal:
        return Target(())


@pytest.mark.parametrize("uplink", [Uplink(policy=raising), Uplink(policy=wrong), Nowhere()])
def test_an_uplink_that_fails_refuses_and_is_logged_once(
    make: Make, uplink: Uplink, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make(uplink)
    for port in (80, 81, 82):
        bench.inject(syn(OUTSIDE, port))
        assert prohibited(bench)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert bench.gateway.stats()["flows_refused"] == 3


def test_a_policy_is_asked_about_names_too(make: Make) -> None:
    bench = make(Uplink(policy=lambda flow: Refusal.PROHIBITED, dns=["127.0.0.1:9"]))
    bench.inject(datagram(RESOLVER, 53))
    assert prohibited(bench)


def test_a_datagram_too_long_for_the_host(make: Make) -> None:
    """Fragments can add up to more than a datagram may carry; the error each send meets is that send's own."""
    bench = make()
    size = 65520
    layer4 = udp.HEADER.pack(PORT, 9, udp.SIZE + size, 0) + bytes(size)
    for at in range(0, len(layer4), 1480):
        piece = layer4[at : at + 1480]
        field = at >> 3 | (at + 1480 < len(layer4)) << 13
        header = ip.pack_ipv4(GUEST + GATEWAY, ip.UDP, len(piece), identification=7, fragment=field)
        bench.inject(header + piece)
        bench.settle()
    assert bench.gateway.stats()["udp_flows"] == 1


def test_a_super_datagram_of_crumbs_is_dropped(make: Make) -> None:
    bench = make()
    crumbs = virtio.pack(virtio.NEEDS_CSUM, virtio.GSO_UDP_L4, 42, 1, 34, 6)
    frame = ethernet.pack(GATEWAY_MAC, GUEST_MAC, ethernet.IPV4) + datagram(GATEWAY, 9, bytes(65000))
    bench.far.write(crumbs + frame)
    bench.settle()
    assert bench.gateway.stats()["dropped_udp_segments"] == 1
    assert bench.gateway.flows() == ()


def test_a_resolver_on_an_interface_that_is_gone(make: Make) -> None:
    bench = make(Uplink(dns=["[fe80::1%nosuch0]:53"]))
    bench.inject(syn(RESOLVER, 53))
    bench.settle()
    assert [answer.protocol for answer in bench.answers()] == [ip.ICMP], "unreachable, and no crash"


def test_an_urgent_mark_does_not_stop_the_rest(make: Make, listener: socket.socket) -> None:
    bench = make()
    program, sock = opened(bench, listener)
    with sock:
        sock.send(b"abc")
        sock.send(b"X", socket.MSG_OOB)
        sock.send(b"defgh")
        bench.until(lambda: len(program.received) >= 9)
        assert bytes(program.received) == b"abcXdefgh"


def test_what_came_before_a_reset_is_delivered(make: Make, listener: socket.socket) -> None:
    bench = make()
    program, sock = opened(bench, listener)
    sock.sendall(b"413 too large")
    reset(sock)
    bench.until(lambda: program.why)
    assert program.why is Closed.RESET
    assert bytes(program.received) == b"413 too large"


def test_a_guest_cannot_take_every_descriptor(
    make: Make, monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 20))
    bench = make()
    for port in range(1, 40):
        bench.inject(datagram(GATEWAY, port))
        bench.settle()
    stats = bench.gateway.stats()
    assert stats["udp_flows"] == 10, "half of the limit, where that is small"
    assert stats["dropped_limit_descriptors"] == 29, "the ones idle longest make room"
    programs = [bench.connect(GATEWAY, port_of(listener), source) for source in range(20001, 20016)]
    bench.until(lambda: all(program.is_established or program.why for program in programs))
    stats = bench.gateway.stats()
    assert (stats["tcp_connections"], stats["udp_flows"]) == (10, 0), (
        "connections are not taken from each other"
    )
    assert stats["flows_refused"] == 5


def test_a_reused_descriptor_does_not_get_the_old_ones_event(engine: Engine) -> None:
    """Two are ready; the first's handler replaces the second by a new socket, which gets the same number."""
    got: list[int] = []
    first, wakes_first = socket.socketpair()
    second, wakes_second = socket.socketpair()
    made: list[socket.socket] = []

    def replace(_: int) -> None:
        number = second.fileno()
        engine.remove(number)
        second.close()
        made.append(socket.socket())
        assert made[0].fileno() == number
        engine.add(number, got.append, IN | OUT | EDGE)

    with first, wakes_first, wakes_second:
        engine.add(first.fileno(), replace, IN)
        engine.add(second.fileno(), got.append, IN)
        wakes_first.send(b"1")
        wakes_second.send(b"2")
        engine.dispatch(engine.poll(1), 1.0)
        assert got == []
        for sock in made:
            engine.remove(sock.fileno())
            sock.close()
