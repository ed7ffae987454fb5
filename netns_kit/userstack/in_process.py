"""LocalStack: engine, gateway and control in this process, on a driver.

It is one of the two things that `UserStack` may hold, the other being `Workers`; they are used alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from netns_kit.dhcp import DhcpSettings
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.stack import Limits
from netns_kit.subnet import Subnet
from netns_kit.tap.frame_device import Device
from netns_kit.uplink.uplink import Uplink

from .control import Control
from .drivers import Driver, LocalDriverName, driver_named

T = TypeVar("T")


class LocalStack:
    """`news` is called on the event loop, with the number of a subscriber that has events to take."""

    sandbox: Mapping[str, str] = {}  # it is not to be had for a part of a process

    def __init__(
        self,
        driver: LocalDriverName,
        tap: Device,
        uplink: Uplink,
        subnet: Subnet,
        limits: Limits | None,
        dhcp: DhcpSettings | None,
        news: Callable[[int], None],
    ) -> None:
        """Raises what a `Gateway` does; nothing is left open then."""
        self._engine = Engine()
        try:
            self.gateway = Gateway(self._engine, tap, uplink, subnet, limits=limits, dhcp=dhcp)
        except BaseException:
            self._engine.close()
            raise
        self._driver: Driver = driver_named(driver)(self._engine)
        self._control = Control(self.gateway, lambda number: self._driver.post(partial(news, number)))

    async def run(self) -> None:
        """Drive it.  Raises what ends it."""
        await self._driver.run()

    async def ready(self) -> None:
        """It is, at once."""

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` between two steps, see `Driver.call`."""
        return await self._driver.call(function)

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have `Control` do it.  Raises what it raises, and `StackClosed`."""
        return await self._driver.call(lambda: getattr(self._control, operation.__name__)(*arguments))

    async def close(self) -> None:
        """End what `run` has left when it ended."""
        self._driver.finish(self._end)

    def _end(self) -> None:
        try:
            self._control.close()
        finally:
            self._engine.close()
