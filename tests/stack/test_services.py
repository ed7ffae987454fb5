"""Services: servers of ours behind one UDP port, and DHCP on the link."""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest

from netns_kit.dhcp import Dhcp6Server, DhcpServer, DhcpSettings, message, message6
from netns_kit.stack import Limits, LinkDatagram, Stack, Steering
from netns_kit.stack.wire import ethernet, ip, udp, virtio
from tests.support.stack import DNS, GATEWAY, GUEST, GUEST_MAC, OTHER, OUR_MAC, VNET, Guest, fragments, packet

PORT, GUEST_PORT = 9, 40000
EVERYBODY = {4: b"\xff" * 4, 6: bytes.fromhex("ff020000000000000000000000010002")}
GROUP_MAC = {4: b"\xff" * 6, 6: bytes.fromhex("333300010002")}
NOBODY = {4: bytes(4), 6: bytes(16)}


class Service:
    """Writes down what it is asked, and answers as it is set to."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.asked: list[tuple[LinkDatagram, float]] = []
        self.replies: list[LinkDatagram] = []
        self.declines = False

    def datagram(self, asked: LinkDatagram, now: float) -> bool:
        self.asked.append((asked, now))
        for reply in self.replies:
            self._stack.send_datagram(reply)
        return not self.declines


class Dhcp:
    """A DHCP server on the link, as the gateway has it."""

    def __init__(self, stack: Stack, server: DhcpServer | Dhcp6Server) -> None:
        self._stack, self._server = stack, server

    def datagram(self, asked: LinkDatagram, now: float) -> bool:
        payload, source, source_port, destination, port, mac = asked
        for each in self._server.answer(payload, source, source_port, mac, destination, now):
            self._stack.send_datagram(
                LinkDatagram(each.payload, each.source, port, each.destination, each.port, each.mac)
            )
        return True


class Served(Guest):
    """A guest whose stack has a service."""

    def __init__(self, family: int, **options: object) -> None:
        super().__init__(family, **options)  # type: ignore[arg-type]  # its own
        self.service = self.stack.services[PORT] = Service(self.stack)

    def asks(
        self,
        payload: bytes = b"x",
        *,
        to: bytes,
        source: bytes | None = None,
        mac: bytes = OUR_MAC,
        ttl: int = 64,
        port: int = PORT,
    ) -> None:
        self.gives(
            asking(GUEST[self.family] if source is None else source, to, payload, mac, ttl, port, self.vnet)
        )


def asking(
    source: bytes,
    to: bytes,
    payload: bytes,
    mac: bytes,
    ttl: int = 64,
    port: int = PORT,
    vnet: bool = False,
    source_port: int = GUEST_PORT,
) -> bytes:
    layer4 = udp.HEADER.pack(source_port, port, 8 + len(payload), 0) + payload
    data = packet(source + to, ip.UDP, layer4, sum_at=6, ttl=ttl, vnet=vnet)
    at = 10 if vnet else 0
    return data[:at] + mac + data[at + 6 :]


@pytest.fixture(params=[4, 6])
def family(request: pytest.FixtureRequest) -> int:
    family: int = request.param
    return family


def test_it_is_asked_of_what_comes_to_our_addresses_to_all_and_to_groups(family: int) -> None:
    guest = Served(family)
    guest.now = 7.0
    guest.asks(b"a", to=GATEWAY[family])
    guest.asks(b"b", to=DNS[family])
    guest.asks(b"c", to=EVERYBODY[family], source=NOBODY[family], mac=GROUP_MAC[family])
    guest.asks(b"d", to=EVERYBODY[family], mac=GROUP_MAC[family], ttl=1)
    guest.asks(b"e", to=EVERYBODY[family])
    assert guest.service.asked == [
        ((b"a", GUEST[family], GUEST_PORT, GATEWAY[family], PORT, GUEST_MAC), 7.0),
        ((b"b", GUEST[family], GUEST_PORT, DNS[family], PORT, GUEST_MAC), 7.0),
        ((b"c", NOBODY[family], GUEST_PORT, EVERYBODY[family], PORT, GUEST_MAC), 7.0),
        ((b"d", GUEST[family], GUEST_PORT, EVERYBODY[family], PORT, GUEST_MAC), 7.0),
        ((b"e", GUEST[family], GUEST_PORT, EVERYBODY[family], PORT, GUEST_MAC), 7.0),
    ]
    assert not guest.users.flows
    assert not guest.stack.dropped
    guest.quiet()


def test_it_is_not_asked_of_anything_else(family: int) -> None:
    guest = Served(family)
    guest.asks(to=OTHER[family])
    guest.asks(to=GATEWAY[family], port=PORT + 1)
    guest.asks(to=GATEWAY[family], source=DNS[family])
    guest.asks(to=EVERYBODY[family], port=PORT + 1, mac=GROUP_MAC[family])
    guest.asks(to=GATEWAY[family], mac=GROUP_MAC[family])
    guest.asks(to=GATEWAY[family], mac=b"\x02\0\0\0\0\x55")
    assert not guest.service.asked
    expected = Counter(["ip-source-ours", "ethernet-not-ours", "udp-broadcast"])
    expected["udp-broadcast" if family == 4 else "udp-multicast"] += 1
    assert guest.stack.dropped == expected
    assert len(guest.users.flows) == 2


def test_a_wrong_checksum_is_not_served(family: int) -> None:
    guest = Served(family)
    data = bytearray(asking(GUEST[family], EVERYBODY[family], b"xyz", GROUP_MAC[family]))
    data[-1] ^= 1
    guest.gives(bytes(data))
    assert not guest.service.asked
    assert guest.stack.dropped == {"checksum": 1}


@pytest.mark.parametrize("vnet", [False, True])
def test_its_replies_leave_as_it_says(family: int, vnet: bool) -> None:
    guest = Served(family, offloads=VNET if vnet else None)
    stranger = bytes([10, 0, 2, 15]) if family == 4 else GUEST[6][:-1] + b"\x15"
    guest.service.replies = [
        LinkDatagram(b"one", GATEWAY[family], PORT, stranger, 68, GUEST_MAC),
        LinkDatagram(b"two", DNS[family], PORT, GUEST[family], 69, b""),
        LinkDatagram(b"three", GATEWAY[family], PORT, EVERYBODY[family], 70, GROUP_MAC[family]),
    ]
    guest.asks(to=GATEWAY[family])
    first, second = guest.taken(), guest.taken()
    assert first.packet.addresses == GATEWAY[family] + stranger
    assert udp.HEADER.unpack_from(first.packet.payload)[:3] == (PORT, 68, 11)
    assert bytes(first.packet.payload[8:]) == b"one"
    assert second.packet.addresses == DNS[family] + GUEST[family]
    assert udp.parse(second.packet.payload)[1] == 69
    third = guest.frames.popleft()
    at = 10 if vnet else 0
    assert third[at : at + 12] == GROUP_MAC[family] + OUR_MAC
    assert third.endswith(b"three")
    guest.quiet()


def test_what_it_declines_is_a_flow_like_any_other(family: int) -> None:
    guest = Served(family)
    guest.service.declines = True
    guest.asks(b"a", to=GATEWAY[family])
    guest.asks(b"b", to=GATEWAY[family])
    guest.asks(b"c", to=EVERYBODY[family], mac=GROUP_MAC[family])
    assert [each[0] for each in guest.users.datagrams.got] == [b"a", b"b"]
    assert [asked.payload for asked, _ in guest.service.asked] == [b"a", b"c"]
    assert guest.stack.dropped == {"udp-broadcast" if family == 4 else "udp-multicast": 1}


def test_fragments_are_put_together_first(family: int) -> None:
    guest = Served(family, limits=Limits(fragments=10000))
    payload = bytes(range(256)) * 8
    whole = asking(GUEST[family], EVERYBODY[family], payload, GROUP_MAC[family])
    for piece in fragments(whole[ethernet.SIZE :], 1024):
        guest.gives(GROUP_MAC[family] + piece[6:])
    assert [asked.payload for asked, _ in guest.service.asked] == [payload]


def test_it_is_the_firsts_where_several_stacks_share_the_link(family: int) -> None:
    given: list[tuple[int, int, bytes]] = []
    guest = Served(family)
    guest.stack.network.steering = Steering(
        1, 2, lambda number, hops, frame: given.append((number, hops, bytes(frame)))
    )
    data = asking(NOBODY[family], EVERYBODY[family], b"x", GROUP_MAC[family])
    guest.gives(data)
    assert given == [(0, 0, data)]
    assert not guest.service.asked


def test_several_datagrams_in_one_are_not_for_it() -> None:
    """No client of a service sends such; what does is a flow."""
    guest = Served(4, offloads=VNET)
    data = asking(GUEST[4], GATEWAY[4], bytes(20), OUR_MAC, vnet=True)
    header = virtio.pack(virtio.DATA_VALID, virtio.GSO_UDP_L4, 42, 10, 34, 6)
    guest.gives(header + data[len(header) :])
    assert not guest.service.asked
    assert guest.users.datagrams.got == [(bytes(20), 64, 10)]


# -- DHCP on the link -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "payload", "source"), [(4, 65001, 4), (6, 65001, 6), (4, 1, 6), (6, 1, 4)]
)
def test_what_cannot_be_sent_is_dropped(family: int, payload: int, source: int) -> None:
    """More than a datagram holds, or from an address of the other family: such a mistake is not the stack's end."""
    guest = Served(family)
    guest.service.replies = [
        LinkDatagram(bytes(payload), GATEWAY[source], PORT, GUEST[family], 68, GUEST_MAC)
    ]
    guest.asks(to=GATEWAY[family])
    guest.quiet()
    assert guest.stack.dropped == {"service-reply": 1}


def test_a_lease_over_the_link() -> None:
    guest = Guest(4)
    server = DhcpServer(
        DhcpSettings(),
        address=IPv4Address(GATEWAY[4]),
        network=IPv4Network("10.0.2.0/24"),
        pool=[IPv4Address("10.0.2.15")],
        dns=IPv4Address(DNS[4]),
        mtu=1500,
    )
    guest.stack.services[67] = Dhcp(guest.stack, server)

    def exchange(
        kind: int, options: dict[int, bytes], source: bytes, to: bytes, mac: bytes
    ) -> message.Message:
        options = {message.TYPE: bytes((kind,)), **options}
        asked = message.Message(message.REQUEST, 1, GUEST_MAC, ciaddr=IPv4Address(source), options=options)
        guest.gives(asking(source, to, asked.pack(), mac, port=67, source_port=68))
        sent = guest.taken()
        assert sent.packet.addresses == GATEWAY[4] + bytes([10, 0, 2, 15])
        assert udp.HEADER.unpack_from(sent.packet.payload)[:2] == (67, 68)
        return message.parse(bytes(sent.packet.payload[8:]))

    nobody, everybody = (NOBODY[4], EVERYBODY[4], GROUP_MAC[4]), {message.ADDRESS: bytes([10, 0, 2, 15])}
    assert exchange(message.DISCOVER, {}, *nobody).type == message.OFFER
    assert exchange(message.REQUEST_ADDRESS, everybody, *nobody).type == message.ACK
    leased = bytes([10, 0, 2, 15])
    assert exchange(message.REQUEST_ADDRESS, {}, leased, GATEWAY[4], OUR_MAC).type == message.ACK
    assert not guest.stack.dropped


def test_a_lease_of_ipv6_over_the_link() -> None:
    guest = Guest(6)
    ours, client = IPv6Address("fe80::2"), IPv6Address("fe80::1").packed
    server = Dhcp6Server(
        DhcpSettings(),
        address=ours,
        mac=OUR_MAC,
        network=IPv6Network("fd00::/64"),
        pool=[IPv6Address("fd00::1:0")],
        dns=IPv6Address(DNS[6]),
    )
    guest.stack.services[547] = Dhcp(guest.stack, server)
    duid = (message6.CLIENT_ID, b"\0\x03\0\x01" + GUEST_MAC)
    want = message6.pack_association(message6.Association(message6.IA_NA, b"1234", ()), [])

    def exchange(kind: int, *options: message6.Option) -> message6.Message6:
        asked = message6.Message6(kind, b"xid", [duid, *options])
        guest.gives(
            asking(client, EVERYBODY[6], asked.pack(), GROUP_MAC[6], ttl=1, port=547, source_port=546)
        )
        sent = guest.taken()
        assert sent.packet.addresses == ours.packed + client
        assert udp.HEADER.unpack_from(sent.packet.payload)[:2] == (547, 546)
        return message6.parse(bytes(sent.packet.payload[8:]))

    offer = exchange(message6.SOLICIT, want)
    assert offer.type == message6.ADVERTISE
    us = (message6.SERVER_ID, offer.get(message6.SERVER_ID) or b"")
    for kind in message6.REQUEST, message6.RENEW, message6.RELEASE:
        assert exchange(kind, us, want).type == message6.REPLY
    assert IPv6Address("fd00::1:0").packed in (offer.get(message6.IA_NA) or b"")
    assert not guest.stack.dropped
