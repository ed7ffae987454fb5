"""What workers of one namespace hand to each other, over real sockets."""

from __future__ import annotations

import array
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit import Faults, Policy, Record
from netns_kit.child.codec import dump
from netns_kit.dns import Action
from netns_kit.domain_names import to_wire
from netns_kit.gateway.admission import lowest_free
from netns_kit.gateway.fault_blocks import FaultBlocks
from netns_kit.gateway.faults import read_script
from netns_kit.gateway.worker_links import COMMON, WorkerLinks, connect
from netns_kit.policy.pins import Pin
from netns_kit.stack.wire import udp
from netns_kit.tap.frame_device import FRAME_MAX
from tests.support.bench import Bench, Mailbox
from tests.support.packets import GATEWAY, GUEST, GUEST_MAC, RESOLVER
from tests.support.servers import port_of

pytestmark = pytest.mark.usefixtures("leaks")


@pytest.fixture
def two() -> Iterator[tuple[WorkerLinks, WorkerLinks]]:
    with ExitStack() as stack:
        first, second = connect(2, stack)
        yield first, second


def nobody(key: bytes, sock: socket.socket) -> None:
    raise AssertionError(key)


def test_a_frame_of_any_size_comes_with_its_hops(two: tuple[WorkerLinks, WorkerLinks]) -> None:
    first, second = two
    buffer = memoryview(bytearray(FRAME_MAX))
    assert second.read_into(buffer, nobody) is None
    for hops, frame in (0, b"x"), (7, bytes(range(256)) * 256 + b"end"):
        first.hand_over(1, hops, memoryview(frame))
        assert second.read_into(buffer, nobody) == len(frame)
        assert (second.hops, bytes(buffer[: len(frame)])) == (hops, frame)
    assert second.read_into(buffer, nobody) is None
    assert first.stats() == {"handed_over": 2, "handed_over_lost": 0, "policy_pins_lost": 0}


def test_a_connection_comes_with_its_name(two: tuple[WorkerLinks, WorkerLinks]) -> None:
    first, second = two
    ours, theirs = socket.socketpair()
    got: list[tuple[bytes, socket.socket]] = []
    first.hand_over_connection(1, b"name of a flow", theirs)
    assert theirs.fileno() == -1
    size = second.read_into(memoryview(bytearray(FRAME_MAX)), lambda key, sock: got.append((key, sock)))
    ((key, sock),) = got
    with ours, sock:
        assert (size, key) == (0, b"name of a flow")
        sock.send(b"x")
        assert ours.recv(1) == b"x"
        assert not sock.get_inheritable()


def test_what_finds_an_inbox_full_is_lost_and_counted(two: tuple[WorkerLinks, WorkerLinks]) -> None:
    first, _ = two
    for _ in range(10_000):
        first.hand_over(1, 0, memoryview(bytes(4096)))
        if first.lost:
            break
    assert first.lost == 1
    ours, theirs = socket.socketpair()
    with ours:
        first.hand_over_connection(1, b"name", theirs)
        assert ours.recv(1) == b"", "it is closed, not forgotten"


def test_a_connection_without_a_descriptor_for_it_is_lost_and_counted(
    two: tuple[WorkerLinks, WorkerLinks],
) -> None:
    first, second = two
    buffer = memoryview(bytearray(FRAME_MAX))
    ours, theirs = socket.socketpair()
    with ours:
        first.hand_over_connection(1, b"name of a flow", theirs)
        first.hand_over(1, 0, memoryview(b"a frame"))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free(ours.fileno()), limits[1]))
        try:
            assert second.read_into(buffer, nobody) == 0, "its name is not taken for a frame"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert second.stats() == {"handed_over": 0, "handed_over_lost": 1, "policy_pins_lost": 0}
        assert ours.recv(1) == b"", "it is closed, not forgotten"
        assert second.read_into(buffer, nobody) == len(b"a frame")


def test_of_many_descriptors_in_a_message_one_is_taken(two: tuple[WorkerLinks, WorkerLinks]) -> None:
    """A worker that hostile bytes have taken over leaks nothing into another."""
    first, second = two
    buffer, got = memoryview(bytearray(FRAME_MAX)), list[socket.socket]()
    with socket.socket() as sent:
        rights = array.array("i", [sent.fileno()] * 3)
        message = [b"\0", b"name"]
        first._outboxes[1].sendmsg(message, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    assert second.read_into(buffer, lambda _, sock: got.append(sock)) == 0
    (taken,) = got
    taken.close()  # the fixture looks for others


PINS = [
    (to_wire("www.example"), bytes((192, 0, 2, 1)), 12345.75, False),
    (to_wire(".".join(["x" * 63] * 3)), bytes(range(16)), 0.5, True),
]


def test_pins_reach_every_other_worker_before_the_frames_that_came_earlier() -> None:
    with ExitStack() as stack:
        workers = connect(3, stack)
        workers[1].hand_over(2, 0, memoryview(b"a frame"))
        workers[1].send_pins(PINS)
        workers[1].send_pins(PINS[:1], 7)
        sent = [(COMMON, PINS), (7, PINS[:1])]
        assert [list(each.read_pins()) for each in workers] == [sent, [], sent]
        assert [list(each.read_pins()) for each in workers] == [[], [], []]
        assert workers[2].read_into(memoryview(bytearray(FRAME_MAX)), nobody) == len(b"a frame")


def test_pins_that_find_an_inbox_full_are_lost_and_counted(two: tuple[WorkerLinks, WorkerLinks]) -> None:
    first, second = two
    sent = 0
    while not first.pins_lost:
        first.send_pins(PINS)
        sent += 1
        assert sent < 100_000
    assert first.stats() == {"handed_over": 0, "handed_over_lost": 0, "policy_pins_lost": 1}
    assert list(second.read_pins()) == [(COMMON, PINS)] * (sent - 1), "the others are there"


@given(st.binary(max_size=80))
def test_pins_of_a_worker_that_was_taken_over_raise_nothing(message: bytes) -> None:
    with ExitStack() as stack:
        first, second = connect(2, stack)
        first._pins_outboxes[1].send(message)
        first.send_pins(PINS)
        found = list(second.read_pins())
        assert found[-1] == (COMMON, PINS)
        for name, address, _, _ in (
            each for _, pins in found for each in pins
        ):  # whatever else came is a name and an address
            Policy.deny().allow("www.example").index.lets_answer(name, address)


@pytest.mark.parametrize(
    ("name", "address"), [(b"", b"1234"), (b"\5ab", b"1234"), (b"\1a\0", b"123"), (b"\1a\0", b"")]
)
def test_what_is_no_pin_is_not_learnt(
    two: tuple[WorkerLinks, WorkerLinks], name: bytes, address: bytes
) -> None:
    first, second = two
    first.send_pins([(name, address, 0.5, True), *PINS])
    assert list(second.read_pins()) == [(COMMON, PINS)]


@pytest.fixture
def benches() -> Iterator[list[Bench]]:
    """Two gateways, each with its end of a link of its own to a guest of its own, which are as one."""
    with ExitStack() as stack:
        found = []
        for peers in connect(2, stack):
            bench = Bench(peers=peers)
            stack.callback(bench.close)
            bench.gateway.stack.link.learn(GUEST, GUEST_MAC)
            found.append(bench)
        yield found


def name(port: int) -> bytes:
    return GUEST + GATEWAY + (80).to_bytes(2, "big") + port.to_bytes(2, "big")


def test_an_accepted_connection_is_opened_by_whose_it_is(benches: list[Bench]) -> None:
    steering = benches[0].gateway.stack.steering
    theirs = next(port for port in range(40000, 41000) if steering.owner(name(port)) == 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        clients = [socket.create_connection(server.getsockname()) for _ in range(10)]
        for _ in clients:
            sock, _ = server.accept()
            sock.setblocking(False)
            benches[0].gateway.router.tcp_accepted(name(theirs), sock)
            benches[1].settle()
        keys = list(benches[1].gateway.stack.tcp)
        assert keys[0] == name(theirs)
        assert len(set(keys)) == len(clients)
        assert {steering.owner(key) for key in keys} == {1}
        assert not benches[0].gateway.stack.tcp
        for client in clients:
            client.close()


def test_a_client_is_closed_where_no_descriptor_is_left_for_flows(
    benches: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    steering = benches[0].gateway.stack.steering
    theirs = next(port for port in range(40000, 41000) if steering.owner(name(port)) == 1)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        client.settimeout(20)
        sock, _ = server.accept()
        sock.setblocking(False)
        benches[0].gateway.router.tcp_accepted(name(theirs), sock)
        monkeypatch.setattr(benches[1].gateway.router.admission, "admit", lambda make_room: False)
        benches[1].settle()
        assert client.recv(1) == b""
    assert benches[1].gateway.stats()["flows_refused"] == 1
    assert not benches[1].gateway.stack.tcp


def test_a_datagram_is_the_firsts_wherever_it_comes_in(benches: list[Bench]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(20)
        _, flow = benches[1].socket(GATEWAY, server.getsockname()[1])
        flow.send(b"hello", benches[1].now)
        benches[1].settle()
        benches[0].settle()
        data, sender = server.recvfrom(100)
        assert data == b"hello"
        server.sendto(b"answer", sender)
        benches[0].until(lambda: len(benches[0].frames) >= 1)
        assert bytes(udp.parse(benches[0].answers()[0].payload)[3]) == b"answer"
        assert not benches[1].gateway.stack.udp


# -- pins -------------------------------------------------------------------------------------------------


def resolve(bench: Bench, name: str, source: int) -> Mailbox:
    """Ask the DNS server of a gateway for a name, and have it answer."""
    mailbox, flow = bench.socket(RESOLVER, 53, source)
    flow.send(bytes.fromhex("0001 0100 0001 0000 0000 0000") + to_wire(name) + b"\0\1\0\1", bench.now)
    bench.settle()
    assert len(mailbox.received) == 1
    return mailbox


def govern(benches: list[Bench], policy: Policy) -> None:
    for bench in benches:  # whoever asks for a name below a wildcard gets it from DNS alone
        bench.gateway.zone.add(Record("*.internal", "10.0.2.2"))
        bench.gateway.set_policy(dump(policy).decode(), "keep")


def test_a_name_that_one_worker_resolves_is_known_to_all(
    benches: list[Bench], listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = benches
    port = port_of(listener)
    govern(benches, Policy.deny().allow("db.internal", ports=port))
    refused = second.connect(GATEWAY, port, 40000)
    second.settle()
    assert second.gateway.stats()["policy_refused"] == 1
    links, relay = first.gateway._links, first.gateway.dns
    assert links is not None
    happened: list[str] = []
    send_pins, do = links.send_pins, relay._do

    def note_pins(pins: list[Pin]) -> None:
        happened.append("pins")
        send_pins(pins)

    def note_answer(actions: list[Action]) -> None:
        happened.append("answer")
        do(actions)

    monkeypatch.setattr(first.gateway.enforcer.guard, "_pinned", note_pins)
    monkeypatch.setattr(relay, "_do", note_answer)
    resolve(first, "db.internal", 40001)
    assert happened == ["pins", "answer"]
    program = second.connect(GATEWAY, port, 40002)
    second.gateway._pump.read_frames(8)  # the SYN, although its inbox of pins was not looked at
    second.until(lambda: program.is_established)
    assert second.gateway.stats()["policy_refused"] == 1
    assert not refused.is_established


def test_pins_are_learnt_when_they_come_and_before_there_is_a_policy(
    benches: list[Bench], listener: socket.socket
) -> None:
    first, second = benches
    port = port_of(listener)
    policy = Policy.deny().allow("db.internal", ports=port, private=True)
    govern([first], policy)
    resolve(first, "db.internal", 40000)
    second.settle()
    assert second.gateway.stats()["policy_pins"] == 1
    assert list(second.gateway._links.read_pins()) == []  # type: ignore[union-attr]  # it has some
    govern([second], policy)
    program = second.connect(GATEWAY, port, 40001)
    second.until(lambda: program.is_established)


@pytest.mark.parametrize("ours", [False, True])
def test_what_the_old_policy_of_another_worker_has_let_pass_is_not_learnt(
    benches: list[Bench], ours: bool
) -> None:
    """The other answers for a moment longer by the old policy.  A record of ours may have any address."""
    first, second = benches
    first.gateway.set_policy(dump(Policy.deny().allow("a.example", private=True)).decode(), "keep")
    second.gateway.set_policy(dump(Policy.deny().allow("a.example")).decode(), "keep")
    links, until = first.gateway._links, first.now + 100
    assert links is not None
    links.send_pins([(to_wire("a.example"), bytes((10, 9, 9, 9)), until, ours)])
    second.settle()
    assert second.gateway.stats()["policy_pins"] == ours
    links.send_pins([(to_wire("a.example"), bytes((192, 0, 2, 1)), until, ours)])
    second.settle()
    assert second.gateway.stats()["policy_pins"] == ours + 1
    second.gateway.set_policy(None, "keep")
    links.send_pins([(to_wire("a.example"), bytes((10, 9, 9, 9)), until, ours)])
    second.settle()
    second.gateway.set_policy(dump(Policy.deny().allow("a.example")).decode(), "keep")
    assert second.gateway.stats()["policy_pins"] == 0


def test_a_flow_to_a_pin_that_was_lost_is_refused(benches: list[Bench], listener: socket.socket) -> None:
    first, second = benches
    port = port_of(listener)
    govern(benches, Policy.deny().allow("db.internal", ports=port))
    links = first.gateway._links
    assert links is not None
    other = [(to_wire("other.internal"), bytes((192, 0, 2, 1)), 0.0, False)]
    while not links.pins_lost:
        links.send_pins(other * 200)
    resolve(first, "db.internal", 40000)
    assert links.pins_lost == 2
    program = second.connect(GATEWAY, port, 40001)
    second.settle()
    assert not program.is_established
    assert second.gateway.stats()["policy_refused"] == 1


MEMBER, OTHER = 7, 8


def govern_member(bench: Bench, policy: Policy | None, member: int = MEMBER) -> None:
    """Give the guest a policy of its own, while nothing may pass for all others."""
    bench.gateway.zone.add(Record("*.internal", "10.0.2.2"))
    text = None if policy is None else dump(policy).decode()
    bench.gateway.set_policy_of(member, (ip_address(GUEST),), text, "keep")


def test_a_name_that_one_worker_resolves_for_a_member_is_known_to_all(
    benches: list[Bench], listener: socket.socket
) -> None:
    """Also before the other worker has the policy; and it is known for that member alone."""
    first, second = benches
    port = port_of(listener)
    policy = Policy.deny().allow("db.internal", ports=port, private=True)
    govern(benches, policy)
    govern_member(first, policy)
    resolve(first, "db.internal", 40000)
    second.settle()
    assert second.gateway.stats()["policy_pins"] == 0, "it is no pin of the common policy"
    govern_member(second, policy)
    program = second.connect(GATEWAY, port, 40001)
    second.until(lambda: program.is_established)
    for bench in benches:
        govern_member(bench, policy, OTHER)
    second.connect(GATEWAY, port, 40002)
    second.settle()
    assert second.gateway.stats()["policy_refused"] == 1, (
        "the next member at this address has asked for nothing"
    )
    resolve(first, "db.internal", 40003)
    program = second.connect(GATEWAY, port, 40004)
    second.gateway._pump.read_frames(8)  # the SYN, although its inbox of pins was not looked at
    second.until(lambda: program.is_established)
    for bench in benches:
        govern_member(bench, None, OTHER)
    assert second.gateway.stats()["policy_pins"] == 0


def test_faults_by_name_are_those_of_every_worker(benches: list[Bench], listener: socket.socket) -> None:
    first, second = benches
    port = port_of(listener)
    for bench in benches:
        bench.gateway.zone.add(Record("*.internal", "10.0.2.2"))
    script = dump(read_script([(0, Faults(refuse=True, to="db.internal"))])).decode()
    blocks = [FaultBlocks(bench.gateway) for bench in benches]
    for each in blocks:
        each.begin(1, script)
    program = second.connect(GATEWAY, port, 40000)
    second.until(lambda: program.is_established)
    resolve(first, "db.internal", 40001)
    refused = second.connect(GATEWAY, port, 40002)
    second.gateway._pump.read_frames(8)  # the SYN, although its inbox of pins was not looked at
    second.until(lambda: refused.why)
    assert not refused.is_established
    assert [each.end(1)["refused"] for each in blocks] == [0, 1]
    program = second.connect(GATEWAY, port, 40003)
    second.until(lambda: program.is_established)


def test_a_flow_that_was_disturbed_by_no_fault_is_when_another_worker_gives_its_name(
    benches: list[Bench], listener: socket.socket
) -> None:
    first, second = benches
    script = dump(read_script([(0, Faults(blackhole=True, to="db.internal"))])).decode()
    blocks = [FaultBlocks(bench.gateway) for bench in benches]
    for bench, each in zip(benches, blocks, strict=True):
        bench.gateway.zone.add(Record("*.internal", "10.0.2.2"))
        each.begin(1, script)
    program = second.connect(GATEWAY, port_of(listener), 40000)
    second.until(lambda: program.is_established)
    resolve(first, "db.internal", 40001)
    second.connect(GATEWAY, port_of(listener), 40002)
    second.gateway._pump.read_frames(8)  # the SYN, although its inbox of pins was not looked at
    assert [each.end(1)["out_lost"] > 0 for each in blocks] == [False, True]
