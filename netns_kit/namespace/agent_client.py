"""The owner's side of a namespace's agent: what it says, checked, and how it starts and ends.

`AgentProcess` starts the agent, opens conversations with it and ends it.  agent.py has the protocol.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_type_hints

import anyio
import anyio.to_thread

from netns_kit.child.channel import RECORD, Channel, send_record
from netns_kit.child.child import Child
from netns_kit.child.codec import DecodeError, decode, load, printable
from netns_kit.errors import FeatureUnavailable, IdMapError, NamespaceGone, NotPrivileged
from netns_kit.frozen import frozen
from netns_kit.host import diagnosis

from .agent_common import IN_MEMFD
from .idmap import map_ranges
from .process_info import ProcessInfo
from .watch import Watch

__all__ = ["AgentProcess", "Conversation", "Done", "Start", "StartConversation"]

T = TypeVar("T")

STATUS_MAX = 0xFFFF
ENDED = -1  # the pid of a process that was waited for, in /proc/PID/fdinfo
NAME_MAX, COMMAND_MAX = 64, 256  # characters of `ProcessInfo`
SHOWN = 80  # characters of what was not understood


@frozen
class Failed:
    """An OSError that the agent has met in the operation or step `op`."""

    errno: int
    op: str
    message: str
    filename: str | None


@frozen
class NotStarted:
    """What has kept the agent from its namespace, as in `Failed`.  `filtered`: it is a seccomp filter."""

    errno: int
    op: str
    message: str
    filename: str | None
    state: Literal["failed"]
    filtered: bool


@frozen
class Unmapped:
    """The agent is in a new user namespace, and waits for the owner to map its ids."""

    state: Literal["map"]


@frozen
class Ready:
    """The agent is in its namespace: its process id and that of the holder (see agent.py), as the host counts."""

    state: Literal["ready"]
    agent: int
    holder: int


@frozen
class Found:
    """The process that has a flow, whose pidfd comes along."""

    uid: int
    inner_pid: int
    name: str
    command: str


@frozen
class Unknown:
    """The process that has a flow is not known."""

    unknown: Literal[True]


@frozen
class Done:
    """The operation has succeeded, without a result."""


@frozen
class Started:
    """A command runs."""

    pid: int


@frozen
class Unexecuted:
    """A command could not be executed, with this errno; for want of its interpreter, if that is named."""

    unexecuted: int
    interpreter: str | None


@frozen
class Stopped:
    """A signal has stopped a command."""

    stopped: int


@frozen
class Ended:
    """A command has ended with this status of wait(2)."""

    status: int


class Conversation:
    """One request to the agent: our end of the socket that the answers come on.

    Commands run beside the agent, so its answers are not trusted: each is parsed by type (`parse`), its descriptors
    are counted, and what is wrong ends the agent (`AgentProcess.betrayed`).
    """

    def __init__(self, sock: socket.socket, agent: AgentProcess) -> None:
        self._channel = Channel(sock)
        self._agent = agent

    def poll(self, kind: type[T], count: int = 0) -> tuple[T, list[int]] | None:
        """Take the next answer, a `kind` with `count` descriptors, which are the caller's to close.

        Return None if it is not here yet.

        Raises:
            OSError: The agent has met it.
            NamespaceGone: The agent has ended, or the answer is another.
        """
        return self._poll((kind,), count)

    def _poll(self, kinds: tuple[type[Any], ...], count: int) -> tuple[Any, list[int]] | None:
        """Take an answer of one of several kinds, the first of which comes with the descriptors."""
        try:
            received = self._channel.receive_with(count)
        except ValueError as exc:
            raise self.betrayed(str(exc)) from exc
        if received is None:
            if self._channel.ended:
                raise NamespaceGone("the agent of the namespace has ended")
            return None
        record, fds = received
        with ExitStack() as owned:
            for fd in fds:
                owned.callback(os.close, fd)
            try:
                answer = parse(record, *kinds, Failed)
            except DecodeError as exc:
                raise self.betrayed(str(exc)) from exc
            if isinstance(answer, Failed):
                raise _failure(answer)
            if len(fds) != (count if isinstance(answer, kinds[0]) else 0):
                raise self.betrayed("descriptors that were not to come")
            owned.pop_all()
        return answer, fds

    async def receive(self, kind: type[T], count: int = 0) -> tuple[T, list[int]]:
        """Wait for the next answer.  Raises as `poll` does.  Cancelled, it has taken nothing."""
        return await self._receive((kind,), count)

    async def _receive(self, kinds: tuple[type[Any], ...], count: int) -> tuple[Any, list[int]]:
        while (answer := self._poll(kinds, count)) is None:
            await anyio.wait_readable(self._channel)
        return answer

    def send(self, number: int) -> None:
        """Send the agent a signal to pass on to the command, or `FOLLOW_STOPS`."""
        with suppress(OSError):  # the agent has closed its end: the command has ended
            send_record(self._channel.socket, bytes([number]))

    async def started(self, program: object) -> tuple[int, int]:
        """Wait until the command that was asked for runs.

        Return its pid, as the host counts, and a pidfd, which is the caller's to close.  Raises as `receive` does,
        and the OSError of executing `program`.
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
        except DecodeError as exc:
            os.close(pidfd)
            raise self.betrayed(str(exc)) from exc

    async def process(self) -> ProcessInfo | None:
        """Wait for what is known of the process that was asked for.  Raises as `receive` does."""
        answer, fds = await self._receive((Found, Unknown), 1)
        if isinstance(answer, Unknown):
            return None
        (pidfd,) = fds
        try:
            pid: int | None = _pid_of(pidfd)
        except DecodeError:  # it cannot be seen here
            pid = None
        finally:
            os.close(pidfd)
        name, command = (
            printable(text[:most]).replace("\n", "\N{REPLACEMENT CHARACTER}")
            for text, most in ((answer.name, NAME_MAX), (answer.command, COMMAND_MAX))
        )
        return ProcessInfo(None if pid == ENDED else pid, answer.inner_pid, answer.uid, name, command)

    def news(self) -> Stopped | Ended | None:
        """Take the next news of the command that has started, if there is any.  Raises as `poll` does."""
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
        """Return the error for what the agent has said, as `AgentProcess.betrayed` does."""
        return self._agent.betrayed(why)

    def give_up(self) -> None:
        """Tell the agent to kill the command.  Its status still arrives."""
        with suppress(OSError):  # the agent has closed its end: there is nothing to kill
            self._channel.socket.shutdown(socket.SHUT_WR)

    @property
    def is_closed(self) -> bool:
        return self._channel.fileno() < 0

    def close(self) -> None:
        """Close our end.  Whoever waits for an answer gets ClosedResourceError."""
        if not self.is_closed:
            with suppress(RuntimeError):  # no event loop runs, so nobody waits
                anyio.notify_closing(self._channel)
            self._channel.close()


def _is_status(number: int) -> bool:
    """Whether a process may have ended with that status of wait(2)."""
    return 0 <= number <= STATUS_MAX and (os.WIFEXITED(number) or os.WIFSIGNALED(number))


def parse(record: bytes, *kinds: Any) -> Any:
    """Read a record of the agent's: its keys are the fields of one of `kinds`, which are records.

    Raises `DecodeError`, and nothing else, whatever the record is.
    """
    message = load(dict[str, Any], record)
    for kind in kinds:
        types: dict[str, Any] = _types(kind)
        if message.keys() == types.keys():
            return kind(**{name: decode(types[name], message[name]) for name in types})
    raise DecodeError(f"{printable(repr(sorted(message)))[:SHOWN]} are no keys of an answer")


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _child_of(parent: int, pidfd: int, told: int) -> int:
    """Return the pid of the process of `pidfd`, a child of `parent`; `told` if it has ended and has no pid any more.

    Raises `DecodeError` for any other process: a false agent could direct our signals at it.
    """
    pid = _pid_of(pidfd)
    if pid != ENDED and _parent_of(pid) != parent and _pid_of(pidfd) != ENDED:
        raise DecodeError(f"process {pid} is no child of the agent's")
    return told if pid == ENDED else pid


def _pid_of(pidfd: int) -> int:
    """Return the pid of the process of a pidfd, as this process counts, or `ENDED` if it was waited for.

    Raises `DecodeError` if it is no pidfd, or of a process that cannot be seen here.
    """
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "Pid" and int(value) != 0:
            return int(value)
    raise DecodeError("a descriptor that is no pidfd")


def _parent_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat[stat.rindex(b")") + 2 :].split()[1])


class StartConversation(Protocol):
    """A function that sends the agent a request: the operation, descriptors that go along, arguments."""

    async def __call__(self, op: str, fds: Sequence[int] = (), /, **arguments: object) -> Conversation: ...


@frozen
class Start:
    """The namespace that an agent enters: the mode ("create", "attach", "current"), and what that mode needs.

    `ns` is the descriptor of a network namespace, `name` its name in errors, `process` a pidfd of the process that it
    was found by, `watch` for the path that it was found at.  `pids`: whose PID namespace commands are in, "own" or
    "host"; None is "own" where that can be had.
    """

    mode: str
    pids: Literal["own", "host"] | None = "host"
    ids: str = ""
    ns: int | None = None
    name: str = ""
    process: int | None = None
    watch: Watch | None = None


class AgentProcess:
    """The agent of one namespace, for its owner."""

    _child: Child
    _started = False

    def __init__(self) -> None:
        self._gone: str | None = "the namespace is not open"

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
        """Execute the agent and wait until it is in its namespace.

        Raises:
            FeatureUnavailable, UserNamespaceDenied, NotPrivileged, IdMapError, NamespaceGone, OSError: What has kept
                it from there.

        Cancellation:
            It leaves nothing, as an error does.
        """
        if start.pids is None:
            with suppress(FeatureUnavailable):  # for another reason it is raised again
                await self._start(start, "own")
                return
        await self._start(start, start.pids or "host")

    async def _start(self, start: Start, pids: Literal["own", "host"]) -> None:
        self._pids = pids
        self._child = Child(f"{__package__}.agent", () if start.ns is None else (start.ns,))
        self._started = True
        try:
            order = {"mode": start.mode, "ids": start.ids, "pids": pids}
            self._child.channel.send(json.dumps(order).encode())
            await self._until_ready(self._child, start)
        except BaseException:
            await self.stop()
            raise
        self._gone = None

    async def _until_ready(self, child: Child, start: Start) -> None:
        while True:
            await anyio.wait_readable(child.channel)
            try:
                data = child.channel.receive()
                if data is None:
                    if child.channel.ended:
                        raise await self._end_before_ready(child)
                    continue
                message: Ready | NotStarted | Unmapped = parse(data, Ready, NotStarted, Unmapped)
            except ValueError as exc:  # `DecodeError` is one
                raise self.betrayed(str(exc)) from exc
            if isinstance(message, Ready):
                self._ready = message
                return
            if isinstance(message, NotStarted):
                raise _start_error(start, message)
            await anyio.to_thread.run_sync(map_ranges, child.pid)
            child.channel.send(b"mapped")

    async def _end_before_ready(self, child: Child) -> Exception:
        await child.ended()
        if child.wait() == -signal.SIGSYS:
            return diagnosis.user_namespace(errno.EPERM, "unshare user", filtered=True)
        return NamespaceGone("the agent ended before it was ready")

    async def watch(self) -> None:
        """Wait for the agent's end and raise NamespaceGone."""
        await self._child.ended()
        raise self.lost("the agent of the namespace has ended")

    def lost(self, why: str) -> NamespaceGone:
        """Return the error for every conversation from now on."""
        self._gone = self._gone or why
        return NamespaceGone(self._gone)

    def betrayed(self, why: str) -> NamespaceGone:
        """Kill an agent that says what no agent says: somebody may speak in its place.  Return the error."""
        self._child.kill()
        return self.lost(f"the agent of the namespace says what makes no sense: {why}")

    async def converse(self, op: str, fds: Sequence[int], arguments: Mapping[str, object]) -> Conversation:
        """Send one request.

        Raises:
            NamespaceGone: There is no agent.

        Cancellation:
            The request may or may not have been sent.
        """
        if self._gone:
            raise NamespaceGone(self._gone)
        record = json.dumps({"op": op, **arguments}).encode()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, ExitStack() as stack:
                rights = [theirs.fileno(), *fds]
                if len(record) >= RECORD:
                    memory = os.memfd_create("request")
                    stack.callback(os.close, memory)
                    os.write(memory, record)
                    rights.append(memory)
                    record = IN_MEMFD
                await self._send(record, rights)
        except BaseException as exc:
            ours.close()
            if isinstance(exc, ConnectionError):
                raise self.lost("the agent of the namespace has ended") from exc
            raise
        return Conversation(ours, self)

    async def _send(self, record: bytes, fds: Sequence[int]) -> None:
        control = self._child.channel.socket
        while True:
            try:
                send_record(control, record, fds)
                return
            except (
                BlockingIOError
            ):  # the queue is full; many may wait for it, each on a descriptor of its own
                with control.dup() as queue:
                    await anyio.wait_writable(queue)
            if self._gone:
                raise NamespaceGone(self._gone)

    def hang_up(self) -> None:
        """Have the agent end, and all that it has started."""
        self._child.channel.shutdown()

    async def stop(self) -> None:
        """End the agent and all that it has started, and wait for it, even if cancelled.  Again is fine."""
        self._gone = self._gone or "the namespace has been closed"
        if self._started:
            with anyio.CancelScope(shield=True):
                await self._child.stop()
            self._child.close()
            self._started = False


def _failure(answer: Failed) -> OSError:
    """Return the error that a request has met, by the agent's record of it."""
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
