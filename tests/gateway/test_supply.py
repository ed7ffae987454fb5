"""Sockets of a namespace, ordered from an agent that the test is."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from netns_kit.child.channel import send_record
from netns_kit.child.supply import ORDER, REPLY
from netns_kit.forwarder.arrivals import Arrival, Place
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.inside import UNIX, UNIX_AT_ONCE, Inside, Kind

STREAM = Kind(int(socket.AF_INET), int(socket.SOCK_STREAM))
CROWD = 1000


class Bench(NamedTuple):
    """The sockets as the engine has them, and the agent's end."""

    engine: Engine
    inside: Inside
    agent: socket.socket

    def settle(self) -> None:
        while events := self.engine.poll(0):
            self.engine.dispatch(events, 0.0)

    def reply(self, kind: Kind, error: int = 0, count: int = 0) -> None:
        """Answer an order."""
        with ExitStack() as stack:
            made = [stack.enter_context(socket.socket(kind.family, kind.type)) for _ in range(count)]
            send_record(self.agent, REPLY.pack(*kind, error), [each.fileno() for each in made])
        self.settle()


@pytest.fixture
def bench(leaks: None) -> Iterator[Bench]:
    engine = Engine()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    inside = Inside(engine, ours, lambda: True)
    with theirs:
        yield Bench(engine, inside, theirs)
    inside.close()
    engine.close()


def crowd(bench: Bench) -> list[int]:
    """Many clients who wait for a socket, each with four places to try; the errors that they end with."""
    errors: list[int] = []

    def done(sock: socket.socket | OSError, _: Place) -> None:
        assert isinstance(sock, OSError)
        errors.append(sock.errno or 0)

    for _ in range(CROWD):
        places = [Place(STREAM, None, ("127.0.0.1", 9))] * 4
        Arrival(bench.inside, bench.engine, places, done).begin()
    return errors


def test_the_end_of_the_agent_is_told_to_all_who_wait(bench: Bench) -> None:
    """Each of them asks again, for its next place."""
    errors = crowd(bench)
    bench.agent.close()
    bench.settle()
    assert errors == [errno.ENETDOWN] * CROWD


def test_an_error_is_told_to_all_who_wait(bench: Bench) -> None:
    errors = crowd(bench)
    for _ in range(4):
        assert errors == []
        bench.reply(STREAM, errno.EMFILE)
    assert errors == [errno.EMFILE] * CROWD


def test_few_connections_to_unix_sockets_are_ordered_at_once(bench: Bench) -> None:
    """Each has its own, though a reply tells no address."""
    got: list[tuple[int, object]] = []

    def taken(number: int, sock: socket.socket | OSError) -> None:
        got.append((number, sock))

    for number in range(3 * UNIX_AT_ONCE):
        bench.inside.connect_unix(f"/{number}", partial(taken, number))
    orders = []
    for number in range(3 * UNIX_AT_ONCE):
        with suppress(BlockingIOError):
            while True:
                orders.append(bench.agent.recv(256))
        assert len(orders) <= number + UNIX_AT_ONCE
        assert orders[number] == ORDER.pack(*UNIX, 1) + b"/%d" % number
        error = errno.EACCES if number % 2 else 0
        bench.reply(UNIX, error, 0 if error else 1)
    for number, found in got:
        assert isinstance(found, OSError) == bool(number % 2)
        if isinstance(found, socket.socket):
            found.close()
    assert [number for number, _ in got] == list(range(3 * UNIX_AT_ONCE))


def test_who_stops_waiting_is_not_told_and_connects_nowhere(bench: Bench) -> None:
    told: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = Place(STREAM, None, server.getsockname())
        arrival = Arrival(bench.inside, bench.engine, [place], lambda *found: told.append(found))
        arrival.begin()
        arrival.close()
        bench.reply(STREAM, count=1)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert told == []


def test_nothing_is_kept_that_nobody_wants_where_descriptors_are_few(bench: Bench) -> None:
    inside = bench.inside
    inside._is_free = lambda: False
    inside.take(STREAM, lambda _: None)
    assert bench.agent.recv(256) == ORDER.pack(*STREAM, 1)


def test_nothing_that_the_agent_sends_blocks_or_breaks_the_engine(bench: Bench, tmp_path: Path) -> None:
    """A blocking socket, a socket of another kind, a file, and a path alone."""
    taken: list[object] = []
    for _ in range(4):
        bench.inside.take(STREAM, taken.append)
    assert bench.inside.waiting() == 4
    with (
        socket.socket() as stream,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
        ExitStack() as fds,
    ):
        files = [os.open(tmp_path, os.O_RDONLY), os.open(tmp_path, os.O_PATH)]
        for fd in files:
            fds.callback(os.close, fd)
        send_record(bench.agent, REPLY.pack(*STREAM, 0), [stream.fileno(), other.fileno(), *files])
        bench.settle()
    assert len(taken) == 2, "sockets"
    assert bench.inside.waiting() == 2
    for sock in taken:
        assert isinstance(sock, socket.socket)
        with sock:
            assert sock.gettimeout() == 0
            assert not os.get_blocking(sock.fileno())
            assert sock.connect_ex(("127.0.0.1", 9)) != 0
