"""The gateway on a fake link: the guest is a second stack of ours, or frames made by hand; the host is real."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from netns_kit.arguments import Address
from netns_kit.errors import DeviceGone
from netns_kit.gateway.engine import EVENTS_PER_STEP, IN
from netns_kit.gateway.frame_pump import FRAMES_PER_STEP
from netns_kit.gateway.relay.udp import UdpRelay
from netns_kit.stack import Closed, Limits
from netns_kit.stack.user import Transport
from netns_kit.stack.wire import ethernet, icmp, ip, tcp, udp, virtio
from netns_kit.uplink.uplink import Uplink
from tests.support import needs_ping
from tests.support.bench import Bench, Make, Spy, feed, opened, readable, receive
from tests.support.packets import (
    GATEWAY,
    GATEWAY_MAC,
    GUEST,
    GUEST_MAC,
    PORT,
    RESOLVER,
    datagram,
    echo_request,
    packet,
    syn,
)
from tests.support.servers import SECONDS, closed_port, dns_server, port_of, reset

pytestmark = pytest.mark.usefixtures("leaks")

# -- TCP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vnet_header", [True, False])
@pytest.mark.parametrize("mtu", [576, 1500, 65520])
def test_a_connection_carries_bytes_both_ways(
    make: Make, listener: socket.socket, vnet_header: bool, mtu: int
) -> None:
    bench = make(vnet_header=vnet_header, mtu=mtu)
    program, sock = opened(bench, listener)
    there, back = os.urandom(300_000), os.urandom(300_000)
    with sock:
        program.send(there)
        assert receive(bench, sock, len(there)) == there
        feed(bench, sock, back)
        bench.until(lambda: len(program.received) == len(back))
        assert program.received == back
        program.shutdown()
        bench.until(lambda: readable(sock))
        assert sock.recv(1) == b""
        sock.shutdown(socket.SHUT_WR)
        bench.until(lambda: program.ended)
        assert [flow.state for flow in bench.gateway.flows()] in ([], ["TIME-WAIT"], ["LAST-ACK"])


@pytest.mark.parametrize("first", ["guest", "host"])
def test_half_a_connection_stays_open(make: Make, listener: socket.socket, first: str) -> None:
    bench = make()
    program, sock = opened(bench, listener)
    with sock:
        if first == "guest":
            program.shutdown()
            bench.until(lambda: readable(sock))
            assert sock.recv(1) == b""
            feed(bench, sock, b"said later" * 50_000)
            sock.shutdown(socket.SHUT_WR)
            bench.until(lambda: program.ended)
            assert program.received == b"said later" * 50_000
        else:
            sock.shutdown(socket.SHUT_WR)
            bench.until(lambda: program.ended)
            program.send(b"said later" * 50_000)
            program.shutdown()
            assert receive(bench, sock, 500_000) == b"said later" * 50_000
            bench.until(lambda: readable(sock))
            assert sock.recv(1) == b""


def test_the_guests_reset_is_the_hosts(make: Make, listener: socket.socket) -> None:
    bench = make()
    program, sock = opened(bench, listener)
    with sock:
        program.abort()
        bench.until(lambda: readable(sock))
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert bench.gateway.flows() == ()


@pytest.mark.parametrize("is_filled", [True, False])
def test_a_hole_is_reported_when_the_device_has_been_read_once_more(
    make: Make, listener: socket.socket, is_filled: bool
) -> None:
    """The frame that fills it may be the next one: a guest's processors send frames in the wrong order."""
    bench = make()
    program, sock = opened(bench, listener)
    assert program.connection is not None
    snd, rcv = program.connection.snd, program.connection.rcv

    def inject(offset: int) -> None:
        header = tcp.pack(
            src_port=PORT,
            dst_port=port_of(listener),
            seq=(snd.nxt + offset) & 0xFFFFFFFF,
            ack=rcv.nxt,
            flags=tcp.ACK,
            window=65535,
            options=tcp.pack_stamp(tcp.ticks(bench.now), 0),
        )
        bench.inject(packet(ip.TCP, GUEST + GATEWAY, header + bytes(1000), 16))

    bench.settle()
    bench.answers()
    inject(1000)
    bench.step()
    assert bench.answers() == []
    if is_filled:
        inject(0)
    bench.step()
    [answer] = bench.answers()
    segment = tcp.parse(answer.payload)
    assert len(tcp.parse_options(segment.options).sack) == (not is_filled)
    assert (segment.ack - snd.nxt) & 0xFFFFFFFF == (2000 if is_filled else 0)
    sock.close()


def test_a_closed_port_resets(make: Make) -> None:
    bench = make()
    program = bench.connect(GATEWAY, closed_port())
    bench.until(lambda: program.why)
    assert program.why is Closed.RESET
    assert not program.is_established
    assert bench.gateway.stats()["tcp_connections"] == 0


def test_the_guest_is_answered_when_the_host_has_been(make: Make) -> None:
    """A listener whose queue is full drops SYNs: the guest must not be told that it has a connection."""
    bench = make()
    with ExitStack() as stack, socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        full.settimeout(SECONDS)
        stack.enter_context(socket.create_connection(full.getsockname()))
        program = bench.connect(GATEWAY, port_of(full))
        for _ in range(20):
            bench.step(0.01)
        assert bench.answers() == []
        assert [flow.state for flow in bench.gateway.flows()] == ["SYN-HELD"]
        full.accept()[0].close()
        bench.until(lambda: program.is_established)  # the host's kernel has sent its SYN again
        full.accept()[0].close()


def test_the_guests_ack_covers_what_the_host_has_taken(make: Make, listener: socket.socket) -> None:
    """Nobody reads on the host: the guest is not told that its bytes have arrived."""
    bench = make()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    program, sock = opened(bench, listener)
    with sock:
        size = 16 << 20
        program.send(bytes(size))
        for _ in range(100):
            bench.step(0.001)
        assert program.connection is not None
        (connection,) = bench.gateway.stack.tcp.values()
        taken = connection.rcv.ack - connection.rcv.nxt
        assert taken <= 0
        assert 0 < size - len(program._waiting) < 8 << 20
        receive(bench, sock, size)


# -- what never reaches the host ----------------------------------------------------------------------

HOSTS_OWN = ["127.0.0.1", "127.1.2.3", "0.0.0.0", "0.0.0.7", "224.0.0.1", "240.0.0.1", "255.255.255.255"]
HOSTS_OWN_6 = ["::1", "::", "ff02::1", "::ffff:127.0.0.1", "::ffff:0.0.0.0", "2002:7f00:1::1"]


@pytest.mark.parametrize("granted", [False, True])
@pytest.mark.parametrize("address", [*HOSTS_OWN, *HOSTS_OWN_6])
def test_addresses_that_would_mean_the_host(make: Make, granted: bool, address: str) -> None:
    """Frames made by hand, for no kernel would send them; whatever the host's loopback is granted."""
    uplink = Spy(allow_host_loopback=granted)
    bench = make(uplink)
    to = ip_address(address)
    source, kind = (
        (GUEST, ethernet.IPV4) if to.version == 4 else (IPv6Address("fd00::100").packed, ethernet.IPV6)
    )
    with socket.create_server(("0.0.0.0", 0)) as server:
        server.setblocking(False)
        bench.inject(syn(to.packed, port_of(server), source), kind)
        bench.inject(datagram(to.packed, port_of(server), source=source), kind)
        if to.version == 4:
            bench.inject(echo_request(to.packed))
        bench.settle()
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not hasattr(uplink, "opened")
    assert bench.gateway.flows() == ()
    for answer in bench.answers():
        assert answer.protocol in (ip.ICMP, ip.ICMPV6), "no RST, no SYN|ACK"
        assert answer.destination == source


@pytest.mark.parametrize("source", ["0.0.0.0", "224.0.0.1", "255.255.255.255"])
def test_sources_that_cannot_be(make: Make, source: str) -> None:
    uplink = Spy(allow_host_loopback=True)
    bench = make(uplink)
    bench.inject(syn(GATEWAY, 80, IPv4Address(source).packed))
    bench.inject(datagram(GATEWAY, 80, source=IPv4Address(source).packed))
    bench.settle()
    assert not hasattr(uplink, "opened")
    assert bench.answers() == []


def test_without_a_grant_the_hosts_loopback_is_prohibited(make: Make, listener: socket.socket) -> None:
    bench = make(Uplink())
    listener.setblocking(False)
    for sent in (syn(GATEWAY, port_of(listener)), datagram(GATEWAY, port_of(listener))):
        bench.inject(sent)
        bench.settle()
        (answer,) = bench.answers()
        message = icmp.parse(answer.payload)
        assert (message.type, message.code) == (icmp.UNREACHABLE, icmp.PROHIBITED)
        assert bytes(message.payload[:20])[12:20] == sent[12:20], "it says which packet"
        assert message.payload[20:24] == sent[20:24]
    with pytest.raises(BlockingIOError):
        listener.accept()


# -- UDP ----------------------------------------------------------------------------------------------


@pytest.fixture
def peers(leaks: None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two UDP sockets of the host."""
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind(("127.0.0.1", 0))
            sock.setblocking(False)
            made.append(sock)
        yield made[0], made[1]


def free_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", 0))
        return port_of(sock)


@pytest.mark.parametrize("vnet_header", [True, False])
@pytest.mark.parametrize("size", [0, 1, 1472, 1473, 20_000, 65_507])
def test_datagrams_of_every_size_both_ways(
    make: Make, peers: tuple[socket.socket, socket.socket], vnet_header: bool, size: int
) -> None:
    bench = make(vnet_header=vnet_header)
    mailbox, flow = bench.socket(GATEWAY, port_of(peers[0]))
    payload = os.urandom(size)
    flow.send(payload, bench.now)
    bench.until(lambda: readable(peers[0]))
    received, sender = peers[0].recvfrom(1 << 16)
    assert received == payload
    peers[0].sendto(payload, sender)
    bench.until(lambda: mailbox.received)
    assert mailbox.received == [payload]


def test_one_guest_port_is_one_host_port_its_own_if_it_is_free(
    make: Make, peers: tuple[socket.socket, socket.socket]
) -> None:
    bench = make()
    source = free_udp_port()
    senders = []
    for peer in peers:
        _, flow = bench.socket(GATEWAY, port_of(peer), source)
        flow.send(b"x", bench.now)
        bench.until(lambda peer=peer: readable(peer))  # type: ignore[misc]  # peer
        senders.append(peer.recvfrom(10)[1])
    assert senders == [("127.0.0.1", source)] * 2
    _, flow = bench.socket(GATEWAY, port_of(peers[0]), source=port_of(peers[1]))
    flow.send(b"taken", bench.now)
    bench.until(lambda: readable(peers[0]))
    assert peers[0].recvfrom(10)[1] not in (("127.0.0.1", source), peers[1].getsockname())


def test_only_who_was_asked_may_answer(make: Make, peers: tuple[socket.socket, socket.socket]) -> None:
    bench = make()
    asked, stranger = peers
    mailbox, flow = bench.socket(GATEWAY, port_of(asked))
    flow.send(b"question", bench.now)
    bench.until(lambda: readable(asked))
    _, mapped = asked.recvfrom(100)
    stranger.sendto(b"unasked", mapped)
    asked.sendto(b"answer", mapped)
    bench.until(lambda: mailbox.received)
    bench.settle()
    assert mailbox.received == [b"answer"]
    assert bench.gateway.stats()["dropped_udp_filtered"] == 1


def test_what_falls_idle_is_given_back(make: Make, peers: tuple[socket.socket, socket.socket]) -> None:
    bench = make()
    before = len(os.listdir("/proc/self/fd"))
    _, flow = bench.socket(GATEWAY, port_of(peers[0]))
    flow.send(b"x", bench.now)
    bench.until(lambda: readable(peers[0]))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert [(info.protocol, info.state) for info in bench.gateway.flows()] == [("udp", "open")]
    bench.ahead = 31.0
    bench.until(lambda: not bench.gateway.flows())
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_oldest_flow_makes_room(make: Make, peers: tuple[socket.socket, socket.socket]) -> None:
    bench = make(limits=Limits(udp_flows=4))
    before = len(os.listdir("/proc/self/fd"))
    for source in range(40001, 40011):
        _, flow = bench.socket(GATEWAY, port_of(peers[0]), source)
        flow.send(b"x", bench.now)
        bench.settle()
    assert [info.guest.port for info in bench.gateway.flows()] == [40007, 40008, 40009, 40010]
    assert len(os.listdir("/proc/self/fd")) == before + 4


def test_a_super_datagram_arrives_cut_as_asked(
    make: Make, peers: tuple[socket.socket, socket.socket]
) -> None:
    """As a guest's kernel hands over what was sent with UDP_SEGMENT."""
    bench = make()
    payload = os.urandom(10_500)
    size = udp.SIZE + len(payload)
    addresses = GUEST + GATEWAY
    header = ip.pack(addresses, ip.UDP, size)
    partial = udp.HEADER.pack(PORT, port_of(peers[0]), size, 0)
    super_frame = virtio.pack(virtio.NEEDS_CSUM, virtio.GSO_UDP_L4, 42, 1000, 34, 6)
    bench.far.write(
        super_frame + ethernet.pack(GATEWAY_MAC, GUEST_MAC, ethernet.IPV4) + header + partial + payload
    )
    received: list[bytes] = []
    while len(received) < 11:
        bench.until(lambda: readable(peers[0]))
        received.append(peers[0].recv(1 << 16))
    assert [len(part) for part in received] == [1000] * 10 + [500]
    assert b"".join(received) == payload


# -- ICMP and DNS --------------------------------------------------------------------------------------


def test_ping_goes_out_by_a_ping_socket(make: Make) -> None:
    needs_ping()

    class Inward(Uplink):
        """192.0.2.1 is the host's loopback."""

        def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
            sock = super().open(protocol, target, port)
            sock.close()
            return Redirected(sock.family, sock.type, sock.proto)

    class Redirected(socket.socket):
        def connect(self, address: object) -> None:
            self.setblocking(False)
            super().connect(("127.0.0.1", 0))

    bench = make(Inward())
    bench.inject(echo_request(bytes((192, 0, 2, 1))))
    bench.until(lambda: bench.frames)
    (answer,) = bench.answers()
    assert answer.source == bytes((192, 0, 2, 1))
    message = icmp.parse(answer.payload)
    assert (message.type, message.high, message.low, bytes(message.payload)) == (
        icmp.ECHO_REPLY,
        7,
        1,
        b"ping",
    )
    bench.ahead = 61.0
    bench.until(lambda: not bench.gateway.flows())


def unwatched(make: Make, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Make one for whom epoll_ctl(2) lacks memory, or watches: no flow comes to be, and its socket is closed."""
    bench = make()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bench.engine, "add", full)
    return bench


@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
def test_what_the_kernel_does_not_watch_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    if protocol == "icmp":
        needs_ping()
    bench, far = unwatched(make, monkeypatch), bytes((192, 0, 2, 1))
    sent = {"tcp": syn(GATEWAY, closed_port()), "udp": datagram(far, 9), "icmp": echo_request(far)}
    bench.inject(sent[protocol])
    bench.settle()
    (answer,) = bench.answers()
    message = icmp.parse(answer.payload)
    assert (message.type, message.code) == (icmp.UNREACHABLE, icmp.NET)
    assert not bench.gateway.flows()


def test_a_client_that_the_kernel_does_not_watch_is_closed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = unwatched(make, monkeypatch)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        bench.gateway.router.tcp_accepted(GUEST + GATEWAY + bytes(4), server.accept()[0])
        client.settimeout(SECONDS)
        assert client.recv(1) == b""
    assert not bench.gateway.flows()


def test_names_are_answered_by_the_hosts_resolver(make: Make) -> None:
    query = bytes.fromhex("abcd01000001000000000000 046e616d6503746c6400 00010001")
    asked: list[str] = []
    with dns_server({"name.tld": "192.0.2.7"}, asked) as port:
        bench = make(Uplink(dns=[f"127.0.0.1:{closed_port()}", f"127.0.0.1:{port}"]))
        mailbox, flow = bench.socket(RESOLVER, 53)
        flow.send(query, bench.now)
        bench.until(lambda: mailbox.received)
        (reply,) = mailbox.received
        assert reply[:2] == query[:2]
        assert reply.endswith(bytes((192, 0, 2, 7)))
        bench.until(lambda: not bench.gateway.dns._server.deadline < bench.now)
    assert asked == ["udp name.tld"], "the first resolver is not there, the second is asked once"


# -- the gateway itself --------------------------------------------------------------------------------


def test_a_step_reads_so_many_frames_and_no_more(make: Make) -> None:
    bench = make()
    for _ in range(3 * FRAMES_PER_STEP):
        bench.inject(echo_request(GATEWAY))
    taken = list[int]()
    while sum(taken) < 3 * FRAMES_PER_STEP:
        before = bench.near.counters.received
        bench.step()
        taken.append(bench.near.counters.received - before)
    assert taken[:7] == [1, 2, 4, 8, 16, FRAMES_PER_STEP, FRAMES_PER_STEP]
    assert len(bench.answers()) == 3 * FRAMES_PER_STEP


def test_among_many_that_are_ready_the_device_does_not_wait_for_its_turn(make: Make) -> None:
    bench = make()
    bench.stop_the_clock()
    others = [os.eventfd(1, os.EFD_CLOEXEC) for _ in range(100 * EVENTS_PER_STEP)]
    for fd in others:
        bench.engine.add(fd, lambda _: None, IN)
    for most in (101, 2, 2):  # steps; the first frame shows that there is a crowd
        bench.ahead += 1e-3
        bench.inject(echo_request(GATEWAY))
        for _ in range(most):
            bench.step()
        assert len(bench.answers()) == 1
    for fd in others:
        bench.engine.remove(fd)
        os.close(fd)
    before = bench.near.counters.received
    for _ in range(3):
        bench.ahead += 1e-3
        bench.step()
    assert len(bench.engine.after_step) == 1, "nothing more is done when they have gone"
    assert bench.near.counters.received == before


def test_rubbish_is_counted_and_nothing_else(make: Make) -> None:
    bench = make()
    for size in (0, 1, 9, 10, 23, 24, 40, 1500, 65000):
        for _ in range(20):
            if size:
                bench.far.write(os.urandom(size))
            bench.inject(os.urandom(size))
            bench.inject(os.urandom(size), ethernet.ARP)
            bench.inject(os.urandom(size), ethernet.IPV6)
        bench.settle()
    dropped = sum(count for name, count in bench.gateway.stats().items() if name.startswith("dropped_"))
    assert dropped > 500
    assert bench.gateway.flows() == ()


def test_a_device_that_goes_away(make: Make, listener: socket.socket) -> None:
    bench = make()
    socks = [opened(bench, listener, PORT + number)[1] for number in range(3)]
    bench.far.release()
    with pytest.raises(DeviceGone):
        bench.settle()
    bench.gateway.close()
    for sock in socks:
        with sock:
            assert readable(sock), "each is closed"


def test_a_device_that_goes_away_while_a_datagram_waits_that_cannot_be_sent(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its refusal reaches nobody any more, and the socket is closed."""
    bench = make()
    monkeypatch.setattr(UdpRelay, "_send", lambda *_: errno.ENETUNREACH)
    frame = b"".join(
        (ethernet.pack(GATEWAY_MAC, GUEST_MAC, ethernet.IPV4), datagram(bytes((203, 0, 113, 9)), 9))
    )
    bench.gateway.stack.receive(memoryview(bench.header + frame), bench.now)
    assert len(bench.gateway.router.outbox.relays) == 1
    bench.far.release()
    bench.gateway.close()
    assert bench.gateway.flows() == ()


def test_closing_resets_and_gives_everything_back(
    make: Make, listener: socket.socket, peers: tuple[socket.socket, socket.socket]
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    bench = make()
    program, sock = opened(bench, listener)
    with sock:
        on_hold = bench.connect(GATEWAY, port_of(listener), source=PORT + 1)
        _, flow = bench.socket(GATEWAY, port_of(peers[0]))
        flow.send(b"x", bench.now)
        bench.until(lambda: on_hold.is_established)
        listener.accept()[0].close()
        bench.gateway.close()
        bench.gateway.close()
        bench.until(lambda: program.why and on_hold.why)
        assert program.why is Closed.RESET
        assert readable(sock)
    bench.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_flows_and_stats_are_for_people(make: Make, listener: socket.socket) -> None:
    bench = make()
    _, sock = opened(bench, listener)
    with sock:
        bench.settle()
        (info,) = bench.gateway.flows()
        assert str(info.guest) == f"10.0.2.100:{PORT}"
        assert str(info.remote) == f"10.0.2.2:{port_of(listener)}"
        assert (info.protocol, info.state) == ("tcp", "ESTABLISHED")
        stats = bench.gateway.stats()
        assert stats["tcp_connections"] == stats["tcp_established"] == 1
        assert all(isinstance(count, int) for count in stats.values())


def test_the_table_of_connections_is_bounded(make: Make, listener: socket.socket) -> None:
    bench = make(limits=Limits(tcp_connections=2))
    programs = [bench.connect(GATEWAY, port_of(listener), source) for source in range(41000, 41004)]
    bench.until(lambda: all(program.is_established or program.why for program in programs))
    assert [program.why for program in programs] == [None, None, Closed.UNREACHABLE, Closed.UNREACHABLE]
    for _ in range(2):
        reset(listener.accept()[0])
