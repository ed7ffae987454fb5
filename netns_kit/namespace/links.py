"""The configuration of network links, by a process that is in their namespace.

It is written by hand, since importing a netlink library takes ten times as long as the agent's start.  Links and
their IPv4 addresses are set by ioctls (netdevice(7)), all else by rtnetlink(7).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

from netns_kit.host import abi

from .agent_common import to_bytes, write_file

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer than all imports here

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def on_link(request: int, name: str, data: bytes = b"") -> bytes:
    """Do one ioctl on `struct ifreq` and return what its union holds then."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            return fcntl.ioctl(sock, request, struct.pack("16s24s", interface_name(name), data))[16:]
        except OSError as exc:
            exc.filename = name
            raise


def interface_name(name: str) -> bytes:
    """Check a name and return it as the kernel takes it.  Raises OSError."""
    packed = to_bytes(name)
    if not 0 < len(packed) < 16:
        raise OSError(errno.EINVAL, "interface names have 1 to 15 bytes", name)
    return packed


def raise_link(name: str) -> None:
    (flags,) = struct.unpack_from("H", on_link(abi.SIOCGIFFLAGS, name))
    if not flags & abi.IFF_UP:
        on_link(abi.SIOCSIFFLAGS, name, struct.pack("H", flags | abi.IFF_UP))


def index_of(name: str) -> int:
    (index,) = struct.unpack_from("i", on_link(abi.SIOCGIFINDEX, name))
    return int(index)


def rtnetlink(name: str, kind: int, flags: int, message: bytes, attributes: dict[int, bytes]) -> None:
    """Send one message of rtnetlink(7) about the link `name`.  Raises the OSError of its answer."""
    for number, value in attributes.items():
        message += struct.pack("=HH", 4 + len(value), number) + value  # all of ours are aligned, or the last
    header = struct.pack("=IHHII", 16 + len(message), kind, flags | abi.NLM_F_REQUEST | abi.NLM_F_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.send(header + message)
        (result,) = struct.unpack_from("=i", sock.recv(4096), 16)  # struct nlmsgerr
    if result:
        raise OSError(-result, os.strerror(-result), name)


def set_queue_length(name: str, packets: int) -> None:
    """Set the length of the transmit queue.  The ioctl for it would need privilege over the whole machine."""
    change = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index_of(name), 0, 0)  # struct ifinfomsg
    rtnetlink(name, abi.RTM_SETLINK, 0, change, {abi.IFLA_TXQLEN: struct.pack("=I", packets)})


def configure_ipv6(name: str, address: str, prefix: int, gateway: str) -> str | None:
    """Set an IPv6 address and the default route; return why there is no IPv6, or None.

    The address is usable at once, without duplicate address detection: no ioctl can ask for that.
    """
    index = index_of(name)
    try:
        new = struct.pack("=BBBBi", socket.AF_INET6, prefix, abi.IFA_F_NODAD, 0, index)  # struct ifaddrmsg
        packed = {abi.IFA_ADDRESS: socket.inet_pton(socket.AF_INET6, address)}
        rtnetlink(name, abi.RTM_NEWADDR, abi.NLM_F_CREATE, new, packed)
    except OSError as exc:
        if exc.errno == errno.EACCES:
            return f"net.ipv6.conf.{name}.disable_ipv6 is 1"
        if exc.errno in {errno.EOPNOTSUPP, errno.EAFNOSUPPORT}:
            return "the kernel has none"
        if exc.errno != errno.EEXIST:
            raise
    add_default_route(name, gateway)
    return None


def set_ipv6_knob(name: str, knob: str, value: str) -> None:
    """Set net.ipv6.conf.NAME.KNOB, where there is IPv6 and /proc/sys may be written to."""
    try:  # noqa: SIM105 - contextlib would take half a millisecond of a start that is waited for
        write_file(f"/proc/sys/net/ipv6/conf/{name}/{knob}", value)
    except OSError:
        pass


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def set_neighbour(name: str, address: str, mac: str) -> None:
    """Enter the link address of `address` for good: the kernel asks nobody for it."""
    family = family_of(address)
    new = struct.pack("=BxxxiHBB", family, index_of(name), abi.NUD_PERMANENT, 0, 0)  # struct ndmsg
    known = {abi.NDA_DST: socket.inet_pton(family, address), abi.NDA_LLADDR: bytes.fromhex(mac)}
    rtnetlink(name, abi.RTM_NEWNEIGH, abi.NLM_F_CREATE | abi.NLM_F_REPLACE, new, known)


def sockaddr_in(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def add_default_route(name: str, gateway: str) -> None:
    """Add the default route of the gateway's family; one that exists, by whatever link, stays the only one."""
    family = family_of(gateway)
    route = struct.pack(  # struct rtmsg
        "=BBBBBBBBI", family, 0, 0, 0, abi.RT_TABLE_MAIN, abi.RTPROT_BOOT, 0, abi.RTN_UNICAST, 0
    )
    way = {abi.RTA_GATEWAY: socket.inet_pton(family, gateway), abi.RTA_OIF: struct.pack("=i", index_of(name))}
    try:
        rtnetlink(name, abi.RTM_NEWROUTE, abi.NLM_F_CREATE | abi.NLM_F_EXCL, route, way)
    except OSError as exc:
        if exc.errno != errno.EEXIST:
            raise


def open_tap(name: str, flags: Sequence[int], queues: int) -> tuple[dict[str, object], list[int]]:
    """Open the queues of a tap, with the first of the words of `flags` that the kernel takes.

    A persistent tap that exists is joined.  Return its name, its flags and whether it existed; and the descriptors.
    """
    packed = interface_name(name)
    try:
        index_of(name)
        existed = True
    except OSError:
        existed = False
    fds: list[int] = []
    try:
        while len(fds) < queues:
            fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            for word in flags:
                try:
                    fcntl.ioctl(fds[-1], abi.TUNSETIFF, struct.pack("16sH22x", packed, word & 0xFFFF))
                    break
                except OSError as exc:
                    if exc.errno != errno.EINVAL or word == flags[-1]:
                        exc.filename = name
                        raise
            flags = [word]  # all alike
        actual, made = struct.unpack("16sH22x", fcntl.ioctl(fds[0], abi.TUNGETIFF, bytes(40)))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return {"name": actual.rstrip(b"\0").decode(), "flags": made, "existed": existed}, fds


def configure_link(
    name: str,
    *,
    mac: str | None = None,
    mtu: int | None = None,
    queue: int | None = None,
    address: str | None = None,
    netmask: str = "",
    gateway: str | None = None,
    ipv6: tuple[str, int, str] | None = None,
    neighbours: Mapping[str, str] = {},
) -> str | None:
    """Set what is given, and bring the link and the loopback up.  Return why there is no IPv6, if it was asked for.

    Args:
        mac: The link address, in hexadecimal digits.
        queue: The length of the transmit queue, in packets.
        ipv6: An address, the length of its prefix, and the gateway.
        neighbours: Addresses on the link with their link addresses, in hexadecimal digits.
    """
    if mac is not None:
        on_link(abi.SIOCSIFHWADDR, name, struct.pack("H6s", abi.ARPHRD_ETHER, bytes.fromhex(mac)))
    if mtu is not None:
        on_link(abi.SIOCSIFMTU, name, struct.pack("i", mtu))
    if queue is not None:
        set_queue_length(name, queue)
    raise_link("lo")
    if address is not None:
        on_link(abi.SIOCSIFADDR, name, sockaddr_in(address))  # the kernel leaves an equal one alone
        on_link(abi.SIOCSIFNETMASK, name, sockaddr_in(netmask))
    if neighbours:  # what has given the addresses knows that nobody else has them, the link-local ones too
        set_ipv6_knob(name, "accept_dad", "0")  # else it would be usable a second later
    if (
        ipv6 is not None
    ):  # before the kernel can ask: else the router's advertisements may add another address
        set_ipv6_knob(name, "accept_ra", "0")
    raise_link(name)
    if gateway is not None:
        add_default_route(name, gateway)
    without = None if ipv6 is None else configure_ipv6(name, *ipv6)
    for neighbour, link in neighbours.items():
        if ":" not in neighbour or without is None:
            set_neighbour(name, neighbour, link)
    return without
