"""The forwarder: ports of the host that lead into the namespace.

`Forwarder` is the caller's object.  The listeners are beside the engine, in whatever thread or process that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from types import NoneType
from typing import Protocol, TypeVar

import anyio

from netns_kit import arguments
from netns_kit.errors import ArgumentError, ArgumentTypeError, NetnsKitError, NotFound, StackClosed
from netns_kit.host import diagnosis, sysctl
from netns_kit.host.abi import CAP_NET_BIND_SERVICE
from netns_kit.namespace.background import Openable, Supervisor
from netns_kit.namespace.namespace import Namespace
from netns_kit.subnet import Subnet

from .follow import Follower
from .listeners import Forwards
from .ports import Follow, PortForward, parse

AT_ONCE = 256  # ports that are added between two steps of the engine

CLOSING_SECONDS = 2.0  # for an engine that does not answer; the listeners then end with the stack

T = TypeVar("T")
_numbers = count()


class Askable(Protocol):
    """A stack as a forwarder needs it: a `UserStack` is one."""

    supervisor: Supervisor
    """The stack's life: whether it is open, and what it failed with.  For parts of the library."""

    @property
    def subnet(self) -> Subnet:
        """The addresses of the namespace."""
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
        namespace: The `Namespace` that the stack serves; without it no rule can follow what listens there.

    Raises:
        ArgumentTypeError: An argument has another type.
        StackClosed: On opening, if the stack is not open.
    """

    def __init__(self, stack: Askable, namespace: Namespace | None = None) -> None:
        if not callable(getattr(stack, "ask", None)):
            raise ArgumentTypeError("expected a UserStack", "stack", arguments.shown(stack))
        arguments.instance("namespace", namespace, (Namespace, NoneType), "a Namespace, or None")
        self._namespace = namespace
        self._follower: Follower | None = None
        self._stack = stack
        self._number = next(_numbers)  # by which its listeners are known
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
            await self._stack.ask(Forwards.remove_all, self._number)

    async def add(self, *specs: str | PortForward | Follow) -> tuple[PortForward, ...]:
        """Listen on ports, and return one forward for each; a range has several.  Either all listen or none.

        A `Follow` is a rule: from now on each port that is listened on inside is forwarded within a second, until
        it is listened on no more.  What is returned has the forwards that the rule has made at once.  A port that the
        host does not give is logged once, and tried again.  One rule forwards 1024 ports at most.

        Args:
            specs: The ports, as text (see `netns_kit.forwarder.ports`) or as `PortForward` and `Follow` objects.

        Raises:
            PortSpecError, ArgumentError: A specification cannot be understood, or used here.
            PrivilegedPortError: A port needs a privilege; raised before anything is bound.
            PortInUseError: Another socket has the port.
            AddressError: The host has no such address, or the namespace cannot have the one inside.
            ArgumentTypeError: An argument is neither text nor a PortForward or Follow.
            FeatureUnavailable: The kernel does not tell what listens.
            NamespaceGone, StackClosed: The forwarder is not open.
            OSError: Listening failed otherwise.

        Cancellation: The ports may have been added; `list` and `follows` show them.
        """
        asked = [
            each
            for spec in specs
            for each in ((spec,) if isinstance(spec, PortForward | Follow) else parse(spec))
        ]
        forwards = [each for each in asked if isinstance(each, PortForward)]
        follows = [each for each in asked if isinstance(each, Follow)]
        _check_privilege(forwards)
        follower = self._following() if follows else None
        added: list[PortForward] = []
        followed: list[Follow] = []
        try:
            for start in range(0, len(forwards), AT_ONCE):
                added += await self._ask(Forwards.add, tuple(forwards[start : start + AT_ONCE]))
            for follow in follows:
                if follower is not None and follow not in follower.follows():
                    with self.supervisor.guarding():
                        added += await follower.add(follow)
                    followed.append(follow)
        except Exception:
            undone: list[PortForward | Follow] = [*followed, *added]
            for each in undone:
                with suppress(NotFound):  # the forward of a rule
                    await self.remove(each)
            raise
        if follower is not None and not follower.is_running:
            follower.is_running = True
            self.supervisor.start(follower.run)
        return tuple(added)

    def _following(self) -> Follower:
        if self._namespace is None:
            fix = "make it with its namespace: Forwarder(stack, namespace)"
            raise ArgumentError(
                "expected a Forwarder that knows what listens inside", "auto", repr(self), fix
            )
        if self._follower is None:
            ask, number = self._stack.ask, self._number
            self._follower = Follower(
                self._namespace,
                lambda: self._stack.subnet,
                tuple,
                _check_privilege,
                lambda forwards: ask(Forwards.add, number, forwards),
                lambda forward: ask(Forwards.remove, number, forward),
            )
        return self._follower

    async def remove(self, forward: PortForward | Follow) -> None:
        """Stop listening on a port.  It is free when this returns; TCP connections that exist go on.

        A rule ends with all forwards that it has made.  One of them, removed alone, stays away for as long as its
        port is listened on inside.

        Args:
            forward: What `add` was given or has returned, one of `list`, or of `follows`.

        Raises:
            NotFound: There is no such forward.
            ArgumentTypeError: The argument is neither a PortForward nor a Follow.
            StackClosed: The forwarder is not open.

        Cancellation: The port may have been freed.
        """
        fix = "give what `add` returned, or one of `list`"
        arguments.instance("forward", forward, (PortForward, Follow), "a PortForward or a Follow", fix)
        if isinstance(forward, PortForward):
            found = await self._ask(Forwards.remove, forward)
        else:
            with self.supervisor.guarding():
                found = self._follower is not None and await self._follower.remove(forward)
        if not found:
            raise NotFound(f"there is no forward {forward}", fix=fix)

    async def list(self) -> tuple[PortForward, ...]:
        """Return the forwards that are listening, oldest first; also those that rules have made.

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


def _check_privilege(forwards: Sequence[PortForward]) -> None:
    (start,) = sysctl.numbers(diagnosis.PORT_START)
    low = next((each.host_port for each in forwards if 0 < each.host_port < start), None)
    if low is not None and not _may_bind_low_ports():
        raise diagnosis.privileged_port(low, "of the host", start)


def _may_bind_low_ports() -> bool:
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as file:
        effective = next(line.split()[1] for line in file if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> CAP_NET_BIND_SERVICE & 1)
