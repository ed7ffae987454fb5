"""Domain names: checked, encoded for the wire and read from it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from dnslib import DNSBuffer, DNSLabel
from hypothesis import given
from hypothesis import strategies as st

from netns_kit import DomainNameError
from netns_kit.domain_names import (
    NAME_MAX,
    address_of,
    check_host_name,
    is_host_name,
    pack_compressed,
    read_host_name,
    suffixes,
    to_text,
    to_wire,
)

LABELS = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789-_", min_size=1, max_size=63)
NAMES = st.lists(LABELS, max_size=6).map(".".join).filter(lambda name: len(name) < 254)


@given(NAMES)
def test_a_name_is_what_dnslib_takes_it_for(name: str) -> None:
    buffer = DNSBuffer()
    buffer.encode_name_nocompress(DNSLabel(name))
    assert to_wire(name) == to_wire(f"{name}.") == bytes(buffer.data)
    assert to_text(to_wire(name)) == (name or ".")


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=8), st.lists(st.binary(min_size=1), max_size=8))
def test_no_two_names_are_the_same_text(one: list[bytes], other: list[bytes]) -> None:
    def wire(labels: list[bytes]) -> bytes:
        return b"".join(bytes((len(label[:63]),)) + label[:63] for label in labels) + b"\0"

    assert (to_text(wire(one)) == to_text(wire(other))) == (wire(one) == wire(other))
    assert to_text(wire(one)).isprintable()


def test_what_is_unusual_is_escaped() -> None:
    assert to_text(b"\x04a.\\\0\x00") == r"a\.\\\000"


def test_names_that_are_not_ascii() -> None:
    assert to_wire("bücher.example") == b"\x0dxn--bcher-kva\x07example\0"


@pytest.mark.parametrize(
    "name", ["a..b", ".a", "a b", "a\tb", "a\n", "a\\b", "x" * 64, ".".join(["x" * 63] * 4), "\x7f", "é" * 60]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(DomainNameError, match="expected a domain name") as told:
        to_wire(name, "search")
    assert str(told.value).startswith(f"search={name!r}"[:200])


def test_the_longest_name() -> None:
    longest = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])
    assert len(to_wire(longest)) == NAME_MAX
    with pytest.raises(DomainNameError, match="at most 253 bytes"):
        to_wire(longest + "d")


def test_what_a_name_lies_in() -> None:
    found = [to_text(each) for each in suffixes(to_wire("www.corp.example"))]
    assert found == ["www.corp.example", "corp.example", "example"]


@given(st.ip_addresses())
def test_reverse_names(address: IPv4Address | IPv6Address) -> None:
    assert address_of(to_wire(address.reverse_pointer)) == address
    assert address_of(to_wire(address.reverse_pointer.upper())) == address


@pytest.mark.parametrize(
    "name",
    [
        "",
        "arpa",
        "in-addr.arpa",
        "2.0.10.in-addr.arpa",
        "1.2.3.4.5.in-addr.arpa",
        "256.2.0.10.in-addr.arpa",
        "1.02.0.10.in-addr.arpa",
        "a.b.c.d.in-addr.arpa",
        "ip6.arpa",
        ".".join(["g", *"0" * 31, "ip6.arpa"]),
        ".".join(["+", *"0" * 31, "ip6.arpa"]),
        ".".join([*"0" * 31, "ip6.arpa"]),
        ".".join(["00", *"0" * 30, "ip6.arpa"]),
    ],
)
def test_reverse_names_of_nobody(name: str) -> None:
    assert address_of(to_wire(name)) is None


@given(
    st.lists(st.binary(min_size=1, max_size=20), max_size=8),
    st.sampled_from(["in-addr.arpa", "ip6.arpa", ""]),
)
def test_no_name_raises(labels: list[bytes], domain: str) -> None:
    address_of(b"".join(bytes((len(label),)) + label for label in labels) + to_wire(domain))


# -- host names -------------------------------------------------------------------------------------------

labels = st.text("abcXYZ019", min_size=1, max_size=12)
domains = st.lists(labels, min_size=1, max_size=5).map(".".join)


@given(st.lists(domains, max_size=12))
def test_a_dns_library_reads_a_compressed_list(search: list[str]) -> None:
    packed = pack_compressed(search)
    buffer = DNSBuffer(packed)
    read = [str(buffer.decode_name()) for _ in search]
    assert [each.lower().rstrip(".") for each in read] == [each.lower() for each in search]
    assert buffer.offset == len(packed)


def test_names_behind_one_another_share_their_ends() -> None:
    packed = pack_compressed(["a.example.com", "b.example.com", "example.com", "com", "a.example.com"])
    assert packed == b"\x01a\x07example\x03com\0\x01b\xc0\x02\xc0\x02\xc0\x0a\xc0\x00"


@given(domains)
def test_one_name(name: str) -> None:
    assert read_host_name(to_wire(name)) == read_host_name(to_wire(name)[:-1]) == name


@given(st.binary(max_size=300))
def test_names_of_hostile_bytes(data: bytes) -> None:
    name = read_host_name(data)
    assert not name or is_host_name(name)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\xc0\x00",
        b"\x03ab",
        b"\x40" + b"a" * 64,
        b"\x01a\0\x01b\0",
        b"\x01a\xc0\x00",
        b"\x03a b\0",
    ],
)
def test_what_is_read_as_no_host_name(data: bytes) -> None:
    assert read_host_name(data) == ""


@pytest.mark.parametrize(
    "text", ["", ".", "a..b", "-a", "a-", "a b", "a/b", "a" * 64, "\u00fc", "a\n", ".".join(["a" * 50] * 6)]
)
def test_what_is_no_host_name(text: str) -> None:
    with pytest.raises(
        DomainNameError, match="expected a domain name; write labels of 1 to 63 letters"
    ) as told:
        check_host_name(text, "domain")
    assert str(told.value).startswith(f"domain={text!r}"[:200])


def test_a_host_name_may_end_with_the_root() -> None:
    assert check_host_name("example.com.", "domain") == "example.com"
