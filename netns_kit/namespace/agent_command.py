"""A command of the agent: how it is started and killed, and what the agent keeps of it while it runs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import struct
import time
from contextlib import suppress

from netns_kit.child.channel import RECORD
from netns_kit.host import abi
from netns_kit.host.libc import check, libc

from .agent_common import children_of, failure, to_bytes
from .agent_files import hand_over, load_nothing, show_files

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer than all imports here

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

    from .agent_namespaces import Quarters

OF_PATHS = {errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
ECHO = -signal.SIGCONT
"""What comes back from a client that the agent has continued, for a command with a process group of its own."""
PENDING_MAX = 64  # of one signal, that nobody passes on
SHELL = b"/bin/sh"
ELSEWHERE = {  # execvp(3) goes on to the next directory of PATH
    *(errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT)
}
STOPPING = {
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
}  # a stopped client passes them on when it is continued
PASSED_ON_WITHIN = 2.0  # seconds in which a client passes on a signal that came to the process group


def is_capable(capability: int) -> bool:
    with open("/proc/self/status", "rb") as file:
        effective = next(line.split()[1] for line in file if line.startswith(b"CapEff:"))
    return bool(int(effective, 16) >> capability & 1)


def execute(argv: Sequence[str], env: dict[str, str]) -> NoReturn:
    """Execute a program as execvp(3) does: searched in PATH, and by the shell if it names no interpreter.

    Raises:
        OSError: The program cannot be executed.  It names the interpreter, if that is lacking.
    """
    program = argv[0]
    places = [""] if "/" in program else env.get("PATH", os.defpath).split(":")
    arguments = [to_bytes(word) for word in argv]
    environment = {to_bytes(name): to_bytes(value) for name, value in env.items()}
    number, lacking = errno.ENOENT, None
    for place in places if program else []:
        path = to_bytes(os.path.join(place, program))
        try:
            try:
                os.execve(path, arguments, environment)
            except OSError as exc:
                if exc.errno != errno.ENOEXEC or not is_text(path):
                    raise
            os.execve(SHELL, [SHELL, path, *arguments[1:]], environment)
        except OSError as exc:
            interpreter = lacking_interpreter(path, exc.errno)
            if exc.errno not in ELSEWHERE:
                raise OSError(exc.errno, exc.strerror, interpreter) from exc
            if number != errno.EACCES:
                number = exc.errno
            lacking = lacking or interpreter
    raise OSError(number, os.strerror(number), lacking)


def lacking_interpreter(path: bytes, number: int | None) -> str | None:
    """Return the interpreter that a script or a binary names, if that is why its execution failed with `number`."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:  # the program itself is lacking, or may not be read
        return None
    if number not in OF_PATHS or not os.access(path, os.X_OK):
        return None
    name = b""
    if head.startswith(b"#!"):
        name = head[2:].split(b"\n")[0].strip(b" \t").replace(b"\t", b" ").split(b" ")[0]
    elif head.startswith(b"\x7fELF\2") and len(head) >= 64:  # elf(5), of 64 bits
        (table,) = struct.unpack_from("=Q", head, 32)
        size, count = struct.unpack_from("=HH", head, 54)
        for at in range(table, min(table + size * count, len(head) - 55), size or 1):
            kind, start, length = struct.unpack_from("=I4xQ16xQ", head, at)
            if kind == abi.PT_INTERP:
                name = head[start : start + length].rstrip(b"\0")
    return name.decode("utf-8", "surrogateescape") or None


def is_text(path: bytes) -> bool:
    """Whether the first line of a file has no zero byte.  That of an executable for another machine has one."""
    with open(path, "rb") as file:
        return b"\0" not in file.readline(256)


def become_command(
    request: dict[str, Any],
    fds: list[int],
    report: socket.socket,
    quarters: Quarters,
    restore: dict[signal.Signals, Any],
) -> NoReturn:
    """As a child of the agent, become the command: end in exec, or tell on `report` why not."""
    step = "spawn"
    try:
        if quarters.mounts is None:  # else the end of the PID namespace kills it
            agent = os.getppid()
            check(libc.prctl(abi.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
            if os.getppid() != agent:
                os._exit(127)
        if request["start_new_session"] or (quarters.mounts is not None and not request["at_terminal"]):
            # Fact: kill(0, ...) reaches the members of the group that are outside the PID namespace too, and
            # /dev/tty is the terminal of the session, whatever the standard streams are.
            os.setsid()
        load_nothing()
        quarters.enter(None if request["here"] is None else fds[request["here"]])
        if request["cwd"] is not None:
            os.chdir(to_bytes(request["cwd"]))
        elif quarters.of_stranger:  # to whom no directory above the caller's may be open
            os.chdir("/")
        step = "mount"
        copies, writers = show_files(request["files"], request["sockets"], request["live"])
        if copies:
            with suppress(OSError):  # too many are on their way: then they are not shown again
                hand_over(report, copies, [os.open("/proc/self/ns/mnt", os.O_RDONLY)], writers)
        step = "spawn"
        numbers = {int(number): fds[index] for number, index in request["fds"].items()}
        above = max([2, *numbers]) + 1
        report = socket.socket(fileno=fcntl.fcntl(report.fileno(), fcntl.F_DUPFD_CLOEXEC, above))
        moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for number, fd in numbers.items()}
        os.closerange(0, 3)
        for number, fd in moved.items():
            os.dup2(fd, number)
        if request["foreground"]:
            take_terminal()
        check(libc.setrlimit(abi.RLIMIT_NOFILE, quarters.limits))
        env = request["env"]
        if request["pid_variable"] is not None:
            env[request["pid_variable"]] = str(os.getpid())
        for number, action in restore.items():
            signal.signal(number, action)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # what has come meanwhile is for the command
        step = "exec"
        execute(request["argv"], env)
    except BaseException as exc:
        if step == "exec" and isinstance(exc, OSError):
            problem: dict[str, object] = {"unexecuted": exc.errno, "interpreter": exc.filename}
        else:
            os.closerange(0, 3)  # it may be that there are too many to look at anything
            problem = failure(exc, step if is_capable(abi.CAP_SYS_ADMIN) else "spawn")
        record = json.dumps(problem).encode()
        report.send(record if len(record) < RECORD else json.dumps({**problem, "filename": None}).encode())
    finally:
        os._exit(127)


def take_terminal() -> None:
    """Take a process group of one's own, and the terminal, which is the standard input, for that.

    The owner's group has no number in a PID namespace of commands, and a shell that ends gives the terminal back to
    the group that it has found there.
    """
    with suppress(OSError):  # a session's leader has both; the terminal may have hung up
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpgrp())


def kill_tree(root: int) -> bool:
    """Send SIGKILL to a child of the agent and everything below it.  Return whether any of them may be killed.

    Each is stopped before its children are listed, so that it makes no more.
    """
    tree = [root]
    for pid in tree:
        try:
            os.kill(pid, signal.SIGSTOP)
        except OSError:
            continue
        tree += children_of(pid)
    killed = False
    for pid in tree:
        try:
            os.kill(pid, signal.SIGKILL)
            killed = True
        except OSError:
            pass
    return killed


class RunningCommand:
    """A child and the conversation about it.

    Until its exec has happened or failed there are `report`, a socket whose other end exec closes, and a pidfd to
    hand out.  `had` are the signals that came to the agent's process group, if the command had them by that, and
    when.  `leads`: it was given a group of its own, which gets all that comes to the agent's.  `files` are the paths
    that it is shown, `shown` a mount for each to use when it has to be shown again, `mounts` its mount namespace.
    """

    __slots__ = (
        "conversation", "files", "follows", "had", "is_being_shown", "leads", "looks_again", "mounts", "pid",
        "pidfd", "report", "shown", "stop", "told", "writers",
    )  # fmt: skip

    def __init__(
        self,
        pid: int,
        conversation: socket.socket,
        report: socket.socket,
        files: Sequence[str],
        *,
        leads: bool,
    ) -> None:
        self.pid = pid
        self.leads = leads
        self.pidfd = os.pidfd_open(pid)
        self.conversation = conversation
        self.report: socket.socket | None = report
        self.files = files
        self.shown: dict[str, int] = {}
        self.writers: dict[str, int] = {}  # of the files whose text changes
        self.is_being_shown = False  # a child is at it
        self.looks_again = False  # another child is to look after that one
        self.mounts = -1
        self.had: dict[int, list[float]] = {}
        self.stop = 0  # the signal that has stopped it, 0 while it runs
        self.follows = False  # the client wants to know
        self.told = False  # it has been told, and not been heard since: it has stopped itself

    def take(self, paths: Sequence[str], fds: list[int], live: Sequence[str] = ()) -> None:
        """Own the descriptors that `hand_over` has passed for these paths; the first time the namespace comes too.

        If the agent had no room for all of them they are closed, and the files are not shown again.
        """
        if len(fds) != len(paths) + len(live) + (self.mounts < 0):
            for fd in fds:
                os.close(fd)
            return
        if self.mounts < 0:
            self.mounts = fds.pop(0)
        for path, fd in zip(paths, fds, strict=False):
            if path in self.shown:
                os.close(self.shown[path])
            self.shown[path] = fd
        self.writers.update(zip(live, fds[len(paths) :], strict=True))

    def rewrite(self, files: dict[str, str]) -> None:
        """Change the text of those of its files that were given so."""
        for path in self.writers.keys() & files.keys():
            data = to_bytes(files[path])
            with suppress(OSError):  # there is no memory
                os.pwrite(self.writers[path], data, 0)
                os.ftruncate(self.writers[path], len(data))

    def close(self) -> None:
        self.conversation.close()
        for fd in (self.mounts, *self.shown.values(), *self.writers.values()):
            if fd >= 0:
                os.close(fd)

    def note(self, number: int) -> None:
        """Note a signal that has come to the agent's process group, if the command is in it."""
        if self.has_own_group or os.getpgid(self.pid) == os.getpgrp():
            times = self.had.setdefault(number, [])
            times.append(time.monotonic())
            del times[:-PENDING_MAX]

    @property
    def has_own_group(self) -> bool:
        """Whether the command is still in the process group that it was given."""
        return self.leads and os.getpgid(self.pid) == self.pid

    def pass_on(self, number: int) -> None:
        """Send the command a signal that the client has received, unless it came to the command with its group.

        To a group of its own goes what came to the agent's group.
        """
        had = self.has_had(number)
        with suppress(OSError):  # it may not be signalled any more, or that is no signal
            if not self.has_own_group:
                if not had:
                    os.kill(self.pid, number)
            elif number != signal.SIGCONT:
                (os.killpg if had else os.kill)(self.pid, number)
            elif not self.has_had(ECHO):
                self.told = False  # the client goes on already
                os.killpg(self.pid, number)  # a terminal has stopped all of the group

    def has_had(self, number: int) -> bool:
        """Whether a signal that is passed on came to the command with its group; true once for each that did."""
        times = self.had.get(number, [])
        if number not in STOPPING:
            now = time.monotonic()
            times[:] = [since for since in times if now - since < PASSED_ON_WITHIN]
        return bool(times and times.pop(0))
