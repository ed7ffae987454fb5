"""Files and sockets that this process makes at a path of the user's, and removes again.

A path is only a name: it may lead to a device, another program's file or a link that somebody has put there.  So
nothing that exists is overwritten, no symbolic link is followed, and what is removed is what was made, by device and
inode.  What an instance that was killed has left is replaced: a socket where nobody listens, the pid file of a
process that has ended.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from contextlib import suppress

__all__ = ["Made", "bind", "write_pid_file"]

_PID_FILE_MAX = 32


class Made:
    """What was made at `path`: a file or a socket."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._identity = _identity(path)

    def remove(self) -> None:
        """Remove it, unless the path leads to something else by now, or nowhere.  Raises OSError."""
        with suppress(FileNotFoundError):
            if _identity(self._path) == self._identity:
                os.unlink(self._path)


def bind(sock: socket.socket, path: str) -> Made:
    """Bind a Unix socket; one that was left at `path`, where nobody listens, is replaced.

    Raises OSError: EADDRINUSE for anything else that is there.
    """
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not _is_deserted(path):
            raise
        os.unlink(path)
        sock.bind(path)
    return Made(path)


def write_pid_file(path: str) -> Made:
    """Write our pid to a new file; that of a process that has ended is replaced.

    Raises OSError: EEXIST for anything else that is there.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o666)
    except FileExistsError:
        if not _is_left(path):
            raise FileExistsError(
                errno.EEXIST,
                "exists, and is no pid file of ours of a process that has ended; remove it",
                path,
            ) from None
        os.unlink(path)
        fd = os.open(path, flags, 0o666)
    made = Made(path)
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
    except OSError:
        made.remove()
        raise
    return made


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _is_deserted(path: str) -> bool:
    """Whether there is a socket at `path` where nobody listens."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        return sock.connect_ex(path) == errno.ECONNREFUSED


def _is_left(path: str) -> bool:
    """Whether there is a pid file of our user's at `path`, whose process has ended."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # a link, or closed to us
        return False
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        pid = re.fullmatch(rb"([1-9][0-9]{0,9})\n", os.read(fd, _PID_FILE_MAX))
    finally:
        os.close(fd)
    try:
        if pid is not None:
            os.kill(int(pid[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False
