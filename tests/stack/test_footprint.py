"""What a hostile guest makes us keep: it is counted as what it is, and the garbage collector has little to visit."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import pytest

from netns_kit.stack.wire.tcp import ACK, FIN
from tests.support.stack import OTHER, Guest, fragment, key


def opened(guest: Guest, port: int) -> bytes:
    """Let the guest open a connection from `port`.  Return its ports."""
    ports = key(guest.family, port)[-4:]
    guest.gets(2, 999, ports=ports)
    guest.connection.accept(guest.now)
    guest.gets(ACK, 1000, guest.connection.snd.max, ports=ports)
    return ports


def runs_out_of_order(guest: Guest, ports: bytes) -> None:
    for number in range(250):
        guest.gets(ACK, 1002 + 2 * number, guest.connection.snd.una, b"x", ports=ports)


def bytes_not_taken(guest: Guest, ports: bytes) -> None:
    for number in range(250):
        guest.gets(ACK, 1000 + number, guest.connection.snd.una, b"x", ports=ports)


def bytes_not_acknowledged(guest: Guest, ports: bytes) -> None:
    for number in range(60):
        guest.connection.send(number.to_bytes(4, "big"), guest.now)


@pytest.mark.parametrize("keep", [runs_out_of_order, bytes_not_taken, bytes_not_acknowledged])
def test_small_pieces_are_counted_as_what_they_take(keep: Callable[[Guest, bytes], None]) -> None:
    guest = Guest()
    connections = []
    for port in range(1, 41):
        ports = opened(guest, port)
        guest.listener.room = 0
        connections.append((guest.listener, ports))
    guest.frames.clear()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for listener, ports in connections:
            guest.users.listeners[:] = [listener]
            keep(guest, ports)
            guest.frames.clear()
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    counted = guest.stack.stats()["tcp_memory"]
    assert counted / 2 < used < counted * 2


@pytest.mark.parametrize(("packets", "pieces"), [(40, 40), (1600, 1)])
def test_small_fragments_are_counted_as_what_they_take(family: int, packets: int, pieces: int) -> None:
    guest = Guest(family)
    ends = OTHER[family] + OTHER[family][:-1] + b"\x09"
    frames = [
        fragment(ends, 17, 8 * at, bytes(8), True, packet)
        for packet in range(packets)
        for at in range(pieces)
    ]
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for each in frames:
            guest.gives(each)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    counted = guest.stack.stats()["fragments"]
    assert counted / 2 < used < counted * 2


def test_what_is_in_time_wait_is_not_visited_by_the_garbage_collector() -> None:
    """Tens of thousands of objects would stop the process for as long as its oldest generation is collected."""
    guest = Guest()
    number = 4000

    def live_and_die(port: int) -> None:
        ports = opened(guest, port)
        una = guest.connection.snd.max
        guest.shutdown()
        guest.gets(FIN | ACK, 1000, una + 1, ports=ports)
        guest.frames.clear()
        guest.users.listeners.clear()

    live_and_die(1)
    gc.collect()
    before = len(gc.get_objects())
    for port in range(2, 2 + number):
        live_and_die(port)
    guest.passes(1)  # past whatever waits for less than TIME-WAIT
    assert len(guest.stack.time_wait) == number + 1
    assert not guest.stack.tcp
    assert gc.collect() == 0, "a connection is no cycle: it goes when it is not used"
    assert len(gc.get_objects()) - before < number / 2
