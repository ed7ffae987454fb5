"""Faults of a gateway: the guest is a second stack, the clock is the test's."""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import pytest

from netns_kit import ArgumentError, Faults, Policy, Record
from netns_kit.child.codec import dump
from netns_kit.dns.message import NXDOMAIN, RCODE, SERVFAIL
from netns_kit.domain_names import to_wire
from netns_kit.gateway.fault_blocks import FaultBlocks
from netns_kit.gateway.faults import read_script
from netns_kit.stack import Closed
from netns_kit.stack.wire import icmp, ip
from netns_kit.tap.frame_device import FRAME_MAX, DeviceWrapper
from netns_kit.userstack.control import Control
from tests.support.bench import Bench, Make, opened, receive
from tests.support.packets import GATEWAY, GUEST, PORT, RESOLVER, datagram, packet
from tests.support.servers import port_of

pytestmark = pytest.mark.usefixtures("leaks")

_numbers = count()
Ended = dict[str, int]


@contextmanager
def faults(bench: Bench, *script: Faults | tuple[float, Faults]) -> Iterator[Callable[[], Ended]]:
    """A block of faults, and what counts what it has done."""
    blocks = vars(bench).setdefault("blocks", FaultBlocks(bench.gateway))
    steps = read_script([(0, each) if isinstance(each, Faults) else each for each in script])
    number, ended = next(_numbers), dict[str, int]()
    bench.settle()
    blocks.begin(number, dump(steps).decode())
    try:
        yield lambda: ended or blocks.counts(number)
    finally:
        ended.update(blocks.end(number))
        assert blocks.end(number) == {}


def ping(bench: Bench, number: int) -> None:
    """Ping the gateway, which answers by itself."""
    message = bytearray(b"\x08\0\0\0" + b"\0\1" + number.to_bytes(2, "big") + bytes(30))
    bench.inject(packet(ip.ICMP, GUEST + GATEWAY, bytes(message), 2))


def replies(bench: Bench) -> list[int]:
    """The numbers of the pings that have been answered since the last time."""
    return [
        int.from_bytes(each.payload[6:8], "big")
        for each in bench.answers()
        if each.protocol == ip.ICMP and each.payload[0] == icmp.ECHO_REPLY
    ]


def pings(bench: Bench, many: int, every: float, until: float) -> list[tuple[int, float]]:
    """The answers to so many pings, each as its number, and how long the clock went on before it came."""
    begin, found = bench.ahead, list[tuple[int, float]]()

    sent = 0
    while bench.ahead - begin < until:
        while sent < many and sent * every <= bench.ahead - begin + 1e-9:
            ping(bench, sent)
            sent += 1
        bench.settle()
        found += [(number, round(bench.ahead - begin, 6)) for number in replies(bench)]
        bench.ahead += 0.001
    return found


@pytest.fixture
def bench(make: Make) -> Bench:
    found = make()
    found.stop_the_clock()
    return found


def test_a_seeded_run_repeats_exactly(make: Make) -> None:
    asked = Faults(loss=0.1, delay=0.01, jitter=0.02, reorder=0.1, duplicate=0.1, seed=7)

    def run(seeded: Faults) -> tuple[list[tuple[int, float]], Ended]:
        bench = make()
        bench.stop_the_clock()
        with faults(bench, seeded) as done:
            return pings(bench, 300, 0.002, 1.0), done()

    first, counts = run(asked)
    assert run(asked) == (first, counts)
    assert run(Faults(loss=0.1, delay=0.01, jitter=0.02, reorder=0.1, duplicate=0.1, seed=8)) != (
        first,
        counts,
    )
    assert 20 <= counts["out_lost"] <= 40
    assert counts["out_reordered"]
    assert counts["out_duplicated"]
    assert counts["out_lost"] != counts["in_lost"], "each direction has chances of its own"
    assert counts["out_frames"] == 300


@pytest.mark.parametrize(("direction", "least"), [("both", 0.1), ("out", 0.05), ("in", 0.05)])
def test_a_delay_is_of_each_direction(bench: Bench, direction: str, least: float) -> None:
    with faults(bench, Faults(delay=0.05, direction=direction)):  # type: ignore[arg-type]  # it is one of them
        answers = pings(bench, 10, 0.01, 0.4)
    assert [number for number, _ in answers] == list(range(10))
    for number, came in answers:
        assert least - 1e-6 <= came - number * 0.01 <= least + 0.003


def test_a_rate_is_that_of_frames(bench: Bench) -> None:
    with faults(bench, Faults(rate="100 kB/s", direction="out")):
        answers = pings(bench, 100, 0.0, 2.0)
    size = 14 + 20 + 38
    for number, came in answers:
        assert -1e-6 <= came - (number + 1) * size / 100000 <= 0.0021
    assert len(answers) == 100


def test_blocks_are_cables_in_a_row(bench: Bench) -> None:
    with faults(bench, Faults(delay=0.03)), faults(bench, Faults(delay=0.02, loss=0.5)) as inner:
        answers = pings(bench, 100, 0.01, 1.5)
        assert inner()["out_lost"] + inner()["in_lost"] == 100 - len(answers)
    assert answers
    assert all(0.1 - 1e-6 <= came - number * 0.01 <= 0.106 for number, came in answers)
    with faults(bench, Faults(loss=1.0)) as outer, faults(bench, Faults(delay=0.02)) as inner:
        assert pings(bench, 3, 0.0, 0.1) == []
        assert (outer()["out_lost"], inner()["out_frames"]) == (3, 0)


def test_what_a_block_holds_goes_on_when_it_ends(bench: Bench) -> None:
    with faults(bench, Faults(delay=10.0)):
        for number in range(5):
            ping(bench, number)
        bench.settle()
        assert replies(bench) == []
    bench.settle()
    assert replies(bench) == list(range(5))
    with faults(bench, Faults(delay=1.0)) as outer:
        with faults(bench, Faults(delay=10.0)):
            ping(bench, 9)
            bench.settle()
        assert outer()["out_frames"] == 1, "it is in the other block's link now"
        bench.settle()
        assert replies(bench) == []
        bench.ahead += 1.0
        bench.settle()
        bench.ahead += 1.0
        bench.settle()
        assert replies(bench) == [9]


def test_nothing_is_left_when_the_last_block_has_ended(bench: Bench) -> None:
    gateway, engine = bench.gateway, bench.engine
    emit, steps, query = gateway.stack.link.emit, list(engine.after_step), gateway.dns.query
    with (
        faults(bench, Faults(delay=1.0, refuse=True, dns="servfail", dns_delay=1.0, to="a.example")),
        faults(bench, Faults(loss=0.5)),
    ):
        assert gateway.device is not bench.tap
        assert "route" in vars(gateway.router)
        pings(bench, 3, 0.0, 0.01)
    bench.settle()
    assert gateway.device is bench.tap
    assert gateway.stack.link.emit == emit
    assert engine.after_step == steps
    assert gateway.dns.query == query
    assert gateway.dns.guard is None
    assert not {"route", "proceed"} & set(vars(gateway.router))
    assert [number for number, _ in pings(bench, 20, 0.0, 0.01)] == list(range(20))


def test_what_stands_before_faults_stays_there(bench: Bench) -> None:
    with faults(bench, Faults(delay=0.01)):
        above = bench.gateway.device = DeviceWrapper(bench.gateway.device)
        assert len(pings(bench, 3, 0.0, 0.1)) == 3
    assert bench.gateway.device is above
    assert above.device is bench.tap
    with faults(bench, Faults(delay=0.01)):
        bench.gateway.withdraw(above)
        assert len(pings(bench, 3, 0.0, 0.1)) == 3
    assert bench.gateway.device is bench.tap


def test_what_is_said_in_the_end_is_not_held(make: Make, listener: socket.socket) -> None:
    bench = make()
    control = Control(bench.gateway, lambda _: None)
    program, sock = opened(bench, listener)
    with sock:
        control.faults.begin(1, dump(read_script([(0, Faults(delay=100.0))])).decode())
        assert bench.gateway.device is not bench.tap
        control.close()
        buffer = bytearray(FRAME_MAX)
        while (size := bench.far.read_into(buffer)) is not None:
            bench.guest.receive(memoryview(buffer)[:size], bench.now)
    assert program.why is Closed.RESET


def test_a_script_goes_on_by_itself(bench: Bench) -> None:
    with faults(
        bench, (0.095, Faults(loss=1.0)), (0.195, Faults()), (0.295, Faults(delay=0.05, direction="in"))
    ):
        answers = pings(bench, 40, 0.01, 0.6)
    assert [number for number, _ in answers] == [*range(10), *range(20, 40)]
    assert all(came - number * 0.01 < 0.002 for number, came in answers if number < 30)
    assert all(came - number * 0.01 >= 0.05 - 1e-6 for number, came in answers if number >= 30)


def test_what_a_link_holds_is_bounded(bench: Bench) -> None:
    with faults(bench, Faults(delay=100.0, queue=1 << 16)) as done:
        for number in range(1000):
            ping(bench, number)
            bench.settle()
        counts = done()
    held = 1000 - counts["out_overflowed"]
    size = 10 + 14 + 20 + 38 + 256
    assert held * size <= 1 << 16 < (held + 1) * size
    bench.settle()
    assert len(replies(bench)) == held


# -- super-frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vnet_header", [True, False])
def test_super_frames_are_lost_packet_by_packet(
    make: Make, listener: socket.socket, vnet_header: bool
) -> None:
    bench = make(vnet_header=vnet_header)
    program, sock = opened(bench, listener)
    with sock, faults(bench, Faults(loss=0.02, protocol="tcp", direction="out", seed=3)) as done:
        program.send(bytes(1 << 20))
        assert receive(bench, sock, 1 << 20) == bytes(1 << 20)
        counts = done()
    assert counts["out_frames"] >= (1 << 20) // 1460
    assert 0.01 < counts["out_lost"] / counts["out_frames"] < 0.03


@pytest.mark.parametrize("vnet_header", [True, False])
def test_damage_is_no_data(make: Make, listener: socket.socket, vnet_header: bool) -> None:
    bench = make(vnet_header=vnet_header)
    program, sock = opened(bench, listener)
    data = bytes(range(256)) * 1024
    with sock, faults(bench, Faults(corrupt=0.05, direction="out")) as done:
        program.send(data)
        assert receive(bench, sock, len(data)) == data
        assert done()["out_corrupted"] > 3


# -- which flows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "is_meant"),
    [
        (Faults(loss=1, to="10.0.2.2"), True),
        (Faults(loss=1, to=["192.0.2.0/24", "10.0.2.0/24"]), True),
        (Faults(loss=1, to="HOST"), True),
        (Faults(loss=1, to="gateway.containers.internal"), True),
        (Faults(loss=1, to="*.containers.internal", protocol="icmp"), True),
        (Faults(loss=1, to="10.0.2.3"), False),
        (Faults(loss=1, to="*.example.org"), False),
        (Faults(loss=1, protocol="tcp"), False),
        (Faults(loss=1, ports=80), False),
    ],
)
def test_only_what_is_meant_is_disturbed(bench: Bench, asked: Faults, is_meant: bool) -> None:
    with faults(bench, asked) as done:
        assert len(pings(bench, 5, 0.0, 0.01)) == (0 if is_meant else 5)
        assert done()["out_lost"] == (5 if is_meant else 0)


def ask(bench: Bench, name: str, source: int = PORT) -> None:
    message = b"\0\1\1\0\0\1\0\0\0\0\0\0" + to_wire(name) + b"\0\1\0\1"
    bench.inject(datagram(RESOLVER, 53, message, source_port=source))
    bench.settle()


def rcodes(bench: Bench) -> list[int]:
    return [each.payload[8 + 3] & RCODE for each in bench.answers() if each.protocol == ip.UDP]


def test_a_name_is_what_the_guest_has_resolved(bench: Bench) -> None:
    bench.gateway.zone.add(Record("*.wild.example", "10.0.2.2"))
    with faults(bench, Faults(loss=1, protocol="icmp", to="one.wild.example")):
        assert len(pings(bench, 5, 0.0, 0.01)) == 5
        ask(bench, "two.wild.example")
        assert len(pings(bench, 5, 0.0, 0.01)) == 5
        ask(bench, "One.Wild.Example", PORT + 1)
        assert rcodes(bench) == [0]
        assert pings(bench, 5, 0.0, 0.01) == []
    assert len(pings(bench, 5, 0.0, 0.01)) == 5


# -- flows ----------------------------------------------------------------------------------------------


def test_new_connections_are_refused(bench: Bench, listener: socket.socket) -> None:
    port = port_of(listener)
    program, sock = opened(bench, listener)
    with sock, faults(bench, Faults(refuse=True, to="10.0.2.2", ports=port)) as done:
        refused = bench.connect(GATEWAY, port, PORT + 1)
        bench.until(lambda: refused.why is not None)
        assert refused.why is Closed.RESET
        program.send(b"what is there goes on")
        assert receive(bench, sock, 21)
        assert done()["refused"] == 1
    other = bench.connect(GATEWAY, port, PORT + 2)
    bench.until(lambda: other.is_established)


def test_the_policy_comes_before_a_fault(make: Make, listener: socket.socket) -> None:
    bench = make()
    bench.gateway.set_policy(dump(Policy.deny()).decode(), "keep")
    port = port_of(listener)
    with faults(bench, Faults(refuse=True, dns="servfail", ports=port)) as done:
        refused = bench.connect(GATEWAY, port)
        bench.until(lambda: refused.why is not None)
        assert bench.gateway.enforcer.refused == 1
        ask(bench, "a.example")
        assert (done()["refused"], done()["queries"]) == (0, 0)


@pytest.mark.parametrize("direction", ["both", "out", "in"])
def test_a_connection_is_reset_after_so_many_bytes(
    make: Make, listener: socket.socket, direction: str
) -> None:
    bench = make()
    program, sock = opened(bench, listener)
    with sock:
        program.send(bytes(1000))
        assert receive(bench, sock, 1000)
        asked = Faults(reset_after=3000, direction=direction)  # type: ignore[arg-type]  # it is one of them
        with faults(bench, asked) as done:
            program.send(bytes(2999))
            assert receive(bench, sock, 2999)
            bench.settle()
            assert program.why is None
            sock.send(b"x")
            if direction == "in":
                bench.until(lambda: len(program.received) == 1)
                assert program.why is None
                sock.send(bytes(2999))
            elif direction == "out":
                (connection,) = bench.gateway.stack.tcp.values()
                bench.until(lambda: connection.carried == (3999, 1))
                bench.settle()
                assert program.why is None
                program.send(b"x")
            bench.until(lambda: program.why is not None)
            assert program.why is Closed.RESET
            assert done()["reset"] == 1
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET


def test_a_blackhole_swallows_old_and_new(make: Make, listener: socket.socket) -> None:
    bench = make()
    program, sock = opened(bench, listener)
    with sock:
        with faults(bench, Faults(blackhole=True, ports=port_of(listener))) as done:
            program.send(b"wait")
            bench.connect(GATEWAY, port_of(listener), PORT + 1)
            bench.settle()
            assert done()["out_lost"] >= 2
            assert len(pings(bench, 3, 0.0, 0.01)) == 3
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
        bench.ahead += 2.0
        assert receive(bench, sock, 4) == b"wait"


# -- DNS ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "rcode"), [("nxdomain", NXDOMAIN), ("servfail", SERVFAIL), ("timeout", None)]
)
def test_queries_fail(bench: Bench, how: str, rcode: int | None) -> None:
    bench.gateway.zone.add(Record("*.a.example", "10.0.2.2"))
    with faults(bench, Faults(dns=how, to="*.a.example")) as done:  # type: ignore[arg-type]  # it is one of them
        ask(bench, "www.A.example")
        assert rcodes(bench) == ([] if rcode is None else [rcode])
        ask(bench, "gateway.docker.internal", PORT + 1)
        assert rcodes(bench) == [0]
        assert done()["queries"] == 1
    ask(bench, "www.a.example", PORT + 2)
    assert rcodes(bench) == [0]


def test_queries_wait(bench: Bench) -> None:
    name = "gateway.docker.internal"
    with faults(bench, Faults(dns_delay=1.0)), faults(bench, Faults(dns_delay=2.0, to=name)):
        ask(bench, name)
        bench.ahead += 2.9
        bench.settle()
        assert rcodes(bench) == []
        bench.ahead += 0.2
        bench.settle()
        assert rcodes(bench) == [0]
        with faults(bench, Faults(dns_delay=100.0, dns="nxdomain")):
            ask(bench, name, PORT + 1)
            assert rcodes(bench) == []
        assert rcodes(bench) == []
        bench.settle()
        assert rcodes(bench) == [0], "without the block it is answered at once"


def test_queries_that_wait_are_bounded(bench: Bench) -> None:
    with faults(bench, Faults(dns_delay=100.0)):
        for number in range(1500):
            ask(bench, "gateway.docker.internal", 2000 + number)
    bench.settle()
    assert len(rcodes(bench)) == 1024


# -- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "knob", "says"),
    [
        ({"loss": 2.0}, "loss", "a probability, 0 to 1"),
        ({"loss": "1%"}, "loss", "a probability, 0 to 1"),
        ({"delay": -1}, "delay", "seconds"),
        ({"delay": math.nan}, "delay", "seconds"),
        ({"rate": "10 Mbit"}, "rate", 'write "10 Mbit/s"'),
        ({"rate": "10mbps"}, "rate", 'write "10 Mbit/s"'),
        ({"rate": 10}, "rate", 'write "10 bit/s", or "10 B/s"'),
        ({"rate": "0 bit/s"}, "rate", "one byte or more"),
        ({"to": "no name"}, "to", "a domain name"),
        ({"to": "http://example.org"}, "to", 'write "example.org" and ports=80'),
        ({"to": 5}, "to", "a domain name"),
        ({"to": "127.0.0.1"}, "to", "nothing is ever sent"),
        ({"ports": 0}, "ports", "ports from 1"),
        ({"protocol": "sctp"}, "protocol", "'tcp'"),
        ({"direction": "up"}, "direction", "'both', 'in' or 'out'"),
        ({"dns": "lost"}, "dns", "'nxdomain'"),
        ({"dns": "timeout", "to": "10.0.0.1"}, "to", "a domain name among them"),
        ({"reset_after": 1, "protocol": "udp"}, "protocol", "tcp"),
        ({"queue": 1}, "queue", "a whole number"),
        ({"blackhole": 1}, "blackhole", "True or False"),
        ({"loss": "1%"}, "loss", "write loss=0.01"),
        ({"delay": "30ms"}, "delay", "write delay=0.03"),
    ],
)
def test_what_makes_no_sense_is_an_error(options: dict[str, object], knob: str, says: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Faults(**options)  # type: ignore[arg-type]  # that is the point
    assert caught.value.knob == knob
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [("10 Mbit/s", 1.25e6), ("8bit/s", 1), ("1.5 kB/s", 1500), ("2 MiB/s", 1 << 21), ("1 Gibit/s", 1 << 27)],
)
def test_a_rate_has_a_unit(text: str, bytes_per_second: float) -> None:
    assert Faults(rate=text).bytes_per_second == bytes_per_second


@pytest.mark.parametrize(
    "script",
    [
        [],
        [(1, Faults()), (0, Faults())],
        [(0, Faults()), (0, Faults())],
        [(-1, Faults())],
        [Faults()],
        [(0, 1)],
        5,
    ],
)
def test_a_script_is_in_order(script: object) -> None:
    with pytest.raises(ArgumentError) as caught:
        read_script(script)
    assert caught.value.knob == "script"
