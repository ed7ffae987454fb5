"""Records in messages, ours and others', against dnslib and against hostile bytes; and messages in streams."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from struct import Struct

import pytest
from dnslib import EDNS0, MX, NS, QTYPE, RR, SOA, SRV, TXT, A, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.dns import BadMessage, Framing, framed, parse_untrusted
from netns_kit.dns.message import AA, TC, Edns, Rr, edns, expanded, reply, same_question, walk, with_name
from netns_kit.domain_names import to_wire
from tests.work import Meter

RECORD = Struct("!HHIH")  # type, class, TTL, length of the data

QUERY = bytes(DNSRecord.question("www.example", "MX").pack())
QUESTION = parse_untrusted(QUERY)[2]
EMPTY = b"\0\0\x81\x80" + bytes(8)


def packed() -> bytes:
    """As many compressed names as dnslib makes."""
    made = DNSRecord.parse(QUERY).reply()
    made.add_answer(RR("www.example", QTYPE.MX, ttl=60, rdata=MX("mail.example", 10)))
    made.add_answer(RR("www.example", QTYPE.SRV, ttl=61, rdata=SRV(1, 2, 3, "srv.mail.example")))
    made.add_answer(RR("www.example", QTYPE.TXT, ttl=62, rdata=TXT([b"\xc0\x0c"])))
    made.add_auth(RR("example", QTYPE.SOA, ttl=63, rdata=SOA("ns.example", "root.example", (1, 2, 3, 4, 5))))
    made.add_auth(RR("example", QTYPE.NS, ttl=64, rdata=NS("ns.example")))
    made.add_ar(RR("mail.example", QTYPE.A, ttl=65, rdata=A("192.0.2.1")))
    return bytes(made.pack())


def test_names_are_made_whole() -> None:
    answers, authority = expanded(packed(), QUESTION)
    assert [(each.owner, each.kind, each.ttl, each.data) for each in answers] == [
        (to_wire("www.example"), QTYPE.MX, 60, b"\0\x0a" + to_wire("mail.example")),
        (to_wire("www.example"), QTYPE.SRV, 61, b"\0\1\0\2\0\3" + to_wire("srv.mail.example")),
        (to_wire("www.example"), QTYPE.TXT, 62, b"\x02\xc0\x0c"),
    ]
    times = b"".join(number.to_bytes(4, "big") for number in (1, 2, 3, 4, 5))
    assert [each.data for each in authority] == [
        to_wire("ns.example") + to_wire("root.example") + times,
        to_wire("ns.example"),
    ]


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (b"\3WWW\0\0\x41\0\1", True),
        (b"\3www\0\0\x41\0\1", True),
        (b"\3wwx\0\0\x41\0\1", False),
        (b"\3www\0\0\x61\0\1", False),
        (b"\3www\0\0\x41\0\3", False),
        (b"", False),
    ],
)
def test_questions_are_the_same_but_for_the_case_of_the_name(other: bytes, same: bool) -> None:
    """0x41 and 0x61 are types, and not letters."""
    assert same_question(b"\3wWw\0\0\x41\0\1", other) is same


def chained(size: int) -> bytes:
    """An answer of about that length: a long chain of pointers, and records all of whose names are its end."""
    about = to_wire("a") + b"\0\1\0\1"
    message = bytearray(b"\0\1\x81\x80\0\1\0\0\0\0\0\0" + about + b"\0" + RECORD.pack(65280, 1, 0, 0))
    begin = last = len(message)
    message += b"\0"
    while len(message) < size // 4:
        message += (0xC000 | last).to_bytes(2, "big")
        last = len(message) - 2
    RECORD.pack_into(message, begin - RECORD.size, 65280, 1, 0, len(message) - begin)
    count = 1
    while len(message) < size:
        end = (0xC000 | last).to_bytes(2, "big")
        message += end + RECORD.pack(QTYPE.NS, 1, 0, 2) + end
        count += 1
    message[6:8] = count.to_bytes(2, "big")
    return bytes(message)


def long_names(size: int) -> bytes:
    """Records whose owners are the longest name there is, one label further each."""
    about = to_wire("a") + b"\0\1\0\1"
    message = bytearray(b"\0\1\x81\x80\0\1\0\0\0\0\0\0" + about)
    begin = len(message)
    message += 120 * b"\1x" + b"\0" + RECORD.pack(65280, 1, 0, 0)
    count = 1
    while len(message) < size:
        message += (0xC000 | begin + 2 * (count % 100)).to_bytes(2, "big") + RECORD.pack(65280, 1, 0, 0)
        count += 1
    message[6:8] = count.to_bytes(2, "big")
    return bytes(message)


@pytest.mark.parametrize("hostile", [chained, long_names])
def test_names_take_time_bounded_by_the_message(hostile: Callable[[int], bytes]) -> None:
    """Twice the bytes are twice the work, and no byte is much of it."""

    def work(size: int) -> int:
        message, meter = hostile(size), Meter()
        meter.run(expanded, message, parse_untrusted(message)[2])
        return meter.work.instructions

    small, large = work(2000), work(4000)
    assert large < 2.2 * small
    assert large < 60 * 4000


@pytest.mark.parametrize(
    ("owners", "names"), [([4], [b"\1q\0"]), ([0], None), ([4, 0], None), ([0, 4], None)]
)
def test_a_pointer_into_the_labels_before_it_leads_nowhere(
    owners: list[int], names: list[bytes] | None
) -> None:
    """Also where what it leads to was read before: whether a message is one does not hang on its order."""
    about = to_wire("a") + b"\0\1\0\1"
    at = 12 + len(about) + 11
    labels = b"\3\1q\0" + (0xC000 | at + 1).to_bytes(
        2, "big"
    )  # of three octets; the pointer leads to q in them
    message = b"\0\1\x81\x80\0\1" + (1 + len(owners)).to_bytes(2, "big") + bytes(4) + about
    message += b"\0" + RECORD.pack(65280, 1, 0, len(labels)) + labels
    for owner in owners:
        message += (0xC000 | at + owner).to_bytes(2, "big") + RECORD.pack(65280, 1, 0, 0)
    if names is None:
        with pytest.raises(BadMessage):
            expanded(message, about)
    else:
        assert [each.owner for each in expanded(message, about)[0]][1:] == names


def test_where_records_lie() -> None:
    message = packed()
    found = list(walk(message, QUESTION))
    assert [each.section for each in found] == [1, 1, 1, 2, 2, 3]
    assert [int.from_bytes(message[each.ttl : each.ttl + 4], "big") for each in found] == [
        60,
        61,
        62,
        63,
        64,
        65,
    ]


def test_what_we_write_dnslib_reads() -> None:
    answers, authority = expanded(packed(), QUESTION)
    made = DNSRecord.parse(reply(QUERY, QUESTION, 0, answers, authority, flags=AA))
    assert made.header.aa
    assert [str(each) for each in made.rr] == [str(each) for each in DNSRecord.parse(packed()).rr]
    assert [str(each) for each in made.auth] == [str(each) for each in DNSRecord.parse(packed()).auth]


def test_an_owner_that_lies_there_already_is_pointed_at() -> None:
    target = to_wire("target.example")
    records = [
        Rr(to_wire("WWW.example"), 5, 9, target),
        Rr(target, 1, 9, bytes(4)),
        Rr(target, 1, 9, bytes(4)),
    ]
    message = reply(QUERY, QUESTION, 0, records)
    assert len(message) == len(QUERY) + (12 + len(target)) + 2 * (12 + 4)
    assert [str(each.rname) for each in DNSRecord.parse(message).rr][1:] == ["target.example."] * 2


@pytest.mark.parametrize("do", [False, True])
def test_edns_is_answered(do: bool) -> None:
    asked = DNSRecord.parse(QUERY)
    asked.add_ar(EDNS0(flags="do" if do else "", udp_len=4096))
    message = bytes(asked.pack())
    assert edns(message, QUESTION) == Edns(4096, 0x8000 * do, plain=True)
    (opt,) = DNSRecord.parse(reply(message, QUESTION, 3)).ar
    assert (opt.rtype, opt.edns_len, opt.edns_do) == (QTYPE.OPT, 1232, do)
    assert not DNSRecord.parse(reply(QUERY, QUESTION, 3)).ar


def test_what_is_no_edns() -> None:
    assert edns(QUERY, QUESTION) is None
    assert edns(QUERY[:11] + b"\1" + QUERY[12:], QUESTION) is None, "a record that is not there"
    small = QUERY[:11] + b"\1" + QUERY[12:] + bytes.fromhex("00 0029 0010 00000000 0000")
    assert edns(small, QUESTION) == Edns(512, 0, plain=True), "less than 512 is 512, RFC 6891 6.2.3"
    cookie = small[:-2] + bytes.fromhex("000c 000a 0008 3132333435363738")
    assert edns(cookie, QUESTION) == Edns(512, 0, plain=False)


def test_what_is_too_long_is_truncated() -> None:
    records = [Rr(QUESTION[:-4], 16, 9, b"\xff" + bytes(255))] * 2
    whole = reply(QUERY, QUESTION, 0, records)
    assert reply(QUERY, QUESTION, 0, records, limit=len(whole)) == whole
    cut = reply(QUERY, QUESTION, 0, records, limit=len(whole) - 1)
    assert parse_untrusted(cut)[1] & TC
    assert cut[4:] == QUERY[4:6] + bytes(6) + QUESTION


def test_another_name_in_the_same_query() -> None:
    asked = DNSRecord.parse(QUERY)
    asked.add_ar(EDNS0(udp_len=4096))
    message = with_name(bytes(asked.pack()), QUESTION, to_wire("x.test"))
    found = DNSRecord.parse(message)
    assert (str(found.q.qname), found.q.qtype, found.ar[0].edns_len) == ("x.test.", QTYPE.MX, 4096)
    assert found.header.id == asked.header.id


# -- hostile bytes ----------------------------------------------------------------------------------------


def message_of(*records: bytes) -> bytes:
    return EMPTY[:6] + len(records).to_bytes(2, "big") + EMPTY[8:] + b"".join(records)


TAIL = bytes.fromhex("0001 0001 00000000")  # type A, class IN, a TTL


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\x03ww",
        b"\x00\0\1\0\1",
        b"\xc0\x0c" + TAIL + b"\0\0",  # to itself
        b"\xc0\x0e" + TAIL + b"\0\0",  # ahead
        b"\x01a\xc0\x0c" + TAIL + b"\0\0",  # round and round
        b"\xc0",
        b"\x40" + bytes(64) + TAIL + b"\0\0",
        b"\x80" + bytes(64) + TAIL + b"\0\0",
        b"\0" + TAIL + b"\0\1",  # more data than there is
        b"\0" + TAIL + b"\xff\xff" + bytes(100),
        b"\0\0\5\0\1\0\0\0\0\0\1\1a\0",  # a name longer than its record
        b"\0\0\5\0\1\0\0\0\0\0\2\xc0\xff",
        b"\0\0\x0f\0\1\0\0\0\0\0\1\0",  # MX without a name
        b"\0\0\6\0\1\0\0\0\0\0\1\0",  # SOA with one name
    ],
)
def test_records_that_lie(record: bytes) -> None:
    with pytest.raises(BadMessage):
        expanded(message_of(record), b"")


def test_a_long_name_of_pointers() -> None:
    """Each label points at the one before, and all are read from the end."""
    labels, at = b"\0", 12
    for _ in range(200):
        labels, at = labels + b"\x01a" + (0xC000 | at).to_bytes(2, "big"), 12 + len(labels)
    data = labels
    record = b"\0\0\x63\0\1\0\0\0\0" + len(data).to_bytes(2, "big") + data
    pointing = (0xC000 | (12 + 11 + len(labels) - 4)).to_bytes(2, "big") + TAIL + b"\0\0"
    with pytest.raises(BadMessage):
        expanded(message_of(record, pointing), b"")


@given(st.binary(max_size=200))
def test_any_bytes_are_records_or_bad(rest: bytes) -> None:
    for message in (EMPTY[:6] + b"\0\2\0\2\0\2" + rest, EMPTY[:6] + rest + bytes(6)):
        with suppress(BadMessage):
            expanded(message, b"")
        edns(message, b"")


@given(st.data())
def test_a_message_with_bytes_changed(data: st.DataObject) -> None:
    message = bytearray(packed())
    for _ in range(data.draw(st.integers(1, 6))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        _, _, question = parse_untrusted(bytes(message))
        answers, authority = expanded(bytes(message), question)
    except BadMessage:
        return
    assert all(len(each.owner) <= 255 for each in answers + authority)
    reply(QUERY, QUESTION, 0, answers, authority, limit=512)


# -- streams ----------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(1, 9)))
def test_messages_come_out_however_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    stream, framing, found = b"".join(map(framed, messages)), Framing(), list[bytes]()
    for cut in [*cuts, len(stream)]:
        piece, stream = stream[:cut], stream[cut:]
        while piece:
            taken, message = framing.take(piece)
            assert taken
            piece = piece[taken:]
            if message is not None:
                found.append(message)
    assert found == messages


def test_a_message_too_long_is_bad_before_it_has_come() -> None:
    framing = Framing(longest=5)
    assert framing.take(framed(b"12345")) == (7, b"12345")
    with pytest.raises(BadMessage, match="6 bytes"):
        framing.take(b"\0\6")
