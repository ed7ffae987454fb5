"""Bound ports: who has one, and whether this process may have one.

The kernel says only that an address is in use.  /proc/net/tcp and its like (proc_net(5)) have the inode and the
owner's uid of each socket, and the process is the one with a descriptor of that inode.  /proc is searched only after
something has failed.  A process that is not dumpable, such as a worker of ours, hides its descriptors.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

__all__ = ["holder", "may_bind", "path_holder"]

LISTEN = 0x0A  # include/net/tcp_states.h
SO_ACCEPTCON = 1 << 16  # a flag of unix sockets that listen, include/uapi/linux/net.h
SHOWN = 80  # characters of a command line in a message


class _Bound(NamedTuple):
    """A socket, as a line of /proc/net/tcp, tcp6, udp or udp6 shows it."""

    address: IPv4Address | IPv6Address
    port: int
    state: int
    uid: int
    inode: int


def may_bind(port: int) -> bool:
    """Return whether this process may bind a port as low as this one.

    It is tried, with a socket that does not listen: capabilities do not tell, since they may be those of another user
    namespace.

    Args:
        port: The port.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        try:
            trial.bind(("0.0.0.0", port))
        except PermissionError:  # the kernel checks this before it looks for other sockets
            return False
        except OSError:
            pass
    return True


def holder(protocol: str, host: IPv4Address | IPv6Address, port: int, pid: int | None = None) -> str | None:
    """Return, in words, who has the port that could not be bound; None if that cannot be known.

    A process is named if the caller may see its descriptors, else its user.  A TCP socket that is bound but does not
    listen is in no table.

    Args:
        protocol: "tcp" or "udp".
        host: The address that could not be bound.  One of IPv6 is taken to have been bound with IPV6_V6ONLY.
        port: The port.
        pid: A process in the network namespace that is meant; None: the calling thread's.
    """
    place = f"/proc/{'thread-self' if pid is None else pid}/net/{protocol}"
    found = [
        each
        for path in (place, f"{place}6")
        for each in _table(path)
        if each.port == port and _overlap(each.address, host)
    ]
    if not found:
        return None
    # a socket of the same family is surer than one of IPv6, which may have IPV6_V6ONLY
    first = min(found, key=lambda each: (each.state != LISTEN, each.address.version != host.version))
    if not first.inode:
        return "a connection that the kernel is closing"
    return _process(first.inode) or f"a process of uid {first.uid}"


def path_holder(path: str) -> str | None:
    """Return, in words, who listens at a unix socket; None if nobody does, or that cannot be known.

    Args:
        path: Its path, or "@" and the name of an abstract socket.
    """
    with (
        suppress(OSError),
        open("/proc/thread-self/net/unix", encoding="utf-8", errors="surrogateescape") as file,
    ):
        for line in file:
            words = line.rstrip("\n").split(maxsplit=7)
            if words[7:] == [path] and int(words[3], 16) & SO_ACCEPTCON:
                return _process(int(words[6]))
    return None


def _process(inode: int) -> str | None:
    """Return, in words, who has the socket; None if its process cannot be seen."""
    pids = list(_processes(inode))
    if not pids:
        return None
    if os.getpid() in pids:
        return "this process"
    others = f" and {len(pids) - 1} more" if len(pids) > 1 else ""
    return f"process {pids[0]}, {_command(pids[0])}{others}"


def _overlap(bound: IPv4Address | IPv6Address, wanted: IPv4Address | IPv6Address) -> bool:
    """Return whether a socket that is bound to the one address keeps others from the other."""
    plain = bound.ipv4_mapped or bound if isinstance(bound, IPv6Address) else bound
    if plain.version == wanted.version:
        return plain == wanted or plain.is_unspecified or wanted.is_unspecified
    return plain.version == 6 and plain.is_unspecified  # the wildcard of IPv6 has IPv4's ports as well


def _table(path: str) -> Iterator[_Bound]:
    """Read a table of sockets; nothing of one that is not there, as without IPv6."""
    with suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        next(file, None)
        for line in file:
            _, local, _, state, _, _, _, uid, _, inode, *_ = line.split()
            address, _, port = local.partition(":")
            yield _Bound(_address(address), int(port, 16), int(state, 16), int(uid), int(inode))


def _address(text: str) -> IPv4Address | IPv6Address:
    """Read an address of the kernel's tables: 32-bit words, each in the machine's byte order."""
    data = bytes.fromhex(text)
    if sys.byteorder == "little":
        data = b"".join(data[at : at + 4][::-1] for at in range(0, len(data), 4))
    return ip_address(data)


def _processes(inode: int) -> Iterator[int]:
    """Find the processes with a descriptor of a socket, lowest first: its maker comes before those it has forked."""
    wanted = f"socket:[{inode}]"
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(OSError):  # another user's, or it has ended
            if any(_link(f"/proc/{pid}/fd/{fd}") == wanted for fd in os.listdir(f"/proc/{pid}/fd")):
                yield pid


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _command(pid: int) -> str:
    """Return the command line of a process for a message; it may have written anything there."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            words = file.read(4 * SHOWN).rstrip("\0").replace("\0", " ")
    except OSError:
        words = ""
    shown = words or "which is ending"
    return shown[:SHOWN] if shown.isprintable() else ascii(shown)[1:-1][:SHOWN]
