"""The forwarder: ports of the host that lead into the namespace.

`Forwarder` is what callers hold; the listeners live beside the engine, wherever that is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import count
from types import TracebackType
from typing import Protocol, TypeVar

import anyio
from typing_extensions import Self

from . import arguments, diagnosis, sysctl
from .control import PATIENCE, Control
from .errors import ArgumentTypeError, StackClosed
from .ports import PortForward, parse

CAP_NET_BIND_SERVICE = 10

T = TypeVar("T")
_numbers = count()


class Askable(Protocol):
    """What a forwarder needs of the stack it serves."""

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have the stack's `Control` do one of its operations, see `UserStack.ask`."""
        ...


class Forwarder:
    """Ports of the host that lead into the namespace, for as long as the block is open.

    async with Forwarder(stack) as forwarder:
        await forwarder.add("127.0.0.1:8080:80/tcp")
    """

    def __init__(self, stack: Askable) -> None:
        """Raises `ArgumentTypeError` for what is no stack."""
        if not callable(getattr(stack, "ask", None)):
            raise ArgumentTypeError("expected a UserStack", "stack", arguments.shown(stack))
        self._stack = stack
        self._number = next(_numbers)  # the listeners know whose they are
        self._open = False

    def __repr__(self) -> str:
        return f"<Forwarder of {self._stack!r}: {'open' if self._open else 'not open'}>"

    async def __aenter__(self) -> Self:
        self._open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._open = False
        with anyio.move_on_after(PATIENCE, shield=True), suppress(StackClosed):  # which closes them itself
            await self._stack.ask(Control.close_forwards, self._number)

    async def add(self, spec: str | PortForward) -> tuple[PortForward, ...]:
        """Listen as `spec` says (see `netns_kit.ports`), and return what is listening: a range's ports one by one.

        Either all of its ports listen, or none.  Raises `PortSpecError`; `PrivilegedPortError`, before anything is
        bound, for a port that needs a privilege; `PortInUseError`; `AddressError`; `ArgumentTypeError` for what is
        neither text nor a PortForward; OSError; `StackClosed` outside the block.  Cancelled, it may have been added.
        """
        forwards = (spec,) if isinstance(spec, PortForward) else parse(spec)
        for forward in forwards:
            _check_privilege(forward)
        if not self._open:
            raise StackClosed("the forwarder is not open: it forwards while its `async with` block lasts")
        return await self._stack.ask(Control.add_forwards, self._number, forwards)

    async def remove(self, forward: PortForward) -> None:
        """Stop listening on a port that `add` returned; it is free when this returns.

        TCP connections already made go on.  Raises `KeyError` if there is no such forward, `ArgumentTypeError` for
        what is none.
        """
        fix = "give what `add` returned, or one of `list`"
        arguments.instance("forward", forward, PortForward, "a PortForward", fix)
        if not await self._stack.ask(Control.remove_forward, self._number, forward):
            raise KeyError(forward)

    async def list(self) -> tuple[PortForward, ...]:
        """What is listening, oldest first."""
        return await self._stack.ask(Control.forwards, self._number)


def _check_privilege(forward: PortForward) -> None:
    (start,) = sysctl.numbers(diagnosis.PORT_START)
    if 0 < forward.host_port < start and not _may_bind_low_ports():
        raise diagnosis.privileged_port(forward.host_port, "of the host", start)


def _may_bind_low_ports() -> bool:
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as file:
        effective = next(line.split()[1] for line in file if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> CAP_NET_BIND_SERVICE & 1)
