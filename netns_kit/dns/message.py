"""DNS messages (RFC 1035 section 4.1): as much of them as relaying needs, and answering for names of our own.

Relaying needs the id, the flags and the question.  The rest of a message is opaque, so unknown record types and
options pass through (RFC 5625 section 4).  The cache, and an answer that begins with an alias of ours, need the
records as well: `walk` finds them, `expanded` decompresses them, `reply` writes them, `without` leaves some out.

Every byte comes from a guest or from the network.  Reading them raises `BadMessage` and nothing else, and takes time
bounded by their number.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from enum import Enum
from struct import Struct
from typing import NamedTuple

from netns_kit.domain_names import LABEL_MAX, NAME_MAX, POINTER

_HEADER = Struct("!6H")  # id, flags, and the counts of questions, answers, authorities, additionals
_RECORD = Struct("!HHIH")  # type, class, TTL, length of the data
_EXTENDED_ERROR = Struct("!HHH").pack  # EDNS option, length, code (RFC 8914 section 2)
_unpack_header, _unpack_record = _HEADER.unpack_from, _RECORD.unpack_from
_TTL = 4  # offset of the TTL in it

QR = 0x8000  # set in a response
OPCODE = 0x7800
AA = 0x0400  # the answer comes from the owner of the name
TC = 0x0200  # truncated: the client asks again over TCP
RD = 0x0100
RA = 0x0080
AD = 0x0020  # the resolver has verified the answer (RFC 4035 section 3.2.3)
CD = 0x0010
RCODE = 0x000F

FORMERR = 1
SERVFAIL = 2
NXDOMAIN = 3
NOTIMP = 4
REFUSED = 5

IN, ANY_CLASS = 1, 255
TYPES = {
    "A": 1, "NS": 2, "CNAME": 5, "SOA": 6, "PTR": 12, "MX": 15, "TXT": 16, "AAAA": 28, "SRV": 33, "NAPTR": 35,
    "DNAME": 39, "OPT": 41, "DS": 43, "SSHFP": 44, "RRSIG": 46, "NSEC": 47, "DNSKEY": 48, "NSEC3": 50, "TLSA": 52,
    "SVCB": 64, "HTTPS": 65, "IXFR": 251, "AXFR": 252, "ANY": 255, "URI": 256, "CAA": 257,
}  # fmt: skip
CNAME, SOA, PTR, OPT, ANY = (TYPES[name] for name in ("CNAME", "SOA", "PTR", "OPT", "ANY"))
_TYPE_NAMES = {number: name for name, number in TYPES.items()}
ADDRESSES = (TYPES["A"], TYPES["AAAA"])

PLAIN_SIZE = 512  # bytes of a UDP message to a client that names no other size (RFC 1035 section 2.3.4)
OUR_SIZE = 1232  # bytes of a UDP message to us: no path fragments that
BLOCKED = 15  # the extended error of an answer that a policy has refused; its option has that number too
_TEXT_MAX = 200  # bytes of its text, so that the answer fits into `PLAIN_SIZE` whatever the name
_DO = 0x8000  # in the lower half of an OPT record's TTL
_OPT = Struct("!BHHHHH").pack  # the root, type, our size, extended code and version, flags, length
_FARTHEST = 0x3FFF  # the largest offset in a pointer

# Names in a record's data that may be compressed, by its type: how many, behind how many bytes.  RFC 3597 section 4
# allows no others; SRV and DNAME should not be compressed either, but sometimes are.
_NAMES_IN = {TYPES[name]: at for name, at in {
    "NS": (1, 0), "CNAME": (1, 0), "SOA": (2, 0), "PTR": (1, 0), "MX": (1, 2), "SRV": (1, 6), "DNAME": (1, 0),
}.items()}  # fmt: skip


class BadMessage(Exception):
    """A DNS message that cannot be relayed."""


class Rcode(Enum):
    """The result code of an answer without records."""

    NOERROR = 0
    """The name has no record of that type."""
    SERVFAIL = SERVFAIL
    """The answer could not be found out."""
    NXDOMAIN = NXDOMAIN
    """There is no such name."""
    REFUSED = REFUSED
    """The server does not answer this client."""


def type_name(number: int) -> str:
    """Return a type's name; an unknown one is TYPE and its number (RFC 3597 section 5)."""
    return _TYPE_NAMES.get(number) or f"TYPE{number}"


def parse_untrusted(message: bytes) -> tuple[int, int, bytes]:
    """Return the id, the flags and the question: name, type and class exactly as sent, letter case included.

    The question is empty if the message has none (DNS cookies, RFC 7873 section 5.4; some errors).  Nothing behind it
    is read.  Takes time bounded by the 255 bytes of the longest name.

    Raises `BadMessage`, and nothing else: for a truncated header or question, more than one question (RFC 9619), and
    a name that is too long or compressed.
    """
    size = len(message)
    if size < _HEADER.size:
        raise BadMessage("header truncated")
    ident, flags, questions, _, _, _ = _unpack_header(message)
    if questions == 0:
        return ident, flags, b""
    if questions != 1:
        raise BadMessage("more than one question")
    at = _HEADER.size
    end = min(at + NAME_MAX, size - 4)  # the root label is before this, type and class behind it
    while at < end:
        length = message[at]
        at += 1 + length
        if length == 0:
            return ident, flags, message[_HEADER.size : at + 4]
        if length > LABEL_MAX:
            raise BadMessage("no plain label")
    raise BadMessage("question truncated or too long")


def with_id(ident: int, message: bytes) -> bytes:
    """Return the message with another id."""
    return ident.to_bytes(2, "big") + message[2:]


def with_name(message: bytes, question: bytes, name: bytes) -> bytes:
    """Return a query, given with its question, for another name."""
    at = _HEADER.size
    return message[:at] + name + question[-4:] + message[at + len(question) :]


def answering(query: bytes, question: bytes, message: bytes) -> bytes:
    """Return an answer as the client of `query` expects it: with its id, and its name in the letter case of `query`.

    `question`: that of the query.  The answer has the same question, in any letter case, or none.
    """
    at, end = _HEADER.size, _HEADER.size + len(question)
    if message[at:end] == question or message[4:6] == b"\0\0":
        return query[:2] + message[2:]
    return query[:2] + message[2:at] + question + message[end:]


def same_question(one: bytes, other: bytes) -> bool:
    """Return whether two questions are the same; the letter case of names does not count (RFC 4343)."""
    return one == other or (one[-4:] == other[-4:] and one[:-4].lower() == other[:-4].lower())


def identity(query: bytes, question: bytes) -> bytes:
    """Return a key that is equal for queries with the same answer: all but the id and the letter case of the name."""
    at = _HEADER.size
    return query[2:at] + question[:-4].lower() + query[at + len(question) - 4 :]


# -- records ----------------------------------------------------------------------------------------------


class RecordSpan(NamedTuple):
    """The place of a record in its message: offsets of its parts.

    `section`: 1 answer, 2 authority, 3 additional, in the order of the header.
    """

    section: int
    kind: int
    owner: int
    ttl: int
    data: int
    end: int


class Rr(NamedTuple):
    """A record of class IN with its names decompressed."""

    owner: bytes
    kind: int
    ttl: int
    data: bytes


def walk(message: bytes, question: bytes) -> Iterator[RecordSpan]:
    """Yield the records behind the question, in order.  Raises `BadMessage`, and nothing else."""
    counts = _unpack_header(message)[3:]
    at, size = _HEADER.size + len(question), len(message)
    for section, count in enumerate(counts, 1):
        for _ in range(count):
            owner, at = at, after_name(message, at)
            if at + _RECORD.size > size:
                raise BadMessage("record truncated")
            kind, _, _, length = _unpack_record(message, at)
            data = at + _RECORD.size
            if data + length > size:
                raise BadMessage("record truncated")
            yield RecordSpan(section, kind, owner, at + _TTL, data, data + length)
            at = data + length


def ttl_at(message: bytes, at: int) -> int:
    """Return the TTL at an offset; one with the first bit set counts as 0 (RFC 2181 section 8)."""
    ttl = int.from_bytes(message[at : at + 4], "big")
    return ttl if ttl < 1 << 31 else 0


def after_name(message: bytes, at: int) -> int:
    """Return the offset behind a name.  Raises `BadMessage`."""
    size = len(message)
    while at < size:
        length = message[at]
        if length == 0:
            return at + 1
        if length > LABEL_MAX:
            if length < POINTER >> 8:
                raise BadMessage("a label of a reserved type")
            return at + 2
        at += 1 + length
    raise BadMessage("name truncated")


class NameReader:
    """A reader of one message's names, which may be compressed.

    Each name is read once, however many pointers lead to it, so reading all takes time bounded by the length of the
    message.
    """

    __slots__ = ("_known", "_message")

    def __init__(self, message: bytes) -> None:
        self._message = message
        # by offset, the ends of longer names included; with the target of the first pointer in each, or -1
        self._known: dict[int, tuple[bytes, int]] = {}

    def at(self, at: int) -> bytes:
        """Return the name at an offset, decompressed.

        A pointer leads to before the labels in front of it, so a name comes to an end.  Raises `BadMessage`.
        """
        message, known = self._message, self._known
        passed, length, size, lowest = list[tuple[int, bytes, int]](), 1, len(message), at
        while (end := known.get(at)) is None:
            if at >= size:
                raise BadMessage("name truncated")
            octets = message[at]
            if octets == 0:
                end = b"\0", -1
                break
            if octets > LABEL_MAX:
                target = int.from_bytes(message[at : at + 2], "big") - POINTER
                if at + 1 >= size or not 0 <= target < lowest:
                    raise BadMessage("a pointer to nowhere")
                passed.append((at, b"", target))
                at = lowest = target
                continue
            length += 1 + octets
            if length > NAME_MAX or at + octets >= size:
                raise BadMessage("name too long or truncated")
            passed.append((at, message[at : at + 1 + octets], -1))
            at += 1 + octets
        name, target = end
        if target >= lowest:
            raise BadMessage("a pointer to nowhere")
        for begin, label, leads_to in reversed(passed):
            name = label + name
            target = target if label else leads_to
            known[begin] = name, target
        if len(name) > NAME_MAX:
            raise BadMessage("name too long")
        return name


def expanded(message: bytes, question: bytes) -> tuple[list[Rr], list[Rr]]:
    """Return the records of answer and authority, decompressed.  Raises `BadMessage`, and nothing else."""
    sections: tuple[list[Rr], list[Rr], list[Rr]] = ([], [], [])
    names = NameReader(message)
    for found in walk(message, question):
        if found.section < 3:
            data = expanded_data(message, found, names)
            record = Rr(names.at(found.owner), found.kind, ttl_at(message, found.ttl), data)
            sections[found.section - 1].append(record)
    return sections[0], sections[1]


def expanded_data(message: bytes, found: RecordSpan, names: NameReader) -> bytes:
    """Return the data of a record, decompressed.  Raises `BadMessage`."""
    count, skipped = _NAMES_IN.get(found.kind, (0, 0))
    at = found.data + skipped
    parts = [message[found.data : at]]
    for _ in range(count):
        parts.append(names.at(at))
        at = after_name(message, at)
    if at > found.end:
        raise BadMessage("names beyond their record")
    return b"".join(parts) + message[at : found.end]


# -- answers of our own -----------------------------------------------------------------------------------


class Edns(NamedTuple):
    """The OPT record of a query (RFC 6891 section 6.1).  `plain`: it has no options."""

    size: int
    dnssec_ok: int
    plain: bool


def edns(query: bytes, question: bytes) -> Edns | None:
    """Return the OPT record of a query, None if it has none or cannot be read."""
    if query[10:12] == b"\0\0":
        return None
    try:
        for found in walk(query, question):
            if found.kind == OPT and found.section == 3:
                _, size, ttl, length = _unpack_record(query, found.ttl - _TTL)
                return Edns(max(size, PLAIN_SIZE), ttl & _DO, not length)
    except BadMessage:
        pass
    return None


def is_bare(query: bytes, question: bytes) -> bool:
    """Return whether a query says nothing beside its question: it has no records but OPT and, of IXFR, the old SOA.

    Other records, and bytes behind the last one, could be about any name.  So could these two, with another owner
    than they must have (RFC 6891 section 6.1.2, RFC 1995 section 3).
    """
    owners = {(3, OPT): b"\0"}
    if question[-4:-2] == TYPES["IXFR"].to_bytes(2, "big"):
        owners[2, SOA] = question[:-4].lower()
    end, names = _HEADER.size + len(question), NameReader(query)
    try:
        for found in walk(query, question):
            owner = owners.pop((found.section, found.kind), None)  # each comes once
            if owner is None or names.at(found.owner).lower() != owner:
                return False
            end = found.end
    except BadMessage:
        return False
    return end == len(query)


def reply(
    query: bytes,
    question: bytes,
    rcode: int,
    answers: Iterable[Rr] = (),
    authority: Iterable[Rr] = (),
    *,
    flags: int = 0,
    limit: int = 0xFFFF,
    blocked: str = "",
) -> bytes:
    """Return an answer to a query, given with its question, truncated if it would be longer than `limit`.

    It keeps the id, the opcode, RD and CD (RFC 4035 section 3.2.2) and the question, and has an OPT record if the
    query has one.  `blocked` is the reason for which a policy refuses the query; the OPT record says so.
    """
    ident, asked, *_ = _unpack_header(query)
    flags |= QR | asked & (OPCODE | RD | CD) | RA | rcode
    about = edns(query, question)
    option = b""
    if blocked:
        text = blocked.encode("utf-8", "replace")[:_TEXT_MAX].decode("utf-8", "ignore").encode()
        option = _EXTENDED_ERROR(BLOCKED, 2 + len(text), BLOCKED) + text
    opt = b"" if about is None else _OPT(0, OPT, OUR_SIZE, 0, about.dnssec_ok, len(option)) + option
    counts = [0, 0]
    message = bytearray(_HEADER.size) + question
    names = {question[:-4].lower(): _HEADER.size}
    for section, records in enumerate((answers, authority)):
        for record in records:
            counts[section] += 1
            message += _owner(record.owner, names, len(message))
            message += _RECORD.pack(record.kind, IN, record.ttl, len(record.data))
            if record.kind == CNAME:
                names.setdefault(record.data.lower(), len(message))
            message += record.data
    if len(message) + len(opt) > limit:
        flags, counts = flags | TC, [0, 0]
        del message[_HEADER.size + len(question) :]
    _HEADER.pack_into(message, 0, ident, flags, 1 if question else 0, *counts, 1 if opt else 0)
    return bytes(message + opt)


def without(message: bytes, question: bytes, cut: Container[int]) -> bytes:
    """Return an answer, given with its question, without the records of those numbers in the order of `walk`.

    The other records are written anew, because their names may be pointers to names that are cut.  Raises
    `BadMessage` for a message that cannot be read, or that becomes too long.
    """
    ident, flags, questions, *_ = _unpack_header(message)
    made = bytearray(message[: _HEADER.size + len(question)])
    counts, reader, names = [0, 0, 0], NameReader(message), {question[:-4].lower(): _HEADER.size}
    for number, found in enumerate(walk(message, question)):
        if number in cut:
            continue
        counts[found.section - 1] += 1
        data = expanded_data(message, found, reader)
        made += _owner(reader.at(found.owner), names, len(made))
        made += message[found.ttl - _TTL : found.data - 2] + len(data).to_bytes(2, "big")
        made += data
        if len(made) > 0xFFFF:
            raise BadMessage("too long when its names are decompressed")
    _HEADER.pack_into(made, 0, ident, flags & ~AD, questions, *counts)
    return bytes(made)


def without_records(message: bytes, question: bytes) -> bytes | None:
    """Return a truncated answer without its records, for it may end within one; None if it is not truncated."""
    if len(message) < _HEADER.size or not int.from_bytes(message[2:4], "big") & TC:
        return None
    return message[:4] + b"\0\1" + bytes(6) + question


def _owner(name: bytes, names: dict[bytes, int], at: int) -> bytes:
    """Encode a name, as a pointer if it is in the message already."""
    known = names.setdefault(name.lower(), at)
    return name if known == at or known > _FARTHEST or name == b"\0" else (POINTER | known).to_bytes(2, "big")
