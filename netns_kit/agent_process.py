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
from pathlib import Path
from typing import Any, Protocol

import anyio
import anyio.lowlevel
import anyio.to_thread

from netns_kit import diagnosis
from netns_kit.errors import NamespaceGone, NotPrivileged
from netns_kit.idmap import map_ranges
from netns_kit.inotify import Watch

__all__ = ["AgentProcess", "Asker", "Conversation", "Start"]

AGENT = Path(__file__).with_name("agent.py")
FDS_MAX = 253  # SCM_MAX_FD
ANSWER_MAX = 1 << 18
REQUEST_MAX = 32768  # a longer one travels as a memfd
FOLLOW_STOPS = 0  # to be told when the command has been stopped
STOP_SECONDS = 2.0  # how long a closed agent may take before it is killed


class Conversation:
    """One request to the agent: our end of the socket that the answers come on."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def poll(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next answer and its descriptors, which are the caller's to close; None if it is not here yet.

        Raises the OSError the agent met, or NamespaceGone if the agent has ended.
        """
        space = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
        # Fact: an end may be read though a message came just before it: Linux looks at the queue first and at the
        # other end's having gone after that.  Behind it nothing more can come, so the second reading is final.
        for _ in range(2):
            try:
                data, ancillary, _, _ = self._sock.recvmsg(ANSWER_MAX, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return None
            except ConnectionError:
                data, ancillary = b"", []
            if data:
                break
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if not data:
            raise NamespaceGone("the agent of the namespace has ended")
        answer: dict[str, Any] = json.loads(data)
        if "errno" in answer:
            raise _failure(answer)
        return answer, fds.tolist()

    async def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Wait for the next answer; raises as `poll` does.  Cancelled, it has taken nothing."""
        while (answer := self.poll()) is None:
            await anyio.wait_readable(self._sock)
        return answer

    def send(self, number: int) -> None:
        """Send the agent a signal to pass on to the command, or `FOLLOW_STOPS`."""
        with suppress(OSError):  # the agent has closed its end: the command has ended
            self._sock.send(bytes([number]), socket.MSG_NOSIGNAL)

    def give_up(self) -> None:
        """Have the agent kill the command; its status still arrives."""
        with suppress(OSError):  # the agent has closed its end: there is nothing to kill
            self._sock.shutdown(socket.SHUT_WR)

    @property
    def is_closed(self) -> bool:
        return self._sock.fileno() < 0

    def close(self) -> None:
        self._sock.close()


class Asker(Protocol):
    """What starts a conversation: the operation, descriptors that go along, arguments."""

    async def __call__(self, op: str, fds: Sequence[int] = (), /, **arguments: object) -> Conversation: ...


@dataclass(frozen=True)
class Start:
    """Where an agent goes: its mode ("create", "attach", "current"), and what that mode needs.

    `ns` is the descriptor of a network namespace, `name` what to call it in an error, `process` the pidfd of
    the process whose it is, `watch` for the path it was found at.
    """

    mode: str
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
        if self._gone is not None:
            raise NamespaceGone(self._gone, fix="use it inside its `async with` block")
        return self._popen.pid

    async def start(self, start: Start) -> None:
        """Execute the agent and wait until it is in its namespace.  Raises what keeps it; then nothing is
        left.
        """
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
            order = json.dumps({"mode": start.mode, "ids": start.ids, "fd": fds[-1]})
            try:
                self._control.setblocking(False)
                with _signals_blocked():
                    self._popen = subprocess.Popen(  # noqa: ASYNC220 - in the calling thread by design
                        [sys.executable, "-S", "-E", "-I", str(AGENT), *map(str, fds[:2]), order],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=None if is_inherited(2) else subprocess.DEVNULL,
                        pass_fds=fds,
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
            message = json.loads(data)
            if message["state"] == "ready":
                return
            if message["state"] == "failed":
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
        return Conversation(ours)

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


def _failure(answer: Mapping[str, Any]) -> OSError:
    """What a request has met, by the agent's record of it."""
    number, filename = answer["errno"], answer["filename"]
    if answer["op"] == "mount" and number in diagnosis.DENIED | diagnosis.EXHAUSTED:
        return diagnosis.user_namespace(number, "mount")
    return OSError(number, answer["message"], *([] if filename is None else [filename]))


def _start_error(start: Start, message: Mapping[str, Any]) -> Exception:
    number, step = message["errno"], message["op"]
    if start.mode == "create":
        return diagnosis.user_namespace(number, step, filtered=message["filtered"])
    if number in {errno.EPERM, errno.EACCES}:
        return NotPrivileged(
            f"may not join the network namespace {start.name} ({step}: {message['message']})",
            fix="be root, or the user who made the user namespace that owns it",
            errno=number,
        )
    if step == "inspect":
        return OSError(errno.EINVAL, "not a network namespace", start.name)
    return OSError(number, f"{step}: {message['message']}", start.name)
