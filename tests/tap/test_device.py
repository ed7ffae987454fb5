"""TapDevice on socket pairs: no privilege, no namespace."""

from __future__ import annotations

import array
import errno
import fcntl
import math
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from netns_kit.errors import ArgumentError, DeviceGone, TunUnavailable
from netns_kit.namespace.namespace import Namespace
from netns_kit.stack.offloads import Offloads
from netns_kit.tap.device import OFFLOAD_SETS, TX_QUEUE, TapDevice, _negotiate
from netns_kit.tap.frame_device import FRAME_MAX, Device
from netns_kit.tap.impairment import Impairment

pytestmark = pytest.mark.usefixtures("leaks")

EVERYTHING = Offloads(10, csum=True, tso4=True, tso6=True, tso_ecn=True, uso4=True, uso6=True)


@pytest.fixture
def pair() -> Iterator[tuple[TapDevice, TapDevice]]:
    ends = TapDevice.pair(vnet_header=False)
    yield ends
    for end in ends:
        end.release()


def read(tap: Device) -> bytes | None:
    buffer = bytearray(FRAME_MAX)
    length = tap.read_into(memoryview(buffer))
    return None if length is None else bytes(buffer[:length])


def read_all(tap: Device) -> list[bytes]:
    frames = []
    while (frame := read(tap)) is not None:
        frames.append(frame)
    return frames


def fill(tap: TapDevice, size: int = 60000) -> int:
    """Write numbered frames until the device pushes back; return how many, the queued one included."""
    count = 0
    while not tap.backlog:
        assert tap.write(count.to_bytes(2, "big"), bytes(size - 2))
        count += 1
    return count


@pytest.mark.parametrize("size", [1, 14, 60, 1514, 65549, FRAME_MAX])
def test_a_pair_carries_frames_whole_both_ways(pair: tuple[TapDevice, TapDevice], size: int) -> None:
    frame = os.urandom(size)
    for here, there in pair, pair[::-1]:
        assert read(there) is None
        assert here.write(frame[:10], memoryview(frame)[10:])
        assert here.write(b"next")
        assert read_all(there) == [frame, b"next"]
        assert (here.counters.sent, there.counters.received) == (2, 2)


@pytest.mark.parametrize(("vnet_header", "offloads"), [(True, EVERYTHING), (False, Offloads())])
def test_a_pair_has_every_offload_or_none(vnet_header: bool, offloads: Offloads) -> None:
    for end in TapDevice.pair(vnet_header=vnet_header, mtu=65535):
        assert end.offloads == offloads
        assert end.mtu == 65535
        assert not os.get_blocking(end.fileno())
        assert not os.get_inheritable(end.fileno())
        assert end.deadline == math.inf
        end.release()


@pytest.mark.anyio
async def test_the_block_closes_the_device() -> None:
    one, other = TapDevice.pair()
    async with one as entered, other:
        assert entered is one
        assert one.fileno() >= 0
    with pytest.raises(DeviceGone, match="pair0 is not open"):
        one.fileno()
    with pytest.raises(DeviceGone, match="closed"):
        _ = await one


def test_frames_wait_in_order_while_the_device_pushes_back(pair: tuple[TapDevice, TapDevice]) -> None:
    here, there = pair
    taken = fill(here)
    got = read_all(there)
    assert here.write(b"there is room now, but not in front")
    while here.backlog:
        got += read_all(there)
        here.flush()
    got += read_all(there)
    assert [int.from_bytes(frame[:2], "big") for frame in got[:-1]] == list(range(taken))
    assert got[-1] == b"there is room now, but not in front"
    assert here.counters.sent == taken + 1
    assert here.counters.dropped == 0


def test_flush_on_a_device_still_full_keeps_the_queue(pair: tuple[TapDevice, TapDevice]) -> None:
    fill(pair[0])
    pair[0].flush()
    assert pair[0].backlog


def test_the_queue_is_bounded_and_what_it_drops_is_counted(pair: tuple[TapDevice, TapDevice]) -> None:
    here, _ = pair
    fill(here)
    assert all(here.write(b"waits") for _ in range(TX_QUEUE - 1))
    assert here.counters.dropped == 0
    assert not here.write(b"lost")
    assert here.counters.dropped == 1


def test_a_queued_frame_is_a_copy(pair: tuple[TapDevice, TapDevice]) -> None:
    here, there = pair
    fill(here)
    lent = bytearray(b"before")
    here.write(lent)
    lent[:] = b"after!"
    got = []
    while here.backlog:
        got += read_all(there)
        here.flush()
    assert (got + read_all(there))[-1] == b"before"


def test_a_refused_frame_is_counted_and_lost(
    pair: tuple[TapDevice, TapDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    def link_is_down(*_: object) -> int:
        raise OSError(errno.EIO, "down")

    here, there = pair
    fill(here)
    here.write(b"queued")
    waiting = here.counters.sent
    read_all(there)
    with monkeypatch.context() as patch:
        patch.setattr("os.write", link_is_down)
        here.flush()
        assert not here.backlog
        patch.setattr("os.writev", link_is_down)
        assert not here.write(b"frame")
    assert here.counters.refused == 3
    assert here.counters.sent == waiting
    assert here.write(b"up again")


def test_a_device_whose_other_end_closed_is_gone() -> None:
    one, other = TapDevice.pair()
    other.release()
    with pytest.raises(DeviceGone, match="pair0: closed by its other end"):
        read(one)
    with pytest.raises(DeviceGone, match="pair0: Broken pipe"):
        one.write(b"frame")
    one.release()


def test_unread_frames_do_not_hide_that_the_other_end_closed() -> None:
    one, other = TapDevice.pair()
    one.write(b"unread")
    other.release()
    with pytest.raises(DeviceGone):
        read(one)
    one.release()


def test_a_backlog_ends_with_the_device() -> None:
    one, other = TapDevice.pair()
    fill(one)
    other.release()
    with pytest.raises(DeviceGone):
        one.flush()
    one.release()
    assert not one.backlog


def test_a_closed_device_is_gone_and_closing_again_is_nothing(pair: tuple[TapDevice, TapDevice]) -> None:
    one, _ = pair
    one.release()
    one.release()
    with pytest.raises(DeviceGone, match="pair0: closed"):
        read(one)
    with pytest.raises(DeviceGone, match="pair0: closed"):
        one.write(b"frame")


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_message_socket_is_a_device_without_header(kind: socket.SocketKind) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    tap = TapDevice.from_fd(ours.detach(), mtu=9000, name="vm")
    assert (tap.name, tap.mtu, tap.offloads, tap.mac, tap.namespace) == ("vm", 9000, Offloads(), None, None)
    assert read(tap) is None
    theirs.send(b"in")
    assert read(tap) == b"in"
    tap.write(b"o", b"ut")
    assert theirs.recv(100) == b"out"
    theirs.close()
    with pytest.raises(DeviceGone):
        tap.write(b"nobody")
    tap.release()


def test_what_carries_no_frames_is_refused_and_stays_the_callers(tmp_path: Any) -> None:
    stream, peer = socket.socketpair()
    with stream, peer, pytest.raises(TunUnavailable, match="SOCK_STREAM"):
        _ = TapDevice.from_fd(stream.fileno())
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(TunUnavailable, match=f"fd {file.fileno()} is no tap") as caught:
            _ = TapDevice.from_fd(file.fileno())
        assert caught.value.errno == errno.ENOTTY
        file.write(b"still open")


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        (0x6F, EVERYTHING),
        (0x0F, Offloads(10, csum=True, tso4=True, tso6=True, tso_ecn=True)),
        (0x07, Offloads(10, csum=True, tso4=True, tso6=True)),
        (0x01, Offloads(10, csum=True)),
        (0x00, Offloads(10)),
        (None, Offloads(10)),
    ],
)
def test_offloads_are_what_the_kernel_accepted(
    accepted: int | None, expected: Offloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = []

    def ioctl(_fd: int, request: int, argument: Any) -> bytes:
        if request == 0x400454D0:  # TUNSETOFFLOAD
            words.append(argument)
            if accepted is None or argument & ~accepted:
                raise OSError(errno.EINVAL, "not this")
        return bytes(40)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert _negotiate(-1, 0x5002) == expected
    assert tuple(words) == OFFLOAD_SETS[: len(words)], "best first"


def test_a_tap_without_header_has_its_offloads_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *call: calls.append(call))
    assert _negotiate(7, 0x1002) == Offloads()
    assert calls == [(7, 0x400454D0, 0)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"mtu": 67}, "mtu=67: expected a whole number from 68 to 65521"),
        ({"mtu": 65522}, "mtu=65522: expected"),
        ({"name": ""}, "name='': expected 1 to 15 bytes"),
        ({"name": "sixteen-bytes-xx"}, "name='sixteen-bytes-xx'"),
        ({"name": "é" * 8}, "name="),
        ({"name": "a/b"}, "name='a/b'"),
        ({"name": "a b"}, "name='a b'"),
        ({"name": ".."}, r"name='\.\.'"),
        ({"name": "a\0"}, "name="),
        ({"mac": "02:00:00:00:00"}, "mac='02:00:00:00:00'"),
        ({"mac": "03:00:00:00:00:01"}, "mac="),
        ({"mac": "00:00:00:00:00:00"}, "mac="),
        ({"mac": "guest"}, "mac='guest'"),
        ({"queues": 0}, "queues=0: expected a whole number from 1 to 64"),
        ({"queues": 65}, "queues=65"),
    ],
)
def test_arguments_no_kernel_takes_are_refused_before_anything_happens(
    arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        _ = TapDevice.open(Namespace.create(), **arguments)


@pytest.mark.parametrize("mtu", [67, 65536])
def test_the_mtu_of_a_fake_is_checked_too(mtu: int) -> None:
    with pytest.raises(ArgumentError, match=f"mtu={mtu}: expected a whole number from 68 to 65535"):
        TapDevice.pair(mtu=mtu)


@pytest.mark.anyio
async def test_a_descriptor_that_is_no_tap_is_closed_on_entering() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def open_tap(_name: str, _flags: object, _queues: int) -> SimpleNamespace:
        return SimpleNamespace(fds=(ours.detach(),))

    tap = TapDevice.open(SimpleNamespace(open_tap=open_tap))  # type: ignore[arg-type]  # as much of one as is used
    with theirs:
        with pytest.raises(TunUnavailable, match="is no tap"):
            _ = await tap
        assert theirs.recv(1) == b"", "our end is closed"


# The same device behind a bad link


def drive(bad: Device, now: float) -> list[bytes]:
    """What an engine does at `now`: read, advance while that is due, read what arrived."""
    frames = read_all(bad)
    while bad.deadline <= now:
        bad.advance(now)
        frames += read_all(bad)
    return frames


def test_an_impaired_device_without_faults_is_the_device(pair: tuple[TapDevice, TapDevice]) -> None:
    one, other = pair
    bad = one.impaired(Impairment())
    assert (bad.name, bad.mtu, bad.offloads, bad.fileno()) == (one.name, one.mtu, one.offloads, one.fileno())
    frames = [os.urandom(size) for size in (1, 60, FRAME_MAX)]
    for frame in frames:
        assert bad.write(frame[:1], frame[1:])
        other.write(frame)
    assert drive(bad, 1.0) == read_all(other) == frames
    assert bad.deadline == math.inf
    assert (bad.counters.received, bad.counters.sent, bad.counters.dropped) == (3, 3, 0)


def test_delayed_frames_arrive_by_advance_though_nothing_is_readable(
    pair: tuple[TapDevice, TapDevice],
) -> None:
    one, other = pair
    bad = one.impaired(Impairment(delay=0.5), Impairment(delay=2))
    bad.advance(7.0)  # long ago: a frame's delay begins when it comes, not when the clock was last told
    bad.write(b"out")
    assert bad.deadline <= 100.0
    other.write(b"in")
    assert drive(bad, 100.0) == read_all(other) == []
    assert bad.deadline == 100.5
    assert drive(bad, 100.5) == []
    assert read_all(other) == [b"out"]
    assert bad.deadline == 102.0
    bad.advance(103.0)
    assert bad.deadline == 103.0, "due until it is read"
    assert read(bad) == b"in"
    assert bad.deadline == math.inf


def test_the_directions_fail_apart(pair: tuple[TapDevice, TapDevice]) -> None:
    bad = pair[0].impaired(Impairment(loss=0.5, seed=1))
    for number in range(200):
        bad.write(bytes([number]))
        pair[1].write(bytes([number]))
    inward, outward = drive(bad, 0.0), read_all(pair[1])
    assert len(inward) == 200 - bad.receive.lost
    assert len(outward) == 200 - bad.transmit.lost
    assert inward != outward


def test_a_flooding_guest_does_not_hold_the_reader(pair: tuple[TapDevice, TapDevice]) -> None:
    bad = pair[0].impaired(Impairment(), Impairment(loss=1.0))
    for _ in range(100):
        pair[1].write(b"frame")
    assert read(bad) is None
    assert 0 < bad.counters.received < 100
    assert read(bad) is None
    assert bad.counters.received == 100


def test_neither_vnet_header_nor_ethernet_header_is_damaged() -> None:
    one, other = TapDevice.pair()
    bad = one.impaired(Impairment(corrupt=1.0))
    for _ in range(50):
        bad.write(bytes(25))
    bad.advance(0.0)
    frames = read_all(other)
    assert len(frames) == 50
    assert all(not any(frame[:24]) and frame[24].bit_count() == 1 for frame in frames)
    bad.release()
    other.release()


def test_an_impaired_device_pushes_back_as_the_device(pair: tuple[TapDevice, TapDevice]) -> None:
    bad = pair[0].impaired(Impairment())
    taken = 0
    while not bad.backlog:
        bad.write(bytes(60000))
        bad.advance(0.0)
        taken += 1
    got = 0
    while bad.backlog:
        got += len(read_all(pair[1]))
        bad.flush()
    assert got + len(read_all(pair[1])) == taken


@pytest.mark.anyio
async def test_the_block_of_an_impaired_device_closes_the_device() -> None:
    one, other = TapDevice.pair()
    async with one.impaired(Impairment()) as bad, other:
        assert bad.fileno() == one.fileno()
    for tap in bad, one:
        with pytest.raises(DeviceGone):
            tap.fileno()


def test_reading_into_any_writable_buffer(pair: tuple[TapDevice, TapDevice]) -> None:
    buffer = array.array("B", bytes(10))
    pair[0].write(b"0123456789more")
    assert pair[1].read_into(memoryview(buffer)) == 10
    assert buffer.tobytes() == b"0123456789"


@pytest.mark.anyio
async def test_a_descriptor_that_somebody_else_closes_is_told() -> None:
    """Not as an error of the system's, and not in the place of what has ended the block."""
    near, far = TapDevice.pair()
    with pytest.raises(DeviceGone, match="pair0: somebody else has closed its descriptor"):
        async with near:
            os.close(near.fileno())
    await near.close()
    with pytest.raises(KeyError):  # noqa: PT012 - what the block raises, and not its end
        async with far:
            os.close(far.fileno())
            raise KeyError
    with pytest.raises(ArgumentError, match="expected an open descriptor"):
        _ = TapDevice.from_fd(1 << 20)
