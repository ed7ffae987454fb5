"""Channel: whole messages, of any length, over a socket that takes little at a time."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from netns_kit.child import channel
from netns_kit.child.channel import MESSAGE_MAX, RECORD, Channel, send_record

pytestmark = pytest.mark.usefixtures("leaks")


@pytest.fixture
def ends(leaks: None) -> Iterator[tuple[Channel, Channel]]:
    here, there = map(Channel, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    yield here, there
    here.close()
    there.close()


@pytest.fixture
def raw(leaks: None) -> Iterator[tuple[socket.socket, Channel]]:
    """One end bare, for what no `Channel` does."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end = Channel(there)
    yield here, end
    here.close()
    end.close()


@pytest.mark.parametrize("size", [0, 1, RECORD - 1, RECORD, RECORD + 1, 3 * RECORD, 20 * RECORD + 7])
def test_a_message_of_any_length(ends: tuple[Channel, Channel], size: int) -> None:
    here, there = ends
    message = os.urandom(size)
    here.send(message)
    here.send(b"next")
    while (received := there.receive()) is None:
        here.flush()
    assert received == message + (b"" if size % RECORD else b" "), "which means nothing"
    here.flush()
    assert there.receive() == b"next"
    assert there.receive() is None
    assert not there.ended


def test_what_the_socket_does_not_take_waits(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    count = 0
    while not here.backlog:
        here.send(b"x" * RECORD)
        count += 1
    received = 0
    while here.backlog or received < count:
        here.flush()
        while there.receive() is not None:
            received += 1
    assert received == count


def test_the_end_comes_after_the_last_word(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    here.send(b"last")
    here.finish()
    assert there.receive() == b"last"
    assert there.receive() is None
    assert there.ended
    there.send(b"too late")
    assert not there.backlog


def test_too_long_is_not_sent(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(ValueError, match="the most is"):
        ends[0].send(bytes(MESSAGE_MAX + 1))
    assert not ends[0].backlog


def test_nor_received(raw: tuple[socket.socket, Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MESSAGE_MAX", 2 * RECORD)
    here, end = raw
    for _ in range(3):
        here.send(bytes(RECORD))
        assert end.receive() is None
    here.send(bytes(RECORD))
    with pytest.raises(ValueError, match="more than"):
        end.receive()


def test_a_record_that_is_too_long(raw: tuple[socket.socket, Channel]) -> None:
    here, end = raw
    here.send(bytes(RECORD + 1))
    with pytest.raises(ValueError, match="too long"):
        end.receive()


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_descriptors_are_counted(raw: tuple[socket.socket, Channel], room: int) -> None:
    """`leaks` would see those that nobody closes."""
    here, end = raw
    reading, writing = os.pipe()
    send_record(here, b"x", [writing] * 2)
    os.close(writing)
    if room < 2:
        with pytest.raises(ValueError, match="not to come"):
            end.receive_with(room)
    else:
        received = end.receive_with(room)
        assert received is not None
        assert received[0] == b"x"
        for fd in received[1]:
            assert not os.get_inheritable(fd)
            os.close(fd)
    assert os.read(reading, 1) == b"", "the writing end is open nowhere"
    os.close(reading)


def test_descriptors_of_half_a_message_are_closed_with_it(raw: tuple[socket.socket, Channel]) -> None:
    here, end = raw
    reading, writing = os.pipe()
    send_record(here, bytes(RECORD), [writing])
    os.close(writing)
    assert end.receive_with(1) is None
    end.close()
    assert os.read(reading, 1) == b"", "the writing end is open nowhere"
    os.close(reading)


class Racing:
    """A socket whose first reading says "end", though the message came just before it."""

    def __init__(self, *readings: bytes) -> None:
        self.readings = list(readings)

    def setblocking(self, flag: bool) -> None: ...

    def recvmsg(self, *_: int) -> tuple[bytes, list[Any], int, None]:
        return self.readings.pop(0), [], 0, None


def test_a_message_that_an_end_overtakes_is_read() -> None:
    """About one in twenty thousand, on Linux 6.18: the queue is looked at before the end is."""
    end = Channel(cast("socket.socket", Racing(b"", b"last", b"", b"")))
    assert end.receive() == b"last"
    assert not end.ended
    assert end.receive() is None
    assert end.ended


def test_waiting_blocks_until_there_is_a_message(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    late = threading.Timer(0.05, here.send, [b"x" * (RECORD + 1)])
    late.start()
    assert there.wait() == b"x" * (RECORD + 1)
    late.join()
    assert there.receive() is None, "it does not block any more"
    here.shutdown()
    assert there.wait() is None


def test_a_socket_goes_with_its_message(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    for size in (1, 3 * RECORD):
        near, far = socket.socketpair()
        with near:
            here.send(b"x" * size, [far.detach()])
            while (received := there.receive_with(1)) is None:
                here.flush()
            with socket.socket(fileno=received[1][0]) as other:
                other.sendall(b"hello")
                assert near.recv(9) == b"hello"


def test_a_socket_that_is_not_sent_is_closed(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    there.close()
    near, far = socket.socketpair()
    here.send(b"gone", [far.detach()])
    with near:
        assert near.recv(1) == b"", "the other is open nowhere"
