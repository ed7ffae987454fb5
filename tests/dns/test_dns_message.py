"""The header and the question, against dnslib and against hostile bytes."""

from __future__ import annotations

import pytest
from dnslib import QTYPE, RCODE, DNSRecord
from hypothesis import example, given
from hypothesis import strategies as st

from netns_kit.dns import BadMessage, parse_untrusted
from netns_kit.dns.message import CD, OPCODE, QR, RD, SERVFAIL, TC, reply, with_id

HEADER = bytes.fromhex("1234 0100 0001 0000 0000 0000")
LABELS = st.binary(min_size=1, max_size=63)


def named(*labels: bytes) -> bytes:
    """A name in wire format."""
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def test_what_dig_sends() -> None:
    query = bytes(DNSRecord.question("Www.eXample.org", "AAAA").pack())
    ident, flags, question = parse_untrusted(query)
    assert ident.to_bytes(2, "big") == query[:2]
    assert flags == RD
    assert question == b"\3Www\7eXample\3org\0\0\x1c\0\1"


def test_what_follows_the_question_is_not_looked_at() -> None:
    question = named(b"a") + b"\0\1\0\1"
    assert parse_untrusted(HEADER + question + b"\xc0\xff junk") == (0x1234, RD, question)


def test_a_message_may_have_no_question() -> None:
    assert parse_untrusted(bytes.fromhex("1234 8182 0000 0000 0000 0000")) == (0x1234, 0x8182, b"")


LONGEST = named(b"a" * 63, b"b" * 63, b"c" * 63, b"d" * 61)


@pytest.mark.parametrize("name", [b"\0", named(b"x"), named(b"\0.\xff"), LONGEST])
def test_names_that_pass(name: bytes) -> None:
    question = name + b"\0\1\0\1"
    assert parse_untrusted(HEADER + question)[2] == question


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"", "header"),
        (HEADER[:11], "header"),
        (HEADER, "truncated"),
        (HEADER + b"\3www", "truncated"),
        (HEADER + b"\3www\0\0\1\0", "truncated"),
        (HEADER + b"\7www\0\0\1\0\1", "truncated"),
        (HEADER + b"\xc0\x0c\0\1\0\1", "plain label"),
        (HEADER + b"\1a\xc0\x0c\0\1\0\1", "plain label"),
        (HEADER + b"\x40" + bytes(100), "plain label"),
        (HEADER + LONGEST[:-63] + b"\x3e" + b"d" * 62 + b"\0\0\1\0\1", "too long"),
        (HEADER + b"\1a" * 30000 + b"\0\0\1\0\1", "too long"),
        (HEADER[:4] + b"\0\2" + HEADER[6:] + b"\0\0\1\0\1" * 2, "one question"),
    ],
)
def test_bad_messages(message: bytes, why: str) -> None:
    with pytest.raises(BadMessage, match=why):
        parse_untrusted(message)


@given(st.binary() | st.builds(bytes.__add__, st.just(HEADER), st.binary() | st.lists(LABELS).map(b"".join)))
def test_any_bytes_are_parsed_or_bad(message: bytes) -> None:
    try:
        ident, flags, question = parse_untrusted(message)
    except BadMessage:
        return
    assert message.startswith(ident.to_bytes(2, "big") + flags.to_bytes(2, "big"))
    assert message[12:].startswith(question)
    assert len(question) <= 255 + 4


@given(st.lists(LABELS, max_size=8), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=40))
def test_every_name_of_legal_length_passes(labels: list[bytes], ident: int, flags: int, rest: bytes) -> None:
    name = named(*labels)
    message = ident.to_bytes(2, "big") + flags.to_bytes(2, "big") + HEADER[4:] + name + b"\0\1\0\1" + rest
    if len(name) <= 255:
        assert parse_untrusted(message) == (ident, flags, name + b"\0\1\0\1")
    else:
        with pytest.raises(BadMessage):
            parse_untrusted(message)


def test_with_id() -> None:
    assert with_id(0xBEEF, HEADER) == b"\xbe\xef" + HEADER[2:]


@given(st.integers(0, 0x7FFF))
@example(RD | CD)
@example(OPCODE | TC)
def test_servfail_says_what_dnslib_expects(flags: int) -> None:
    question = bytes(DNSRecord.question("wWw.example.org", "MX").pack())
    query = question[:2] + flags.to_bytes(2, "big") + question[4:]
    answer = reply(query, parse_untrusted(query)[2], SERVFAIL)
    parsed = DNSRecord.parse(answer)
    assert (parsed.header.id, parsed.header.qr, parsed.header.ra) == (DNSRecord.parse(query).header.id, 1, 1)
    assert RCODE[parsed.header.rcode] == "SERVFAIL"
    assert (parsed.header.opcode, parsed.header.rd) == (flags >> 11 & 15, flags >> 8 & 1)
    assert (parsed.header.aa, parsed.header.tc, parsed.header.ad) == (0, 0, 0)
    assert parsed.header.cd == bool(flags & CD)
    assert (str(parsed.q.qname), QTYPE[parsed.q.qtype]) == ("wWw.example.org.", "MX")
    assert not parsed.rr + parsed.auth + parsed.ar
    assert answer[12:] == query[12:]


def test_servfail_without_a_question() -> None:
    query = bytes.fromhex("1234 0100 0000 0000 0000 0000")
    answer = reply(query, b"", SERVFAIL)
    assert parse_untrusted(answer) == (0x1234, QR | RD | 0x0082, b"")
    assert answer[4:] == bytes(8)
