"""The DNS server on real sockets: few of them, the right ones, and streams with many queries."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest

from netns_kit import Flow, Record, Refusal, Uplink
from netns_kit.dns import Framing, Manner, framed
from netns_kit.dns.server import TRANSFERS
from netns_kit.domain_names import to_wire
from netns_kit.gateway.relay import dns, dns_streams
from netns_kit.gateway.relay.dns import QUERIES_PER_SOCKET, SOCKETS_PER_UPSTREAM
from netns_kit.gateway.relay.dns_streams import FULL, IDLE, NONSENSE_MAX, PIPELINED
from netns_kit.stack import Closed
from netns_kit.stack.wire import icmp
from netns_kit.tap.frame_device import FRAME_MAX
from netns_kit.uplink.dial import Connected, Dial, Refused
from netns_kit.uplink.flow import Endpoint, Target
from netns_kit.uplink.sockets import socket_address
from tests.support.bench import Bench, Mailbox, Make, Program, Spy, feed, readable
from tests.support.packets import PORT, RESOLVER, syn
from tests.support.servers import closed_port, port_of, reset


def query(name: str, ident: int = 1) -> bytes:
    header = ident.to_bytes(2, "big") + bytes.fromhex("0100 0001 0000 0000 0000")
    return header + to_wire(name) + bytes.fromhex("0001 0001")


def reply(message: bytes, *, rcode: int = 0, more: bytes = b"") -> bytes:
    return message[:2] + bytes((0x81, 0x80 | rcode)) + message[4:] + more


class Resolver:
    """A resolver whose messages the test takes and answers; UDP and TCP on one port."""

    def __init__(self, bench: Callable[[], Bench]) -> None:
        self._bench = bench
        self.listener, self.udp = both()
        self.port = port_of(self.listener)
        self.udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
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


def both() -> tuple[socket.socket, socket.socket]:
    """A listener and a socket for datagrams, with the same port: another program may have one of the two."""
    while True:
        listener = socket.create_server(("127.0.0.1", 0))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.bind(("127.0.0.1", port_of(listener)))
        except OSError:
            listener.close()
            udp.close()
        else:
            return listener, udp


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


def test_two_alike_have_an_answer_each_and_are_asked_once(bench: Bench, resolver: Resolver) -> None:
    program = connected(bench)
    program.send(2 * framed(query("a.example")) + framed(query("A.example", 2)))
    upstream = resolver.accept()
    for message in resolver.messages(upstream, 1):
        upstream.send(framed(reply(message)))
    assert heard(bench, program, 3) == [*2 * [reply(query("a.example"))], reply(query("A.example", 2))]
    assert bench.gateway.stats()["dns_joined"] == 2


def test_many_sockets_that_ask_the_same_are_one_question_upstream(bench: Bench, resolver: Resolver) -> None:
    boxes = [ask(bench, query("a.example", number), PORT + number) for number in range(200)]
    message, relay = resolver.datagram()
    bench.settle()
    with pytest.raises(BlockingIOError):
        resolver.udp.recv(512)
    resolver.udp.sendto(reply(message), relay)
    bench.until(lambda: all(box.received for box in boxes))
    assert [box.received for box in boxes] == [[reply(query("a.example", number))] for number in range(200)]


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
    assert bench.gateway.dns.queued == 0


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
    bench.stop_the_clock()  # a query has seconds
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


def test_no_two_in_a_row_leave_from_one_port_if_told_so(
    benches: list[Bench], resolver: Resolver, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a resolver, or what is in front of it, that does not tell two questions of one port apart."""
    uplink = Uplink(dns=[f"127.0.0.1:{resolver.port}"])
    monkeypatch.setattr(uplink, "dns_manner", lambda: Manner(ports=True))
    bench = make(uplink)
    benches.append(bench)
    for number in range(2 * SOCKETS_PER_UPSTREAM):
        ask(bench, query(f"n{number}.example"), PORT + number)
    relays = [resolver.datagram()[1] for _ in range(2 * SOCKETS_PER_UPSTREAM)]
    assert len(set(relays[:SOCKETS_PER_UPSTREAM])) == SOCKETS_PER_UPSTREAM
    assert relays[:SOCKETS_PER_UPSTREAM] == relays[SOCKETS_PER_UPSTREAM:], "they take turns"


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
        question = query(f"n{number}.example")
        box = ask(bench, question, 20_000 + number)
        message, relay = resolver.datagram()
        while (
            question[12:].lower() not in message.lower()
        ):  # what was asked again while this machine was busy
            message, relay = resolver.datagram()
        resolver.udp.sendto(reply(message), relay)
        bench.until(lambda box=box: box.received)  # type: ignore[misc]  # bound in each round
    (sockets,) = bench.gateway.dns._sockets.values()
    assert len(sockets) == SOCKETS_PER_UPSTREAM
    assert all(len(each.ids) <= 16 for each in sockets)
    resolver.udp.sendto(reply(held_query), held_relay)
    bench.until(lambda: held.received)
    assert held.received == [reply(query("held.example"))]


def test_the_clients_own_case_comes_back(bench: Bench, resolver: Resolver) -> None:
    """Also from the cache, and whatever the resolver makes of it."""
    mailbox = ask(bench, query("wWw.ExAmple"))
    message, relay = resolver.datagram()
    assert message[2:] == query("wWw.ExAmple")[2:]
    answer = bytes.fromhex("c00c 0001 0001 0000003c 0004 c0000209")
    told = reply(message[:6] + b"\0\1" + message[8:], more=answer)
    resolver.udp.sendto(told.replace(b"ExAmple", b"example"), relay)
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


# -- what a hostile or an old-fashioned server does -------------------------------------------------------


def test_a_server_that_talks_nonsense_and_hangs_up_is_not_called_again_for_the_same(
    bench: Bench, resolver: Resolver
) -> None:
    """It is a message, and no answer: another id, or another question."""
    program = connected(bench)
    program.send(framed(query("a.example")))
    upstream = resolver.accept()
    (message,) = resolver.messages(upstream, 1)
    upstream.send(framed(reply(bytes((message[0] ^ 1,)) + message[1:])))
    upstream.send(framed(reply(message[:2] + query("b.example")[2:])))
    upstream.close()
    (answer,) = heard(bench, program, 1)
    assert answer[3] & 15 == 2, "SERVFAIL"
    bench.settle()
    with pytest.raises(BlockingIOError):
        resolver.listener.accept()


@pytest.mark.parametrize("size", [0, 11, 12, 40])
def test_a_server_that_says_nothing_else_than_nonsense_is_given_up(
    bench: Bench, resolver: Resolver, size: int
) -> None:
    """One that stays and goes on; it is not read to the end."""
    program = connected(bench)
    program.send(framed(query("a.example")))
    upstream = resolver.accept()
    resolver.messages(upstream, 1)
    upstream.sendall((NONSENSE_MAX + 1) * framed(bytes(size)))
    (answer,) = heard(bench, program, 1)
    assert answer[3] & 15 == 2, "SERVFAIL"
    assert bench.gateway.stats()["dns_timeouts"] == 0, "at once"
    assert bench.gateway.stats()["dns_sockets"] == 0


def test_a_server_that_ends_an_idle_connection_has_not_failed(bench: Bench, resolver: Resolver) -> None:
    """Also if a query was left on it that nobody waits for any more."""
    program = connected(bench)
    mailbox = ask(bench, query("udp.example"), PORT + 9)  # keeps the sockets open
    program.send(framed(query("a.example")) + framed(query("b.example", 2)))
    upstream = resolver.accept()
    first, second = resolver.messages(upstream, 2)
    bench.ahead += 2
    bench.until(lambda: bench.gateway.stats()["dns_timeouts"] >= 2)
    bench.gateway.dns._streams[next(iter(bench.gateway.dns._streams))].unanswered[b"??"] = b"left"
    upstream.sendall(framed(reply(first)) + framed(reply(second)))
    assert len(heard(bench, program, 2)) == 2
    upstream.close()
    bench.settle()
    (known,) = [
        each for each in bench.gateway.dns._server.proxy._resolvers.values() if each.upstream[2] == "tcp"
    ]
    assert not known.has_failed
    with pytest.raises(BlockingIOError):
        resolver.listener.accept()
    assert not mailbox.received


ZONE = bytes.fromhex("00fc 0001")  # AXFR, IN


def transfer(ident: int = 1) -> bytes:
    return query("zone.example", ident)[:-4] + ZONE


def unread(bench: Bench, resolver: Resolver, count: int) -> tuple[Program, socket.socket, bytes]:
    """A transfer of so many messages to a client that does not read: it, the server, and what is left to say."""
    program = connected(bench)
    program.deliver = lambda data: 0  # type: ignore[method-assign]  # it takes nothing
    program.send(framed(transfer()))
    upstream = resolver.accept()
    upstream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    (message,) = resolver.messages(upstream, 1)
    left = b"".join(framed(reply(message, more=number.to_bytes(2, "big") * 30000)) for number in range(count))
    while readable(upstream) or select.select([], [upstream], [], 0)[1]:
        left = left[upstream.send(left) :]
        bench.settle()
    return program, upstream, left


def test_a_transfer_is_read_no_faster_than_the_client_reads(bench: Bench, resolver: Resolver) -> None:
    """However long that takes; and the others, who ask the same server, do not wait."""
    count = 200
    program, upstream, left = unread(bench, resolver, count)
    assert left, "all of it was read"
    assert FULL <= bench.gateway.dns.queued < FULL + (1 << 17)
    other = connected(bench, PORT + 1)
    other.send(framed(query("a.example", 7)))
    shared = resolver.accept()
    (asked,) = resolver.messages(shared, 1)
    shared.send(framed(reply(asked)))
    assert heard(bench, other, 1) == [reply(query("a.example", 7))]
    for _ in range(5):
        bench.ahead += 1.5  # longer than is waited for a message that could come
        bench.settle()
    del program.deliver  # it reads again
    assert program.connection is not None
    program.connection.resume(bench.now)
    feed(bench, upstream, left)
    found = heard(bench, program, count)
    assert [each[-2:] for each in found] == [number.to_bytes(2, "big") for number in range(count)]
    assert {each[:2] for each in found} == {b"\0\1"}


def test_a_transfer_whose_client_has_gone_ends(bench: Bench, resolver: Resolver) -> None:
    program, upstream, _ = unread(bench, resolver, 200)
    assert program.connection is not None
    program.connection.abort(bench.now)
    bench.until(lambda: bench.gateway.stats()["dns_sockets"] == 0)
    bench.until(lambda: readable(upstream))
    with pytest.raises(ConnectionResetError):
        upstream.recv(1)
    assert bench.gateway.dns.queued == 0


def test_a_transfer_that_is_not_read_at_all_ends_in_time(bench: Bench, resolver: Resolver) -> None:
    program, _, _ = unread(bench, resolver, 200)
    for _ in range(12):
        bench.ahead += 1.0
        bench.settle()
    bench.until(lambda: program.why is Closed.RESET)
    bench.until(lambda: bench.gateway.stats()["dns_sockets"] == 0)


def test_so_many_transfers_at_a_time(bench: Bench, resolver: Resolver) -> None:
    """Each has a connection of its own: more are refused, and ordinary queries are not among them."""
    program = connected(bench)
    program.send(b"".join(framed(transfer(number)) for number in range(TRANSFERS + 1)))
    streams = [resolver.accept() for _ in range(TRANSFERS)]
    (refused,) = heard(bench, program, 1)
    assert (refused[:2], refused[3] & 15) == (TRANSFERS.to_bytes(2, "big"), 2)
    streams[0].close()
    streams[1].send(framed(reply(resolver.messages(streams[1], 1)[0])))
    assert {each[:2] for each in heard(bench, program, 2)} == {b"\0\0", b"\0\1"}
    bench.ahead += 1.1
    bench.until(lambda: bench.gateway.stats()["dns_sockets"] < TRANSFERS)


def test_who_leaves_most_is_cut_off_and_not_who_comes_next(
    bench: Bench, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy, modest = connected(bench), connected(bench, PORT + 1)
    greedy.deliver = lambda data: 0  # type: ignore[method-assign]  # it takes nothing
    greedy.send(b"".join(framed(query(f"n{number}.example", number)) for number in range(PIPELINED)))
    upstream = resolver.accept()
    for message in resolver.messages(upstream, PIPELINED):
        feed(bench, upstream, framed(reply(message, more=bytes(60000))))
    bench.settle()
    assert bench.gateway.dns.queued > 1 << 20
    monkeypatch.setattr(dns_streams, "QUEUED_MAX", bench.gateway.dns.queued - 1)
    monkeypatch.setattr(dns_streams, "IDLE", 1e9)
    modest.send(framed(query("modest.example", 9)))
    (message,) = resolver.messages(resolver.accept(), 1)
    feed(bench, resolver.streams[-1], framed(reply(message, more=bytes(60000))))
    assert len(heard(bench, modest, 1)) == 1
    bench.until(lambda: greedy.why is Closed.RESET)
    assert modest.why is None


def test_handshakes_that_are_not_finished_give_way(
    bench: Bench, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest; one that is finished has nothing to do with it."""
    monkeypatch.setattr(dns, "HALF_OPEN_MAX", 8)
    program, ignored = connected(bench), memoryview(bytearray(FRAME_MAX))
    for number in range(20):
        source = bytes((10, 0, 2, 101 + number))
        bench.inject(syn(RESOLVER, 53, source))
        bench.engine.dispatch(bench.engine.poll(0), bench.now)
        while bench.far.read_into(ignored) is not None:
            pass
    assert bench.gateway.stats()["dns_clients"] == 1 + 8
    assert len(bench.gateway.stack.tcp) == 1 + 8
    bench.gateway.zone.add(Record("db.internal", "192.0.2.5"))
    program.send(framed(query("db.internal")))
    assert len(heard(bench, program, 1)) == 1


def test_of_too_many_connections_the_one_quiet_longest_gives_way(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns, "CLIENTS_MAX", 4)
    bench.gateway.zone.add(Record("db.internal", "192.0.2.5"))
    programs = [connected(bench, PORT + number) for number in range(4)]
    programs[0].send(framed(query("db.internal")))
    assert len(heard(bench, programs[0], 1)) == 1
    fifth = connected(bench, PORT + 4)
    bench.until(lambda: programs[1].why is Closed.RESET)
    assert [each.why for each in (programs[0], *programs[2:], fifth)] == [None] * 4


# -- whom an old flow asks ----------------------------------------------------------------------------------


class Moving(Spy):
    """Its resolvers are others from one moment to the next, and its policy too."""

    def __init__(self, *ports: int) -> None:
        super().__init__(policy=self._judge)
        self.now: tuple[Endpoint, ...] = tuple(Endpoint(ip_address("127.0.0.1"), port) for port in ports)
        self.asked: list[Flow] = []
        self.refuses = False

    def resolvers(self) -> tuple[Endpoint, ...]:
        return self.now

    def _judge(self, flow: Flow) -> Refusal | None:
        self.asked.append(flow)
        return Refusal.PROHIBITED if self.refuses else None


@pytest.fixture
def moving(benches: list[Bench], resolver: Resolver, make: Make) -> Moving:
    uplink = Moving(resolver.port)
    benches.append(make(uplink))
    return uplink


def test_an_old_connection_asks_new_resolvers(
    benches: list[Bench], resolver: Resolver, moving: Moving
) -> None:
    bench = benches[0]
    program = connected(bench)
    moving.now = ()
    program.send(framed(query("a.example")))
    (answer,) = heard(bench, program, 1)
    assert answer[3] & 15 == 2, "there is nobody to ask"
    with pytest.raises(BlockingIOError):
        resolver.listener.accept()


def test_an_old_socket_asks_new_resolvers(benches: list[Bench], resolver: Resolver, moving: Moving) -> None:
    """One whose first query is not answered: it is the same flow."""
    bench = benches[0]
    mailbox, flow = bench.socket(RESOLVER, 53)
    flow.send(query("a.example"), bench.now)
    resolver.datagram()
    moving.now = ()
    flow.send(query("b.example", 2), bench.now)
    bench.until(lambda: mailbox.received)
    assert (mailbox.received[0][:2], mailbox.received[0][3] & 15) == (b"\0\2", 2)


def test_the_policy_is_asked_about_dns_over_tcp(
    benches: list[Bench], resolver: Resolver, moving: Moving
) -> None:
    """About the connection, and again about what an old one asks."""
    bench = benches[0]
    program = connected(bench)
    assert [(each.protocol, str(each.destination)) for each in moving.asked] == [("tcp", "10.0.2.3:53")]
    bench.gateway.zone.add(Record("db.internal", "192.0.2.5"))
    program.send(framed(query("db.internal")))
    assert len(heard(bench, program, 1)) == 1
    moving.refuses = True
    program.send(framed(query("db.internal")))
    bench.until(lambda: program.why is Closed.RESET)
    other = bench.connect(RESOLVER, 53, PORT + 1)
    bench.until(lambda: other.why is not None)
    assert bench.gateway.stats()["flows_refused"] == 2


def test_a_question_that_is_not_allowed_any_more_is_refused_as_a_first_one_is(
    benches: list[Bench], resolver: Resolver, moving: Moving
) -> None:
    bench = benches[0]
    _, old = bench.socket(RESOLVER, 53)
    old.send(query("a.example"), bench.now)
    resolver.datagram()
    bench.answers()
    moving.refuses = True
    _, new = bench.socket(RESOLVER, 53, PORT + 1)
    for flow in (new, old):
        flow.send(query("b.example", 2), bench.now)
        bench.settle()
    first, later = (bytes(each.payload) for each in bench.answers())
    assert first[:2] == bytes((icmp.UNREACHABLE, 13))
    quoted = len(first) - len(query("b.example")) - 8
    assert (later[:2], later[quoted + 8 :]) == (first[:2], first[quoted + 8 :])
    assert later[quoted : quoted + 2] == PORT.to_bytes(2, "big")


# -- resolvers that are dialled -------------------------------------------------------------------------------


class Knock:
    """A dial with a protocol of its own: the peer says whether there may be a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    def advance(self, *, failed: bool) -> Dial:
        try:
            answer = self._socket.recv(1)
        except BlockingIOError:
            return self
        if answer == b"!":
            raise LookupError("a bug of the uplink's")
        return Connected(self._socket) if answer == b"y" else Refused(Refusal.RESET)

    def close(self) -> None:
        self._socket.close()


class Dialler(Uplink):
    """Reaches the first resolver by a pair of sockets, and nothing by sockets of the host."""

    def __init__(self, dial: Callable[[socket.socket], Dial], *others: str) -> None:
        super().__init__(dns=["192.0.2.53", *others])
        self._dial = dial
        self.flows: list[Flow] = []
        self.peers: list[socket.socket] = []

    def dial(self, flow: Flow, target: Target, *, ttl: int = 64, tos: int = 0) -> Dial:
        if str(flow.destination.address) != "192.0.2.53":
            return super().dial(flow, target, ttl=ttl, tos=tos)
        self.flows.append(flow)
        ours, theirs = socket.socketpair()
        for each in (ours, theirs):
            each.setblocking(False)
        self.peers.append(theirs)
        return self._dial(ours)


@pytest.mark.parametrize("dial", [Connected, Knock])
def test_resolvers_are_dialled_as_the_uplink_does_it(benches: list[Bench], make: Make, dial: Any) -> None:
    uplink = Dialler(dial)
    benches.append(bench := make(uplink))
    resolver = Resolver(lambda: bench)
    program = connected(bench)
    program.send(framed(query("a.example")))
    bench.until(lambda: uplink.peers)
    (peer,) = uplink.peers
    with peer, closing(resolver):
        if dial is Knock:
            bench.settle()
            assert not readable(peer), "it is not connected yet"
            peer.send(b"y")
        (message,) = resolver.messages(peer, 1)
        peer.send(framed(reply(message)))
        assert heard(bench, program, 1) == [reply(query("a.example"))]
    (flow,) = uplink.flows
    assert (str(flow.source), str(flow.destination)) == ("10.0.2.3:0", "192.0.2.53:53")


def refused(sock: socket.socket) -> Dial:
    sock.close()
    return Refused(Refusal.NET_UNREACHABLE)


def raising(sock: socket.socket) -> Dial:
    sock.close()
    raise LookupError("a bug of the uplink's")


@pytest.mark.parametrize(
    ("dial", "said"), [(refused, b""), (raising, b""), (Knock, b"n"), (Knock, b"!"), (Knock, None)]
)
def test_after_a_resolver_that_cannot_be_dialled_the_next_is_asked(
    make: Make,
    benches: list[Bench],
    resolver: Resolver,
    caplog: pytest.LogCaptureFixture,
    dial: Callable[[socket.socket], Dial],
    said: bytes | None,
) -> None:
    uplink = Dialler(dial, f"127.0.0.1:{resolver.port}")
    benches.append(bench := make(uplink))
    bench.stop_the_clock()  # no timeout helps
    descriptors = bench.engine.descriptors
    program = connected(bench)
    program.send(framed(query("a.example")))
    bench.until(lambda: uplink.peers)
    (peer,) = uplink.peers
    with peer:
        if said:
            peer.send(said)
        if said is None:  # it is silent
            bench.settle()
            bench.ahead += 10
        upstream = resolver.accept()
        (message,) = resolver.messages(upstream, 1)
        upstream.send(framed(reply(message)))
        assert heard(bench, program, 1) == [reply(query("a.example"))]
        bench.settle()
    assert bench.engine.descriptors == descriptors, "nothing is left open"
    bug = dial is raising or said == b"!"
    assert ["failed to dial" in record.message for record in caplog.records] == [True] * bug


# -- resolvers with a zone ------------------------------------------------------------------------------------


def test_a_zone_that_is_no_interface_is_a_resolver_that_fails(benches: list[Bench], make: Make) -> None:
    bench = make(Uplink(dns=["fe80::1%nonesuch"]))
    benches.append(bench)
    mailbox = ask(bench, query("a.example"))
    bench.until(lambda: mailbox.received)
    assert mailbox.received[0][3] & 15 == 2


def test_an_address_with_a_zone_is_connected_to_there() -> None:
    index = socket.if_nametoindex("lo")
    assert socket_address(IPv6Address("fe80::1%lo"), 53) == ("fe80::1", 53, 0, index)
    assert socket_address(IPv6Address(f"fe80::1%{index}"), 53) == ("fe80::1", 53, 0, index)
    assert socket_address(IPv6Address("2001:db8::1"), 53) == ("2001:db8::1", 53)
    assert socket_address(IPv4Address("192.0.2.1"), 53) == ("192.0.2.1", 53)
    with pytest.raises(OSError, match="nonesuch") as failure:
        socket_address(IPv6Address("fe80::1%nonesuch"), 53)
    assert failure.value.errno == errno.ENETUNREACH
