"""Which forwards would listen at the same place, and what the message names."""

from __future__ import annotations

import pytest

from netns_kit import PortInUseError
from netns_kit.forwarder.conflicts import Claims
from netns_kit.forwarder.ports import PortForward
from netns_kit.forwarder.specs import parse


def forwards(spec: str) -> list[PortForward]:
    return [each for each in parse(spec) if isinstance(each, PortForward)]


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
    claims.add(forwards(one))
    if not conflict:
        claims.add(forwards(other))
        return
    with pytest.raises(PortInUseError, match="is taken by the forward ") as caught:
        claims.add(forwards(other))
    assert f"the forward {parse(one)[0]};" in str(caught.value)
    claims.discard(forwards(one))
    claims.add(forwards(other))


def test_all_are_claimed_or_none() -> None:
    claims = Claims()
    claims.add(forwards("8082:80"))
    with pytest.raises(PortInUseError, match="8082/tcp"):
        claims.add(forwards("8080-8083:80-83"))
    claims.add([*forwards("8080-8081:80-81"), *forwards("8083:80")])
    with pytest.raises(PortInUseError, match=r"9000/tcp is taken by the forward [0.]+:9000 -> 80"):
        claims.add([*forwards("9000:80"), *forwards("127.0.0.1:9000:80")])
    claims.add(forwards("9000:80"))


def test_only_what_is_claimed_is_given_up() -> None:
    claims = Claims()
    claims.add(forwards("127.0.0.1:8080:80"))
    claims.discard(forwards("127.0.0.2:8080:80"))
    claims.discard(forwards("9999:80"))
    with pytest.raises(PortInUseError):
        claims.add(forwards("8080:80"))


def test_an_optional_one_gives_way() -> None:
    claims = Claims()
    claims.add(forwards("8081:80"))
    assert [each.host_port for each in claims.add(forwards("8080-8082,0:80,optional"))] == [8080, 8082, 0]
