"""NetworkLayer: what all transports of a stack use.

It has our addresses, decides whose packets may open flows, and sends packets that belong to no flow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count

from .limits import Limits
from .link import Link
from .packets import PacketWriter
from .steering import Steering
from .timers import Timers
from .user import IcmpError, Refusal, StackUser
from .wire import BadPacket, icmp, ip
from .wire.family import IPV6, family_of


class NetworkLayer:
    """The common parts of one `netns_kit.stack.Stack`.  `link` has our addresses.

    `sources` are the networks from which guests may open flows, each as packed address and prefix length.  None
    allows any source; RFC 2827 explains why it should be checked.  `costly_frames` counts frames that cost many times
    what others do, so that a flood of them is noticed: those of new flows, strays and fragments.
    """

    def __init__(
        self,
        user: StackUser,
        link: Link,
        packets: PacketWriter,
        *,
        limits: Limits,
        timers: Timers,
        dropped: Counter[str],
        steering: Steering,
        sources: tuple[tuple[bytes, int], ...] | None,
    ) -> None:
        self.user = user
        self.link = link
        self.packets = packets
        self.limits = limits
        self.timers = timers
        self.dropped = dropped
        self.steering = steering
        self.flow_ids: Iterator[int] = count(1 + steering.index, steering.count)  # to come
        # frames so far that cost many times what others do: of new flows, strays, fragments
        self.costly_frames = 0
        self._sources = None if sources is None else dict(_masked(*each) for each in sources)

    def admit(self, packet: ip.Packet) -> None:
        """Check the addresses of a packet that opens a flow, and learn the link address of its sender.

        Raises:
            BadPacket: The guest may not use the source address, or we do not forward to the destination.
        """
        self.costly_frames += 1
        source, own = packet.source, self.link.own
        if source in own:
            raise BadPacket("ip-source-ours")
        if self._sources is not None:
            mask, network = self._sources[packet.family.version]
            if int.from_bytes(source, "big") & mask != network and not ip.is_link_local(source):
                raise BadPacket("ip-source-foreign")
        self.link.learn(source, packet.source_mac)
        destination = packet.destination
        if packet.family is IPV6 and destination not in own:
            if ip.is_link_local(destination):  # it would be on this link: nobody is
                self.packets.error(packet.whole, Refusal.HOST_UNREACHABLE, by=destination)
                raise BadPacket("ip-link-local")
            if ip.is_link_local(source):  # RFC 4291 2.5.6: not for us to forward
                error = IcmpError(icmp.V6_UNREACHABLE, icmp.V6_BEYOND_SCOPE)
                self.packets.error(packet.whole, error, by=destination)
                raise BadPacket("ip-link-local")


def _masked(address: bytes, prefix: int) -> tuple[int, tuple[int, int]]:
    """Return the version of IP of a network, with its mask and its masked address."""
    bits = 8 * len(address)
    mask = ((1 << prefix) - 1) << (bits - prefix)
    return family_of(address).version, (mask, int.from_bytes(address, "big") & mask)


def to_group(packet: ip.Packet, name: str) -> BadPacket:
    """Return the reason for which a packet to a group is dropped.  `name` is that of its transport."""
    return BadPacket(f"{name}-multicast" if ip.is_multicast(packet.destination) else f"{name}-broadcast")
