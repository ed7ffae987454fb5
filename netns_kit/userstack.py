"""UserStack: the user-mode stack as an object one enters."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import anyio
import anyio.lowlevel
from typing_extensions import Self

from .drivers import Driver, DriverName, driver_named
from .engine import Engine
from .errors import StackClosed
from .gateway import FlowInfo, Gateway
from .guard import Guard
from .stack import Limits
from .subnet import DEFAULT_CIDR, Subnet
from .tap import TapDevice
from .uplink import Uplink

T = TypeVar("T")


class UserStack:
    """A user-mode TCP/IP stack on a device, and the host's sockets behind it, for as long as the block is open.

    `tap` must be open.  If it lies in a namespace, that gets the subnet's guest address, a default route and its
    loopback brought up, unless `configure` is False.  `subnet` is a CIDR, see `Subnet`.  `driver` says where the
    stack runs: "thread", on one of its own (the default), or "loop", on the caller's event loop.

    Entering returns when the address is usable.  If the stack fails, or its device goes away, the block is
    cancelled and the error raised in its place: `DeviceGone`, or `StackCrashed` for a bug.  Leaving resets what is
    open and closes every socket.

    It is entered once.  Raises `AddressError` for a bad subnet and for an uplink whose addresses the host does not
    have, ValueError for an unknown driver, and what configuring the namespace raises.
    """

    def __init__(
        self,
        tap: TapDevice,
        uplink: Uplink | None = None,
        *,
        subnet: str = DEFAULT_CIDR,
        driver: DriverName = "thread",
        configure: bool = True,
        limits: Limits | None = None,
    ) -> None:
        self.tap = tap
        self.uplink = uplink or Uplink()
        self.subnet = Subnet.parse(subnet)
        self._driver_class = driver_named(driver)
        self._driver: Driver | None = None
        self._configure = configure
        self._limits = limits

    async def __aenter__(self) -> Self:
        if self._driver is not None:
            raise RuntimeError("a UserStack is entered once")
        self.uplink.check()
        self._engine = Engine()
        try:
            self.gateway = Gateway(self._engine, self.tap, self.uplink, self.subnet, limits=self._limits)
        except BaseException:
            self._engine.close()
            raise
        self._driver = driver = self._driver_class(self._engine)
        self._guard = Guard()
        await self._guard.__aenter__()
        try:
            self._guard.start_soon(driver.run)
            if self.tap.namespace is not None and self._configure:
                await self.tap.namespace.configure_link(
                    self.tap.name, address=self.subnet.guest, gateway=self.subnet.gateway
                )
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            await self._guard.__aexit__(exc_type, exc, tb)
        finally:
            try:
                self.gateway.close()
            finally:
                self._engine.close()

    async def flows(self) -> tuple[FlowInfo, ...]:
        """The flows under way."""
        return await self.call(lambda: self.gateway.flows())  # noqa: PLW0108 - there is none before entering

    async def stats(self) -> dict[str, int]:
        """Counters and gauges by name: tables, what was dropped and why, DNS."""
        return await self.call(lambda: self.gateway.stats())  # noqa: PLW0108 - the same

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread, between two steps.  For parts of this library.

        Raises what it raises, and `StackClosed` when the stack is not running.
        """
        if self._driver is None:
            raise StackClosed("the stack has not been entered")
        try:
            return await self._driver.call(function)
        except StackClosed:
            await anyio.lowlevel.checkpoint_if_cancelled()  # by what ended the stack: that is to be raised
            raise

    async def finish(self, function: Callable[[], object]) -> None:
        """As `call`, for cleaning up: not to be cancelled, and done also when the stack has stopped."""
        with anyio.CancelScope(shield=True):
            try:
                await self.call(function)
            except StackClosed:
                function()
