"""What the stack asks of whoever uses it: RFC 9293's "user", one interface per transport.

These are plain synchronous calls, made while a frame is handled or a timer expires.  A view that is passed in is lent
until the call returns.  A user may keep one for longer if the owner of the frames allows it, as the gateway allows
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
    """The ways to turn a flow away, and what the guest's program sees.

    RESET: TCP RST, else ICMP port unreachable; ECONNREFUSED.  NET_UNREACHABLE and HOST_UNREACHABLE: ICMP;
    ENETUNREACH and EHOSTUNREACH.  PROHIBITED: ICMP administratively prohibited; EHOSTUNREACH (IPv6: EACCES), at once.
    DROP: nothing, as if the packet were lost; ETIMEDOUT, late.
    """

    RESET = "reset"
    NET_UNREACHABLE = "net unreachable"
    HOST_UNREACHABLE = "host unreachable"
    PROHIBITED = "administratively prohibited"
    DROP = "drop"


@frozen
class IcmpError:
    """An ICMP or ICMPv6 error about a packet, from further on (RFC 792, RFC 4443).

    `type`, `code` and `mtu` (of a packet too big, else 0) are those of the flow's own family.  `offender` is the
    packed address that reported it; empty stands for the gateway.  `ttl` is what the report arrived with.
    """

    type: int
    code: int
    mtu: int = 0
    offender: bytes = b""
    ttl: int = 64


class Closed(Enum):
    """The reasons for the end of a TCP connection."""

    NORMAL = "normal"
    RESET = "reset"
    TIMED_OUT = "timed out"  # the guest stopped answering
    ABORTED = "aborted"  # our side gave it up


class TcpUser(Protocol):
    """The other half of a TCP connection: a host socket, usually."""

    def established(self) -> None:
        """Begin to send: the guest has answered."""

    def deliver(self, data: memoryview) -> int:
        """Take what can be taken of `data`, and return how many bytes that was.

        If it was less than all, call `TcpConnection.resume` when more can be taken.  The guest's ACK covers what has
        been taken and no more.
        """
        ...

    def urgent(self, data: memoryview) -> int:
        """Do as `deliver` with the one byte that the guest's urgent pointer marks (RFC 9293 3.8.5)."""
        ...

    def end(self) -> None:
        """Note the guest's FIN: all before it has been delivered."""

    def writable(self) -> None:
        """Go on to send: there is room again, after `TcpConnection.room` was 0."""

    def keepalive(self, idle: float) -> None:
        """Note a keepalive probe of the guest's, after `idle` seconds without anything else."""

    def traffic_class(self, tos: int) -> None:
        """Note the traffic class of the guest's segments from now on, without ECN's two bits."""

    def closed(self, why: Closed) -> None:
        """Let go of the connection, which is over; nothing more is called."""


class DatagramUser(Protocol):
    """The other half of a UDP flow."""

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        """Take a datagram from the guest or, when `segment_size` is not 0, several of that size end to end.

        `marks` are those of `netns_kit.stack.wire.ip.Packet`.
        """

    def expired(self, flow: UdpFlow) -> None:
        """Let go of the flow, which was idle for too long or had to make room: it is out of the table."""


class EchoUser(Protocol):
    """The other half of an ICMP echo flow."""

    def echo(self, flow: EchoFlow, sequence: int, payload: memoryview, packet: Packet) -> None:
        """Take a request from the guest, and the packet it came in."""

    def expired(self, flow: EchoFlow) -> None:
        """Let go of the flow, as `DatagramUser.expired` does."""


class Nobody:
    """The user of a flow that has none: what it is told goes nowhere."""

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        """Drop it."""

    def echo(self, flow: EchoFlow, sequence: int, payload: memoryview, packet: Packet) -> None:
        """Drop it."""

    def expired(self, flow: UdpFlow | EchoFlow) -> None:
        """Do nothing."""


NOBODY = Nobody()

Transport = Literal["tcp", "udp", "icmp"]
"""What a flow is carried by, as people call it."""
AnyFlow: TypeAlias = "TcpConnection | UdpFlow | EchoFlow"


class StackUser(Protocol):
    """The owner of a stack.  It is told of every new flow, and gives it a user or refuses it, now or later."""

    def tcp_opened(self, connection: TcpConnection) -> None:
        """Call `TcpConnection.accept` or `TcpConnection.refuse`: the guest wants to connect."""

    def udp_opened(self, flow: UdpFlow) -> Refusal | None:
        """Set `UdpFlow.user`, or return why not."""

    def echo_opened(self, flow: EchoFlow) -> Refusal | None:
        """Set `EchoFlow.user`, or return why not."""


class LinkDatagram(NamedTuple):
    """A UDP datagram that belongs to no flow.  Addresses are packed, of either family.

    `mac` is the link address of the other end: of the sender of what arrives, of the receiver of what is sent (empty:
    to be found out).
    """

    payload: bytes
    source: bytes
    source_port: int
    destination: bytes
    port: int
    mac: bytes


class LinkService(Protocol):
    """A server of ours behind one UDP port, see `Stack.services`.  It answers by `Stack.send_datagram`."""

    def datagram(self, asked: LinkDatagram, now: float) -> bool:
        """Take a datagram to one of our addresses, to all or to a multicast group.

        Returns False if it is not the service's: then it goes the way of any other.  It must not raise, whatever the
        payload.
        """
        ...


class Watcher(Protocol):
    """A follower of all flows while it is `Stack.watcher`: each is opened, perhaps refused, and closed in the end.

    It must not raise.
    """

    def opened(self, transport: Transport, flow: AnyFlow) -> None:
        """Note a flow that is in the table now; whether it may stay is not decided yet."""

    def refused(self, transport: Transport, flow: AnyFlow, why: Refusal | IcmpError) -> None:
        """Note that a flow is turned away, by the user or, if it is inbound, by the guest: it is closed next."""

    def closed(self, transport: Transport, flow: AnyFlow) -> None:
        """Note that a flow is out of the table."""


class _Unwatched:
    """The `Watcher` of a stack that nobody watches."""

    def opened(self, transport: Transport, flow: AnyFlow) -> None:
        pass

    def refused(self, transport: Transport, flow: AnyFlow, why: Refusal | IcmpError) -> None:
        pass

    def closed(self, transport: Transport, flow: AnyFlow) -> None:
        pass


UNWATCHED: Watcher = _Unwatched()
