"""Guard: what a policy says of queries and their answers.

`DnsServer` asks its guard about every question before anything else answers it, and about every answer that leaves:
fresh, cached, joined by several clients, or our own; over UDP and TCP.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Refused(NamedTuple):
    """A refusal: the client gets no records, only this result code."""

    rcode: int
    """The result code; 0 says that the name has no record of that type."""
    text: str
    """The reason for people.  A client that speaks EDNS gets it with the extended error 15, "Blocked" (RFC 8914)."""


class Guard(Protocol):
    """What `DnsServer` asks of a policy.  Nothing that a guest or an upstream sends makes it raise."""

    def question(self, name: bytes, kind: int, client: bytes) -> Refused | None:
        """Return how a query is refused, or None.

        Args:
            name: The name asked for, as on the wire, in any letter case.
            kind: The record type asked for; 0 for a message that is about no name, has another opcode than QUERY, or
                says more than its question (`is_bare`).
            client: The packed address of the client.
        """

    def alias(self, name: bytes, kind: int, client: bytes) -> Refused | None:
        """Return how a query is refused that an alias of ours leads to this name, or None."""

    def answer(
        self, question: bytes, message: bytes, now: float, client: bytes, *, ours: bool
    ) -> bytes | Refused:
        """Return the answer that may be sent: the same message, one from which records were cut, or a refusal.

        Args:
            question: The client's question: name, type and class.
            message: The answer, from an alias of ours on.
            now: The time of the engine's clock.
            client: The packed address of the client.
            ours: Whether all its records are our own: of the zone or of the hook.
        """

    def names(self, name: bytes, address: bytes) -> bool:
        """Return whether people may be told that an address is a name's, since that has been an answer.

        Args:
            name: The name, as on the wire, in any letter case.
            address: The packed address.
        """
