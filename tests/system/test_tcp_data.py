"""What TCP's ends agree on, and how the bytes get there.

The numbers are rows of an inventory of what other programs do.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from netns_kit import Impairment, Namespace, Network, TapDevice, Uplink, UserStack
from netns_kit.arguments import Address
from netns_kit.gateway.setup import DriverName
from netns_kit.stack.segments import MAX_PAYLOAD
from netns_kit.stack.user import Transport
from netns_kit.stack.wire.tcp import STAMP_SIZE, SYN, Segment
from netns_kit.tap.impaired import ImpairedTap
from netns_kit.tap.impairment import BadLink
from tests.support.connections import (
    GATEWAY,
    TCPI_OPT_SACK,
    TCPI_OPT_TIMESTAMPS,
    TCPI_OPT_WSCALE,
    accepted,
    echoes,
    exactly,
    inbound,
    listening,
    network,
    once,
    outcome,
    pair,
    polled,
    receive,
    rest,
    send,
    tcp_info,
    tcp_socket,
)
from tests.support.load import resident
from tests.support.servers import bounded, content, digest, port_of
from tests.support.wire import MSS, SACK, SACK_PERMITTED, TIMESTAMPS, WINDOW_SCALE, Frame, is_answer, watching

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

SIOCATMARK = 0x8905  # linux/sockios.h
AF21, EXPEDITED = 0x48, 0xB8  # RFC 2597, RFC 3246, as IP_TOS has them


def is_syn(_: Frame, segment: Segment) -> bool:
    return bool(segment.flags & SYN)


# -- 71 to 73: what the SYNs agree on ------------------------------------------------------------------


@bounded
async def test_windows_are_scaled_both_ways(net: Network) -> None:
    async with watching(net.namespace) as wire, pair(net.namespace) as (guest, host):
        [(offer, _), (answer, _)] = wire.tcp(is_syn)
        assert WINDOW_SCALE in offer.options
        assert WINDOW_SCALE in answer.options
        await echoes(guest, host)
        info = tcp_info(guest)
        assert info.options & TCPI_OPT_WSCALE
        assert info.send_window > 0xFFFF  # ours, as the guest reads it
        # and the guest's, as we read it: its segments show fewer than one of ours has, and mean more
        shown = [segment.window for frame, segment in wire.tcp(lambda frame, _: frame.from_guest)][1:]
        await send(host, bytes(20_000))
        _, segment = await wire.next(
            lambda frame, segment: not frame.from_guest and len(segment.payload) > 9000
        )
        assert max(shown) < len(segment.payload) <= max(shown) << info.receive_scale


@bounded
async def test_windows_are_not_scaled_if_the_guest_does_not_offer_it(net: Network) -> None:
    await net.namespace.set_sysctl("net.ipv4.tcp_window_scaling", 0)
    async with watching(net.namespace) as wire, pair(net.namespace) as (guest, host):
        [(answer, _)] = wire.tcp(is_answer)
        assert WINDOW_SCALE not in answer.options
        await echoes(guest, host, bytes(10_000))
        assert 10_000 < tcp_info(guest).send_window <= 0xFFFF


@bounded
async def test_sack_and_timestamps_are_agreed_on(net: Network) -> None:
    async with watching(net.namespace) as wire, pair(net.namespace) as (guest, _):
        [(offer, _), (answer, _)] = wire.tcp(is_syn)
        assert {SACK_PERMITTED, TIMESTAMPS} <= offer.options.keys()
        assert answer.options[SACK_PERMITTED] == b""
        assert answer.options[TIMESTAMPS][4:] == offer.options[TIMESTAMPS][:4]
        options = tcp_info(guest).options
        assert options & TCPI_OPT_SACK
        assert options & TCPI_OPT_TIMESTAMPS


@bounded
async def test_no_sack_and_no_timestamps_if_the_guest_does_not_offer_them(net: Network) -> None:
    await net.namespace.set_sysctl("net.ipv4.tcp_sack", 0)
    await net.namespace.set_sysctl("net.ipv4.tcp_timestamps", 0)
    async with watching(net.namespace) as wire, pair(net.namespace) as (guest, host):
        [(answer, _)] = wire.tcp(is_answer)
        assert not {SACK_PERMITTED, TIMESTAMPS} & answer.options.keys()
        await echoes(guest, host)
        assert not any(TIMESTAMPS in frame.options for frame in wire.seen)


@bounded
async def test_what_has_arrived_beyond_a_hole_is_told(net: Network) -> None:
    async with watching(net.namespace) as wire, pair(net.namespace) as (guest, host):
        await echoes(guest, host)
        source, target = guest.getsockname()[1], port_of(host)
        _, last = wire.tcp(lambda frame, _: not frame.from_guest)[-1]
        theirs, _ = wire.tcp(lambda frame, _: frame.from_guest)[-1]
        beyond = last.ack + 100
        wire.put(
            source,
            target,
            seq=beyond,
            ack=last.seq + len(last.payload),
            flags=last.flags,
            data=bytes(50),
            stamp=theirs.options[TIMESTAMPS][:4],
        )
        told, segment = await wire.next(lambda frame, _: not frame.from_guest)
        assert segment.ack == last.ack
        assert told.options[SACK] == struct.pack("!II", beyond % 2**32, (beyond + 50) % 2**32)


@pytest.mark.parametrize("mtu", [1500, 65520])
@bounded
async def test_a_segment_is_what_the_mtu_leaves(driver: DriverName, mtu: int) -> None:
    size = mtu - 40
    least = min(size, 0xFFFF // 2)  # the guest's kernel fills no more than half of the first, unscaled window
    async with Network(uplink=Uplink(allow_host_loopback=True), mtu=mtu, driver=driver) as net:
        for connection in (pair(net.namespace), inbound(net)):
            async with watching(net.namespace) as wire, connection as (guest, host):
                offers = [int.from_bytes(frame.options[MSS], "big") for frame, _ in wire.tcp(is_syn)]
                assert offers == [size, size]
                for near, far in ((guest, host), (host, guest)):
                    await send(near, bytes(2 * size))
                    assert await exactly(far, 2 * size) == bytes(2 * size)
                    # of a super-segment the kernels cut pieces of gso_size
                    cut = {
                        frame.gso_size or len(segment.payload)
                        for frame, segment in wire.tcp(lambda _, segment: segment.payload)
                        if frame.from_guest is (near is guest)
                    }
                    text = size - STAMP_SIZE
                    assert (text if near is host else least - STAMP_SIZE) <= max(cut) <= text


@bounded
async def test_a_guest_that_wants_segments_smaller_gets_them_smaller(net: Network) -> None:
    with listening() as (listener, port), await tcp_socket(net.namespace) as guest:
        guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 900)
        async with watching(net.namespace) as wire:
            guest.connect_ex((GATEWAY, port))
            assert await outcome(guest) == 0
            with await accepted(listener) as host:
                await send(host, bytes(9000))
                assert await exactly(guest, 9000) == bytes(9000)
            to_guest = wire.tcp(lambda frame, segment: not frame.from_guest and bool(segment.payload))
            assert (
                max(frame.gso_size or len(segment.payload) for frame, segment in to_guest) == 900 - STAMP_SIZE
            )


# -- 74: nobody reads ----------------------------------------------------------------------------------


async def nobody_reads_for_a_while(near: socket.socket, far: socket.socket) -> None:
    """30 MiB are sent; they are read when several timers of either end have gone off."""
    mebibytes, sent = 30, 0
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # it may else grow to all of it

    async def say() -> None:
        nonlocal sent
        for block in content(mebibytes):
            await send(near, block)
            sent += 1
        near.shutdown(socket.SHUT_WR)

    async with anyio.create_task_group() as tasks:
        before, so_far, sha = resident(), -1, hashlib.sha256()
        tasks.start_soon(say)
        while so_far != sent:
            so_far = sent
            await anyio.sleep(0.8)
        assert 0 < sent < mebibytes, "it goes on, to nowhere"
        assert resident() - before < 8 << 20
        while data := await receive(far):
            sha.update(data)
    assert sha.hexdigest() == digest(mebibytes)


@once
@bounded
async def test_the_host_does_not_read_for_a_while(net: Network) -> None:
    async with pair(net.namespace) as (guest, host):
        await nobody_reads_for_a_while(guest, host)


@once
@bounded
async def test_the_guest_does_not_read_for_a_while(net: Network) -> None:
    async with pair(net.namespace) as (guest, host):
        await nobody_reads_for_a_while(host, guest)


# -- 75: urgent data -----------------------------------------------------------------------------------


def at_mark(sock: socket.socket) -> bool:
    """Whether the urgent byte is the next (sockatmark(3))."""
    [mark] = struct.unpack("i", fcntl.ioctl(sock, SIOCATMARK, bytes(4)))
    return bool(mark)


async def up_to_the_mark(sock: socket.socket) -> bytes:
    """What lies before the urgent byte, which has arrived."""
    await polled(sock, select.POLLPRI)
    received = bytearray()
    while not at_mark(sock):
        received += await receive(sock)
    return bytes(received)


async def an_urgent_byte_has_its_place(near: socket.socket, far: socket.socket) -> None:
    before, after = os.urandom(20_000), os.urandom(20_000)
    await send(near, before)
    near.send(b"!", socket.MSG_OOB)
    await send(near, after)
    assert await up_to_the_mark(far) == before
    assert far.recv(1, socket.MSG_OOB) == b"!"
    assert await exactly(far, len(after)) == after


@bounded
async def test_urgent_data_from_the_guest_is_urgent_at_the_host(net: Network) -> None:
    async with pair(net.namespace) as (guest, host):
        for _ in range(3):
            await an_urgent_byte_has_its_place(guest, host)
        await echoes(guest, host)


@bounded
async def test_urgent_data_from_the_host_is_urgent_at_the_guest(net: Network) -> None:
    async with pair(net.namespace) as (guest, host):
        for _ in range(3):
            await an_urgent_byte_has_its_place(host, guest)
        await echoes(guest, host)


@bounded
async def test_urgent_data_that_comes_while_we_read_is_urgent(net: Network) -> None:
    """It is there when a whole buffer has been read, but was not when the kernel told us to read."""
    buffer = bytes(MAX_PAYLOAD // 1460 * 1460)

    def while_others_are_served() -> None:
        net.stack.gateway.engine.call(urgently)
        assert host.send(buffer) == len(buffer)

    def urgently() -> None:
        host.send(b"!", socket.MSG_OOB)

    async with pair(net.namespace) as (guest, host):
        for _ in range(20):  # the guest's window grows, until there is room for more than a buffer
            await send(host, buffer)
            assert await exactly(guest, len(buffer)) == buffer
        await net.stack.local.driver.call(while_others_are_served)
        assert await up_to_the_mark(guest) == buffer
        assert guest.recv(1, socket.MSG_OOB) == b"!"


@bounded
async def test_urgent_bytes_in_a_row(net: Network) -> None:
    """Each is the mark until the next is, and none is lost: who reads them in line has them all."""
    async with pair(net.namespace) as (guest, host):
        for near, far in ((guest, host), (host, guest)):
            far.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            for byte in b"123456789":
                near.send(bytes([byte]), socket.MSG_OOB)
                near.send(b"-")
            assert await exactly(far, 18) == b"1-2-3-4-5-6-7-8-9-"
            far.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 0)
        for near, far in ((guest, host), (host, guest)):  # and one is the first and last that is said
            near.send(b"!", socket.MSG_OOB)
            near.shutdown(socket.SHUT_WR)
            assert await up_to_the_mark(far) == b""
            assert far.recv(1, socket.MSG_OOB) == b"!"
            assert await rest(far) == b""


# -- 78: frames get lost -------------------------------------------------------------------------------


class Losing(BadLink):
    """Loses those of the frames that carry much whose turn it is."""

    def __init__(self, lost: set[int]) -> None:
        super().__init__(Impairment())
        self.turn = -1
        self.turns = lost

    def send(self, frame: bytes, now: float) -> None:
        if len(frame) > 200:
            self.turn += 1
            if self.turn in self.turns:
                self.lost += 1
                return
        super().send(frame, now)


@asynccontextmanager
async def losing(driver: DriverName, lost: set[int]) -> AsyncIterator[tuple[Namespace, ImpairedTap]]:
    async with Namespace.create() as namespace, TapDevice.open(namespace).impaired(Impairment()) as tap:
        tap.receive, tap.transmit = Losing(lost), Losing(lost)
        async with UserStack(tap, Uplink(allow_host_loopback=True), driver=driver):
            yield namespace, tap


@bounded
async def test_a_segment_that_is_lost_is_sent_again(driver: DriverName) -> None:
    """By the retransmission timer alone: nothing comes after it.  tests/stack/test_tcp_recovery.py holds how soon."""
    async with losing(driver, {0, 2}) as (namespace, tap), pair(namespace) as (guest, host):
        await echoes(guest, host, bytes(1000))
        assert (tap.receive.lost, tap.transmit.lost) == (1, 1)
        assert tcp_info(guest).retransmitted == 1
        await send(host, bytes(1000))
        assert await exactly(guest, 1000) == bytes(1000)
        assert tap.transmit.lost == 2


@bounded
async def test_many_segments_that_are_lost_are_sent_again(driver: DriverName) -> None:
    """The first of many, some in the midst, and one again as it is repeated."""
    data = os.urandom(2 << 20)
    async with (
        losing(driver, {0, 5, 6, 14}) as (namespace, tap),
        pair(namespace) as (guest, host),
    ):
        for near, far in ((guest, host), (host, guest)):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send, near, data)
                assert await exactly(far, len(data)) == data
        assert tap.receive.lost == tap.transmit.lost == 4


# -- 83: type of service -------------------------------------------------------------------------------


class Marked(socket.socket):
    """Remembers what its SYN was marked with."""

    syn = 0

    def connect_ex(self, address: Any) -> int:
        self.syn = tos(self)
        return super().connect_ex(address)


class Marking(Uplink):
    """Its sockets are such."""

    def __init__(self) -> None:
        super().__init__(allow_host_loopback=True)
        self.opened: list[Marked] = []

    def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
        self.opened.append(Marked(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        return self.opened[-1]


def tos(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS)


@bounded
async def test_the_guests_type_of_service_is_the_hosts(driver: DriverName) -> None:
    """From the SYN on, and whenever it changes; the receiving end's own is its own affair."""
    uplink = Marking()
    with listening() as (listener, port):
        async with network(driver, uplink) as net, watching(net.namespace) as wire:
            with await tcp_socket(net.namespace) as guest:
                guest.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, AF21)
                guest.connect_ex((GATEWAY, port))
                assert await outcome(guest) == 0
                [ours] = uplink.opened
                with await accepted(listener) as host:
                    assert (ours.syn, tos(ours)) == (AF21, AF21)
                    for wanted in (EXPEDITED, 0, AF21):
                        guest.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, wanted)
                        await echoes(guest, host)
                        assert tos(ours) == wanted
                    assert {frame.packet.tos for frame in wire.seen if frame.from_guest} <= {
                        AF21,
                        EXPEDITED,
                        0,
                    }
