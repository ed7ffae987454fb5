"""TapDevice on a tap of a real namespace, opened by its agent; the guest is this kernel."""

from __future__ import annotations

import fcntl
import json
import math
import os
import struct
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from netns_kit.errors import ArgumentError, DeviceGone, TunUnavailable
from netns_kit.namespace.namespace import Namespace
from netns_kit.stack.offloads import Offloads
from netns_kit.tap.device import OFFLOAD_SETS, TapDevice
from netns_kit.tap.flags import GUEST_QUEUE, TAP_FLAGS
from netns_kit.tap.frame_device import FRAME_MAX
from netns_kit.tap.impairment import Impairment
from tests.support import needs, needs_tun

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

TUNGETIFF, TUNSETOFFLOAD, TUNGETVNETHDRSZ = 0x800454D2, 0x400454D0, 0x800454D7
VNET, PLAIN = TAP_FLAGS
SEND = "import socket; socket.socket(2, 2).sendto(b'hello', ('10.0.2.2', 9))"


@pytest.fixture
async def ns(leaks: None) -> AsyncIterator[Namespace]:
    needs_tun()
    needs("ip")
    async with Namespace.create() as namespace:
        yield namespace


async def ip(ns: Namespace, *arguments: str) -> Any:
    with anyio.fail_after(10):
        done = await ns.run(["ip", "-json", *arguments])
    return json.loads(done.stdout or b"null")


async def link(ns: Namespace, name: str = "tap0") -> dict[str, Any]:
    [answer] = await ip(ns, "-details", "link", "show", name)
    return dict(answer)


def accepted(tap: TapDevice) -> Offloads:
    """What TUNSETOFFLOAD takes on this descriptor, asked once more."""
    for word in OFFLOAD_SETS:
        try:
            fcntl.ioctl(tap.fileno(), TUNSETOFFLOAD, word)
        except OSError:
            continue
        csum, tso4, tso6, ecn, uso4, uso6 = (bool(word & bit) for bit in (1, 2, 4, 8, 32, 64))
        return Offloads(10, csum=csum, tso4=tso4, tso6=tso6, tso_ecn=ecn, uso4=uso4, uso6=uso6)
    raise AssertionError("not even 0")


async def frame(tap: TapDevice) -> bytes:
    buffer = bytearray(FRAME_MAX)
    with anyio.fail_after(10):
        while (length := tap.read_into(buffer)) is None:
            await anyio.wait_readable(tap.fileno())
    return bytes(buffer[:length])


async def guest_sends(ns: Namespace) -> None:
    """The guest wants to reach 10.0.2.2 and asks for its hardware address."""
    await ip(ns, "address", "add", "10.0.2.100/24", "dev", "tap0")
    await ns.run([sys.executable, "-ISc", SEND])


async def read_on(tap: TapDevice) -> None:
    while True:
        await frame(tap)


def is_arp(data: bytes) -> bool:
    return data[12:14] == b"\x08\x06"


async def test_a_tap_is_what_it_says(ns: Namespace) -> None:
    tap = TapDevice.open(ns, "tap0", mtu=9000, mac="02:00:00:00:00:64")
    assert tap.mtu == 9000
    assert [entry["ifname"] for entry in await ip(ns, "link")] == ["lo"], "nothing happens before the block"
    async with tap:
        assert tap.namespace is ns
        assert tap.name == "tap0"
        assert tap.mac == bytes.fromhex("020000000064")
        assert tap.offloads == accepted(tap)
        assert tap.offloads.csum
        assert tap.offloads.tso4
        assert struct.unpack("i", fcntl.ioctl(tap.fileno(), TUNGETVNETHDRSZ, bytes(4))) == (10,)
        assert not os.get_blocking(tap.fileno())
        guest = await link(ns)
        assert (guest["mtu"], guest["address"]) == (9000, "02:00:00:00:00:64")
    assert [entry["ifname"] for entry in await ip(ns, "link")] == ["lo"]


async def test_without_a_mac_the_guests_is_learned(ns: Namespace) -> None:
    async with TapDevice.open(ns) as tap:
        assert tap.mac is not None
        assert tap.mac.hex(":") == (await link(ns))["address"]


@pytest.mark.parametrize("mtu", [68, 65521])
async def test_the_kernel_takes_every_mtu_we_take(ns: Namespace, mtu: int) -> None:
    async with TapDevice.open(ns, mtu=mtu):
        assert (await link(ns))["mtu"] == mtu


async def test_frames_come_with_the_header(ns: Namespace) -> None:
    async with TapDevice.open(ns) as tap:
        await guest_sends(ns)
        while not is_arp((await frame(tap))[10:]):
            pass
        assert tap.counters.received > 0


async def test_a_persistent_tap_is_attached_with_the_header_and_survives(ns: Namespace) -> None:
    await ip(ns, "tuntap", "add", "mode", "tap", "name", "tap0")
    index = (await link(ns))["ifindex"]
    async with TapDevice.open(ns, "tap0", mtu=1400) as tap:
        assert tap.offloads == accepted(tap)
        guest = await link(ns)
        assert (guest["mtu"], guest["ifindex"]) == (1400, index)
    assert (await link(ns))["ifindex"] == index


async def test_the_header_size_another_left_on_a_persistent_tap_is_corrected(ns: Namespace) -> None:
    await ip(ns, "tuntap", "add", "mode", "tap", "name", "tap0")
    opened = await ns.open_tap("tap0", [VNET])
    fcntl.ioctl(opened.fd, 0x400454D8, struct.pack("i", 12))  # TUNSETVNETHDRSZ
    os.close(opened.fd)
    async with TapDevice.open(ns, "tap0") as tap:
        assert struct.unpack("i", fcntl.ioctl(tap.fileno(), TUNGETVNETHDRSZ, bytes(4))) == (10,)


async def test_a_persistent_tap_with_many_queues_is_an_error(ns: Namespace) -> None:
    await ip(ns, "tuntap", "add", "mode", "tap", "name", "tap0", "multi_queue")
    with pytest.raises(TunUnavailable, match="tap0"):
        _ = await TapDevice.open(ns, "tap0")


async def test_a_persistent_tap_with_one_queue_has_no_more(ns: Namespace) -> None:
    await ip(ns, "tuntap", "add", "mode", "tap", "name", "tap0")
    with pytest.raises(TunUnavailable, match="tap0"):
        _ = await TapDevice.open(ns, "tap0", queues=2)


async def test_queues_are_one_device(ns: Namespace) -> None:
    device = TapDevice.open(ns, "tap0", queues=3)
    with pytest.raises(ArgumentError, match="queues=3: expected 1 for an impaired link"):
        _ = device.impaired(Impairment())
    async with device as tap:
        assert tap.queues[0] is tap
        assert len({queue.fileno() for queue in tap.queues}) == 3
        assert {(queue.name, queue.mac, queue.offloads) for queue in tap.queues} == {
            ("tap0", tap.mac, accepted(tap))
        }
    for queue in tap.queues:
        with pytest.raises(DeviceGone):
            queue.fileno()


async def test_a_tap_taken_by_somebody_else_is_an_error(ns: Namespace) -> None:
    async with TapDevice.open(ns, "tap0"):
        with pytest.raises(TunUnavailable, match="tap0"):
            _ = await TapDevice.open(ns, "tap0")


@pytest.mark.parametrize(("flags", "header"), [(VNET, 10), (PLAIN, 0)])
async def test_a_descriptor_keeps_the_flags_it_came_with(ns: Namespace, flags: int, header: int) -> None:
    opened = await ns.open_tap("tap0", [flags])
    async with TapDevice.from_fd(opened.fd, mtu=1500) as tap:
        assert tap.name == "tap0"
        assert tap.offloads == (accepted(tap) if header else Offloads())
        assert tap.mac is not None
        assert tap.mac.hex(":") == (await link(ns))["address"]
        await ip(ns, "link", "set", "tap0", "up")
        await guest_sends(ns)
        while not is_arp((await frame(tap))[header:]):
            pass


async def test_a_tap_with_packet_information_is_refused(ns: Namespace) -> None:
    opened = await ns.open_tap("tap0", [0x0002])
    with pytest.raises(TunUnavailable, match=r"use IFF_TAP\|IFF_NO_PI"):
        _ = TapDevice.from_fd(opened.fd)
    _, flags = struct.unpack_from("16sH", fcntl.ioctl(opened.fd, TUNGETIFF, bytes(40)))
    assert flags & 0x1000, "IFF_NOFILTER: the question left no filter behind"
    os.close(opened.fd)


async def test_an_impaired_tap_opens_the_real_one(ns: Namespace) -> None:
    async with TapDevice.open(ns, "tap0").impaired(Impairment(delay=1.0)) as tap:
        assert tap.namespace is ns
        assert tap.offloads.vnet_header == 10
        assert tap.transmit.protect == 24
        assert tap.mac is not None
        assert tap.mac.hex(":") == (await link(ns))["address"]
        await guest_sends(ns)
        while tap.deadline == math.inf:
            await anyio.wait_readable(tap.fileno())
            assert tap.read_into(bytearray(FRAME_MAX)) is None, "still under way"
        tap.advance(100.0)
        assert tap.deadline == 101.0
        tap.advance(101.0)
        assert tap.read_into(bytearray(FRAME_MAX))
    assert [entry["ifname"] for entry in await ip(ns, "link")] == ["lo"]


async def test_a_removed_link_is_gone(ns: Namespace) -> None:
    async with TapDevice.open(ns, "tap0") as tap:
        await ip(ns, "link", "delete", "tap0")
        with pytest.raises(DeviceGone, match="tap0: File descriptor in bad state"):
            await read_on(tap)
        with pytest.raises(DeviceGone, match="tap0"):
            tap.write(bytes(100))


async def test_a_link_that_is_down_refuses_frames_and_recovers(ns: Namespace) -> None:
    async with TapDevice.open(ns, "tap0") as tap:
        await ip(ns, "link", "set", "tap0", "down")
        assert not tap.write(bytes(10), bytes(60))
        assert tap.counters.refused == 1
        assert not tap.backlog
        await ip(ns, "link", "set", "tap0", "up")
        assert tap.write(bytes(10), bytes(60))


async def test_a_malformed_frame_is_counted_not_raised(ns: Namespace) -> None:
    async with TapDevice.open(ns, "tap0") as tap:
        assert not tap.write(b"\x01" + bytes(5) + b"\xff\xff\xff\xff", bytes(60))
        assert tap.counters.refused == 1


async def test_a_block_that_is_not_entered_leaves_no_tap(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise PermissionError("as if")

    tap = TapDevice.open(ns, "tap0")
    with monkeypatch.context() as patch:
        patch.setattr(Namespace, "configure_link", refuse)
        with pytest.raises(PermissionError, match="as if"):
            _ = await tap
    assert [entry["ifname"] for entry in await ip(ns, "link")] == ["lo"]


@pytest.mark.anyio
async def test_the_guest_keeps_many_packets_for_us() -> None:
    """With the usual 1000 a few hundred receiving connections lose their ACKs while we are busy."""
    needs("ip")
    async with Namespace.create() as ns, TapDevice.open(ns, "tap0"):
        shown = (await ns.run(["ip", "-o", "link", "show", "tap0"])).stdout.decode()
    assert f"qlen {GUEST_QUEUE}" in shown
