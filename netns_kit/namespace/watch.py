"""Watch: whether a path still leads to what it led to, told by the kernel (inotify(7)).

The directory is watched, not the file: what somebody has mounted over a name, a namespace for one, is another file,
whose end is no event.  Nor is unmounting it one, until the name goes too.  /proc tells nothing; the end of a process
is known by its pidfd.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_CLOEXEC, _NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
_EVENTS = _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
_READ = 65536

libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Owns a descriptor that is readable when something has happened beside `path`, which must exist.

    Raises OSError: there is no such path, or the user has too many watches (`fs.inotify.max_user_instances`).
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.realpath(path)
        if not os.path.exists(self._path):  # links of /proc cannot be followed by their text
            self._path = os.path.abspath(path)
        self._fd = _check(libc.inotify_init1(_CLOEXEC | _NONBLOCK), path)
        try:
            directory = os.fsencode(os.path.dirname(self._path))
            _check(libc.inotify_add_watch(self._fd, directory, _EVENTS), path)
            self._identity = _identity(self._path)
        except BaseException:
            os.close(self._fd)
            raise

    def fileno(self) -> int:
        """Readable when `is_there` may say something else."""
        return self._fd

    def is_there(self) -> bool:
        """Whether the path leads where it did; what has happened until now has been looked at then."""
        with suppress(BlockingIOError):
            while os.read(self._fd, _READ):
                pass
        try:
            return _identity(self._path) == self._identity
        except OSError:
            return False

    def close(self) -> None:
        os.close(self._fd)


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _check(result: int, path: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result
