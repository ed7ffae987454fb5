"""FrameRing: memory that an engine puts blocks into, and that a thread of the owner writes to a file.

The memory is a memfd, so that a worker can have its end of it.  The engine never waits: a block for which there is no
room is dropped and counted.  Nothing is copied but once into the ring, and from there by write(2).

The first page has counters.  Each is written by one side only:

    head      bytes that were put into the ring, ever       engine
    seen      frames that have crossed the device           engine
    accepted  frames that were to be captured               engine
    lost      accepted frames that were dropped             engine
    tail      bytes that were taken out, ever               owner
    stopping  1: nothing more is wanted                     owner
    asleep    1: wake the owner when there is much to do    both

The engine may be a worker that hostile packets have taken over.  So the size of the memfd is sealed, since reading
past its end would kill the owner, and whatever the counters say, the owner reads inside the ring.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from _thread import allocate_lock
from collections.abc import Sequence
from contextlib import suppress

PAGE = 4096
HEAD, SEEN, ACCEPTED, LOST, TAIL, STOPPING, ASLEEP = range(7)
_COUNTERS = 7
_SMALL = 2048  # bytes that are joined sooner than copied piece by piece
RING_SIZE = 16 << 20
"""Bytes of a ring: what a fast link brings in some 10 ms."""


class FrameRing:
    """One end of a ring.  Closing it unmaps the memory.

    Args:
        fd: The memfd, which stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self.size = len(self._map) - PAGE
        self._whole = memoryview(self._map)
        self.counters = self._whole[: 8 * _COUNTERS].cast("Q")
        self._data = self._whole[PAGE:]
        self._head = self._tail = self.counters[HEAD]
        self._much = self.size // 4
        self._fence = allocate_lock()
        self._fence.acquire()

    @staticmethod
    def make(size: int = RING_SIZE) -> int:
        """Return a memfd for a new ring, which no child inherits.

        Raises:
            OSError: The kernel has no room for it.
        """
        fd = os.memfd_create("netns_kit capture", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, PAGE + size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return fd

    # -- the engine's end -----------------------------------------------------------------------------

    def put(self, size: int, *parts: bytes | bytearray | memoryview) -> bool:
        """Put bytes into the ring, and return whether there was room.  The owner sees them after `publish`.

        Args:
            size: The length of all parts together.
            parts: The bytes.
        """
        head = self._head
        if head + size - self._tail > self.size:
            self._tail = self.counters[TAIL]
            if head + size - self._tail > self.size:
                return False
        at = head % self.size
        data = self._data
        if at + size <= self.size and size < _SMALL:
            data[at : at + size] = b"".join(parts)
        elif at + size <= self.size:
            for part in parts:
                data[at : (at := at + len(part))] = part
        else:
            text = b"".join(parts)
            first = self.size - at
            data[at:] = text[:first]
            data[: size - first] = text[first:]
        self._head = head + size
        return True

    def publish(self, seen: int, accepted: int, lost: int) -> bool:
        """Let the owner see what was put in, and the counters.  Return whether it must be woken.

        That is when a quarter of the ring is full.  A disk takes much at a time with less work than little.

        Args:
            seen: The frames that have crossed the device.
            accepted: Those that were to be captured.
            lost: Those of them that were dropped.
        """
        counters = self.counters
        if counters[SEEN] != seen:
            counters[SEEN], counters[ACCEPTED], counters[LOST] = seen, accepted, lost
        if counters[HEAD] != self._head:
            # a fence: on some machines the owner would see the new head before the bytes
            self._fence.release()
            self._fence.acquire()
            counters[HEAD] = self._head
            if self._head - self._tail > self._much and counters[ASLEEP]:
                self._tail = counters[TAIL]
                if self._head - self._tail > self._much:
                    counters[ASLEEP] = 0
                    return True
        return False

    # -- the owner's end ------------------------------------------------------------------------------

    def start_at(self, count: int) -> None:
        """Count as if so many bytes had been put in and taken out.  The engine's end is not made yet.

        So bytes have the same place in the ring and in the file, modulo the size of a page.
        """
        self._tail = count
        self.counters[HEAD] = self.counters[TAIL] = count

    @property
    def at(self) -> int:
        """The address in a page of what is taken out next."""
        return self._tail % self.size % PAGE

    def waiting(self) -> list[memoryview]:
        """Return what was published and not taken yet, in one piece or two.

        Raises:
            ValueError: The counters make no sense.
        """
        count = self.counters[HEAD] - self._tail
        if not 0 <= count <= self.size:
            raise ValueError(f"{count} bytes in a ring of {self.size}")
        at = self._tail % self.size
        first = min(count, self.size - at)
        pieces = [self._data[at : at + first], self._data[: count - first]]
        return [piece for piece in pieces if len(piece)]

    def take(self, count: int) -> None:
        """Give so many bytes back to the engine."""
        self._tail += count
        self.counters[TAIL] = self._tail

    def count(self, which: Sequence[int]) -> list[int]:
        """Return counters."""
        return [self.counters[each] for each in which]

    def close(self) -> None:
        """Unmap the memory.  Calling it again is allowed."""
        self.counters.release()
        self._data.release()
        self._whole.release()
        # an error that somebody keeps has a view of it: its end unmaps the memory
        with suppress(BufferError):
            self._map.close()
