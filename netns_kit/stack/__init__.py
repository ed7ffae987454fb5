"""A user-mode TCP/IP stack for a guest on the other end of a link: pure, sans-I/O.

The guest is a kernel with its own complete TCP/IP, and it is our only neighbour.  Frames enter by `Stack.receive`,
and leave by the function `emit` that the stack was made with.  Time enters as an argument; `Stack.deadline` tells
when time is wanted again.  Between them are tables of flows.  Their keys are the bytes that name a flow on the wire
(`netns_kit.stack.wire.flow_key`), so that TCP, UDP and the tables need not know how long an address is.

Each flow has two sides.  One side is ours: `TcpConnection` speaks TCP with the guest, `UdpFlow` and `EchoFlow` do the
same for datagrams and pings.  The other side is a *user* (`TcpUser`, `DatagramUser`, `EchoUser`), which is called
directly: a relay to a socket of the host, or a test.  `StackUser` is told of each new flow, and gives it a user or
refuses it.

Not every datagram belongs to a flow.  A `LinkService` answers the datagrams to one port of our own addresses, and to
all or a group.  It is asked before a flow is opened.

Offloads.  If the link has a virtio header, a TCP segment in either direction may have up to 64 KiB at any MTU, and
its checksum is left to the kernels.  If it has none, the same code cuts segments to the MSS and computes checksums.

The queues are the kernels'.  What the guest has sent and the user has not taken is not acknowledged, so the guest
keeps it.  What the guest's window has no room for is not read, so the host's socket keeps it.  We keep what is in
flight, bounded by `Limits`.
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
    Ending,
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
    "Ending",
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
