"""DHCPv4 on the wire."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP

from netns_kit.dhcp import BadDhcpMessage
from netns_kit.dhcp import message as m
from netns_kit.dhcp.message import Message, parse
from netns_kit.frozen import replace

HEAD = Message(m.REQUEST, 1, bytes(6)).pack()[:240]

addresses = st.binary(min_size=4, max_size=4).map(IPv4Address)
codes = st.integers(1, 254).filter(lambda code: code != m.OVERLOAD)


def messages(longest: int = 700) -> st.SearchStrategy[Message]:
    return st.builds(
        Message,
        op=st.integers(0, 255),
        xid=st.integers(0, 0xFFFFFFFF),
        chaddr=st.binary(max_size=16),
        htype=st.integers(0, 255),
        flags=st.integers(0, 0xFFFF),
        ciaddr=addresses,
        yiaddr=addresses,
        giaddr=addresses,
        options=st.dictionaries(codes, st.binary(max_size=longest), max_size=20),
    )


@given(messages())
def test_what_we_pack_we_parse(message: Message) -> None:
    assert parse(message.pack(65507)) == message


@given(messages(), st.integers(m.MAX_MESSAGE, 1500))
def test_what_does_not_fit_is_left_out_whole_and_last(message: Message, most: int) -> None:
    packed = message.pack(most)
    assert len(packed) <= most
    options = parse(packed).options
    assert options.items() <= message.options.items()
    left_out = [code for code in message.options if code not in options]
    for code in left_out:
        before = list(message.options)[: list(message.options).index(code)]
        size = sum(len(value) + 2 + 2 * (len(value) // 256) for value in map(options.get, before) if value)
        assert size + len(message.options[code]) > most - m.SMALLEST


@given(st.one_of(st.binary(max_size=400), st.binary(max_size=200).map(lambda tail: HEAD + tail)))
def test_hostile_bytes_raise_one_exception(data: bytes) -> None:
    with suppress(BadDhcpMessage):
        message = parse(data)
        _ = message.type, message.address(m.ADDRESS), message.number(m.MAX_SIZE, 2)


@given(messages(40), st.data())
def test_a_message_with_bytes_changed_raises_one_exception(message: Message, data: st.DataObject) -> None:
    packed = bytearray(message.pack())
    for _ in range(3):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BadDhcpMessage):
        parse(bytes(packed[: data.draw(st.integers(0, len(packed)))]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (HEAD[:-1], "truncated"),
        (HEAD[:-1] + b"\0", "magic"),
        (HEAD[:2] + b"\x11" + HEAD[3:], "hardware-length"),
        (HEAD + b"\x35", "option-length"),
        (HEAD + b"\x35\x02\x01", "option-length"),
        (HEAD + b"\x34\x01\x04\xff", "overload"),
        (HEAD + b"\x34\x02\x01\x01\xff", "overload"),
        (HEAD + b"\x34\x00\xff", "overload"),
        (HEAD[:108] + b"\x0c\x80" + bytes(126) + HEAD[236:] + b"\x34\x01\x01\xff", "option-length"),
        (HEAD[:44] + b"\x0c\x3f" + bytes(62) + HEAD[108:] + b"\x34\x01\x02\xff", "option-length"),
    ],
)
def test_lengths_that_lie(data: bytes, reason: str) -> None:
    with pytest.raises(BadDhcpMessage, match=reason):
        parse(data)


@pytest.mark.parametrize("value", [b"", b"\0\0\0", b"\0\0\0\0\0"])
def test_numbers_of_another_length(value: bytes) -> None:
    message = Message(m.REQUEST, 1, bytes(6), options={m.ADDRESS: value, m.TYPE: value})
    with pytest.raises(BadDhcpMessage, match="option-length"):
        message.address(m.ADDRESS)
    with pytest.raises(BadDhcpMessage, match="option-length"):
        _ = message.type


def test_nothing_counts_behind_the_end_and_padding_is_skipped() -> None:
    assert parse(HEAD + b"\0\0\x35\x01\x01\0\xff\x0c\xf0").options == {m.TYPE: b"\x01"}


def test_pieces_are_put_together_wherever_they_lie() -> None:
    """RFC 3396: first those behind the fixed fields, then in the field of the file, then in that of the name."""
    sname = b"\x0c\x01c\xff".ljust(64, b"\0")
    file = b"\x0c\x01b\xff".ljust(128, b"\0")
    fields = b"\x0c\x01a\x34\x01\x03\x0c\x01A\xff"
    data = HEAD[:44] + sname + file + HEAD[236:] + fields
    assert parse(data).options == {m.HOSTNAME: b"aAbc"}
    only_file = data.replace(b"\x34\x01\x03", b"\x34\x01\x01")
    assert parse(only_file).options == {m.HOSTNAME: b"aAb"}


def test_options_overflow_into_both_fields() -> None:
    options = {m.TYPE: b"\x05", **{code: bytes(60) for code in range(200, 207)}}
    packed = Message(m.REPLY, 1, bytes(6), options=options).pack()
    assert len(packed) <= m.MAX_MESSAGE
    assert parse(packed).options == options
    assert b"\x34\x01\x03" in packed


@given(messages(30))
def test_scapy_reads_the_same(message: Message) -> None:
    message.options.pop(m.TYPE, None)
    options = {m.TYPE: b"\x02", 200: b"x", **{c: v for c, v in message.options.items() if c > 224}}
    message = replace(message, options=options)
    theirs = BOOTP(message.pack())
    assert theirs.xid == message.xid
    assert theirs.chaddr[: theirs.hlen] == message.chaddr
    assert theirs.yiaddr == str(message.yiaddr)
    assert theirs.getlayer(DHCP).options[0] == ("message-type", 2)
    assert theirs.getlayer(DHCP).options[1] == (200, b"x")
