"""The guard's messages: which keys a member has, and that they are whole netlink messages."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address

from netns_kit.host import abi
from netns_kit.network import guard
from netns_kit.network.guard import KEYS, Port

MAC = bytes.fromhex("52560a000265")
PORT = Port("m1", MAC, (IPv4Address("10.0.2.101"), IPv6Address("fd00::1:101"), IPv6Address("fe80::1")))


def headers(messages: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    for each in messages:
        length, kind, flags = struct.unpack_from("=IHH", each)
        assert length == len(each)
        assert length % 4 == 0
        yield kind, flags


def test_the_keys_of_a_member() -> None:
    keys = guard.elements(PORT)
    assert keys.keys() == KEYS.keys()
    for name, found in keys.items():
        assert {len(each) for each in found} == {KEYS[name]}
        assert all(each.startswith(b"m1" + bytes(14)) for each in found)
    assert [each[16:] for each in keys["ipv4"]] == [MAC + bytes(2) + bytes((10, 0, 2, 101)), MAC + bytes(6)]
    assert [each[24:] for each in keys["ipv6"]] == [*(each.packed for each in PORT.addresses[1:]), bytes(16)]
    assert [each[16:] for each in keys["targets"]] == [each.packed for each in PORT.addresses[1:]]


def test_a_member_without_ipv6_may_send_none() -> None:
    keys = guard.elements(PORT._replace(addresses=PORT.addresses[:1]))
    assert not keys["ipv6"]
    assert not keys["targets"]


def test_a_change_is_made_as_a_whole() -> None:
    made = list(headers(guard.batch(guard.ruleset())))
    assert [kind for kind, _ in (made[0], made[-1])] == [abi.NFNL_MSG_BATCH_BEGIN, abi.NFNL_MSG_BATCH_END]
    assert all(kind >> 8 == abi.NFNL_SUBSYS_NFTABLES and flags & abi.NLM_F_ACK for kind, flags in made[1:-1])


def test_what_is_removed_is_what_was_added() -> None:
    def bodies(messages: Iterable[bytes]) -> list[bytes]:
        return [each[16:] for each in messages]

    assert bodies(guard.added(PORT)) == bodies(guard.removed(PORT))
    assert {kind & 0xFF for kind, _ in headers(guard.added(PORT))} == {abi.NFT_MSG_NEWSETELEM}
    assert {kind & 0xFF for kind, _ in headers(guard.removed(PORT))} == {abi.NFT_MSG_DELSETELEM}
