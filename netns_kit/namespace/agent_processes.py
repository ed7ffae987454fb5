"""Which process inside has a flow: the socket by the kernel's socket diagnostics, then who has that open.

TCP and UDP.  The request of sock_diag(7) is for one socket, and the kernel finds it as it finds the socket that a
packet is for: among thousands in the time of one.  Only a socket that is bound to an interface is not found without
that, so each interface is tried.  The reply has the uid and the inode:

     0  struct nlmsghdr, 16 bytes
    16  family, state, timer, retransmissions
    20  ports, addresses, interface, cookie: 48 bytes, as in the request
    68  expiry, receive queue, send queue, uid, inode

Pings.  A ping socket has its identifier as port (/proc/net/icmp).  What a raw socket sends is its owner's choice, so
that it counts only if one process alone has raw sockets of ICMP.

The process is the one with a descriptor whose link is "socket:[INODE]", the youngest first, as it mostly is one that
has just begun.  Programs inside decide how many processes and descriptors there are, and the agent does nothing else
meanwhile: so a search has a bound in time (`BUDGET`), and looks at the `FIRST` descriptors of each process before it
looks at more of any.  What is not found in time is not known.  A program can hide so, and can hand its socket to
another one; it cannot get another one's socket.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from contextlib import suppress

from netns_kit.host import abi

from .agent_common import read_bytes

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Iterator

BUDGET = 0.02  # seconds
FIRST = 32  # descriptors
COMMAND_MAX = 256  # bytes of the first word of a command line
TOLD_MAX = 200  # processes that are told of at most
LISTED_MAX = 1 << 20  # bytes of /proc/net/icmp: about 8,000 sockets

ALL_STATES = 0xFFFFFFFF
_REQUEST = struct.Struct("=IHHII BBxxI 2s2s16s16sI8s")
_FOUND = struct.Struct("=BB 62x II")  # family, state, ..., uid, inode
_HEADER = struct.Struct("=IHHII")
_ANY_COOKIE = b"\xff" * 8
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_ABSENT = frozenset({errno.ENOENT, errno.ENODEV, errno.ESTALE})


def process_of(
    protocol: str, local: str, local_port: int, remote: str, remote_port: int
) -> tuple[dict[str, object], list[int]]:
    """Return what is known of the process, with a pidfd; or that it is not known."""
    family = socket.AF_INET6 if ":" in local else socket.AF_INET
    if protocol == "icmp":
        sockets = _ping_sockets(family, local_port)
    else:
        ends = [
            (socket.inet_pton(family, address), port)
            for address, port in ((local, local_port), (remote, remote_port))
        ]
        sockets = _diagnosed(family, _PROTOCOLS[protocol], *ends)
    for pid, place, inode in _holders(sockets):
        with suppress(OSError):  # it has ended
            pidfd = os.pidfd_open(pid)
            try:
                found = _described(pid)
                if os.readlink(place) != _link(inode):  # by now the number may be another's
                    raise ProcessLookupError
                return {"uid": sockets[inode], **found}, [pidfd]
            except BaseException:
                os.close(pidfd)
                raise
    return {"unknown": True}, []


def processes() -> tuple[dict[str, object], list[int]]:
    """Return the processes of the namespace, the oldest first, `TOLD_MAX` of them, and how many more there are.

    That which keeps the PID namespace of the commands, as their process 1, is none of them.
    """
    every = sorted(_processes())
    if os.getpid() == 1:
        del every[:1]
    told: list[tuple[int, int, str, str, int]] = []
    for pid in every[:TOLD_MAX]:
        with suppress(OSError):  # it has ended
            told.append(_described_at_length(pid))
    return {"processes": told, "more": len(every[TOLD_MAX:])}, []


def _diagnosed(
    family: int, protocol: int, local: tuple[bytes, int], remote: tuple[bytes, int]
) -> dict[int, int]:
    """Return the socket of a flow: its uid by its inode."""
    if protocol == socket.IPPROTO_UDP:  # for which the kernel reads them as those of a packet that comes in
        local, remote = remote, local
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, abi.NETLINK_SOCK_DIAG) as netlink:
        for interface in (0, *(index for index, _ in socket.if_nameindex())):
            head = (
                _REQUEST.size,
                abi.SOCK_DIAG_BY_FAMILY,
                abi.NLM_F_REQUEST,
                0,
                0,
                family,
                protocol,
                ALL_STATES,
            )
            ports = local[1].to_bytes(2, "big"), remote[1].to_bytes(2, "big")
            netlink.send(_REQUEST.pack(*head, *ports, local[0], remote[0], interface, _ANY_COOKIE))
            answer = netlink.recv(4096)
            _, kind, *_ = _HEADER.unpack_from(answer)
            if kind == abi.NLMSG_ERROR:
                number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
                if number not in _ABSENT:
                    raise OSError(number, os.strerror(number))
                continue
            _, state, uid, inode = _FOUND.unpack_from(answer, _HEADER.size)
            if state == abi.TCP_LISTEN or not inode:  # the flow's own has ended
                return {}
            return {inode: uid}
    return {}


def _ping_sockets(family: int, identifier: int) -> dict[int, int]:
    """Return the sockets that may have sent echo requests with that identifier."""
    suffix = "6" if family == socket.AF_INET6 else ""
    protocol = socket.IPPROTO_ICMPV6 if suffix else socket.IPPROTO_ICMP
    found = dict(_listed(f"icmp{suffix}", identifier))
    return found or dict(_listed(f"raw{suffix}", protocol))


def _listed(name: str, port: int) -> Iterator[tuple[int, int]]:
    """Yield inode and uid of the sockets with that port in a table of /proc/net."""
    wanted = b":%04X" % port
    with suppress(FileNotFoundError):  # there is no IPv6
        for line in read_bytes(f"/proc/thread-self/net/{name}", LISTED_MAX).splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[1].endswith(wanted):
                yield int(fields[9]), int(fields[7])


def _holders(sockets: dict[int, int]) -> list[tuple[int, str, int]]:
    """Return the process that has one of the sockets open, with the path of its descriptor and the inode.

    Of one socket that is the first that is found; of several it is none, if more than one process has them.
    """
    links = {_link(inode): inode for inode in sockets}
    found: dict[int, tuple[int, str, int]] = {}
    for pid, place in _descriptors() if links else ():
        with suppress(OSError):
            inode = links.get(os.readlink(place))
            if inode is not None:
                found.setdefault(pid, (pid, place, inode))
                if len(links) == 1 or len(found) > 1:
                    break
    return list(found.values()) if len(found) == 1 else []


def _descriptors() -> Iterator[tuple[int, str]]:
    """Yield processes and their descriptors, as long as there is time: first those of low numbers.

    These are tried.  To list the descriptors of a process takes the kernel a microsecond for each of them.
    """
    until = time.monotonic() + BUDGET
    processes = list(_processes())
    for pid in processes:
        for number in range(FIRST):
            yield pid, f"/proc/{pid}/fd/{number}"
        if time.monotonic() > until:
            return
    for pid in processes:
        with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
            for count, each in enumerate(descriptors):
                yield pid, each.path
                if not count % FIRST and time.monotonic() > until:
                    return


def _processes() -> Iterator[int]:
    """Yield the processes of this network namespace, the youngest first.

    In a PID namespace of our own all processes are commands.
    """
    ours, is_alone = os.getpid(), os.getpid() == 1
    network = None if is_alone else os.stat("/proc/self/ns/net").st_ino
    for pid in sorted((int(each) for each in os.listdir("/proc") if each.isdecimal()), reverse=True):
        if pid != ours:
            with suppress(OSError):
                if is_alone or os.stat(f"/proc/{pid}/ns/net").st_ino == network:
                    yield pid


def _described(pid: int) -> dict[str, object]:
    status = read_bytes(f"/proc/{pid}/status", 4096)
    numbers = [line.split() for line in status.splitlines() if line.startswith(b"NSpid:")]
    return {
        "inner_pid": int(numbers[0][-1]) if numbers else pid,
        "name": _text(read_bytes(f"/proc/{pid}/comm", COMMAND_MAX).rstrip(b"\n")),
        "command": _text(read_bytes(f"/proc/{pid}/cmdline", COMMAND_MAX).partition(b"\0")[0]),
    }


def _described_at_length(pid: int) -> tuple[int, int, str, str, int]:
    """Return the fields of a `RunningProcess`."""
    status = read_bytes(f"/proc/{pid}/status", 4096)
    fields = dict(line.split(b":", 1) for line in status.splitlines() if b":" in line)
    words = read_bytes(f"/proc/{pid}/cmdline", COMMAND_MAX).rstrip(b"\0").split(b"\0")
    return (
        int(fields.get(b"NSpid", fields[b"Pid"]).split()[-1]),
        int(fields[b"Uid"].split()[1]),
        _text(read_bytes(f"/proc/{pid}/comm", COMMAND_MAX).rstrip(b"\n")),
        _text(b" ".join(words)),
        int(fields.get(b"VmRSS", b"0").split()[0]) << 10,
    )


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _link(inode: int) -> str:
    return f"socket:[{inode}]"
