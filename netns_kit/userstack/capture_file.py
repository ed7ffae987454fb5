"""Files of a capture: whole blocks of pcapng, written past the page cache where the file system can.

On a disk, copying a frame into the page cache takes several times what carrying the frame does.  So long pieces are
written directly (O_DIRECT) from the ring's memory, as long as the disk can follow that costs next to nothing.  The
kernel demands that memory, file offset and length are multiples of `BLOCK`: what stands before and behind is written
as usual, and memory that does not fit is copied.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from netns_kit.tap import pcapng

BLOCK = 4096
DIRECT_LEAST = 1 << 18  # bytes of a piece that is worth it
_COPIED = 1 << 20  # bytes that are copied at a time


class CaptureFile:
    """A file that blocks are written to.

    Args:
        target: The path of a file that is made or emptied; or a file that is open for bytes, which stays open.

    Raises:
        OSError: The file cannot be opened.

    Opening blocks if the path is a pipe that nobody reads.
    """

    def __init__(self, target: str | os.PathLike[str] | BinaryIO) -> None:
        self.size = 0
        """Bytes that were written."""
        self._direct: int | None = None
        self._room: mmap.mmap | None = None
        self._is_ours = isinstance(target, str | os.PathLike)
        self._file: Any = target
        self._keeps_nothing = self._is_ours or isinstance(target, io.RawIOBase | io.BufferedIOBase)
        if isinstance(target, str | os.PathLike):
            self._file = io.FileIO(target, "w")
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                with suppress(OSError):  # the file system has no such way
                    self._direct = os.open(target, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)

    def write(self, pieces: Sequence[memoryview], at: int = 1) -> None:
        """Write whole blocks.  If that fails, cut what is written of a block, where that is possible.

        Args:
            pieces: The blocks, in one piece or two.
            at: The address of the first piece in memory, modulo `BLOCK`.  The second has the address 0.

        Raises:
            OSError: The file cannot be written.
        """
        began = self.size
        try:
            for piece in pieces:
                if self._direct is not None and len(piece) >= DIRECT_LEAST:
                    self._write_directly(piece, at)
                else:
                    self._write(piece)
                at = 0
        except OSError:
            whole = pcapng.whole_blocks(pieces, self.size - began) or 0
            with suppress(OSError, AttributeError, ValueError):
                self._file.seek(began + whole - self.size, os.SEEK_CUR)
                self._file.truncate()
                self.size = began + whole
            raise

    def _write(self, view: memoryview) -> None:
        while len(view):
            taken = self._file.write(view if self._keeps_nothing else bytes(view))
            if taken is None:  # it does not block, and is full
                raise BlockingIOError("the file takes nothing")
            self.size += taken
            view = view[taken:]

    def _write_directly(self, piece: memoryview, at: int) -> None:
        """Write a piece, most of it past the page cache."""
        done = -self.size % BLOCK
        self._write(piece[:done])
        end = len(piece) - (len(piece) - done) % BLOCK
        fits = (at + done) % BLOCK == 0
        while done < end and self._direct is not None:
            part = piece[done:end] if fits else self._copied(piece[done:end])
            try:
                taken = os.pwrite(self._direct, part, self.size)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                taken = 0  # the file system wants it otherwise
            if taken % BLOCK or not taken:
                os.close(self._direct)
                self._direct = None
            self._file.seek(taken, os.SEEK_CUR)
            self.size += taken
            done += taken
        self._write(piece[done:])

    def _copied(self, piece: memoryview) -> memoryview:
        """Return the beginning of a piece in memory that has an address which fits."""
        if self._room is None:
            self._room = mmap.mmap(-1, _COPIED)
        part = piece[:_COPIED]
        self._room[: len(part)] = part
        return memoryview(self._room)[: len(part)]

    def close(self) -> None:
        """Close the file if it is ours, and have it written if it is not.

        Raises:
            OSError: It cannot be.
        """
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None
        if self._is_ours:
            self._file.close()
        else:
            flush = getattr(self._file, "flush", None)
            if flush is not None:
                flush()


class KeptBlocks:
    """Memory that has the last blocks of a capture.

    Args:
        room: The bytes that are kept at most.
        piece: The bytes of a write at most.
    """

    def __init__(self, room: int, piece: int) -> None:
        self.size = 0
        """Bytes that were ever written."""
        self.piece = piece
        self._memory = memoryview(bytearray(room))
        self._ends: list[int] = [0]  # where a block begins, oldest first: at each write

    def write(self, pieces: Sequence[memoryview], _: int = 0) -> None:
        """Keep whole blocks, and forget the oldest."""
        memory, room = self._memory, len(self._memory)
        for piece in pieces:
            begin = self.size % room
            fits = min(len(piece), room - begin)
            memory[begin : begin + fits] = piece[:fits]
            memory[: len(piece) - fits] = piece[fits:]
            self.size += len(piece)
        self._ends.append(self.size)
        oldest = self.size - room
        if self._ends[0] < oldest:
            self._ends = [each for each in self._ends if each >= oldest]

    def blocks(self) -> bytes:
        """Return what is kept."""
        memory, room = self._memory, len(self._memory)
        begin, size = self._ends[0] % room, self.size - self._ends[0]
        fits = min(size, room - begin)
        return bytes(memory[begin : begin + fits]) + bytes(memory[: size - fits])

    def close(self) -> None:
        """Keep what is kept: it can still be asked for."""
