"""Dialling: an uplink in memory, whose kinds of dial are in this one file, with no socket of the host's network."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from netns_kit import Flow, Uplink
from netns_kit.arguments import Address
from netns_kit.stack import Closed, Refusal, Transport
from netns_kit.uplink.dial import Connected, Dial, Refused
from netns_kit.uplink.flow import Target
from tests.support.bench import Bench, Make, Program, feed, receive

ANYWHERE = bytes((192, 0, 2, 1))
PORT = 80


class Memory(Uplink):
    """Connects flows to what has been named, by a pair of sockets: no packet leaves the process."""

    def __init__(self, dial: Callable[[Memory], Dial]) -> None:
        super().__init__()
        self._dial = dial
        self.dialled: list[tuple[str, int, int]] = []
        self.peers: list[socket.socket] = []

    def dial(self, flow: Flow, target: Target, *, ttl: int = 64, tos: int = 0) -> Dial:
        self.dialled.append((str(flow.destination), ttl, tos))
        return self._dial(self)

    def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
        raise AssertionError("nothing is opened on the host")

    def pair(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.peers.append(theirs)
        return ours

    def close(self) -> None:
        for peer in self.peers:
            peer.close()


class Knock:
    """A dial with a protocol of its own, as a proxy has: the peer says whether it may, and there is a socket then."""

    def __init__(self, uplink: Memory) -> None:
        self._socket = uplink.pair()

    def fileno(self) -> int:
        return self._socket.fileno()

    def advance(self, *, failed: bool) -> Dial:
        try:
            answer = self._socket.recv(1)
        except BlockingIOError:
            return self
        if failed or answer != b"y":
            return Refused(Refusal.PROHIBITED)
        return Connected(self._socket)

    def close(self) -> None:
        self._socket.close()


class Elsewhere(Knock):
    """One that is sent somewhere else: the descriptor to poll is another then."""

    def __init__(self, uplink: Memory, last: Dial) -> None:
        super().__init__(uplink)
        self._last = last

    def advance(self, *, failed: bool) -> Dial:
        dial = super().advance(failed=failed)
        return self if dial is self else self._last


def opened(bench: Bench, uplink: Memory) -> Program:
    program = bench.connect(ANYWHERE, PORT)
    bench.until(lambda: uplink.peers or program.why)
    return program


def exchange(bench: Bench, program: Program, peer: socket.socket) -> None:
    """Bytes both ways, and the ends."""
    bench.until(lambda: program.is_established)
    said, answered = os.urandom(300_000), os.urandom(300_000)
    program.send(said)
    assert receive(bench, peer, len(said)) == said
    feed(bench, peer, answered)
    bench.until(lambda: len(program.received) == len(answered))
    assert bytes(program.received) == answered
    peer.shutdown(socket.SHUT_WR)
    bench.until(lambda: program.ended)
    program.shutdown()
    bench.until(lambda: program.why)
    assert program.why is Closed.NORMAL


def test_a_connection_in_memory(make: Make) -> None:
    uplink = Memory(lambda uplink: Connected(uplink.pair()))
    bench = make(uplink)
    program = opened(bench, uplink)
    (peer,) = uplink.peers
    with peer:
        bench.until(lambda: program.is_established)
        (flow,) = bench.gateway.flows()
        assert flow.host is None
        exchange(bench, program, peer)
    assert uplink.dialled == [("192.0.2.1:80", 64, 0)]


def test_the_guest_waits_until_the_dial_is_over(make: Make) -> None:
    uplink = Memory(Knock)
    bench = make(uplink)
    program = opened(bench, uplink)
    (peer,) = uplink.peers
    with peer:
        bench.settle()
        assert not program.is_established
        assert bench.gateway.stats()["tcp_syn_held"] == 1
        peer.send(b"y")
        exchange(bench, program, peer)


@pytest.mark.parametrize("ending", ["no", "a hang-up"])
def test_a_dial_that_fails_refuses(make: Make, ending: str) -> None:
    uplink = Memory(Knock)
    bench = make(uplink)
    descriptors = bench.engine.descriptors
    program = opened(bench, uplink)
    (peer,) = uplink.peers
    with peer:
        if ending == "no":
            peer.send(b"n")
        else:
            peer.close()
        bench.until(lambda: program.why)
    assert not program.is_established
    assert bench.engine.descriptors == descriptors


class Broken(Knock):
    """A dial with a bug."""

    def advance(self, *, failed: bool) -> Dial:
        if super().advance(failed=failed) is self:
            return self
        raise LookupError("a bug of the uplink's")


def raising(_: Memory) -> Dial:
    raise LookupError("a bug of the uplink's")


def nonsense(_: Memory) -> Any:
    return None


@pytest.mark.parametrize("dial", [raising, nonsense, Broken])
def test_an_uplink_that_fails_to_dial_refuses_and_ends_nothing(
    make: Make, dial: Callable[[Memory], Dial], caplog: pytest.LogCaptureFixture
) -> None:
    uplink = Memory(dial)
    bench = make(uplink)
    descriptors = bench.engine.descriptors
    program = opened(bench, uplink)
    for peer in uplink.peers:
        peer.send(b"y")
    bench.until(lambda: program.why)
    assert not program.is_established
    assert bench.engine.descriptors == descriptors
    assert ["failed to dial" in record.message for record in caplog.records] == [True]
    uplink.close()


def test_a_refusal_at_once(make: Make) -> None:
    uplink = Memory(lambda uplink: Refused(Refusal.RESET))
    program = opened(make(uplink), uplink)
    assert program.why is Closed.RESET


def test_a_dial_that_becomes_another(make: Make) -> None:
    uplink = Memory(lambda uplink: Elsewhere(uplink, Elsewhere(uplink, Connected(uplink.pair()))))
    bench = make(uplink)
    descriptors = bench.engine.descriptors
    program = opened(bench, uplink)
    last, inner, outer = uplink.peers
    outer.send(b"n")
    bench.settle()
    assert not program.is_established
    inner.send(b"n")
    exchange(bench, program, last)
    assert bench.engine.descriptors == descriptors
    uplink.close()


def test_a_guest_that_gives_up_ends_the_dial(make: Make) -> None:
    uplink = Memory(Knock)
    bench = make(uplink)
    program = opened(bench, uplink)
    (peer,) = uplink.peers
    with peer:
        bench.settle()
        (flow,) = bench.gateway.flows()
        assert bench.gateway.end_flow(flow.id)
        bench.until(lambda: program.why)
        assert peer.recv(1) == b""


def test_urgent_data_for_what_knows_nothing_urgent_is_data(make: Make) -> None:
    uplink = Memory(lambda uplink: Connected(uplink.pair()))
    bench = make(uplink)
    program = opened(bench, uplink)
    (peer,) = uplink.peers
    with peer:
        bench.until(lambda: program.is_established)
        assert program.connection is not None
        program.connection.send_urgent(b"!", bench.now)
        program.send(b"more")
        assert receive(bench, peer, 5) == b"!more"


def test_what_cannot_be_watched_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "fs.epoll.max_user_watches")

    for dial in (Knock, lambda uplink: Connected(uplink.pair())):
        uplink = Memory(dial)
        bench = make(uplink)
        with monkeypatch.context() as patch:
            patch.setattr(bench.engine, "add", full)
            program = opened(bench, uplink)
            bench.until(lambda: program.why)  # noqa: B023  # it is called at once
        (peer,) = uplink.peers
        with peer:
            assert peer.recv(1) == b"", "and nothing is left open"
