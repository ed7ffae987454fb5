"""As much of a DNS message (RFC 1035 section 4.1) as relaying it needs: the id, the flags, the question.

The rest of a message is opaque here, so record types and options nobody has thought of yet pass through
(RFC 5625 section 4).  Every byte comes from a guest or from the network: `parse_untrusted` raises
`BadMessage` and nothing else.
"""

from __future__ import annotations

from struct import Struct

_HEADER = Struct("!6H")  # id, flags, and the counts of questions, answers, authorities, additionals
_unpack_header = _HEADER.unpack_from

QR = 0x8000  # set in a response
OPCODE = 0x7800
TC = 0x0200  # truncated: the client is to ask again over TCP
RD = 0x0100
RA = 0x0080
CD = 0x0010
RCODE = 0x000F

FORMERR = 1
SERVFAIL = 2
NXDOMAIN = 3
NOTIMP = 4
REFUSED = 5

_NAME_MAX = 255  # RFC 1035 section 2.3.4, length octets and the root's included
_LABEL_MAX = 63  # above: a compression pointer, for which a question has no use, or a reserved type


class BadMessage(Exception):
    """These bytes are no DNS message we can relay."""


def parse_untrusted(message: bytes) -> tuple[int, int, bytes]:
    """The id, the flags and the question section: name, type and class exactly as sent, case included.

    The question is empty where the message has none (DNS cookies, RFC 7873 section 5.4; some errors).
    Nothing behind the question is looked at.  Takes time bounded by the 255 octets of the longest name.
    Raises `BadMessage`, and nothing else, whatever the bytes: a truncated header or question, more than one
    question (RFC 9619), an overlong or compressed name.
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
    end = min(at + _NAME_MAX, size - 4)  # the root label is before this, type and class behind it
    while at < end:
        length = message[at]
        at += 1 + length
        if length == 0:
            return ident, flags, message[_HEADER.size : at + 4]
        if length > _LABEL_MAX:
            raise BadMessage("no plain label")
    raise BadMessage("question truncated or too long")


def with_id(ident: int, message: bytes) -> bytes:
    """The same message under another id."""
    return ident.to_bytes(2, "big") + message[2:]


def servfail(query: bytes, question: bytes) -> bytes:
    """The answer "server failure" to a parsed query and its question.

    Keeps the id, the opcode, RD and CD (RFC 4035 section 3.2.2) and the question; has no records.
    """
    ident, flags, *_ = _unpack_header(query)
    flags = QR | flags & (OPCODE | RD | CD) | RA | SERVFAIL
    return _HEADER.pack(ident, flags, 1 if question else 0, 0, 0, 0) + question
