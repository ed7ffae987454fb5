"""Two sockets joined, between real peers on the loopback."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import NamedTuple

import pytest

from netns_kit.forwarder.splices import LARGE, PIPES_KEPT, SMALL, Pipes, Splice
from netns_kit.gateway.engine import Engine
from tests.support.connections import kernel_buffers
from tests.support.servers import BLOCK

RESET = struct.pack("ii", 1, 0)


class Bench(NamedTuple):
    """A client and a server, and the splice between them."""

    engine: Engine
    pipes: Pipes
    splice: Splice
    client: socket.socket
    server: socket.socket
    ended: list[Splice]

    def settle(self) -> None:
        """Step until nothing happens any more."""
        while (events := self.engine.poll(0)) or self.engine.deadline < 0:
            self.engine.dispatch(events, 0.0)

    def carry(self, source: socket.socket, sink: socket.socket, data: bytes) -> bytes:
        """Send all of it and its end, and return what the other side has read to its end."""
        sent, got, has_ended = 0, bytearray(), False
        for _ in range(100_000):
            if sent < len(data):
                with suppress(BlockingIOError):
                    sent += source.send(data[sent : sent + 300_000])
            elif not has_ended:
                has_ended = True
                source.shutdown(socket.SHUT_WR)
            self.settle()
            with suppress(BlockingIOError):
                piece = sink.recv(70_000)
                if not piece:
                    return bytes(got)
                got += piece
        raise AssertionError(f"{len(got)} bytes of {len(data)} came, and no end")


class _passing_over:
    """Passes over a socket that has nothing, or no room."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, _: object) -> bool:
        return isinstance(error, BlockingIOError)


def tcp_pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = stack.enter_context(socket.create_connection(listener.getsockname()))
        far = listener.accept()[0]
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for each in (near, far):
        each.setblocking(False)
    return near, far


def unix_pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    stack.enter_context(near)
    for each in (near, far):
        each.setblocking(False)
    return near, far


Pair = Callable[[ExitStack], tuple[socket.socket, socket.socket]]
PAIRS: dict[str, tuple[Pair, Pair]] = {
    "tcp": (tcp_pair, tcp_pair),
    "from a unix socket": (unix_pair, tcp_pair),
    "to a unix socket": (tcp_pair, unix_pair),
}


@pytest.fixture(params=PAIRS)
def bench(request: pytest.FixtureRequest, leaks: None) -> Iterator[Bench]:
    with ExitStack() as stack:
        outer_pair, inner_pair = PAIRS[request.param]
        client, outer = outer_pair(stack)
        server, inner = inner_pair(stack)
        engine, pipes = Engine(), Pipes()
        stack.callback(engine.close)
        stack.callback(pipes.close)
        ended: list[Splice] = []
        splice = Splice(engine, pipes, outer, inner, ended.append)
        stack.callback(splice.close)
        yield Bench(engine, pipes, splice, client, server, ended)


@pytest.mark.parametrize("size", [0, 1, SMALL - 1, SMALL, SMALL + 1, 3 * LARGE + 7])
def test_all_bytes_cross_in_their_order_and_the_end_behind_them(bench: Bench, size: int) -> None:
    data = (BLOCK * 4)[:size]
    assert bench.carry(bench.client, bench.server, data) == data
    assert not bench.ended, "the other direction goes on"
    assert bench.carry(bench.server, bench.client, data[::-1]) == data[::-1]
    assert bench.ended == [bench.splice]
    assert (bench.splice.inward.carried, bench.splice.outward.carried) == (size, size)


def test_little_crosses_at_once_both_ways(bench: Bench) -> None:
    for number in range(100):
        word = b"%d" % number
        bench.client.send(word)
        bench.settle()
        assert bench.server.recv(64) == word
        bench.server.send(word)
        bench.settle()
        assert bench.client.recv(64) == word


@pytest.mark.parametrize("bench", ["tcp"], indirect=True)
def test_the_last_words_and_the_end_are_one_segment(bench: Bench) -> None:
    before = segments(bench.client)
    bench.server.send(b"last words")
    bench.server.shutdown(socket.SHUT_WR)
    bench.settle()
    assert segments(bench.client) == before + 1
    assert bench.client.recv(64) == b"last words"
    assert bench.client.recv(64) == b""


def segments(sock: socket.socket) -> int:
    """How many have arrived (`tcpi_segs_in`, linux/tcp.h)."""
    return int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 144)[140:], sys.byteorder)


def test_little_after_much(bench: Bench) -> None:
    """What has moved by splices is read and sent again when little comes."""
    sent = bench.client.send(BLOCK)
    got = 0
    while got < sent:
        bench.settle()
        got += len(bench.server.recv(SMALL))
    for _ in range(3):
        bench.client.send(b"little")
        bench.settle()
        assert bench.server.recv(64) == b"little"


def test_who_does_not_read_stops_the_other(bench: Bench) -> None:
    """Nothing queues here: what is read is bounded, and all of it arrives when the server reads at last."""
    sent = 0
    while True:
        try:
            sent += bench.client.send(BLOCK)
        except BlockingIOError:
            before = sent
            bench.settle()
            with suppress(BlockingIOError):
                sent += bench.client.send(BLOCK)
            if sent == before:
                break
    held = sent - bench.splice.inward.carried
    assert held < kernel_buffers() + (2 << 20), "what the sockets hold, and one pipe"
    got = 0
    for _ in range(100_000):
        if got == sent:
            break
        bench.settle()
        with suppress(BlockingIOError):
            got += len(bench.server.recv(LARGE))
    assert got == sent


@pytest.mark.parametrize("bench", ["tcp"], indirect=True)  # a unix socket knows nothing of it
@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("after_its_end", [False, True])
def test_a_reset_crosses(who: str, *, after_its_end: bool, bench: Bench) -> None:
    near, far = (bench.client, bench.server) if who == "client" else (bench.server, bench.client)
    near.send(b"last words")
    bench.settle()
    if after_its_end:
        near.shutdown(socket.SHUT_WR)
        bench.settle()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    near.close()
    bench.settle()
    assert bench.ended == [bench.splice]
    assert _ends_by_reset(far)


@pytest.mark.parametrize("bench", ["tcp"], indirect=True)  # a unix socket knows nothing of it
def test_what_was_said_before_a_reset_is_heard(bench: Bench) -> None:
    bench.server.send(b"goodbye")
    bench.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    bench.server.close()
    bench.client.send(b"too late")  # what sends to the server learns of the reset first
    bench.engine.step(0.0)
    bench.settle()
    assert bench.ended == [bench.splice]


def test_sending_to_who_has_gone_resets_who_sends(bench: Bench) -> None:
    bench.server.close()
    bench.settle()
    for _ in range(5):
        try:
            bench.client.send(b"x")
        except (BrokenPipeError, ConnectionResetError):
            break
        bench.settle()
    assert bench.ended == [bench.splice]


@pytest.mark.parametrize("bench", ["tcp"], indirect=True)  # a unix socket knows nothing of it
def test_urgent_data_is_carried_in_line(bench: Bench) -> None:
    bench.splice.outer.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    bench.client.send(b"before")
    bench.client.send(b"!", socket.MSG_OOB)
    bench.client.send(b"after")
    bench.settle()
    assert bench.server.recv(64) == b"before!after"


@pytest.mark.parametrize("size", [1, 3 * SMALL, 3 * LARGE])
@pytest.mark.parametrize("ends", [False, True])
def test_urgent_data_behind_much_keeps_nothing_back(size: int, *, ends: bool, bench: Bench) -> None:
    """A splice stops at urgent data, and so would stop for good."""
    bench.splice.outer.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    data = (BLOCK * 4)[:size]
    got = bytearray()

    def tell(data: bytes, flags: int = 0) -> None:
        while data:
            with suppress(BlockingIOError):
                data = data[bench.client.send(data, flags) :]
            hear()

    def hear() -> None:
        bench.settle()
        with suppress(BlockingIOError):
            while piece := bench.server.recv(SMALL):
                got.extend(piece)

    for _ in range(3):
        tell(data)
        tell(b"!", socket.MSG_OOB)
        tell(b"tail")
    if ends:
        bench.client.shutdown(socket.SHUT_WR)
    for _ in range(100):
        hear()
    assert bytes(got) == (data + b"!tail") * 3
    if ends:
        assert bench.splice.inward.ended


def test_closing_at_any_moment_leaves_nothing(bench: Bench) -> None:
    while True:
        try:
            bench.client.send(BLOCK)
        except BlockingIOError:
            if bench.splice.inward.blocked:
                break
            bench.settle()
    bench.splice.close(reset=True)
    bench.splice.close()
    assert bench.ended == [bench.splice]
    bench.settle()
    if bench.client.family == socket.AF_INET:
        assert _ends_by_reset(bench.client)


def test_both_ends_at_once(bench: Bench) -> None:
    bench.client.send(b"a")
    bench.server.send(b"b")
    bench.client.close()
    bench.server.close()
    bench.settle()
    assert bench.ended == [bench.splice]


def test_pipes_are_kept_up_to_a_number(leaks: None) -> None:
    pipes = Pipes()
    taken = [pipes.take() for _ in range(PIPES_KEPT + 3)]
    for pipe in taken:
        pipes.give(pipe)
    still_open = [pipe for pipe in taken if _is_open(pipe[0])]
    assert len(still_open) == PIPES_KEPT
    again = pipes.take()
    assert again in still_open
    pipes.close()
    pipes.give(again)
    assert not any(_is_open(pipe[0]) for pipe in taken)


def _is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def _ends_by_reset(sock: socket.socket) -> bool:
    try:
        while sock.recv(64):
            pass
        sock.send(b"x")  # after the other's end
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False
