"""DNS messages in a byte stream, each behind its length (RFC 1035 section 4.2.2)."""

from __future__ import annotations

from .message import BadMessage

_LENGTH = 2


class Framing:
    """A splitter of a byte stream into messages.

    >>> framing = Framing(longest=512)
    >>> framing.take(b"\\0\\3ab"), framing.take(b"c\\0\\1d"), framing.take(b"\\0\\1d")
    ((4, None), (1, b'abc'), (3, b'd'))
    """

    __slots__ = ("_held", "_longest")

    def __init__(self, longest: int = 0xFFFF) -> None:
        self._longest = longest
        self._held = bytearray()

    def take(self, data: bytes | memoryview) -> tuple[int, bytes | None]:
        """Take the next message's part of `data`; return its size, and the message if it is complete.

        At most one message of the longest length is kept.  Raises `BadMessage`, and nothing else, for a length above
        it.
        """
        held, taken = self._held, 0
        if len(held) < _LENGTH:
            taken = min(_LENGTH - len(held), len(data))
            held += data[:taken]
            if len(held) < _LENGTH:
                return taken, None
        size = int.from_bytes(held[:_LENGTH], "big")
        if size > self._longest:
            raise BadMessage(f"a message of {size} bytes")
        wanted = _LENGTH + size - len(held)
        rest = data[taken : taken + wanted]
        held += rest
        taken += len(rest)
        if len(rest) < wanted:
            return taken, None
        message = bytes(held[_LENGTH:])
        held.clear()
        return taken, message


def framed(message: bytes) -> bytes:
    """Return the message behind its length."""
    return len(message).to_bytes(_LENGTH, "big") + message
