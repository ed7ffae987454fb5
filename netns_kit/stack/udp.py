"""UDP flows: one guest endpoint talking to one other endpoint.

A flow exists so that packets towards the guest need no look-up and no building, and so that somebody is
told when it falls idle.  Address translation, filtering and sockets are the user's business.

The timers are RFC 4787's: short while nothing has been answered, long once something has; a flow to a port
whose protocol is one question and one answer ends soon after the answer.
"""

from __future__ import annotations

import math
from struct import Struct
from typing import TYPE_CHECKING, Protocol

from .header import DEFAULT_TTL, FlowHeader
from .user import DatagramUser, IcmpError, Refusal
from .wire import checksum, ip, udp, virtio

if TYPE_CHECKING:
    from collections import Counter, OrderedDict
    from collections.abc import Iterator

    from .limits import Limits
    from .link import Link
    from .timers import Timers

ONE_SHOT = frozenset({53})  # ports of such protocols: DNS
_LONGEST = {4: 0xFFFF - ip.IPV4_SIZE, 16: 0xFFFF}  # bytes with its header, by the size of addresses
_PATCH = Struct("!HH").pack_into  # length, checksum
_SUM_OFFSET = 6


class Table(Protocol):
    """What a flow needs of the stack it lives in."""

    link: Link
    limits: Limits
    timers: Timers
    udp: OrderedDict[bytes, UdpFlow]
    dropped: Counter[str]
    flow_ids: Iterator[int]

    def forget_udp(self, flow: UdpFlow) -> None: ...

    def send_udp(self, header: FlowHeader, payload: bytes | memoryview) -> None: ...

    def refuse_udp(self, flow: UdpFlow, why: Refusal | IcmpError, payload: bytes | memoryview) -> None: ...


class UdpFlow:
    """`key` is guest address, other address, guest port, other port, as on the wire.

    `id` is this flow's alone, also when another has its key later.  `opened` is when it was made.  `host` is the
    client on the host's side of an inbound flow, an address as text and a port; None: the guest has opened it.
    `received` and `sent` are bytes of payload, from the guest and to it.
    """

    __slots__ = (
        "_header",
        "_heard",
        "_longest",
        "_plain",
        "_segment_size",
        "_spoken",
        "_super",
        "_table",
        "answered",
        "host",
        "id",
        "key",
        "last",
        "opened",
        "received",
        "sent",
        "timer_at",
        "timer_entry",
        "user",
    )

    def __init__(self, table: Table, key: bytes, now: float, host: tuple[str, int] | None = None) -> None:
        self._table = table
        self.key = key
        self.id = next(table.flow_ids)
        self.opened = now
        self.host = host
        self.received = self.sent = 0
        self.user: DatagramUser | None = None
        self.answered = False  # datagrams have crossed in both directions
        self._heard = self._spoken = False
        self.last = now
        self.timer_at = math.inf
        self.timer_entry = math.inf
        size = (len(key) - 4) // 2
        self._longest = _LONGEST[size]
        addresses = key[size : 2 * size] + key[:size]
        self._header = FlowHeader(table.link, addresses, ip.UDP, key[-2:] + key[-4:-2] + bytes(4))
        self._plain = table.link.offloads.vnet_header > 0 and table.link.offloads.csum
        offloads = table.link.offloads
        self._super = self._plain and (offloads.uso4 if size == 4 else offloads.uso6)
        self._segment_size = 0  # of what is sent, as the virtio header says it
        if self._plain:
            self._header.buffer[: virtio.SIZE] = self._header.virtio(_SUM_OFFSET)
        table.timers.arm(self, now + table.limits.udp_one_way)

    def send(
        self,
        payload: bytes | memoryview,
        now: float,
        *,
        ttl: int = DEFAULT_TTL,
        tos: int = 0,
        segment_size: int = 0,
    ) -> None:
        """One datagram to the guest, in fragments where it exceeds the MTU; or, when `segment_size` is not 0, several
        of that size end to end.  What is longer than the family's longest, it may come from the other, is dropped."""
        self.used(now)
        if not self.answered:
            self._both_ways(now, spoken=True)
        header, link = self._header, self._table.link
        if 0 < segment_size < len(payload):
            if link.version != header.version:
                header.look_up()
                header.length = -1
            if (
                self._super
                and header.resolved
                and len(header.buffer) - virtio.SIZE - 14 + segment_size <= header.mtu
            ):
                self._segments(segment_size)
            else:
                for start in range(0, len(payload), segment_size):
                    self.send(payload[start : start + segment_size], now, ttl=ttl, tos=tos)
                return
        elif self._segment_size:
            self._segments(0)
        if header.marks != ttl << 8 | tos:
            header.mark(ttl, tos)
        size = len(payload)
        self.sent += size
        length = udp.SIZE + size
        at = header.layer4
        if length != header.length or link.version != header.version:
            if length > self._longest:
                self._table.dropped["udp-length"] += 1
                return
            header.set_length(length)
        fits = self._segment_size or len(header.buffer) - virtio.SIZE - 14 + size <= header.mtu
        if self._plain and header.resolved and fits:
            _PATCH(header.buffer, at + 4, length, header.check)
            link.emit(header.buffer, payload)
            return
        _PATCH(header.buffer, at + 4, length, 0)
        parts = checksum.total(memoryview(header.buffer)[at:]) + checksum.total(payload)
        _PATCH(header.buffer, at + 4, length, checksum.checksum(header.pseudo, length, parts))
        self._table.send_udp(header, payload)

    def _segments(self, size: int) -> None:
        """What is sent from now on is taken apart by the guest's kernel, into datagrams of `size`; 0: it is one."""
        if size != self._segment_size:
            self._segment_size = size
            kind = virtio.GSO_UDP_L4 if size else virtio.GSO_NONE
            self._header.buffer[: virtio.SIZE] = self._header.virtio(_SUM_OFFSET, kind, size)

    def used(self, now: float) -> None:
        """It is not idle: its time begins anew, and others make room before it."""
        self.last = now
        if self.user is not None:
            self._table.udp.move_to_end(self.key)

    def refuse(self, why: Refusal | IcmpError, payload: bytes | memoryview = b"") -> None:
        """Tell the guest, as an ICMP error, what became of a datagram; `payload` is as much of it as is known."""
        self._table.refuse_udp(self, why, payload)

    def heard(self, now: float) -> None:
        """The guest has sent a datagram, which may be the answer to one of ours."""
        self._both_ways(now, heard=True)

    def _both_ways(self, now: float, *, heard: bool = False, spoken: bool = False) -> None:
        self._heard |= heard
        self._spoken |= spoken
        if self._heard and self._spoken:
            self.answered = True
            self._table.timers.arm(self, now + self._lifetime)

    @property
    def _lifetime(self) -> float:
        limits = self._table.limits
        if not self.answered:
            return limits.udp_one_way
        return limits.udp_one_shot if int.from_bytes(self.key[-2:], "big") in ONE_SHOT else limits.udp_stream

    def handle_timer(self, now: float) -> None:
        due = self.last + self._lifetime
        if due > now:
            self._table.timers.arm(self, due)
        else:
            self.close()

    def close(self) -> None:
        """Out of the table; the user is told.  Again is fine."""
        self.timer_at = math.inf
        self._table.forget_udp(self)
        user, self.user = self.user, None
        if user is not None:
            user.expired(self)
