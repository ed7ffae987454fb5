"""Forwards as records: what goes together, what is chosen, and what messages show."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest

from netns_kit.errors import ArgumentError, PortSpecError
from netns_kit.forwarder.ports import Follow, Mode, PortForward, UnixSocket
from netns_kit.frozen import replace

ANY = IPv4Address("0.0.0.0")
LOCAL = IPv4Address("127.0.0.1")
GUEST = IPv4Address("10.0.2.100")


SOCK = UnixSocket("/run/x.sock")


@pytest.mark.parametrize(
    ("forward", "shown"),
    [
        (PortForward("tcp", SOCK, 0, None, 80), "unix:/run/x.sock -> 80/tcp"),
        (PortForward("tcp", LOCAL, 8080, UnixSocket("@a"), 0), "127.0.0.1:8080 -> unix:@a/tcp"),
        (PortForward("tcp", UnixSocket("/a b:c%"), 0, SOCK, 0), "unix:/a%20b%3Ac%25 -> unix:/run/x.sock/tcp"),
        (Follow("tcp"), "0.0.0.0:auto/tcp"),
        (
            Follow("udp", "::1", "lo", [(8000, 8010), (80, 80)], [(8005, 8005)]),
            "[::1]%lo:8000-8010,80,~8005,auto/udp",
        ),
    ],
)
def test_what_messages_show(forward: PortForward | Follow, shown: str) -> None:
    assert str(forward) == shown


def test_an_abstract_socket_has_its_address() -> None:
    assert (SOCK.address, UnixSocket("@name").address) == ("/run/x.sock", "\0name")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("tcp", SOCK, 80, None, 80), "0 beside a unix socket"),
        (("tcp", LOCAL, 80, SOCK, 80), "0 beside a unix socket"),
        (("tcp", SOCK, 0, None, 0), "ports from 1 to 65535"),
        (("tcp", LOCAL, 65536, SOCK, 0), "ports from 1 to 65535"),
        (("tcp", SOCK, 0, None, 80, "lo"), "no device"),
        (("tcp", SOCK, 0, None, 80, None, None, True), "no freebind"),
        (("udp", SOCK, 0, None, 80), "a unix socket carries streams"),
        (("udp", LOCAL, 80, SOCK, 0), "a unix socket carries streams"),
        (("tcp", SOCK, 0, None, 80, None, "stack"), "the mode socket"),
        (("tcp", LOCAL, 80, SOCK, 0, None, "fd"), "the mode socket"),
    ],
)
def test_what_does_not_go_together(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(PortSpecError, match=f"expected .*{said}"):
        PortForward(*given)


@pytest.mark.parametrize(
    ("forward", "mode"),
    [
        (PortForward("tcp", LOCAL, 80, None, 80), "stack"),
        (PortForward("udp", LOCAL, 80, GUEST, 80), "stack"),
        (PortForward("udp", ANY, 80, "127.0.0.2", 80), "socket"),
        (PortForward("tcp", ANY, 80, "::1", 80), "socket"),
        (PortForward("tcp", SOCK, 0, None, 80), "socket"),
        (PortForward("tcp", LOCAL, 80, SOCK, 0), "socket"),
        (PortForward("tcp", LOCAL, 80, None, 80, mode="fd"), "fd"),
    ],
)
def test_the_mode_that_is_chosen(forward: PortForward, mode: Mode) -> None:
    assert forward.settled() == replace(forward, mode=mode)
    assert forward.settled().settled("transparent").mode == mode, "it stays"


def test_the_mode_that_the_caller_prefers() -> None:
    assert Follow("tcp", mode="transparent").settled("socket").mode == "transparent"
    with pytest.raises(PortSpecError, match="expected another mode for 'auto'"):
        Follow("tcp").settled("fd")
    assert (Follow("tcp").settled("socket").mode, Follow("tcp").settled().mode) == ("socket", None)
    assert PortForward("tcp", LOCAL, 80, "127.0.0.1", 80).settled("transparent").mode == "transparent"
    with pytest.raises(PortSpecError, match="the mode socket"):
        PortForward("tcp", SOCK, 0, None, 80).settled("stack")
    with pytest.raises(ArgumentError, match="'stack', 'socket', 'transparent' or 'fd'"):
        PortForward("tcp", LOCAL, 80, None, 80).settled("tunnel")  # type: ignore[arg-type]  # the mistake


@pytest.mark.parametrize(
    ("follow", "covered"),
    [
        (Follow("tcp"), {1, 80, 81, 82, 90, 65535}),
        (Follow("tcp", include=[(80, 81), (90, 90)]), {80, 81, 90}),
        (Follow("tcp", exclude=[(80, 81)]), {1, 82, 90, 65535}),
        (Follow("tcp", include=[(80, 90)], exclude=[(81, 82)]), {80, 90}),
    ],
)
def test_the_ports_that_a_rule_covers(follow: Follow, covered: set[int]) -> None:
    assert {port for port in (1, 80, 81, 82, 90, 65535) if follow.covers(port)} == covered
