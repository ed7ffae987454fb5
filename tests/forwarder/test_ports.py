"""Port specifications: what people write, what it means, and what is said of what means nothing."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.errors import NetnsKitError, PortSpecError
from netns_kit.forwarder.ports import PortForward, parse

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
        (
            "localhost:80:80",
            "cannot be understood: localhost is no address, and neither tcp nor udp; expected [tcp:",
        ),
        ("sctp:80", "cannot be understood: sctp is no address, and neither tcp nor udp"),
        ("80/sctp", "cannot be understood: 'sctp' is neither tcp nor udp"),
        ("80/tcp/tcp", "cannot be understood; expected [tcp:"),
        ("::1:80", "cannot be understood: an IPv6 address stands in brackets, like [::1]:8080:80"),
        ("80:80:80", "cannot be understood; expected [tcp:"),
        ("80:0", "expected a port or a range of ports, 1 to 65535, not 0"),
        ("65536:80", "expected a port or a range of ports, 1 to 65535, not 65536"),
        ("2-1", "expected a port or a range of ports, 1 to 65535, not 2-1"),
        ("0", "expected a guest port of 1 to 65535, not 0; host port 0 is any that is free"),
        ("80-82:80-81", "expected as many guest ports as host ports, not 3 and 2"),
        ("256.0.0.1:80:80", "expected an address, not 256.0.0.1"),
        ("tcp:80/udp", "says both tcp and udp: expected one"),
    ],
)
def test_what_was_given_and_what_was_expected(spec: str, said: str) -> None:
    with pytest.raises(PortSpecError) as caught:
        parse(spec)
    text = str(caught.value)
    assert text.replace(f"port {spec!r}", "").lstrip(": ").startswith(said) or f"port {spec!r} {said}" in text
    assert "like 127.0.0.1:8080:80/tcp" in text or "0:80" in text


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
