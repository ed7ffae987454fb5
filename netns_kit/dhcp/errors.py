"""The one exception that hostile bytes can raise."""

from __future__ import annotations


class BadMessage(Exception):
    """These bytes are no DHCP message we can answer.  `reason` is a short fixed word, made for counting."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
