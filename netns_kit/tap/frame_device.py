"""Device: what a stack asks of whatever carries its frames, and wrappers that stand before one.

`netns_kit.tap.device.TapDevice` is a device.  A *wrapper* is a device too, and stands before another: what it does
not do itself, it has that one do (`DeviceWrapper`).  So a device that carries frames and nothing else pays for none
of what others do with frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from netns_kit.errors import NotImportable

if TYPE_CHECKING:
    from collections.abc import Generator

    from typing_extensions import Self

    from netns_kit.namespace.namespace import Namespace
    from netns_kit.stack.offloads import Offloads

VNET_HEADER = 10
"""Bytes of `struct virtio_net_hdr` without num_buffers."""
ETHERNET_HEADER = 14
FRAME_MAX = VNET_HEADER + ETHERNET_HEADER + 4 + 0xFFFF
"""No frame is longer, vnet header and VLAN tag included: the size of a buffer for `Device.read_into`."""


class TapCounters:
    """Counters of frames since a device was made, in the process that reads and writes them (see `Gateway.stats`).

    `received` and `sent` crossed the descriptor.  `dropped` found the queue full.  `refused` were not taken
    by the guest's kernel: its link is down or the frame is malformed.
    """

    __slots__ = ("dropped", "received", "refused", "sent")

    def __init__(self) -> None:
        self.received = self.sent = self.dropped = self.refused = 0


class Device(Protocol):
    """A link that carries Ethernet frames, each with its vnet header first if the link has those.

    It is opened when it is awaited or entered; see `TapDevice` for what its attributes are.
    """

    @property
    def name(self) -> str:
        """The interface's name in the guest."""

    @property
    def mtu(self) -> int:
        """The guest's, in bytes, without Ethernet header."""

    @property
    def mac(self) -> bytes | None:
        """The guest's hardware address, None where unknown."""

    @property
    def offloads(self) -> Offloads:
        """The work that a frame may leave to the other end."""

    @property
    def namespace(self) -> Namespace | None:
        """The namespace of the device, None for a descriptor that came ready-made."""

    @property
    def queues(self) -> tuple[Device, ...]:
        """The devices of its queues, itself the first."""

    @property
    def counters(self) -> TapCounters:
        """Counters of what has crossed the device, and what has not."""

    @property
    def deadline(self) -> float:
        """The time at which `advance` is due, on the caller's clock."""

    @property
    def backlog(self) -> bool:
        """True while frames wait for the descriptor to become writable; then call `flush`."""

    def fileno(self) -> int:
        """Return the descriptor to wait on.

        Raises:
            DeviceGone: The device is not open.
        """

    def read_into(self, buffer: memoryview | bytearray) -> int | None:
        """Read a frame; return its length, or None if there is none.

        Args:
            buffer: Where the frame is put.  A longer frame loses its end: give it `FRAME_MAX` bytes.

        Raises:
            DeviceGone: No frame will come any more.
        """

    def write(self, *buffers: bytes | bytearray | memoryview) -> bool:
        """Send a frame without blocking.  Return whether it was sent, or kept for `flush`.

        Args:
            buffers: The pieces of the frame.

        Raises:
            DeviceGone: The device takes no frames any more.
        """

    def flush(self) -> None:
        """Send what waits, until the device pushes back again.

        Raises:
            DeviceGone: The device takes no frames any more.
        """

    def advance(self, now: float) -> None:
        """Let time pass.  Afterwards call `read_into`: frames may have arrived.

        Args:
            now: The time on the caller's clock.
        """

    def at(self, fd: int) -> Device:
        """Return this device for another process; it can be pickled.

        Args:
            fd: The number of the descriptor there.

        Raises:
            NotImportable: The device would not be the same there.
        """

    def release(self) -> None:
        """Close the device: `close` for a program without an event loop.

        Raises:
            DeviceGone: Somebody else has closed the descriptor.
        """

    async def close(self) -> None:
        """Close the device, from any task.  Closing it again does nothing.

        Raises:
            DeviceGone: Other code has closed the descriptor.

        Cancellation: The device is closed: the call does not wait.
        """

    def __await__(self) -> Generator[Any, Any, Self]: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: object, error: object, trace: object) -> None: ...


class DeviceWrapper(Device):
    """A `Device` that stands before another, and does nothing of its own until a subclass has it do more."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.device!r}>"

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def mtu(self) -> int:
        return self.device.mtu

    @property
    def mac(self) -> bytes | None:
        return self.device.mac

    @property
    def offloads(self) -> Offloads:
        return self.device.offloads

    @property
    def namespace(self) -> Namespace | None:
        return self.device.namespace

    @property
    def queues(self) -> tuple[Device, ...]:
        return (self,)

    @property
    def counters(self) -> TapCounters:
        return self.device.counters

    @property
    def deadline(self) -> float:
        return self.device.deadline

    @property
    def backlog(self) -> bool:
        return self.device.backlog

    def fileno(self) -> int:
        return self.device.fileno()

    def read_into(self, buffer: memoryview | bytearray) -> int | None:
        return self.device.read_into(buffer)

    def write(self, *buffers: bytes | bytearray | memoryview) -> bool:
        return self.device.write(*buffers)

    def flush(self) -> None:
        self.device.flush()

    def advance(self, now: float) -> None:
        self.device.advance(now)

    def at(self, fd: int) -> Device:
        raise NotImportable(
            f"a worker process cannot have a {type(self).__name__}", fix='use driver="thread"'
        )

    def release(self) -> None:
        self.device.release()

    async def close(self) -> None:
        await self.device.close()

    def __await__(self) -> Generator[Any, Any, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        _ = await self.device.__aenter__()
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self.device.__aexit__(kind, error, trace)
