"""Process: a command that a namespace's agent runs.

A command is the agent's child, not this process's, and everything about it is a descriptor: its pipes, a pidfd by
which it is signalled (so a recycled pid is never hit) and the conversation on which its status comes.  If the
conversation is closed or shut down before that, the agent kills the command with its descendants; so a cancelled task
takes its command along.
"""

from __future__ import annotations

import errno
import io
import os
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from signal import SIGKILL, SIGTERM, pidfd_send_signal
from subprocess import PIPE
from types import NoneType
from typing import IO, Any, TypedDict, Union

import anyio
import anyio.abc
import anyio.lowlevel

from netns_kit import arguments
from netns_kit.child.child import is_inherited
from netns_kit.child.codec import printable
from netns_kit.errors import ArgumentError, ArgumentTypeError, NamespaceGone, NetnsKitError
from netns_kit.host.abi import PIDFD_SIGNAL_PROCESS_GROUP, SCM_MAX_FD

from .agent_client import Conversation, Ended, StartConversation, Stopped
from .agent_common import FOLLOW_STOPS
from .background import Supervisor
from .given import (
    Listen,
    LiveText,
    OpenFile,
    Word,
    announce,
    files_shown,
    host_sockets,
    listening,
    opened,
    text,
)

__all__ = [
    "Command",
    "CommandFailed",
    "CommandOptions",
    "PipeReader",
    "PipeWriter",
    "Process",
    "RunOptions",
    "StandardStream",
    "open_process",
]

Command = Union[Word, Sequence[Word]]  # noqa: UP007 - a string cannot be joined by | before 3.14
"""A command's words, or a line for the shell."""
StandardStream = Union[int, IO[Any], None]  # noqa: UP007 - the same
"""What a command has for a standard stream: PIPE, DEVNULL, STDOUT, a descriptor, a file; None: the caller's own."""


class CommandOptions(TypedDict, total=False):
    """The options of a command, as keyword arguments of `Namespace.popen` and `Network.popen`."""

    stdin: StandardStream
    """The standard input.  Default: PIPE; for `Namespace.run` the caller's own."""
    stdout: StandardStream
    """The standard output.  Default: PIPE."""
    stderr: StandardStream
    """The standard error.  Default: PIPE."""
    cwd: Word | None
    """The directory to start in.  Default: the caller's own."""
    env: Mapping[str, str] | None
    """The environment.  Default: the caller's own."""
    start_new_session: bool
    """True: the command has a session of its own, see setsid(2).  Default: False."""
    foreground: bool
    """True: the command is in the caller's session, in a process group of its own that has the terminal, which the
    caller takes back.  Its standard input must be that terminal.  Default: False."""
    pass_fds: Sequence[int]
    """Descriptors that the command inherits, under the numbers that they have here.  Default: none."""
    files: Mapping[str, str | bytes] | None
    """Absolute paths, and the content that the command reads there; nobody else sees it (docs/commands.md).
    Default: none."""
    listen: Listen | None
    """Sockets that the command is activated with: it finds them as descriptors from 3 on, and LISTEN_FDS, LISTEN_PID
    and LISTEN_FDNAMES in its environment (docs/commands.md).  Default: none."""
    open_files: Mapping[str, OpenFile] | None
    """Names, and the files that the command is given by these names, open, behind the sockets of `listen`: open files
    and descriptors, or paths of the host.  Default: none."""
    sockets: Mapping[str, Word] | None
    """Absolute paths, and the host's Unix sockets that the command finds there; nobody else does (docs/commands.md).
    Default: none."""


class RunOptions(CommandOptions, total=False):
    """The options of a command that is run to its end, as keyword arguments of `Namespace.run` and `Network.run`."""

    input: bytes | None
    """Bytes to write to the standard input, which is then closed.  Default: nothing is written."""
    check: bool
    """True: another status than 0 raises `CommandFailed`.  Default: True."""


PASSED_MAX = SCM_MAX_FD - 3  # beside the conversation, the current directory and a long request


class CommandFailed(NetnsKitError, subprocess.CalledProcessError):
    """An error: a command has ended with another status than 0.

    It is a `subprocess.CalledProcessError`, with `returncode`, `cmd`, `output` and `stderr`.  Its message shows the
    end of what the command has written on standard error, if that was captured, without what a terminal would obey.
    """

    def __init__(
        self, returncode: int, cmd: Command, output: bytes | None = None, stderr: bytes | None = None
    ) -> None:
        cause = str(subprocess.CalledProcessError(returncode, cmd)).rstrip(".")
        lines = (stderr or b"").decode(errors="replace").strip().splitlines()
        said = printable("\n".join(line[:_LINE_SHOWN].expandtabs() for line in lines[-_LINES_SHOWN:]))
        NetnsKitError.__init__(self, cause, value=f"it says:\n{said}" if said else None)
        self.returncode, self.cmd, self.output, self.stderr = returncode, cmd, output, stderr
        self.args = (returncode, cmd, output, stderr)  # what pickle hands to __init__


_LINES_SHOWN, _LINE_SHOWN = 20, 500  # characters each


class _Pipe:
    """This process's end of a pipe, non-blocking."""

    def __init__(self, file: io.FileIO) -> None:
        os.set_blocking(file.fileno(), False)
        self._file = file
        self._guard = anyio.ResourceGuard("using")

    async def aclose(self) -> None:
        """Close this end.  Whoever waits for it gets ClosedResourceError."""
        if not self._file.closed:
            anyio.notify_closing(self._file)
            self._file.close()
        await anyio.lowlevel.checkpoint()


class PipeReader(_Pipe, anyio.abc.ByteReceiveStream):
    """Stream of what the command writes to its standard output or error."""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receive some bytes.

        Raises:
            EndOfStream: All writers have closed their ends.
            ClosedResourceError: This end has been closed.

        Cancellation:
            Nothing is taken.
        """
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
    """Stream to the command's standard input."""

    async def send(self, item: bytes) -> None:
        """Write all of `item`.

        Raises:
            BrokenResourceError: Nobody reads it.
            ClosedResourceError: This end has been closed.

        Cancellation:
            Part of it may have been written.
        """
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

    `stdin`, `stdout` and `stderr` are streams where PIPE was asked for, else None.  A command whose Process is
    dropped while it runs is killed, with a ResourceWarning.
    """

    supervisor: Supervisor
    """The supervisor of what the command runs on, whose end is its end; for parts of this library."""
    _forgotten = True  # it has nothing to close any more, or not yet

    def __init__(
        self,
        supervisor: Supervisor,
        pid: int,
        pidfd: int,
        conversation: Conversation,
        stdin: PipeWriter | None,
        stdout: PipeReader | None,
        stderr: PipeReader | None,
    ) -> None:
        self.supervisor = supervisor
        self._pid = pid
        self._pidfd = io.FileIO(pidfd)
        self._conversation = conversation
        self._streams = stdin, stdout, stderr
        self._returncode: int | None = None
        self._waiting = anyio.Lock()
        self._follows = False
        self._stops: list[int] = []
        self._forgotten = False

    def __del__(self) -> None:
        if self._forgotten:
            return
        if self.supervisor.is_inherited:  # its command is the parent's, and so is what the agent says of it
            self._forget()
            return
        # a collector may have closed the conversation before, and that has killed it
        if self._conversation.is_closed or self.returncode is None:
            self._forget()
            warnings.warn(
                f"process {self._pid} is killed: its Process was dropped; use `async with`, or await its aclose()",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        status = self.returncode
        return f"<Process pid={self._pid}: {'running' if status is None else f'ended with {status}'}>"

    @property
    def pid(self) -> int:
        """Process id, as the host counts.  The namespace may count otherwise."""
        return self._pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the signal that has ended it; None while it runs."""
        try:
            while not self._pidfd.closed and (news := self._conversation.news()) is not None:
                self._heard(news)
        except NamespaceGone:
            return None  # wait() tells
        return self._returncode

    @property
    def stdin(self) -> anyio.abc.ByteSendStream | None:
        """The standard input, if that is a pipe."""
        return self._streams[0]

    @property
    def stdout(self) -> anyio.abc.ByteReceiveStream | None:
        """The standard output, if that is a pipe."""
        return self._streams[1]

    @property
    def stderr(self) -> anyio.abc.ByteReceiveStream | None:
        """The standard error, if that is a pipe."""
        return self._streams[2]

    async def wait(self) -> int:
        """Wait until the command has ended, and return its `returncode`.

        Raises:
            NamespaceGone: The namespace has gone, or was closed, and the command was killed.
            NetnsKitError: The `Network` that has started the command has failed; the command may still run.

        Cancellation:
            It changes nothing.
        """
        if self.returncode is None:
            with self.supervisor.guarding():
                return await self._wait()
        return await self._wait()

    async def _wait(self) -> int:
        await anyio.lowlevel.checkpoint()
        async with self._waiting:
            while (code := self.returncode) is None:
                await self._wait_news()
        return code

    async def _wait_news(self) -> None:
        """Wait until the agent has said something of the command, or `returncode` has heard it meanwhile."""
        if self._pidfd.closed:
            raise NamespaceGone("the agent ended before the command did, and killed it")
        with suppress(anyio.ClosedResourceError):
            self._heard(await self._conversation.wait_news())

    def _heard(self, news: Stopped | Ended) -> None:
        """Take a record of the agent's about the command."""
        if isinstance(news, Stopped):
            self._stops.append(news.stopped)
        else:
            self._returncode = os.waitstatus_to_exitcode(news.status)
            self._forget()

    async def wait_stopped(self) -> int | None:
        """Wait until a signal stops the command, as Ctrl-Z does.

        Return the number of the signal, or None if the command has ended.

        Raises:
            NamespaceGone, NetnsKitError: As `wait` does.

        Cancellation:
            It changes nothing.
        """
        if self.returncode is not None:
            return None
        if not self._follows:
            self._follows = True
            self._conversation.send(FOLLOW_STOPS)
        with self.supervisor.guarding():
            return await self._wait_stopped()

    async def _wait_stopped(self) -> int | None:
        await anyio.lowlevel.checkpoint()
        async with self._waiting:
            while not self._stops:
                if self.returncode is not None:
                    return None
                if not self._stops:  # else it has been heard of just now
                    await self._wait_news()
            return self._stops.pop(0)

    def pass_on(self, signal: int) -> None:
        """Send the command a signal that this process has received, unless the command has received it too.

        A terminal sends its signals to all processes of the foreground process group, and `kill -- -GROUP` to all of
        that group: then it is not sent a second time.  A command that has ended is left alone.

        Args:
            signal: Its number.
        """
        if not self._pidfd.closed:
            self._conversation.send(signal)

    def send_signal(self, signal: int) -> None:
        """Send the command a signal.  If it has ended nothing happens.

        Args:
            signal: Its number.
        """
        if not self._pidfd.closed:
            with suppress(ProcessLookupError):
                pidfd_send_signal(self._pidfd.fileno(), signal)

    def signal_group(self, signal: int) -> bool:
        """Send a signal to the process group of the command, as `send_signal` does to the command.

        Args:
            signal: Its number.

        Returns:
            False if this kernel cannot do that: it came with Linux 6.9.
        """
        if not self._pidfd.closed:
            try:
                pidfd_send_signal(self._pidfd.fileno(), signal, None, PIDFD_SIGNAL_PROCESS_GROUP)
            except ProcessLookupError:
                pass
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return False
        return True

    def terminate(self) -> None:
        """Send the command SIGTERM, which asks it to end."""
        self.send_signal(SIGTERM)

    def kill(self) -> None:
        """Send the command SIGKILL.  What it has started goes on; `aclose` kills that too."""
        self.send_signal(SIGKILL)

    async def aclose(self) -> None:
        """Close the streams, and if the command still runs, kill it with what it has started, and wait for it.

        Cancellation:
            All of this is done nevertheless.
        """
        with anyio.CancelScope(shield=True):
            for stream in self._streams:
                if stream is not None:
                    await stream.aclose()
            try:
                if self.returncode is None and not self._pidfd.closed:
                    self._conversation.give_up()
                    await self._wait()
            except NamespaceGone:
                pass
            finally:
                self._forget()
        await anyio.lowlevel.checkpoint_if_cancelled()

    def _forget(self) -> None:
        self._forgotten = True
        self._conversation.close()
        self._pidfd.close()


async def communicate(process: Process, input: bytes) -> list[bytes | None]:
    """Write to a command's standard input, close it, and return what the command writes until its streams end.

    Returns:
        What came from standard output and standard error; None of one that is no pipe to here.
    """
    output: list[bytes | None] = [None, None]

    async def feed(stream: anyio.abc.ByteSendStream) -> None:
        with suppress(anyio.BrokenResourceError):  # it has read what it wanted
            await stream.send(input)
        await stream.aclose()

    async def drain(stream: anyio.abc.ByteReceiveStream, index: int) -> None:
        output[index] = b"".join([chunk async for chunk in stream])

    async with anyio.create_task_group() as tasks:
        if process.stdin is not None:
            tasks.start_soon(feed, process.stdin)
        for index, stream in enumerate((process.stdout, process.stderr)):
            if stream is not None:
                tasks.start_soon(drain, stream, index)
    return output


async def open_process(
    ask: StartConversation,
    supervisor: Supervisor,
    command: Command,
    *,
    stdin: StandardStream = PIPE,
    stdout: StandardStream = PIPE,
    stderr: StandardStream = PIPE,
    cwd: Word | None = None,
    env: Mapping[str, str] | None = None,
    start_new_session: bool = False,
    foreground: bool = False,
    pass_fds: Sequence[int] = (),
    files: Mapping[str, str | bytes] | None = None,
    listen: Listen | None = None,
    open_files: Mapping[str, OpenFile] | None = None,
    sockets: Mapping[str, Word] | None = None,
) -> Process:
    """Start a command as `Namespace.popen` does, by any function that asks an agent."""
    argv, environment = _argv(command), _environment(env)
    shown, connected = files_shown(files), host_sockets(sockets)
    if both := shown.keys() & connected.keys():
        raise ArgumentError("expected other paths than those of `files`", "sockets", repr(min(both)))
    a_path = "a path, or None for the caller's own directory"
    arguments.instance("cwd", cwd, (str, bytes, os.PathLike, NoneType), a_path)
    arguments.boolean("start_new_session", start_new_session)
    arguments.boolean("foreground", foreground)
    _check_passed(pass_fds)
    with ExitStack() as theirs, ExitStack() as ours:
        streams, fds = _standard_streams(stdin, stdout, stderr, theirs, ours)
        fds.update({fd: fd for fd in pass_fds})
        pid_variable = announce(environment, fds, [*listening(listen), *opened(open_files, theirs)])
        sent = list(fds.values())
        if len(sent) > PASSED_MAX:
            expected = f"expected at most {PASSED_MAX} descriptors"
            raise ArgumentError(expected, "pass_fds", len(sent), "close some")
        if foreground and (start_new_session or not _has_our_terminal(fds[0])):
            fix = "leave start_new_session out, and stdin the caller's, which is its terminal"
            raise ArgumentError("expected a command that is given the terminal", "foreground", True, fix)
        sent += _here(theirs)
        conversation = await ask(
            "spawn",
            sent,
            argv=argv,
            env=environment,
            cwd=None if cwd is None else text(cwd, "cwd"),
            here=len(fds) if len(sent) > len(fds) else None,
            fds={number: index for index, number in enumerate(fds)},
            start_new_session=start_new_session,
            foreground=foreground,
            at_terminal=any(_has_our_terminal(fd) for number, fd in fds.items() if number <= 2),
            files=shown,
            live=[path for path, content in (files or {}).items() if isinstance(content, LiveText)],
            sockets=connected,
            pid_variable=pid_variable,
        )
        ours.callback(conversation.close)
        pid, pidfd = await conversation.started(_program(command))
        ours.pop_all()
    return Process(supervisor, pid, pidfd, conversation, *streams)


def _check_passed(fds: Sequence[int]) -> None:
    arguments.items("pass_fds", fds, "a list of descriptors")
    for fd in fds:
        arguments.descriptor("pass_fds", fd)


def _here(theirs: ExitStack) -> list[int]:
    """Return a descriptor of the current directory, to which relative names are relative.

    Nothing is returned for a directory that may not be searched: the one that the agent has will do.
    """
    with suppress(OSError):
        fd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        theirs.callback(os.close, fd)
        return [fd]
    return []


def _standard_streams(
    stdin: StandardStream, stdout: StandardStream, stderr: StandardStream, theirs: ExitStack, ours: ExitStack
) -> tuple[tuple[PipeWriter | None, PipeReader | None, PipeReader | None], dict[int, int]]:
    """Return this process's ends of the pipes, and the command's descriptors by number; their stacks close them."""
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
                raise ArgumentError(
                    "expected another value: only stderr can be STDOUT", _STREAMS[number], "STDOUT"
                )
            if 1 in fds:
                fds[2] = fds[1]
        elif wanted is None:
            if is_inherited(number):
                fds[number] = number
        elif isinstance(wanted, int):
            arguments.descriptor(_STREAMS[number], wanted)
            fds[number] = wanted
        elif callable(getattr(wanted, "fileno", None)):
            fds[number] = wanted.fileno()
        else:
            expected = "expected PIPE, DEVNULL, a descriptor, a file, or None for the caller's own"
            raise ArgumentTypeError(expected, _STREAMS[number], arguments.shown(wanted))
        ends.append(end)
    first, second, third = ends
    return (
        PipeWriter(first) if first else None,
        PipeReader(second) if second else None,
        PipeReader(third) if third else None,
    ), fds


def _has_our_terminal(fd: int) -> bool:
    """Whether the descriptor is of this process's controlling terminal, where process groups decide who may read."""
    try:
        os.tcgetpgrp(fd)
    except OSError:
        return False
    return True


_STREAMS = ("stdin", "stdout", "stderr")


def _program(command: Command) -> Word:
    """Return what is executed, as it was given."""
    if isinstance(command, (str, bytes)):
        return "/bin/sh"
    return command if isinstance(command, os.PathLike) else command[0]


def _argv(command: Command) -> list[str]:
    if isinstance(command, (str, bytes)):
        return ["/bin/sh", "-c", text(command)]
    if isinstance(command, os.PathLike):
        return [text(command)]
    arguments.sequence("command", command, "a list of words, or a line for the shell")
    argv = [text(word) for word in command]
    if not argv:
        raise ArgumentError("expected a word at least", "command", "[]")
    return argv


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    expected = "names and values, as text"
    if env is not None:
        arguments.mapping("env", env, f"{expected}, or None for the caller's own")
    environment = {
        text(name, "env", expected): text(value, f"env[{name!r}]", "text")
        for name, value in (os.environ if env is None else env).items()
    }
    for name in environment:
        if "=" in name:
            raise ArgumentError("expected names without =", "env", arguments.shown(name))
    return environment
