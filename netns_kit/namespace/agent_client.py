"""Our side of a namespace's agent, whose own text (agent.py) gives the protocol.

`AgentProcess` starts the agent, opens conversations with it and ends it.  The agent is started by a plain exec in the
calling thread and is ready when it says so.
"""

from __future__ import annotations

import array
import errno
import fcntl
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_type_hints

import anyio
import anyio.lowlevel
import anyio.to_thread

from netns_kit.child.codec import Nonsense, decode, load, printable
from netns_kit.errors import FeatureUnavailable, IdMapError, NamespaceGone, NotPrivileged
from netns_kit.host import diagnosis
from netns_kit.host.environment import child_environment

from .idmap import map_ranges
from .watch import Watch

__all__ = ["AgentProcess", "Asker", "Conversation", "Done", "Start"]

T = TypeVar("T")

PACKAGE = Path(__file__).parents[1]
BOOT = """\
import sys
package = sys.modules["netns_kit"] = type(sys)("netns_kit")
package.__path__ = [sys.argv[4]]
from netns_kit.namespace.agent import main
main()
"""
"""What starts the agent.  A script would be compiled each time, a module is once: that is a quarter of the start."""
FDS_MAX = 253  # SCM_MAX_FD
ANSWER_MAX = 1 << 18
STATUS_MAX = 0xFFFF
ENDED = -1  # the pid of a process that was waited for, in /proc/PID/fdinfo
SHOWN = 80  # characters of what was not understood
REQUEST_MAX = 32768  # a longer one travels as a memfd
FOLLOW_STOPS = 0  # to be told when the command has been stopped
STOP_SECONDS = 2.0  # how long a closed agent may take before it is killed
_FD = array.array("i")


@dataclass(frozen=True)
class Failed:
    """An OSError that the agent has met in the operation or step `op`."""

    errno: int
    op: str
    message: str
    filename: str | None


@dataclass(frozen=True)
class NotStarted(Failed):
    """What has kept the agent from its namespace.  `filtered`: a seccomp filter has."""

    state: Literal["failed"]
    filtered: bool


@dataclass(frozen=True)
class Unmapped:
    """The agent is in a new user namespace, whose ids are to be mapped."""

    state: Literal["map"]


@dataclass(frozen=True)
class Ready:
    """The agent is in its namespace; its process id and that of the holder (see agent.py), as the host counts."""

    state: Literal["ready"]
    agent: int
    holder: int


@dataclass(frozen=True)
class Done:
    """The operation succeeded, and there is nothing to say of it."""


@dataclass(frozen=True)
class Started:
    """A command runs."""

    pid: int


@dataclass(frozen=True)
class Unexecuted:
    """A command could not be executed, with this errno; for want of its interpreter, if that is named."""

    unexecuted: int
    interpreter: str | None


@dataclass(frozen=True)
class Stopped:
    """A signal has stopped a command."""

    stopped: int


@dataclass(frozen=True)
class Ended:
    """A command has ended with this status of wait(2)."""

    status: int


class Conversation:
    """One request to the agent: our end of the socket that the answers come on.

    What comes is not believed to be what was to come, for commands run beside the agent: it is `parse`d, its
    descriptors are counted, and where it is wrong `AgentProcess.betrayed` has the error.
    """

    def __init__(self, sock: socket.socket, agent: AgentProcess) -> None:
        self._sock = sock
        self._agent = agent

    def poll(self, kind: type[T], count: int = 0) -> tuple[T, list[int]] | None:
        """Take the next answer, a `kind` with `count` descriptors, which are the caller's to close; None if it is not
        here yet.

        Raises the OSError the agent met, or NamespaceGone if the agent has ended or the answer is another.
        """
        return self._poll((kind,), count)

    def _poll(self, kinds: tuple[type[Any], ...], count: int) -> tuple[Any, list[int]] | None:
        """The same of one of several kinds, the first of which comes with the descriptors."""
        space = socket.CMSG_SPACE(count * _FD.itemsize)
        # Fact: an end may be read though a message came just before it: Linux looks at the queue first and at the
        # other end's having gone after that.  Behind it nothing more can come, so the second reading is final.
        for _ in range(2):
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(ANSWER_MAX, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return None
            except ConnectionError:
                data, ancillary, flags = b"", [], 0
            if data:
                break
        with ExitStack() as owned:
            fds = array.array("i")
            for level, what, payload in ancillary:
                if (level, what) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
            for fd in fds:
                owned.callback(os.close, fd)
            if not data:
                raise NamespaceGone("the agent of the namespace has ended")
            try:
                answer = parse(data, *kinds, Failed)
            except Nonsense as exc:
                raise self.betrayed(str(exc)) from exc
            if isinstance(answer, Failed):
                raise _failure(answer)
            if len(fds) != (count if isinstance(answer, kinds[0]) else 0) or flags & (
                socket.MSG_TRUNC | socket.MSG_CTRUNC
            ):
                raise self.betrayed("descriptors that were not to come")
            owned.pop_all()
        return answer, fds.tolist()

    async def receive(self, kind: type[T], count: int = 0) -> tuple[T, list[int]]:
        """Wait for the next answer; raises as `poll` does.  Cancelled, it has taken nothing."""
        return await self._receive((kind,), count)

    async def _receive(self, kinds: tuple[type[Any], ...], count: int) -> tuple[Any, list[int]]:
        while (answer := self._poll(kinds, count)) is None:
            await anyio.wait_readable(self._sock)
        return answer

    def send(self, number: int) -> None:
        """Send the agent a signal to pass on to the command, or `FOLLOW_STOPS`."""
        with suppress(OSError):  # the agent has closed its end: the command has ended
            self._sock.send(bytes([number]), socket.MSG_NOSIGNAL)

    async def started(self, program: object) -> tuple[int, int]:
        """Wait until the command that was asked for runs: its pid as the host counts, and a pidfd, the caller's to
        close.  Raises as `receive` does, and the OSError of executing `program`.
        """
        answer, fds = await self._receive((Started, Unexecuted), 1)
        if isinstance(answer, Unexecuted):
            said = os.strerror(answer.unexecuted)
            if answer.interpreter is not None:
                said = f"its interpreter {printable(repr(answer.interpreter[:SHOWN]))}: {said}"
            raise OSError(answer.unexecuted, said, program)
        (pidfd,) = fds
        try:
            return _child_of(self._agent.pid, pidfd, answer.pid), pidfd
        except Nonsense as exc:
            os.close(pidfd)
            raise self.betrayed(str(exc)) from exc

    def news(self) -> Stopped | Ended | None:
        """What has become of the command that has started, if anything.  Raises as `poll` does."""
        received = self._poll((Ended, Stopped), 0)
        return None if received is None else self._checked(received[0])

    async def wait_news(self) -> Stopped | Ended:
        """Wait until the command has ended or been stopped.  Raises as `receive` does."""
        answer, _ = await self._receive((Ended, Stopped), 0)
        return self._checked(answer)

    def _checked(self, news: Stopped | Ended) -> Stopped | Ended:
        if isinstance(news, Ended) and not _is_status(news.status):
            raise self.betrayed(f"{news.status} is no status of wait(2)")
        return news

    def betrayed(self, why: str) -> NamespaceGone:
        """The error for what the agent has said: see `AgentProcess.betrayed`."""
        return self._agent.betrayed(why)

    def give_up(self) -> None:
        """Have the agent kill the command; its status still arrives."""
        with suppress(OSError):  # the agent has closed its end: there is nothing to kill
            self._sock.shutdown(socket.SHUT_WR)

    @property
    def is_closed(self) -> bool:
        return self._sock.fileno() < 0

    def close(self) -> None:
        """Close our end.  Whoever waits for an answer gets ClosedResourceError."""
        if not self.is_closed:
            with suppress(RuntimeError):  # no event loop runs, so nobody waits
                anyio.notify_closing(self._sock)
            self._sock.close()


def _is_status(number: int) -> bool:
    """Whether a process may have ended with that."""
    return 0 <= number <= STATUS_MAX and (os.WIFEXITED(number) or os.WIFSIGNALED(number))


def parse(record: bytes, *kinds: Any) -> Any:
    """Read what the agent says: a record whose keys are the fields of one of `kinds`, which are dataclasses.

    Raises `Nonsense`, and nothing else, whatever the record is.
    """
    message = load(dict[str, Any], record)
    for kind in kinds:
        types: dict[str, Any] = _types(kind)
        if message.keys() == types.keys():
            return kind(**{name: decode(types[name], message[name]) for name in types})
    raise Nonsense(f"{printable(repr(sorted(message)))[:SHOWN]} are no keys of an answer")


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _child_of(parent: int, pidfd: int, told: int) -> int:
    """The pid of what `pidfd` is of, a child of `parent`'s; what was `told` if it has ended and has none any more.

    Raises `Nonsense` for anything else, so that no signal of ours goes where the agent, or who took its place, would
    like it to go.
    """
    pid = _pid_of(pidfd)
    if pid != ENDED and _parent_of(pid) != parent and _pid_of(pidfd) != ENDED:
        raise Nonsense(f"process {pid} is no child of the agent's")
    return told if pid == ENDED else pid


def _pid_of(pidfd: int) -> int:
    """The process of a pidfd, as we count: `ENDED` if it was waited for already.  Raises `Nonsense` for what is no
    pidfd of a process that we can see.
    """
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "Pid" and int(value) != 0:
            return int(value)
    raise Nonsense("a descriptor that is no pidfd")


def _parent_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat[stat.rindex(b")") + 2 :].split()[1])


class Asker(Protocol):
    """What starts a conversation: the operation, descriptors that go along, arguments."""

    async def __call__(self, op: str, fds: Sequence[int] = (), /, **arguments: object) -> Conversation: ...


@dataclass(frozen=True)
class Start:
    """Where an agent goes: its mode ("create", "attach", "current"), and what that mode needs.

    `ns` is the descriptor of a network namespace, `name` what to call it in an error, `process` the pidfd of
    the process whose it is, `watch` for the path it was found at.  `pids`: whose PID namespace commands are in, "own"
    or "host"; None is "own" where that can be had.
    """

    mode: str
    pids: Literal["own", "host"] | None = "host"
    ids: str = ""
    ns: int | None = None
    name: str = ""
    process: int | None = None
    watch: Watch | None = None


class AgentProcess:
    """The agent of one namespace, seen from its owner."""

    def __init__(self) -> None:
        self._gone: str | None = "the namespace is not open"
        self._started = False

    @property
    def pid(self) -> int:
        """Process id of the agent, as the host counts.  Raises NamespaceGone while there is none."""
        return self._present().agent

    @property
    def holder(self) -> int:
        """Process id of the holder (see agent.py), as the host counts.  Raises NamespaceGone while there is none."""
        return self._present().holder

    @property
    def pids(self) -> Literal["own", "host"]:
        """Whose PID namespace commands are in.  Raises NamespaceGone while there is none."""
        self._present()
        return self._pids

    def _present(self) -> Ready:
        if self._gone is not None:
            raise NamespaceGone(self._gone, fix="use it inside its `async with` block")
        return self._ready

    async def start(self, start: Start) -> None:
        """Execute the agent and wait until it is in its namespace.  Raises what keeps it; then nothing is
        left.
        """
        if start.pids is None:
            with suppress(FeatureUnavailable):  # what else it is raised for comes again
                await self._start(start, "own")
                return
        await self._start(start, start.pids or "host")

    async def _start(self, start: Start, pids: Literal["own", "host"]) -> None:
        self._pids = pids
        with ExitStack() as passed:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            passed.callback(theirs.close)
            try:
                owner = os.pidfd_open(os.getpid())
            except OSError as exc:
                self._control.close()
                raise diagnosis.feature("pidfds", exc, "5.3", "pidfd_open") from exc
            passed.callback(os.close, owner)
            given = [theirs.fileno(), owner] + ([] if start.ns is None else [start.ns])
            fds = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in given]  # 0 to 2 are free in a daemon
            for fd in fds:
                passed.callback(os.close, fd)
            order = json.dumps({"mode": start.mode, "ids": start.ids, "pids": pids, "fd": fds[-1]})
            try:
                self._control.setblocking(False)
                with _signals_blocked():
                    self._popen = subprocess.Popen(  # noqa: ASYNC220 - in the calling thread by design
                        [
                            sys.executable,
                            "-S",
                            "-E",
                            "-I",
                            "-c",
                            BOOT,
                            *map(str, fds[:2]),
                            order,
                            str(PACKAGE),
                        ],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=None if is_inherited(2) else subprocess.DEVNULL,
                        pass_fds=fds,
                        env=child_environment(),
                    )
                self._pidfd = io.FileIO(os.pidfd_open(self._popen.pid))
                self._started = True
            except BaseException:
                self._control.close()
                raise
        try:
            await self._until_ready(start)
        except BaseException:
            await self.stop()
            raise
        self._gone = None

    async def _until_ready(self, start: Start) -> None:
        while True:
            await anyio.wait_readable(self._control)
            try:
                data = self._control.recv(ANSWER_MAX)
            except ConnectionError:
                data = b""
            if not data:
                raise await self._end_before_ready()
            try:
                message: Ready | NotStarted | Unmapped = parse(data, Ready, NotStarted, Unmapped)
            except Nonsense as exc:
                raise self.betrayed(str(exc)) from exc
            if isinstance(message, Ready):
                self._ready = message
                return
            if isinstance(message, NotStarted):
                raise _start_error(start, message)
            await anyio.to_thread.run_sync(map_ranges, self._popen.pid)
            self._control.send(b"mapped")

    async def _end_before_ready(self) -> Exception:
        await anyio.wait_readable(self._pidfd)
        if self._popen.wait() == -signal.SIGSYS:
            return diagnosis.user_namespace(errno.EPERM, "unshare user", filtered=True)
        return NamespaceGone("the agent ended before it was ready")

    async def watch(self) -> None:
        """Wait for the agent's end and raise NamespaceGone."""
        await anyio.wait_readable(self._pidfd)
        raise self.lost("the agent of the namespace has ended")

    def lost(self, why: str) -> NamespaceGone:
        """The error for now, and for every conversation from now on."""
        self._gone = self._gone or why
        return NamespaceGone(self._gone)

    def betrayed(self, why: str) -> NamespaceGone:
        """The error for an agent that says what an agent does not say.  It is killed: somebody else speaks by it."""
        self._popen.kill()
        return self.lost(f"the agent of the namespace says what makes no sense: {why}")

    async def converse(self, op: str, fds: Sequence[int], arguments: Mapping[str, object]) -> Conversation:
        """Send one request.  Raises NamespaceGone; cancelled, it may or may not have been sent."""
        if self._gone:
            raise NamespaceGone(self._gone)
        record = json.dumps({"op": op, **arguments}).encode()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs, ExitStack() as stack:
                rights = [theirs.fileno(), *fds]
                if len(record) > REQUEST_MAX:
                    memory = os.memfd_create("request")
                    stack.callback(os.close, memory)
                    os.write(memory, record)
                    rights.append(memory)
                    record = b"@"
                await self._send(record, array.array("i", rights))
        except BaseException as exc:
            ours.close()
            if isinstance(exc, ConnectionError):
                raise self.lost("the agent of the namespace has ended") from exc
            raise
        return Conversation(ours, self)

    async def _send(self, record: bytes, rights: array.array[int]) -> None:
        while True:
            try:
                self._control.sendmsg(
                    [record], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_NOSIGNAL
                )
                return
            except (
                BlockingIOError
            ):  # the queue is full; many may wait for it, each on a descriptor of his own
                with self._control.dup() as queue:
                    await anyio.wait_writable(queue)
            if self._gone:
                raise NamespaceGone(self._gone)

    def hang_up(self) -> None:
        """Have the agent end, and all that it started."""
        with suppress(OSError):  # closed already
            self._control.shutdown(socket.SHUT_RDWR)  # a fork of ours may hold a copy

    async def stop(self) -> None:
        """End the agent and all that it started, and wait for it, even if cancelled.  Again is fine."""
        self._gone = self._gone or "the namespace has been closed"
        if not self._started:
            return
        with anyio.CancelScope(shield=True):
            self.hang_up()
            self._control.close()
            self._popen.send_signal(signal.SIGCONT)  # somebody may have stopped it
            with anyio.move_on_after(STOP_SECONDS) as patience:
                await anyio.wait_readable(self._pidfd)
            if patience.cancelled_caught:
                self._popen.kill()
                await anyio.wait_readable(self._pidfd)
            self._popen.wait()  # at once: it has ended
            self._pidfd.close()
            self._started = False


def is_inherited(fd: int) -> bool:
    """Whether a child is to have this standard stream of ours: not a closed one, nor a number that went to something
    private (a daemon's event loop).
    """
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A child that is started has them blocked from its first instruction on: none ends it before it has its way."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _failure(answer: Failed) -> OSError:
    """What a request has met, by the agent's record of it."""
    if answer.op == "mount" and answer.errno in diagnosis.DENIED | diagnosis.EXHAUSTED:
        return diagnosis.user_namespace(answer.errno, "mount")
    place = [] if answer.filename is None else [answer.filename]
    return OSError(answer.errno, printable(answer.message), *place)


def _start_error(start: Start, failed: NotStarted) -> Exception:
    number, step = failed.errno, failed.op
    if step in diagnosis.PID_STEPS:
        return diagnosis.pid_namespace(number, step, filtered=failed.filtered)
    if start.mode == "create":
        return diagnosis.user_namespace(number, step, filtered=failed.filtered)
    if step == "identity":
        return IdMapError(
            f"may run nothing in the network namespace {start.name}: {failed.message}",
            fix="be the user who made the user namespace that owns it, or have its owner mapped there",
            errno=number,
        )
    if number in {errno.EPERM, errno.EACCES}:
        return NotPrivileged(
            f"may not join the network namespace {start.name} ({step}: {failed.message})",
            fix="be root, or the user who made the user namespace that owns it",
            errno=number,
        )
    if step == "inspect":
        return OSError(errno.EINVAL, "not a network namespace", start.name)
    return OSError(number, f"{step}: {failed.message}", start.name)
