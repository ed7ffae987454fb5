"""Channel: whole messages, of any length, over a socket that takes little at a time."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator

import pytest

from netns_kit.child import channel
from netns_kit.child.channel import MESSAGE_MAX, RECORD, Channel

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
    assert received == message
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
    for _ in range(2):
        here.send(b"\1" + bytes(RECORD))
        assert end.receive() is None
    here.send(b"\1" + bytes(RECORD))
    with pytest.raises(ValueError, match="more than"):
        end.receive()


@pytest.mark.parametrize("record", [b"\2x", b"\1", b"\1" + bytes(RECORD - 1), b"\0" + bytes(RECORD + 1)])
def test_a_record_that_is_none(raw: tuple[socket.socket, Channel], record: bytes) -> None:
    here, end = raw
    here.send(record)
    with pytest.raises(ValueError, match="no Channel"):
        end.receive()


def test_descriptors_are_not_taken(raw: tuple[socket.socket, Channel]) -> None:
    """`leaks` would see them."""
    here, end = raw
    reading, writing = os.pipe()
    here.sendmsg([b"\0x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writing]))])
    os.close(writing)
    assert end.receive() == b"x"
    assert os.read(reading, 1) == b"", "the writing end is open nowhere"
    os.close(reading)
