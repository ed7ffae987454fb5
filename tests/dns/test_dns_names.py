"""Records, and the files they are written in."""

from __future__ import annotations

import subprocess
import sys

import pytest
from dnslib import RR, DNSBuffer
from hypothesis import given
from hypothesis import strategies as st

from netns_kit import ArgumentError, DomainNameError, Record, RecordError
from netns_kit.dns import hosts, parse_resolv_conf
from netns_kit.dns.records import as_rr


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("192.0.2.5", "A"),
        ("2001:db8::5", "AAAA"),
        ("other.example", "CNAME"),
        ("host.example", "PTR"),
        ("ns.example", "NS"),
        ("10 mail.example", "MX"),
        ('"one" "two words"', "TXT"),
        ("0 5 5060 pbx.example", "SRV"),
        ('0 issue "ca.example"', "CAA"),
        (r"\# 4 deadbeef", "TYPE65280"),
    ],
)
def test_a_record_lies_on_the_wire_as_dnslib_has_it(value: str, kind: str) -> None:
    (expected,) = RR.fromZone(f"name.example. 7 IN {kind} {value}")
    buffer = DNSBuffer()
    expected.rdata.pack(buffer)
    made = as_rr(Record("Name.example.", value, kind.lower(), ttl=7), b"\0")
    assert (made.kind, made.ttl, made.data) == (expected.rtype, 7, bytes(buffer.data))


def test_an_address_needs_no_type() -> None:
    assert Record("A.example", "192.0.2.1") == Record("a.example.", "192.0.2.1", "A")
    assert Record("a.example", "2001:DB8:0::1") == Record("a.example", "2001:db8::1", "AAAA")
    assert Record.parse("db.internal=192.0.2.5") == Record("db.internal", "192.0.2.5")
    assert str(Record("a.example", "192.0.2.1", ttl=60)) == "a.example 60 A 192.0.2.1"


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("a..b", "192.0.2.1", ""),
        ("a", "192.0.2", ""),
        ("a", "fe80::1%eth0", ""),
        ("a", "192.0.2.1", "AAAA"),
        ("a", "::1", "A"),
        ("a", "b..c", "CNAME"),
        ("a", "mail", "MX"),
        ("a", "10", "MX"),
        ("a", "1.2.3.4", "NOSUCH"),
        ("a", "1.2.3.4\nb. A 1.2.3.4", "TXT"),
        ("a", '"' + "x" * 70000 + '"', "TXT"),
        ("a", "x", "TXT IN"),
    ],
)
def test_records_that_make_no_sense(name: str, value: str, kind: str) -> None:
    with pytest.raises((RecordError, DomainNameError)) as told:
        Record(name, value, kind)
    assert "expected" in str(told.value)


@pytest.mark.parametrize("ttl", [-1, 1 << 31])
def test_a_ttl_out_of_range(ttl: int) -> None:
    with pytest.raises(ArgumentError, match=f"ttl={ttl}: expected a whole number from 0 to 2147483647"):
        Record("a", "192.0.2.1", ttl=ttl)


@pytest.mark.parametrize("text", ["", "a", "a=", "=192.0.2.1", "a=b", "a=192.0.2.1:80", "a b=192.0.2.1"])
def test_what_is_no_name_and_address(text: str) -> None:
    with pytest.raises((RecordError, DomainNameError), match="expected"):
        Record.parse(text)


# -- files ------------------------------------------------------------------------------------------------


def test_the_records_of_a_hosts_file() -> None:
    text = "# comment\n192.0.2.1 a a.lan # more\n::1\tlocalhost\nnonsense here\n192.0.2.2\n"
    text += "fe80::1%lo x\n192.0.2.3 b..c d\n"
    found = [(each.name, each.value) for each in Record.from_hosts(text)]
    assert found == [("a", "192.0.2.1"), ("a.lan", "192.0.2.1"), ("localhost", "::1"), ("d", "192.0.2.3")]


@given(st.text())
def test_no_text_of_a_hosts_file_raises(text: str) -> None:
    Record.from_hosts(text)
    hosts.written("machine", [], text)


def test_a_hosts_file() -> None:
    outer = "127.0.0.1 localhost\n127.0.1.1 machine.lan machine\n192.0.2.9 nas DB.internal\n"
    text = hosts.written("machine", [("db.internal", "192.0.2.5")], outer)
    assert text.splitlines() == [
        "127.0.0.1 localhost machine",
        "::1 localhost ip6-localhost ip6-loopback machine",
        "192.0.2.5 db.internal",
        "127.0.1.1 machine.lan",
        "192.0.2.9 nas",
    ]


def test_a_resolv_conf_is_written_as_it_is_read() -> None:
    text = "nameserver 10.0.2.3\nnameserver fd00::3\nsearch lan corp.example\noptions ndots:2 timeout:3\n"
    assert parse_resolv_conf(text).written() == text
    assert parse_resolv_conf("").written() == "nameserver 127.0.0.1\n"


def test_reading_an_address_imports_nothing() -> None:
    """dnslib comes with the first record that needs it."""
    code = (
        "import sys; from netns_kit import Record; Record('a', '192.0.2.1'); Record('b', 'a', 'CNAME');"
        "assert 'dnslib' not in sys.modules; Record('a', '1 b', 'MX'); assert 'dnslib' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
