"""Which forwards would listen at the same place, and what the message names."""

from __future__ import annotations

import pytest

from netns_kit import PortForward, PortInUseError, PrivilegedPortError
from netns_kit.forwarder import specs
from netns_kit.forwarder.conflicts import Claims
from netns_kit.forwarder.forwarder import _permitted
from netns_kit.forwarder.ports import UnixSocket
from netns_kit.frozen import replace
from netns_kit.host import bound_ports, sysctl


def parse(spec: str) -> list[PortForward]:
    """The forwards that a specification means."""
    return [each for each in specs.parse(spec) if isinstance(each, PortForward)]


@pytest.mark.parametrize(
    ("one", "other", "conflict"),
    [
        ("8080:80", "8080:81", True),
        ("8080:80", "127.0.0.1:8080:80", True),
        ("127.0.0.1:8080:80", "8080:80", True),
        ("127.0.0.1:8080:80", "127.0.0.2:8080:80", False),
        ("8080:80/udp", "8080:80/tcp", False),
        ("8080:80/udp", "8080:81/udp", True),
        ("8080:80", "8081:80", False),
        ("8080:80", "[::]:8080:80", False),
        ("[::]:8080:80", "[::1]:8080:80", True),
        ("[::1]:8080:80", "[::1]:8080:81", True),
        ("%eth0:8080:80", "%eth1:8080:80", False),
        ("%eth0:8080:80", "%eth0:8080:81", True),
        ("%eth0:8080:80", "8080:80", True),
        ("127.0.0.1%lo:8080:80", "0.0.0.0:8080:80", True),
        ("0:80", "0:80", False),
    ],
)
def test_what_would_listen_at_the_same_place(one: str, other: str, conflict: bool) -> None:
    claims = Claims()
    claims.add(parse(one))
    if not conflict:
        claims.add(parse(other))
        return
    leads_to = parse(one)[0].leads_to
    with pytest.raises(PortInUseError, match=f"is taken by another forward, which leads to {leads_to};"):
        claims.add(parse(other))
    claims.discard(parse(one))
    claims.add(parse(other))


def test_all_are_claimed_or_none() -> None:
    claims = Claims()
    claims.add(parse("8082:80"))
    with pytest.raises(PortInUseError, match="8082/tcp"):
        claims.add(parse("8080-8083:80-83"))
    claims.add([*parse("8080-8081:80-81"), *parse("8083:80")])
    with pytest.raises(PortInUseError, match="9000/tcp is taken by another forward, which leads to 80"):
        claims.add([*parse("9000:80"), *parse("127.0.0.1:9000:80")])
    claims.add(parse("9000:80"))


def test_only_what_is_claimed_is_given_up() -> None:
    claims = Claims()
    claims.add(parse("127.0.0.1:8080:80"))
    claims.discard([*parse("127.0.0.2:8080:80"), *parse("127.0.0.1:8080:81"), *parse("9999:80")])
    with pytest.raises(PortInUseError):
        claims.add(parse("8080:80"))


def test_what_is_optional_is_left_out() -> None:
    claims = Claims()
    first, second = [PortForward("tcp", "127.0.0.1", 8080, None, port, optional=True) for port in (80, 81)]
    other = PortForward("tcp", "127.0.0.1", 8081, None, 80)
    assert claims.add([first, second, other]) == [first, other]


def test_a_unix_socket_has_one_forward() -> None:
    claims = Claims()
    one, other = [PortForward("tcp", UnixSocket(path), 0, None, 80) for path in ("/run/one", "@other")]
    claims.add([one, other, *parse("0:80")])
    with pytest.raises(
        PortInUseError, match=r"unix:/run/one is taken by another forward, which leads to 80;"
    ):
        claims.add([one])
    claims.discard([one])
    claims.add([one])


def test_what_needs_a_privilege_is_left_out_if_it_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    low, other, high = [
        PortForward("tcp", "0.0.0.0", port, None, 80, optional=True) for port in (80, 443, 1024)
    ]
    asked: list[int] = []
    monkeypatch.setattr(sysctl, "numbers", lambda name: (1024,))
    monkeypatch.setattr(bound_ports, "may_bind", asked.append)
    assert list(_permitted([low, other, high])) == [high]
    with pytest.raises(PrivilegedPortError, match="port 443 of the host"):
        _permitted([low, replace(other, optional=False), high])
    assert asked == [80, 80]  # one is tried, and nothing where all are high
    assert list(_permitted([high])) == [high]
    assert asked == [80, 80]


def test_what_the_kernel_has_given_is_claimed_unasked() -> None:
    """Port 0 got a number that another forward, which is about to be refused, has claimed."""
    claims = Claims()
    (wanted, given) = parse("8080:80"), parse("127.0.0.1:8080:81")
    claims.add(wanted)
    claims.exchange(parse("127.0.0.1:0:81"), given)
    claims.discard(wanted)
    with pytest.raises(PortInUseError, match="which leads to 81"):
        claims.add(wanted)
