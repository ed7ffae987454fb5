"""Port specifications: what people write, what it means, and what is said of what means nothing."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.errors import ArgumentError, NetnsKitError, PortSpecError
from netns_kit.forwarder.ports import SYNTAX, Follow, Mode, PortForward, UnixSocket, parse
from netns_kit.frozen import replace

ANY = IPv4Address("0.0.0.0")
LOCAL = IPv4Address("127.0.0.1")
GUEST = IPv4Address("10.0.2.100")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("8080", PortForward("tcp", ANY, 8080, None, 8080)),
        ("8080:80", PortForward("tcp", ANY, 8080, None, 80)),
        (":8080:80", PortForward("tcp", ANY, 8080, None, 80)),
        ("127.0.0.1:8080:80", PortForward("tcp", LOCAL, 8080, None, 80)),
        ("127.0.0.1:8080:80/tcp", PortForward("tcp", LOCAL, 8080, None, 80)),
        ("127.0.0.1:8080", PortForward("tcp", LOCAL, 8080, None, 8080)),
        ("53:53/udp", PortForward("udp", ANY, 53, None, 53)),
        ("udp:53", PortForward("udp", ANY, 53, None, 53)),
        ("tcp:53", PortForward("tcp", ANY, 53, None, 53)),
        ("udp:53:5353/udp", PortForward("udp", ANY, 53, None, 5353)),
        ("8080:10.0.2.100:80", PortForward("tcp", ANY, 8080, GUEST, 80)),
        ("127.0.0.1:8080:10.0.2.100:80", PortForward("tcp", LOCAL, 8080, GUEST, 80)),
        ("0:80", PortForward("tcp", ANY, 0, None, 80)),
        ("127.0.0.1:0:65535", PortForward("tcp", LOCAL, 0, None, 65535)),
        ("[::1]:8080:80", PortForward("tcp", IPv6Address("::1"), 8080, None, 80)),
        (
            "[::]:8080:[fd00::100]:80",
            PortForward("tcp", IPv6Address("::"), 8080, IPv6Address("fd00::100"), 80),
        ),
        ("%eth0:8080:80", PortForward("tcp", ANY, 8080, None, 80, "eth0")),
        ("192.0.2.1%br-1.5:8080:80", PortForward("tcp", IPv4Address("192.0.2.1"), 8080, None, 80, "br-1.5")),
    ],
)
def test_one_port(spec: str, expected: PortForward) -> None:
    assert parse(spec) == (expected,)


@pytest.mark.parametrize(
    ("spec", "pairs"),
    [
        ("8000-8002", [(8000, 8000), (8001, 8001), (8002, 8002)]),
        ("8000-8001:80-81", [(8000, 80), (8001, 81)]),
        ("8000-8000:80", [(8000, 80)]),
        ("65534-65535:1-2", [(65534, 1), (65535, 2)]),
    ],
)
def test_ranges_one_by_one(spec: str, pairs: list[tuple[int, int]]) -> None:
    assert [(forward.host_port, forward.guest_port) for forward in parse(spec)] == pairs


@pytest.mark.parametrize(
    "spec",
    [
        "", ":", "x", "80x", "-80", "80-", "80:", "80:80:80", "127.0.0.1", "127.0.0.1:", "localhost:80:80",
        "65536", "80:65536", "0", "80:0", "0-3:1-4", "2-1", "80-81:80", "80:80-81", "80/sctp", "sctp:80",
        "tcp:80/udp", "udp:80/tcp", "256.0.0.1:80:80", "1.2.3:80:80", "[::1:80", "[::g]:80", "[]:80", "::1:80",
        "127.0.0.1%:80:80", "127.0.0.1%a-name-too-long-by-one:80", "80:999.1.1.1:80", " 80", "80 ", "80\n",
        "80/tcp\n", "８0", "tcp:tcp:80", "80/tcp/tcp", "127.0.0.1:80:80:80", "1e3", "+80", "8_0",
    ],
)  # fmt: skip
def test_what_cannot_be_understood_says_so(spec: str) -> None:
    with pytest.raises(PortSpecError) as caught:
        parse(spec)
    assert repr(spec) in str(caught.value), "the message quotes what was written"
    assert caught.value.fix
    assert isinstance(caught.value, (ValueError, NetnsKitError))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("localhost:80:80", f"{SYNTAX}: localhost is no address, and neither tcp nor udp"),
        ("sctp:80", f"{SYNTAX}: sctp is no address, and neither tcp nor udp"),
        ("80/sctp", f"{SYNTAX}: 'sctp' is neither tcp nor udp"),
        ("80/tcp/tcp", SYNTAX),
        ("::1:80", f"{SYNTAX}: an IPv6 address stands in brackets, like [::1]:8080:80"),
        ("80:80:80", SYNTAX),
        ("80:0", "a port or a range of ports from 1 to 65535, not 0"),
        ("65536:80", "a port or a range of ports from 1 to 65535, not 65536"),
        ("2-1", "a port or a range of ports from 1 to 65535, not 2-1"),
        ("0", "a guest port from 1 to 65535, not 0; host port 0 is any that is free, like 0:80"),
        ("80-82:80-81", "as many guest ports (2) as host ports (3)"),
        ("256.0.0.1:80:80", "an address, not 256.0.0.1"),
        ("tcp:80/udp", "one protocol, not both tcp and udp"),
    ],
)
def test_what_was_given_and_what_was_expected(spec: str, said: str) -> None:
    with pytest.raises(PortSpecError) as caught:
        parse(spec)
    assert str(caught.value) == f"port={spec!r}: expected {said}; write it like 127.0.0.1:8080:80/tcp"


@given(st.text(alphabet="0123456789.:-/%[]tcpud a", max_size=24))
def test_whatever_is_written_only_one_error_is_raised(spec: str) -> None:
    try:
        forwards = parse(spec)
    except PortSpecError:
        return
    assert forwards
    assert all(0 <= forward.host_port < 65536 and 0 < forward.guest_port < 65536 for forward in forwards)


ports = st.integers(1, 65535)


@given(
    protocol=st.sampled_from(("tcp", "udp")),
    host=st.ip_addresses(),
    guest=st.one_of(st.none(), st.ip_addresses(v=4)),
    host_port=st.integers(0, 65535),
    guest_port=ports,
)
def test_what_is_printed_can_be_read(
    protocol: str,
    host: IPv4Address | IPv6Address,
    guest: IPv4Address | None,
    host_port: int,
    guest_port: int,
) -> None:
    address = f"[{host}]" if host.version == 6 else str(host)
    inner = "" if guest is None else f"{guest}:"
    (forward,) = parse(f"{address}:{host_port}:{inner}{guest_port}/{protocol}")
    assert (forward.protocol, forward.host, forward.host_port) == (protocol, host, host_port)
    assert (forward.guest, forward.guest_port) == (guest, guest_port)
    assert forward.listens_on == f"{address}:{host_port}"
    assert str(forward) == f"{address}:{host_port} -> {inner}{guest_port}/{protocol}"


def test_messages_name_the_device_and_the_guest() -> None:
    (forward,) = parse("127.0.0.1%lo:8080:[fd00::1]:80/udp")
    assert str(forward) == "127.0.0.1%lo:8080 -> [fd00::1]:80/udp"


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
        (("tcp", SOCK, 80, None, 80), "port 0 beside a unix socket"),
        (("tcp", LOCAL, 80, SOCK, 80), "port 0 beside a unix socket"),
        (("tcp", SOCK, 0, None, 0), "ports from 1 to 65535"),
        (("tcp", LOCAL, 65536, SOCK, 0), "ports from 1 to 65535"),
        (("tcp", SOCK, 0, None, 80, "lo"), "neither a device nor freebind"),
        (("tcp", SOCK, 0, None, 80, None, None, True), "neither a device nor freebind"),
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
