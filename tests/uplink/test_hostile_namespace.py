"""A namespace whose agent was taken over: what it sends refuses flows, breaks nothing else, and leaves nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from netns_kit import ChooserUplink, Namespace, NamespaceUplink
from netns_kit.child.channel import send_record
from netns_kit.child.supply import MOST, ORDER, REPLY
from tests.support.bench import Bench, Make
from tests.support.servers import port_of

THERE, PORT = bytes((192, 0, 2, 1)), 443
STREAM = int(socket.AF_INET), int(socket.SOCK_STREAM), 0
DATAGRAM = int(socket.AF_INET), int(socket.SOCK_DGRAM), 0


class Agent:
    """The agent's end of a supply, which does what the test says."""

    def __init__(self, make: Make) -> None:
        ours, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.end.setblocking(False)
        uplink = ChooserUplink([("192.0.2.0/24", NamespaceUplink(Namespace.create()))], None)
        self.bench: Bench = make(uplink, supplies=(ours,))

    def orders(self) -> list[bytes]:
        found: list[bytes] = []
        with suppress(BlockingIOError):
            while True:
                found.append(self.end.recv(256))
        return found


@pytest.fixture
def agent(make: Make) -> Iterator[Agent]:
    made = Agent(make)
    with made.end:
        yield made


def files(stack: ExitStack) -> list[int]:
    found = [*os.pipe(), os.open("/dev/null", os.O_RDWR)]
    for fd in found:
        stack.callback(os.close, fd)
    return found


def other_sockets(stack: ExitStack) -> list[int]:
    pair = socket.socketpair()
    found = [*pair, socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_INET6)]
    found.append(socket.create_server(("127.0.0.1", 0)))
    return [stack.enter_context(each).fileno() for each in found]


WHAT: dict[str, Callable[[ExitStack], list[int]]] = {
    "nothing": lambda _: [],
    "files": files,
    "other sockets": other_sockets,
}


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_what_is_no_socket_of_that_kind_carries_no_flow(agent: Agent, what: str, transport: str) -> None:
    bench = agent.bench
    bench.settle()
    kind = STREAM if transport == "tcp" else DATAGRAM
    number = 0
    for source in range(40000, 40012):
        if transport == "tcp":
            program = bench.connect(THERE, PORT, source)
        else:
            _, flow = bench.socket(THERE, PORT, source)
            flow.send(b"hello", bench.now)
        bench.settle()
        for order in agent.orders():
            assert tuple(ORDER.unpack(order)[:3]) in (STREAM, DATAGRAM)
            with ExitStack() as stack:
                sent = WHAT[what](stack)
                send_record(agent.end, REPLY.pack(*kind, 0), sent)
                number += 1
        bench.settle()
        if transport == "tcp":
            assert not program.is_established
    assert number
    assert other_ways_are_open(bench)


def other_ways_are_open(bench: Bench) -> bool:
    """Whether a flow by another way is carried."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        bench.uplink._loopback = True
        bench.gateway.router._indirect._loopback = True  # type: ignore[attr-defined]  # it has one
        program = bench.connect(bytes((10, 0, 2, 2)), port_of(server), 50000)
        bench.until(lambda: program.is_established)
    return True


NONSENSE: list[Any] = [
    b"",
    b"x",
    bytes(REPLY.size),
    REPLY.pack(*STREAM, 0),  # that nobody has ordered
    REPLY.pack(77, 77, 7, -1),
    bytes(4096),
    b"\xff" * 8,  # a number of a socket that was passed
]


@pytest.mark.parametrize("record", NONSENSE)
def test_what_makes_no_sense_ends_that_way_alone(
    agent: Agent, record: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    bench = agent.bench
    with ExitStack() as stack:
        many = [stack.enter_context(socket.socket()).fileno() for _ in range(MOST)]
        with suppress(BlockingIOError, BrokenPipeError):
            for _ in range(50):
                send_record(agent.end, record, many)
                bench.settle()
    program = bench.connect(THERE, PORT, 40000)
    bench.settle()
    agent.end.close()
    bench.settle()
    assert not program.is_established
    assert other_ways_are_open(bench)
    assert [each for each in caplog.records if each.exc_info] == []
