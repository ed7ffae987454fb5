"""Namespace: a network namespace, and what may be done in it from outside.

An *agent* (agent.py describes the protocol) is executed for each namespace and lives inside.  This process never
calls setns or unshare and never forks: it asks the agent, and gets descriptors, sockets above all, that belong to the
namespace wherever they are used.  Each request has a socket of its own, so any number of tasks, threads and event
loops may ask at once, and a cancelled one leaves nothing behind.

The end of a namespace that is open (the agent was killed, the process that it was found by has ended) is noticed by
pidfd: calls under way end with NamespaceGone, as do all later ones, and closing raises it.

pyroute2 is imported only where it is used, since it takes longer than all else here together.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from subprocess import PIPE
from types import NoneType
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import anyio
import anyio.abc
import anyio.to_thread
from typing_extensions import Unpack

from netns_kit import arguments
from netns_kit.display.displayed import Displayed
from netns_kit.errors import (
    ArgumentError,
    ArgumentTypeError,
    FeatureUnavailable,
    NamespaceGone,
)
from netns_kit.frozen import frozen, replace

from .agent_client import AgentProcess, Done, Start
from .attached import at_path, check_named, check_not_ours, of_process
from .background import Supervisor
from .listening import ListeningSocket
from .namespace_links import Interface, InterfaceAddress, NamespaceLinks, Route
from .process import Command, CommandFailed, CommandOptions, Process, communicate, open_process
from .process_info import RunningProcess
from .watch import Watch

if TYPE_CHECKING:
    from netns_kit.display.view import View

__all__ = ["Namespace", "NamespaceSnapshot"]

T = TypeVar("T")
Ids = Literal["root", "same", "subids"]
"""Who commands are in a namespace of their own, see `Namespace.create`."""
Pids = Literal["own", "host"]
"""Whose processes commands see, see `Namespace.create`."""


@frozen
class NamespaceSnapshot(Displayed):
    """A namespace at one moment.  A notebook shows it as tables, and `print` as text."""

    links: tuple[Interface, ...]
    """Interfaces, see `Namespace.links`."""
    addresses: tuple[InterfaceAddress, ...]
    """Addresses of the interfaces, see `Namespace.addresses`."""
    routes: tuple[Route, ...]
    """Routes of the main table, see `Namespace.routes`."""
    listening: tuple[ListeningSocket, ...]
    """Sockets that wait for clients, see `Namespace.listening`; empty if this kernel does not tell."""
    processes: tuple[RunningProcess, ...]
    """Processes, the oldest first."""
    more_processes: int
    """Number of further processes: 200 are listed at most."""

    def _view(self) -> View:
        from .display import snapshot_view

        return snapshot_view(self)


@frozen
class _Processes:
    """The agent's answer: the processes of the namespace, and the number of further ones."""

    processes: tuple[RunningProcess, ...]
    more: int


class Namespace(Displayed, NamespaceLinks):
    """A network namespace, for as long as it is open.

    `create`, `attach` and `current` make one; each says what opening it raises.  Closing kills all commands that were
    started in it and ends the agent.  Then the kernel drops the namespace, if nobody else holds it.

    If the namespace ends while it is open, commands are killed and every call raises `NamespaceGone`, those under way
    at once, and so does closing.
    """

    def __init__(self, prepare: Callable[[ExitStack], Start] | None = None, what: str = "") -> None:
        """Raise ArgumentTypeError: only `create`, `attach` and `current` know the arguments."""
        if not callable(prepare):
            expected = "expected a call of Namespace.create, Namespace.attach or Namespace.current"
            raise ArgumentTypeError(expected, "prepare", arguments.shown(prepare))
        self._prepare = prepare
        self._what = what
        self._agent = AgentProcess()
        self._held = ExitStack()
        self.supervisor = Supervisor(type(self).__name__, NamespaceGone)

    @classmethod
    def create(cls, *, ids: Ids = "root", pids: Pids | None = None) -> Namespace:
        """Return a new user and network namespace, whose loopback is up.

        Args:
            ids: Who commands are in there.  "root" maps uid and gid 0 to the caller's.  "same" maps the caller's ids
                to themselves; commands have no capability then, and may use every port all the same: new namespaces
                have `net.ipv4.ip_unprivileged_port_start` 0.  "subids" maps 0 to the caller and the ids from 1 on
                to the ranges of /etc/subuid and /etc/subgid, by newuidmap(1); if the caller is root, every id that
                it has to itself.
            pids: Which processes commands see.  "own": each other and no others.  They have a PID namespace, a mount
                namespace and a /proc for themselves, and nothing that a command does keeps it, or what it has
                started, from ending when this is closed.  "host": those that the caller sees.  Then a command with
                the caller's uid can signal the caller's processes, and one that stops the agent can outlive it.
                None, the default, is "own" where that can be had, which is not so in a container whose /proc is
                masked; the property `pids` tells which it is.

        Raises:
            ArgumentError: An argument is none of these.
            UserNamespaceDenied, IdMapError, FeatureUnavailable: Opening raises them, and they name what forbids it.

        Cancellation:
            Opening leaves nothing.
        """
        arguments.one_of("ids", ids, get_args(Ids))
        _check_pids(pids)
        return cls(lambda _: Start("create", pids, ids=ids), f"create(ids={ids!r})")

    @classmethod
    def attach(
        cls,
        *,
        pid: int | None = None,
        path: str | os.PathLike[str] | None = None,
        fd: int | None = None,
        pids: Pids | None = None,
        allow_current: bool = False,
    ) -> Namespace:
        """Return an existing network namespace, for exactly one of `pid`, `path` and `fd`.

        The user namespace that owns it is joined first, and commands are its owner there: uid, gid and no other
        group, whoever the caller is (root of the namespace, if the owner has no id in it).  In another user's
        namespace they begin in the root directory unless told otherwise.  Processes of the namespace that others have
        started are neither seen nor ended.  It ends with NamespaceGone when the process of `pid`, or of a `path` in
        /proc, has ended, or when the path leads there no more, as after `ip netns delete`.

        Args:
            pid: A process that is in the namespace.
            path: A file that is the namespace, like /run/netns/NAME.
            fd: A descriptor of such a file.  It stays the caller's, and must be open until the namespace is.
            pids: As in `create`.
            allow_current: The namespace may be the caller's own.  A process that has not unshared yet is still in it,
                and what is done to it is done to the caller; so it is refused by default.

        Raises:
            ArgumentError: Not exactly one is given, or it is of another type.
            OwnNamespace: Opening found the caller's own namespace.
            NamespaceGone: Opening found no such process.
            NotPrivileged: Opening may not join it.
            IdMapError: There is no id that commands could have, or a group of the caller's cannot be given up.
            OSError: Opening met it: FileNotFoundError, or EINVAL for what is no network namespace.

        Cancellation:
            Opening leaves nothing.
        """
        _check_pids(pids)
        what = check_named(pid, path, fd)
        arguments.boolean("allow_current", allow_current)

        def start(stack: ExitStack) -> Start:
            if pid is not None:
                start = of_process(pid, stack)
            elif path is None:
                start = Start("attach", ns=fd, name=f"of descriptor {fd}")
            else:
                start = at_path(os.fspath(path), stack)
            if not allow_current and start.ns is not None:
                check_not_ours(start.ns, start.name)
            return replace(start, pids=pids)

        return cls(start, f"attach({what})")

    @classmethod
    def current(cls) -> Namespace:
        """Return the namespace that the caller is in, with the caller's own rights: what needs others raises."""
        return cls(lambda _: Start("current"), "current()")

    def __repr__(self) -> str:
        return f"<Namespace.{self._what}: {self.supervisor.condition}>"

    def _view(self) -> View:
        from .display import namespace_view

        return namespace_view(self)

    async def _open(self) -> None:
        start = self._prepare(self._held)
        await self._agent.start(start)
        self.supervisor.start(self._agent.watch)
        if start.process is not None:
            self.supervisor.start(self._watch_process, start.process)
        if start.watch is not None:
            self.supervisor.start(self._watch_path, start.watch)

    async def _close(self) -> None:
        await self._agent.stop()
        self._held.close()

    async def _watch_process(self, pidfd: int) -> None:
        await anyio.wait_readable(pidfd)
        self._agent.hang_up()
        raise self._agent.lost("the process whose namespace it was has ended")

    async def _watch_path(self, watch: Watch) -> None:
        while watch.is_there():
            await anyio.wait_readable(watch)
        self._agent.hang_up()
        raise self._agent.lost("the path of the namespace is gone")

    @property
    def origin(self) -> str:
        """The call that has made the object, as text."""
        return self._what

    @property
    def pids(self) -> Pids:
        """The processes that commands see, "own" or "host", as `create` describes them.

        Raises:
            NamespaceGone: It is not open.
        """
        return self._agent.pids

    @arguments.spelled_out(open_process, stdin=None)
    async def run(
        self,
        command: Command,
        *,
        input: bytes | None = None,
        check: bool = True,
        **options: Unpack[CommandOptions],
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end, as `anyio.run_process` does.

        The keyword arguments are `RunOptions`.

        In a PID namespace of its own (`pids`) the command has a session of its own too, so that /dev/tty is not the
        caller's terminal.  A command that is given the caller's controlling terminal as a standard stream is in the
        caller's session and process group, so that job control works; then it can signal the group.

        What the command writes is kept until it has ended, however much that is, and until all that it has started
        has closed its streams too (docs/commands.md).

        Args:
            command: Its words, or a line for the shell.
            input: Bytes that are written to its standard input, which is then closed.
            stdin, stdout, stderr: PIPE, DEVNULL, STDOUT, a descriptor, a file, or None for the caller's own.
            check: Another status than 0 raises CommandFailed.
            cwd: Its current directory, instead of the caller's.
            env: Its environment, instead of the caller's.
            start_new_session: It has a session of its own in any case.
            foreground: It is in the caller's session and in a process group of its own, which has the terminal; the
                caller takes that back.
            pass_fds: Descriptors that it has by the same numbers.
            files: Absolute paths, and what is to be read there; only this command sees it (docs/commands.md).
            listen: Sockets that it is activated with, as systemd does: descriptors from 3 on, LISTEN_FDS and so on.
                They block from then on, for the caller as well.
            open_files: Names, and files that it is given open by these names, in the same way.
            sockets: Absolute paths, and the host's Unix sockets that are there for this command only.

        Raises:
            CommandFailed: A `subprocess.CalledProcessError`: the status is not 0.
            ArgumentError: An argument cannot be used.
            OSError: It cannot be executed, as `subprocess` tells: FileNotFoundError and others.
            UserNamespaceDenied: `files` cannot be shown.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The command is killed with all that it has started.
        """
        given: object = input
        fix = "encode it: input=text.encode()" if isinstance(given, str) else None
        arguments.instance("input", given, (bytes, bytearray, memoryview, NoneType), "bytes, or None", fix)
        arguments.boolean("check", check)
        stdin = options.get("stdin")
        if input is not None and stdin is not None:
            raise ArgumentError("expected None where input is given", "stdin", arguments.shown(stdin))
        options["stdin"] = stdin if input is None else PIPE
        async with await self.popen(command, **options) as process:
            output = await communicate(process, input or b"")
            returncode = await process.wait()
        if check and returncode != 0:
            raise CommandFailed(returncode, command, *output)
        return subprocess.CompletedProcess(command, returncode, *output)

    @arguments.spelled_out(open_process)
    async def popen(self, command: Command, **options: Unpack[CommandOptions]) -> Process:
        """Start a command, as `anyio.open_process` does.  It has been executed when this returns.

        Close the Process, or use it in an `async with`: that kills the command if it still runs.

        Args:
            command, stdin, stdout, stderr, cwd, env, start_new_session, foreground, pass_fds: As in `run`.
            files, listen, open_files, sockets: As in `run`.

        Raises:
            ArgumentError, OSError, UserNamespaceDenied, NamespaceGone: As in `run`.

        Cancellation:
            The command is killed.
        """
        with self.supervisor.guarding():
            return await open_process(self._converse, self.supervisor, command, **options)

    async def rewrite_files(self, files: Mapping[str, str]) -> None:
        """Give files that commands see another text, at once and for commands to come.

        Only those change that a command was given as a `netns_kit.namespace.given.LiveText`.  For parts of this
        library.

        Args:
            files: Absolute paths, and the texts.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            They may have been changed.
        """
        await self._ask(Done, "rewrite_files", files=dict(files))

    async def snapshot(self) -> NamespaceSnapshot:
        """Return what the namespace has now: links, addresses, routes, listening sockets, processes.

            print(await namespace.snapshot())

        Raises:
            NamespaceGone: The namespace has ended, or is not open.
            OSError: As `listening` raises it.

        Cancellation:
            It changes nothing.
        """
        listening: tuple[ListeningSocket, ...] = ()
        with suppress(FeatureUnavailable):
            listening = await self.listening()
        links, addresses, routes = await self.links(), await self.addresses(), await self.routes()
        found, _ = await self._ask(_Processes, "processes")
        return NamespaceSnapshot(links, addresses, routes, listening, found.processes, found.more)


def _check_pids(pids: object) -> None:
    if pids is not None:
        arguments.one_of("pids", pids, get_args(Pids))
