"""Which existing namespace is meant, by a process, a path or a descriptor, and how the agent begins there."""

from __future__ import annotations

import os
import re
import signal
from contextlib import ExitStack, suppress

from netns_kit import arguments
from netns_kit.errors import (
    ArgumentError,
    NamespaceGone,
    NotPrivileged,
    OwnNamespace,
)

from .agent_client import Start
from .watch import Watch

_PROC = re.compile(r"/proc/([0-9]+)/ns/net")


def check_named(pid: object, path: object, fd: object) -> str:
    """Check what names a namespace, and return it as messages show it."""
    given = {name: each for name, each in (("pid", pid), ("path", path), ("fd", fd)) if each is not None}
    what = ", ".join(f"{name}={arguments.shown(each)}" for name, each in given.items())
    if len(given) != 1:
        raise ArgumentError("expected exactly one of pid, path and fd", "attach", f"({what})")
    if pid is not None:
        arguments.whole_number("pid", pid, 1)
    if fd is not None:
        arguments.whole_number("fd", fd, 0)
    if path is not None:
        arguments.instance("path", path, (str, os.PathLike), "a path, like '/run/netns/NAME'")
    return what


def of_process(pid: int, stack: ExitStack) -> Start:
    """Open the namespace of a process.  Its pidfd is opened first, so that a recycled pid is not mistaken for it."""
    try:
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        ns = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, ns)
        with suppress(PermissionError):  # it is there, and somebody else's
            signal.pidfd_send_signal(process, 0)
    except (ProcessLookupError, FileNotFoundError) as exc:
        fix = "give the id of a process that runs"
        raise NamespaceGone("there is no such process", "pid", pid, fix) from exc
    except PermissionError as exc:
        raise NotPrivileged(
            f"may not inspect process {pid}", fix="be root, or the user it runs as", errno=exc.errno
        ) from exc
    return Start("attach", ns=ns, name=f"of process {pid}", process=process)


def check_not_ours(ns: int, name: str) -> None:
    """Raise OwnNamespace if the descriptor is of the network namespace that the calling thread is in."""
    try:
        ours, theirs = os.stat("/proc/thread-self/ns/net"), os.fstat(ns)
    except OSError:  # no descriptor, or no /proc: joining the namespace will raise it
        return
    if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
        raise OwnNamespace(
            f"the network namespace {name} is the caller's own",
            fix="attach when the process has made its namespace (unshare(2)); where the caller's own is meant, "
            "say so by allow_current=True",
        )


def at_path(path: str, stack: ExitStack) -> Start:
    """Open the namespace at a path, and watch that; a path in /proc is that of its process."""
    if found := _PROC.fullmatch(path):
        return of_process(int(found[1]), stack)
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    stack.callback(os.close, opened)
    if path.startswith("/proc/"):
        return Start("attach", ns=opened, name=path)
    watch = Watch(path)
    stack.callback(watch.close)
    return Start("attach", ns=opened, name=path, watch=watch)
