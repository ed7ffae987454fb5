"""The addresses of the host's interfaces, by name."""

from __future__ import annotations

import fcntl
import socket
import struct
from ipaddress import IPv6Address

_SIOCGIFADDR = 0x8915
_IFREQ = struct.Struct("16s24s")
_GLOBAL, _LOOPBACK = 0x00, 0x10  # linux/ipv6.h: scopes
_UNUSABLE = 0x20 | 0x08 | 0x40  # deprecated, failed, tentative: linux/if_addr.h


def first_address(name: str, version: int) -> str | None:
    """The first address of that family that the interface `name` can send from; None: no such interface, or none."""
    return _first4(name) if version == 4 else _first6(name)


def _first4(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            found = fcntl.ioctl(sock, _SIOCGIFADDR, _IFREQ.pack(name.encode(), b""))
        except OSError:
            return None
    return socket.inet_ntoa(found[20:24])


def _first6(name: str) -> str | None:
    """proc(5), /proc/net/if_inet6: address, index, prefix, scope, flags, name."""
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as file:
            lines = [line.split() for line in file]
    except OSError:  # a kernel without IPv6
        return None
    for address, _, _, scope, flags, device in lines:
        if device == name and int(scope, 16) in (_GLOBAL, _LOOPBACK) and not int(flags, 16) & _UNUSABLE:
            return str(IPv6Address(bytes.fromhex(address)))
    return None
