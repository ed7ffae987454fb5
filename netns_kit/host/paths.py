"""Files and sockets that this process makes at a path of the user's, and removes again.

A path is only a name: it may lead to a device, another program's file or a link that somebody has put there.  So
nothing that exists is overwritten, no symbolic link is followed, and what is removed is what was made.  What an
instance that was killed has left is replaced: a socket where nobody listens, the pid file of an ended process.

What is at a path is held open while it may have to be recognized: an inode that is open keeps its number, so no later
file can have the same one.  It is compared right before the name is removed.  Linux has no call that does both at
once: a file that somebody else puts there in between is removed instead of ours.  Nor can a socket that was bound,
and does not listen yet, be told from one that was left.  docs/security.md says so.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from contextlib import suppress

__all__ = ["NOTHING_MADE", "Made", "bind", "text_of", "write_pid_file"]

_PID_FILE_MAX = 32


class Made:
    """A file or a socket that this process has made at `path`; `fd` is a descriptor of it, which this object owns."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd

    def remove(self) -> None:
        """Remove it, unless the path leads to something else by now, or nowhere.  Again is fine.

        Raises:
            OSError: The directory does not let us.
        """
        if self._fd >= 0:
            try:
                _unlink(self._path, self._fd)
            finally:
                self.leave()

    def leave(self) -> None:
        """Leave it where it is, for good."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


NOTHING_MADE = Made("", -1)
"""Where there is nothing to be removed."""


def text_of(path: str) -> str:
    """Return the text of a file; none if it is not there, or cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def bind(sock: socket.socket, path: str) -> Made:
    """Bind a Unix socket, for this user alone; one that was left at `path`, where nobody listens, is replaced.

    Its mode is never wider than 0600: bind(2) gives the name the mode of the socket, without what umask(2) takes.

    Args:
        sock: A socket that is not bound.
        path: The name that it gets.

    Raises:
        OSError: EADDRINUSE for anything else that is there; what bind(2) raises.
    """
    os.fchmod(sock.fileno(), 0o600)
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _remove_deserted(path)
        sock.bind(path)
    made = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    os.chmod(f"/proc/self/fd/{made}", 0o600)
    return Made(path, made)


def write_pid_file(path: str) -> Made:
    """Write our pid to a new file, which all may read; that of a process that has ended is replaced.

    Args:
        path: The name of the file.

    Raises:
        FileExistsError: Something else is there.
        OSError: The file cannot be made or written.
    """
    try:
        fd = _create(path)
    except FileExistsError:
        _remove_stale(path)
        try:
            fd = _create(path)
        except FileExistsError:
            what = "exists and is not ours; remove it or name another"
            raise FileExistsError(errno.EEXIST, what, path) from None
    made = Made(path, fd)
    try:
        os.write(fd, b"%d\n" % os.getpid())
    except OSError:
        made.remove()
        raise
    return made


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def _unlink(path: str, fd: int) -> None:
    """Remove the name `path` if it leads to what `fd` is open for."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(path), os.fstat(fd)):
            os.unlink(path)


def _remove_deserted(path: str) -> None:
    """Remove a socket at `path` where nobody listens."""
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode) and _is_deserted(f"/proc/self/fd/{fd}"):
                _unlink(path, fd)
        finally:
            os.close(fd)


def _is_deserted(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        return sock.connect_ex(path) == errno.ECONNREFUSED


def _remove_stale(path: str) -> None:
    """Remove a pid file of our user's at `path`, whose process has ended."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # a link, or closed to us
        return
    try:
        if _is_stale(fd):
            _unlink(path, fd)
    finally:
        os.close(fd)


def _is_stale(fd: int) -> bool:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        return False
    pid = re.fullmatch(rb"([1-9][0-9]{0,9})\n", os.read(fd, _PID_FILE_MAX))
    try:
        if pid is not None:
            os.kill(int(pid[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False
