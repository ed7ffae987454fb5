"""Socket activation: descriptors that a process finds open when it is started, as sd_listen_fds(3) has it.

The descriptors are numbered from 3 on.  LISTEN_FDS says how many there are, LISTEN_PID for which process, and
LISTEN_FDNAMES how each is called, with colons between.  LISTEN_PIDFDID names the process by its pidfd as well.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping

from netns_kit.errors import ArgumentError

__all__ = ["FIRST", "UNNAMED", "VARIABLES", "activated", "is_name", "names_of", "problem", "promised"]

FIRST = 3
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
UNNAMED = "unknown"
_LONGEST_NAME = 255
_STREAMS = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


def activated() -> tuple[tuple[str, socket.socket], ...]:
    """Return the sockets that this process was activated with, each with its name.

    They are the caller's from now on: no child inherits them, and the variables are removed from the environment, so
    that a second call returns nothing.  There are none if the variables are absent, or name another process.

    Raises:
        ArgumentError: The variables cannot be read, or a descriptor that they promise is none, or not a TCP socket
            that listens, a UDP socket, or a Unix socket.  Everything is left as it was.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return ()
    count = promised(os.environ)
    if count is None:
        expected = "expected the number of descriptors that were passed"
        raise ArgumentError(expected, "LISTEN_FDS", repr(os.environ.get("LISTEN_FDS", "")))
    named = tuple(zip(names_of(os.environ, count), range(FIRST, FIRST + count), strict=True))
    for name, fd in named:
        if (wrong := problem(fd)) is not None:
            fix = "have the service manager pass listening sockets alone (Accept=no), or take the others by number"
            given = f"{count}, and descriptor {fd} ({name}) {wrong}"
            raise ArgumentError("expected sockets that listen", "LISTEN_FDS", given, fix)
    for variable in VARIABLES:
        os.environ.pop(variable, None)
    for _, fd in named:
        os.set_inheritable(fd, False)
    return tuple((name, socket.socket(fileno=fd)) for name, fd in named)


def problem(fd: int) -> str | None:
    """Return why a descriptor is none that a server can serve, or None."""
    try:
        os.fstat(fd)
    except OSError:
        return "is not open"
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        if error.errno == errno.ENOTSOCK:
            return "is no socket"
        raise
    try:
        if sock.family not in _FAMILIES:
            return f"is a socket of another family ({int(sock.family)})"
        if sock.type in _STREAMS and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return "does not listen"
        if sock.family != socket.AF_UNIX and sock.proto not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            return f"is of another protocol ({sock.proto}) than TCP and UDP"
    finally:
        sock.detach()
    return None


def promised(environment: Mapping[str, str]) -> int | None:
    """Return how many descriptors LISTEN_FDS promises; None if it cannot be read."""
    count = environment.get("LISTEN_FDS", "")
    return int(count) if count.isascii() and count.isdecimal() and len(count) < 5 else None


def names_of(environment: Mapping[str, str], count: int) -> list[str]:
    """Return the names of `count` descriptors.  Where LISTEN_FDNAMES has not as many, none has a name."""
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    return names if len(names) == count else [UNNAMED] * count


def is_name(text: str) -> bool:
    """Return whether a descriptor can have that name: ASCII without colons and control characters, 255 at most."""
    return 0 < len(text) <= _LONGEST_NAME and text.isascii() and text.isprintable() and ":" not in text
