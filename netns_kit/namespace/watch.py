"""Watch: whether a path still leads to what it led to, as the kernel tells (inotify(7)).

The directory is watched, not the file: a file that is mounted over a name, as a namespace is, has no event when it
ends, and unmounting it has none until the name is removed.  There are no events in /proc: the end of a process is
known by its pidfd.
"""

from __future__ import annotations

import os
from contextlib import suppress

from netns_kit.host import abi
from netns_kit.host.libc import check, libc
from netns_kit.host.undo import on_error

_MOVED = abi.IN_MOVED_FROM | abi.IN_MOVED_TO | abi.IN_MOVE_SELF
_EVENTS = _MOVED | abi.IN_CREATE | abi.IN_DELETE | abi.IN_DELETE_SELF
_READ = 65536


class Watch:
    """Owns a descriptor that is readable when something has happened in the directory of a path."""

    def __init__(self, path: str) -> None:
        """Watch `path`.

        Raises:
            OSError: There is no such path, or the user has too many watches (`fs.inotify.max_user_instances`).
        """
        self._path = os.path.realpath(path)
        if not os.path.exists(self._path):  # links of /proc cannot be followed by their text
            self._path = os.path.abspath(path)
        self._fd = check(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK), path)
        with on_error(self.close):
            directory = os.fsencode(os.path.dirname(self._path))
            check(libc.inotify_add_watch(self._fd, directory, _EVENTS), path)
            self._identity = _identity(self._path)

    def fileno(self) -> int:
        """Return a descriptor that is readable when `is_there` may have changed."""
        return self._fd

    def is_there(self) -> bool:
        """Whether the path leads where it did.  The events until now are taken."""
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
