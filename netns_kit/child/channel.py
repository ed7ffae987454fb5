"""Channel: whole messages over one end of a SOCK_SEQPACKET pair, of any length, never blocking.

A message travels as records of up to `RECORD` bytes; the first byte of each says whether more follow.  What the
socket does not take waits in a queue for `flush`.  Who listens takes no descriptors: those that come are closed by
the kernel, for lack of room to name them.
"""

from __future__ import annotations

import socket
from collections import deque
from contextlib import suppress

RECORD = 32768
MESSAGE_MAX = 8 << 20  # bytes: a table of 20,000 flows takes two
RECORDS_AT_ONCE = 64
LAST_SECONDS = 1.0
_LAST, _MORE = b"\0", b"\1"


class Channel:
    """Owns its socket.  `ended`: the other end has gone, and all it said has been received."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._waiting: deque[bytes] = deque()
        self._parts: list[bytes] = []
        self.ended = False

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    @property
    def backlog(self) -> bool:
        """Whether something waits for the descriptor to become writable; then call `flush`."""
        return bool(self._waiting)

    def send(self, message: bytes) -> None:
        """Send it as soon as the socket takes it.  Raises ValueError for more than `MESSAGE_MAX` bytes."""
        if len(message) > MESSAGE_MAX:
            raise ValueError(f"a message of {len(message)} bytes: the most is {MESSAGE_MAX}")
        for start in range(0, len(message) or 1, RECORD):
            mark = _LAST if start + RECORD >= len(message) else _MORE
            self._waiting.append(mark + message[start : start + RECORD])
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it.  To an end that has gone it is lost."""
        while self._waiting:
            try:
                self._socket.send(self._waiting[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:  # whoever receives will see that it has ended
                self._waiting.clear()
                return
            self._waiting.popleft()

    def receive(self) -> bytes | None:
        """The next whole message, or None if there is none yet, or no more.

        It reads no more than `RECORDS_AT_ONCE`: a descriptor that is still readable then has more.  Raises ValueError
        for what no `Channel` sends.
        """
        if self.ended:
            return None
        for _ in range(RECORDS_AT_ONCE):
            try:
                record = self._socket.recv(RECORD + 2)
            except BlockingIOError:
                return None
            except OSError:
                record = b""
            if not record:
                # Fact: an end may be read though a message came just before it (as in `agent_client`)
                record = self._last_words()
            if not record:
                self.ended = True
                return None
            mark, size = record[:1], len(record) - 1
            if mark not in (_LAST, _MORE) or size > RECORD or (mark == _MORE and size < RECORD):
                raise ValueError("a record that no Channel sends")
            self._parts.append(record[1:])
            if len(self._parts) * RECORD > MESSAGE_MAX:
                raise ValueError(f"a message of more than {MESSAGE_MAX} bytes")
            if mark == _LAST:
                message = b"".join(self._parts)
                self._parts.clear()
                return message
        return None

    def _last_words(self) -> bytes:
        try:
            return self._socket.recv(RECORD + 2)
        except OSError:
            return b""

    def shutdown(self) -> None:
        """Tell the other end that this is all, though a fork may hold a copy of the socket."""
        with suppress(OSError):  # it has gone already
            self._socket.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Send what waits, for a second at most, and close."""
        self._socket.settimeout(LAST_SECONDS)
        self.flush()
        self._socket.close()

    def close(self) -> None:
        """Close; what waits is lost."""
        self._socket.close()
