"""The addresses of the host's interfaces, by name."""

from __future__ import annotations

import fcntl
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

from . import abi

_IFREQ = struct.Struct("16s24s")
_SCOPES = frozenset({abi.IPV6_ADDR_GLOBAL, abi.IPV6_ADDR_LOOPBACK})
_UNUSABLE = abi.IFA_F_DEPRECATED | abi.IFA_F_DADFAILED | abi.IFA_F_TENTATIVE


def first_address(name: str, version: int) -> str | None:
    """Return the first address of an IP version that the interface `name` can send from, or None."""
    return _first4(name) if version == 4 else _first6(name)


def of_host() -> list[IPv4Address | IPv6Address]:
    """Return the first address of each IP version of each interface."""
    found = [first_address(name, version) for _, name in socket.if_nameindex() for version in (4, 6)]
    return [ip_address(each) for each in found if each is not None]


def _first4(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            found = fcntl.ioctl(sock, abi.SIOCGIFADDR, _IFREQ.pack(name.encode(), b""))
        except OSError:
            return None
    return socket.inet_ntoa(found[20:24])


def _first6(name: str) -> str | None:
    """Look into /proc/net/if_inet6 (proc(5)): address, index, prefix, scope, flags, name."""
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as file:
            lines = [line.split() for line in file]
    except OSError:  # a kernel without IPv6
        return None
    for address, _, _, scope, flags, device in lines:
        if device == name and int(scope, 16) in _SCOPES and not int(flags, 16) & _UNUSABLE:
            return str(IPv6Address(bytes.fromhex(address)))
    return None
