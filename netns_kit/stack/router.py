"""Router: advertises us as the router of the link, and its prefix, to guests of IPv6 (RFC 4861 6.2).

A solicitation is answered at once, to the link address that it came from.  So no host waits for its turn, as on a
link with many hosts (6.2.6), and no other host is woken.  In addition, advertisements to all nodes are sent from time
to time, more often at the beginning.  Their intervals are not random, because there is no other router to collide
with.
"""

from __future__ import annotations

import math
from itertools import chain, repeat

from .link import Link
from .timers import Timers
from .wire import BadPacket, ip, ndp

PAUSES = (1.0, 16.0, 16.0)
"""Seconds before each of the first advertisements.  The guest may be configured by hand before the first."""
INTERVAL = 300.0
"""Seconds between later advertisements: a sixth of the lifetime that they announce."""


class Router:
    """The sender of router advertisements on a link.  `said` is what they say."""

    __slots__ = ("_link", "_pauses", "_said", "_started", "_timers", "timer_at", "timer_entry")

    def __init__(self, link: Link, said: ndp.Advertisement, timers: Timers) -> None:
        self._link = link
        self._said = said
        self._timers = timers
        self._pauses = chain(PAUSES, repeat(INTERVAL))
        self._started = False
        self.timer_at = self.timer_entry = math.inf
        timers.arm(self, -math.inf)  # at the first opportunity, to learn the time

    def solicited(self, packet: ip.Packet, message: ndp.Neighbour, sender_mac: bytes) -> None:
        """Answer a router solicitation, after the checks of RFC 4861 6.1.1.

        Raises:
            BadPacket: It is malformed.
        """
        source = packet.source
        if source == ndp.UNSPECIFIED:
            if message.mac:
                raise BadPacket("ndp-probe")
            self._advertise(ndp.ALL_NODES, sender_mac)
            return
        if not ip.is_unicast(source):
            raise BadPacket("ndp-source")
        self._link.learn(source, message.mac or sender_mac)
        self._advertise(source, message.mac or sender_mac)

    def handle_timer(self, now: float) -> None:
        """Advertise to all nodes."""
        if self._started:
            self._advertise(ndp.ALL_NODES, ndp.group_mac(ndp.ALL_NODES))
        self._started = True
        self._timers.arm(self, now + next(self._pauses))

    def _advertise(self, to: bytes, mac: bytes) -> None:
        link = self._link
        message = ndp.pack_advertisement(self._said, link.mac, link.mtu)
        link.send_ndp(mac, link.link_local + to, message)
