"""What an unlucky host, a hostile guest or a broken policy may do to the gateway.  Each of these once went wrong."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import islice

import pytest

from netns_kit.forwarder.listeners import TcpListener
from netns_kit.forwarder.ports import PortForward
from netns_kit.gateway import admission
from netns_kit.gateway.admission import lowest_free
from netns_kit.gateway.engine import BUDGET, EDGE, IN, OUT, Engine
from netns_kit.gateway.relay.tcp import RelayState, TcpRelay
from netns_kit.stack import Closed, Limits, Refusal, TcpConnection, UdpFlow
from netns_kit.stack.wire import ethernet, icmp, ip, udp, virtio
from netns_kit.uplink.uplink import Uplink
from tests.support.bench import Bench, Make, friend_of, opened
from tests.support.packets import GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, PORT, RESOLVER, datagram, syn
from tests.support.servers import SECONDS, port_of, reset

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


def test_a_policy_is_asked_about_names_too(make: Make) -> None:
    bench = make(Uplink(policy=lambda flow: Refusal.PROHIBITED, dns=["127.0.0.1:9"]))
    bench.inject(datagram(RESOLVER, 53))
    assert prohibited(bench)


def test_a_datagram_too_long_for_the_host(make: Make) -> None:
    """Fragments can add up to more than a packet may carry (the "ping of death"); the largest is quoted."""
    bench = make()
    for protocol, head, size in (
        (ip.UDP, udp.HEADER.pack(PORT, 9, udp.SIZE + 65520, 0), 65520),
        (ip.ICMP, icmp.HEADER.pack(icmp.ECHO, 0, 0, 7, 1), 65512),
    ):
        inject_fragments(bench, protocol, head + bytes(size), identification=size)
    assert bench.gateway.stats()["dropped_fragment_too_long"] == 2
    assert (bench.gateway.stats()["udp_flows"], bench.gateway.stats()["echo_flows"]) == (0, 0)
    inject_fragments(bench, ip.UDP, udp.HEADER.pack(PORT, 9, udp.SIZE + 65507, 0) + bytes(65507), 1)
    assert bench.gateway.stats()["udp_flows"] == 1
    bench.until(bench.answers)  # nobody listens there


def inject_fragments(bench: Bench, protocol: int, layer4: bytes, identification: int) -> None:
    for at in range(0, len(layer4), 1480):
        piece = layer4[at : at + 1480]
        field = at >> 3 | (at + 1480 < len(layer4)) << 13
        header = ip.pack_ipv4(
            GUEST + GATEWAY, protocol, len(piece), identification=identification, fragment=field
        )
        bench.inject(header + piece)
        bench.settle()


def test_questions_that_overtake_each_other_on_one_port(make: Make) -> None:
    """The first answer ends the flow of that port; the next question makes another, which the second leaves alone."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.bind(("127.0.0.1", 0))
        resolver.settimeout(SECONDS)
        bench = make(Uplink(dns=[f"127.0.0.1:{port_of(resolver)}"]))

        def ask(number: int) -> None:
            header = bytes.fromhex("000001000001000000000000")
            question = b"\x04name" + bytes((1, 97 + number)) + bytes.fromhex("0000010001")
            bench.inject(datagram(RESOLVER, 53, number.to_bytes(2, "big") + header[2:] + question))
            bench.settle()

        def answer() -> None:
            message, client = resolver.recvfrom(512)
            resolver.sendto(message[:2] + bytes((message[2] | 0x80,)) + message[3:], client)
            bench.settle()

        ask(1)
        ask(2)
        answer()
        ask(3)
        answer()
        answer()
        bench.until(lambda: len(answered(bench)) == 3)
    assert bench.gateway.stats()["udp_flows"] == 0


def answered(bench: Bench) -> list[bytes]:
    return [frame for frame in bench.frames if frame[12:14] == b"\x08\x00" and frame[23] == ip.UDP]


def test_a_stranger_does_not_end_whom_it_speaks_to(make: Make) -> None:
    """The table is full, and the relay it comes in by is the one idle longest."""
    bench = make(
        Uplink(allow_host_loopback=True, udp_filtering="endpoint-independent"), limits=Limits(udp_flows=1)
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as friend, friend_of(friend) as stranger:
        friend.bind(("127.0.0.1", 0))
        bench.inject(datagram(GATEWAY, port_of(friend)))
        bench.settle()
        _, address = friend.recvfrom(64)
        stranger.sendto(b"hello?", address)
        bench.settle()
        bench.inject(datagram(GATEWAY, port_of(friend), b"still there?"))
        bench.settle()
        assert friend.recv(64) == b"still there?"
    assert bench.gateway.stats()["udp_flows"] == 1


def test_a_crowd_of_strangers_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """They push nobody out, are asked about first, and what they bring is no answer: they stay for a short time."""
    monkeypatch.setattr("netns_kit.gateway.flow_router.STRANGERS", 4)
    bench = make(
        Uplink(allow_host_loopback=True, udp_filtering="endpoint-independent"), limits=Limits(udp_flows=100)
    )
    with ExitStack() as stack:
        crowd = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(9)]
        crowd[0].bind(("127.0.0.1", 0))
        crowd[0].settimeout(SECONDS)
        bench.inject(datagram(GATEWAY, port_of(crowd[0])))
        bench.settle()
        _, address = crowd[0].recvfrom(64)
        for stranger in crowd[1:]:
            stranger.sendto(b"let me in", address)
        bench.settle()
        assert bench.gateway.stats()["udp_flows"] == 4
        assert bench.gateway.stats()["dropped_udp_filtered"] == 5
        assert not any(flow.answered for flow in bench.gateway.stack.udp.values())


def room_for(count: int, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process have so many descriptors more before flows are refused.

    Their numbers need not follow one another: other tests may have left some of this process in use.
    """
    free = [os.dup(bench.engine.fileno()) for _ in range(count + 1)]
    for fd in free:
        os.close(fd)
    most = free[-1]
    monkeypatch.setattr(admission, "most_descriptors", lambda: most)
    bench.gateway.router.admission.most = most


def test_syns_on_hold_do_not_take_every_descriptor(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as full, ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as live:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(full.getsockname())
        bench = make()
        room_for(20, bench, monkeypatch)
        for source in range(20001, 20060):
            bench.connect(GATEWAY, port_of(full), source)
            bench.settle()
        program = bench.connect(GATEWAY, port_of(live), 30000)
        bench.until(lambda: program.is_established)
        assert bench.gateway.stats()["tcp_pending"] <= 20


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
    mailbox, flow = bench.socket(RESOLVER, 53)
    flow.send(bytes.fromhex("abcd01000001000000000000 0161 00 00010001"), bench.now)
    bench.until(lambda: mailbox.received)
    assert mailbox.received[0][:4] == bytes.fromhex("abcd8182"), "a server failure, and no crash"


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
    assert bench.gateway.flows() == ()


def test_an_early_answer_is_heard_though_sending_fails_first(make: Make, listener: socket.socket) -> None:
    """A server refuses an upload and resets; the guest's bytes meet the reset before the event that tells of it."""
    bench = make()
    program, sock = opened(bench, listener)
    sock.sendall(b"413 too large")
    reset(sock)
    program.send(bytes(100_000))
    bench.gateway._pump.read_frames(32)
    bench.until(lambda: program.why)
    assert program.why is Closed.RESET
    assert bytes(program.received) == b"413 too large"


def test_a_guest_that_only_sends_is_told_that_sending_has_failed(
    make: Make, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads nothing meanwhile: what the host said before does not stand in the way."""
    bench = make()
    program, sock = opened(bench, listener)
    monkeypatch.setattr(program, "deliver", lambda data: 0)
    sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 16))
            bench.settle()
    reset(sock)
    program.send(bytes(100_000))
    bench.gateway._pump.read_frames(32)
    bench.until(lambda: program.why)
    assert program.why is Closed.RESET


def test_half_open_connections_give_way(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their guest, whose addresses may be made up, does not answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as live:
        bench = make()
        room_for(20, bench, monkeypatch)
        for last in range(1, 61):
            source = GUEST[:3] + bytes((100 + last,))
            nobody = ethernet.pack(GATEWAY_MAC, bytes((2, 0, 0, 0, 9, last)), ethernet.IPV4)
            bench.far.write(bench.header + nobody + syn(GATEWAY, port_of(live), source))
            bench.settle()
        assert bench.gateway.stats()["tcp_syn_received"] < 40
        bench.ahead += 1.0  # SYN|ACKs are repeated
        bench.settle()
        program = bench.connect(GATEWAY, port_of(live), 30000)
        bench.until(lambda: program.is_established)


def test_clients_of_a_port_do_not_take_every_descriptor(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait in the kernel's queue for a while instead."""
    bench = make()
    port = TcpListener(bench.gateway, PortForward("tcp", "127.0.0.1", 0, None, 80))
    with ExitStack() as stack:
        stack.callback(port.close)
        for _ in range(40):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port.forward.host_port))
        room_for(20, bench, monkeypatch)
        before = bench.engine.descriptors
        bench.settle()
        assert bench.engine.descriptors - before == 20


def test_a_guest_cannot_take_every_descriptor(
    make: Make, monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    bench = make()
    spare = 6
    room_for(spare, bench, monkeypatch)
    for last in range(101, 140):
        bench.inject(datagram(GATEWAY, 9, source=GUEST[:3] + bytes((last,))))
        bench.settle()
    stats = bench.gateway.stats()
    assert stats["udp_flows"] == spare
    assert stats["dropped_limit_descriptors"] == 39 - spare, "the ones idle longest make room"
    programs = [bench.connect(GATEWAY, port_of(listener), source) for source in range(20001, 20016)]
    bench.until(lambda: all(program.is_established or program.why for program in programs))
    stats = bench.gateway.stats()
    assert (stats["tcp_connections"], stats["udp_flows"]) == (spare, 0), "they are not taken from each other"
    assert stats["flows_refused"] == 15 - spare


def test_flows_that_share_a_socket_are_not_taken_for_descriptors(
    make: Make, monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    """A flow that makes room has closed none while others have its socket."""
    monkeypatch.setattr(admission.Admission, "_members", [])
    bench, other = make(), make()
    with ExitStack() as stack:
        for _ in range(100):
            server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            server.bind(("127.0.0.1", 0))
            bench.inject(datagram(GATEWAY, port_of(server)))
        bench.settle()
        assert bench.gateway.stats()["udp_flows"] == 100
        room_for(6, bench, monkeypatch)
        other.gateway.router.admission.most = bench.gateway.router.admission.most
        for each in (bench, other):
            for source in range(20001, 20031):
                each.connect(GATEWAY, port_of(listener), source)
                each.settle()
                bench.settle()
            if each is bench:
                assert lowest_free(bench.engine.fileno()) == bench.gateway.router.admission.most, (
                    "the rest is the program's"
                )
                assert bench.gateway.stats()["udp_flows"] == 0, "in the end all of them have made room"
        shares = [each.gateway.stats()["tcp_connections"] for each in (bench, other)]
        assert max(shares) - min(shares) <= 1, "of what gateways have, however much the program has"


def test_the_descriptors_are_the_whole_process_s(
    make: Make, monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    """Not each network's: a flood in one leaves the program its own, and another network its share."""
    monkeypatch.setattr(admission.Admission, "_members", [])
    flood, other = make(), make()
    room_for(20, flood, monkeypatch)
    other.gateway.router.admission.most = flood.gateway.router.admission.most
    sources = range(41000, 41040)
    programs = [flood.connect(GATEWAY, port_of(listener), source) for source in sources]
    flood.until(lambda: all(program.is_established or program.why for program in programs))
    assert sum(program.is_established for program in programs) == 20
    assert lowest_free(flood.engine.fileno()) == flood.gateway.router.admission.most, (
        "the program has the rest"
    )
    late = [other.connect(GATEWAY, port_of(listener), source) for source in range(42000, 42005)]
    other.until(lambda: all(program.is_established for program in late))
    flood.settle()
    given_back = flood.gateway.stats()["dropped_limit_descriptors"]
    assert given_back >= 4, "all but the first, which found out that there are no more"
    assert len(flood.gateway.stack.tcp) == 20 - given_back
    assert lowest_free(flood.engine.fileno()) <= flood.gateway.router.admission.most + 1


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


def test_new_flows_do_not_hold_up_a_step(make: Make) -> None:
    """Each costs many times what a frame of a known flow does: the step ends, and others have their turn."""
    bench = make()
    for source in range(20001, 20033):  # as many flows
        bench.far.write(
            bench.header + ethernet.pack(GATEWAY_MAC, GUEST_MAC, ethernet.IPV4) + datagram(GATEWAY, source)
        )
    clock = bench.now
    bench.engine.clock = lambda: clock

    def opened(flow: UdpFlow) -> Refusal | None:
        nonlocal clock
        clock += BUDGET / 3
        return Refusal.RESET

    bench.gateway.router.udp_opened = opened  # type: ignore[method-assign]  # takes its time
    steps = 0
    while bench.gateway.stats()["tap_received"] < 32:
        bench.engine.dispatch(bench.engine.poll(0), clock)
        steps += 1
    assert steps >= 8, "no more than four in a step"


def test_a_storm_of_new_flows_is_no_flood(make: Make) -> None:
    """However late all steps are: what the guest's queue holds is handled, in its order."""
    bench = make()
    clock = bench.now
    bench.engine.clock = lambda: clock
    asked: list[int] = []

    def opened(flow: UdpFlow) -> Refusal | None:
        nonlocal clock
        clock += BUDGET * 2
        asked.append(int.from_bytes(flow.key[-2:], "big"))
        return Refusal.RESET

    bench.gateway.router.udp_opened = opened  # type: ignore[method-assign]  # takes its time
    ports = iter(range(20001, 30000))
    expected: list[int] = []
    for _ in range(20):
        for port in islice(ports, 64):
            bench.inject(datagram(GATEWAY, port))
            expected.append(port)
        for _ in range(70):  # a frame a step
            bench.engine.dispatch(bench.engine.poll(0), clock)
    assert asked == expected
    assert not bench.gateway.stack.dropped["flooded"]


def test_a_flood_does_not_take_the_place_of_what_is_under_way(make: Make, listener: socket.socket) -> None:
    """A queue that has not been empty for long is emptied: what is known is handled, the rest is dropped."""
    bench = make()
    program = bench.connect(GATEWAY, port_of(listener), 20000)
    bench.until(lambda: program.is_established)
    host, _ = listener.accept()
    clock = bench.now
    bench.engine.clock = lambda: clock

    def opened(flow: UdpFlow) -> Refusal | None:
        nonlocal clock
        clock += BUDGET * 2
        return Refusal.RESET

    bench.gateway.router.udp_opened = opened  # type: ignore[method-assign]  # takes its time
    source = 20001
    with host:
        for step in range(300):
            while bench.gateway.stats()["tap_received"] + 20 > source - 20001:  # the queue is never empty
                bench.inject(datagram(GATEWAY, source))
                source += 1
            if step == 299:
                program.send(b"still here")
            bench.engine.dispatch(bench.engine.poll(0), clock)
        assert bench.gateway.stats()["dropped_flooded"] > 0
        host.settimeout(SECONDS)
        assert host.recv(100) == b"still here"


def test_urgent_data_is_told_from_older_events(make: Make, listener: socket.socket) -> None:
    """The socket's event tells of data; before it is handled the data is read, since the guest has room again, and
    an urgent byte comes."""
    bench = make()
    program, sock = opened(bench, listener)
    urgent: list[bytes] = []

    def note(data: memoryview) -> int:
        urgent.append(bytes(data))
        return program.deliver(data)

    program.urgent = note  # type: ignore[method-assign]  # to be told
    bench.settle()
    (connection,) = bench.gateway.stack.tcp.values()
    relay = connection.user
    assert isinstance(relay, TcpRelay)
    assert relay._socket is not None
    watched = relay._socket.fileno()
    with sock:
        sock.send(b"abc")
        bench.until(lambda: (watched, IN | OUT) in bench.engine.poll(0))

        def before(_: int) -> None:
            relay.state = RelayState.READABLE  # as an earlier event has told
            relay.writable()
            sock.send(b"!", socket.MSG_OOB)

        other, ours = os.pipe()
        bench.engine.add(other, before, IN)
        bench.engine.dispatch([(other, IN), (watched, IN | OUT)], bench.now)
        bench.engine.remove(other)
        os.close(other)
        os.close(ours)
        bench.until(lambda: len(program.received) == 4)
    assert urgent == [b"!"]


@pytest.mark.parametrize("at_once", [1, 4])
def test_urgent_data_is_told_behind_a_full_read(
    make: Make, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """It comes after the kernel has told of data, and lies where a read has ended that was as long as it could be."""
    bench = make(vnet_header=False)
    program, sock = opened(bench, listener)
    urgent: list[bytes] = []

    def note(data: memoryview) -> int:
        urgent.append(bytes(data))
        return program.deliver(data)

    program.urgent = note  # type: ignore[method-assign]  # to be told
    bench.settle()
    (connection,) = bench.gateway.stack.tcp.values()
    relay, send = connection.user, TcpConnection.send
    assert isinstance(relay, TcpRelay)
    relay._at_once = at_once
    size = at_once * connection.snd.burst

    def sent(sender: TcpConnection, data: bytes | memoryview, now: float) -> None:
        send(sender, data, now)
        if sender is connection and data[0] != ord("!"):
            sock.send(b"!", socket.MSG_OOB)

    monkeypatch.setattr(TcpConnection, "send", sent)
    with sock:
        sock.sendall(b"x" * size)
        bench.until(lambda: len(program.received) == size + 1)
    assert urgent == [b"!"]
