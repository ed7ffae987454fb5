"""The forwarder: ports of the host that lead into the namespace.

`Forwarder` is the caller's object.  The listeners are beside the engine, in whatever thread or process that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count, groupby
from typing import Protocol, TypeVar

import anyio

from netns_kit import arguments
from netns_kit.errors import ArgumentTypeError, NetnsKitError, NotFound, StackClosed
from netns_kit.host import diagnosis, sysctl
from netns_kit.host.abi import CAP_NET_BIND_SERVICE
from netns_kit.namespace.background import Openable, Supervisor
from netns_kit.namespace.given import HasFileno

from .handed import Handed
from .listeners import Forwards
from .ports import PortForward, parse

AT_ONCE = 256  # ports that are added between two steps of the engine

CLOSING_SECONDS = 2.0  # for an engine that does not answer; the listeners then end with the stack

T = TypeVar("T")
_numbers = count()


class Askable(Protocol):
    """A stack as a forwarder needs it: a `UserStack` is one."""

    supervisor: Supervisor
    """The stack's life: whether it is open, and what it failed with.  For parts of the library."""

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
        self._handed = Handed()
        self.supervisor = Supervisor(type(self).__name__, StackClosed, stack.supervisor)

    def __repr__(self) -> str:
        return f"<Forwarder of {self._stack!r}: {self.supervisor.condition}>"

    async def _open(self) -> None:
        self._stack.supervisor.check()

    async def _close(self) -> None:
        self._handed.close()
        # a stack that has ended has closed them itself
        with anyio.move_on_after(CLOSING_SECONDS, shield=True), suppress(NetnsKitError):
            await self._stack.ask(Forwards.remove_all, self._number)

    async def add(self, *specs: str | PortForward) -> tuple[PortForward, ...]:
        """Listen on ports, and return one forward for each; a range has several.  Either all listen or none.

        Args:
            specs: The ports, as text (see `netns_kit.forwarder.ports`) or as `PortForward` objects.

        Raises:
            PortSpecError, ArgumentError: A specification cannot be understood.
            PrivilegedPortError: A port needs a privilege; raised before anything is bound.
            PortInUseError: Another socket has the port.
            AddressError: The host has no such address, or the namespace cannot have the one inside.
            ArgumentTypeError: An argument is neither text nor a PortForward.
            StackClosed: The forwarder is not open.
            OSError: Listening failed otherwise.

        Cancellation: The ports may have been added; `list` shows them.
        """
        forwards = [
            forward
            for spec in specs
            for forward in ((spec,) if isinstance(spec, PortForward) else parse(spec))
        ]
        _check_privilege(forwards)
        added: list[PortForward] = []
        try:
            for _, alike in groupby(forwards, _is_handed):
                group = tuple(alike)
                for start in range(0, len(group), AT_ONCE):
                    added += await self._listen(group[start : start + AT_ONCE])
        except Exception:
            for forward in added:
                await self._stop(forward)
            raise
        return tuple(added)

    async def _listen(self, forwards: tuple[PortForward, ...]) -> tuple[PortForward, ...]:
        if not _is_handed(forwards[0]):
            return await self._ask(Forwards.add, forwards)
        with self.supervisor.guarding():
            return self._handed.add(forwards)

    async def _stop(self, forward: PortForward) -> bool:
        return self._handed.remove(forward) or await self._ask(Forwards.remove, forward)

    async def remove(self, forward: PortForward) -> None:
        """Stop listening on a port.  It is free when this returns; TCP connections that exist go on.

        A command that has the socket itself, which is mode "fd", keeps that, and the port with it.

        Args:
            forward: What `add` returned, or one of `list`.

        Raises:
            NotFound: There is no such forward.
            ArgumentTypeError: The argument is no PortForward.
            StackClosed: The forwarder is not open.

        Cancellation: The port may have been freed.
        """
        fix = "give what `add` returned, or one of `list`"
        arguments.instance("forward", forward, PortForward, "a PortForward", fix)
        if not await self._stop(forward):
            raise NotFound(f"there is no forward {forward}", fix=fix)

    async def list(self) -> tuple[PortForward, ...]:
        """Return the forwards that are listening, oldest first; those of mode "fd" are the last.

        Raises:
            StackClosed: The forwarder is not open.

        Cancellation: Nothing is changed.
        """
        return (*await self._ask(Forwards.list), *self._handed.list())

    def sockets(self) -> tuple[tuple[str, HasFileno], ...]:
        """Return the sockets of the forwards of mode "fd", oldest first, each with a name like "80/tcp".

        They are what a command is given by `listen`, see `CommandOptions`:

            await net.popen(["server"], listen=net.forwarder.sockets())

        They stay the forwarder's, which closes them.
        """
        return self._handed.named()

    async def _ask(self, operation: Callable[..., T], *arguments: object) -> T:
        with self.supervisor.guarding():
            return await self._stack.ask(operation, self._number, *arguments)


def _is_handed(forward: PortForward) -> bool:
    return forward.mode == "fd"


def _check_privilege(forwards: Sequence[PortForward]) -> None:
    (start,) = sysctl.numbers(diagnosis.PORT_START)
    low = next((each.host_port for each in forwards if 0 < each.host_port < start), None)
    if low is not None and not _may_bind_low_ports():
        raise diagnosis.privileged_port(low, "of the host", start)


def _may_bind_low_ports() -> bool:
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as file:
        effective = next(line.split()[1] for line in file if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> CAP_NET_BIND_SERVICE & 1)
