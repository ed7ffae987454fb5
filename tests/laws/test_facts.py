"""Facts about the kernel that the library relies on, each a test.

Every test runs in a process with a user and a network namespace of its own, where this file is run as a
script with the test's name; there the kernel is the *guest* and the script the other end of its tap.  No
netns_kit here.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import functools
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import needs_tun

TUNSETIFF, TUNSETPERSIST, TUNGETIFF = 0x400454CA, 0x400454CB, 0x800454D2
TUNGETFEATURES, TUNSETOFFLOAD = 0x800454CF, 0x400454D0
TUNGETVNETHDRSZ, TUNSETVNETHDRSZ = 0x800454D7, 0x400454D8
FPROG = struct.Struct("HP")  # struct sock_fprog
TUNATTACHFILTER, TUNDETACHFILTER = 0x400054D5 | FPROG.size << 16, 0x400054D6 | FPROG.size << 16
TAP, NO_PI, VNET_HDR, MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
PLAIN, VNET = TAP | NO_PI, TAP | NO_PI | VNET_HDR
CSUM, TSO4, TSO6, TSO_ECN, USO4, USO6 = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40
NEEDS_CSUM, GSO_TCPV4, GSO_UDP_L4 = 1, 1, 5
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C
SIOCGIFHWADDR, SIOCSIFMTU, SIOCETHTOOL, SIOCSARP = 0x8927, 0x8922, 0x8946, 0x8955
ETHTOOL_GTSO = 0x1E
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
UDP_SEGMENT = 103
OUR_MAC = bytes.fromhex("020000000002")
US, GUEST = socket.inet_aton("10.0.2.2"), socket.inet_aton("10.0.2.100")
VNET_HEADER = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
SYN, ACK = 0x02, 0x10


def unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def in_namespace(fact: Callable[[], None]) -> Callable[[], None]:
    """Run a test in a process with namespaces of its own."""

    @functools.wraps(fact)
    def test() -> None:
        needs_tun()
        child = subprocess.run(
            [sys.executable, __file__, fact.__name__],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        if child.returncode:
            pytest.fail(child.stderr, pytrace=False)

    return test


def attach(name: str, flags: int) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError:
        os.close(fd)
        raise
    return fd


def ioctl_int(fd: int, request: int, value: int = 0) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, struct.pack("i", value)), sys.byteorder)


def refusal(act: Callable[[], object]) -> int:
    """The errno that `act` fails with, 0 if it does not fail."""
    try:
        act()
    except OSError as error:
        return error.errno or -1
    return 0


def remove_link(name: str) -> None:
    """`ip link del`, by RTM_DELLINK (rtnetlink(7))."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        body = struct.pack("BxHiII", 0, 0, socket.if_nametoindex(name), 0, 0)
        netlink.send(struct.pack("IHHII", 16 + len(body), 17, 5, 1, 0) + body)
        assert struct.unpack_from("i", netlink.recv(1000), 16) == (0,)


def up(name: str) -> bytes:
    """Give the guest 10.0.2.100 on this link and us a place in its ARP table; return the guest's MAC."""
    ipv6 = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    if ipv6.exists():
        ipv6.write_text("1")  # no neighbour discovery among the frames
    device = name.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, address in (SIOCSIFADDR, GUEST), (SIOCSIFNETMASK, b"\xff\xff\xff\0"):
            fcntl.ioctl(control, request, struct.pack("16sHH4s16x", device, socket.AF_INET, 0, address))
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", device, 1 | 64))  # IFF_UP | IFF_RUNNING
        arp = struct.pack("HH4s8xH6s8xi16x16s", socket.AF_INET, 0, US, 1, OUR_MAC, 2 | 4, device)
        fcntl.ioctl(control, SIOCSARP, arp)
        return fcntl.ioctl(control, SIOCGIFHWADDR, struct.pack("16s24x", device))[18:24]


def frame(tap: int) -> bytes:
    assert select.select([tap], [], [], 5)[0], "no frame within 5 s"
    return os.read(tap, 1 << 17)


def folded_sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Peer:
    """Just enough TCP to be the peer of one connection of the guest's, at 10.0.2.2:80."""

    def __init__(self) -> None:
        self.tap = attach("tap0", VNET)
        fcntl.ioctl(self.tap, TUNSETOFFLOAD, CSUM | TSO4 | TSO6)
        self.guest_mac = up("tap0")
        self.guest = socket.socket()
        self.guest.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000
        )  # the first window takes 60000 bytes
        self.guest.setblocking(False)
        assert self.guest.connect_ex(("10.0.2.2", 80)) == errno.EINPROGRESS
        syn = frame(self.tap)[10:]
        self.guest_port, _, seq = struct.unpack_from("!HHI", syn, 34)
        self.seq, self.ack = 9000, seq + 1 & 0xFFFFFFFF
        options = struct.pack("!BBHBBBB", 2, 4, 1460, 1, 3, 3, 7)  # MSS, window scale
        os.write(self.tap, self.segment(SYN | ACK, options))
        frame(self.tap)  # the guest's ACK
        self.seq += 1

    def segment(self, flags: int, options: bytes = b"", payload: bytes = b"", mss: int = 0) -> bytes:
        """A frame with its vnet header; only the pseudo-header is summed, `mss` makes it a super-frame."""
        size = 20 + len(options) + len(payload)
        pseudo = folded_sum(US + GUEST + struct.pack("!HH", socket.IPPROTO_TCP, size))
        words = (5 + len(options) // 4) << 12 | flags
        tcp = struct.pack("!HHIIHHHH", 80, self.guest_port, self.seq, self.ack, words, 0xFFFF, pseudo, 0)
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + size, 0, 0, 64, socket.IPPROTO_TCP, 0, US, GUEST)
        ip = ip[:10] + struct.pack("!H", 0xFFFF - folded_sum(ip)) + ip[12:]
        header_size = 14 + 20 + 20 + len(options)
        vnet = VNET_HEADER.pack(NEEDS_CSUM, GSO_TCPV4 if mss else 0, header_size, mss, 34, 16)
        return vnet + self.guest_mac + OUR_MAC + b"\x08\x00" + ip + tcp + options + payload


@in_namespace
def test_a_new_descriptor_has_the_lowest_free_number() -> None:
    """So the number tells how many are open, at the least (open(2), dup(2))."""
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        freed = second.detach()
        os.close(freed)
        with socket.socket() as again:
            assert again.fileno() == freed
            assert first.fileno() < freed < third.fileno()


def test_a_user_without_privilege_is_offered_vnet_header_and_queues() -> None:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    assert ioctl_int(fd, TUNGETFEATURES) & (VNET | MULTI_QUEUE) == VNET | MULTI_QUEUE


@in_namespace
def test_segmentation_needs_checksum_offload() -> None:
    """TUNSETOFFLOAD takes CSUM|TSO4|TSO6|TSO_ECN anywhere, USO4|USO6 since Linux 6.2 and only together."""
    tap = attach("tap0", VNET)
    takes = [
        word for word in range(0x80) if not refusal(functools.partial(fcntl.ioctl, tap, TUNSETOFFLOAD, word))
    ]
    assert {0, CSUM, CSUM | TSO4 | TSO6 | TSO_ECN} <= set(takes)
    assert all(word & CSUM for word in takes if word & (TSO4 | TSO6 | USO4 | USO6)), takes
    assert all(word & USO4 and word & USO6 for word in takes if word & (USO4 | USO6)), takes
    release = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))
    assert (CSUM | TSO4 | TSO6 | TSO_ECN | USO4 | USO6 in takes) == (release >= (6, 2)), (release, takes)


@in_namespace
def test_the_mtu_of_a_tap_is_68_to_65521() -> None:
    attach("tap0", PLAIN)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for mtu, result in (67, errno.EINVAL), (68, 0), (65521, 0), (65522, errno.EINVAL):
            request = struct.pack("16si20x", b"tap0", mtu)
            assert refusal(functools.partial(fcntl.ioctl, control, SIOCSIFMTU, request)) == result, mtu


@in_namespace
def test_a_persistent_tap_takes_the_flags_of_whoever_attaches() -> None:
    """Except IFF_MULTI_QUEUE: that must be what its creator chose."""
    creator = attach("tap0", PLAIN)
    fcntl.ioctl(creator, TUNSETPERSIST, 1)
    assert refusal(lambda: attach("tap0", VNET)) == errno.EBUSY, "it has one queue and that is taken"
    os.close(creator)
    assert refusal(lambda: attach("tap0", VNET | MULTI_QUEUE)) == errno.EINVAL
    tap = attach("tap0", VNET)
    _, flags = struct.unpack_from("16sH", fcntl.ioctl(tap, TUNGETIFF, bytes(40)))
    assert flags & VNET == VNET
    os.close(tap)
    tap = attach("tap0", PLAIN)
    _, flags = struct.unpack_from("16sH", fcntl.ioctl(tap, TUNGETIFF, bytes(40)))
    assert flags & VNET == PLAIN


@in_namespace
def test_a_persistent_tap_keeps_header_size_and_offloads() -> None:
    """So the next user sets both: a tap without vnet header would get super-frames it cannot recognise."""
    tap = attach("tap0", VNET)
    assert ioctl_int(tap, TUNGETVNETHDRSZ) == 10
    ioctl_int(tap, TUNSETVNETHDRSZ, 12)
    fcntl.ioctl(tap, TUNSETOFFLOAD, CSUM | TSO4 | TSO6)
    fcntl.ioctl(tap, TUNSETPERSIST, 1)
    os.close(tap)
    tap = attach("tap0", PLAIN)
    value = array.array("I", [ETHTOOL_GTSO, 0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCETHTOOL, struct.pack("16sP16x", b"tap0", value.buffer_info()[0]))
    assert value[1] == 1
    os.close(tap)
    assert ioctl_int(attach("tap0", VNET), TUNGETVNETHDRSZ) == 12


@in_namespace
def test_a_flow_comes_by_the_queue_it_was_last_written_to() -> None:
    """And a new one, or one not written for 3 seconds, by that which its name gives: always the same."""
    queues = [attach("tap0", PLAIN | MULTI_QUEUE) for _ in range(2)]
    up("tap0")
    guest = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    guest.connect(("10.0.2.2", 7))

    def queue_of_next() -> tuple[int, bytes]:
        guest.send(b"x")
        (ready,) = select.select(queues, [], [], 5)[0]
        return queues.index(ready), os.read(ready, 1 << 17)

    usual, sent = queue_of_next()
    assert {queue_of_next()[0] for _ in range(10)} == {usual}
    other = 1 - usual
    answer = bytearray(sent)  # the other way round; its checksums stay right
    answer[:12] = sent[6:12] + sent[:6]
    answer[26:38] = sent[30:34] + sent[26:30] + sent[36:38] + sent[34:36]
    os.write(queues[other], answer)
    assert {queue_of_next()[0] for _ in range(10)} == {other}
    end = time.monotonic() + 30
    while queue_of_next()[0] == other:  # a packet out does not keep it: only one that is written does
        assert time.monotonic() < end
        time.sleep(0.5)
    assert queue_of_next()[0] == usual


@in_namespace
def test_an_attached_descriptor_cannot_be_given_other_flags() -> None:
    tap = attach("tap0", PLAIN)
    again = struct.pack("16sH22x", b"tap0", VNET)
    assert refusal(lambda: fcntl.ioctl(tap, TUNSETIFF, again)) == errno.EEXIST


@in_namespace
def test_tungetiff_tells_packet_information_only_under_a_filter() -> None:
    """IFF_NOFILTER has IFF_NO_PI's bit; with a filter that passes everything the answer is true."""
    program = array.array("B", struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF))
    for name, flags in ("tap0", TAP), ("tap1", PLAIN):
        tap = attach(name, flags)
        _, bare = struct.unpack_from("16sH", fcntl.ioctl(tap, TUNGETIFF, bytes(40)))
        fcntl.ioctl(tap, TUNATTACHFILTER, FPROG.pack(1, program.buffer_info()[0]))
        _, filtered = struct.unpack_from("16sH", fcntl.ioctl(tap, TUNGETIFF, bytes(40)))
        fcntl.ioctl(tap, TUNDETACHFILTER, FPROG.pack(0, 0))
        assert bare & NO_PI
        assert filtered & PLAIN == flags


@in_namespace
def test_a_tap_descriptor_keeps_its_namespace_alive() -> None:
    """The last process of a namespace ends: the tap lives on, and tells its address from outside."""
    ours, theirs = socket.socketpair()
    if not (child := os.fork()):
        unshare(CLONE_NEWNET)
        tap = attach("inside", VNET)
        up("inside")
        socket.send_fds(theirs, [b"!"], [tap])
        os._exit(0)
    _, (tap,), _, _ = socket.recv_fds(ours, 1, 1)
    assert os.waitpid(child, 0) == (child, 0)
    assert "inside" not in [name for _, name in socket.if_nameindex()]
    assert refusal(lambda: os.read(tap, 2000)) == errno.EAGAIN
    name, _ = struct.unpack_from("16sH", fcntl.ioctl(tap, TUNGETIFF, bytes(40)))
    assert name.rstrip(b"\0") == b"inside"
    mac = fcntl.ioctl(tap, SIOCGIFHWADDR, bytes(40))[18:24]
    assert os.write(tap, bytes(10) + mac + OUR_MAC + b"\x08\x00" + bytes(46)) == 70


@in_namespace
def test_the_descriptor_of_a_removed_tap_is_in_bad_state() -> None:
    tap = attach("tap0", VNET)
    poll = select.poll()
    poll.register(tap, select.POLLIN)
    remove_link("tap0")
    assert poll.poll(5000) == [(tap, select.POLLERR)]
    assert refusal(lambda: os.read(tap, 2000)) == errno.EBADFD
    assert refusal(lambda: os.write(tap, bytes(100))) == errno.EBADFD


@in_namespace
def test_a_write_to_a_tap_that_is_down_fails_with_eio() -> None:
    tap = attach("tap0", VNET)
    assert refusal(lambda: os.write(tap, bytes(100))) == errno.EIO
    assert refusal(lambda: os.read(tap, 2000)) == errno.EAGAIN


@in_namespace
def test_an_impossible_vnet_header_fails_with_einval() -> None:
    tap = attach("tap0", VNET)
    up("tap0")
    for vnet in (VNET_HEADER.pack(NEEDS_CSUM, 0, 0, 0, 60000, 16), VNET_HEADER.pack(0, 99, 54, 1460, 0, 0)):
        assert refusal(functools.partial(os.write, tap, vnet + bytes(100))) == errno.EINVAL, vnet
    assert refusal(lambda: os.write(tap, bytes(10 + 13))) == errno.EINVAL, "no Ethernet header"


@in_namespace
def test_a_write_to_a_tap_that_is_up_never_blocks() -> None:
    """What nobody reads inside is dropped inside; ours is always taken."""
    peer = Peer()
    for _ in range(500):
        os.write(peer.tap, peer.segment(ACK, payload=bytes(60000), mss=1460))


@in_namespace
def test_the_guest_hands_over_super_frames_without_checksums() -> None:
    """At MTU 1500 one read brings several segments, GSO_TCPV4 with their size, NEEDS_CSUM, and a sum of
    headers.
    """
    peer = Peer()
    peer.guest.send(bytes(60000))
    data = frame(peer.tap)
    flags, gso_type, header_size, gso_size, start, offset = VNET_HEADER.unpack_from(data)
    assert (flags, gso_type, gso_size, start, offset) == (NEEDS_CSUM, GSO_TCPV4, 1460, 34, 16)
    assert len(data) > 10 + 14 + 1500
    assert header_size >= 54
    size = len(data) - 10 - 34
    assert struct.unpack_from("!H", data, 10 + 34 + 16)[0] == folded_sum(
        GUEST + US + struct.pack("!HH", socket.IPPROTO_TCP, size)
    )


@in_namespace
def test_the_guest_takes_60000_bytes_in_one_write() -> None:
    """At MTU 1500, as one GSO super-frame of which only the pseudo-header is summed."""
    peer = Peer()
    payload = os.urandom(60000)
    segment = peer.segment(ACK, payload=payload, mss=1460)
    assert os.write(peer.tap, segment) == len(segment)
    got = b""
    while len(got) < len(payload) and select.select([peer.guest], [], [], 5)[0]:
        got += peer.guest.recv(1 << 17)
    assert got == payload


@in_namespace
def test_the_guest_hands_over_super_datagrams() -> None:
    """Where USO is accepted, a sender's UDP_SEGMENT arrives as one GSO_UDP_L4 frame."""
    tap = attach("tap0", VNET)
    if refusal(lambda: fcntl.ioctl(tap, TUNSETOFFLOAD, CSUM | USO4 | USO6)):
        return
    up("tap0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as guest:
        guest.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        guest.sendto(bytes(14000), ("10.0.2.2", 9))
    data = frame(tap)
    _, gso_type, _, gso_size, _, _ = VNET_HEADER.unpack_from(data)
    assert (gso_type, gso_size) == (GSO_UDP_L4, 1000)
    assert len(data) == 10 + 14 + 20 + 8 + 14000


if __name__ == "__main__":
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | CLONE_NEWNET)
    for file, text in ("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1"):
        Path("/proc/self", file).write_text(text)
    globals()[sys.argv[1]].__wrapped__()
