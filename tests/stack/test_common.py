"""The short way for common frames does what the long way would do."""

from __future__ import annotations

from random import Random

import pytest

from netns_kit.stack import State
from netns_kit.stack.wire import checksum, common, ip, udp, virtio
from netns_kit.stack.wire.tcp import (
    ACK,
    FIN,
    PSH,
    RST,
    STAMP_SIZE,
    SYN,
    URG,
    pack_options,
    pack_sack,
    pack_stamp,
)
from tests.support import LONG
from tests.support.stack import GUEST, GUEST_PORT, OTHER, VNET, Guest, beyond

ECE = 64  # a flag that we do not know
THEIRS = 5000  # the guest's clock, to begin with
LEFT_TO_US = virtio.pack(virtio.NEEDS_CSUM, 0, 0, 0, 34, 16)
STREAM = [ACK] * 12 + [ACK | PSH] * 12 + [ACK | FIN, ACK | URG, ACK | ECE, RST, SYN, SYN | ACK, 0]


def guests(family: int, *, stamped: bool = False) -> list[Guest]:
    """Two alike, with a connection and a flow each; the second knows no short way."""
    both = []
    for _ in range(2):
        guest = Guest(family, offloads=VNET)
        if stamped:
            guest.opening(options=pack_options(1460, 7, True, (THEIRS, 0)))
            guest.gets(ACK, 1000, 9000, window=512, options=pack_stamp(THEIRS, 0))
        else:
            guest.established()
        guest.gives(virtio_frame(datagram(family, b"first")))
        guest.users.flows[0].user = guest.users.datagrams
        both.append(guest)
    both[1].stack.has_short_way = False
    return both


def count_short(guest: Guest) -> list[int]:
    """Count the frames that go the short way from now on, in the only element of what is returned."""
    short = [0]
    way = guest.stack.receive_known

    def counted(frame: memoryview, now: float) -> bool:
        taken = way(frame, now)
        short[0] += taken
        return taken

    setattr(guest.stack, "receive_known", counted)  # noqa: B010
    return short


def datagram(family: int, payload: bytes) -> bytes:
    addresses = GUEST[family] + OTHER[family]
    header = udp.HEADER.pack(GUEST_PORT, 53, udp.SIZE + len(payload), 0)
    return ip.pack(addresses, ip.UDP, udp.SIZE + len(payload)) + header + payload


def virtio_frame(packet: bytes) -> bytes:
    guest = Guest(4 if packet[0] >> 4 == 4 else 6, offloads=VNET)
    return LEFT_TO_US + guest.segment(ACK)[virtio.SIZE : common.IP_AT] + packet


def seen(guest: Guest) -> object:
    connection = guest.stack.tcp.get(guest.connection.key)
    rcv, snd = guest.connection.rcv, guest.connection.snd
    return (
        list(guest.frames),
        guest.stack.stats(),
        (bytes(guest.listener.bytes), list(guest.listener.events)),
        guest.users.datagrams.got,
        connection and (connection.state, connection.tos, connection.timer_at, connection.ack_at),
        guest.connection.stamp,
        (rcv.nxt, rcv.ack, len(beyond(guest.connection)), snd.una, snd.wnd, snd.blocked),
        [flow.last for flow in guest.stack.udp.values()],
    )


def spoil(data: bytes, random: Random) -> bytes:
    """At most one fault, with the header's sum right as a kernel makes it."""
    frame = bytearray(data)
    kind = random.random()
    if kind < 0.4:
        at = random.randrange(min(common.SIZE6 + STAMP_SIZE, len(frame)))
        frame[at] ^= 1 << random.randrange(8)
    elif kind < 0.5:
        del frame[random.randrange(len(frame)) :]
    elif kind < 0.6:
        frame += bytes(random.randrange(1, 20))
    elif kind < 0.65:
        frame[common.IP_AT + (8 if frame[common.IP_AT] >> 4 == 4 else 7)] = random.randrange(3)  # TTL
    elif kind < 0.7:
        frame[0] = 0  # then the checksum counts, which is wrong now
        frame[-1] ^= 1
    if len(frame) >= common.IP_AT + 20 and frame[12 + virtio.SIZE : 14 + virtio.SIZE] == b"\x08\0":
        header = frame[common.IP_AT : common.IP_AT + 4 * (frame[common.IP_AT] & 15)]
        if len(header) >= 20:
            frame[common.IP_AT + 10 : common.IP_AT + 12] = header_sum(header)
    return bytes(frame)


def header_sum(header: bytearray) -> bytes:
    """The checksum field of an IPv4 header."""
    header[10:12] = bytes(2)
    return checksum.checksum(checksum.total(header)).to_bytes(2, "big")


def options(random: Random, step: int) -> bytes:
    """Mostly the timestamps of a clock that ticks now and then; else old ones, none, or others in their place."""
    stamp = pack_stamp(THEIRS + step // 4, step)
    return random.choice(
        [stamp] * 12
        + [
            pack_stamp(THEIRS - 1, 0),
            b"",
            pack_sack([(9, 12)]),
            stamp + pack_sack([(9, 12)]),
            stamp[2:] + b"\1\1",
        ]
    )


@pytest.mark.parametrize("stamped", [False, True])
@pytest.mark.parametrize("seed", range(60 if LONG else 20))
def test_the_short_way_is_the_long_one_taken_quickly(family: int, seed: int, stamped: bool) -> None:
    random = Random(seed)
    both = guests(family, stamped=stamped)
    seq, sent = 1000, 9000
    for step in range(60):
        if both[0].connection.state is State.CLOSED:
            break
        data = random.randbytes(random.choice((0, 1, 60, 1000)))
        talks = both[0].connection.state in (State.ESTABLISHED, State.CLOSE_WAIT)
        if random.random() < 0.2 and talks and min(guest.connection.room() for guest in both):
            for guest in both:
                guest.send(b"out")
            sent += 3
        if random.random() < 0.5:
            window, urgent = random.randrange(65536), random.randrange(4)
            segment = both[0].segment(
                random.choice(STREAM),
                seq,
                sent,
                data,
                window=window,
                urgent=urgent,
                options=options(random, step) if stamped else b"",
            )
            good = LEFT_TO_US + segment[virtio.SIZE :]
        else:
            good = virtio_frame(datagram(family, data))
        frame = spoil(good, random)
        for guest in both:
            guest.now = step / 100
            guest.gives(frame)
        assert seen(both[0]) == seen(both[1])
        for guest in both:
            guest.frames.clear()
        seq = both[0].connection.rcv.nxt


@pytest.mark.parametrize("stamped", [False, True])
def test_all_frames_of_a_flow_that_are_as_the_last_one_go_the_short_way(family: int, stamped: bool) -> None:
    guest = guests(family, stamped=stamped)[0]
    stamp = pack_stamp(THEIRS, 0) if stamped else b""
    guest.gives(LEFT_TO_US + guest.segment(ACK, 1000, 9000, options=stamp)[virtio.SIZE :])
    short = count_short(guest)
    for number in range(10):
        guest.gives(LEFT_TO_US + guest.segment(ACK, 1000 + number, 9000, b"x", options=stamp)[virtio.SIZE :])
        guest.gives(virtio_frame(datagram(family, bytes(12 + number))))
    assert bytes(guest.listener.bytes) == b"x" * 10
    assert len(guest.users.datagrams.got) == 1 + 10
    assert short == [20]


def test_a_frame_with_another_head_goes_the_long_way_once(family: int) -> None:
    """Whatever is not as in the last frame is looked at anew: another TTL, for one, and the user hears of it."""
    guest = guests(family)[0]
    short = count_short(guest)
    at = common.IP_AT + (8 if family == 4 else 7)
    frame = bytearray(virtio_frame(datagram(family, bytes(12))))
    frame[at] = 9
    if family == 4:
        frame[common.IP_AT + 10 : common.IP_AT + 12] = header_sum(frame[common.IP_AT : common.LAYER4_AT])
    for _ in range(3):
        guest.gives(bytes(frame))
    assert short == [2]
    assert [ttl for _, ttl, _ in guest.users.datagrams.got] == [64, 9, 9, 9]


def test_a_bare_syn_reopens_what_is_in_time_wait(family: int) -> None:
    for guest in guests(family):
        guest.shutdown()
        for flags, seq, ack in ((ACK, 1000, 9001), (FIN | ACK, 1000, 9001)):
            guest.gives(LEFT_TO_US + guest.segment(flags, seq, ack)[virtio.SIZE :])
        assert guest.connection.state is State.TIME_WAIT
        guest.gives(LEFT_TO_US + guest.segment(SYN, 500_000)[virtio.SIZE :])
        assert len(guest.users.listeners) == 2
