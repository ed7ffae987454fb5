"""Occupants: whether any process lives in a network namespace still.

The kernel tells nobody when the last one leaves, and who holds a tap of the namespace keeps it alive himself.  So one
process of it is watched, by its pidfd; when it has ended, /proc is searched for another, and that one is watched.
Searching is a system call for each process of the machine, each time that the one watched has ended.

Two processes live in one namespace if /proc/PID/net/dev is one file for both.  That can be looked at without
privilege, from a mount namespace that has no /proc, by a descriptor, and in the sandbox of the worker;
/proc/PID/ns/net can not.

A process counts by its first thread, and if it can be seen in the /proc of this PID namespace.  Where /proc hides
processes (hidepid), nothing can be known, and the namespace counts as inhabited.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from netns_kit.gateway.engine import IN, Engine

_ATTEMPTS = 2  # a process may be forked behind our back, and its parent end before we come to it
_FIRST = "1"  # there always is one, if it can be seen


class Occupants:
    """Watches those of the network namespace that `pid` is in, on an engine, and calls `gone` when there are none.

    Raises OSError: there is no such process, or nobody may look at it.
    """

    def __init__(self, engine: Engine, pid: int, gone: Callable[[], None]) -> None:
        self._engine = engine
        self._gone = gone
        self._pidfd = os.pidfd_open(pid)
        try:
            self._proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._identity = self._namespace_of(str(pid))
        except BaseException:
            os.close(self._pidfd)
            raise
        engine.add(self._pidfd, self._on_end, IN)

    def _namespace_of(self, pid: str) -> tuple[int, int]:
        status = os.stat(f"{pid}/net/dev", dir_fd=self._proc)
        return status.st_dev, status.st_ino

    def _on_end(self, _: int) -> None:
        self._engine.remove(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        for _attempt in range(_ATTEMPTS):
            try:
                self._pidfd = self._another()
            except PermissionError:  # somebody is hidden
                return
            if self._pidfd >= 0:
                self._engine.add(self._pidfd, self._on_end, IN)
                return
        self._gone()

    def _another(self) -> int:
        """A pidfd of another process that lives there, or -1.  Raises PermissionError if that cannot be known."""
        pids = [name for name in os.listdir(self._proc) if name.isdigit()]
        if _FIRST not in pids:
            raise PermissionError("/proc does not show all processes")
        ours = str(os.getpid())
        for pid in pids:
            if pid != ours and self._lives_there(pid):
                try:
                    pidfd = os.pidfd_open(int(pid))
                except ProcessLookupError:
                    continue
                if self._lives_there(pid):  # it is the process we have looked at
                    return pidfd
                os.close(pidfd)
        return -1

    def _lives_there(self, pid: str) -> bool:
        try:
            return self._namespace_of(pid) == self._identity
        except (FileNotFoundError, ProcessLookupError):  # it has ended, or is about to
            return False

    def close(self) -> None:
        """Stop watching."""
        if self._pidfd >= 0:
            self._engine.remove(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        os.close(self._proc)
