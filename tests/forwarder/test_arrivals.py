"""Clients on their way in."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from netns_kit.forwarder.arrivals import Arrival, Place
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.inside import Kind, Taker

STREAM = Kind(int(socket.AF_INET), int(socket.SOCK_STREAM))


class Waiting:
    """Sockets that come when the test wants."""

    def __init__(self) -> None:
        self.takers: list[Taker] = []

    def take(self, kind: Kind, taker: Taker) -> None:
        self.takers.append(taker)


@pytest.mark.parametrize("came", [True, False])
def test_one_that_has_gone_reaches_nobody(came: bool) -> None:
    """Its client was cut off before there was a socket: no program inside sees a connection."""
    done: list[object] = []
    inside: Any = Waiting()
    engine = Engine()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as sock:
        server.setblocking(False)
        arrival = Arrival(
            inside,
            engine,
            [Place(STREAM, None, server.getsockname())] * 2,
            lambda *result: done.append(result),
        )
        arrival.begin()
        arrival.close()
        inside.takers.pop()(sock if came else OSError(1, ""))
        assert (sock.fileno() < 0) == came
        assert (done, inside.takers) == ([], [])
        with pytest.raises(BlockingIOError):
            server.accept()
    engine.close()
