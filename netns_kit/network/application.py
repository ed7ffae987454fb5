"""Application: the network, the members and the commands of a `Composition`, while they run.

All members are there before the first command is started, so every name is known.  A command is started when what it
depends on runs and listens.  What commands write is kept, line by line, up to a bound.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import suppress
from signal import SIGTERM
from subprocess import DEVNULL, STDOUT

import anyio
import anyio.abc

from netns_kit import arguments
from netns_kit.errors import ArgumentTypeError, NetnsKitError, NotFound, StackClosed
from netns_kit.frozen import frozen
from netns_kit.namespace.background import Openable, Supervisor
from netns_kit.namespace.process import Process
from netns_kit.uplink.uplink import Uplink

from .composition import Composition, Dependency, MemberPlan, placed
from .members import Member
from .network import Network

LINES_KEPT = 10_000  # of all members together
LINE_MAX = 16_384  # bytes, of which a longer line is made several
PAUSE = 0.1  # seconds between two looks whether a port is listened on
PATIENCE = 5.0  # seconds of waiting for a port, after which people are told
STOP_SECONDS = 10.0  # that a command may take to end when it is asked to
NOT_STARTED = 127  # status of a command that cannot be started again, as shells have it


@frozen
class LogLine:
    """A line that the command of a member has written, to its standard output or error."""

    member: str
    """The name of the member."""
    text: str
    """The line, without its end; what is no UTF-8 is replaced."""


@frozen
class MemberState:
    """The state of a member of an `Application` at the moment of the question."""

    name: str
    """Name."""
    aliases: tuple[str, ...]
    """Other names."""
    address: str
    """IPv4 address."""
    ports: tuple[str, ...]
    """Published ports, as people read them."""
    state: str
    """State: "idle" (it has no command), "waiting" (for what it depends on), "running", or "ended"."""
    status: int | None
    """Status: the `returncode` of its command, once that has ended."""
    pid: int | None
    """Process id of its command, as the host counts, while that runs."""
    namespace_pid: int
    """Process id of a process in its namespace, see `Namespace.pid`."""


class Application(Openable):
    """The network, the members and the commands of a `Composition`, while the object is open.

        async with Application(Composition.load("shop.toml")) as shop:
            print(await shop.members["web"].connect_tcp(80))

    Opening returns when all commands have been started, each when what it depends on runs and listens.  A command
    that ends leaves its member where it is.  Closing kills all commands and ends all members.

    Args:
        composition: What is to run.
        on_line: A plain function that is called with each line that a command writes; None: lines are only kept.
        on_notice: A plain function that is called with a text for people when a command has ended with another status
            than 0, and when one waits for long for what it depends on; None: nobody is told.

    Raises:
        ArgumentTypeError: The argument is no `Composition`, or no plain function.
        ArgumentError, AddressError, NetnsKitError: A setting of the network cannot be used.
        NetnsKitError, OSError: On opening, what the network, its members and their commands raise; and that a command
            has ended which others wait for.
    """

    composition: Composition
    """The composition."""
    network: Network
    """The network."""

    def __init__(
        self,
        composition: Composition,
        *,
        on_line: Callable[[LogLine], object] | None = None,
        on_notice: Callable[[str], object] | None = None,
    ) -> None:
        if not isinstance(composition, Composition):
            fix = "read one: Composition.load(path)"
            raise ArgumentTypeError(
                "expected a Composition", "composition", arguments.shown(composition), fix
            )
        arguments.plain_function("on_line", on_line)
        arguments.plain_function("on_notice", on_notice)
        self.composition = composition
        self._on_line = on_line
        self._on_notice = on_notice or (lambda text: None)
        with placed("network"):
            uplink = Uplink(**composition.uplink) if composition.uplink else None
            self.network = Network(uplink=uplink, **composition.network)
        self._running: dict[str, Process] = {}
        self._scopes: dict[str, anyio.CancelScope] = {}  # whose end kills a command, with what it has started
        self._restarting: set[str] = set()
        self._ended: dict[str, int] = {}
        self._lines: deque[LogLine] = deque(maxlen=LINES_KEPT)
        self._written = 0  # lines so far
        self._news = anyio.Event()  # of a line, and of a command that has been started or has ended
        self.supervisor = Supervisor(type(self).__name__, StackClosed, self.network.supervisor, one_loop=True)

    def __repr__(self) -> str:
        return f"<Application {self.composition.name}: {self.supervisor.condition}>"

    @property
    def members(self) -> dict[str, Member]:
        """The members, by their names."""
        return self.network.members

    async def _open(self) -> None:
        self._news = anyio.Event()
        await self.network.open()
        for plan in self.composition.members:
            with placed(f"members.{plan.name}"):
                await self.network.member_of(plan.setup).open()
        for plan in self.composition.members:
            if plan.command is not None:
                for each in plan.depends_on:
                    await self._wait_for(each, plan)
                await self._start(plan)

    async def _start(self, plan: MemberPlan) -> None:
        assert plan.command is not None
        member = self.member(plan.name)
        with placed(f"members.{plan.name}"):
            process = await member.popen(
                plan.command if isinstance(plan.command, str) else list(plan.command),
                stdin=DEVNULL,
                stderr=STDOUT,
                cwd=plan.directory,
                env={**os.environ, **plan.env},
            )
        self._running[plan.name] = process
        self._ended.pop(plan.name, None)
        self.supervisor.start(self._follow, plan.name, process)
        self._tell()

    async def restart(self, member: str) -> None:
        """End the command of a member, and start it again.

        The member stays, with its addresses and ports; only connections of the command end.  The command is asked to
        end by SIGTERM, and killed with what it has started if it still runs ten seconds later.  It is started whether
        it has ended before or not, and this returns when it listens on the ports that others depend on.

        Args:
            member: The name of the member.

        Raises:
            NotFound: There is no such member, or not any more.
            NetnsKitError: It has no command, or is being started; or its command has ended again, and others depend
                on its ports.
            OSError: The command cannot be executed.
            StackClosed: The application is not open, or is closed meanwhile.

        Cancellation: The command may have ended, and not been started again.
        """
        self.supervisor.check()
        name = self.member(member).name
        plans = {plan.name: plan for plan in self.composition.members}
        if plans[name].command is None:
            raise NetnsKitError(
                f"the member {name} has no command", fix=f"give it one: members.{name}.command"
            )
        if name in self._waiting():
            raise NetnsKitError(f"the command of the member {name} is being started", fix="wait until it is")
        with self.supervisor.guarding():
            status = self._ended.pop(name, NOT_STARTED)
            self._restarting.add(name)
            try:
                await self._stop(name)
                await self._start(plans[name])
            except BaseException:
                self._ended[name] = status
                raise
            finally:
                self._restarting.discard(name)
                self._tell()
            for plan in plans.values():
                for each in plan.depends_on:
                    if each.member == name:
                        await self._wait_for(each, plan)

    async def _stop(self, name: str) -> None:
        """Ask a command to end, and kill it if it does not; return when it has ended."""
        process = self._running.get(name)
        if process is not None and process.signal_group(SIGTERM):
            with anyio.move_on_after(STOP_SECONDS):
                await self._end_of(name, process)
        if name in self._scopes:
            self._scopes[name].cancel()
        await self._end_of(name, process)

    async def _end_of(self, name: str, process: Process | None) -> None:
        while self._running.get(name) is process is not None:
            await self._news.wait()

    async def _wait_for(self, dependency: Dependency, plan: MemberPlan) -> None:
        """Wait until a member listens on a port, if one is named; its command has been started.

        Raises:
            NetnsKitError: Its command has ended.
        """
        member = self.member(dependency.member)
        told, since = False, anyio.current_time()
        while dependency.port is not None:
            if dependency.member in self._ended:
                status = self._ended[dependency.member]
                raise NetnsKitError(
                    f"{dependency.member} has ended with status {status}, and {plan.name} waits for its port"
                    f" {dependency.port}/{dependency.protocol}",
                    fix=f"look at what it has written: {self._last_words(dependency.member)}",
                )
            listening = await member.namespace.listening()
            if any(
                (each.protocol, each.port) == (dependency.protocol, dependency.port) for each in listening
            ):
                return
            if not told and anyio.current_time() - since > PATIENCE:
                told = True
                self._on_notice(
                    f"{plan.name} waits for {dependency.member}, which does not listen on port"
                    f" {dependency.port}/{dependency.protocol}"
                )
            await anyio.sleep(PAUSE)

    def _last_words(self, name: str) -> str:
        return next((repr(line.text) for line in reversed(self._lines) if line.member == name), "nothing")

    async def _follow(self, name: str, process: Process) -> None:
        """Keep what a command writes, and its end."""
        status = -9
        with anyio.CancelScope() as self._scopes[name]:
            async with process:
                rest = b""
                assert process.stdout is not None
                with suppress(NetnsKitError):  # it has ended with its member
                    async for chunk in process.stdout:
                        *lines, rest = (rest + chunk).split(b"\n")
                        while len(rest) > LINE_MAX:
                            lines.append(rest[:LINE_MAX])
                            rest = rest[LINE_MAX:]
                        self._keep(name, lines)
                self._keep(name, [rest] if rest else [])
                with suppress(NetnsKitError):  # as above
                    status = await process.wait()
        del self._running[name], self._scopes[name]
        if name not in self._restarting:
            self._ended[name] = status
            if status:
                self._on_notice(f"{name} has ended with status {status}")
        self._tell()

    def _keep(self, name: str, lines: Collection[bytes]) -> None:
        for line in lines:
            made = LogLine(name, line.removesuffix(b"\r").decode(errors="replace"))
            self._lines.append(made)
            self._written += 1
            if self._on_line is not None:
                self._on_line(made)
        if lines:
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def _close(self) -> None:
        await self.network.supervisor.end()

    async def logs(self, *members: str, follow: bool = False) -> AsyncGenerator[LogLine]:
        """Yield what commands have written, oldest first, of the last `LINES_KEPT` lines of all.

        Args:
            members: Whose; none for all.
            follow: Whether to go on with what they write from now on, until all of these commands have ended.

        Raises:
            NotFound: There is no such member.
            StackClosed: The application is not open, or is closed meanwhile.

        Cancellation: The generator has ended.
        """
        names = self._known(members)
        seen = self._written - len(self._lines)
        while True:
            self.supervisor.check()
            news, ended = self._news, not (names & (self._running.keys() | self._waiting()))
            lines = list(self._lines)[max(0, len(self._lines) - (self._written - seen)) :]
            seen = self._written
            for line in lines:
                if line.member in names:
                    yield line
            if ended or not follow:
                return
            if news is self._news:
                with self.supervisor.guarding():
                    await news.wait()

    def _waiting(self) -> set[str]:
        """Return the members whose commands have not been started yet."""
        begun = self._running.keys() | self._ended.keys()
        return {plan.name for plan in self.composition.members if plan.command is not None} - begun

    def _known(self, members: Collection[str]) -> set[str]:
        names = [plan.name for plan in self.composition.members]
        for each in members:
            if each not in names:
                raise NotFound(
                    f"there is no member {arguments.shown(each)}", fix=f"there are {', '.join(names)}"
                )
        return set(members or names)

    def member(self, name: str) -> Member:
        """Return a member.

        Args:
            name: Its name.

        Raises:
            NotFound: There is no such member, or not any more.
        """
        (known,) = self._known([name])
        if known not in self.members:
            raise NotFound(f"the member {known} has ended", fix="`state` tells which there are")
        return self.members[known]

    async def state(self) -> tuple[MemberState, ...]:
        """Return what the members are doing that are open, in the order in which they are started.

        Raises:
            StackClosed: The application is not open.

        Cancellation: Nothing is changed.
        """
        self.supervisor.check()
        waiting = self._waiting()
        found = []
        for plan in self.composition.members:
            member = self.members.get(plan.name)
            if member is None or member.supervisor.condition != "open":  # not yet, or it has ended by itself
                continue
            process = self._running.get(plan.name)
            state = "running" if process is not None else "waiting" if plan.name in waiting else "ended"
            ports = await member.forwarder.list()
            found.append(
                MemberState(
                    plan.name,
                    member.aliases,
                    str(member.address),
                    tuple(map(str, ports)),
                    "idle" if plan.command is None else state,
                    self._ended.get(plan.name),
                    None if process is None else process.pid,
                    member.namespace.pid,
                )
            )
        return tuple(found)

    async def wait(self) -> dict[str, int]:
        """Wait until all commands have ended, and return the `returncode` of each by the name of its member.

        Without any command it waits until the application is closed.

        Raises:
            StackClosed: The application is not open, or is closed meanwhile.

        Cancellation: Nothing is changed.
        """
        has_commands = any(plan.command is not None for plan in self.composition.members)
        with self.supervisor.guarding():
            while not has_commands or self._running or self._waiting():
                await self._news.wait()
        return dict(self._ended)
