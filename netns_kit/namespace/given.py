"""What a command is given beside its streams: descriptors by number or name, and files and sockets at paths.

Descriptors with names go by the protocol of socket activation (`netns_kit.host.activation`).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal, Protocol, Union

from netns_kit import arguments
from netns_kit.errors import ArgumentError, ArgumentTypeError
from netns_kit.host import activation

__all__ = ["FileMode", "HasFileno", "Listen", "OpenFile", "Word"]

Word = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]
"""One word of a command, or a path."""
FileMode = Literal["r", "w", "a", "r+"]
"""How a file is opened, as `open` has it."""


class HasFileno(Protocol):
    """An object with a descriptor: a socket, a file."""

    def fileno(self) -> int:
        """Return the number of the descriptor."""


Listen = Mapping[str, HasFileno | int] | Sequence[HasFileno | int | tuple[str, HasFileno | int]]
"""Sockets, as objects or descriptors: by name; or in a row, where a pair has a name."""
OpenFile = Word | HasFileno | int | tuple[Word, FileMode]
"""An open file or a descriptor; or a path, which is opened for reading; or a path with a mode."""

_FLAGS = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "r+": os.O_RDWR,
}
_KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)


def listening(listen: Listen | None) -> list[tuple[str, int]]:
    """Return the descriptors of `listen` with their names.  They block from now on, as the protocol has it."""
    if listen is None:
        return []
    if not isinstance(listen, Mapping):
        arguments.items("listen", listen, "sockets, pairs of a name and a socket, or a mapping of those")
    pairs: Iterable[object] = listen.items() if isinstance(listen, Mapping) else listen
    found = []
    for each in pairs:
        name, sock = each if isinstance(each, tuple) and len(each) == 2 else (activation.UNNAMED, each)
        found.append(
            (_checked_name("listen", name), _descriptor("listen", sock, "a socket, or its descriptor"))
        )
        if isinstance(sock, socket.socket):
            sock.setblocking(True)  # it would set a copy of itself to what it remembers
        else:
            os.set_blocking(found[-1][1], True)
    return found


def opened(open_files: Mapping[str, OpenFile] | None, owned: ExitStack) -> list[tuple[str, int]]:
    """Return the descriptors of `open_files` with their names; `owned` closes those that were opened here."""
    if open_files is None:
        return []
    arguments.mapping("open_files", open_files, "names, and a path or an open file for each")
    found = []
    for name, file in open_files.items():
        knob = f"open_files[{_checked_name('open_files', name)!r}]"
        if isinstance(file, (str, bytes, os.PathLike, tuple)):
            path, mode = file if isinstance(file, tuple) and len(file) == 2 else (file, "r")
            arguments.instance(
                knob, path, (str, bytes, os.PathLike), "a path, a path and a mode, or an open file"
            )
            arguments.one_of(f"mode of {knob}", mode, _FLAGS)
            fd = _open(os.fspath(path), _FLAGS[mode])
            owned.callback(os.close, fd)
        else:
            fd = _descriptor(knob, file, "a path, a path and a mode, or an open file")
        found.append((name, fd))
    return found


def _open(path: str | bytes, flags: int) -> int:
    """Open a file, without waiting for anybody.  A Unix socket is connected to, as OpenFile= of systemd does."""
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO or not stat.S_ISSOCK(os.stat(path).st_mode):
            raise
        return _connect(path)
    os.set_blocking(fd, True)
    return fd


def _connect(path: str | bytes) -> int:
    for kind in _KINDS:
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as sock:
            number = sock.connect_ex(path)
            if number == 0:
                sock.setblocking(True)
                return sock.detach()
        if number != errno.EPROTOTYPE:
            break
    raise OSError(number, os.strerror(number), path)


def host_sockets(sockets: Mapping[str, Word] | None) -> dict[str, tuple[str, int, int]]:
    """Check `sockets` and return, for each path inside, the host's path and what it leads to: device and inode."""
    expected = "absolute paths, and the path of a Unix socket for each"
    found = {}
    if sockets is not None:
        arguments.mapping("sockets", sockets, expected)
    for inside, path in (sockets or {}).items():
        name = absolute(inside, "sockets", expected)
        knob = f"sockets[{inside!r}]"
        text(path, knob, "the path of a Unix socket")
        whole = os.path.join(os.getcwd(), os.fsdecode(path))
        status = os.stat(whole)
        if not stat.S_ISSOCK(status.st_mode):
            raise ArgumentError("expected the path of a Unix socket", knob, arguments.shown(path))
        found[name] = text(whole), status.st_dev, status.st_ino
    return found


class LiveText(str):
    """The text of one of `files` that changes while commands see it, see `Namespace.rewrite_files`."""

    __slots__ = ()


def files_shown(files: Mapping[str, str | bytes] | None) -> dict[str, str]:
    """Check `files` and return the texts by path."""
    expected = "absolute paths and what is to be read there, text or bytes"
    found = {}
    if files is not None:
        arguments.mapping("files", files, expected)
    for path, content in (files or {}).items():
        name = absolute(path, "files", expected)
        arguments.instance(f"files[{path!r}]", content, (str, bytes), "text or bytes")
        found[name] = content if isinstance(content, str) else content.decode("utf-8", "surrogateescape")
    return found


def announce(
    environment: dict[str, str], fds: dict[int, int], given: Sequence[tuple[str, int]]
) -> str | None:
    """Add the descriptors `given` by name to `fds`, the command's by number, and say so in its environment.

    Descriptors that this process was activated with, and that are in `fds`, stay in front of them.  If they are not
    there, the variables are removed.  Variables that name another process than this one are left alone, unless ours
    take their place.  Return the name of the variable that is to hold the command's pid, if there is one.
    """
    ours = str(os.getpid())
    is_ours = environment.get("LISTEN_PID", ours) == ours
    count = activation.promised(environment) if is_ours else None
    if count is not None and not all(number in fds for number in _numbers(0, count)):
        count = None
    if not given:
        if is_ours:
            for variable in activation.VARIABLES if count is None else ("LISTEN_PIDFDID",):
                environment.pop(variable, None)
        return None if count is None else "LISTEN_PID"
    names = activation.names_of(environment, count or 0)
    numbers = _numbers(len(names), len(given))
    for number, (name, fd) in zip(numbers, given, strict=True):
        if number in fds:
            raise ArgumentError(
                f"expected none of {numbers[0]} to {numbers[-1]}, which `listen` and `open_files` take",
                "pass_fds", number, "pass it by another number",
            )  # fmt: skip
        names.append(name)
        fds[number] = fd
    environment.pop("LISTEN_PIDFDID", None)  # of this process's pidfd
    environment.update(LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))
    return "LISTEN_PID"


def _numbers(start: int, count: int) -> range:
    return range(activation.FIRST + start, activation.FIRST + start + count)


def _checked_name(knob: str, name: object) -> str:
    arguments.text(knob, name, "names as text")
    assert isinstance(name, str)
    if not activation.is_name(name):
        expected = "expected names of 1 to 255 ASCII characters, without colons and control characters"
        raise ArgumentError(expected, knob, arguments.shown(name))
    return name


def _descriptor(knob: str, given: object, expected: str) -> int:
    if not isinstance(given, int):
        fileno = getattr(given, "fileno", None)
        if not callable(fileno):
            raise ArgumentTypeError(f"expected {expected}", knob, arguments.shown(given))
        given = fileno()
    arguments.descriptor(knob, given)
    assert isinstance(given, int)
    return given


def absolute(path: Word, name: str, expected: str) -> str:
    """Return an absolute path as text, see `text`."""
    found = text(path, name, expected)
    if not found.startswith("/"):
        raise ArgumentError("expected absolute paths", name, arguments.shown(path))
    return found


def text(word: Word, name: str = "command", expected: str = "a word: text, bytes or a path") -> str:
    """Return any bytes as text for JSON; the agent turns it back, by UTF-8 and surrogates."""
    arguments.instance(name, word, (str, bytes, os.PathLike), expected)
    found = os.fsencode(word).decode("utf-8", "surrogateescape")
    if "\0" in found:
        raise ArgumentError("expected no null byte", name, arguments.shown(word))
    return found
