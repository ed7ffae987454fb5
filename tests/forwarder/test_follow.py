"""Which ports are followed, and what has to be done for that: pure functions."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit import Follow, ListeningSocket, PortForward, Subnet
from netns_kit.forwarder.follow import changes, wanted
from netns_kit.forwarder.ports import Mode

ONE = Subnet.parse("10.0.2.0/24")
BOTH = Subnet.parse("10.0.2.0/24", ipv6=True)
EPHEMERAL = range(32768, 61000)


def listening(
    address: str, port: int = 80, *, v6only: bool | None = None, udp: bool = False
) -> ListeningSocket:
    return ListeningSocket("udp" if udp else "tcp", ip_address(address), port, v6only)


def way(
    *sockets: ListeningSocket, host: str = "127.0.0.1", mode: Mode | None = None, subnet: Subnet = BOTH
) -> tuple[str | None, Mode | None] | None:
    """The address and the mode by which port 80 is reached."""
    protocol = sockets[0].protocol
    found = wanted(Follow(protocol, host, mode=mode), sockets, subnet, EPHEMERAL, 100).get(80)
    return None if found is None else (None if found.guest is None else str(found.guest), found.mode)


EVERYWHERE = listening("0.0.0.0")
DUAL = listening("::", v6only=False)
ONLY_6 = listening("::", v6only=True)


@pytest.mark.parametrize(
    ("sock", "host", "subnet", "expected"),
    [
        (EVERYWHERE, "127.0.0.1", ONE, (None, "stack")),
        (EVERYWHERE, "::1", ONE, (None, "stack")),
        (EVERYWHERE, "::1", BOTH, ("10.0.2.100", "stack")),
        (DUAL, "127.0.0.1", BOTH, (None, "stack")),
        (DUAL, "::1", BOTH, (None, "stack")),
        (DUAL, "127.0.0.1", ONE, (None, "stack")),
        (ONLY_6, "127.0.0.1", BOTH, ("fd00::100", "stack")),
        (ONLY_6, "::1", BOTH, (None, "stack")),
        (ONLY_6, "127.0.0.1", ONE, ("::1", "socket")),
        (listening("::"), "127.0.0.1", BOTH, ("fd00::100", "stack")),
        (listening("10.0.2.100"), "127.0.0.1", BOTH, ("10.0.2.100", "stack")),
        (listening("10.0.2.100"), "::1", BOTH, ("10.0.2.100", "stack")),
        (listening("fd00::100"), "127.0.0.1", BOTH, ("fd00::100", "stack")),
        (listening("127.0.0.1"), "127.0.0.1", BOTH, ("127.0.0.1", "socket")),
        (listening("::1"), "127.0.0.1", BOTH, ("::1", "socket")),
        (listening("172.17.0.1"), "127.0.0.1", BOTH, ("172.17.0.1", "socket")),
        (listening("fd00::100"), "127.0.0.1", ONE, ("fd00::100", "socket")),
        (listening("fe80::1"), "127.0.0.1", BOTH, None),
        (listening("224.0.0.251", udp=True), "127.0.0.1", BOTH, None),
        (listening("192.0.2.10", udp=True), "127.0.0.1", BOTH, None),  # ours, in the name of a client
        (listening("127.0.0.1", udp=True), "127.0.0.1", BOTH, ("127.0.0.1", "socket")),
    ],
)
def test_the_way_to_a_socket(
    sock: ListeningSocket, host: str, subnet: Subnet, expected: tuple[str | None, Mode] | None
) -> None:
    assert way(sock, host=host, subnet=subnet) == expected


@pytest.mark.parametrize(
    ("sock", "expected"),
    [
        (EVERYWHERE, (None, "stack")),
        (listening("127.0.0.1"), None),
        (listening("172.17.0.1"), None),
        (ONLY_6, None),
    ],
)
def test_through_the_stack_only_what_a_packet_reaches(
    sock: ListeningSocket, expected: tuple[str | None, Mode] | None
) -> None:
    assert way(sock, mode="stack", subnet=ONE) == expected


@pytest.mark.parametrize("mode", ["socket", "transparent"])
def test_by_a_socket_inside_all_is_reached(mode: Mode) -> None:
    assert way(EVERYWHERE, mode=mode) == way(ONLY_6, mode=mode, subnet=ONE) == (None, mode)
    assert way(listening("127.0.0.1"), mode=mode) == ("127.0.0.1", mode)


def test_of_several_sockets_the_nearest_is_taken() -> None:
    assert way(listening("127.0.0.1"), listening("10.0.2.100")) == ("10.0.2.100", "stack")
    assert way(listening("::1"), listening("127.0.0.1")) == ("127.0.0.1", "socket")
    assert way(ONLY_6, EVERYWHERE) == way(EVERYWHERE, ONLY_6) == (None, "stack")


def test_the_rule_chooses_ports() -> None:
    sockets = [listening("0.0.0.0", port) for port in (80, 81, 82, 90)] + [listening("0.0.0.0", 80, udp=True)]
    rule = Follow("tcp", "127.0.0.1", "lo", include=[(80, 89)], exclude=[(81, 81)])
    assert wanted(rule, sockets, ONE, EPHEMERAL, 100) == {
        port: PortForward("tcp", "127.0.0.1", port, None, port, "lo", "stack") for port in (80, 82)
    }


def test_a_udp_client_is_no_server_unless_somebody_says_so() -> None:
    client, server = listening("0.0.0.0", 40000, udp=True), listening("0.0.0.0", 40000)
    assert list(wanted(Follow("udp"), [client, listening("0.0.0.0", 53, udp=True)], ONE, EPHEMERAL, 100)) == [
        53
    ]
    assert list(wanted(Follow("udp", include=[(40000, 40000)]), [client], ONE, EPHEMERAL, 100)) == [40000]
    assert list(wanted(Follow("tcp"), [server], ONE, EPHEMERAL, 100)) == [40000]


def test_there_is_an_end_to_forwards() -> None:
    sockets = [listening("0.0.0.0", port) for port in (83, 80, 82, 81)]
    assert list(wanted(Follow("tcp"), sockets, ONE, EPHEMERAL, 2)) == [80, 81]


def forward(port: int, guest: str | None = None) -> PortForward:
    return PortForward("tcp", "127.0.0.1", port, guest, port)


def test_what_is_missing_twice_is_removed() -> None:
    made = {80: forward(80), 81: forward(81)}
    assert changes(made, {80: forward(80)}, set()) == ([], [], {81})
    assert changes(made, {80: forward(80)}, {81}) == ([81], [], set())
    assert changes(made, made, {81}) == ([], [], set())


def test_what_has_moved_is_replaced_at_once() -> None:
    moved = forward(80, "127.0.0.1")
    assert changes({80: forward(80)}, {80: moved}, set()) == ([80], [moved], set())


ports = st.dictionaries(st.integers(1, 9), st.sampled_from([None, "127.0.0.1", "10.0.2.100"]))


@given(ports, st.lists(ports, min_size=1, max_size=5))
def test_in_the_end_there_is_what_is_wanted(
    first: dict[int, str | None], then: list[dict[int, str | None]]
) -> None:
    made = {port: forward(port, guest) for port, guest in first.items()}
    missing: set[int] = set()
    for each in [*then, then[-1]]:
        goal = {port: forward(port, guest) for port, guest in each.items()}
        todo = changes(made, goal, missing)
        for port in todo.remove:
            assert made.pop(port) != goal.get(port)
        for new in todo.add:
            assert new.host_port not in made, "one port, one forward"
            made[new.host_port] = new
        missing = todo.missing
        assert {**made, **goal} == made, "what is wanted is there"
    assert made == goal
