"""ICMP echo flows: one guest address and identifier pinging one other address (RFC 5508)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from .user import EchoUser, IcmpError, Refusal

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Iterator

    from .limits import Limits
    from .timers import Timers


class Table(Protocol):
    """What a flow needs of the stack it lives in."""

    limits: Limits
    timers: Timers
    echo: OrderedDict[bytes, EchoFlow]
    flow_ids: Iterator[int]

    def forget_echo(self, flow: EchoFlow) -> None: ...

    def reply_echo(
        self, flow: EchoFlow, sequence: int, payload: bytes | memoryview, ttl: int, tos: int
    ) -> None: ...

    def refuse_echo(
        self,
        flow: EchoFlow,
        why: Refusal | IcmpError,
        sequence: int,
        payload: bytes | memoryview,
        check: int | None,
    ) -> None: ...


class EchoFlow:
    """`key` is guest address, other address, identifier as on the wire, and two zero bytes.

    `id`, `opened`, `received` and `sent` are as those of a `UdpFlow`.
    """

    __slots__ = (
        "_table", "id", "key", "last", "opened", "received", "sent", "timer_at", "timer_entry", "user"
    )  # fmt: skip

    def __init__(self, table: Table, key: bytes, now: float) -> None:
        self._table = table
        self.key = key
        self.id = next(table.flow_ids)
        self.opened = now
        self.received = self.sent = 0
        self.user: EchoUser | None = None
        self.last = now
        self.timer_at = math.inf
        self.timer_entry = math.inf
        table.timers.arm(self, now + table.limits.echo)

    @property
    def identifier(self) -> int:
        return int.from_bytes(self.key[-4:-2], "big")

    def reply(
        self, sequence: int, payload: bytes | memoryview, ttl: int, now: float, *, tos: int = 0
    ) -> None:
        """An echo reply to the guest, from the other address."""
        self.used(now)
        self.sent += len(payload)
        self._table.reply_echo(self, sequence, payload, ttl, tos)

    def used(self, now: float) -> None:
        """It is not idle: its time begins anew, and others make room before it."""
        self.last = now
        if self.user is not None:
            self._table.echo.move_to_end(self.key)

    def refuse(
        self,
        why: Refusal | IcmpError,
        sequence: int = 0,
        payload: bytes | memoryview = b"",
        check: int | None = None,
    ) -> None:
        """Tell the guest what became of a request; `payload` is as much of it as is known.

        `check` is the checksum of all of it; by default that of what is known.
        """
        self._table.refuse_echo(self, why, sequence, payload, check)

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
