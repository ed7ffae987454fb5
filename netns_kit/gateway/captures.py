"""Captures: the frames of one stack as blocks of pcapng, for whoever asks for them while it runs.

A capture is asked for by its owner (`netns_kit.userstack.capture`), who hands over the ring that the blocks are put
into.  What it does is in `netns_kit.gateway.frame_capture`, which nobody else pays for.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from netns_kit.arguments import Address
from netns_kit.operations import chained, operation, same

from .capture_filter import CaptureFilter

if TYPE_CHECKING:
    from .frame_capture import FrameCapture
    from .gateway import Gateway


class Captures:
    """The captures of one stack.

    Args:
        gateway: The gateway whose frames are captured.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._running: dict[int, FrameCapture] = {}

    @operation(same)
    def begin(
        self, number: int, snaplen: int, where: CaptureFilter | None, mac: str = "", *, fds: Sequence[int]
    ) -> None:
        """Capture frames from now on.

        Args:
            number: The number of the capture.
            snaplen: The bytes that are kept of a frame at most.
            where: Which frames are kept; None: all.
            mac: The link address of the guest whose frames are kept; empty: those of all.
            fds: The memfd of a ring, and the eventfd that wakes its owner.  They are closed in the end.

        Raises:
            OSError: The ring cannot be mapped.
        """
        from .frame_capture import FrameCapture

        if len(fds) != 2:  # too many descriptors were on their way
            for fd in fds:
                os.close(fd)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        ring, wake = fds
        try:
            self._running[number] = FrameCapture(self._gateway, ring, wake, snaplen, where, mac)
        except BaseException:
            os.close(wake)
            raise
        finally:
            os.close(ring)

    @operation(chained)
    def unnamed(self, number: int) -> tuple[Address, ...]:
        """Return addresses of a capture's flows whose names this engine does not know."""
        found = self._running.get(number)
        return () if found is None else found.unnamed()

    @operation(chained)
    def named(self, number: int) -> tuple[tuple[Address, str], ...]:
        """Return addresses of a capture's flows, and the names that this engine knows."""
        found = self._running.get(number)
        return () if found is None else found.named()

    @operation(same)
    def comment(self, number: int, flow: int, text: str) -> None:
        """Comment on the next frame of a flow that is captured, if that flow is here."""
        if number in self._running:
            self._running[number].comment(flow, text)

    @operation(same)
    def end(self, number: int) -> None:
        """End a capture."""
        if number in self._running:
            self._running.pop(number).stop()

    def close(self) -> None:
        """End all captures."""
        for number in list(self._running):
            self.end(number)
