"""A cache of answers: what upstream said lately is said again.

An answer is kept for the query as it was, every byte of it but the id and the case of its name, so what a client
says in flags and EDNS, and any record nobody has thought of yet, keeps its meaning.  It is told as it came, but for
the id, the name as this client spells it, and the TTLs, which have become lower.

What is kept, and for how long: answers with records, for the lowest TTL in them; answers without, and "no such name",
for what their SOA record allows (RFC 2308 section 5), if they have one.  No failures, nothing truncated, nothing that
was answered to a client's own EDNS options (cookies, client subnets), and nothing that has a TTL of 0.

Limits.  So many answers, no longer than `LONGEST`; the one not asked for the longest makes room.  No answer is kept
for more than a day, and no absence for more than an hour.

Law of this file: no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from .message import (
    ANY,
    NXDOMAIN,
    OPCODE,
    OPT,
    QR,
    RCODE,
    SOA,
    TC,
    TYPES,
    BadMessage,
    edns,
    identity,
    same_question,
    ttl_at,
    walk,
)

ENTRIES = 1024
NAMES = 4096  # of addresses, remembered beyond the answers
LONGEST = 4096  # bytes of an answer
LONGEST_TTL = 86400
LONGEST_ABSENCE = 3600  # RFC 2308 section 5 has one to three hours
_ADDRESSES = (TYPES["A"], TYPES["AAAA"])
_QUESTION = 12  # where it begins


class _Kept(NamedTuple):
    """`ttls`: where they lie in the message."""

    message: bytes
    since: float
    until: float
    ttls: tuple[int, ...]


class Cache:
    """`entries`: how many answers at most."""

    def __init__(self, entries: int = ENTRIES) -> None:
        self._entries = entries
        self._kept: OrderedDict[bytes, _Kept] = (
            OrderedDict()
        )  # by query; the one not asked for the longest first
        self._names: OrderedDict[bytes, bytes] = (
            OrderedDict()
        )  # that were asked for, by address; the oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget everything: others are to be asked."""
        self._kept.clear()

    def name_of(self, address: bytes) -> bytes | None:
        """The name that was asked for last and answered with that address, packed, if it is remembered."""
        return self._names.get(address)

    def get(self, query: bytes, question: bytes, now: float, *, limit: int = 0xFFFF) -> bytes | None:
        """The answer to a query, if it is known and no longer than `limit`."""
        key = identity(query, question)
        kept = self._kept.get(key)
        if kept is None or len(kept.message) > limit:
            return None
        if now >= kept.until:
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        age = int(now - kept.since)
        message = bytearray(kept.message)
        message[:2] = query[:2]
        message[_QUESTION : _QUESTION + len(question)] = question
        for at in kept.ttls:
            message[at : at + 4] = (ttl_at(kept.message, at) - age).to_bytes(4, "big")
        return bytes(message)

    def put(self, query: bytes, question: bytes, message: bytes, now: float) -> None:
        """Keep the answer to a query, if it may be kept.  Whatever upstream sent, this raises nothing."""
        try:
            ttl, ttls, addresses = _lifetime(query, question, message)
        except BadMessage:
            return
        if ttl > 0:
            key = identity(query, question)
            self._kept[key] = _Kept(message, now, now + ttl, ttls)
            self._kept.move_to_end(key)
            if len(self._kept) > self._entries:
                self._kept.popitem(last=False)
            for address in addresses:
                self._names[address] = question[:-4]
                self._names.move_to_end(address)
                if len(self._names) > NAMES:
                    self._names.popitem(last=False)


def _lifetime(query: bytes, question: bytes, message: bytes) -> tuple[int, tuple[int, ...], list[bytes]]:
    """For how many seconds to keep the answer, where its TTLs lie, and the addresses in it that were asked for.

    Raises `BadMessage`."""
    flags = int.from_bytes(message[2:4], "big")
    rcode = flags & RCODE
    kind = int.from_bytes(question[-4:-2], "big")
    about = edns(query, question)
    if (
        not flags & QR
        or flags & (TC | OPCODE)
        or rcode not in (0, NXDOMAIN)
        or not question
        or message[4:6] != b"\0\1"
        or not same_question(message[_QUESTION : _QUESTION + len(question)], question)
        or kind == ANY
        or len(message) > LONGEST
        or (about is not None and not about.plain)
    ):
        return 0, (), []
    ttl, absence, found_it, ttls = LONGEST_TTL, 0, False, []
    addresses: list[bytes] = []
    for found in walk(message, question):
        if found.kind == OPT:
            continue
        ttls.append(found.ttl)
        each = ttl_at(message, found.ttl)
        ttl = min(ttl, each)
        if found.section == 1 and found.kind == kind:
            found_it = True
            if kind in _ADDRESSES:
                addresses.append(message[found.data : found.end])
        elif found.section == 2 and found.kind == SOA and found.end - found.data >= 20:
            absence = min(each, ttl_at(message, found.end - 4), LONGEST_ABSENCE)
    if rcode == NXDOMAIN or not found_it:
        ttl = min(ttl, absence)
    return ttl, tuple(ttls), addresses
