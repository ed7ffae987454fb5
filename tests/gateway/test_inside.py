"""Sockets of the namespace: how many are ordered before they are wanted."""

from __future__ import annotations

import socket

import pytest

from netns_kit.child.supply import ORDER
from netns_kit.gateway import inside
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.inside import Inside, Kind

KIND = Kind(int(socket.AF_INET), int(socket.SOCK_STREAM))


@pytest.mark.parametrize(("most", "kept"), [(60, 7), (4, 1), (100_000, 128)])
def test_a_stock_is_a_small_part_of_the_descriptors(
    most: int, kept: int, monkeypatch: pytest.MonkeyPatch, leaks: None
) -> None:
    """A stock that had all of them would keep clients out for ever: accept4: too many open files."""
    monkeypatch.setattr(inside, "most_descriptors", lambda: most)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    engine, taken = Engine(), list[object]()
    with theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        sockets = Inside(engine, ours)
        for _ in range(10):
            sockets.take(KIND, taken.append)
        stock = sockets._stocks[KIND]
        assert stock.size == kept
        assert ORDER.unpack(theirs.recv(100))[3] <= kept + 1
        sockets.close()
    engine.close()
    assert len(taken) == 10
    assert all(isinstance(each, OSError) for each in taken)
