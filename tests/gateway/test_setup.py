"""What a stack is told: one record, which callers give by keyword and a worker gets whole."""

from __future__ import annotations

import inspect
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from netns_kit import (
    ArgumentTypeError,
    CommandOptions,
    DhcpSettings,
    FlowRequest,
    Limits,
    Namespace,
    Network,
    NotImportable,
    Policy,
    PolicyError,
    Record,
    RunOptions,
    StackOptions,
    Subnet6,
    TapDevice,
    Uplink,
    UserStack,
)
from netns_kit.gateway.setup import Setup
from netns_kit.gateway.worker_links import connect
from netns_kit.namespace.process import open_process
from netns_kit.userstack.worker.input import decode, encode
from netns_kit.userstack.worker.policy_check import check, pickled
from tests.support import uplinks


async def answer(_: FlowRequest) -> bool:
    """Answer yes."""
    return True


OPTIONS: StackOptions = {
    "subnet": "10.7.0.0/24",
    "ipv6": Subnet6("fd07::/64"),
    "driver": "worker",
    "configure": "link",
    "limits": Limits(udp_flows=7),
    "dhcp": DhcpSettings(lease_seconds=777),
    "require": ["seccomp"],
    "records": ["db.internal=192.0.2.7"],
    "intercept_dns": True,
    "name": "seven.internal",
    "policy": Policy.deny().allow("seven.example", ports=7),
    "on_flow": answer,
    "on_flow_timeout": 7.5,
}
"""Each of them, with a value that is not its default."""


def keywords(call: Callable[..., Any]) -> set[str]:
    """The names of the keyword arguments that a notebook or help() shows."""
    parameters = inspect.signature(call).parameters.values()
    assert not [each for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD], (
        "it is spelled out"
    )
    return {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def test_the_settings_of_a_stack_are_the_same_everywhere() -> None:
    settings = set(StackOptions.__annotations__)
    assert keywords(Setup.of) == keywords(UserStack) == settings == set(OPTIONS)
    assert keywords(Network) > settings


def test_the_options_of_a_command_are_the_same_everywhere() -> None:
    options = set(CommandOptions.__annotations__)
    assert keywords(open_process) == keywords(Namespace.popen) == keywords(Network.popen) == options
    assert keywords(Namespace.run) == keywords(Network.run) == set(RunOptions.__annotations__)
    assert inspect.signature(Network.run).parameters["stdin"].default is None, "not a pipe that nobody fills"


def test_what_a_stack_is_told_is_checked_once_and_kept() -> None:
    tap, other = TapDevice.pair(mtu=1500)
    try:
        setup = Setup.of(tap, **OPTIONS)
        assert str(setup.subnet) == "10.7.0.0/24 and fd07::/64"
        assert [str(each) for each in setup.records] == [
            "seven.internal 10 A 10.7.0.100",
            "seven.internal 10 AAAA fd07::100",
            "db.internal 10 A 192.0.2.7",
        ]
        usual = Setup.of(tap)
        alike = {name for name in Setup.__match_args__ if getattr(setup, name) == getattr(usual, name)}
        assert alike == {"tap", "supply", "supplies"}, "no setting is lost on the way"
    finally:
        tap.release()
        other.release()


class Empty(Policy):
    """A policy that has no truth: it is false, and decides nothing."""

    def __len__(self) -> int:
        return len(self.rules)


@pytest.mark.anyio
async def test_a_class_made_of_policy_is_none(leaks: None) -> None:
    """What it adds would be lost on the way to a worker, so it is not taken at all."""
    tap, other = TapDevice.pair(mtu=1500)
    try:
        for given in ({"policy": Empty.deny()}, {"uplink": Uplink(policy=Empty.deny())}):
            with pytest.raises(ArgumentTypeError, match="expected a Policy, not a Empty"):
                Setup.of(tap, **given)
        with pytest.raises(ArgumentTypeError, match="expected a Policy"):
            await UserStack(tap).set_policy(Empty.deny())
    finally:
        tap.release()
        other.release()


def test_a_rule_that_asks_needs_somebody_who_answers(leaks: None) -> None:
    tap, other = TapDevice.pair(mtu=1500)
    try:
        for policy, rule in (
            (Policy.ask(), "default: ask"),
            (Policy.deny().ask("192.0.2.1", name="me"), "rule 1 (me)"),
        ):
            for given in ({"policy": policy}, {"uplink": Uplink(policy=policy)}):
                with pytest.raises(PolicyError, match="a function to ask") as caught:
                    Setup.of(tap, **given)
                assert rule in str(caught.value)
                Setup.of(tap, on_flow=answer, **given)
        assert Setup.of(tap, on_flow=answer).policy == Policy.ask()
        assert Setup.of(tap, policy=Policy.deny(), on_flow=answer).policy == Policy.deny()
    finally:
        tap.release()
        other.release()


def test_a_worker_gets_all_of_it(leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    with ExitStack() as stack:
        tap, other = TapDevice.pair(mtu=1500)
        stack.callback(tap.release)
        stack.callback(other.release)
        setup = Setup.of(tap, Uplink(policy=uplinks.refuse, dns=["192.0.2.53"]), **OPTIONS)
        first, second = connect(2, stack)
        there, peers = decode(
            encode(setup, second, {fd: os.dup(fd) for fd in (tap.fileno(), *second.filenos())})
        )
        stack.callback(there.tap.release)
        same = {name for name in Setup.__match_args__ if getattr(there, name) == getattr(setup, name)}
        assert same == {*Setup.__match_args__} - {"tap", "uplink", "on_flow"}, "which are compared below"
        assert there.on_flow is None, "it is the caller's, and stays there"
        assert (there.tap.mtu, there.tap.offloads) == (tap.mtu, tap.offloads)
        assert there.tap.fileno() != tap.fileno()
        assert repr(there.uplink) == repr(setup.uplink)
        assert peers is not None
        first.hand_over(1, 3, memoryview(b"a frame"))
        buffer = memoryview(bytearray(2048))
        assert peers.read_into(buffer, lambda *_: None) == 7
        assert (peers.index, peers.count, peers.hops, bytes(buffer[:7])) == (1, 2, 3, b"a frame")
        for sock in (peers._inbox, *peers._outboxes, peers._pins_inbox, *peers._pins_outboxes):
            sock.close()


class WithSocket(Uplink):
    """One that has opened something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mine, self.other = socket.socketpair()


def test_an_uplink_takes_no_socket_along() -> None:
    """Only what the library hands over itself travels as a descriptor."""
    uplink = WithSocket()
    with uplink.mine, uplink.other, pytest.raises(NotImportable, match="socket"):
        check(uplink)


def test_what_is_pickled_names_its_modules() -> None:
    assert "netns_kit.dns.records" in pickled(Record("db.internal", "192.0.2.7"))[1]


def test_a_namespace_without_ipv6_has_no_name_for_its_address() -> None:
    tap, guest = TapDevice.pair()
    try:
        setup = Setup.of(tap, ipv6=True, name="web.internal", records=["db.internal=fd00::7"])
        assert {each.value for each in setup.records} == {"10.0.2.100", "fd00::100", "fd00::7"}
        without = setup.without_ipv6()
        assert without.subnet.ipv6 is None
        assert [(each.name, each.value) for each in without.records] == [
            ("web.internal", "10.0.2.100"),
            ("db.internal", "fd00::7"),
        ]
    finally:
        tap.release()
        guest.release()
