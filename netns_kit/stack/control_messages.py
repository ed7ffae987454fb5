"""ControlMessages: handles the guest's ICMP and ICMPv6 messages, except pings to others, which are flows.

Pings to our own addresses are answered.  An error about a packet of ours is passed to its connection, or reduces the
MTU to the guest.  Neighbour discovery is passed to the link, and router solicitations to the router.
"""

from __future__ import annotations

from .echo import EchoTable
from .network_layer import NetworkLayer
from .router import Router
from .tcp_table import TcpTable
from .udp import UdpTable
from .user import IcmpError
from .wire import BadPacket, checksum, flow_key, icmp, ip, ndp
from .wire.family import IPV4, IPV6, Family


class ControlMessages:
    """The handler of ICMP in one stack.  `router` is None if there are no router advertisements."""

    def __init__(
        self, network: NetworkLayer, tcp: TcpTable, udp: UdpTable, echo: EchoTable, router: Router | None
    ) -> None:
        self._network = network
        self._link, self._packets = network.link, network.packets
        self._tcp, self._udp, self._echo = tcp, udp, echo
        self._router = router

    def packet_arrives(self, packet: ip.Packet, now: float) -> None:
        """Handle a message that is not to a group.

        Raises:
            BadPacket: The message is malformed, or of a type that is ignored.
        """
        message, family = icmp.parse(packet.payload), packet.family
        if not packet.summed:
            if family is IPV6:
                packet.verify(len(packet.payload))
            elif checksum.total(packet.payload):
                raise BadPacket("checksum")
        if family is IPV6 and message.type in ndp.TYPES:
            self._neighbour_arrives(packet, message)
        elif message.type == family.echo:
            self._echo_arrives(packet, message, now)
        elif (mtu := _told_mtu(family, message)) is not None:
            self._too_big(packet, message, mtu, now)
        else:
            if message.type == family.unreachable:
                self._unreachable(packet, message)
            raise BadPacket("icmp-type")

    def group_packet_arrives(self, packet: ip.Packet) -> bool:
        """Handle an ICMPv6 message to a group if it concerns this link.  Return whether it does.

        Raises:
            BadPacket: The message is malformed.
        """
        message = icmp.parse(packet.payload)
        if message.type not in ndp.TYPES and message.type not in icmp.V6_GROUPS:
            return False
        if not packet.summed:
            packet.verify(len(packet.payload))
        if message.type in ndp.TYPES:  # every group of this link is received here anyway
            self._neighbour_arrives(packet, message)
        return True

    def _neighbour_arrives(self, packet: ip.Packet, message: icmp.Message) -> None:
        """Handle neighbour discovery.  It must come from this link and unfragmented (RFC 4861 6.1, 7.1; RFC 6980)."""
        if packet.ttl != ndp.HOP_LIMIT or message.code or ip.has_extensions(packet):
            raise BadPacket("ndp-header")
        neighbour = ndp.parse(packet.payload)
        if neighbour.type == ndp.ADVERTISEMENT:
            self._network.steering.tell(packet.frame)
        if neighbour.type != ndp.ROUTER_SOLICITATION:
            self._link.neighbour_arrives(packet, neighbour, packet.source_mac)
        elif self._router is not None:
            self._router.solicited(packet, neighbour, packet.source_mac)

    def _echo_arrives(self, packet: ip.Packet, message: icmp.Message, now: float) -> None:
        if not (ip.is_unicast(packet.destination) and ip.is_unicast(packet.source)):
            raise BadPacket("icmp-not-unicast")
        if packet.destination not in self._link.own:
            self._echo.request_arrives(packet, message, now)
            return
        self._network.admit(packet)
        self._packets.echo_reply(packet.addresses, message.high, message.low, message.payload, tos=packet.tos)

    def _unreachable(self, packet: ip.Packet, message: icmp.Message) -> None:
        """End a connection that we are opening, whose SYN the guest has refused."""
        protocol, key, number = flow_key.of_sent(packet.family, message.payload)
        if protocol != ip.TCP:
            return
        connection = self._tcp.get(key)
        if connection is None:
            self._network.steering.pass_on(packet.frame)
        else:
            connection.unreachable(number, IcmpError(message.type, message.code))

    def _too_big(self, packet: ip.Packet, message: icmp.Message, mtu: int, now: float) -> None:
        """Reduce the MTU to the guest, as a router behind it asks, if we may have sent the packet that it quotes."""
        protocol, key, number = flow_key.of_sent(packet.family, message.payload)
        if protocol == ip.TCP:
            connection = self._tcp.get(key)
            if connection is None:
                self._network.steering.pass_on(packet.frame)
            else:
                connection.too_big(number, mtu, now)
            return
        guest, ours, *_ = flow_key.parse(key)
        own = self._link.own
        if key in self._udp or key in self._echo or (ours in own and guest not in own):
            self._link.narrow(guest, mtu)


def _told_mtu(family: Family, message: icmp.Message) -> int | None:
    """Return the MTU in a "packet too big" message, or None if the message is another one."""
    if message.type != family.too_big or (family is IPV4 and message.code != family.too_big_code):
        return None
    mtu = message.low if family is IPV4 else message.high << 16 | message.low
    return mtu or IPV4.smallest_mtu  # 0 is from before RFC 1191
