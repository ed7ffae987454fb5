"""The DHCP servers of a subnet, without their sockets.

`DhcpServer` and `Dhcp6Server` take a datagram and return the datagrams to send.  `Leases` is their table,
`DhcpSettings` their configuration.  They do not know the stack that carries their datagrams.

A client's bytes are hostile: they raise `BadDhcpMessage` and nothing else in here, which is counted.

Law of this package: no socket, no clock, no log.
"""

from __future__ import annotations

from .errors import BadDhcpMessage
from .leases import Lease, Leases
from .server import DhcpServer, Reply
from .server6 import Dhcp6Server
from .settings import DEFAULT, DhcpSettings, StaticLease, check_static

__all__ = [
    "DEFAULT",
    "BadDhcpMessage",
    "Dhcp6Server",
    "DhcpServer",
    "DhcpSettings",
    "Lease",
    "Leases",
    "Reply",
    "StaticLease",
    "check_static",
]
