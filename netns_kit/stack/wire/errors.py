"""BadPacket: the one exception that hostile bytes raise."""

from __future__ import annotations


class BadPacket(Exception):
    """The bytes are not a packet that we handle.  `reason` is a short fixed word, by which they are counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BadParameter(BadPacket):
    """An IPv6 packet whose sender must be told what is wrong (RFC 4443 3.4).

    `code` tells what it is, and `pointer` is the offset of the bad field.
    """

    def __init__(self, reason: str, code: int, pointer: int) -> None:
        super().__init__(reason)
        self.code = code
        self.pointer = pointer
