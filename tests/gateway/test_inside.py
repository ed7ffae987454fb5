"""Sockets of a namespace for an engine: orders to a real agent's part, and answers that none of ours gives."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from netns_kit.child.channel import send_record
from netns_kit.child.supply import ORDER, PASSED, REPLY
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.inside import UNIX, Inside, Kind
from netns_kit.namespace import agent_sockets

STREAM = Kind(int(socket.AF_INET), int(socket.SOCK_STREAM))


class Bench(NamedTuple):
    """An engine's side, and the agent's end of the supply."""

    engine: Engine
    inside: Inside
    agent: socket.socket

    def settle(self) -> None:
        """Step until nothing comes any more."""
        while events := self.engine.poll(0):
            self.engine.dispatch(events, 0.0)

    def reply(self, kind: Kind, error: int = 0, count: int = 0) -> None:
        """Answer an order."""
        self.agent.recv(256)
        with ExitStack() as stack:
            made = [stack.enter_context(socket.socket(kind.family, kind.type)) for _ in range(count)]
            send_record(self.agent, REPLY.pack(*kind, error), [each.fileno() for each in made])
        self.settle()

    def serve(self) -> int:
        """Answer all orders that are there before the engine reads any answer; return their number."""
        count, supply = 0, agent_sockets.Supply(self.agent)
        while True:
            try:
                self.agent.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return count
            assert supply.serve() == select.POLLIN
            count += 1


@pytest.fixture
def bench() -> Iterator[Bench]:
    engine = Engine()
    engines, agents = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (engines, agents):
        end.setblocking(False)
    inside = Inside(engine, engines, lambda: True)
    try:
        with agents:
            yield Bench(engine, inside, agents)
    finally:
        inside.close()
        engine.close()


def test_many_connections_at_once_each_lead_where_they_were_to(bench: Bench, tmp_path: Path) -> None:
    """More of them than there is room for in the supply, which was lost once, and the others went astray."""
    paths = [str(tmp_path / name) for name in "ab"]
    listeners = [socket.socket(socket.AF_UNIX) for _ in paths]
    got: list[tuple[str, str]] = []
    count = 600
    try:
        for path, listener in zip(paths, listeners, strict=True):
            listener.bind(path)
            listener.listen(count)
            agent_sockets.allow_unix(path, wanted=True)
        for number in range(count):
            path = paths[number % 2]

            def taken(sock: socket.socket | OSError, path: str = path) -> None:
                assert isinstance(sock, socket.socket), sock
                with sock:
                    got.append((path, sock.getpeername()))

            bench.inside.connect_unix(path, taken)
        while bench.serve():
            bench.settle()
    finally:
        for path, listener in zip(paths, listeners, strict=True):
            agent_sockets.allow_unix(path, wanted=False)
            listener.close()
    assert len(got) == count
    assert all(wanted == found for wanted, found in got)


def test_a_unix_socket_that_no_port_names_is_out_of_reach(bench: Bench, tmp_path: Path) -> None:
    path, told = str(tmp_path / "a"), list[socket.socket | OSError]()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        for wanted in (None, True, False):
            if wanted is not None:
                agent_sockets.allow_unix(path, wanted=wanted)
            bench.inside.connect_unix(path, told.append)
            bench.serve()
            bench.settle()
    before, sock, after = told
    assert isinstance(sock, socket.socket)
    sock.close()
    assert [each.errno for each in (before, after) if isinstance(each, OSError)] == [errno.EACCES] * 2


@pytest.mark.parametrize("kind", [STREAM, UNIX])
def test_an_answer_without_room_for_its_sockets_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: Kind, tmp_path: Path
) -> None:
    def send(sock: socket.socket, record: bytes, fds: list[int] | None = None) -> None:
        if fds:
            raise OSError(errno.ETOOMANYREFS, "")
        send_record(sock, record)

    monkeypatch.setattr(agent_sockets, "send_record", send)
    path = str(tmp_path / "a")
    errors: list[socket.socket | OSError] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        agent_sockets.allow_unix(path, wanted=True)
        for _ in range(2):
            if kind == UNIX:
                bench.inside.connect_unix(path, errors.append)
            else:
                bench.inside.take(kind, errors.append)
            bench.serve()
            bench.settle()
        agent_sockets.allow_unix(path, wanted=False)
    assert [error.errno for error in errors if isinstance(error, OSError)] == [errno.ETOOMANYREFS] * 2


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        bytes(PASSED.size + 1),
        REPLY.pack(*UNIX, 0),
        REPLY.pack(*STREAM._replace(transparent=True), 0),
        REPLY.pack(99, 1, 0, 0),
        b"",
    ],
)
def test_what_no_agent_says_ends_it(bench: Bench, data: bytes) -> None:
    told: list[socket.socket | OSError] = []
    bench.inside.take(STREAM, told.append)
    near, far = socket.socketpair()
    with near:
        with far:
            if data:
                send_record(bench.agent, data, [far.fileno()])
            else:
                bench.agent.shutdown(socket.SHUT_RDWR)
        bench.settle()
        assert not data or near.recv(1) == b"", "what came with it is closed"
    bench.inside.take(STREAM, told.append)
    bench.inside.connect_unix("/a", told.append)
    assert [each.errno for each in told if isinstance(each, OSError)] == [
        errno.ENETDOWN,
        errno.ENETDOWN,
        errno.EBADF,
    ]
    assert bench.engine.descriptors == 1


def test_those_who_wait_are_told_of_the_end(bench: Bench) -> None:
    told: list[socket.socket | OSError] = []
    bench.inside.take(STREAM, told.append)
    for _ in range(100):
        bench.inside.connect_unix("/a", told.append)
    orders = [bench.agent.recv(100) for _ in range(2)]
    assert [order[: ORDER.size] for order in orders] == [ORDER.pack(*STREAM, 33), ORDER.pack(*UNIX, 1)]
    bench.inside.close()
    bench.inside.close()
    assert [each.errno for each in told if isinstance(each, OSError)] == [errno.ENETDOWN] * 101


@pytest.mark.parametrize(("most", "kept"), [(60, 7), (4, 1), (100_000, 128)])
def test_a_stock_is_a_small_part_of_the_descriptors(
    most: int, kept: int, monkeypatch: pytest.MonkeyPatch, leaks: None
) -> None:
    """A stock that had all of them would keep clients out for ever: accept4: too many open files."""
    monkeypatch.setattr("netns_kit.gateway.inside.most_descriptors", lambda: most)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    engine, taken = Engine(), list[object]()
    with theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        sockets = Inside(engine, ours, lambda: True)
        for _ in range(10):
            sockets.take(STREAM, taken.append)
        stock = sockets._stocks[STREAM]
        assert stock.size == kept
        assert ORDER.unpack(theirs.recv(100))[3] <= kept + 1
        sockets.close()
    engine.close()
    assert len(taken) == 10
    assert all(isinstance(each, OSError) for each in taken)
