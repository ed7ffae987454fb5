"""Endpoints of this process: an echo service at a port of the gateway, over TCP and UDP, in this one file."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address

import pytest

from netns_kit import Flow, PortInUseError, Refusal, Uplink
from netns_kit.forwarder.listeners import UdpListener
from netns_kit.forwarder.ports import PortForward
from netns_kit.gateway.endpoints import Endpoints
from netns_kit.stack import Closed, TcpConnection, UdpFlow
from netns_kit.uplink.flow import Target
from tests.support.bench import Bench, Make, friend_of
from tests.support.packets import GATEWAY, GUEST, RESOLVER, datagram
from tests.support.servers import port_of

ADDRESS, PORT = IPv4Address(GATEWAY), 7  # RFC 862


class EchoStream:
    """A connection that is sent back what it says."""

    def __init__(self, bench: Bench, connection: TcpConnection) -> None:
        self._bench, self._connection = bench, connection
        self.why: Closed | None = None

    def established(self) -> None:
        pass

    def deliver(self, data: memoryview) -> int:
        taken = min(self._connection.room(), len(data))
        if taken:
            self._connection.send(bytes(data[:taken]), self._bench.now)
        return taken

    def urgent(self, data: memoryview) -> int:
        return self.deliver(data)

    def end(self) -> None:
        self._connection.shutdown(self._bench.now)

    def writable(self) -> None:
        self._connection.resume(self._bench.now)

    def keepalive(self, idle: float) -> None:
        pass

    def traffic_class(self, tos: int) -> None:
        pass

    def closed(self, why: Closed) -> None:
        self.why = why


class Echo:
    """The service."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.streams: list[EchoStream] = []
        self.expirations = 0
        bench.gateway.endpoints.serve_tcp(ADDRESS, PORT, self.tcp_opened)
        bench.gateway.endpoints.serve_udp(ADDRESS, PORT, self.udp_opened)

    def tcp_opened(self, connection: TcpConnection, target: Target) -> None:
        connection.user = stream = EchoStream(self._bench, connection)
        self.streams.append(stream)
        connection.accept(self._bench.now)

    def udp_opened(self, flow: UdpFlow, target: Target) -> None:
        flow.user = self

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        flow.send(bytes(payload), self._bench.now, segment_size=segment_size)

    def expired(self, flow: UdpFlow) -> None:
        self.expirations += 1


def test_a_stream_comes_back(make: Make) -> None:
    bench = make(Uplink())
    Echo(bench)
    program = bench.connect(GATEWAY, PORT)
    bench.until(lambda: program.is_established)
    said = bytes(range(256)) * 1000
    program.send(said)
    bench.until(lambda: len(program.received) == len(said))
    assert bytes(program.received) == said
    program.shutdown()
    bench.until(lambda: program.ended)
    (flow,) = bench.gateway.flows()
    assert (str(flow.remote), flow.direction, flow.host) == (f"{ADDRESS}:{PORT}", "outbound", None)


def test_a_datagram_comes_back(make: Make) -> None:
    bench = make(Uplink())
    Echo(bench)
    mailbox, flow = bench.socket(GATEWAY, PORT)
    flow.send(b"hello", bench.now)
    bench.until(lambda: mailbox.received)
    assert mailbox.received == [b"hello"]


def test_it_takes_no_descriptor(make: Make) -> None:
    bench = make(Uplink())
    Echo(bench)
    descriptors = bench.engine.descriptors
    program = bench.connect(GATEWAY, PORT)
    bench.until(lambda: program.is_established)
    assert bench.engine.descriptors == descriptors


def test_the_policy_is_asked_first_and_told(make: Make) -> None:
    asked: list[tuple[str, bool]] = []

    def policy(flow: Flow) -> Refusal | None:
        asked.append((flow.protocol, flow.served))
        return Refusal.RESET

    bench = make(Uplink(policy=policy))
    echo = Echo(bench)
    program = bench.connect(GATEWAY, PORT)
    mailbox, flow = bench.socket(GATEWAY, PORT)
    flow.send(b"hello", bench.now)
    bench.until(lambda: program.why)
    bench.settle()
    assert program.why is Closed.RESET
    assert not echo.streams
    assert not mailbox.received
    assert asked == [("tcp", True), ("udp", True)]
    assert bench.gateway.stats()["flows_refused"] == 2


def test_a_policy_that_fails_refuses(make: Make) -> None:
    def policy(flow: Flow) -> Refusal | None:
        raise LookupError("a bug")

    bench = make(Uplink(policy=policy))
    echo = Echo(bench)
    program = bench.connect(GATEWAY, PORT)
    bench.until(lambda: program.why)
    assert not echo.streams


def test_another_port_and_protocol_leave_by_the_uplink(make: Make) -> None:
    flows: list[Flow] = []

    class Spying(Uplink):
        def route(self, flow: Flow) -> Target | Refusal:
            flows.append(flow)
            return super().route(flow)

    bench = make(Spying())
    echo = Echo(bench)
    programs = [bench.connect(GATEWAY, PORT + 1), bench.connect(RESOLVER, PORT, 40001)]
    bench.until(lambda: all(program.why for program in programs))
    assert not echo.streams
    assert not any(flow.served for flow in flows)


def test_who_is_told_to_end_a_flow_ends_it(make: Make) -> None:
    bench = make(Uplink())
    echo = Echo(bench)
    program = bench.connect(GATEWAY, PORT)
    bench.until(lambda: program.is_established)
    _, flow = bench.socket(GATEWAY, PORT)
    flow.send(b"hello", bench.now)
    bench.until(lambda: len(bench.gateway.flows()) == 2)
    for each in bench.gateway.flows():
        assert bench.gateway.end_flow(each.id)
    bench.until(lambda: program.why)
    assert echo.streams[0].why is Closed.ABORTED
    assert echo.expirations == 1


def test_the_end_of_the_gateway_is_the_end_of_its_streams(make: Make) -> None:
    bench = make(Uplink())
    echo = Echo(bench)
    program = bench.connect(GATEWAY, PORT)
    bench.until(lambda: program.is_established)
    bench.gateway.close()
    bench.until(lambda: program.why)
    assert echo.streams[0].why is Closed.ABORTED


def test_a_target_of_nobody_is_refused_where_nobody_answers(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class Nowhere(Uplink):
        def route(self, flow: Flow) -> Target | Refusal:
            return Target()

    bench = make(Nowhere())
    program = bench.connect(GATEWAY, PORT)
    _, flow = bench.socket(GATEWAY, PORT)
    flow.send(b"hello", bench.now)
    bench.until(lambda: program.why)
    assert "Target without candidates" in caplog.text
    bench.settle()
    assert not bench.gateway.flows()


@pytest.mark.parametrize("way", ["published", "full cone"])
def test_nobody_outside_opens_a_flow_that_is_answered_here(make: Make, way: str) -> None:
    """Through that flow the guest would ask the one outside, not whom it is redirected to."""
    bench = make(Uplink(allow_host_loopback=True, udp_filtering="endpoint-independent"))
    stats = bench.gateway.stats
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as friend, friend_of(friend) as stranger:
        friend.bind(("127.0.0.1", 0))
        if way == "published":
            listener = UdpListener(bench.gateway, PortForward("udp", "127.0.0.1", 0, None, 7))
            address = ("127.0.0.1", listener.forward.host_port)
        else:
            bench.inject(datagram(GATEWAY, port_of(friend)))
            bench.settle()
            _, address = friend.recvfrom(64)
        flows = stats()["udp_flows"]
        bench.gateway.endpoints.redirect(port_of(stranger), (IPv4Address("10.0.2.3"),))
        stranger.sendto(b"hello?", address)
        bench.until(lambda: stats().get("dropped_udp_filtered"))
        assert stats()["udp_flows"] == flows
        friend.sendto(b"hello?", address)
        bench.settle()
        assert stats()["udp_flows"] == 1
        if way == "published":
            listener.close()


def test_an_address_and_port_have_one_handler() -> None:
    endpoints = Endpoints()
    endpoints.serve_tcp(ADDRESS, PORT, lambda connection, target: None)
    endpoints.serve_udp(ADDRESS, PORT, lambda flow, target: None)
    with pytest.raises(PortInUseError, match=r"10\.0\.2\.2 port 7/tcp"):
        endpoints.serve_tcp(ADDRESS, PORT, lambda connection, target: None)


def test_addresses_of_both_families_are_told_apart() -> None:
    endpoints, tail = Endpoints(), b"\x9c\x40\0\x07"
    endpoints.serve_tcp(ADDRESS, PORT, lambda connection, target: None)
    assert endpoints.claim_tcp(GUEST + GATEWAY + tail) is not None
    assert endpoints.claim_tcp(bytes(16) + bytes(12) + GATEWAY + tail) is None
    assert endpoints.claim_udp(GUEST + GATEWAY + tail) is None
