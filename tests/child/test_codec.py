"""Plain values: what is encoded comes back, and what is not what was to come is said to be nonsense."""

from __future__ import annotations

import errno
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit import (
    DeviceGone,
    Ending,
    FlowEvent,
    FlowInfo,
    FlowRequest,
    Follow,
    NetnsKitError,
    PortForward,
    PortInUseError,
    ProcessInfo,
    QueryEvent,
    Refusal,
    ReverseForward,
    UnixSocket,
)
from netns_kit.arguments import Address
from netns_kit.child.codec import DecodeError, Failure, decode, dump, encode, load
from netns_kit.dhcp import Lease
from netns_kit.dns import Record
from netns_kit.gateway.served import Echo, Ended, EndingSeen, News, Opened, Question
from netns_kit.operations import types_of
from netns_kit.uplink.flow import Endpoint
from netns_kit.userstack.control import OPERATIONS

addresses = st.ip_addresses()
ports = st.integers(1, 65535)
endpoints = st.builds(Endpoint, addresses, ports)
flows = st.builds(
    FlowInfo,
    st.integers(),
    st.sampled_from(["tcp", "udp", "icmp"]),
    endpoints,
    endpoints,
    st.text(),
    st.sampled_from(["outbound", "inbound"]),
    st.none() | endpoints,
    st.none() | st.text(),
    st.integers(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.none() | st.text(),
)
modes = st.none() | st.sampled_from(["stack", "socket", "transparent", "fd"])
devices = st.none() | st.sampled_from(["lo", "br-1.5"])
unix = st.sampled_from(["/run/x.sock", "@abstract", "/srv/a b:c", "/srv/\u00e4\udcff"]).map(UnixSocket)
ranges = st.lists(st.sampled_from([(1, 1), (80, 90), (65535, 65535)])).map(tuple)
forwards = st.one_of(
    st.builds(
        PortForward, st.sampled_from(["tcp", "udp"]), addresses, ports, st.none() | addresses, ports, devices,
        modes, st.booleans(), st.booleans(),
    ),
    st.builds(PortForward, st.just("tcp"), unix, st.just(0), st.none() | addresses, ports, optional=st.booleans()),
    st.builds(PortForward, st.just("tcp"), addresses, ports, unix, st.just(0), devices, freebind=st.booleans()),
)  # fmt: skip
reverses = st.builds(ReverseForward, st.just("tcp"), addresses | unix, st.just(0), unix | st.none())
other_modes = modes.filter(lambda each: each != "fd")
follows = st.builds(Follow, st.sampled_from(["tcp", "udp"]), addresses, devices, ranges, ranges, other_modes)
times = st.floats(allow_nan=False, allow_infinity=False)
processes = st.builds(
    ProcessInfo, st.none() | st.integers(), st.integers(), st.integers(), st.text(), st.text()
)
flow_events = st.builds(
    FlowEvent, st.sampled_from(["opened", "refused", "closed"]), flows,
    st.none() | st.sampled_from(Refusal), st.integers(0), st.booleans(), st.none() | processes,
    st.none() | st.sampled_from(get_args(Ending)), times,
)  # fmt: skip
query_events = st.builds(
    QueryEvent, st.just("refused"), st.text(), st.text(), addresses, st.none() | st.text(), st.text(), st.booleans(),
    st.integers(0), times,
)  # fmt: skip
events = flow_events | query_events
questions = st.builds(
    FlowRequest, st.integers(), st.sampled_from(["tcp", "udp", "icmp"]), endpoints, endpoints, st.none() | st.text(),
    st.none() | st.text(), st.none() | processes,
)  # fmt: skip
leases = st.builds(
    Lease, st.ip_addresses(), st.sampled_from(["offered", "bound", "declined", "revoked", "reserved"]), st.text(),
    st.text(), st.text(), st.none() | st.integers(0),
)  # fmt: skip
records = st.builds(
    Record, st.sampled_from(["db.internal", "*.internal"]), addresses.map(str), ttl=st.integers(0, 1000)
)
served: st.SearchStrategy[News] = st.builds(
    Opened, st.integers(), st.integers(), st.sampled_from(["tcp", "udp"]), endpoints, endpoints, endpoints,
    st.none() | st.text(),
)  # fmt: skip
served |= st.builds(Ended, st.integers(), st.integers(), st.sampled_from(get_args(EndingSeen)))
served |= st.builds(Question, st.integers(), st.binary().map(bytes.hex))
served |= st.builds(Echo, st.integers(), st.integers(), endpoints, endpoints)
VALUES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (tuple[FlowInfo, ...], st.lists(flows).map(tuple)),
    (PortForward, forwards),
    (tuple[PortForward, ...], st.lists(forwards).map(tuple)),
    (PortForward, forwards),
    (tuple[PortForward | ReverseForward, ...], st.lists(forwards | reverses).map(tuple)),
    (tuple[PortForward | Follow, ...], st.lists(forwards | follows).map(tuple)),
    (tuple[FlowEvent | QueryEvent, ...], st.lists(events).map(tuple)),
    (tuple[FlowRequest | int, ...], st.lists(questions | st.integers()).map(tuple)),
    (bool | Refusal | Endpoint, st.booleans() | st.sampled_from(Refusal) | endpoints),
    (tuple[News, ...], st.lists(served).map(tuple)),
    (tuple[Address, int] | None, st.none() | st.tuples(addresses, st.integers())),
    (tuple[Lease, ...], st.lists(leases).map(tuple)),
    (dict[str, int], st.dictionaries(st.text(), st.integers())),
    (tuple[Record, ...], st.lists(records).map(tuple)),
    (int, st.integers()),
    (bool, st.booleans()),
    (str, st.text()),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (None, st.none()),
    (tuple[Address, ...], st.lists(addresses).map(tuple)),
    (tuple[tuple[Address, str], ...], st.lists(st.tuples(addresses, st.text())).map(tuple)),
    (tuple[str | None, ...], st.lists(st.none() | st.text()).map(tuple)),
]
KINDS = [kind for kind, _ in VALUES]
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.one_of([st.tuples(st.just(kind), values) for kind, values in VALUES]))
def test_what_is_encoded_comes_back(case: tuple[Any, Any]) -> None:
    kind, value = case
    assert load(kind, dump(value)) == value


def test_every_operation_speaks_of_such() -> None:
    results = {types_of(operation)[1] for operation in OPERATIONS.values()}
    assert results <= {*KINDS, type(None)}


@given(st.sampled_from([*KINDS, Failure, tuple[str, Any]]), json)
def test_anything_else_is_nonsense(kind: Any, value: Any) -> None:
    try:
        found = decode(kind, value)
    except DecodeError:
        return
    assert decode(kind, encode(found)) == found


@given(st.binary())
def test_so_is_what_is_no_json(text: bytes) -> None:
    with suppress(DecodeError):
        load(dict[str, int], text)


def test_so_is_a_number_beyond_all_numbers() -> None:
    with pytest.raises(DecodeError):
        load(float, b"1e999")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, True), (int, 1.0), (float, 1), (float, True), (float, float("inf")),
        (bool, 1), (str, 1), (None, 0), (dict[str, int], {"a": "b"}),
        (tuple[int, ...], {"a": 1}), (tuple[int, int], [1]), (tuple[int, int], [1, 2, 3]), (Endpoint, ["10.0.2.2"]),
        (Endpoint, ["10.0.2.256", 1]), (Endpoint, [167772674, 1]), (Refusal, "open"), (Refusal, ["reset"]),
        (PortForward, ["tcp", "10.0.2.2", 0, None, 70000, None, None, False, False]),
        (PortForward, ["tcp", "10.0.2.2", 0, None, 80, None, None, False, False, False]),
        (PortForward, ["tcp", ["relative"], 0, None, 80, None, None, False, False]),
        (PortForward, ["tcp", "10.0.2.2", 0, None, 80, None, "tunnel", False, False]),
        (Follow, ["tcp", "10.0.2.2", None, [[80, 79]], [], None]), (FlowInfo, "tcp"),
    ],
)  # fmt: skip
def test_nonsense(kind: Any, value: Any) -> None:
    with pytest.raises(DecodeError):
        decode(kind, value)


@pytest.mark.parametrize("text", [b"[" * 100000, b"NaN", b"Infinity", b"1" * 5000, b"\xff", b""])
def test_no_json(text: bytes) -> None:
    with pytest.raises(DecodeError):
        load(int, text)


def test_what_is_not_plain_is_not_sent() -> None:
    with pytest.raises(TypeError):
        encode(object())


@pytest.mark.parametrize(
    "error",
    [
        PortInUseError("taken", fix="choose another"),
        PortInUseError("taken", "a knob", 5, None, errno.EACCES),
        DeviceGone("tap0: gone"),
        OSError(errno.ENODEV, "No such device"),
        FileNotFoundError(errno.ENOENT, "No such file", "/nowhere"),
    ],
)
def test_a_known_error_arrives_as_what_it_is(error: Exception) -> None:
    failure: Failure = load(Failure, dump(Failure.of(error)))
    arrived = failure.exception()
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert getattr(arrived, "errno", None) == getattr(error, "errno", None)
    assert getattr(arrived, "filename", None) == getattr(error, "filename", None)


def test_an_unknown_one_as_its_text() -> None:
    arrived = Failure.of(LookupError("a bug")).exception()
    assert type(arrived) is RuntimeError
    assert str(arrived) == "LookupError: a bug"
    (argument,) = Failure.of(NetnsKitError("it", "knob", ip_address("10.0.2.2"))).arguments[2:3]
    assert argument == "10.0.2.2"


def test_an_error_of_a_callers_own_is_not_made_from_outside() -> None:
    class Own(NetnsKitError):
        pass

    with pytest.raises(DecodeError):
        Failure.of(Own("it")).exception()


def test_what_a_failure_says_may_be_shown() -> None:
    said = str(Failure("DeviceGone", ("\x1b]0;owned\x07 \ud800\nnext",)).exception())
    assert (
        said == "\N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}\nnext"
    )
