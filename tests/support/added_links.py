"""A world with an interface that links can be made on, and a program there that makes them for a member."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from tests.support import ROOT

SETUP = """
set -e
ip link set lo up
ip link add up0 up type veth peer name far0
ip addr add 192.0.2.1/24 dev far0
ip link set far0 up
exec "$@"
"""
MAKE = """
import anyio, subprocess
from ipaddress import IPv4Interface
from netns_kit import ArgumentError, FeatureUnavailable, Ipvlan, Macvlan, Network, Veth, Vlan

LINKS = {
    "macvlan": (Macvlan("up0"), "192.0.2.5/24", "192.0.2.1"),
    "ipvlan": (Ipvlan("up0"), "192.0.2.6/24", "192.0.2.1"),
    "veth": (Veth("nk0"), "198.51.100.2/24", "198.51.100.1"),
    "vlan": (Vlan("eth0", 7), "203.0.113.1/24", "203.0.113.2"),
}

async def reach(kind, member, second):
    link, address, peer = LINKS[kind]
    try:
        await member.namespace.add_link("more", link)
    except FeatureUnavailable as error:
        return error.knob
    if kind == "veth":
        await anyio.run_process(["ip", "addr", "add", peer + "/24", "dev", "nk0"])
    if kind == "vlan":
        await second.namespace.add_link("more", link)
        await second.namespace.configure_link("more", address=IPv4Interface(peer + "/24"))
    await member.namespace.configure_link("more", address=IPv4Interface(address))
    done = await member.run(["ping", "-c1", "-W5", peer], stdout=subprocess.DEVNULL, check=False)
    try:
        await member.namespace.add_link("more", link)
    except ArgumentError as error:
        return "reached" if done.returncode == 0 else "lost", error.knob

async def main():
    for kind in LINKS:
        async with Network() as net, net.member("one") as one, net.member("two") as two:
            print(kind, await reach(kind, one, two), flush=True)
    async with Network() as net, net.member("one") as one:
        for link in Macvlan("none0"), Macvlan("lo"), Vlan("none0", 7):
            try:
                await one.namespace.add_link("more", link)
            except ArgumentError as error:
                print(error.knob, error.value)

anyio.run(main)
"""
OPTIONS = {"macvlan": "CONFIG_MACVLAN", "ipvlan": "CONFIG_IPVLAN", "vlan": "CONFIG_VLAN_8021Q"}


def made(world: Sequence[str]) -> list[str]:
    """What the program says in the world that `unshare` makes with these options."""
    words = ["unshare", *world, "sh", "-c", SETUP, "sh", sys.executable, "-c", MAKE]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    return done.stdout.splitlines()


def expected() -> list[str]:
    """What it shall say: what this kernel has reaches the other side, and what it has not is named."""
    lines = []
    for kind in ("macvlan", "ipvlan", "veth", "vlan"):
        taken = "('reached', 'name')"
        lines.append(f"{kind} {taken if _has(kind) else OPTIONS[kind]}")
    return [*lines, "parent 'none0'", "parent 'lo'", "parent 'none0'"]


def _has(kind: str) -> bool:
    """Whether ip(8) can make one."""
    more = {"vlan": " id 7", "veth": " peer name b"}.get(kind, "")
    on = "" if kind == "veth" else "link up0"
    make = f"ip link add up0 type veth peer name far0; ip link add {on} name a type {kind}{more}"
    words = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", make]
    return subprocess.run(words, capture_output=True, timeout=100, check=False).returncode == 0
