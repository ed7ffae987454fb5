"""ICMP echo flows: one guest address and identifier pinging one other address (RFC 5508)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from .user import EchoUser, Refusal

if TYPE_CHECKING:
    from .limits import Limits
    from .timers import Timers


class Table(Protocol):
    """What a flow needs of the stack it lives in."""

    limits: Limits
    timers: Timers

    def forget_echo(self, flow: EchoFlow) -> None: ...

    def send_echo_reply(
        self, flow: EchoFlow, sequence: int, payload: bytes | memoryview, ttl: int
    ) -> None: ...

    def refuse_echo(self, flow: EchoFlow, refusal: Refusal) -> None: ...


class EchoFlow:
    """`key` is guest address, other address, identifier as on the wire, and two zero bytes."""

    __slots__ = ("_table", "key", "last", "timer_at", "timer_entry", "user")

    def __init__(self, table: Table, key: bytes, now: float) -> None:
        self._table = table
        self.key = key
        self.user: EchoUser | None = None
        self.last = now
        self.timer_at = math.inf
        self.timer_entry = math.inf
        table.timers.arm(self, now + table.limits.echo)

    @property
    def identifier(self) -> int:
        return int.from_bytes(self.key[-4:-2], "big")

    def reply(self, sequence: int, payload: bytes | memoryview, ttl: int, now: float) -> None:
        """An echo reply to the guest, from the other address."""
        self.last = now
        self._table.send_echo_reply(self, sequence, payload, ttl)

    def refuse(self, refusal: Refusal) -> None:
        """Tell the guest that its last request met `refusal`."""
        self._table.refuse_echo(self, refusal)

    def handle_timer(self, now: float) -> None:
        due = self.last + self._table.limits.echo
        if due > now:
            self._table.timers.arm(self, due)
        else:
            self.close()

    def close(self) -> None:
        """Out of the table; the user is told.  Again is fine."""
        self.timer_at = math.inf
        self._table.forget_echo(self)
        user, self.user = self.user, None
        if user is not None:
            user.expired(self)
