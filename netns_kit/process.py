"""The processes in a namespace: its agent, and the commands the agent runs.

`AgentProcess` is our side of agent.py, whose text gives the protocol: it starts the agent, opens
conversations with it and ends it.  The agent is started by a plain exec in the calling thread and is ready
when it says so.

A command is the agent's child, not ours, and everything about it is a descriptor: its pipes, a pidfd to
signal it by (so a recycled pid is never hit) and the conversation on which its status comes.  Closing or
shutting down the conversation before that makes the agent kill the command with its descendants; this is how
a cancelled task takes its command along.
"""

from __future__ import annotations

import array
import errno
import fcntl
import io
import json
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM, pidfd_send_signal
from typing import IO, Any, Protocol, Union

import anyio
import anyio.abc
import anyio.lowlevel

from netns_kit.errors import IdMapError, NamespaceGone, NotPrivileged, UserNamespaceDenied

__all__ = [
    "AgentProcess",
    "Command",
    "Conversation",
    "PipeReader",
    "PipeWriter",
    "Process",
    "StandardStream",
    "Start",
    "Word",
    "open_process",
]

Word = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]
Command = Union[Word, Sequence[Word]]  # noqa: UP007 - a string cannot be joined by | before 3.14
StandardStream = Union[int, IO[Any], None]  # noqa: UP007 - the same

AGENT = Path(__file__).with_name("agent.py")
FDS_MAX = 253  # SCM_MAX_FD
ANSWER_MAX = 1 << 18
REQUEST_MAX = 32768  # a longer one travels as a memfd
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
        try:
            data, ancillary, _, _ = self._sock.recvmsg(ANSWER_MAX, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except ConnectionError:
            data, ancillary = b"", []
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if not data:
            raise NamespaceGone("the agent of the namespace has ended")
        answer: dict[str, Any] = json.loads(data)
        if "errno" in answer:
            filename = answer["filename"]
            raise OSError(answer["errno"], answer["message"], *([] if filename is None else [filename]))
        return answer, fds.tolist()

    async def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Wait for the next answer; raises as `poll` does.  Cancelled, it has taken nothing."""
        while (answer := self.poll()) is None:
            await anyio.wait_readable(self._sock)
        return answer

    def give_up(self) -> None:
        """Have the agent kill the command; its status still arrives."""
        with suppress(OSError):  # the agent has closed its end: there is nothing to kill
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._sock.close()


class Asker(Protocol):
    """What starts a conversation: the operation, descriptors that go along, arguments."""

    async def __call__(self, op: str, fds: Sequence[int] = (), /, **arguments: object) -> Conversation: ...


@dataclass(frozen=True)
class Start:
    """Where an agent goes: its mode ("create", "attach", "current"), and what that mode needs.

    `ns` is the descriptor of a network namespace, `name` what to call it in an error, `process` the pidfd of
    the process whose it is.
    """

    mode: str
    ids: str = ""
    ns: int | None = None
    name: str = ""
    process: int | None = None


class AgentProcess:
    """The agent of one namespace, seen from its owner."""

    def __init__(self) -> None:
        self._gone: str | None = "the namespace has not been entered"

    @property
    def pid(self) -> int:
        """Of the agent, as the host counts."""
        return self._popen.pid

    async def start(self, start: Start) -> None:
        """Execute the agent and wait until it is in its namespace.  Raises what keeps it; then nothing is
        left.
        """
        with ExitStack() as passed:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            passed.callback(theirs.close)
            owner = os.pidfd_open(os.getpid())
            passed.callback(os.close, owner)
            given = [theirs.fileno(), owner] + ([] if start.ns is None else [start.ns])
            fds = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in given]  # 0 to 2 are free in a daemon
            for fd in fds:
                passed.callback(os.close, fd)
            order = json.dumps({"mode": start.mode, "ids": start.ids, "fd": fds[-1]})
            try:
                self._control.setblocking(False)
                self._popen = subprocess.Popen(  # noqa: ASYNC220 - in the calling thread by design
                    [sys.executable, "-S", "-E", "-I", str(AGENT), *map(str, fds[:2]), order],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=fds,
                )
                self._pidfd = io.FileIO(os.pidfd_open(self._popen.pid))
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
                raise NamespaceGone("the agent ended before it was ready")
            message = json.loads(data)
            if message["state"] == "ready":
                return
            if message["state"] == "failed":
                raise _start_error(start, message)
            await _map_ranges(self.pid)
            self._control.send(b"mapped")

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

    async def stop(self) -> None:
        """End the agent and all that it started, and wait for it, even if cancelled."""
        self._gone = self._gone or "the namespace has been closed"
        with anyio.CancelScope(shield=True):
            with suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)  # a fork of ours may hold a copy
            self._control.close()
            with anyio.move_on_after(STOP_SECONDS) as patience:
                await anyio.wait_readable(self._pidfd)
            if patience.cancelled_caught:
                self._popen.kill()
                await anyio.wait_readable(self._pidfd)
            self._popen.wait()  # at once: it has ended
            self._pidfd.close()


def _start_error(start: Start, message: Mapping[str, Any]) -> Exception:
    number, step = message["errno"], message["op"]
    if start.mode == "create":
        if step == "loopback":
            return OSError(number, message["message"], "lo")
        return UserNamespaceDenied.diagnose(number, step)
    if number in {errno.EPERM, errno.EACCES}:
        return NotPrivileged(
            f"may not join the network namespace {start.name} ({step}: {message['message']})",
            fix="be root, or the user who made the user namespace that owns it",
            errno=number,
        )
    if step == "inspect":
        return OSError(errno.EINVAL, "not a network namespace", start.name)
    return OSError(number, f"{step}: {message['message']}", start.name)


async def _map_ranges(pid: int) -> None:
    """Give the user namespace of `pid` all the ids its owner may give away."""
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if os.geteuid() == 0:
            _map_all(pid, kind)
            continue
        words = [f"new{kind}map", str(pid), "0", str(own), "1"]
        inside = 1
        for first, count in _ranges(kind):
            words += [str(inside), str(first), str(count)]
            inside += count
        try:
            done = await anyio.run_process(words, check=False)
        except OSError as exc:
            fix = "install it: package uidmap or shadow-utils"
            raise IdMapError(f"{words[0]}: {exc.strerror}", fix=fix, errno=exc.errno) from exc
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
            fix = f"{words[0]} must be setuid root or have cap_set{kind}, and no_new_privs must not be set"
            raise IdMapError(said, fix=fix)


def _map_all(pid: int, kind: str) -> None:
    """Every id that we, being root, have ourselves."""
    held = [line.split() for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
    target = Path(f"/proc/{pid}/{kind}_map")
    try:
        target.write_text("".join(f"{first} {first} {count}\n" for first, _, count in held))
    except OSError as exc:
        fix = "keep CAP_SETUID, CAP_SETGID and CAP_SETFCAP"
        raise IdMapError(f"{target}: {exc.strerror}", fix=fix, errno=exc.errno) from exc


def _ranges(kind: str) -> list[tuple[int, int]]:
    """(first, count) of every subordinate range of the caller, see subuid(5)."""
    path = f"/etc/sub{kind}"
    uid = os.getuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    found = []
    try:
        for line in Path(path).read_text().splitlines():
            who, *numbers = line.split(":")
            if who in {user, str(uid)} and len(numbers) == 2:
                found.append((int(numbers[0]), int(numbers[1])))
    except (OSError, ValueError) as exc:
        raise IdMapError(f"{path} cannot be read: {exc}", path) from exc
    if not found:
        fix = f"usermod --add-sub{kind}s 100000-165535 {user}"
        raise IdMapError(f"{user} has no subordinate {kind}s", path, f"without a line for {user}", fix)
    return found


class _Pipe:
    """Our end of a pipe, non-blocking."""

    def __init__(self, file: io.FileIO) -> None:
        os.set_blocking(file.fileno(), False)
        self._file = file
        self._guard = anyio.ResourceGuard("using")

    async def aclose(self) -> None:
        """Close our end; whoever waits for it gets ClosedResourceError."""
        if not self._file.closed:
            anyio.notify_closing(self._file)
            self._file.close()
        await anyio.lowlevel.checkpoint()


class PipeReader(_Pipe, anyio.abc.ByteReceiveStream):
    """What the command writes to its standard output or error."""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Some bytes, or EndOfStream when all writers have closed.  Cancelled, it has taken nothing."""
        await anyio.lowlevel.checkpoint()
        with self._guard:
            while True:
                if self._file.closed:
                    raise anyio.ClosedResourceError
                if (data := self._file.read(max_bytes)) is not None:
                    break
                await anyio.wait_readable(self._file)
        if not data:
            raise anyio.EndOfStream
        return data


class PipeWriter(_Pipe, anyio.abc.ByteSendStream):
    """The command's standard input."""

    async def send(self, item: bytes) -> None:
        """Write all of it, or BrokenResourceError if nobody reads.  Cancelled, part of it may be written."""
        await anyio.lowlevel.checkpoint()
        rest = memoryview(item)
        with self._guard:
            while rest:
                if self._file.closed:
                    raise anyio.ClosedResourceError
                try:
                    written = self._file.write(rest)
                except BrokenPipeError as exc:
                    raise anyio.BrokenResourceError from exc
                if written is None:
                    await anyio.wait_writable(self._file)
                else:
                    rest = rest[written:]


class Process(anyio.abc.Process):
    """A running command, as `anyio.open_process` gives one.

    `stdin`, `stdout` and `stderr` are streams where PIPE was asked for, else None.
    """

    def __init__(
        self,
        pid: int,
        pidfd: int,
        conversation: Conversation,
        stdin: PipeWriter | None,
        stdout: PipeReader | None,
        stderr: PipeReader | None,
    ) -> None:
        self._pid = pid
        self._pidfd = io.FileIO(pidfd)
        self._conversation = conversation
        self._streams = stdin, stdout, stderr
        self._returncode: int | None = None
        self._waiting = anyio.Lock()

    @property
    def pid(self) -> int:
        """As the host counts: the command is in no pid namespace of its own."""
        return self._pid

    @property
    def returncode(self) -> int | None:
        """None while it runs, the exit status, or minus the signal that ended it."""
        if self._returncode is None and not self._pidfd.closed:
            try:
                answer = self._conversation.poll()
            except NamespaceGone:
                return None  # wait() tells
            if answer is not None:
                self._returncode = os.waitstatus_to_exitcode(answer[0]["status"])
                self._forget()
        return self._returncode

    @property
    def stdin(self) -> anyio.abc.ByteSendStream | None:
        """Its standard input, if that is a pipe."""
        return self._streams[0]

    @property
    def stdout(self) -> anyio.abc.ByteReceiveStream | None:
        """Its standard output, if that is a pipe."""
        return self._streams[1]

    @property
    def stderr(self) -> anyio.abc.ByteReceiveStream | None:
        """Its standard error, if that is a pipe."""
        return self._streams[2]

    async def wait(self) -> int:
        """Wait until it has ended: its `returncode`.

        Raises NamespaceGone if the agent ends first; the command was killed then.  Cancellation changes
        nothing.
        """
        await anyio.lowlevel.checkpoint()
        async with self._waiting:
            while (code := self.returncode) is None:
                if self._pidfd.closed:
                    raise NamespaceGone("the agent ended before the command did, and killed it")
                answer, _ = await self._conversation.receive()
                self._returncode = os.waitstatus_to_exitcode(answer["status"])
                self._forget()
        return code

    def send_signal(self, signal: int) -> None:
        """Send it a signal; one that has ended already is left alone."""
        if not self._pidfd.closed:
            with suppress(ProcessLookupError):
                pidfd_send_signal(self._pidfd.fileno(), signal)

    def terminate(self) -> None:
        """Ask it to end: SIGTERM."""
        self.send_signal(SIGTERM)

    def kill(self) -> None:
        """End it: SIGKILL.  What it started is left alone; `aclose` takes that along."""
        self.send_signal(SIGKILL)

    async def aclose(self) -> None:
        """Close the streams, kill the command and what it started if it still runs, and wait, even if
        cancelled.
        """
        with anyio.CancelScope(shield=True):
            for stream in self._streams:
                if stream is not None:
                    await stream.aclose()
            try:
                if self.returncode is None and not self._pidfd.closed:
                    self._conversation.give_up()
                    await self.wait()
            except NamespaceGone:
                pass
            finally:
                self._forget()
        await anyio.lowlevel.checkpoint_if_cancelled()

    def _forget(self) -> None:
        self._conversation.close()
        self._pidfd.close()


async def open_process(
    ask: Asker,
    command: Command,
    *,
    stdin: StandardStream,
    stdout: StandardStream,
    stderr: StandardStream,
    cwd: Word | None,
    env: Mapping[str, str] | None,
    start_new_session: bool,
    pass_fds: Sequence[int],
    files: Mapping[str, str | bytes] | None,
) -> Process:
    """`Namespace.popen`, for any way to ask an agent."""
    argv = _argv(command)
    environment = _environment(env)
    shown = {
        _text(path): content if isinstance(content, str) else content.decode("utf-8", "surrogateescape")
        for path, content in (files or {}).items()
    }
    if not all(path.startswith("/") for path in shown):
        raise ValueError("files are named by absolute paths")
    with ExitStack() as theirs, ExitStack() as ours:
        streams, fds = _standard_streams(stdin, stdout, stderr, theirs, ours)
        fds.update({fd: fd for fd in pass_fds})
        sent = list(fds.values())
        here = None
        with suppress(OSError):  # a directory that may not be searched: the one the agent has will do
            sent.append(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            here = len(sent) - 1  # relative names are relative to where the caller is now
            theirs.callback(os.close, sent[here])
        conversation = await ask(
            "spawn",
            sent,
            argv=argv,
            env=environment,
            cwd=None if cwd is None else _text(cwd),
            here=here,
            fds={number: index for index, number in enumerate(fds)},
            start_new_session=start_new_session,
            files=shown,
        )
        ours.callback(conversation.close)
        answer, (pidfd,) = await conversation.receive()
        ours.pop_all()
    return Process(answer["pid"], pidfd, conversation, *streams)


def _standard_streams(
    stdin: StandardStream, stdout: StandardStream, stderr: StandardStream, theirs: ExitStack, ours: ExitStack
) -> tuple[tuple[PipeWriter | None, PipeReader | None, PipeReader | None], dict[int, int]]:
    """Our ends of the pipes, and the command's descriptors by number; both are closed by their stacks."""
    fds: dict[int, int] = {}
    ends: list[io.FileIO | None] = []
    for number, wanted in enumerate((stdin, stdout, stderr)):
        end = None
        if wanted == subprocess.PIPE:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            fds[number] = reader if number == 0 else writer
            end = io.FileIO(writer, "w") if number == 0 else io.FileIO(reader)
            theirs.callback(os.close, fds[number])
            ours.callback(end.close)
        elif wanted == subprocess.DEVNULL:
            fds[number] = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            theirs.callback(os.close, fds[number])
        elif wanted == subprocess.STDOUT:
            if number != 2:
                raise ValueError("STDOUT can only be used for stderr")
            if 1 in fds:
                fds[2] = fds[1]
        elif wanted is None:
            if _is_inherited(number):
                fds[number] = number
        else:
            fds[number] = wanted if isinstance(wanted, int) else wanted.fileno()
        ends.append(end)
    first, second, third = ends
    return (
        PipeWriter(first) if first else None,
        PipeReader(second) if second else None,
        PipeReader(third) if third else None,
    ), fds


def _is_inherited(fd: int) -> bool:
    """Not a closed one, nor a number that went to something private: a daemon's event loop."""
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def _text(word: Word) -> str:
    """Any bytes, in JSON: what the agent undoes with utf-8 and surrogates."""
    text = os.fsencode(word).decode("utf-8", "surrogateescape")
    if "\0" in text:
        raise ValueError("embedded null byte")
    return text


def _argv(command: Command) -> list[str]:
    if isinstance(command, (str, bytes)):
        return ["/bin/sh", "-c", _text(command)]
    argv = [_text(command)] if isinstance(command, os.PathLike) else [_text(word) for word in command]
    if not argv:
        raise ValueError("no command")
    return argv


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    environment = {_text(name): _text(value) for name, value in (os.environ if env is None else env).items()}
    for name in environment:
        if "=" in name:
            raise ValueError("illegal environment variable name")
    return environment
