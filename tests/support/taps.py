"""A stack on a pair of devices, whose guest is whoever writes its frames."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from netns_kit import TapDevice, Uplink, UserStack
from netns_kit.gateway.setup import DriverName
from netns_kit.stack.wire import ethernet
from tests.support.packets import GATEWAY_MAC, GUEST_MAC

ELSEWHERE = bytes((203, 0, 113, 9))


@asynccontextmanager
async def stack_of(
    driver: DriverName, uplink: Uplink | None = None, **options: Any
) -> AsyncIterator[tuple[UserStack, TapDevice]]:
    """The stack, and the guest's device."""
    guest, host = TapDevice.pair(vnet_header=False)
    async with guest, host, UserStack(host, uplink, driver=driver, **options) as stack:
        yield stack, guest


def send(guest: TapDevice, packet: bytes) -> None:
    """Send a packet of the guest's."""
    assert guest.write(ethernet.pack(GATEWAY_MAC, GUEST_MAC, ethernet.IPV4), packet)
