"""Channel: whole messages with descriptors over one end of a SOCK_SEQPACKET pair, of any length, never blocking.

A message is text, JSON or a pickle, where white space at the end means nothing.  It travels in records of `RECORD`
bytes, the last of which is shorter; so a text that would end with a whole record gets a space more.  What the socket
does not take waits in a queue for `flush`.

Descriptors come with the record that they were sent with.  The receiver says how many it has room for; a record with
more is an error, and they are closed.
"""

from __future__ import annotations

import errno
import os
import socket
from array import array
from collections import deque
from contextlib import suppress

# as type checkers know it: the agent imports this, and `typing` takes longer than all else
TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Sequence

RECORD = 32768
MESSAGE_MAX = 8 << 20  # bytes: a table of 20,000 flows takes two
RECORDS_AT_ONCE = 64
LAST_SECONDS = 1.0
_FD_SIZE = array("i").itemsize


def records(message: bytes) -> list[bytes]:
    """Split a message into the records that it travels in."""
    if len(message) % RECORD == 0:
        message += b" "
    return [message[start : start + RECORD] for start in range(0, len(message), RECORD)]


def send_record(sock: socket.socket, record: bytes, fds: Sequence[int] = ()) -> None:
    """Send one record, at once or not at all.  Raises OSError: BlockingIOError if the queue is full."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    sock.sendmsg([record], rights, socket.MSG_NOSIGNAL)


def receive_record(sock: socket.socket, room: int) -> tuple[bytes, list[int], bool]:
    """Take one record and its descriptors, and whether that is all: neither was there more text nor more descriptors.

    The descriptors are the caller's to close, and no child inherits them.  Raises OSError: BlockingIOError if there
    is no record yet.
    """
    space = socket.CMSG_LEN(room * _FD_SIZE)
    data, ancillary, flags, _ = sock.recvmsg(RECORD, space, socket.MSG_CMSG_CLOEXEC)
    fds = array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % _FD_SIZE])
    return data, fds.tolist(), not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


class Channel:
    """Owns its socket.  `ended`: the other end has gone, and all it said has been received."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.ended = False
        self._waiting: deque[tuple[bytes, Sequence[int]]] = deque()
        self._parts: list[bytes] = []
        self._fds: list[int] = []

    def fileno(self) -> int:
        """Return the descriptor to wait on; it is negative when the channel is closed."""
        return self.socket.fileno()

    @property
    def backlog(self) -> bool:
        """Whether something waits for the descriptor to become writable; then call `flush`."""
        return bool(self._waiting)

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message as soon as the socket takes it.

        Args:
            message: The message.
            fds: Descriptors that go with it; they are closed here when it has been sent, or cannot be.  Where the
                kernel has no room for descriptors on their way, the message arrives without them.

        Raises:
            ValueError: It is longer than `MESSAGE_MAX`.
        """
        if len(message) > MESSAGE_MAX:
            _close_all(fds)
            raise ValueError(f"a message of {len(message)} bytes: the most is {MESSAGE_MAX}")
        first, *rest = records(message)
        self._waiting.append((first, fds))
        self._waiting.extend((record, ()) for record in rest)
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it.  To an end that has gone it is lost."""
        while self._waiting:
            record, fds = self._waiting[0]
            try:
                send_record(self.socket, record, fds)
            except BlockingIOError:
                return
            except OSError as error:
                if fds and error.errno == errno.ETOOMANYREFS:
                    self._waiting[0] = record, ()
                    _close_all(fds)
                    continue
                self._drop_waiting()  # whoever receives will see that it has ended
                return
            self._waiting.popleft()
            _close_all(fds)

    def _drop_waiting(self) -> None:
        while self._waiting:
            _close_all(self._waiting.popleft()[1])

    def receive(self) -> bytes | None:
        """Take the next whole message, which comes without descriptors, as `receive_with` does."""
        received = self.receive_with(0)
        return None if received is None else received[0]

    def receive_with(self, room: int) -> tuple[bytes, list[int]] | None:
        """Take the next whole message and its descriptors, `room` of them at most, which are the caller's to close.

        Return None if there is none yet, or no more.  No more than `RECORDS_AT_ONCE` are read: a descriptor that is
        still readable then has more.

        Raises:
            ValueError: This is no message of a `Channel`, or it has other descriptors.
        """
        if self.ended:
            return None
        for _ in range(RECORDS_AT_ONCE):
            try:
                record, fds, complete = self._next_record(room)
            except BlockingIOError:
                return None
            self._fds += fds
            if not record:
                self.ended = True
                self._drop_fds()
                return None
            self._parts.append(record)
            if not complete or len(self._fds) > room:
                self._drop_fds()
                raise ValueError("descriptors that were not to come, or too long a record")
            if len(self._parts) * RECORD > MESSAGE_MAX + RECORD:
                self._drop_fds()
                raise ValueError(f"a message of more than {MESSAGE_MAX} bytes")
            if len(record) < RECORD:
                message = b"".join(self._parts), self._fds
                self._parts, self._fds = [], []
                return message
        return None

    def _next_record(self, room: int) -> tuple[bytes, list[int], bool]:
        # Fact: an end may be read though a message came just before it: Linux looks at the queue first and at the
        # other end's having gone after that.  Behind it nothing more can come, so the second reading is final.
        for _ in range(2):
            try:
                received = receive_record(self.socket, room)
            except BlockingIOError:
                raise
            except OSError:
                received = b"", [], True
            if received[0]:
                break
        return received

    def _drop_fds(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def wait(self) -> bytes | None:
        """Block until there is a message, and take it.  Return None if there is no more."""
        self.socket.setblocking(True)
        try:
            while (message := self.receive()) is None and not self.ended:
                pass
        finally:
            self.socket.setblocking(False)
        return message

    def shutdown(self) -> None:
        """Tell the other end that this is all, though a fork may hold a copy of the socket."""
        with suppress(OSError):  # it has gone already
            self.socket.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Send what waits, for a second at most, and close."""
        self.socket.settimeout(LAST_SECONDS)
        self.flush()
        self.close()

    def close(self) -> None:
        """Close; what waits is lost."""
        self.socket.close()
        self._drop_fds()
        self._drop_waiting()
