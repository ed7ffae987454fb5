"""Users: what the stack calls, one interface per transport ("user" is RFC 9293's word).

These are synchronous calls, made while a frame is handled or a timer expires.  A view that is passed in is lent until
the call returns.  A user may keep a view for longer if the owner of the frames allows it, as the gateway allows
`netns_kit.gateway.relay.UdpRelay`.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from netns_kit.frozen import frozen

if TYPE_CHECKING:
    from .echo import EchoFlow
    from .tcp import TcpConnection
    from .udp import UdpFlow
    from .wire.ip import Packet


class Refusal(Enum):
    """The ways to refuse a flow, with what the guest's program sees.

    - RESET: TCP RST, else ICMP port unreachable.  The error is ECONNREFUSED.
    - NET_UNREACHABLE, HOST_UNREACHABLE: the ICMP error.  The error is ENETUNREACH or EHOSTUNREACH.
    - PROHIBITED: ICMP administratively prohibited.  The error is EHOSTUNREACH, for IPv6 EACCES, without delay.
    - DROP: nothing, as if the packet were lost.  The error is ETIMEDOUT, after a long time.
    """

    RESET = "reset"
    NET_UNREACHABLE = "net unreachable"
    HOST_UNREACHABLE = "host unreachable"
    PROHIBITED = "administratively prohibited"
    DROP = "drop"


@frozen
class IcmpError:
    """An ICMP or ICMPv6 error about a packet, as another host has reported it (RFC 792, RFC 4443).

    `type`, `code` and `mtu` (0 unless a packet is too big) are those of the flow's family.  `offender` is the packed
    address of the reporting host; empty: the gateway.  `ttl` is the TTL with which the report arrived.
    """

    type: int
    code: int
    mtu: int = 0
    offender: bytes = b""
    ttl: int = 64


class Closed(Enum):
    """The reasons why a TCP connection has ended."""

    NORMAL = "normal"
    RESET = "reset"
    UNREACHABLE = "unreachable"  # an ICMP error of the guest has said so of our SYN
    TIMED_OUT = "timed out"  # the guest stopped answering
    ABORTED = "aborted"  # our side gave it up


class TcpUser(Protocol):
    """The other side of a TCP connection, usually a socket of the host."""

    def established(self) -> None:
        """Begin to send, since the guest has answered."""

    def deliver(self, data: memoryview) -> int:
        """Take as much of `data` as possible, and return how many bytes that was.

        If it was not all, call `TcpConnection.resume` when more can be taken.  Only what has been taken is
        acknowledged.
        """

    def urgent(self, data: memoryview) -> int:
        """Take the one byte that the guest's urgent pointer marks (RFC 9293 3.8.5), as `deliver` does."""

    def end(self) -> None:
        """Note the guest's FIN.  All bytes before it have been taken."""

    def writable(self) -> None:
        """Continue to send, since there is room again after `TcpConnection.room` was 0."""

    def keepalive(self, idle: float) -> None:
        """Note a keepalive probe of the guest, which came after `idle` seconds of silence."""

    def traffic_class(self, tos: int) -> None:
        """Note the traffic class of the guest's segments from now on, without the two bits of ECN."""

    def closed(self, why: Closed) -> None:
        """Let go of the connection, which has ended.  Nothing more is called."""


class PassiveUser:
    """A `TcpUser` that takes no part in what it does not override."""

    __slots__ = ()

    def established(self) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""

    def writable(self) -> None:
        """Do nothing."""

    def keepalive(self, idle: float) -> None:
        """Do nothing: the stack has answered it."""

    def traffic_class(self, tos: int) -> None:
        """Do nothing."""


class DatagramUser(Protocol):
    """The other side of a UDP flow."""

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        """Take a datagram from the guest; if `segment_size` is not 0, several of that size one after another.

        `marks` are those of `netns_kit.stack.wire.ip.Packet`.
        """

    def expired(self, flow: UdpFlow) -> None:
        """Let go of the flow, which has been idle for too long or has made room.  It is out of its table."""


class EchoUser(Protocol):
    """The other side of an ICMP echo flow."""

    def echo(self, flow: EchoFlow, sequence: int, payload: memoryview, packet: Packet) -> None:
        """Take an echo request from the guest, with the packet that it came in."""

    def expired(self, flow: EchoFlow) -> None:
        """Let go of the flow, as for `DatagramUser.expired`."""


class Nobody:
    """The user of a flow without a user.  It drops everything."""

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        """Drop it."""

    def echo(self, flow: EchoFlow, sequence: int, payload: memoryview, packet: Packet) -> None:
        """Drop it."""

    def expired(self, flow: UdpFlow | EchoFlow) -> None:
        """Do nothing."""


NOBODY = Nobody()

Transport = Literal["tcp", "udp", "icmp"]
"""The transport of a flow."""
AnyFlow: TypeAlias = "TcpConnection | UdpFlow | EchoFlow"
Ending = Literal[
    "finished", "reset by guest", "reset by peer", "timed out", "idle", "made room", "cut by policy", "ended"
]
"""How a flow has ended.

- "finished": both ends have closed the connection.
- "reset by guest", "reset by peer": that end has reset it, or it was reset because that end has gone.
- "timed out": the guest stopped answering, or nobody decided about its SYN.
- "idle": nothing has crossed for the lifetime of such a flow.
- "made room": another flow needed its place, or its descriptor.
- "cut by policy": it is no longer allowed.
- "ended": `UserStack.end_flow` has ended it, or whatever served it has been closed.
"""


class StackUser(Protocol):
    """The owner of a stack.  It is told of each new flow, and gives it a user or refuses it, now or later."""

    def tcp_opened(self, connection: TcpConnection) -> None:
        """Call `TcpConnection.accept` or `TcpConnection.refuse`, now or later: the guest wants to connect."""

    def udp_opened(self, flow: UdpFlow) -> Refusal | None:
        """Set `UdpFlow.user`, or return how the flow is refused."""

    def echo_opened(self, flow: EchoFlow) -> Refusal | None:
        """Set `EchoFlow.user`, or return how the flow is refused."""


class LinkDatagram(NamedTuple):
    """A UDP datagram that belongs to no flow.  Its addresses are packed, of either family.

    `mac` is the link address of the other end: the sender of a received datagram, the receiver of one that is sent.
    If it is empty, it is looked up.
    """

    payload: bytes
    source: bytes
    source_port: int
    destination: bytes
    port: int
    mac: bytes


class LinkService(Protocol):
    """A server of ours at one UDP port: see `Stack.services`.  It answers by `Stack.send_datagram`."""

    def datagram(self, asked: LinkDatagram, now: float) -> bool:
        """Take a datagram to one of our addresses, to all or to a multicast group.

        Return False if it is not for this service: then it is handled as any other datagram.  This must not raise,
        whatever the payload is.
        """


class Watcher(Protocol):
    """An observer of all flows, while it is `Stack.watcher`.

    It is told when a flow is opened, when it is refused, if it is, and when it is closed.  It must not raise.
    """

    def opened(self, transport: Transport, flow: AnyFlow) -> None:
        """Note a flow that was put into its table.  Whether it is refused is not decided yet."""

    def refused(self, transport: Transport, flow: AnyFlow, why: Refusal | IcmpError) -> None:
        """Note that a flow is refused by its user or, if it is inbound, by the guest.  It is closed next."""

    def closed(self, transport: Transport, flow: AnyFlow) -> None:
        """Note a flow that was taken out of its table; `ending_of` tells how it has ended."""


class _Unwatched:
    """The `Watcher` of a stack without an observer."""

    def opened(self, transport: Transport, flow: AnyFlow) -> None:
        pass

    def refused(self, transport: Transport, flow: AnyFlow, why: Refusal | IcmpError) -> None:
        pass

    def closed(self, transport: Transport, flow: AnyFlow) -> None:
        pass


UNWATCHED: Watcher = _Unwatched()


def ending_of(transport: Transport, flow: AnyFlow) -> Ending:
    """Return how a flow has ended.

    It is noted only where the end is not the usual one, so that nobody pays for it otherwise.
    """
    usual: Ending = "finished" if transport == "tcp" else "idle"
    return getattr(flow, "ending", usual)
