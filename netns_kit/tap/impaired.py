"""ImpairedTap: a device behind a bad link in each direction."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from netns_kit.errors import ArgumentError

from .frame_device import ETHERNET_HEADER, FRAME_MAX, Device, DeviceWrapper
from .impairment import BadLink, Impairment

if TYPE_CHECKING:
    from typing_extensions import Self

READS = 64
"""How often the device is read for one `ImpairedTap.read_into`: a flooding guest must not hold the engine."""


class ImpairedTap(DeviceWrapper):
    """A device behind one `BadLink` per direction; it looks like the device, opens and closes it.

    Nothing moves but by `advance`: a frame that is read or written asks for it at once, by a `deadline` in the past,
    and enters its link then.  **After `advance` call `read_into`**, whether or not the descriptor is readable: frames
    that were under way may have arrived.

    `transmit` and `receive` are the links, for their counters.  The device is always read, and a link drops what its
    queue cannot hold, as a router does: frames left in a readable descriptor would keep the engine awake.  Neither a
    vnet header nor an Ethernet header is damaged.  With offloads one loss is a whole super-frame: a device without
    vnet header is closer to a cable.

    Args:
        device: The device that is read and written.
        transmit: The link for what is written.
        receive: The link for what is read.
    Raises:
        ArgumentError: The device has several queues.
    """

    def __init__(self, device: Device, transmit: Impairment, receive: Impairment) -> None:
        if len(device.queues) > 1:
            raise ArgumentError("expected 1 for an impaired link", "queues", len(device.queues))
        super().__init__(device)
        self.transmit = BadLink(transmit)
        self.receive = BadLink(receive)
        self._inward: list[bytes] = []  # read, but not yet in the link...
        self._outward: list[bytes] = []  # ...written, likewise...
        self._arrived: deque[bytes] = deque()  # ...and through it
        self._scratch = bytearray(FRAME_MAX)
        self._now = 0.0
        self._protect_headers()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._protect_headers()
        return self

    def _protect_headers(self) -> None:
        size = self.offloads.vnet_header + ETHERNET_HEADER
        self.transmit.protect = self.receive.protect = size

    def at(self, fd: int) -> ImpairedTap:
        """Return this device for another process, behind links of the same impairments."""
        return ImpairedTap(self.device.at(fd), self.transmit.impairment, self.receive.impairment)

    def read_into(self, buffer: memoryview | bytearray) -> int | None:
        """Read one frame that has come through its link; read what has come to the device into that link."""
        if self._arrived:
            frame = self._arrived.popleft()
            length = min(len(frame), len(buffer))
            buffer[:length] = frame[:length]
            return length
        for _ in range(READS):
            size = self.device.read_into(self._scratch)
            if size is None:
                break
            self._inward.append(bytes(memoryview(self._scratch)[:size]))
        return None

    def write(self, *buffers: bytes | bytearray | memoryview) -> bool:
        """Put one frame into its link, by the next `advance`.  Always True: nobody is told of what a link loses."""
        self._outward.append(b"".join(buffers))
        return True

    def advance(self, now: float) -> None:
        """Let time pass until `now`, when what was read and written meanwhile enters the links.

        Frames due are written to the device or ready for `read_into`.
        """
        self._now = now
        inward, self._inward = self._inward, []
        outward, self._outward = self._outward, []
        for frame in inward:
            self.receive.send(frame, now)
        for frame in outward:
            self.transmit.send(frame, now)
        self._arrived.extend(self.receive.receive(now))
        for frame in self.transmit.receive(now):
            self.device.write(frame)

    @property
    def deadline(self) -> float:
        """When `advance` is wanted next: at once, if a frame waits for it."""
        if self._arrived or self._inward or self._outward:
            return self._now
        return min(self.transmit.deadline, self.receive.deadline)
