"""Ports of the host that lead through the stack, to a guest on a fake link."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from ipaddress import IPv4Address

import pytest

from netns_kit.forwarder.listeners import ACCEPTS_AT_LEAST, TcpListener
from netns_kit.forwarder.ports import PortForward
from tests.support.bench import Bench, Make, readable
from tests.support.servers import SECONDS

LOOPBACK = IPv4Address("127.0.0.1")
BURST = 200


def listening(bench: Bench, made: socket.socket | None = None) -> TcpListener:
    return TcpListener(bench.gateway, PortForward("tcp", LOOPBACK, 0, None, 80, mode="stack"), made)


@pytest.fixture
def clients(leaks: None) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(socket.socket()) for _ in range(BURST)]


def let_in(bench: Bench, listener: TcpListener, clients: list[socket.socket]) -> None:
    """All of them at once, while every step is late."""
    clock, bench.engine.clock = bench.engine.clock, lambda: bench.engine.now + 1
    for client in clients:
        client.settimeout(SECONDS)
        client.connect(("127.0.0.1", listener.forward.host_port))
    steps = 0
    while readable(listener._socket):
        bench.step()
        steps += 1
    assert steps < 10 + BURST // ACCEPTS_AT_LEAST
    bench.engine.clock = clock


def test_of_a_burst_all_are_accepted_first(make: Make, clients: list[socket.socket]) -> None:
    """The kernel would keep few of them, and drop the others' SYNs."""
    bench = make()
    with closing(listening(bench)) as listener:
        let_in(bench, listener, clients)
        waiting = {sock.fileno() for _, sock in listener._waiting.clients}
        assert len(waiting) > BURST // 2
        told = {fd for tell in bench.engine.unregistered for fd in tell()}
        assert waiting == told, "a fork of the program gives these up, too"
        bench.until(lambda: len(bench.accepted) == BURST)
        assert not bench.engine.unregistered
        assert len(bench.gateway.flows()) == BURST


def test_who_waits_when_the_port_is_closed_is_reset(make: Make, clients: list[socket.socket]) -> None:
    bench = make()
    with closing(listening(bench)) as listener:
        let_in(bench, listener, clients)
        waiting = {sock.getpeername() for _, sock in listener._waiting.clients}
    for client in clients:
        if client.getsockname() in waiting:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    bench.until(lambda: len(bench.accepted) == BURST - len(waiting))
    assert len(bench.gateway.flows()) == BURST - len(waiting)


@pytest.mark.parametrize("ours", [True, False])
def test_what_is_accepted_sends_at_once_and_has_urgent_data_in_line(
    ours: bool, make: Make, clients: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a client who has come before a socket was ours to listen by."""
    bench = make()
    accepted: list[socket.socket] = []
    monkeypatch.setattr(bench.gateway.router, "tcp_accepted", lambda _, sock: accepted.append(sock))
    made = None if ours else socket.create_server(("127.0.0.1", 0))
    if made is not None:
        made.setblocking(False)
        clients[0].connect(made.getsockname())
    with closing(listening(bench, made)) as listener:
        if made is None:
            clients[0].connect(("127.0.0.1", listener.forward.host_port))
        bench.until(lambda: accepted)
    with accepted.pop() as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)
