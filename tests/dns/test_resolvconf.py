"""resolv.conf(5), line by line."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.dns import Manner, ResolvConf, parse_resolv_conf

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


@pytest.mark.parametrize(
    ("options", "manner"),
    [
        ("", Manner()),
        ("ndots:3 edns0 trust-ad no-aaaa unheard-of", Manner()),
        ("use-vc", Manner(streams=True)),
        ("rotate", Manner(rotate=True)),
        ("single-request", Manner(ports=True)),
        ("single-request-reopen", Manner(ports=True)),
        ("attempts:4", Manner(attempts=4)),
        ("timeout:5", Manner()),
        ("timeout:soon", Manner()),
        ("timeout:1 attempts:1", Manner(timeout=1, attempts=1, patience=2)),
        ("timeout:3", Manner(timeout=3, patience=12)),
        ("timeout:30 attempts:5", Manner(timeout=25, attempts=5, patience=25)),
    ],
)
def test_how_two_servers_are_asked(options: str, manner: Manner) -> None:
    conf = parse_resolv_conf(f"nameserver 192.0.2.1\nnameserver 192.0.2.2\noptions {options}\n")
    assert conf.manner() == manner


@pytest.mark.parametrize(
    ("options", "kept", "kept_with_others"),
    [
        ("ndots:3 no-aaaa", "ndots:3 no-aaaa", "ndots:3 no-aaaa"),
        ("debug inet6 no-tld-query unheard-of:7", "debug inet6 no-tld-query unheard-of:7", None),
        ("edns0 trust-ad", "edns0 trust-ad", ""),
        ("single-request", "single-request", ""),
        ("single-request-reopen", "single-request-reopen", ""),
        ("use-vc rotate", "", ""),
        ("timeout:1 attempts:1", "timeout:3 attempts:1", ""),
        ("timeout:3", "timeout:13", ""),
        ("timeout:30 attempts:5", "timeout:26 attempts:5", ""),
        ("timeout:5 attempts:2", "", ""),
        ("attempts:3", "attempts:3", ""),
    ],
)
def test_what_programs_inside_are_told(options: str, kept: str, kept_with_others: str | None) -> None:
    """Nothing of servers that are not asked.  They wait for us a little longer than we wait for the servers."""
    conf = parse_resolv_conf(f"nameserver 192.0.2.1\nnameserver 192.0.2.2\noptions {options}\n")
    assert " ".join(conf.options_for_clients(same_servers=True)) == kept
    others = kept if kept_with_others is None else kept_with_others
    assert " ".join(conf.options_for_clients(same_servers=False)) == others


KEYWORDS = ["nameserver", "search", "domain", "options", "timeout:", "attempts:3"]
WORDS = st.sampled_from([*KEYWORDS, "#", ";", "::1", "%", " ", "\t", "\n", "\0"])


@given(st.text() | st.lists(WORDS | st.text(max_size=3)).map("".join))
def test_no_text_raises(text: str) -> None:
    conf = parse_resolv_conf(text)
    assert conf.nameservers
    assert 1 <= conf.timeout <= 30
    assert 1 <= conf.attempts <= 5
