"""The DNS server on real sockets: few of them, the right ones, and streams with many queries."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from netns_kit import Record, Uplink
from netns_kit.dns import Framing, framed
from netns_kit.dns.names import to_wire
from netns_kit.relay import dns, dns_streams
from netns_kit.relay.dns import QUERIES_PER_SOCKET, SOCKETS_PER_UPSTREAM
from netns_kit.relay.dns_streams import IDLE, PIPELINED
from netns_kit.stack import Closed
from tests.servers import closed_port, reset
from tests.test_gateway import (
    PORT,
    RESOLVER,
    Bench,
    Mailbox,
    Make,
    Program,
    Spy,
    feed,
    make,
    port_of,
    readable,
)

__all__ = ["make"]


def query(name: str, ident: int = 1) -> bytes:
    header = ident.to_bytes(2, "big") + bytes.fromhex("0100 0001 0000 0000 0000")
    return header + to_wire(name) + bytes.fromhex("0001 0001")


def reply(message: bytes, *, rcode: int = 0, more: bytes = b"") -> bytes:
    return message[:2] + bytes((0x81, 0x80 | rcode)) + message[4:] + more


class Resolver:
    """A resolver whose messages the test takes and answers; UDP and TCP on one port."""

    def __init__(self, bench: Callable[[], Bench]) -> None:
        self._bench = bench
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = port_of(self.listener)
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.udp.bind(("127.0.0.1", self.port))
        self.streams: list[socket.socket] = []
        self._framings: list[Framing] = []
        for sock in (self.listener, self.udp):
            sock.setblocking(False)

    def close(self) -> None:
        for sock in (self.listener, self.udp, *self.streams):
            sock.close()

    def datagram(self) -> tuple[bytes, tuple[str, int]]:
        """The next that comes."""
        found = list[tuple[bytes, tuple[str, int]]]()

        def come() -> bool:
            try:
                found.append(self.udp.recvfrom(1 << 16))
            except BlockingIOError:
                return False
            return True

        self._bench().until(come)
        return found[0]

    def accept(self) -> socket.socket:
        """The next connection."""

        def come() -> bool:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return False
            sock.setblocking(False)
            self.streams.append(sock)
            return True

        self._bench().until(come)
        return self.streams[-1]

    def messages(self, sock: socket.socket, count: int) -> list[bytes]:
        """So many from a connection."""
        found, framing = list[bytes](), Framing()

        def come() -> bool:
            try:
                data = sock.recv(1 << 16)
            except BlockingIOError:
                return False
            assert data, "ended early"
            while data:
                size, message = framing.take(data)
                data = data[size:]
                if message is not None:
                    found.append(message)
            return len(found) >= count

        self._bench().until(come)
        assert len(found) == count
        return found


@pytest.fixture
def benches() -> list[Bench]:
    return []


@pytest.fixture
def resolver(benches: list[Bench], leaks: None) -> Iterator[Resolver]:
    made = Resolver(lambda: benches[0])
    yield made
    made.close()


@pytest.fixture
def bench(benches: list[Bench], resolver: Resolver, make: Make) -> Bench:
    benches.append(make(Uplink(dns=[f"127.0.0.1:{resolver.port}"])))
    return benches[0]


def connected(bench: Bench, source: int = PORT) -> Program:
    program = bench.connect(RESOLVER, 53, source)
    bench.until(lambda: program.is_established)
    return program


def heard(bench: Bench, program: Program, count: int) -> list[bytes]:
    """So many answers, which are taken."""
    framing, found = Framing(), list[bytes]()

    def come() -> bool:
        while program.received:
            size, message = framing.take(bytes(program.received))
            del program.received[:size]
            if message is not None:
                found.append(message)
        return len(found) >= count or program.why is not None

    bench.until(come)
    assert len(found) == count
    return found


def ask(bench: Bench, message: bytes, source: int = PORT) -> Mailbox:
    mailbox, flow = bench.socket(RESOLVER, 53, source)
    flow.send(message, bench.now)
    return mailbox


# -- streams ----------------------------------------------------------------------------------------------


def test_many_queries_on_one_connection_answered_as_the_answers_come(
    bench: Bench, resolver: Resolver
) -> None:
    program = connected(bench)
    queries = [query(f"n{number}.example", number) for number in range(5)]
    program.send(b"".join(map(framed, queries)))
    upstream = resolver.accept()
    asked = resolver.messages(upstream, 5)
    assert [each[2:] for each in asked] == [each[2:] for each in queries]
    assert len({each[:2] for each in asked}) == 5
    for message in reversed(asked):
        upstream.send(framed(reply(message)))
    assert heard(bench, program, 5) == [reply(each) for each in reversed(queries)]
    program.send(framed(query("n9.example", 9)))
    assert resolver.messages(resolver.accept(), 1)[0][2:] == query("n9.example")[2:], "idle, it was closed"


def test_two_alike_have_an_answer_each(bench: Bench, resolver: Resolver) -> None:
    program = connected(bench)
    program.send(2 * framed(query("a.example")))
    upstream = resolver.accept()
    for message in resolver.messages(upstream, 2):
        upstream.send(framed(reply(message)))
    assert heard(bench, program, 2) == 2 * [reply(query("a.example"))]


def test_names_of_ours_over_a_stream(bench: Bench) -> None:
    bench.gateway.zone.add(Record("db.internal", "192.0.2.5"))
    program = connected(bench)
    for cut in (1, 2, 3, 20):
        message = framed(query("db.internal", cut))
        program.send(message[:cut])
        bench.settle()
        program.send(message[cut:])
        (answer,) = heard(bench, program, 1)
        assert answer[:2] == message[2:4]
        assert answer.endswith(bytes((192, 0, 2, 5)))


def test_who_has_asked_and_says_no_more_is_answered_and_the_connection_ends(
    bench: Bench, resolver: Resolver
) -> None:
    program = connected(bench)
    program.send(framed(query("a.example")))
    program.shutdown()
    upstream = resolver.accept()
    (message,) = resolver.messages(upstream, 1)
    assert not program.ended
    upstream.send(framed(reply(message)))
    assert heard(bench, program, 1) == [reply(query("a.example"))]
    bench.until(lambda: program.ended)
    bench.until(lambda: program.why is Closed.NORMAL)


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\xff\xff",
        framed(b""),
        framed(b"x" * 12),
        framed(reply(query("a.example"))),
        framed(query("a.example")[:-1]),
    ],
)
def test_who_sends_rubbish_is_cut_off(bench: Bench, rubbish: bytes) -> None:
    program = connected(bench)
    program.send(rubbish)
    bench.until(lambda: program.why is Closed.RESET)


def test_a_client_with_nothing_to_ask_is_hung_up_on(bench: Bench) -> None:
    program = connected(bench)
    bench.settle()
    bench.ahead += IDLE - 1
    bench.settle()
    assert not program.ended
    bench.ahead += 2
    bench.until(lambda: program.ended)
    bench.ahead += IDLE + 1
    bench.until(lambda: program.why is Closed.RESET)


def test_more_than_are_served_at_once_wait_their_turn(bench: Bench, resolver: Resolver) -> None:
    program, count = connected(bench), 3 * PIPELINED
    program.send(b"".join(framed(query(f"n{number}.example", number)) for number in range(count)))
    upstream = resolver.accept()
    asked = resolver.messages(upstream, PIPELINED)
    bench.settle()
    assert bench.gateway.stats()["dns_pending"] == PIPELINED
    for number in range(count):
        upstream.send(framed(reply(asked.pop(0))))
        if number < count - PIPELINED:
            asked += resolver.messages(upstream, 1)
    found = heard(bench, program, count)
    assert sorted(found) == sorted(reply(query(f"n{number}.example", number)) for number in range(count))


def test_who_does_not_read_is_cut_off_when_too_much_waits(
    bench: Bench, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns_streams, "QUEUED_MAX", 1 << 18)
    monkeypatch.setattr(dns_streams, "IDLE", 1e9)
    program = connected(bench)
    assert program.connection is not None
    program.deliver = lambda data: 0  # type: ignore[method-assign]  # it takes nothing
    program.send(b"".join(framed(query(f"n{number}.example", number)) for number in range(PIPELINED)))
    upstream = resolver.accept()
    for message in resolver.messages(upstream, PIPELINED):
        feed(bench, upstream, framed(reply(message, more=bytes(60000))))
    bench.until(lambda: not bench.gateway.stack.tcp)
    assert bench.gateway._dns.queued == 0


# -- upstreams over streams -------------------------------------------------------------------------------


def test_a_server_that_hangs_up_after_an_answer_is_asked_the_rest_again(
    bench: Bench, resolver: Resolver
) -> None:
    program = connected(bench)
    queries = [query(f"n{number}.example", number) for number in range(4)]
    program.send(b"".join(map(framed, queries)))
    for left in (4, 3, 2, 1):
        upstream = resolver.accept()
        asked = resolver.messages(upstream, left)
        upstream.send(framed(reply(asked[0])))
        upstream.close()
    assert heard(bench, program, 4) == [reply(each) for each in queries]
    assert bench.gateway.stats()["dns_failovers"] == 0


def test_what_a_server_said_before_a_reset_is_heard(bench: Bench, resolver: Resolver) -> None:
    """It closes while there is more to read, and our next query meets the reset before its answers are taken."""
    program = connected(bench)
    program.send(framed(query("n0.example", 0)))
    upstream = resolver.accept()
    (first,) = resolver.messages(upstream, 1)
    program.send(framed(query("n1.example", 1)))
    bench.until(lambda: readable(upstream))
    upstream.send(framed(reply(first)))
    reset(upstream)  # the second query is not read
    program.send(framed(query("n2.example", 2)))
    again = resolver.accept()
    asked = resolver.messages(again, 2)
    again.send(b"".join(framed(reply(each)) for each in asked))
    expected = sorted(reply(query(f"n{number}.example", number)) for number in range(3))
    assert sorted(heard(bench, program, 3)) == expected


def test_a_server_that_hangs_up_without_an_answer_has_failed(bench: Bench, resolver: Resolver) -> None:
    program = connected(bench)
    program.send(framed(query("a.example")))
    upstream = resolver.accept()
    resolver.messages(upstream, 1)
    upstream.close()
    (answer,) = heard(bench, program, 1)
    assert answer[3] & 15 == 2, "SERVFAIL"


def test_what_is_no_message_ends_the_connection_to_a_server(bench: Bench, resolver: Resolver) -> None:
    """A message cut short by the end, which is no exception either."""
    program = connected(bench)
    program.send(framed(query("a.example")))
    upstream = resolver.accept()
    (message,) = resolver.messages(upstream, 1)
    upstream.send(framed(reply(message))[:-3])
    bench.settle()
    upstream.close()
    (answer,) = heard(bench, program, 1)
    assert answer[3] & 15 == 2


def test_the_next_server_is_asked_over_tcp_too(benches: list[Bench], resolver: Resolver, make: Make) -> None:
    bench = make(Uplink(dns=[f"127.0.0.1:{closed_port()}", f"127.0.0.1:{resolver.port}"]))
    benches.append(bench)
    program = connected(bench)
    program.send(framed(query("a.example")))
    upstream = resolver.accept()
    (message,) = resolver.messages(upstream, 1)
    upstream.send(framed(reply(message)))
    assert heard(bench, program, 1) == [reply(query("a.example"))]


def test_a_stream_and_datagrams_have_nothing_to_do_with_each_other(bench: Bench, resolver: Resolver) -> None:
    program = connected(bench)
    program.send(framed(query("a.example", 7)))
    mailbox = ask(bench, query("a.example", 7), PORT + 1)
    by_udp, relay = resolver.datagram()
    upstream = resolver.accept()
    (by_tcp,) = resolver.messages(upstream, 1)
    resolver.udp.sendto(reply(by_tcp), relay)
    bench.settle()
    assert not mailbox.received
    assert bench.gateway.stats()["dns_unmatched"] == 1
    upstream.send(framed(reply(by_tcp)))
    resolver.udp.sendto(reply(by_udp), relay)
    assert len(heard(bench, program, 1)) == 1
    bench.until(lambda: mailbox.received)


# -- datagrams --------------------------------------------------------------------------------------------


def test_a_storm_takes_a_few_sockets_and_no_more(bench: Bench, resolver: Resolver) -> None:
    """10,000 queries, of which thousands are under way at a time."""
    count, at_once, most = 10_000, 2_000, 0
    mailboxes, relays = list[Mailbox](), set[tuple[str, int]]()
    for start in range(0, count, at_once):
        for number in range(start, start + at_once):
            mailboxes.append(ask(bench, query(f"n{number}.example"), 20_000 + number))
            if number % 50 == 49:
                bench.settle()
        most = max(most, bench.gateway.stats()["dns_sockets"])
        for _ in range(at_once):
            message, relay = resolver.datagram()
            relays.add(relay)
            resolver.udp.sendto(reply(message), relay)
            if _ % 50 == 49:
                bench.settle()
    bench.until(lambda: all(mailbox.received for mailbox in mailboxes))
    assert most == SOCKETS_PER_UPSTREAM
    assert bench.gateway.stats()["dns_sockets"] == 0
    assert bench.gateway.stats()["dns_timeouts"] == 0
    assert SOCKETS_PER_UPSTREAM <= len(relays) <= SOCKETS_PER_UPSTREAM * count // at_once


def test_ports_change(bench: Bench, resolver: Resolver) -> None:
    for number in range(QUERIES_PER_SOCKET + 1):
        ask(bench, query(f"n{number}.example"), PORT + number)
    relays = [resolver.datagram()[1] for _ in range(QUERIES_PER_SOCKET + 1)]
    assert len(set(relays[:-1])) == 1
    assert relays[-1] != relays[0]


def test_forged_answers_are_ignored(bench: Bench, resolver: Resolver) -> None:
    """From another port, under another id, and to another of our own ports."""
    for number in range(QUERIES_PER_SOCKET):
        ask(bench, query(f"n{number}.example"), PORT + number)
    first = [resolver.datagram() for _ in range(QUERIES_PER_SOCKET)]
    mailbox = ask(bench, query("a.example"), PORT + 999)
    message, relay = resolver.datagram()
    assert relay != first[0][1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as forger:
        forger.bind(("127.0.0.1", 0))
        forger.sendto(reply(message), relay)
    wrong = bytes((message[0] ^ 1,)) + message[1:]
    resolver.udp.sendto(reply(wrong), relay)
    resolver.udp.sendto(reply(message), first[0][1])
    bench.until(lambda: bench.gateway.stats()["dns_unmatched"] == 2)
    bench.settle()
    assert not mailbox.received
    resolver.udp.sendto(reply(message), relay)
    bench.until(lambda: mailbox.received)
    assert mailbox.received == [reply(query("a.example"))]


def test_a_socket_that_has_asked_much_does_not_take_what_another_asked(
    bench: Bench, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is answered is forgotten, sooner or later."""
    monkeypatch.setattr(dns, "QUERIES_PER_SOCKET", 2)
    monkeypatch.setattr(dns, "IDS_KEPT", 8)
    held = ask(bench, query("held.example"))
    held_query, held_relay = resolver.datagram()  # keeps the sockets open
    for number in range(8 * 8 * SOCKETS_PER_UPSTREAM):
        box = ask(bench, query(f"n{number}.example"), 20_000 + number)
        message, relay = resolver.datagram()
        resolver.udp.sendto(reply(message), relay)
        bench.until(lambda box=box: box.received)  # type: ignore[misc]  # bound in each round
    (sockets,) = bench.gateway._dns._sockets.values()
    assert len(sockets) == SOCKETS_PER_UPSTREAM
    assert all(len(each.ids) <= 16 for each in sockets)
    resolver.udp.sendto(reply(held_query), held_relay)
    bench.until(lambda: held.received)
    assert held.received == [reply(query("held.example"))]


def test_the_clients_own_case_comes_back(bench: Bench, resolver: Resolver) -> None:
    """Also from the cache; a resolver that changes it is not believed."""
    mailbox = ask(bench, query("wWw.ExAmple"))
    message, relay = resolver.datagram()
    assert message[2:] == query("wWw.ExAmple")[2:]
    answer = bytes.fromhex("c00c 0001 0001 0000003c 0004 c0000209")
    told = reply(message[:6] + b"\0\1" + message[8:], more=answer)
    resolver.udp.sendto(told.replace(b"ExAmple", b"example"), relay)
    bench.until(lambda: bench.gateway.stats()["dns_unmatched"] == 1)
    assert not mailbox.received
    resolver.udp.sendto(told, relay)
    bench.until(lambda: mailbox.received)
    assert mailbox.received == [b"\0\1" + told[2:]]
    again = ask(bench, query("Www.exaMPLE", 9), PORT + 1)
    bench.until(lambda: again.received)
    assert again.received == [b"\0\x09" + told[2:12] + query("Www.exaMPLE")[12:] + answer]


def test_another_port_of_the_dns_address_is_refused(bench: Bench) -> None:
    program = bench.connect(RESOLVER, 853)
    bench.until(lambda: program.why is Closed.RESET)


def test_a_resolver_of_the_same_address_is_another(benches: list[Bench], make: Make) -> None:
    """The host is itself in a namespace of ours."""
    uplink = Spy(dns=["10.0.2.3"])
    benches.append(make(uplink))
    ask(benches[0], query("a.example"))
    benches[0].until(lambda: ("udp", ip_address("10.0.2.3")) in uplink.__dict__.get("opened", ()))


def test_descriptors_run_out(bench: Bench, resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that is there goes on asking."""

    def fail(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    boxes = [ask(bench, query("a.example"))]
    message, relay = resolver.datagram()
    monkeypatch.setattr(bench.uplink, "open", fail)
    boxes += [ask(bench, query(f"n{n}.example"), PORT + 1 + n) for n in range(2 * QUERIES_PER_SOCKET)]
    for _ in boxes[1:]:
        resolver.udp.sendto(reply(resolver.datagram()[0]), relay)
    bench.until(lambda: all(box.received for box in boxes[1:]))
    resolver.udp.sendto(reply(message), relay)
    bench.until(lambda: boxes[0].received)
    ask(bench, query("b.example"), PORT - 1)
    bench.until(lambda: bench.gateway.stats()["dns_gave_up"] == 1)


def test_without_resolvers_only_what_is_ours_is_answered(benches: list[Bench], make: Make) -> None:
    bench = make(Uplink(dns=[]))
    bench.gateway.zone.add(Record("db.internal", "192.0.2.5"))
    for name, code in ("db.internal", 0), ("www.example", 2):
        mailbox = ask(bench, query(name), PORT + code)
        bench.until(lambda box=mailbox: box.received)  # type: ignore[misc]  # bound in each round
        assert mailbox.received[0][3] & 15 == code
