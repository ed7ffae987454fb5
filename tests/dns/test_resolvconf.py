"""resolv.conf(5), line by line."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.dns import ResolvConf, parse_resolv_conf

LOCAL = IPv4Address("127.0.0.1")


def test_a_systemd_stub_file() -> None:
    text = """\
# This is /run/systemd/resolve/stub-resolv.conf managed by man:systemd-resolved(8).
; another comment

nameserver 127.0.0.53
options edns0 trust-ad
search fritz.box example.org
"""
    assert parse_resolv_conf(text) == ResolvConf(
        nameservers=(IPv4Address("127.0.0.53"),),
        search=("fritz.box", "example.org"),
        options=("edns0", "trust-ad"),
    )


@pytest.mark.parametrize("text", ["", "\n", "# none\n", "search lan\n", "nameserver\n", "nameserver junk\n"])
def test_no_nameserver_means_the_local_machine(text: str) -> None:
    assert parse_resolv_conf(text).nameservers == (LOCAL,)


def test_every_nameserver_in_order() -> None:
    conf = parse_resolv_conf("".join(f"nameserver 192.0.2.{n}\n" for n in (5, 4, 3, 2, 1)))
    assert [str(each) for each in conf.nameservers] == [f"192.0.2.{n}" for n in (5, 4, 3, 2, 1)]


@pytest.mark.parametrize(
    ("line", "address"),
    [
        ("nameserver ::1", IPv6Address("::1")),
        ("nameserver fe80::1%eth0", IPv6Address("fe80::1%eth0")),
        ("nameserver\t192.0.2.1", IPv4Address("192.0.2.1")),
        ("nameserver   192.0.2.1  \r", IPv4Address("192.0.2.1")),
        ("nameserver 192.0.2.1 # the old one", IPv4Address("192.0.2.1")),
        ("nameserver 192.0.2.1 192.0.2.2", IPv4Address("192.0.2.1")),
    ],
)
def test_a_nameserver_line(line: str, address: IPv4Address | IPv6Address) -> None:
    assert parse_resolv_conf(line).nameservers == (address,)


@pytest.mark.parametrize(
    "line",
    [
        " nameserver 192.0.2.1",
        "#nameserver 192.0.2.1",
        "; nameserver 192.0.2.1",
        "# one\fnameserver 192.0.2.1",
        "nameservers 192.0.2.1",
        "NAMESERVER 192.0.2.1",
        "nameserver # 192.0.2.1",
        "nameserver 192.0.2.256",
        "nameserver 192.0.2.01",
        "nameserver example.org",
        "nameserver fe80::1%",
    ],
)
def test_not_a_nameserver_line(line: str) -> None:
    assert parse_resolv_conf(line).nameservers == (LOCAL,)


@pytest.mark.parametrize(
    ("text", "search"),
    [
        ("search a b\nsearch c\n", ("c",)),
        ("search a b\ndomain c\n", ("c",)),
        ("domain c\nsearch a b\n", ("a", "b")),
        ("domain one two\n", ("one",)),
        ("search a b # c\n", ("a", "b")),
        ("search a b ;c\n", ("a", "b")),
        ("search .\n", (".",)),
        ("search\n", ()),
    ],
)
def test_the_last_search_list_wins(text: str, search: tuple[str, ...]) -> None:
    assert parse_resolv_conf(text).search == search


@pytest.mark.parametrize(
    ("text", "timeout", "attempts"),
    [
        ("", 5, 2),
        ("options timeout:2 attempts:3", 2, 3),
        ("options timeout:2\noptions attempts:3", 2, 3),
        ("options timeout:2 timeout:9", 9, 2),
        ("options timeout:99 attempts:99", 30, 5),
        ("options timeout:0 attempts:0", 1, 1),
        ("options timeout:-4 attempts:", 1, 2),
        ("options timeout:soon attempts: 3", 5, 2),
        ("options timeout:" + "9" * 5000, 5, 2),
    ],
)
def test_options(text: str, timeout: int, attempts: int) -> None:
    conf = parse_resolv_conf(text)
    assert (conf.timeout, conf.attempts) == (timeout, attempts)


def test_options_are_kept_in_order() -> None:
    conf = parse_resolv_conf("options ndots:2 rotate\noptions unheard-of:7\n")
    assert conf.options == ("ndots:2", "rotate", "unheard-of:7")


KEYWORDS = ["nameserver", "search", "domain", "options", "timeout:", "attempts:3"]
WORDS = st.sampled_from([*KEYWORDS, "#", ";", "::1", "%", " ", "\t", "\n", "\0"])


@given(st.text() | st.lists(WORDS | st.text(max_size=3)).map("".join))
def test_no_text_raises(text: str) -> None:
    conf = parse_resolv_conf(text)
    assert conf.nameservers
    assert 1 <= conf.timeout <= 30
    assert 1 <= conf.attempts <= 5
