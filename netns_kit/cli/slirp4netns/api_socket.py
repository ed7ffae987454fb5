"""The socket by which ports are forwarded while a stack runs, as slirp4netns has it.

A client connects, writes one JSON object, and reads one:

    {"execute": "add_hostfwd", "arguments": {"proto": "tcp", "host_addr": "127.0.0.1", "host_port": 8080,
                                             "guest_addr": "10.0.2.100", "guest_port": 80}}
    {"return": {"id": 1}}

"list_hostfwd" and "remove_hostfwd" (with "id") are the others.  The requests, their order of checks and the answers
are those of slirp4netns, in the letter, because programs compare them; what it does to its own clients is not.  It
reads once and waits for that: a silent client stops all traffic, and half a request is a bad one.  Here the socket is
one more descriptor of the engine.  A request is complete when its brackets are closed, when the client shuts down his
side, or when he has said nothing for `PATIENCE`; of too many clients the one silent for longest is answered first.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address
from typing import Any, Literal

from netns_kit.errors import NetnsKitError
from netns_kit.forwarder.ports import PortForward
from netns_kit.gateway.engine import IN, OUT, Engine
from netns_kit.host import paths
from netns_kit.userstack.control import Control

REQUEST_MAX = 4096
CLIENTS_MAX = 64
ACCEPTS_PER_STEP = 8
READS_AT_END = 64  # as much as a client's buffer has room for, usually
PATIENCE = 30.0  # seconds of a client's silence, and before accepting again when there are no descriptors
PATH_MAX = 107
OWNER = 0  # of the forwards, in `Control`

Answer = dict[str, object]


class Refused(Exception):
    """The request is a bad one; the text says how."""


class HostForwards:
    """What can be asked for: numbered forwards of a `Control`.  A number is never used again."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._forwards: dict[int, PortForward] = {}
        self._last = 0

    def answer(self, request: bytes) -> Answer:
        """Do what is asked.  It never raises."""
        try:
            return self._execute(_object(request))
        except Refused as error:
            problem: Answer = {"desc": f"bad request: {error}"}
            if error.__cause__ is not None:
                problem["reason"] = str(error.__cause__)
            return {"error": problem}

    def _execute(self, message: dict[str, Any]) -> Answer:
        match message.get("execute"):
            case "add_hostfwd":
                return {"return": {"id": self._add(_arguments(message))}}
            case "list_hostfwd":
                entries = [self._entry(number, forward) for number, forward in self._forwards.items()]
                return {
                    "entries": entries,
                    "return": {"entries": entries},
                }  # the first as it is, and as documented
            case "remove_hostfwd":
                self._remove(_arguments(message))
                return {"return": {}}
            case str():
                raise Refused("unknown execute")
            case _:
                raise Refused("no execute found")

    def _add(self, arguments: dict[str, Any]) -> int:
        def take(name: str, read: Callable[[Any], Any]) -> Any:
            try:
                return read(arguments.get(name))
            except (ValueError, OverflowError):
                raise Refused(f"add_hostfwd: bad arguments.{name}") from None

        guest = self._control.gateway.subnet.guest
        protocol = take("proto", _protocol)
        host = take("host_addr", lambda text: _address(text, IPv4Address(0)))
        host_port = take("host_port", _port)
        to = take("guest_addr", lambda text: _address(text, guest))
        forward = PortForward(protocol, host, host_port, to, take("guest_port", _port))
        try:
            self._control.add_forwards(OWNER, (forward,))
        except (NetnsKitError, OSError) as error:
            raise Refused("add_hostfwd: slirp_add_hostfwd failed") from error
        self._last += 1
        self._forwards[self._last] = forward
        return self._last

    def _remove(self, arguments: dict[str, Any]) -> None:
        try:
            forward = self._forwards.pop(_number(arguments.get("id")))
        except (ValueError, OverflowError, KeyError):
            raise Refused("remove_hostfwd: bad arguments.id") from None
        self._control.remove_forward(OWNER, forward)

    def _entry(self, number: int, forward: PortForward) -> Answer:
        return {
            "id": number,
            "proto": forward.protocol,
            "host_addr": str(forward.host),
            "host_port": forward.host_port,
            "guest_addr": str(forward.guest),
            "guest_port": forward.guest_port,
        }


class ApiSocket:
    """Serves `forwards` at `path` on an engine; a socket left there, where nobody listens, is replaced.

    Clients may be silent, slow, or gone: nobody else notices.

    `trace` is told of each request.  Raises OSError: the path cannot be bound, ENAMETOOLONG among it.
    """

    def __init__(
        self, engine: Engine, forwards: HostForwards, path: str, trace: Callable[[str], None] = lambda _: None
    ) -> None:
        self.engine = engine
        self.forwards = forwards
        self.trace = trace
        self.clients: dict[_Client, None] = {}  # who spoke last is last
        self.timer_at = self.timer_entry = math.inf
        if len(os.fsencode(path)) > PATH_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._made = paths.bind(self._socket, path)
            self._socket.listen()  # at once: to others it is a deserted one until then
        except BaseException:
            self._socket.close()
            raise
        engine.add(self._socket.fileno(), self._on_events, IN)

    def _on_events(self, _: int) -> None:
        for _ in range(ACCEPTS_PER_STEP):
            try:
                sock, _ = self._socket.accept()
            except BlockingIOError:
                return
            except OSError:  # out of descriptors or memory; nothing else fails for a client of this host
                self.engine.modify(self._socket.fileno(), 0)
                self.engine.timers.arm(self, self.engine.now + PATIENCE)
                return
            sock.setblocking(False)
            if len(self.clients) == CLIENTS_MAX:
                next(iter(self.clients)).end()
            self.clients[_Client(self, sock)] = None

    def handle_timer(self, now: float) -> None:
        """Accept again."""
        self.engine.modify(self._socket.fileno(), IN)

    def close(self) -> None:
        """End it, and remove the socket, as far as the sandbox lets us."""
        self.timer_at = math.inf
        for client in list(self.clients):
            client.close()
        self.engine.remove(self._socket.fileno())
        self._socket.close()
        with suppress(OSError):
            self._made.remove()


class _Client:
    """One client: first his request comes in, then the answer goes out."""

    def __init__(self, api: ApiSocket, sock: socket.socket) -> None:
        self._api = api
        self._socket = sock
        self._request = bytearray()
        self._brackets = _Brackets()
        self._answer = b""  # what is left of it
        self._answered = False
        self.timer_at = self.timer_entry = math.inf
        api.engine.add(sock.fileno(), self._on_events, IN)
        self._wait()

    def _wait(self) -> None:
        self._api.engine.timers.arm(self, self._api.engine.now + PATIENCE)

    def _on_events(self, events: int) -> None:
        if self._answered:
            self._send()
            return
        try:
            data = self._socket.recv(REQUEST_MAX)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._request += data
        if not data or len(self._request) >= REQUEST_MAX or self._brackets.are_closed_by(data):
            self._reply()
        else:
            clients = self._api.clients
            clients[self] = clients.pop(self)
            self._wait()

    def handle_timer(self, now: float) -> None:
        """He has been silent for too long."""
        self.end()

    def end(self) -> None:
        """Answer what there is of the request; who does not take his answer gets no more time."""
        if not self._answered:
            self._reply()
        if self in self._api.clients:
            self.close()

    def _reply(self) -> None:
        request = bytes(self._request)
        self._api.trace(f"apifd event\napi_handler: got request: {request.decode(errors='replace')}")
        if len(request) >= REQUEST_MAX:
            answer: Answer = {"error": {"desc": "bad request: too large message"}}
        else:
            answer = self._api.forwards.answer(request)
        self._answer = json.dumps(answer, separators=(",", ":")).encode()
        self._answered = True
        self._api.engine.modify(self._socket.fileno(), OUT)
        self._wait()
        self._send()

    def _send(self) -> None:
        try:
            while self._answer:
                sent = self._socket.send(self._answer, socket.MSG_NOSIGNAL)
                self._answer = self._answer[sent:]
        except BlockingIOError:
            return
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        """Give the socket back.  What he has written and we have not read would be an error to him, ECONNRESET."""
        self.timer_at = math.inf
        del self._api.clients[self]
        self._api.engine.remove(self._socket.fileno())
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            for _ in range(READS_AT_END):
                if not self._socket.recv(REQUEST_MAX):
                    break
        self._socket.close()


class _Brackets:
    """Whether a JSON object or array, coming piece by piece, is there to its end; what is neither is so at once."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = self._begun = False

    def are_closed_by(self, piece: bytes) -> bool:
        for byte in piece:
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif byte == 0x5C:
                    self._escaped = True
                elif byte == 0x22:
                    self._in_string = False
            elif byte in b"{[":
                self._begun = True
                self._depth += 1
            elif byte in b" \t\r\n":
                continue
            elif not self._begun:
                return True
            elif byte == 0x22:
                self._in_string = True
            elif byte in b"}]":
                self._depth -= 1
                if self._depth == 0:
                    return True
        return False


def _object(request: bytes) -> dict[str, Any]:
    """What it begins with; anything may follow.  Raises `Refused`."""
    try:
        message, _ = _DECODER.raw_decode(request.decode().lstrip(" \t\r\n"))
    except (ValueError, RecursionError):
        raise Refused("cannot parse JSON") from None
    if not isinstance(message, dict):
        raise Refused("json_object() failed")
    return message


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _arguments(message: dict[str, Any]) -> dict[str, Any]:
    arguments = message.get("arguments")
    return arguments if isinstance(arguments, dict) else {}


def _protocol(value: object) -> Literal["tcp", "udp"]:
    match value:
        case "tcp" | "udp":
            return value
    raise ValueError(value)


def _address(value: object, default: IPv4Address) -> IPv4Address:
    return IPv4Address(value) if isinstance(value, str) and value else default


def _port(value: object) -> int:
    number = _number(value)
    if not 0 < number < 65536:
        raise ValueError(number)
    return number


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    return int(value)
