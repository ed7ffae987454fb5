"""A DHCPv4 client played by the test: it says what it is told to say, and the server's answer is taken apart."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Any

from netns_kit.dhcp import DhcpServer, DhcpSettings, Reply
from netns_kit.dhcp import message as m
from netns_kit.dhcp.message import Message, parse

NETWORK = IPv4Network("10.0.2.0/24")
SERVER, DNS = NETWORK[2], NETWORK[3]
MAC = b"\x02\0\0\0\0\x01"
BROADCAST_MAC = b"\xff" * 6
EVERYTHING = bytes((1, 3, 6, 12, 15, 26, 51, 58, 59, 119, 121))
NAMES = {m.OFFER: "offer", m.ACK: "ack", m.NAK: "nak"}


def host(number: int) -> IPv4Address:
    return NETWORK[number]


def server(settings: DhcpSettings | None = None, *, size: int = 4, mtu: int = 1500) -> DhcpServer:
    """One with a pool of `size` addresses from .15 on."""
    pool = [host(15 + number) for number in range(size)]
    return DhcpServer(
        settings or DhcpSettings(lease_seconds=1000),
        address=SERVER,
        network=NETWORK,
        pool=pool,
        dns=DNS,
        mtu=mtu,
    )


class Client:
    """Time stands still until the test sets `now`."""

    def __init__(self, server: DhcpServer, mac: bytes = MAC, now: float = 0.0) -> None:
        self.server = server
        self.mac = mac
        self.now = now
        self.xid = 0x1234

    def says(self, kind: int, options: dict[int, bytes] | None = None, **fields: Any) -> Reply | None:
        """The datagram that comes back, if one does."""
        message = Message(
            m.REQUEST, self.xid, self.mac, options={m.TYPE: bytes((kind,)), **(options or {})}, **fields
        )
        return self.sends(message.pack(1500))

    def sends(self, payload: bytes) -> Reply | None:
        source, everybody = bytes(4), b"\xff" * 4
        replies = self.server.answer(payload, source, 68, self.mac, everybody, self.now)
        assert len(replies) <= 1
        for reply in replies:
            assert parse(reply.payload).xid == self.xid
            assert reply.source == SERVER.packed
            return reply
        return None

    def hears(self, kind: int, options: dict[int, bytes] | None = None, **fields: Any) -> Message:
        """What it says is answered, with this."""
        reply = self.says(kind, options, **fields)
        assert reply is not None, f"no answer: {dict(self.server.dropped)}"
        return parse(reply.payload)

    def discovers(self, **options: Any) -> Message:
        return self.hears(m.DISCOVER, **options)

    def leases(self, address: IPv4Address | None = None, **fields: Any) -> IPv4Address:
        """The whole exchange; the address."""
        wanted = {} if address is None else {m.ADDRESS: address.packed}
        offer = self.hears(m.DISCOVER, wanted, **fields)
        assert offer.type == m.OFFER
        chosen = {m.ADDRESS: offer.yiaddr.packed, m.SERVER: SERVER.packed}
        ack = self.hears(m.REQUEST_ADDRESS, chosen, **fields)
        assert (ack.type, ack.yiaddr) == (m.ACK, offer.yiaddr)
        return ack.yiaddr


def brief(reply: Reply | None) -> str:
    """ "ack .15", say; "-" for no reply."""
    if reply is None:
        return "-"
    message = parse(reply.payload)
    address = "" if message.yiaddr == m.NOWHERE else f" .{message.yiaddr.packed[3]}"
    return NAMES[message.type] + address
