"""Links of a member that lead past the stack: made where the caller may, and refused with the cause where not."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from netns_kit import ArgumentError, ArgumentTypeError, Macvlan, Namespace, NotPrivileged, Veth, Vlan
from tests.support import needs, needs_tun
from tests.support.added_links import expected, made

pytestmark = pytest.mark.anyio


async def test_a_user_makes_links_in_a_world_of_its_own() -> None:
    needs_tun()
    needs("unshare", "ip", "ping")
    assert made(["--user", "--map-root-user", "--net"]) == expected()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may")
@pytest.mark.parametrize("kind", ["macvlan", "veth"])
async def test_an_interface_of_the_hosts_is_refused(kind: str) -> None:
    name = next(name for _, name in socket.if_nameindex() if name != "lo")
    link = Veth("nkhost0") if kind == "veth" else Macvlan(name)
    before = len(os.listdir("/proc/self/fd"))
    async with Namespace.create() as namespace:
        inside = len(os.listdir("/proc/self/fd"))
        with pytest.raises(
            NotPrivileged, match=rf"may not make more, a {kind} .*CAP_NET_ADMIN.*root"
        ) as refused:
            await namespace.add_link("more", link)
        assert refused.value.knob == "CAP_NET_ADMIN"
        assert len(os.listdir("/proc/self/fd")) == inside
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize(
    ("name", "link", "knob"),
    [
        ("", Macvlan("up0"), "name"),
        ("a" * 16, Macvlan("up0"), "name"),
        ("a/b", Macvlan("up0"), "name"),
        ("more", Macvlan(""), "parent"),
        ("more", Macvlan("up0", "passthru"), "mode"),  # type: ignore[arg-type]  # it is refused
        ("more", Veth("a b"), "host"),
        ("more", Vlan("up0", 4095), "tag"),
        ("more", Vlan("up0", 0), "tag"),
        ("more", "macvlan", "link"),
    ],
)
async def test_arguments_that_cannot_be_used(name: str, link: Any, knob: str) -> None:
    async with Namespace.create() as namespace:
        with pytest.raises((ArgumentError, ArgumentTypeError)) as refused:
            await namespace.add_link(name, link)
    assert refused.value.knob == knob
