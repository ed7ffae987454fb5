"""The socket by which a network that is up is found and asked: `netns-kit up` listens, other commands connect.

It is an abstract unix socket (unix(7)), so nothing is left of one whose program was killed; and it belongs to the
network namespace that `up` was called in, so no member reaches it.  Abstract sockets have no owner, therefore each
side looks at the uid of the other (SO_PEERCRED).

Words.  A request is a line of JSON, with what is asked for as "op".  Lines of JSON answer it; one with "error" is the
last.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

from netns_kit import arguments
from netns_kit.child.codec import decode
from netns_kit.errors import NetnsKitError, NotFound, NotPrivileged
from netns_kit.frozen import frozen

T = TypeVar("T")

UNIX_SOCKETS = "/proc/net/unix"
LINE_MAX = 1 << 20  # bytes
_CREDENTIALS = struct.Struct("3i")  # struct ucred
_LISTENING = "00010000"  # __SO_ACCEPTCON, in hexadecimal digits


def prefix() -> str:
    """Return what the names of this user's sockets begin with."""
    return f"netns-kit/{os.geteuid()}/"


def names() -> list[str]:
    """Return the names of the networks of this user that are up, as far as the kernel tells."""
    found, before = set(), f"@{prefix()}"
    with suppress(OSError), open(UNIX_SOCKETS, encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if words[7:] and words[3] == _LISTENING and words[7].startswith(before):
                found.add(words[7].removeprefix(before))
    return sorted(found)


def listen(name: str) -> socket.socket:
    """Return a socket that listens for those who ask about the network of that name.

    Raises:
        NetnsKitError: A network of that name is up.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(f"\0{prefix()}{name}")
        sock.listen()
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            fix = f"end it by `netns-kit down {name}`, or give the file another name"
            raise NetnsKitError(f"a network {name!r} is up", fix=fix) from error
        raise
    return sock


def connect(name: str) -> socket.socket:
    """Return a socket that is connected to the network of that name.

    Raises:
        NotFound: There is none.
        NotPrivileged: Somebody else has taken the name.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(f"\0{prefix()}{name}")
        check_peer(sock)
    except ConnectionRefusedError:
        sock.close()
        up = ", ".join(names()) or "none"
        raise NotFound(f"no network {arguments.shown(name)} is up", fix=f"there is {up}") from None
    except BaseException:
        sock.close()
        raise
    return sock


def check_peer(sock: socket.socket) -> None:
    """Check that the other side is this user, or root.

    Raises:
        NotPrivileged: It is somebody else.
    """
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid not in (0, os.geteuid()):
        raise NotPrivileged(f"the other side of the socket is the user with the id {uid}")


@frozen
class Place:
    """A namespace that may be joined."""

    pid: int
    """The process id of a process in it."""
    files: dict[str, str]
    """The files that commands see there, by path."""


def ask(sock: socket.socket, kind: type[T], op: str, **more: object) -> Iterator[T]:
    """Send a request, and yield the answers, which are of that kind, until the other side ends.

    Raises:
        NetnsKitError: The answer is an error.
    """
    sock.sendall(json.dumps({"op": op, **more}).encode() + b"\n")
    with sock.makefile("rb") as file:
        for line in file:
            answer = json.loads(line)
            if isinstance(answer, dict) and "error" in answer:
                raise NetnsKitError(str(answer["error"]))
            yield decode(kind, answer)
