"""FlowRouter: what becomes of a flow, for each answer of the uplink, of a handler and about descriptors."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from netns_kit.arguments import Address
from netns_kit.gateway.endpoints import UdpHandler
from netns_kit.gateway.flow_router import EPHEMERAL, FlowRouter, endpoints_of
from netns_kit.gateway.relay import PingRelay, TcpRelay, UdpRelay
from netns_kit.gateway.worker_links import WorkerLinks, connect
from netns_kit.stack import AnyFlow, Ending, Limits, Refusal, TcpConnection, Transport, UdpFlow
from netns_kit.stack.tcp import PROMPT
from netns_kit.stack.wire import ethernet, flow_key, icmp, ip
from netns_kit.uplink.dial import Dial
from netns_kit.uplink.flow import Endpoint, Flow, Target, Way
from tests.support.bench import SUBNET, Bench, Make
from tests.support.packets import GATEWAY, GATEWAY_MAC, GUEST, PORT, RESOLVER, datagram, echo_request, syn
from tests.support.told import Told

pytestmark = pytest.mark.usefixtures("leaks")

FAR, ELSEWHERE = bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2))
TRANSPORTS: tuple[Transport, ...] = ("tcp", "udp", "icmp")
UNREACHABLE = {
    Refusal.NET_UNREACHABLE: icmp.NET,
    Refusal.HOST_UNREACHABLE: icmp.HOST,
    Refusal.PROHIBITED: icmp.PROHIBITED,
}


@pytest.fixture
def uplink(leaks: None) -> Iterator[Told]:
    uplink = Told()
    yield uplink
    for peer in uplink.peers:
        peer.close()


@pytest.fixture
def bench(make: Make, uplink: Told) -> Bench:
    bench = make(uplink)
    bench.stop_the_clock()
    return bench


@pytest.fixture
def full(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """No descriptor is left."""
    monkeypatch.setattr(bench.gateway.router.admission, "admit", lambda make_room: make_room())
    return bench


def key(port: int = 80, address: bytes = FAR, guest_port: int = PORT, guest: bytes = GUEST) -> bytes:
    return flow_key.FlowKey(guest, address, guest_port, port).pack()


def begin(bench: Bench, transport: Transport) -> None:
    """The guest opens a flow to FAR."""
    if transport == "tcp":
        bench.connect(FAR, 80)
    else:
        bench.inject(datagram(FAR, 80) if transport == "udp" else echo_request(FAR))


def told(bench: Bench) -> list[int | str]:
    """What the guest is told: the code of "unreachable", or "reset"."""
    bench.settle()
    found: list[int | str] = []
    for answer in bench.answers():
        if answer.protocol == ip.TCP:
            assert answer.payload[13] & 4, "no reset"
            found.append("reset")
        else:
            message = icmp.parse(answer.payload)
            assert message.type == icmp.UNREACHABLE
            found.append(message.code)
    return found


def flows(bench: Bench, transport: Transport) -> Mapping[bytes, AnyFlow]:
    stack = bench.gateway.stack
    found: dict[str, Mapping[bytes, AnyFlow]] = {"tcp": stack.tcp, "udp": stack.udp, "icmp": stack.echo}
    return found[transport]


# -- what may pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transport", "relay"), [("tcp", TcpRelay), ("udp", UdpRelay), ("icmp", PingRelay)])
def test_what_may_pass_has_a_relay(bench: Bench, uplink: Told, transport: Transport, relay: type) -> None:
    """The uplink is told of the flow as the guest sees it, and asked for a socket to where it has sent it."""
    uplink.said = Target((Endpoint(ip_address(ELSEWHERE), 8080),))
    begin(bench, transport)
    bench.settle()
    [flow] = flows(bench, transport).values()
    assert isinstance(flow.user, relay)
    guest_port, port = (PORT, 80) if transport != "icmp" else (7, 0)
    source, destination = Endpoint(ip_address(GUEST), guest_port), Endpoint(ip_address(FAR), port)
    assert uplink.asked == [Flow(transport, source, destination, SUBNET, False)]
    local = {"tcp": 8080, "udp": PORT, "icmp": 0}[transport]
    assert uplink.opened == [(transport, "192.0.2.2", local)]
    if transport == "icmp":
        assert [sink.connected for sink in uplink.sinks] == [("192.0.2.2", 0)]
    assert bench.gateway.router.refused == 0


def test_one_socket_is_one_endpoint_of_the_guests(bench: Bench, uplink: Told) -> None:
    for port in (80, 81):
        bench.inject(datagram(FAR, port))
        bench.settle()
    assert len(uplink.opened) == 1
    assert len({flow.user for flow in bench.gateway.stack.udp.values()}) == 1
    uplink.said = Target((Endpoint(ip_address("127.0.0.1"), 9),))
    bench.inject(datagram(FAR, 82))  # the host's own programs are reached from another socket
    bench.settle()
    assert [address for _, address, _ in uplink.opened] == ["192.0.2.1", "127.0.0.1"]


def test_who_serves_is_asked_about_and_has_the_flow(bench: Bench, uplink: Told, full: Bench) -> None:
    """It takes no descriptor: none is left."""
    served: list[tuple[bytes, Target]] = []

    def udp(flow: UdpFlow, target: Target) -> Refusal | None:
        served.append((flow.key, target))
        return Refusal.HOST_UNREACHABLE

    def tcp(connection: TcpConnection, target: Target) -> None:
        served.append((connection.key, target))
        connection.refuse(Refusal.HOST_UNREACHABLE)

    handler: UdpHandler = udp
    bench.gateway.endpoints.serve_udp(ip_address(FAR), 80, handler)
    bench.gateway.endpoints.serve_tcp(ip_address(FAR), 80, tcp)
    begin(bench, "udp")
    begin(bench, "tcp")
    assert told(bench) == [icmp.HOST, icmp.HOST], "what the handlers say"
    assert served == [(key(), Target((Endpoint(ip_address(FAR), 80),)))] * 2
    assert [flow.served for flow in uplink.asked] == [True, True]
    assert uplink.opened == []


def test_what_is_redirected_is_a_flow_to_there(bench: Bench, uplink: Told) -> None:
    bench.gateway.endpoints.redirect(53, (ip_address(RESOLVER),))
    uplink.said = Refusal.PROHIBITED
    bench.inject(datagram(FAR, 53))
    bench.inject(syn(FAR, 53))
    assert told(bench) == [icmp.PROHIBITED] * 2
    assert [str(flow.destination) for flow in uplink.asked] == ["10.0.2.3:53"] * 2


def test_a_flow_that_has_been_served_for_a_while_is_asked_about_again(bench: Bench, uplink: Told) -> None:
    bench.gateway.endpoints.redirect(53, (ip_address(RESOLVER),))
    router = bench.gateway.router
    assert router.route_served("udp", key(53)) == Target((Endpoint(ip_address(RESOLVER), 53),))
    uplink.said = Refusal.DROP
    assert router.route_served("udp", key(53)) is Refusal.DROP
    assert [(str(flow.destination), flow.served) for flow in uplink.asked] == [("10.0.2.3:53", True)] * 2


# -- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("refusal", Refusal)
def test_what_the_policy_refuses(bench: Bench, uplink: Told, refusal: Refusal, transport: Transport) -> None:
    uplink.said = refusal
    begin(bench, transport)
    if refusal is Refusal.DROP:
        expected: list[int | str] = []
    elif refusal is Refusal.RESET:
        expected = ["reset" if transport == "tcp" else icmp.PORT]
    else:
        expected = [UNREACHABLE[refusal]]
    assert told(bench) == expected
    assert bench.gateway.flows() == ()
    assert uplink.opened == []
    assert bench.gateway.router.refused == bench.gateway.stats()["flows_refused"] == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "said",
    [LookupError("a bug"), SystemExit("a program's"), asyncio.CancelledError(), Target(()), True],
    ids=repr,
)
def test_an_uplink_that_fails_to_decide_refuses_and_is_told_of_once(
    bench: Bench, uplink: Told, transport: Transport, said: object, caplog: pytest.LogCaptureFixture
) -> None:
    uplink.said = said  # type: ignore[assignment]  # as callers who check no types do
    for _ in range(2):
        begin(bench, transport)
        assert told(bench) == [icmp.PROHIBITED]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "failed to decide about" in caplog.text
    assert uplink.opened == []
    assert bench.gateway.router.refused == 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_uplink_that_fails_to_open_refuses_and_ends_nothing(
    bench: Bench, uplink: Told, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    uplink.failure = LookupError("a bug")
    for _ in range(2):
        begin(bench, transport)
        assert told(bench) == [icmp.PROHIBITED if transport == "tcp" else icmp.HOST]
    assert len(caplog.records) == 1
    uplink.failure = None
    begin(bench, transport)
    bench.settle()
    assert len(flows(bench, transport)) == 1, "the next one is carried"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("when", ["decides", "opens"])
def test_an_interrupt_from_the_keyboard_is_the_programs(make: Make, transport: Transport, when: str) -> None:
    uplink = Told(KeyboardInterrupt() if when == "decides" else None)
    uplink.failure = KeyboardInterrupt()
    bench = make(uplink)
    begin(bench, transport)
    with pytest.raises(KeyboardInterrupt):
        bench.settle()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_flow_for_which_no_descriptor_is_left(
    full: Bench, uplink: Told, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked about, and then refused as if there were no network; the log says why, once."""
    for _ in range(2):
        begin(full, transport)
        assert told(full) == [icmp.NET]
    assert len(uplink.asked) == 2
    assert uplink.opened == []
    assert full.gateway.router.refused == 2
    assert [record.getMessage() for record in caplog.records] == [
        "out of file descriptors (RLIMIT_NOFILE): new flows are refused"
    ]


# -- room ---------------------------------------------------------------------------------------------


def held(bench: Bench, monkeypatch: pytest.MonkeyPatch, *sources: int) -> None:
    """SYNs whose fate is not decided: the oldest first."""

    class Hanging:
        def __init__(self) -> None:
            self.fd, self._other = os.pipe()

        def fileno(self) -> int:
            return self.fd

        def advance(self, *, failed: bool) -> Dial:
            return self

        def close(self) -> None:
            if self.fd >= 0:
                os.close(self.fd)
                os.close(self._other)
                self.fd = -1

    monkeypatch.setattr(bench.uplink, "dial", lambda *_, **__: Hanging())
    for source in sources:
        bench.connect(FAR, 80, source)
        bench.settle()


def guest_ports(bench: Bench, transport: Transport) -> list[int]:
    return [flow_key.parse(each).guest_port for each in flows(bench, transport)]


def datagrams(bench: Bench, *sources: int) -> None:
    for source in sources:
        bench.ahead += 1
        bench.inject(datagram_from(source))
        bench.settle()


def datagram_from(source: int) -> bytes:
    sent = bytearray(datagram(FAR, 80))
    sent[20:22] = source.to_bytes(2, "big")
    sent[26:28] = bytes(2)  # no checksum
    return bytes(sent)


def test_the_datagram_flow_idle_longest_makes_room(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes before a connection that hangs, where those are few; the flow that needs the room is spared."""
    datagrams(bench, 1001, 1002, 1003)
    held(bench, monkeypatch, 2001)
    router = bench.gateway.router
    assert router._evict(key(guest_port=1001))
    assert guest_ports(bench, "udp") == [1001, 1003]
    assert guest_ports(bench, "tcp") == [2001]
    assert bench.gateway.stack.dropped["limit-descriptors"] == 1


def test_a_connection_that_hangs_makes_room_where_they_have_most(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    datagrams(bench, 1001)
    held(bench, monkeypatch, 2001, 2002, 2003)
    router = bench.gateway.router
    router.admission.most = 4
    assert router._evict(key(guest_port=2001))
    assert guest_ports(bench, "tcp") == [2001, 2003], "the oldest but for the one that needs the room"
    assert guest_ports(bench, "udp") == [1001]
    assert router._evict(b"")
    assert guest_ports(bench, "udp") == [], "two of four are no longer more than half"


def test_a_connection_that_hangs_makes_room_where_nothing_else_is_idle(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    held(bench, monkeypatch, 2001, 2002)
    router = bench.gateway.router
    assert router._evict(b"")
    assert guest_ports(bench, "tcp") == [2002]
    assert not router._evict(key(guest_port=2002)), "nobody but the one that needs it"
    assert guest_ports(bench, "tcp") == [2002]
    assert bench.gateway.stack.dropped["limit-descriptors"] == 1


def test_a_handshake_that_may_still_end_well_is_left_alone(bench: Bench) -> None:
    """The guest has not answered our SYN|ACK: it gets its time."""
    nobody = ethernet.pack(GATEWAY_MAC, b"\2\0\0\0\0\1", ethernet.IPV4)
    bench.far.write(bench.header, nobody, syn(FAR, 80, GUEST[:3] + b"\x65"))
    bench.settle()
    [connection] = bench.gateway.stack.pending.values()
    assert not connection.is_on_hold
    router = bench.gateway.router
    assert not router._evict(b"")
    bench.ahead += 2 * PROMPT
    bench.step()
    assert router._evict(b"")
    assert not bench.gateway.stack.tcp


def test_what_is_owed_to_another_gateway_is_an_idle_flow_or_the_oldest_connection(bench: Bench) -> None:
    programs = [bench.connect(FAR, 80, source) for source in (2001, 2002)]
    bench.until(lambda: all(program.is_established for program in programs))
    datagrams(bench, 1001)
    router = bench.gateway.router
    router._give_up()
    assert (guest_ports(bench, "udp"), guest_ports(bench, "tcp")) == ([], [2001, 2002])
    router._give_up()
    assert guest_ports(bench, "tcp") == [2002]
    assert bench.gateway.stack.dropped["limit-descriptors"] == 2


# -- datagrams by what is there already ---------------------------------------------------------------


class Port:
    """A published port, bound to `host`, by which what goes to `leads` may leave."""

    def __init__(self, host: str, leads: bool = True) -> None:
        self._host, self._leads = host, leads
        self.carried: list[tuple[bytes, Endpoint, Way]] = []

    @property
    def host(self) -> Address:
        return ip_address(self._host)

    def way_to(self, target: Address, guest: bytes) -> Way | None:
        assert guest == GUEST
        return Way(str(target), 0) if self._leads else None

    def add(self, flow: UdpFlow, target: Endpoint, way: Way) -> None:
        self.carried.append((flow.key, target, way))


@pytest.mark.parametrize(
    ("ports", "carries"),
    [
        ([Port("127.0.0.5")], 0),
        ([Port("127.0.0.5", leads=False)], None),
        ([Port("127.0.0.5", leads=False), Port("127.0.0.6")], 1),
        ([Port("127.0.0.5"), Port("0.0.0.0"), Port("127.0.0.1")], 2),  # the host would send from that
        ([Port("127.0.0.5"), Port("127.0.0.6"), Port("0.0.0.0")], 2),
        ([Port("127.0.0.5"), Port("127.0.0.6")], 0),  # the oldest
    ],
)
def test_what_comes_from_a_published_port_leaves_by_it(
    bench: Bench, uplink: Told, ports: list[Port], carries: int | None
) -> None:
    uplink.said = Target((target := Endpoint(ip_address("127.0.0.1"), 9),))
    bench.gateway.router.published[PORT] = list(ports)
    bench.inject(datagram(FAR, 80))
    bench.settle()
    for number, port in enumerate(ports):
        assert port.carried == ([(key(), target, Way("127.0.0.1", 0))] if number == carries else [])
    assert len(uplink.opened) == (carries is None), "else by a socket of its own"


def test_a_port_that_is_published_is_left_by_what_has_it(bench: Bench) -> None:
    datagrams(bench, 1001)
    router = bench.gateway.router
    [flow] = bench.gateway.stack.udp.values()
    relay = flow.user
    assert isinstance(relay, UdpRelay)
    assert relay.port
    assert not router.leave_udp_port(relay.port + 1)
    assert router.leave_udp_port(relay.port)
    assert not bench.gateway.stack.udp
    datagrams(bench, 1001)
    assert len(bench.gateway.stack.udp) == 1, "the next goes by a new socket"


# -- clients outside ----------------------------------------------------------------------------------


def test_a_client_has_its_own_port_or_another_if_it_is_taken(bench: Bench) -> None:
    router = bench.gateway.router
    mine = key(5000)
    assert router.free_key(mine, {}) == mine
    taken = {mine: 0, key(EPHEMERAL[0]): 0}
    assert router.free_key(mine, taken) == key(EPHEMERAL[1])
    with pytest.raises(KeyError):
        router.free_key(mine, {mine: 0, **{key(port): 0 for port in EPHEMERAL}})


@pytest.fixture
def links(leaks: None) -> Iterator[WorkerLinks]:
    with ExitStack() as stack:
        yield connect(2, stack)[0]


def test_another_port_is_one_that_this_worker_owns(make: Make, links: WorkerLinks) -> None:
    """Of connections; what has datagrams is this worker's in any case."""
    bench = make(peers=links)
    router, tcp = bench.gateway.router, bench.gateway.stack.tcp
    steering = bench.gateway.stack.steering
    others = next(port for port in range(1, PORT) if steering.owner(key(EPHEMERAL[0], guest_port=port)))
    mine = key(5000, guest_port=others)
    owned = [
        each for port in EPHEMERAL if steering.owner(each := key(port, guest_port=others)) == steering.index
    ]
    tcp[mine] = None  # type: ignore[assignment]  # so that it is taken
    try:
        assert router.free_key(mine, tcp) == owned[0]
        assert router.free_key(mine, {mine: 0}) == key(EPHEMERAL[0], guest_port=others)
    finally:
        del tcp[mine]


def test_a_client_is_reset_if_the_table_is_full(make: Make, uplink: Told) -> None:
    bench = make(uplink, limits=Limits(tcp_connections=1))
    bench.connect(FAR, 80)
    bench.settle()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        bench.gateway.router.tcp_accepted(key(5000), server.accept()[0])
        client.settimeout(20)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert len(bench.gateway.stack.tcp) == 1


# -- the end, and what is told ------------------------------------------------------------------------


def test_what_is_told_is_told_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, BaseException | None]] = []
    router: FlowRouter = make().gateway.router
    monkeypatch.setattr(router, "_tell", lambda *what: said.append(what))
    first, second, third = LookupError("one"), LookupError("two"), ValueError("three")
    for error in (first, second, third):
        router.notice("refused: the uplink failed to decide about this flow", error)
        router.notice("refused: the uplink failed to decide about that flow", error)
        router.notice("out of descriptors")
    about = "refused: the uplink failed to decide about this flow"
    assert said == [(about, first), ("out of descriptors", None), (about, third)]


@pytest.mark.parametrize("reset", [True, False])
def test_a_connection_that_is_ended_is_reset_to_the_guest_and_if_asked_to_its_peer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    program = bench.connect(FAR, 80)
    bench.until(lambda: program.is_established)
    [connection] = bench.gateway.stack.tcp.values()
    asked: list[bool] = []
    abort = TcpRelay.abort

    def noted(relay: TcpRelay, *, reset: bool = False, ending: Ending = "ended") -> None:
        asked.append(reset)
        abort(relay, reset=reset, ending=ending)

    monkeypatch.setattr(TcpRelay, "abort", noted)
    bench.gateway.router.abort(connection, reset=reset)
    bench.until(lambda: program.why)
    assert asked == [reset]
    assert not bench.gateway.stack.tcp


def test_all_flows_end_with_the_router(bench: Bench, uplink: Told) -> None:
    program = bench.connect(FAR, 80)
    bench.until(lambda: program.is_established)
    datagrams(bench, 1001)
    bench.inject(echo_request(FAR))
    bench.settle()
    assert [flow.protocol for flow in bench.gateway.flows()] == ["tcp", "udp", "icmp"]
    router = bench.gateway.router
    router.reset_connections()
    router.close()
    assert bench.gateway.flows() == ()
    assert router.admission not in router.admission._members


def test_the_ends_of_a_flow_are_read_from_its_key() -> None:
    assert endpoints_of(key(80, GATEWAY)) == (
        Endpoint(ip_address(GUEST), PORT),
        Endpoint(ip_address(GATEWAY), 80),
    )
    guest, remote = ip_address("fd00::100"), ip_address("2001:db8::7")
    assert endpoints_of(key(443, remote.packed, 5, guest.packed)) == (
        Endpoint(guest, 5),
        Endpoint(remote, 443),
    )


def test_the_hosts_errors_are_the_guests(
    bench: Bench, uplink: Told, caplog: pytest.LogCaptureFixture
) -> None:
    """Descriptors that run out between two looks at them, and a ping socket that is not permitted, are told."""
    for number, code, said in (
        (errno.EHOSTUNREACH, icmp.HOST, 0),
        (errno.ENETUNREACH, icmp.NET, 0),
        (errno.EADDRNOTAVAIL, icmp.NET, 0),
        (errno.ENFILE, icmp.NET, 1),
        (errno.EMFILE, icmp.NET, 1),
        (errno.EACCES, icmp.PROHIBITED, 2),
    ):
        uplink.failure = OSError(number, os.strerror(number))
        for transport in ("udp", "icmp"):
            begin(bench, transport)
            assert told(bench) == [code]
        assert len(caplog.records) == said
    assert "net.ipv4.ping_group_range" in caplog.text
