"""Messages of netlink: how they lie, and what this kernel makes of them."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from netns_kit.host import abi, netlink

NO_LINK = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)


def test_attributes_are_padded_to_words() -> None:
    assert netlink.attribute(3, b"abcde") == struct.pack("=HH", 9, 3) + b"abcde\0\0\0"
    assert netlink.text(3, "lo") == struct.pack("=HH", 7, 3) + b"lo\0\0"
    inner = netlink.number(1, 7)
    assert netlink.nested(2, inner, inner) == struct.pack("=HH", 20, 2 | abi.NLA_F_NESTED) + 2 * inner


@pytest.fixture
def route() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, abi.NETLINK_ROUTE)


def test_answers_come_without_acknowledgements(route: socket.socket) -> None:
    asked = netlink.message(abi.RTM_GETLINK, 0, NO_LINK, netlink.text(abi.IFLA_IFNAME, "lo"))
    with route:
        answers = netlink.transact(route, [asked, asked])
    assert [struct.unpack_from("=i", each, 4) for each in answers] == [(1,), (1,)]


def test_the_first_refusal_is_raised(route: socket.socket) -> None:
    missing = netlink.message(abi.RTM_GETLINK, 0, NO_LINK, netlink.text(abi.IFLA_IFNAME, "nothing0"))
    with route, pytest.raises(OSError, match=r".") as caught:
        netlink.transact(route, [missing])
    assert caught.value.errno == errno.ENODEV
