"""The one exception that hostile bytes can raise."""

from __future__ import annotations


class BadPacket(Exception):
    """The bytes are not a packet we can answer.  `reason` is a short fixed word, made for counting."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BadParameter(BadPacket):
    """A field of an IPv6 packet that its sender is to be told of (RFC 4443 3.4): `code`, and in `pointer` where it
    lies."""

    def __init__(self, reason: str, code: int, pointer: int) -> None:
        super().__init__(reason)
        self.code = code
        self.pointer = pointer
