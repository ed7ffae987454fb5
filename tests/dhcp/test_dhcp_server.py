"""What the DHCPv4 server says, to whom, and for how long."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netns_kit.dhcp import DhcpSettings, Reply, StaticLease
from netns_kit.dhcp import message as m
from netns_kit.dhcp.leases import DECLINE_SECONDS, OFFER_SECONDS
from netns_kit.dhcp.message import Message, parse
from netns_kit.dhcp.settings import INFINITE
from netns_kit.errors import AddressError, ArgumentError, DomainNameError
from tests.support.dhcp_client import BROADCAST_MAC, DNS, EVERYTHING, MAC, SERVER, Client, brief, host, server

ASKING = {m.WANTED: EVERYTHING}
OTHER_MAC = b"\x02\0\0\0\0\x99"
RICH = DhcpSettings(
    lease_seconds=1000,
    domain="eng.example.com",
    search=("eng.example.com", "example.com"),
    routes=((IPv4Network("192.0.2.0/25"), host(7)), (IPv4Network("10.128.0.0/9"), host(8))),
    static=(StaticLease(host(50), mac=MAC.hex(":"), hostname="web"),),
)


# -- what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [ASKING, {}])
def test_every_option(asked: dict[int, bytes]) -> None:
    ack = Client(server(RICH)).hears(m.DISCOVER, {**asked, m.RAPID_COMMIT: b""})
    assert ack.yiaddr == host(50)
    assert ack.options == {
        m.TYPE: b"\x05",
        m.SERVER: SERVER.packed,
        m.LEASE_TIME: (1000).to_bytes(4, "big"),
        m.RAPID_COMMIT: b"",
        m.NETMASK: b"\xff\xff\xff\0",
        m.ROUTER: SERVER.packed,
        m.DNS: DNS.packed,
        m.HOSTNAME: b"web",
        m.DOMAIN: b"eng.example.com",
        m.MTU: b"\x05\xdc",
        m.RENEWAL: (500).to_bytes(4, "big"),
        m.REBINDING: (875).to_bytes(4, "big"),
        m.SEARCH: b"\x03eng\x07example\x03com\0\xc0\x04",
        m.ROUTES: b"\x19\xc0\0\x02\0\x0a\0\x02\x07\x09\x0a\x80\x0a\0\x02\x08\0\x0a\0\x02\x02",
    }


def test_a_server_without_settings_says_what_it_knows() -> None:
    offer = Client(server()).hears(m.DISCOVER, ASKING)
    known = {
        m.TYPE,
        m.SERVER,
        m.LEASE_TIME,
        m.NETMASK,
        m.ROUTER,
        m.DNS,
        m.MTU,
        m.RENEWAL,
        m.REBINDING,
        m.ROUTES,
    }
    assert offer.options.keys() == known
    assert offer.options[m.ROUTES] == b"\0" + SERVER.packed


def test_what_the_client_asks_for_in_its_order() -> None:
    asked = bytes((121, 6, 250, 3, 6, 119))
    offer = Client(server(RICH)).hears(m.DISCOVER, {m.WANTED: asked})
    assert list(offer.options) == [m.TYPE, m.SERVER, m.LEASE_TIME, 121, 6, 3, 119, m.NETMASK]


def test_identifier_and_relay_information_come_back() -> None:
    """RFC 6842; RFC 3046 2.2.  In all three answers."""
    given = {m.CLIENT_ID: b"\0me", m.RELAY: b"\x01\x02ab"}
    me = Client(server())
    offer = me.hears(m.DISCOVER, given)
    ack = me.hears(m.REQUEST_ADDRESS, {**given, m.ADDRESS: offer.yiaddr.packed})
    nak = me.hears(m.REQUEST_ADDRESS, {**given, m.ADDRESS: host(99).packed})
    assert (offer.type, ack.type, nak.type) == (m.OFFER, m.ACK, m.NAK)
    for answer in offer, ack, nak:
        assert given.items() <= answer.options.items()
    assert nak.options[m.TEXT] == b"requested address not available"
    assert nak.options.keys() == {m.TYPE, m.SERVER, m.TEXT, *given}


def test_inform_is_told_everything_but_of_a_lease() -> None:
    me = Client(server(RICH))
    ack = me.hears(m.INFORM, ASKING, ciaddr=host(77))
    assert ack.yiaddr == m.NOWHERE
    assert not ack.options.keys() & {m.LEASE_TIME, m.RENEWAL, m.REBINDING}
    assert ack.options[m.DNS] == DNS.packed
    assert [each.state for each in me.server.leases.list(0)] == ["reserved"]


@pytest.mark.parametrize("address", [m.NOWHERE, SERVER, IPv4Address("192.0.2.1")])
def test_inform_from_nowhere_is_not_answered(address: IPv4Address) -> None:
    me = Client(server())
    assert me.says(m.INFORM, ciaddr=address) is None
    assert me.server.dropped == {"no-address": 1}


def test_a_client_has_the_room_it_says_it_has() -> None:
    """RFC 2132 9.10: headers included.  The more it wants first, the more surely it gets it."""
    many = DhcpSettings(
        search=tuple(f"{number:05}.example{number:05}.com" for number in range(40)), domain="d"
    )
    me = Client(server(many))
    small = me.says(m.DISCOVER, {m.WANTED: bytes((119, 15))})
    assert small is not None
    assert len(small.payload) <= 548
    assert m.SEARCH not in parse(small.payload).options
    assert parse(small.payload).options[m.DOMAIN] == b"d"
    large = me.says(m.DISCOVER, {m.WANTED: bytes((119, 15)), m.MAX_SIZE: b"\x05\xdc"})
    assert large is not None
    assert 548 < len(large.payload) <= 1472
    assert len(parse(large.payload).options[m.SEARCH]) > 255


@pytest.mark.parametrize("lie", [0, 100, 65535])
def test_no_client_has_more_room_than_the_link(lie: int) -> None:
    many = DhcpSettings(search=tuple(f"{number:05}.example{number:05}.com" for number in range(100)))
    reply = Client(server(many)).says(m.DISCOVER, {m.MAX_SIZE: lie.to_bytes(2, "big")})
    assert reply is not None
    assert 300 <= len(reply.payload) <= 1472


# -- for how long ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "given"), [(None, 1000), (0, 60), (59, 60), (500, 500), (1001, 1000), (INFINITE, 1000)]
)
def test_the_time_of_a_lease(asked: int | None, given: int) -> None:
    me = Client(server())
    wanted = {} if asked is None else {m.LEASE_TIME: asked.to_bytes(4, "big")}
    assert me.hears(m.DISCOVER, wanted).options[m.LEASE_TIME] == given.to_bytes(4, "big")
    ack = me.hears(m.DISCOVER, {**wanted, m.RAPID_COMMIT: b""})
    assert ack.options[m.LEASE_TIME] == given.to_bytes(4, "big")
    (lease,) = me.server.leases.list(0)
    assert lease.seconds == given
    assert me.server.leases.list(given - 0.5)[0].seconds == 1
    assert me.server.leases.list(given) == ()


def test_leases_shorter_than_a_client_may_ask_for() -> None:
    me = Client(server(DhcpSettings(lease_seconds=4)))
    ack = me.hears(m.DISCOVER, {m.LEASE_TIME: b"\0\0\0\x64", m.RAPID_COMMIT: b""})
    assert ack.options[m.LEASE_TIME] == b"\0\0\0\x04"


def test_leases_without_end() -> None:
    me = Client(server(DhcpSettings(lease_seconds=INFINITE)))
    ack = me.hears(m.DISCOVER, {m.RAPID_COMMIT: b""})
    for option in m.LEASE_TIME, m.RENEWAL, m.REBINDING:
        assert ack.options[option] == b"\xff\xff\xff\xff"
    (lease,) = me.server.leases.list(1e12)
    assert (lease.state, lease.seconds) == ("bound", None)
    me.now = 1e12
    assert me.discovers().yiaddr == host(15)
    assert Client(me.server, OTHER_MAC, 1e12).leases() == host(16)


def test_renewing_makes_it_longer() -> None:
    me = Client(server())
    address = me.leases()
    me.now = 900
    assert me.hears(m.REQUEST_ADDRESS, ciaddr=address).options[m.LEASE_TIME] == (1000).to_bytes(4, "big")
    (lease,) = me.server.leases.list(1899)
    assert lease.seconds == 1


def test_what_is_offered_is_kept_for_a_while() -> None:
    dhcp = server(size=1)
    me, other = Client(dhcp), Client(dhcp, OTHER_MAC)
    assert me.discovers().yiaddr == host(15)
    assert other.says(m.DISCOVER) is None
    assert brief(other.says(m.REQUEST_ADDRESS, {m.ADDRESS: host(15).packed})) == "nak"
    other.now = OFFER_SECONDS
    assert other.discovers().yiaddr == host(15)
    assert dhcp.dropped == {"exhausted": 1}


def test_what_is_declined_is_nobodys_for_a_while() -> None:
    dhcp = server(size=1)
    me = Client(dhcp)
    me.says(m.DECLINE, {m.ADDRESS: me.leases().packed})
    assert me.says(m.DISCOVER) is None
    assert [each.state for each in dhcp.leases.list(0)] == ["declined"]
    me.now = DECLINE_SECONDS
    assert me.leases() == host(15)


def test_only_who_has_it_may_decline_or_release() -> None:
    dhcp = server()
    address = Client(dhcp).leases()
    other = Client(dhcp, OTHER_MAC)
    other.says(m.DECLINE, {m.ADDRESS: address.packed})
    other.says(m.RELEASE, ciaddr=address)
    assert [(each.address, each.state) for each in dhcp.leases.list(0)] == [(address, "bound")]
    assert dhcp.dropped == {"no-lease": 1}


# -- which ----------------------------------------------------------------------------------------------


def test_each_gets_its_own_and_the_same_again() -> None:
    dhcp = server()
    clients = [Client(dhcp, bytes((2, 0, 0, 0, 0, number))) for number in range(4)]
    assert [each.leases() for each in clients] == [host(15 + number) for number in range(4)]
    for each in clients:
        each.says(m.RELEASE, ciaddr=host(15 + each.mac[5]))
    assert dhcp.leases.list(0) == ()
    assert [each.leases() for each in reversed(clients)] == [host(15 + number) for number in (3, 2, 1, 0)]


def test_what_nobody_has_had_is_given_first_then_what_has_been_free_for_longest() -> None:
    dhcp = server(size=2)
    first, second, third = (Client(dhcp, bytes((2, 0, 0, 0, 0, number))) for number in range(3))
    first.says(m.RELEASE, ciaddr=first.leases())
    assert second.leases() == host(16)
    second.now = 1
    second.says(m.RELEASE, ciaddr=host(16))
    third.now = 2
    assert third.leases() == host(15)


def test_a_wish_is_granted_if_it_can_be() -> None:
    me = Client(server())
    assert me.leases(host(17)) == host(17)
    assert Client(me.server, OTHER_MAC).leases(host(17)) == host(15)
    assert Client(me.server, b"\x02\0\0\0\0\x98").leases(host(100)) == host(16)


def test_the_client_identifier_tells_clients_apart_and_not_the_hardware() -> None:
    dhcp = server()
    me = Client(dhcp)
    one, two = ({m.CLIENT_ID: each} for each in (b"\0one", b"\0two"))
    first = me.hears(m.DISCOVER, {**one, m.RAPID_COMMIT: b""}).yiaddr
    second = me.hears(m.DISCOVER, {**two, m.RAPID_COMMIT: b""}).yiaddr
    assert first != second
    moved = Client(dhcp, OTHER_MAC)
    assert moved.hears(m.DISCOVER, one).yiaddr == first


def test_the_hardwares_address_as_identifier_is_the_same_as_none() -> None:
    me = Client(server())
    address = me.leases()
    assert me.hears(m.DISCOVER, {m.CLIENT_ID: b"\x01" + MAC}).yiaddr == address


@pytest.mark.parametrize("identifier", [b"", b"\x01", bytes(256)])
def test_no_identifier(identifier: bytes) -> None:
    me = Client(server())
    assert me.says(m.DISCOVER, {m.CLIENT_ID: identifier}) is None
    assert me.server.dropped == {"client-id": 1}


def test_static_leases_by_hardware_and_by_identifier() -> None:
    static = (
        StaticLease(host(50), mac=MAC.hex(":").upper()),
        StaticLease(host(16), client_id="00:6F:6e65", hostname="one"),
    )
    dhcp = server(replace(RICH, static=static))
    assert Client(dhcp).leases() == host(50)
    assert Client(dhcp, OTHER_MAC).leases(host(50)) == host(15)
    ack = Client(dhcp, OTHER_MAC).hears(m.DISCOVER, {m.CLIENT_ID: b"\0one", m.RAPID_COMMIT: b""})
    assert (ack.yiaddr, ack.options[m.HOSTNAME]) == (host(16), b"one")
    assert Client(dhcp, b"\x02\0\0\0\0\x97").leases() == host(17)


def test_a_client_moves_to_the_address_that_becomes_its_own() -> None:
    me = Client(server())
    before = me.leases()
    me.server.leases.reserve(StaticLease(host(40), mac=MAC.hex(":")))
    assert brief(me.says(m.REQUEST_ADDRESS, ciaddr=before)) == "nak"
    assert me.leases() == host(40)
    assert me.server.leases.revoke(host(40), me.now)
    assert brief(me.says(m.REQUEST_ADDRESS, ciaddr=host(40))) == "nak"
    assert me.leases() == before


def test_a_client_has_one_address() -> None:
    me = Client(server())
    me.leases()
    for number in range(40, 44):
        me.server.leases.reserve(StaticLease(host(number), mac=MAC.hex(":")))
        assert me.leases() == host(40)
        assert [each.address for each in me.server.leases.list(0) if each.state == "bound"] == [host(40)]


def test_a_flood_of_clients_takes_what_is_free_and_no_more() -> None:
    dhcp = server(size=16)
    mine = Client(dhcp).leases()
    rng = random.Random(5)
    for _ in range(5000):
        stranger = Client(dhcp, bytes((2, *rng.randbytes(5))))
        stranger.says(
            rng.choice((m.DISCOVER, m.REQUEST_ADDRESS)), {m.ADDRESS: host(rng.randrange(256)).packed}
        )
    leases = dhcp.leases.list(0)
    assert len(leases) == 16
    assert leases[0].address == mine
    assert vars(dhcp.leases).keys() == {"_pool", "_static", "_bindings", "_of"}
    assert max(len(vars(dhcp.leases)["_bindings"]), len(vars(dhcp.leases)["_of"])) == 16
    assert brief(Client(dhcp).says(m.REQUEST_ADDRESS, ciaddr=mine)) == "ack .15"


def test_what_people_see() -> None:
    dhcp = server(replace(RICH, static=(StaticLease(host(60), client_id="0102"),)))
    me = Client(dhcp)
    me.hears(m.DISCOVER, {m.HOSTNAME: b"laptop.", m.RAPID_COMMIT: b"", m.CLIENT_ID: b"\0me"})
    Client(dhcp, OTHER_MAC).hears(m.DISCOVER, {m.HOSTNAME: b"$(reboot)", m.RAPID_COMMIT: b""})
    Client(dhcp, b"\x02\0\0\0\0\x98").discovers()
    bound, nameless, offered, reserved = dhcp.leases.list(5)
    assert (bound.address, bound.state, bound.seconds) == (host(15), "bound", 995)
    assert (bound.client_id, bound.mac, bound.hostname) == ("00:6d:65", MAC.hex(":"), "laptop")
    assert (nameless.client_id, nameless.hostname) == ("01:" + OTHER_MAC.hex(":"), "")
    assert (offered.state, offered.seconds) == ("offered", OFFER_SECONDS - 5)
    assert (reserved.address, reserved.state, reserved.client_id) == (host(60), "reserved", "01:02")


# -- where to -------------------------------------------------------------------------------------------


def to(reply: Reply | None) -> tuple[IPv4Address, int, bytes]:
    assert reply is not None
    return IPv4Address(reply.destination), reply.port, reply.mac


EVERYBODY = (IPv4Address("255.255.255.255"), 68, BROADCAST_MAC)


def test_to_whom_an_answer_goes() -> None:
    """RFC 2131 4.1."""
    me = Client(server())
    asked = {m.ADDRESS: host(15).packed}
    assert to(me.says(m.DISCOVER)) == (host(15), 68, MAC)
    assert to(me.says(m.DISCOVER, flags=m.BROADCAST)) == EVERYBODY
    assert to(me.says(m.REQUEST_ADDRESS, asked)) == (host(15), 68, MAC)
    assert to(me.says(m.REQUEST_ADDRESS, asked, flags=m.BROADCAST)) == EVERYBODY
    assert to(me.says(m.REQUEST_ADDRESS, ciaddr=host(15))) == (host(15), 68, MAC)
    assert to(me.says(m.REQUEST_ADDRESS, ciaddr=host(15), flags=m.BROADCAST)) == (host(15), 68, MAC)
    assert to(me.says(m.INFORM, ciaddr=host(77))) == (host(77), 68, MAC)
    for fields in {}, {"ciaddr": host(99)}:
        assert to(me.says(m.REQUEST_ADDRESS, {m.ADDRESS: host(99).packed}, **fields)) == EVERYBODY


@pytest.mark.parametrize("chaddr", [OTHER_MAC, MAC[:5], MAC + b"\0", b""])
@pytest.mark.parametrize("kind", [m.DISCOVER, m.REQUEST_ADDRESS, m.RELEASE, m.DECLINE, m.INFORM])
def test_nobody_speaks_for_anothers_hardware(kind: int, chaddr: bytes) -> None:
    """The frame says who sends it; its lease is not another's to have, to give back or to decline."""
    me = Client(server())
    address = me.leases()
    options = {m.TYPE: bytes((kind,)), m.ADDRESS: address.packed, m.CLIENT_ID: b"\x01" + MAC}
    before = me.server.leases.list(0)
    assert me.sends(Message(m.REQUEST, me.xid, chaddr, options=options).pack()) is None
    assert me.server.dropped == {"hardware-address": 1}
    assert me.server.leases.list(0) == before


def test_hardware_of_another_kind_is_answered_at_the_frames_address() -> None:
    me = Client(server())
    elsewhere = Message(m.REQUEST, me.xid, b"\x09", htype=7, options={m.TYPE: b"\x01", m.CLIENT_ID: b"\0a"})
    assert to(me.sends(elsewhere.pack())) == (host(15), 68, MAC)


def test_a_relay_agent_speaks_for_others() -> None:
    me = Client(server())
    discover = Message(m.REQUEST, me.xid, OTHER_MAC, giaddr=host(9), options={m.TYPE: b"\x01"})
    assert to(me.sends(discover.pack())) == (host(9), 67, MAC)


def test_through_a_relay_agent() -> None:
    me = Client(server())
    offer = me.says(m.DISCOVER, giaddr=host(9))
    assert to(offer) == (host(9), 67, MAC)
    nak = me.says(m.REQUEST_ADDRESS, {m.ADDRESS: host(99).packed}, giaddr=host(9))
    assert to(nak) == (host(9), 67, MAC)
    assert nak is not None
    assert parse(nak.payload).flags == m.BROADCAST
    assert parse(nak.payload).giaddr == host(9)
    assert me.says(m.DISCOVER, giaddr=IPv4Address("192.0.2.1")) is None
    assert me.server.dropped == {"relay-foreign": 1}


def test_what_else_an_answer_has() -> None:
    me = Client(server())
    offer = me.hears(m.DISCOVER, flags=0xFFFF)
    assert (offer.op, offer.flags, offer.ciaddr, offer.chaddr) == (m.REPLY, m.BROADCAST, m.NOWHERE, MAC)
    ack = me.hears(m.REQUEST_ADDRESS, ciaddr=host(15))
    assert (ack.ciaddr, ack.yiaddr) == (host(15), host(15))
    nak = me.hears(m.REQUEST_ADDRESS, ciaddr=host(99))
    assert (nak.ciaddr, nak.yiaddr) == (m.NOWHERE, m.NOWHERE)


# -- hostile --------------------------------------------------------------------------------------------


def test_what_servers_say_is_not_answered() -> None:
    me = Client(server())
    offer = me.says(m.DISCOVER)
    assert offer is not None
    assert me.sends(offer.payload) is None
    assert me.sends(b"") is None
    assert me.server.dropped == {"no-request": 1, "truncated": 1}
    assert me.server.stats() == {
        "sent_offer": 1,
        "sent_ack": 0,
        "sent_nak": 0,
        "dropped_no_request": 1,
        "dropped_truncated": 1,
    }


options = st.dictionaries(
    st.sampled_from([12, 50, 51, 53, 54, 55, 57, 61, 80, 82, 255 - 1]), st.binary(max_size=300), max_size=8
)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 9), options, st.booleans(), st.binary(max_size=16)), max_size=6))
def test_whatever_is_sent_is_answered_once_or_counted(
    said: list[tuple[int, dict[int, bytes], bool, bytes]],
) -> None:
    dhcp = server()
    for kind, others, is_known, hardware in said:
        options = {m.TYPE: bytes((kind,)), **others}
        message = Message(m.REQUEST, 7, MAC if is_known else hardware, options=options)
        before = sum(dhcp.dropped.values()) + sum(dhcp.sent.values())
        replies = dhcp.answer(message.pack(5000), bytes(4), 68, MAC, b"\xff" * 4, 0)
        assert len(replies) <= 1
        silent = message.options[m.TYPE] in (bytes((m.RELEASE,)), bytes((m.DECLINE,)))
        after = sum(dhcp.dropped.values()) + sum(dhcp.sent.values())
        assert after - before == 1 or (silent and after == before)
        for reply in replies:
            parse(reply.payload)
        assert len(dhcp.leases.list(0)) <= 4


@given(st.binary(max_size=600))
def test_hostile_bytes_are_counted(data: bytes) -> None:
    dhcp = server()
    assert dhcp.answer(data, bytes(4), 68, MAC, b"\xff" * 4, 0) == ()


@pytest.mark.parametrize("port", [0, 66, 69, 1024, 40000])
def test_only_who_may_have_the_clients_port_is_a_client(port: int) -> None:
    """Any program inside can send from others."""
    dhcp = server()
    message = Message(m.REQUEST, 7, MAC, options={m.TYPE: bytes((m.DISCOVER,))})
    assert dhcp.answer(message.pack(), bytes(4), port, MAC, b"\xff" * 4, 0) == ()
    assert dhcp.dropped == {"port": 1}
    assert dhcp.leases.list(0) == ()
    assert sum(dhcp.dropped.values()) == 1


# -- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "expected one of MAC and client identifier"),
        ({"mac": "02:00:00:00:00:01", "client_id": "0102"}, "expected one of MAC and client identifier"),
        ({"mac": "02:00:00:00:00"}, "expected a MAC address"),
        ({"mac": "020000000001"}, "expected a MAC address"),
        ({"client_id": "xy"}, "expected 2 to 255 bytes in hexadecimal"),
        ({"client_id": "01"}, "expected 2 to 255 bytes in hexadecimal"),
        ({"client_id": "01" * 256}, "expected 2 to 255 bytes in hexadecimal"),
        ({"mac": "02:00:00:00:00:01", "hostname": "a b"}, "expected a domain name"),
    ],
)
def test_no_static_lease(given: dict[str, str], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        StaticLease(host(50), **given)


@pytest.mark.parametrize("seconds", [0, -1, 1 << 32])
def test_no_time(seconds: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 4294967295"):
        DhcpSettings(lease_seconds=seconds)


def test_no_settings() -> None:
    with pytest.raises(TypeError, match="expected a list of domains"):
        DhcpSettings(search="example.com")
    with pytest.raises(DomainNameError, match="domain='a b': expected a domain name"):
        DhcpSettings(domain="a b")
    twice = StaticLease(host(50), client_id="0102"), StaticLease(host(50), client_id="0103")
    with pytest.raises(AddressError, match="expected one client for each address"):
        DhcpSettings(static=twice)


def test_leases_of_the_other_family_are_not_for_this_server() -> None:
    static = StaticLease(IPv6Address("fd00::50"), mac=MAC.hex(":"))
    assert Client(server(DhcpSettings(static=(static,)))).leases() == host(15)


def test_addresses_may_be_given_as_text() -> None:
    assert StaticLease("10.0.2.50", mac=MAC.hex(":")).address == host(50)
    assert DhcpSettings(routes=(("192.0.2.0/24", "10.0.2.7"),)).routes == (
        (IPv4Network("192.0.2.0/24"), host(7)),
    )
    with pytest.raises(AddressError, match=r"address='10\.0\.2': expected an IPv4 or IPv6 address"):
        StaticLease("10.0.2", mac=MAC.hex(":"))
    with pytest.raises(AddressError, match="host bits set"):
        DhcpSettings(routes=(("192.0.2.1/24", "10.0.2.7"),))
