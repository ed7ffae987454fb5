"""A cache of the answers of upstreams.

An answer is kept for the exact query, all bytes of it except the id and the letter case of its name, so that flags,
EDNS and unknown records of a client keep their meaning.  It is returned as it came, except for the id, the client's
spelling of the name, and the TTLs, which are reduced by its age.

Answers with records are kept for the lowest TTL in them; answers without, and "no such name", for as long as their
SOA record allows (RFC 2308 section 5), if they have one.  Not kept are failures, truncated answers, answers to a
client's own EDNS options (cookies, client subnets), and answers with a TTL of 0.

Limits.  The number of answers is bounded, and so is their length, by `LONGEST`; the one that was unused for longest
makes room.  No answer is kept for more than a day, and no negative one for more than an hour.

Law of this file: no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from .message import (
    ADDRESSES,
    ANY,
    NXDOMAIN,
    OPCODE,
    OPT,
    QR,
    RCODE,
    SOA,
    TC,
    BadMessage,
    edns,
    identity,
    same_question,
    ttl_at,
    walk,
)

ENTRIES = 1024
NAMES = 4096  # names of addresses, remembered longer than the answers
LONGEST = 4096  # bytes of an answer
LONGEST_TTL = 86400
LONGEST_ABSENCE = 3600  # RFC 2308 section 5 has one to three hours
_QUESTION = 12  # its offset


class _Kept(NamedTuple):
    """An answer.  `ttls`: the offsets of its TTLs."""

    message: bytes
    since: float
    until: float
    ttls: tuple[int, ...]


class Cache:
    """A cache of at most `entries` answers."""

    def __init__(self, entries: int = ENTRIES) -> None:
        self._entries = entries
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # by query; the longest unused first
        self._names: OrderedDict[bytes, bytes] = OrderedDict()  # by address; the oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all answers, because other resolvers are asked from now on."""
        self._kept.clear()

    def name_of(self, address: bytes) -> bytes | None:
        """Return the name that was last answered with a packed address, None if it is not remembered."""
        return self._names.get(address)

    def addresses(self) -> tuple[bytes, ...]:
        """Return the addresses whose names are remembered, the last answered at the end."""
        return tuple(self._names)

    def get(self, query: bytes, question: bytes, now: float, *, limit: int = 0xFFFF) -> bytes | None:
        """Return the answer to a query, None if it is not known or longer than `limit`."""
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
        """Keep the answer to a query, if it may be kept.  Never raises."""
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
    """Return for how many seconds to keep the answer, the offsets of its TTLs, and its addresses that were asked for.

    Raises `BadMessage`.
    """
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
            if kind in ADDRESSES:
                addresses.append(message[found.data : found.end])
        elif found.section == 2 and found.kind == SOA and found.end - found.data >= 20:
            absence = min(each, ttl_at(message, found.end - 4), LONGEST_ABSENCE)
    if rcode == NXDOMAIN or not found_it:
        ttl = min(ttl, absence)
    return ttl, tuple(ttls), addresses
