"""The DHCP servers of a subnet, without their sockets.

`DhcpServer` and `Dhcp6Server` each take a datagram and return what is to be sent; `Leases` is the table below them,
`DhcpSettings` what they are told.  They know nothing of the stack that carries their datagrams, which knows them as
services of its own addresses.

Every byte a client sends is hostile: it raises `BadMessage` and nothing else in here, which is counted.

Law of this package: no socket, no clock, no log.
"""

from __future__ import annotations

from .errors import BadMessage
from .leases import Lease, Leases
from .server import DhcpServer, Reply
from .server6 import Dhcp6Server
from .settings import DEFAULT, DhcpSettings, StaticLease, check_static

__all__ = [
    "DEFAULT",
    "BadMessage",
    "Dhcp6Server",
    "DhcpServer",
    "DhcpSettings",
    "Lease",
    "Leases",
    "Reply",
    "StaticLease",
    "check_static",
]
