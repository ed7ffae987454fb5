"""A user-mode TCP/IP stack for a guest on the other end of a link: pure, sans-I/O.

Theory of operation.  The guest is a kernel with a full TCP/IP of its own, and it is our only neighbour.
Frames go in by `Stack.receive`, frames come out through the `emit` given at the start, time comes in as an
argument and goes out as `Stack.deadline`.  Between them are tables of flows, keyed by the bytes that name a
flow on the wire (`netns_kit.stack.wire.flow_key`), so nothing in TCP, UDP or the tables knows how long an address is.

A flow is half ours: `TcpConnection` speaks TCP with the guest, `UdpFlow` and `EchoFlow` do as much for
datagrams and pings.  Its other half is a *user* (`TcpUser`, `DatagramUser`, `EchoUser`), told of things by
plain calls: a relay to a host socket, or a test.  `StackUser` hears of each new flow and finds it a user or
refuses it.

Not every datagram makes a flow.  A `LinkService` answers those to a port of our own addresses, and to all or a group,
which nobody else hears; it is asked first, but for flows that it has let pass.

Offloads.  Where the link has a virtio header, a TCP segment in either direction may be 64 KiB long at any MTU
and its checksum is left to the kernels; where it has none the same code cuts to the MSS and sums.

The queues are the kernels': what the guest has sent and the user has not taken is not acknowledged, so the
guest keeps it; what the guest's window has no room for is not read, so the host's socket keeps it.  We hold
what is in flight, bounded by `Limits`.
"""

from .echo import EchoFlow
from .limits import Limits
from .offloads import Offloads
from .stack import Stack
from .states import State
from .steering import Steering
from .tcp import TcpConnection
from .udp import UdpFlow
from .user import (
    AnyFlow,
    Closed,
    DatagramUser,
    EchoUser,
    IcmpError,
    LinkDatagram,
    LinkService,
    Refusal,
    StackUser,
    TcpUser,
    Transport,
    Watcher,
)

__all__ = [
    "AnyFlow",
    "Closed",
    "DatagramUser",
    "EchoFlow",
    "EchoUser",
    "IcmpError",
    "Limits",
    "LinkDatagram",
    "LinkService",
    "Offloads",
    "Refusal",
    "Stack",
    "StackUser",
    "State",
    "Steering",
    "TcpConnection",
    "TcpUser",
    "Transport",
    "UdpFlow",
    "Watcher",
]
