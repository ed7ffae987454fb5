"""Link: sends and receives Ethernet frames, and knows the link addresses of neighbours (ARP, RFC 826; NDP, RFC 4861).

Every frame that we send is passed to `emit`, as one or more buffers that are lent for the duration of the call.  If
the link address of a destination is unknown, it is asked for, and a few frames wait until it is known.

We answer for our own addresses, for those that something is served at (`Link.served`), and for no others.  That holds
for every sender: also for a host that wants to take such an address, and thus learns that it is in use (RFC 4862
5.4).  Known link addresses of the guest are not probed, because the guest tells them again with every flow.

Behind the guest there may be other links with a smaller MTU, which routers report (RFC 1191, RFC 8201).  This MTU is
kept by address, for as many addresses as there may be neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .offloads import Offloads
from .wire import BadPacket, arp, ethernet, icmp, ip, ndp, virtio
from .wire.family import IPV4, IPV6, Family, family_of

if TYPE_CHECKING:
    from collections import Counter

    from typing_extensions import Buffer

    from .limits import Limits
    from .timers import Timers

UNKNOWN_MAC = bytes(6)
RESOLUTION = 3.0  # seconds that frames wait for a link address; kernels ask three times, a second apart


class Link:
    """Our end of the link.  `own` are our packed addresses, with the gateway's first in each family.

    `served` are other packed addresses that we answer for: the guest may take them for neighbours.  `stands_for` says
    of all others whether we answer for them to a neighbour that has an address, unless it asks about that.

    `version` is incremented with each link address or MTU that is learnt.  Header templates then look up theirs
    again.
    """

    __slots__ = (
        "_dropped", "_given_up_at", "_limits", "_neighbours", "_paths", "_timers", "_waiting", "emit",
        "link_local", "mac", "mtu", "offloads", "own", "served", "stands_for", "timer_at", "timer_entry", "version"
    )  # fmt: skip

    def __init__(
        self,
        emit: Callable[..., object],
        *,
        mac: bytes,
        mtu: int,
        offloads: Offloads,
        own: tuple[bytes, ...],
        limits: Limits,
        dropped: Counter[str],
        timers: Timers,
    ) -> None:
        self.emit = emit
        self.mac = mac
        self.mtu = mtu
        self.offloads = offloads
        self.version = 0
        self.own = own
        self.served: frozenset[bytes] = frozenset()
        self.stands_for: Callable[[bytes], bool] = _nobody
        self.link_local = next((each for each in own if ip.is_link_local(each)), b"")
        self._neighbours: dict[bytes, bytes] = {}
        self._paths: dict[bytes, int] = {}  # MTUs that are smaller than the link's, by address
        self._waiting: dict[bytes, list[bytes]] = {}
        self._limits = limits
        self._dropped = dropped
        self._timers = timers
        self._given_up_at = math.inf
        self.timer_at = self.timer_entry = math.inf

    def tso(self, family: Family) -> bool:
        """Return whether TCP super-segments of that family may be sent, with checksums left to the other end."""
        offloads = self.offloads
        return offloads.csum and (offloads.tso4 if family is IPV4 else offloads.tso6)

    def uso(self, family: Family) -> bool:
        """Return whether UDP super-datagrams of that family may be sent."""
        offloads = self.offloads
        return offloads.csum and (offloads.uso4 if family is IPV4 else offloads.uso6)

    def mac_of(self, address: bytes) -> bytes:
        """Return the link address of `address`, or `UNKNOWN_MAC`."""
        return self._neighbours.get(address, UNKNOWN_MAC)

    def mtu_to(self, address: bytes) -> int:
        """Return the size of the largest packet that may be sent to `address`."""
        return self._paths.get(address, self.mtu)

    def narrow(self, address: bytes, mtu: int) -> None:
        """Reduce the MTU to `address` to `mtu`, or to the smallest MTU that is credible if that is larger."""
        mtu = max(mtu, family_of(address).smallest_mtu)
        if mtu < self.mtu_to(address):
            self._paths.pop(address, None)
            while len(self._paths) >= self._limits.neighbours:
                self._dropped["limit-neighbours"] += 1
                del self._paths[next(iter(self._paths))]
            self._paths[address] = mtu
            self.version += 1

    def stats(self) -> dict[str, int]:
        """Return gauges of what is kept, by name."""
        return {"neighbours": len(self._neighbours), "waiting_frames": sum(map(len, self._waiting.values()))}

    def learn(self, address: bytes, mac: bytes) -> None:
        """Note the link address of a neighbour, and send the frames that waited for it."""
        if self._neighbours.get(address) == mac or address in self.own or mac[0] & 1 or mac == UNKNOWN_MAC:
            return
        while address not in self._neighbours and len(self._neighbours) >= self._limits.neighbours:
            self._dropped["limit-neighbours"] += 1
            del self._neighbours[next(iter(self._neighbours))]
        self._neighbours[address] = mac
        self.version += 1
        at = self.offloads.vnet_header
        for frame in self._waiting.pop(address, ()):
            self.emit(frame[:at] + mac + frame[at + 6 :])

    def speaker(self, guest: bytes) -> bytes:
        """Return our own address for packets to `guest`: one of the same family and scope."""
        if self.link_local and ip.is_link_local(guest):
            return self.link_local
        family = family_of(guest)
        return next((own for own in self.own if family_of(own) is family), family.unspecified)

    def prefix(self, address: bytes, mac: bytes = b"") -> bytes:
        """Return what precedes an IP packet in its frame: the virtio header, if the link has one, and the Ethernet
        header.

        The frame goes to the link address `mac`, or by default to the neighbour that has `address`.
        """
        kind = family_of(address).ether_type
        return self._virtio() + ethernet.pack(mac or self.mac_of(address), self.mac, kind)

    def send(self, address: bytes, *buffers: Buffer) -> None:
        """Send a frame whose first buffer begins with `prefix(address)`.  It waits for an unknown link address."""
        at = self.offloads.vnet_header
        if bytes(memoryview(buffers[0])[at : at + 6]) != UNKNOWN_MAC:
            self.emit(*buffers)
            return
        limit = self._limits.waiting_frames
        if address not in self._waiting and len(self._waiting) >= limit:
            oldest = next(iter(self._waiting))
            self._dropped["limit-waiting-frames"] += len(self._waiting.pop(oldest))
        if not self._waiting:
            self._timers.arm(self, -math.inf)  # at the next opportunity, to learn the time
        frames = self._waiting.setdefault(address, [])
        if len(frames) < limit:
            frames.append(b"".join(buffers))
        else:
            self._dropped["limit-waiting-frames"] += 1
        self.request(address)

    def handle_timer(self, now: float) -> None:
        """Drop the frames that have waited too long: no neighbour has their address."""
        if now >= self._given_up_at:
            self._dropped["unresolved"] += sum(map(len, self._waiting.values()))
            self._waiting.clear()
        self._given_up_at = math.inf
        if self._waiting:
            self._given_up_at = now + RESOLUTION
            self._timers.arm(self, self._given_up_at)

    def request(self, address: bytes) -> None:
        """Ask for the link address of `address`."""
        if family_of(address) is IPV4:
            request = arp.Arp(arp.REQUEST, self.mac, self.speaker(address), UNKNOWN_MAC, address)
            self._send_arp(ethernet.BROADCAST, request)
        else:
            group = ndp.solicited_node(address)
            question = ndp.pack(ndp.Neighbour(ndp.SOLICITATION, 0, address, self.mac))
            self.send_ndp(ndp.group_mac(group), self.speaker(address) + group, question)

    def arp_arrives(self, frame: memoryview, *, answered: bool = False) -> None:
        """Learn the sender's link address, and answer a request for an address of ours, unless it is `answered`."""
        packet = arp.parse(frame)
        is_ours = self._is_ours(packet.target, packet.sender)
        if is_ours and packet.operation == arp.REQUEST and not answered:
            reply = arp.Arp(arp.REPLY, self.mac, packet.target, packet.sender_mac, packet.sender)
            self._send_arp(packet.sender_mac, reply)
        if packet.sender != IPV4.unspecified:  # a probe of RFC 5227 has no sender yet
            self.learn(packet.sender, packet.sender_mac)

    def _is_ours(self, target: bytes, asking: bytes) -> bool:
        """Return whether we answer for an address."""
        if target in self.own or target in self.served:
            return True
        return asking not in (target, IPV4.unspecified, IPV6.unspecified) and self.stands_for(target)

    def neighbour_arrives(self, packet: ip.Packet, message: ndp.Neighbour, sender_mac: bytes) -> None:
        """Handle a neighbour solicitation or advertisement, after the checks of RFC 4861 7.1.

        A solicitation for an address of ours is answered, and its sender's link address is learnt.  The link address
        in an advertisement is learnt if we have asked for the address or know it already.

        Raises:
            BadPacket: The message is malformed.
        """
        source, destination = packet.source, packet.destination
        target, to_group = message.target, not ip.is_unicast(destination)
        if not ip.is_unicast(target):
            raise BadPacket("ndp-target")
        if message.type == ndp.ADVERTISEMENT:
            if to_group and message.flags & ndp.SOLICITED:
                raise BadPacket("ndp-solicited")
            known = self._neighbours.get(target)
            if message.mac and (target in self._waiting or (known and message.flags & ndp.OVERRIDE)):
                self.learn(target, message.mac)
            return
        is_probe = source == ndp.UNSPECIFIED
        if is_probe and (message.mac or destination != ndp.solicited_node(target)):
            raise BadPacket("ndp-probe")
        if not is_probe and not ip.is_unicast(source):
            raise BadPacket("ndp-source")
        if not self._is_ours(target, source):
            return
        flags, to, mac = ndp.ROUTER | ndp.OVERRIDE, ndp.ALL_NODES, ndp.group_mac(ndp.ALL_NODES)
        if not is_probe:
            self.learn(source, message.mac or sender_mac)
            flags, to, mac = flags | ndp.SOLICITED, source, message.mac or sender_mac
        self.send_ndp(mac, target + to, ndp.pack(ndp.Neighbour(ndp.ADVERTISEMENT, flags, target, self.mac)))

    def send_ndp(self, mac: bytes, addresses: bytes, message: bytes) -> None:
        """Send a message of `netns_kit.stack.wire.ndp`.  Its checksum is set here."""
        message = ip.sum_into(message, addresses, ip.ICMPV6, icmp.CHECKSUM_AT)
        header = ip.pack_ipv6(addresses, ip.ICMPV6, len(message), ttl=ndp.HOP_LIMIT)
        self.emit(self._virtio() + ethernet.pack(mac, self.mac, ethernet.IPV6) + header + message)

    def _send_arp(self, destination: bytes, packet: arp.Arp) -> None:
        self.emit(self._virtio() + ethernet.pack(destination, self.mac, ethernet.ARP) + arp.pack(packet))

    def _virtio(self) -> bytes:
        return virtio.NONE if self.offloads.vnet_header else b""


def _nobody(_: bytes) -> bool:
    """Stand for no address."""
    return False
