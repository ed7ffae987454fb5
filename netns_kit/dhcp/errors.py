"""The one exception that a client's bytes can raise."""

from __future__ import annotations


class BadDhcpMessage(Exception):
    """A DHCP message that gets no answer.

    `reason` is a short fixed word, by which it is counted.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
