"""What the stack asks of whoever uses it: RFC 9293's "user", one protocol per kind of flow.

These are plain synchronous calls, made while a frame is handled or a timer expires.  Views passed in are
lent until the call returns; a user may keep one for longer if it has that from whoever owns the frames, as
`netns_kit.gateway.relay.UdpRelay` has it from the gateway.
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
    """How a flow is turned away, and what the guest's program sees.

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
    """What became of a packet further on, as ICMP or ICMPv6 reported it (RFC 792, RFC 4443).

    `type`, `code` and `mtu` (of a packet too big, else 0) are those of the flow's own family.  `offender`
    is who said so, packed; empty: we do, the gateway.  `ttl` is what that message arrived with.
    """

    type: int
    code: int
    mtu: int = 0
    offender: bytes = b""
    ttl: int = 64


class Closed(Enum):
    """Why a TCP connection is no more."""

    NORMAL = "normal"
    RESET = "reset"
    TIMED_OUT = "timed out"  # the guest stopped answering
    ABORTED = "aborted"  # our side gave it up


class TcpUser(Protocol):
    """One TCP connection's other half: a host socket, usually."""

    def established(self) -> None:
        """The guest has answered: data may be sent."""

    def deliver(self, data: memoryview) -> int:
        """Take what you can of `data`; how much that was.  Less than all: call `TcpConnection.resume`
        when more can be taken.  The guest's ACK covers what has been taken and no more."""
        ...

    def urgent(self, data: memoryview) -> int:
        """As `deliver`, for the one byte that the guest's urgent pointer points out (RFC 9293 3.8.5)."""
        ...

    def end(self) -> None:
        """The guest has sent FIN and all before it has been delivered."""

    def writable(self) -> None:
        """There is room again, after `TcpConnection.room` was 0."""

    def keepalive(self, idle: float) -> None:
        """The guest has sent a keepalive probe after so many seconds without anything else."""

    def traffic_class(self, tos: int) -> None:
        """The guest's segments have this traffic class from now on; ECN's two bits are left out."""

    def closed(self, why: Closed) -> None:
        """The connection is over; nothing more is called."""


class DatagramUser(Protocol):
    """A UDP flow's other half."""

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        """A datagram from the guest, or, when `segment_size` is not 0, several of that size end to end.
        `marks` are those of `netns_kit.stack.wire.ip.marks`."""

    def expired(self, flow: UdpFlow) -> None:
        """The flow was idle too long or had to make room; it is out of the table."""


class EchoUser(Protocol):
    """An ICMP echo flow's other half."""

    def echo(self, flow: EchoFlow, sequence: int, payload: memoryview, packet: Packet) -> None:
        """A request from the guest, and the packet it came in."""

    def expired(self, flow: EchoFlow) -> None: ...


FlowProtocol = Literal["tcp", "udp", "icmp"]
AnyFlow: TypeAlias = "TcpConnection | UdpFlow | EchoFlow"


class StackUser(Protocol):
    """Told of every new flow.  It gives the flow a user, or refuses it, now or later."""

    def tcp_opened(self, connection: TcpConnection) -> None:
        """The guest wants to connect.  Call `TcpConnection.accept` or `TcpConnection.refuse`."""

    def udp_opened(self, flow: UdpFlow) -> Refusal | None:
        """Set `UdpFlow.user`, or say why not."""

    def echo_opened(self, flow: EchoFlow) -> Refusal | None:
        """Set `EchoFlow.user`, or say why not."""


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
    """Told of every flow while it is `Stack.watcher`: that it is opened, perhaps that it is refused, in the end that
    it is closed.  It must not raise.
    """

    def opened(self, protocol: FlowProtocol, flow: AnyFlow) -> None:
        """It is in the table; whether it may stay is not decided yet."""

    def refused(self, protocol: FlowProtocol, flow: AnyFlow, why: Refusal | IcmpError) -> None:
        """It is turned away, by the user or, if it is inbound, by the guest, and will be closed at once."""

    def closed(self, protocol: FlowProtocol, flow: AnyFlow) -> None:
        """It is out of the table."""
