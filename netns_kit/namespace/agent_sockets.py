"""Sockets of the namespace for an engine outside, in batches, and the routes that transparent ones need.

An engine connects to programs inside by sockets of the namespace, one for each client of a published port.  Asking
for each would cost a round trip, so it has a socket to the agent, on which it orders them by the dozen (see
`netns_kit.child.supply`).

A *transparent* socket has an address of its client's, that is none of the namespace (ip(7), IP_TRANSPARENT).  The
packets of the program that answers would leave the namespace, so they are routed to the loopback: those of TCP by
the mark of the connection, which an accepted socket has from the SYN (tcp_fwmark_accept, ip-sysctl.rst), and a
refusal from what it refuses (fwmark_reflect); a UDP socket accepts nothing, so those of UDP by the port that they
come from.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

from netns_kit.child.channel import send_record
from netns_kit.child.supply import MOST, ORDER, PING, REPLY, ROOM
from netns_kit.host import abi

from .agent_common import read_file, to_bytes, write_file
from .links import index_of, rtnetlink

MARK = TABLE = 0x6E6B  # "nk": of transparent sockets, and of the routing table for what answers them
PATH_MAX = 108  # bytes of a unix socket's address
_allowed: set[bytes] = set()  # unix sockets that the engine may be connected to
_routed: set[tuple[int, int]] = set()  # families, and ports of UDP (0: the mark) that have a rule
_TYPES = frozenset({int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM), PING})
_PING = {int(socket.AF_INET): socket.IPPROTO_ICMP, int(socket.AF_INET6): socket.IPPROTO_ICMPV6}
_TRANSPARENT = {  # by family
    int(socket.AF_INET): (socket.IPPROTO_IP, abi.IP_TRANSPARENT),
    int(socket.AF_INET6): (socket.IPPROTO_IPV6, abi.IPV6_TRANSPARENT),
}
PING_GROUPS = "/proc/sys/net/ipv4/ping_group_range"  # of both families
UNKNOWN_GROUPS = ["65534", "65534"]  # what "1 0", the default, is where neither is mapped
_SYSCTLS = {int(socket.AF_INET): "ipv4", int(socket.AF_INET6): "ipv6"}


class Supply:
    """The agent's end of a supply.

    Args:
        supply: The socket, which is this object's from now on.
    """

    def __init__(self, supply: socket.socket) -> None:
        supply.setblocking(False)
        supply.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
        self._supply = supply
        self._order = b""  # that has no reply yet

    def fileno(self) -> int:
        """Return the descriptor to wait on; it is negative when the engine has gone."""
        return self._supply.fileno()

    def serve(self) -> int:
        """Answer one order.  Return the events to wait for: another order, or room for this reply; 0: no more."""
        try:
            order = self._order or self._supply.recv(ORDER.size + PATH_MAX)
        except BlockingIOError:
            return select.POLLIN
        except ConnectionError:
            order = b""
        if len(order) < ORDER.size:
            self._supply.shutdown(socket.SHUT_RDWR)  # the engine's owner has a copy
            self._supply.close()
            return 0
        family, kind, transparent, count = ORDER.unpack_from(order)
        made: list[socket.socket] = []
        number = 0
        try:
            if family == socket.AF_UNIX:
                made.append(_connected(order[ORDER.size :]))
            else:
                while len(made) < min(count, MOST):
                    made.append(_socket(family, kind, bool(transparent)))
        except OSError as exc:
            number = exc.errno or errno.EIO
        self._order = b""
        try:
            self._reply((family, kind, transparent, number), [each.fileno() for each in made])
        except BlockingIOError:
            self._order = order
        except OSError:
            self._order = b""
        for each in made:
            each.close()
        return select.POLLOUT if self._order else select.POLLIN

    def _reply(self, reply: tuple[int, int, int, int], fds: list[int]) -> None:
        """Send a reply; without its sockets if the user has too many descriptors on their way."""
        try:
            send_record(self._supply, REPLY.pack(*reply), fds)
        except BlockingIOError:
            raise
        except OSError as exc:
            send_record(self._supply, REPLY.pack(*reply[:3], exc.errno or errno.EIO))


def allow_unix(address: str, wanted: bool) -> tuple[dict[str, object], list[int]]:
    """Let the engine have connections to a unix socket, or no more: it may be taken over, so it names none itself."""
    (_allowed.add if wanted else _allowed.discard)(to_bytes(address))
    return {}, []


def _connected(address: bytes) -> socket.socket:
    """Connect to a unix socket: by its path, or its name in this namespace."""
    if address not in _allowed:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        made.connect(address)
    except BaseException:
        made.close()
        raise
    return made


def _socket(family: int, kind: int, transparent: bool) -> socket.socket:
    if family not in _TRANSPARENT or kind not in _TYPES:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if kind == PING:
        return _ping_socket(family)
    made = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    try:
        if kind == socket.SOCK_STREAM:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            if transparent:  # two of UDP at one address would have one another's answers
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if transparent:
            made.setsockopt(*_TRANSPARENT[family], 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
    except BaseException:
        made.close()
        raise
    return made


def _ping_socket(family: int) -> socket.socket:
    """Make a ping socket, which the kernel allows to no group at first; a raw one would be for much more."""
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    try:
        return socket.socket(family, kind, _PING[family])
    except PermissionError:
        first, last = read_file(PING_GROUPS).split()
        if int(first) <= int(last) and [first, last] != UNKNOWN_GROUPS:  # somebody has chosen them
            raise
        write_file(PING_GROUPS, f"{os.getegid()} {os.getegid()}\n")
        return socket.socket(family, kind, _PING[family])


def prepare_transparent(ipv6: bool) -> tuple[dict[str, object], list[int]]:
    """Route what answers transparent sockets of TCP to the loopback.  Doing it again is fine."""
    for family in (socket.AF_INET, socket.AF_INET6) if ipv6 else (socket.AF_INET,):
        if (family, 0) in _routed:
            continue
        _socket(family, socket.SOCK_STREAM, transparent=True).close()
        head = struct.pack(  # struct rtmsg
            "=BBBBBBBBI", family, 0, 0, 0, 0, abi.RTPROT_BOOT, abi.RT_SCOPE_HOST, abi.RTN_LOCAL, 0
        )
        way = {abi.RTA_TABLE: struct.pack("=I", TABLE), abi.RTA_OIF: struct.pack("=i", index_of("lo"))}
        _add(abi.RTM_NEWROUTE, head, way)
        _add(abi.RTM_NEWRULE, _rule(family), {abi.FRA_FWMARK: struct.pack("=I", MARK), **_to_table()})
        write_file(f"/proc/sys/net/{_SYSCTLS[family]}/fwmark_reflect", "1\n")
        _routed.add((family, 0))
    write_file("/proc/sys/net/ipv4/tcp_fwmark_accept", "1\n")  # of both families
    return {}, []


def route_answers(family: int, port: int, wanted: bool) -> tuple[dict[str, object], list[int]]:
    """Route what a program sends by UDP from `port` to the loopback, or do so no more.  Doing it again is fine."""
    ports = struct.pack("=HH", port, port)
    chosen = {abi.FRA_SPORT_RANGE: ports, **_to_table(), abi.FRA_IP_PROTO: bytes((socket.IPPROTO_UDP,))}
    if wanted and (family, port) not in _routed:
        rtnetlink("lo", abi.RTM_NEWRULE, abi.NLM_F_CREATE, _rule(family), chosen)
        _routed.add((family, port))
    elif not wanted and (family, port) in _routed:
        _routed.remove((family, port))
        try:
            rtnetlink("lo", abi.RTM_DELRULE, 0, _rule(family), chosen)
        except OSError as exc:
            if exc.errno != errno.ENOENT:  # a program inside has removed it
                raise
    return {}, []


def _rule(family: int) -> bytes:
    return struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, abi.FR_ACT_TO_TBL, 0)  # struct fib_rule_hdr


def _to_table() -> dict[int, bytes]:
    return {abi.FRA_TABLE: struct.pack("=I", TABLE)}


def _add(kind: int, message: bytes, attributes: dict[int, bytes]) -> None:
    try:
        rtnetlink("lo", kind, abi.NLM_F_CREATE | abi.NLM_F_EXCL, message, attributes)
    except OSError as exc:
        if exc.errno != errno.EEXIST:
            raise
