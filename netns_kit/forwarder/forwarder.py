"""The forwarder: ports of the host that lead into the namespace.

`Forwarder` is the caller's object.  The listeners are beside the engine, in whatever thread or process that runs.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count, groupby
from typing import Protocol, TypeVar

import anyio

from netns_kit import arguments
from netns_kit.errors import (
    ArgumentTypeError,
    FeatureUnavailable,
    NetnsKitError,
    NotFound,
    PortInUseError,
    StackClosed,
)
from netns_kit.frozen import replace
from netns_kit.host import diagnosis, sysctl
from netns_kit.host.abi import CAP_NET_BIND_SERVICE
from netns_kit.host.paths import Made
from netns_kit.namespace.background import Openable, Supervisor
from netns_kit.namespace.namespace import Namespace
from netns_kit.subnet import Subnet

from .binding import listen_unix
from .follow import Follower
from .forwards import Forwards
from .ports import Follow, Mode, PortForward, UnixSocket
from .specs import parse_all

AT_ONCE = 256  # ports that are added between two steps of the engine

CLOSING_SECONDS = 2.0  # for an engine that does not answer; the listeners then end with the stack

_FAMILY = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}

T = TypeVar("T")
_numbers = count()


class Askable(Protocol):
    """A stack as a forwarder needs it: a `UserStack` is one."""

    supervisor: Supervisor
    """The stack's life: whether it is open, and what it failed with.  For parts of the library."""

    @property
    def namespace(self) -> Namespace | None:
        """The namespace that the stack's device is in, if it is known."""
        ...

    @property
    def subnet(self) -> Subnet:
        """The addresses of the namespace."""
        ...

    def pass_socket(self, sock: socket.socket) -> int:
        """Have the engine receive a copy of a socket, see `UserStack.pass_socket`.

        Args:
            sock: The socket, which stays the caller's.
        """
        ...

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have the stack do an operation, see `UserStack.ask`.

        Args:
            operation: A method that is marked as one, see `netns_kit.operations`.
            arguments: What it is called with.

        Cancellation: The operation may have been done.
        """
        ...


class Forwarder(Openable):
    """Ports of the host that lead into the namespace while the object is open.

        async with Forwarder(stack) as forwarder:
            await forwarder.add("127.0.0.1:8080:80/tcp")

    Closing frees the ports; TCP connections that exist go on.  A failure of the stack fails its forwarders.

    Args:
        stack: The `UserStack` that the connections enter.

    Raises:
        ArgumentTypeError: The argument is no stack.
        StackClosed: On opening, if the stack is not open.
    """

    def __init__(self, stack: Askable) -> None:
        if not callable(getattr(stack, "ask", None)):
            raise ArgumentTypeError("expected a UserStack", "stack", arguments.shown(stack))
        self._stack = stack
        self._number = next(_numbers)  # by which its listeners are known
        self._made: dict[PortForward, Made] = {}  # files of unix sockets
        self._follower: Follower | None = None
        self.supervisor = Supervisor(type(self).__name__, StackClosed, stack.supervisor)

    def __repr__(self) -> str:
        return f"<Forwarder of {self._stack!r}: {self.supervisor.condition}>"

    async def _open(self) -> None:
        self._stack.supervisor.check()

    async def _close(self) -> None:
        if self._follower is not None:
            self._follower.close()
        # a stack that has ended has closed them itself
        with anyio.move_on_after(CLOSING_SECONDS, shield=True), suppress(NetnsKitError):
            listening = await self._stack.ask(Forwards.list, self._number)
            await self._stack.ask(Forwards.remove_all, self._number)
            for forward in listening:
                await self._unroute(forward)
        while self._made:
            _, made = self._made.popitem()
            with suppress(OSError):
                made.remove()

    async def add(
        self, *specs: str | PortForward | Follow, mode: Mode | None = None
    ) -> tuple[PortForward, ...]:
        """Listen on ports, and return one forward for each; a range has several.  Either all listen or none.

        A `Follow` is a rule: from now on each port that is listened on inside is forwarded within a second, until
        it is listened on no more.  What is returned has the forwards that the rule has made at once.  A port that the
        host does not give is logged once, and tried again.  One rule forwards 1024 ports at most.

        A port of an optional forward that is taken, or that needs a privilege, is left out.

        Args:
            specs: The ports, as text (see `netns_kit.forwarder.specs`), or as `PortForward` and `Follow` objects.
            mode: How clients of those get inside that do not say it themselves, see `PortForward.settled`.

        Raises:
            PortSpecError, ArgumentError: A specification cannot be understood.
            PrivilegedPortError: A port needs a privilege; raised before anything is bound.
            PortInUseError: Another socket has the port.
            AddressError: The host has no such address, or the namespace cannot have the one inside.
            ArgumentTypeError: An argument is neither text nor a PortForward or a Follow.
            FeatureUnavailable: The mode cannot be had here, or the kernel does not tell what listens inside.
            NotFound: A port that was added was removed by another task before all were there.
            StackClosed: The forwarder is not open.
            OSError: Listening failed otherwise.

        Cancellation: The ports may have been added; `list` and `follows` show them.
        """
        asked = parse_all(specs)
        forwards = [each.settled(mode) for each in asked if isinstance(each, PortForward)]
        follows = [replace(each, mode=each.mode or mode) for each in asked if isinstance(each, Follow)]
        _check_privilege(forwards)
        await self._prepare(forwards)
        added: list[PortForward] = []
        try:
            for on_unix, some in groupby(forwards, lambda each: isinstance(each.host, UnixSocket)):
                batch = tuple(some)
                for start in range(0, len(batch), 1 if on_unix else AT_ONCE):
                    if on_unix:
                        added += await self._add_unix(batch[start])
                    else:
                        added += await self._ask(Forwards.add, batch[start : start + AT_ONCE])
            return (*added, *await self._follow(follows))
        except Exception:
            for forward in added:
                await self.remove(forward)
            raise

    async def _follow(self, follows: Sequence[Follow]) -> tuple[PortForward, ...]:
        """Follow by these rules, all or none, and return the forwards that they have made at once."""
        if not follows:
            return ()
        if self._stack.namespace is None:
            raise FeatureUnavailable(
                "expected a device in a Namespace: nobody tells what listens behind this one",
                fix="write the ports, or open the device in the namespace",
            )
        if self._follower is None:
            self._follower = Follower(
                self._stack.namespace, lambda: self._stack.subnet, _check_privilege, self.add, self.remove
            )
        with self.supervisor.guarding():
            made = await self._follower.add(follows)
        if not self._follower.is_running:
            self._follower.is_running = True
            self.supervisor.start(self._follower.run)
        return made

    async def _prepare(self, forwards: Sequence[PortForward]) -> None:
        """Make the routes inside that transparent forwards need."""
        transparent = [each for each in forwards if each.mode == "transparent"]
        namespace = self._stack.namespace
        if not transparent or namespace is None:  # then the engine says so
            return
        await namespace.prepare_transparent(ipv6=any(_version(each) == 6 for each in transparent))
        for forward in transparent:
            if forward.protocol == "udp":
                await namespace.route_answers(_FAMILY[_version(forward)], forward.guest_port, wanted=True)

    async def _add_unix(self, forward: PortForward) -> tuple[PortForward, ...]:
        assert isinstance(forward.host, UnixSocket)
        try:
            sock, made = listen_unix(forward.host)
        except PortInUseError:
            if forward.optional:
                return ()
            raise
        try:
            with sock:
                added = await self._ask(Forwards.adopt, forward, self._stack.pass_socket(sock))
        except BaseException:
            if made is not None:
                made.remove()
            raise
        if made is not None:
            self._made[added] = made
        return (added,)

    async def remove(self, forward: PortForward | Follow, *, cut: bool = False) -> None:
        """Stop listening on a port.  It is free when this returns.

        A rule ends with all forwards that it has made.  One of them, removed alone, stays away for as long as its
        port is listened on inside.

        Args:
            forward: What `add` returned, one of `list`, or of `follows`.
            cut: True: its TCP connections are reset.  False: those that exist go on.

        Raises:
            NotFound: There is no such forward.
            ArgumentTypeError: The argument is neither a PortForward nor a Follow.
            StackClosed: The forwarder is not open.

        Cancellation: The port may have been freed.
        """
        fix = "give what `add` returned, or one of `list`"
        arguments.instance("forward", forward, (PortForward, Follow), "a PortForward or a Follow", fix)
        if isinstance(forward, Follow):
            with self.supervisor.guarding():
                if self._follower is None or not await self._follower.remove(forward, cut=cut):
                    raise NotFound(f"there is no forward {forward}", fix=fix)
            return
        if not await self._ask(Forwards.remove, forward):
            raise NotFound(f"there is no forward {forward}", fix=fix)
        if made := self._made.pop(forward, None):
            made.remove()
        if cut:
            await self._stack.ask(Forwards.cut, forward)
        await self._unroute(forward)

    async def _unroute(self, forward: PortForward) -> None:
        """Take back the route of a transparent UDP port, unless another leads there too."""
        namespace = self._stack.namespace
        if namespace is None or (forward.mode, forward.protocol) != ("transparent", "udp"):
            return
        listening = await self._stack.ask(Forwards.list, self._number)
        left = [each for each in listening if (each.mode, each.protocol) == ("transparent", "udp")]
        family = _version(forward)
        if not any(each.guest_port == forward.guest_port and _version(each) == family for each in left):
            await namespace.route_answers(_FAMILY[family], forward.guest_port, wanted=False)

    async def list(self) -> tuple[PortForward, ...]:
        """Return the forwards that are listening, oldest first; those that rules have made are among them.

        Raises:
            StackClosed: The forwarder is not open.

        Cancellation: Nothing is changed.
        """
        return await self._ask(Forwards.list)

    def follows(self) -> dict[Follow, tuple[PortForward, ...]]:
        """Return the rules, oldest first, each with the forwards that it has made.

        Raises:
            StackClosed: The forwarder is not open.
        """
        self.supervisor.check()
        return {} if self._follower is None else self._follower.follows()

    async def _ask(self, operation: Callable[..., T], *arguments: object) -> T:
        with self.supervisor.guarding():
            return await self._stack.ask(operation, self._number, *arguments)


def _version(forward: PortForward) -> int:
    """Return the version of IP that a forward's clients use."""
    return 4 if isinstance(forward.host, UnixSocket) else forward.host.version


def _check_privilege(forwards: Sequence[PortForward]) -> None:
    (start,) = sysctl.numbers(diagnosis.PORT_START)
    required = (each.host_port for each in forwards if not each.optional)
    low = next((port for port in required if 0 < port < start), None)
    if low is not None and not _may_bind_low_ports():
        raise diagnosis.privileged_port(low, "of the host", start)


def _may_bind_low_ports() -> bool:
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as file:
        effective = next(line.split()[1] for line in file if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> CAP_NET_BIND_SERVICE & 1)
