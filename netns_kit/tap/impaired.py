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
"""Number of frames that one `ImpairedTap.read_into` reads at most: a flooding guest must not stop the engine."""


class ImpairedTap(DeviceWrapper):
    """A device behind a bad link in each direction.  It has the interface of the device, and opens and closes it.

    Frames move only in `advance`.  A frame that is read from the device or written enters its link at the next
    `advance`, which `deadline` asks for at once.  **After `advance` call `read_into`**, whether or not the descriptor
    is readable: frames may have arrived at the end of the link.

    `transmit` and `receive` are the links; they have counters.  The device is always read, because frames that are
    left in a readable descriptor would keep the engine awake.  A link drops what its queue cannot hold, as a router
    does.  vnet headers and Ethernet headers are never damaged.  With offloads one loss is a whole super-frame; a
    device without vnet header is closer to a cable.

    Args:
        device: The device that is read and written.
        transmit: The impairment of what is written.
        receive: The impairment of what is read.

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
        """Return this device for another process, behind links with the same impairments.

        Args:
            fd: The number of the descriptor there.

        Raises:
            NotImportable: The device would not be the same there.
        """
        return ImpairedTap(self.device.at(fd), self.transmit.impairment, self.receive.impairment)

    def read_into(self, buffer: memoryview | bytearray) -> int | None:
        """Read one frame that has passed its link; return its length, or None if there is none.

        If there is none, the frames that have arrived at the device are read into the link.

        Args:
            buffer: Where the frame is put.  A longer frame loses its end.

        Raises:
            DeviceGone: No frame will come any more.
        """
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
        """Put one frame into its link at the next `advance`.  Return True: the link tells nobody of its losses.

        Args:
            buffers: The pieces of the frame.
        """
        self._outward.append(b"".join(buffers))
        return True

    def advance(self, now: float) -> None:
        """Let time pass.  What was read or written since the last call enters the links.

        Frames that reach the end of their link are written to the device, or are ready for `read_into`.

        Args:
            now: The time on the caller's clock.

        Raises:
            DeviceGone: The device takes no frames any more.
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
        """The time at which `advance` is due; it is in the past if a frame waits to enter its link."""
        if self._arrived or self._inward or self._outward:
            return self._now
        return min(self.transmit.deadline, self.receive.deadline)
