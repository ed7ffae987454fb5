"""Specifications of reverse forwards."""

from __future__ import annotations

import pytest

from netns_kit import PortSpecError, ReverseForward, UnixSocket
from netns_kit.forwarder.specs import parse_reverse


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("5432:5433", ReverseForward("tcp", "127.0.0.1", 5432, "127.0.0.1", 5433)),
        ("0.0.0.0:0:192.0.2.1:53/udp", ReverseForward("udp", "0.0.0.0", 0, "192.0.2.1", 53)),
        ("udp:53:53", ReverseForward("udp", "127.0.0.1", 53, "127.0.0.1", 53)),
        ("[::1]:80:[2001:db8::1]:8080", ReverseForward("tcp", "::1", 80, "2001:db8::1", 8080)),
        ("80:localhost:80", ReverseForward("tcp", "127.0.0.1", 80, "127.0.0.1", 80)),
        ("unix:@a:unix:/run/b%3A", ReverseForward("tcp", UnixSocket("@a"), 0, UnixSocket("/run/b:"))),
        ("unix:/run/a:80", ReverseForward("tcp", UnixSocket("/run/a"), 0, "127.0.0.1", 80)),
        ("80:unix:@b", ReverseForward("tcp", "127.0.0.1", 80, UnixSocket("@b"))),
    ],
)
def test_reverse_forwards_as_text(spec: str, expected: ReverseForward) -> None:
    assert parse_reverse(spec) == expected


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("80", "expected ':' and what it leads to at character 3, not the end"),
        ("80:", "expected a port at character 4, not the end"),
        ("80:0", r"expected a port \(1 to 65535\) at character 4, not '0'"),
        ("80:90:100", "expected '/' or the end at character 6, not ':'"),
        ("80:90/sctp", "expected tcp or udp at character 7, not 'sctp'"),
        ("80:192.0.2.1", "expected ':' and a port at character 13, not the end"),
        ("80:nobody.example:80", "expected a port, an address or a name of /etc/hosts at character 4"),
        ("unix:a:80", "expected an absolute path or @NAME"),
        ("unix:@a:80/udp", "protocol='udp': expected tcp"),
    ],
)
def test_a_mistake_in_a_reverse_forward_is_told(spec: str, said: str) -> None:
    with pytest.raises(PortSpecError, match=said):
        parse_reverse(spec)


def test_it_is_shown_as_what_it_does() -> None:
    assert str(parse_reverse("80:[::1]:90")) == "127.0.0.1:80 inside -> [::1]:90/tcp"
    assert str(ReverseForward("tcp", UnixSocket("@a"), 0, None)) == "unix:@a inside -> a handler/tcp"
