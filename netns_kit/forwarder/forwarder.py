"""The forwarder: ports of the host that lead into the namespace.

`Forwarder` is what callers hold; the listeners live beside the engine, wherever that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Protocol, TypeVar

import anyio

from netns_kit import arguments
from netns_kit.errors import ArgumentTypeError, NetnsKitError, NotFound, StackClosed
from netns_kit.host import diagnosis, sysctl
from netns_kit.namespace.background import Openable, Supervisor

from .ports import PortForward, parse

CAP_NET_BIND_SERVICE = 10
AT_ONCE = 256  # ports that are added between two steps of the engine, which others wait for

PATIENCE = (
    2.0  # seconds that closing waits for an engine that does not answer: what is left ends with the stack
)

T = TypeVar("T")
_numbers = count()


class Operations(Protocol):
    """Operations of the stack by which a forwarder works, for `ask`; `owner` tells forwarders apart."""

    def add_forwards(self, owner: int, forwards: tuple[PortForward, ...]) -> tuple[PortForward, ...]: ...
    def remove_forward(self, owner: int, forward: PortForward) -> bool: ...
    def forwards(self, owner: int) -> tuple[PortForward, ...]: ...
    def close_forwards(self, owner: int) -> None: ...


class Askable(Protocol):
    """What a forwarder needs of the stack it serves."""

    supervisor: Supervisor

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have the stack do the operation of that name, see `UserStack.ask`."""
        ...


class Forwarder(Openable):
    """Ports of the host that lead into the namespace, for as long as it is open.

        async with Forwarder(stack) as forwarder:
            await forwarder.add("127.0.0.1:8080:80/tcp")

    Closing frees the ports; TCP connections already made go on.  What fails the stack fails its forwarders.

    Args:
        stack: The `UserStack` that the connections enter.

    Raises:
        StackClosed: On opening, if the stack is not open.
    """

    def __init__(self, stack: Askable) -> None:
        """Raises `ArgumentTypeError` for what is no stack."""
        if not callable(getattr(stack, "ask", None)):
            raise ArgumentTypeError("expected a UserStack", "stack", arguments.shown(stack))
        self._stack = stack
        self._number = next(_numbers)  # the listeners know whose they are
        self.supervisor = Supervisor(type(self).__name__, StackClosed, stack.supervisor)

    def __repr__(self) -> str:
        return f"<Forwarder of {self._stack!r}: {self.supervisor.condition}>"

    async def _open(self) -> None:
        self._stack.supervisor.check()

    async def _close(self) -> None:
        # a stack that has ended has closed them itself
        with anyio.move_on_after(PATIENCE, shield=True), suppress(NetnsKitError):
            await self._stack.ask(Operations.close_forwards, self._number)

    async def add(self, *specs: str | PortForward) -> tuple[PortForward, ...]:
        """Listen as `specs` say (see `ports`), and return what is listening: a range's ports one by one.

        Either all of the ports listen, or none.  Raises `PortSpecError`; `PrivilegedPortError`, before anything is
        bound, for a port that needs a privilege; `PortInUseError`; `AddressError`; `ArgumentTypeError` for what is
        neither text nor a PortForward; OSError; `StackClosed` when it is not open.  Cancelled, it may have been
        added.
        """
        forwards = [
            forward
            for spec in specs
            for forward in ((spec,) if isinstance(spec, PortForward) else parse(spec))
        ]
        _check_privilege(forwards)
        added: list[PortForward] = []
        try:
            for start in range(0, len(forwards), AT_ONCE):
                added += await self._ask(Operations.add_forwards, tuple(forwards[start : start + AT_ONCE]))
        except Exception:
            for forward in added:
                await self._ask(Operations.remove_forward, forward)
            raise
        return tuple(added)

    async def remove(self, forward: PortForward) -> None:
        """Stop listening on a port that `add` returned; it is free when this returns.

        TCP connections already made go on.  Raises `NotFound`, a KeyError, if there is no such forward,
        `ArgumentTypeError` for what is none.
        """
        fix = "give what `add` returned, or one of `list`"
        arguments.instance("forward", forward, PortForward, "a PortForward", fix)
        if not await self._ask(Operations.remove_forward, forward):
            raise NotFound(f"there is no forward {forward}", fix=fix)

    async def list(self) -> tuple[PortForward, ...]:
        """What is listening, oldest first."""
        return await self._ask(Operations.forwards)

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
