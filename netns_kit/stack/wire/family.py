"""Family: the differences between IPv4 and IPv6 as data, except for the layout of their headers.

Code for both families takes a value from the record, instead of asking which family it is.
"""

from __future__ import annotations

from netns_kit.frozen import frozen

from . import ethernet, icmp, virtio


@frozen
class Family:
    """One address family: `IPV4` or `IPV6`."""

    version: int
    address_size: int
    """Bytes of an address."""
    header_size: int
    """Bytes of an IP header without options and extension headers."""
    ether_type: int
    smallest_mtu: int
    """Bytes of a packet that every path takes (IPv4: Linux's net.ipv4.route.min_pmtu; IPv6: RFC 8200 5)."""
    longest_payload: int
    """Bytes after a header without options and extension headers, at most."""
    default_mss: int
    """Bytes of TCP text that a peer takes if it sends no MSS option (RFC 9293 3.7.1)."""
    gso_tcp: int
    """Type of a TCP super-segment in the virtio header."""
    icmp: int
    """Protocol number of the family's ICMP."""
    echo: int
    echo_reply: int
    unreachable: int
    time_exceeded: int
    too_big: int
    """Type, with `too_big_code`, of the message of a router for which a packet is too big."""
    too_big_code: int
    unreachable_codes: dict[int, int]
    """Codes of `unreachable`, by the codes of IPv4's ICMP with the same meaning."""
    quoted: int
    """Bytes that an ICMP error quotes of its packet (RFC 1812 4.3.2.3, RFC 4443 2.4)."""

    @property
    def unspecified(self) -> bytes:
        """The unspecified address, packed."""
        return bytes(self.address_size)


IPV4 = Family(
    version=4,
    address_size=4,
    header_size=20,
    ether_type=ethernet.IPV4,
    smallest_mtu=552,
    longest_payload=0xFFFF - 20,
    default_mss=536,
    gso_tcp=virtio.GSO_TCPV4,
    icmp=1,
    echo=icmp.ECHO,
    echo_reply=icmp.ECHO_REPLY,
    unreachable=icmp.UNREACHABLE,
    time_exceeded=icmp.TIME_EXCEEDED,
    too_big=icmp.UNREACHABLE,
    too_big_code=icmp.FRAGMENTATION_NEEDED,
    unreachable_codes={code: code for code in (icmp.NET, icmp.HOST, icmp.PORT, icmp.PROHIBITED)},
    quoted=576 - 28,
)
IPV6 = Family(
    version=6,
    address_size=16,
    header_size=40,
    ether_type=ethernet.IPV6,
    smallest_mtu=1280,
    longest_payload=0xFFFF,
    default_mss=1220,
    gso_tcp=virtio.GSO_TCPV6,
    icmp=58,
    echo=icmp.V6_ECHO,
    echo_reply=icmp.V6_ECHO_REPLY,
    unreachable=icmp.V6_UNREACHABLE,
    time_exceeded=icmp.V6_TIME_EXCEEDED,
    too_big=icmp.V6_TOO_BIG,
    too_big_code=0,
    unreachable_codes={icmp.NET: 0, icmp.HOST: 3, icmp.PORT: 4, icmp.PROHIBITED: 1},
    quoted=1280 - 48,
)
FAMILIES = (IPV4, IPV6)

_OF_ADDRESS = {family.address_size: family for family in FAMILIES}


def family_of(address: bytes) -> Family:
    """Return the family of a packed address."""
    return _OF_ADDRESS[len(address)]
