"""The socket by which ports are forwarded: every request and answer, and clients of every kind."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.cli.slirp4netns.api_socket import (
    CLIENTS_MAX,
    PATIENCE,
    REQUEST_MAX,
    ApiSocket,
    HostForwards,
    _Brackets,
)
from netns_kit.forwarder.ports import PortForward
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.setup import Setup
from netns_kit.subnet import Subnet
from netns_kit.tap.device import TapDevice
from netns_kit.uplink.uplink import Uplink
from netns_kit.userstack.control import Control
from tests.support.servers import closed_port

pytestmark = pytest.mark.usefixtures("leaks")

LIST = b'{"execute":"list_hostfwd"}'
EMPTY = {"entries": [], "return": {"entries": []}}


class Bench:
    """The API on an engine that this thread drives; the clock is the test's."""

    def __init__(self, path: str, stack: ExitStack) -> None:
        self.path = path
        self.now = 0.0
        self.engine = Engine()
        stack.callback(self.engine.close)
        tap, guest = TapDevice.pair()
        stack.callback(guest.release)
        stack.callback(tap.release)
        self.control = Control(
            Gateway(self.engine, Setup(tap, Uplink(), Subnet.parse("10.0.2.0/24"))), lambda _: None
        )
        stack.callback(self.control.close)
        self.traced: list[str] = []
        self.api = ApiSocket(self.engine, HostForwards(self.control), path, self.traced.append)
        stack.callback(self.api.close)
        self._stack = stack

    def client(self) -> socket.socket:
        sock = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.connect(self.path)
        sock.setblocking(False)
        self.step()
        return sock

    def step(self, seconds: float = 0.0) -> None:
        """Let time pass, and do all that is to be done."""
        self.now += seconds
        self.engine.step(self.now)
        while self.engine.poll(0):
            self.engine.step(self.now)

    def answer(self, sock: socket.socket) -> Any:
        """The whole answer; the socket is at its end behind it.  None: there is none yet."""
        data = b""
        while True:
            self.step()
            try:
                piece = sock.recv(1 << 16)
            except BlockingIOError:
                assert not data, "half an answer"
                return None
            if not piece:
                return json.loads(data)
            data += piece

    def ask(self, request: bytes) -> Any:
        sock = self.client()
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return self.answer(sock)


@pytest.fixture
def bench(short_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(str(short_path / "api.sock"), stack)


def add(**arguments: object) -> bytes:
    return json.dumps({"execute": "add_hostfwd", "arguments": arguments}).encode()


def error(text: str) -> dict[str, object]:
    return {"error": {"desc": f"bad request: {text}"}}


BAD_ARGUMENTS = "add_hostfwd: bad arguments."
BAD = [
    (b"", "cannot parse JSON"),
    (b"  \n", "cannot parse JSON"),
    (b"nonsense", "cannot parse JSON"),
    (b"{", "cannot parse JSON"),
    (b'{"execute":"list_hostfwd"', "cannot parse JSON"),
    (b'{"execute":"list_hostfwd","execute":"list_hostfwd"}', "cannot parse JSON"),
    (b'{"execute":"list_hostfwd","arguments":NaN}', "cannot parse JSON"),
    (b'{"execute":"\xff"}', "cannot parse JSON"),
    (b"[" * (REQUEST_MAX - 1), "cannot parse JSON"),
    (b"x" * (REQUEST_MAX - 1), "cannot parse JSON"),
    (b"x" * REQUEST_MAX, "too large message"),
    (b" " * REQUEST_MAX + LIST, "too large message"),
    (b"[]", "json_object() failed"),
    (b"1", "json_object() failed"),
    (b'"text"', "json_object() failed"),
    (b"{}", "no execute found"),
    (b'{"execute":1}', "no execute found"),
    (b'{"execute":"x"}', "unknown execute"),
    (b'{"execute":"add_hostfwd"}', f"{BAD_ARGUMENTS}proto"),
    (b'{"execute":"add_hostfwd","arguments":[]}', f"{BAD_ARGUMENTS}proto"),
    (add(), f"{BAD_ARGUMENTS}proto"),
    (add(proto=None), f"{BAD_ARGUMENTS}proto"),
    (add(proto="sctp", host_addr="x"), f"{BAD_ARGUMENTS}proto"),
    (add(proto="tcp", host_addr="localhost"), f"{BAD_ARGUMENTS}host_addr"),
    (add(proto="tcp", host_addr="::1"), f"{BAD_ARGUMENTS}host_addr"),
    (add(proto="tcp"), f"{BAD_ARGUMENTS}host_port"),
    (add(proto="tcp", host_port=0), f"{BAD_ARGUMENTS}host_port"),
    (add(proto="tcp", host_port="8080"), f"{BAD_ARGUMENTS}host_port"),
    (add(proto="tcp", host_port=True), f"{BAD_ARGUMENTS}host_port"),
    (add(proto="tcp", host_port=65536), f"{BAD_ARGUMENTS}host_port"),
    (b'{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":1e999}}', f"{BAD_ARGUMENTS}host_port"),
    (add(proto="tcp", host_port=8080, guest_addr="x"), f"{BAD_ARGUMENTS}guest_addr"),
    (add(proto="tcp", host_port=8080), f"{BAD_ARGUMENTS}guest_port"),
    (b'{"execute":"remove_hostfwd"}', "remove_hostfwd: bad arguments.id"),
    (b'{"execute":"remove_hostfwd","arguments":{"id":1}}', "remove_hostfwd: bad arguments.id"),
    (b'{"execute":"remove_hostfwd","arguments":{"id":"1"}}', "remove_hostfwd: bad arguments.id"),
]


@pytest.mark.parametrize(("request_", "text"), BAD)
def test_what_is_wrong_is_told_in_the_words_of_slirp4netns(bench: Bench, request_: bytes, text: str) -> None:
    assert bench.ask(request_) == error(text)
    assert bench.ask(LIST) == EMPTY


@pytest.mark.parametrize("how", ["at once", "at once, without an end", "byte by byte"])
def test_a_forward_is_added_listed_and_removed(bench: Bench, how: str) -> None:
    def ask(request: bytes) -> Any:
        if how == "at once":
            return bench.ask(request)
        sock = bench.client()
        pieces = [request] if how.startswith("at") else [bytes([byte]) for byte in request]
        for piece in pieces:
            assert bench.answer(sock) is None
            sock.sendall(piece)
        return bench.answer(sock)

    port = closed_port()
    assert ask(add(proto="tcp", host_addr="127.0.0.1", host_port=port, guest_addr="", guest_port=80)) == {
        "return": {"id": 1}
    }
    entry = {
        "id": 1, "proto": "tcp", "host_addr": "127.0.0.1", "host_port": port,
        "guest_addr": "10.0.2.100", "guest_port": 80,
    }  # fmt: skip
    assert ask(LIST) == {"entries": [entry], "return": {"entries": [entry]}}
    with socket.create_connection(("127.0.0.1", port)):
        bench.step()
        assert [str(flow.guest) for flow in bench.control.gateway.flows()] == ["10.0.2.100:80"]
    assert ask(b'{"execute":"remove_hostfwd","arguments":{"id":1}}') == {"return": {}}
    assert ask(LIST) == EMPTY
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_defaults_are_all_addresses_and_the_guests(bench: Bench) -> None:
    port = closed_port()
    bench.ask(add(proto="udp", host_port=port, guest_port=53))
    bench.ask(add(proto="tcp", host_addr="", host_port=closed_port(), guest_addr="10.0.2.15", guest_port=5.9))
    entries = bench.ask(LIST)["entries"]
    assert [(each["host_addr"], each["guest_addr"], each["guest_port"]) for each in entries] == [
        ("0.0.0.0", "10.0.2.100", 53),
        ("0.0.0.0", "10.0.2.15", 5),
    ]


def test_an_id_is_never_used_again(bench: Bench) -> None:
    port = closed_port()
    request = add(proto="tcp", host_addr="127.0.0.1", host_port=port, guest_port=80)
    assert bench.ask(request) == {"return": {"id": 1}}
    assert bench.ask(b'{"execute":"remove_hostfwd","arguments":{"id":1}}') == {"return": {}}
    assert bench.ask(request) == {"return": {"id": 2}}
    assert bench.ask(b'{"execute":"remove_hostfwd","arguments":{"id":1}}') == error(
        "remove_hostfwd: bad arguments.id"
    )


@pytest.mark.parametrize("arguments", [{}, {"host_addr": "192.0.2.1"}, {"guest_addr": "127.0.0.1"}])
def test_a_port_that_cannot_be_had_says_why_beside_the_usual_words(
    bench: Bench, arguments: dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        given = {"host_addr": "127.0.0.1", **arguments}
        problem = bench.ask(add(proto="tcp", host_port=port, guest_port=80, **given))["error"]
    assert problem["desc"] == "bad request: add_hostfwd: slirp_add_hostfwd failed"
    assert problem["reason"]
    assert bench.ask(LIST) == EMPTY


def test_what_follows_the_request_is_tolerated(bench: Bench) -> None:
    assert bench.ask(LIST + b"\n and more") == EMPTY
    assert bench.ask(b" \r\n\t" + LIST) == EMPTY


def test_a_silent_client_keeps_nobody_waiting(bench: Bench) -> None:
    silent, half = bench.client(), bench.client()
    assert not bench.engine.poll(0), "they wake nobody"
    half.sendall(LIST[:10])
    assert bench.ask(LIST) == EMPTY
    assert bench.answer(silent) is None
    bench.step(PATIENCE - 1)
    half.sendall(LIST[10:11])
    bench.step(2)
    assert bench.answer(silent) == error("cannot parse JSON")
    assert bench.answer(half) is None, "he has said something since"
    bench.step(PATIENCE)
    assert bench.answer(half) == error("cannot parse JSON")
    assert not bench.api.clients


def test_of_too_many_clients_the_one_silent_for_longest_is_answered(bench: Bench) -> None:
    first = bench.client()
    others = [bench.client() for _ in range(CLIENTS_MAX - 1)]
    first.sendall(b"{")
    bench.step()
    last = bench.client()
    assert len(bench.api.clients) == CLIENTS_MAX
    assert bench.answer(others[0]) == error("cannot parse JSON")
    assert bench.answer(first) is None
    last.sendall(LIST)
    assert bench.answer(last) == EMPTY


def test_a_client_that_goes_leaves_nothing(bench: Bench) -> None:
    bench.client().close()
    gone = bench.client()
    gone.sendall(LIST)
    gone.close()
    bench.step()
    assert not bench.api.clients


def fill(bench: Bench) -> None:
    """As if 2000 ports were forwarded."""
    for number in range(2000):
        forward = PortForward("tcp", "127.0.0.1", 1000 + number, "10.0.2.100", 80)
        bench.api.forwards._forwards[number] = forward


def test_a_client_that_does_not_read_gets_what_there_is_room_for_and_then_no_more(bench: Bench) -> None:
    fill(bench)
    sock = bench.client()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(LIST)
    bench.step()
    assert bench.api.clients, "the answer is larger than what the socket takes"
    assert bench.ask(b"{}") == error("no execute found")
    bench.step(PATIENCE + 1)
    assert not bench.api.clients


def test_a_large_answer_arrives_whole(bench: Bench) -> None:
    fill(bench)
    sock = bench.client()
    sock.sendall(LIST)
    data = b""
    while True:
        bench.step()
        piece = sock.recv(1 << 16)
        if not piece:
            break
        data += piece
    assert len(json.loads(data)["entries"]) == 2000


def test_what_is_written_too_much_does_not_cost_the_answer(bench: Bench) -> None:
    """A socket that is closed with something unread resets the other end."""
    sock = bench.client()
    sock.sendall(LIST + b" " * 3 * REQUEST_MAX)
    assert bench.answer(sock) == error("too large message")


def test_out_of_descriptors_it_waits(bench: Bench) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as sock:
        resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, hard))
        try:
            sock.connect(bench.path)
            bench.engine.step(bench.now)
            assert not bench.engine.poll(0), "it does not spin"
            assert bench.engine.deadline < math.inf
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        bench.step(PATIENCE + 1)
        sock.setblocking(False)
        sock.sendall(LIST)
        assert bench.answer(sock) == EMPTY


FLOOD = 3000


@pytest.mark.parametrize("said", [b"", b"{", LIST[:-1], b"x" * REQUEST_MAX, b"[" * 65536, LIST], ids=range(6))
def test_a_flood_of_clients_costs_a_bounded_number_and_holds_nobody_up(bench: Bench, said: bytes) -> None:
    """Thousands that say nothing, half a request, far too much, or do not read: one beside them is answered."""
    steady = bench.client()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(FLOOD):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(bench.path)
            with suppress(BlockingIOError, ConnectionError):
                sock.send(said)
            if number % 8 == 0:
                bench.step()
            assert len(bench.api.clients) <= CLIENTS_MAX
        if number % 500 == 0:
            assert bench.ask(LIST) == EMPTY
    held = [bench.client() for _ in range(2 * CLIENTS_MAX)]  # that stay, and wait
    for sock in held:
        with suppress(ConnectionError, BlockingIOError):
            sock.send(said)
    bench.step()
    assert len(bench.api.clients) <= CLIENTS_MAX
    assert (
        sum(len(each._request) + len(each._answer) for each in bench.api.clients)
        < CLIENTS_MAX * 3 * REQUEST_MAX
    )
    assert bench.ask(LIST) == EMPTY
    for sock in (steady, *held):
        sock.close()
    bench.step(PATIENCE + 1)
    assert not bench.api.clients
    asked = FLOOD // 500 + 2  # whose sockets the bench keeps
    assert len(os.listdir("/proc/self/fd")) <= before + asked


def test_requests_are_traced(bench: Bench) -> None:
    bench.ask(LIST)
    assert bench.traced == [f"apifd event\napi_handler: got request: {LIST.decode()}"]


# -- the path -------------------------------------------------------------------------------------------


def test_a_stale_socket_is_replaced_and_its_own_removed(bench: Bench) -> None:
    path = f"{bench.path}-left"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    with ExitStack() as stack:
        other = Bench(path, stack)
        assert other.ask(LIST) == EMPTY
        assert stat.S_ISSOCK(Path(path).stat().st_mode)
    assert not Path(path).exists()


def test_the_socket_of_another_that_runs_is_not_replaced(bench: Bench) -> None:
    with pytest.raises(OSError, match="in use"), ExitStack() as stack:
        Bench(bench.path, stack)
    assert bench.ask(LIST) == EMPTY


def test_a_path_that_is_too_long_is_told(short_path: Path, bench: Bench) -> None:
    path = short_path / ("x" * 108)
    with pytest.raises(OSError) as told:
        ApiSocket(bench.engine, bench.api.forwards, str(path))
    assert told.value.errno == errno.ENAMETOOLONG


# -- brackets -------------------------------------------------------------------------------------------

TREES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), TREES, max_size=3), st.sampled_from([None, 1]), st.booleans())
def test_an_object_is_there_when_its_last_bracket_is(value: object, indent: int | None, ascii_: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_).encode()
    brackets = _Brackets()
    assert [brackets.are_closed_by(text[i : i + 1]) for i in range(len(text))] == [False] * (
        len(text) - 1
    ) + [True]
    assert _Brackets().are_closed_by(text)
