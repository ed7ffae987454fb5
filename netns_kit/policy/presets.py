"""Presets: networks with a name, as targets of rules.

>>> IPv4Address("10.1.2.3") in PRIVATE, PRIVATE
(True, PRIVATE)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from .addresses import AnyNetwork, NetworkTable, PortRanges, canonical

__all__ = [
    "DNS_ELSEWHERE",
    "HOST",
    "LINK_LOCAL",
    "LOOPBACK",
    "METADATA",
    "MULTICAST",
    "PRESETS",
    "PRIVATE",
    "Preset",
    "preset_named",
]


class Preset:
    """A named set of addresses, as a target of rules; `address in preset` says whether it has an address.

    An IPv6 address that embeds an IPv4 address (IPv4-mapped, NAT64, 6to4) is in it if the embedded one is.

    Args:
        name: The name, in capital letters.
        networks: Networks and addresses as text.  Of a mapping they are the values, and each key has the ports that
            are meant there, as pairs of the first and the last.
    """

    __slots__ = ("_parts", "_table", "_texts", "name")

    def __init__(
        self, name: str, networks: Iterable[str] | Mapping[tuple[tuple[int, int], ...], Iterable[str]]
    ) -> None:
        self.name = name
        self._texts = networks if isinstance(networks, Mapping) else {(): networks}
        self._parts: tuple[tuple[AnyNetwork, PortRanges], ...] | None = None
        self._table: NetworkTable[bool] | None = None

    @property
    def parts(self) -> tuple[tuple[IPv4Network | IPv6Network, tuple[tuple[int, int], ...]], ...]:
        """The networks, each with the ports that are meant there; no ports are all of them."""
        if self._parts is None:  # reading them takes time, and most programs never need it
            self._parts = tuple(
                (ip_network(text), ports) for ports, texts in self._texts.items() for text in texts
            )
        return self._parts

    def has(self, packed: bytes) -> bool:
        """Tell whether the preset has an address.

        Args:
            packed: The address, packed and canonical.
        """
        if self._table is None:
            self._table = NetworkTable()
            for network, _ in self.parts:
                self._table.get_or_set(network, True)
        return bool(self._table.containing(packed))

    def __contains__(self, address: object) -> bool:
        return isinstance(address, IPv4Address | IPv6Address) and self.has(canonical(address.packed))

    def __iter__(self) -> Iterator[AnyNetwork]:
        return (network for network, _ in self.parts)

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[[str], Preset | None], tuple[str]]:
        return preset_named, (self.name,)


LOOPBACK = Preset("LOOPBACK", ("127.0.0.0/8", "0.0.0.0/8", "::1", "::"))
"""Addresses by which a kernel reaches itself: 127.0.0.0/8 and ::1, and the unspecified ones, 0.0.0.0/8 and ::, which
it takes for the same.  Nothing is ever sent there, whatever a policy says.
"""

HOST = Preset("HOST", ())
"""The addresses of the host itself, as its kernel knows them when a flow is opened, and the gateway's, which stands
for the host's loopback (see `Uplink`).
"""

PRIVATE = Preset(
    "PRIVATE",
    (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"),  # RFC 1918
        "100.64.0.0/10",  # RFC 6598: between a provider and its customers (CGNAT)
        "192.0.0.0/24",  # RFC 6890: for protocols, such as DS-Lite
        "198.18.0.0/15",  # RFC 2544: for benchmarks within a network
        "fc00::/7",  # RFC 4193: unique local
        "fec0::/10",  # RFC 3879: site-local, deprecated
        "64:ff9b:1::/48",  # RFC 8215: NAT64, where only the translator knows which IPv4 address is meant
        "2001::/32",  # RFC 4380: Teredo, a tunnel to an IPv4 address
        "2001:2::/48",  # RFC 5180: for benchmarks
        "5f00::/16",  # RFC 9602: segments of one's own network
    ),
)
"""Networks that are not the internet: 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, fc00::/7, providers' 100.64.0.0/10,
and what else is not routed between networks: 192.0.0.0/24, 198.18.0.0/15, 2001:2::/48, 5f00::/16, fec0::/10.  Also
IPv6 addresses that lead to an IPv4 address which cannot be told from here: 64:ff9b:1::/48 and 2001::/32 (Teredo).
Addresses for documentation, such as 192.0.2.0/24, are not in it.
"""

LINK_LOCAL = Preset("LINK_LOCAL", ("169.254.0.0/16", "fe80::/10"))
"""Link-local addresses: 169.254.0.0/16 and fe80::/10.  Nothing is ever sent to the latter: no interface is named."""

METADATA = Preset(
    "METADATA",
    (
        "169.254.169.254",  # nearly all clouds
        "169.254.170.2",  # Amazon, credentials of a container
        "169.254.170.23",  # Amazon, credentials of a pod
        "169.254.0.23",  # Tencent
        "169.254.42.42",  # Scaleway
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure's wire server
        "192.0.0.192",  # Oracle, the older one
        "fd00:ec2::254",  # Amazon, IPv6
        "fd00:ec2::23",  # Amazon, credentials of a pod, IPv6
        "fd20:ce::254",  # Google, IPv6
        "fd00:c1::a9fe:a9fe",  # Oracle, IPv6
        "fd00:a9fe:a9fe::1",  # Akamai, IPv6
        "fd00:42::42",  # Scaleway, IPv6
        "fe80::a9fe:a9fe",  # OpenStack, IPv6
    ),
)
"""Addresses of cloud metadata services, which tell a machine its identity and credentials."""

MULTICAST = Preset("MULTICAST", ("224.0.0.0/4", "255.255.255.255", "ff00::/8"))
"""Addresses of many receivers: groups (224.0.0.0/4, ff00::/8), of mDNS and LLMNR too, and 255.255.255.255.  Nothing
is ever sent there, whatever a policy says.
"""

DNS_ELSEWHERE = Preset(
    "DNS_ELSEWHERE",
    {
        ((53, 53), (853, 853)): ("0.0.0.0/0", "::/0"),
        ((443, 443),): (
            *("1.1.1.0/24", "1.0.0.0/24", "2606:4700:4700::/48"),  # Cloudflare
            *("162.159.61.3", "162.159.61.4", "172.64.41.3", "172.64.41.4"),  # Cloudflare, for browsers
            *("2803:f800:53::3", "2803:f800:53::4", "2a06:98c1:52::3", "2a06:98c1:52::4"),
            *("8.8.8.8", "8.8.4.4", "2001:4860:4860::/48"),  # Google
            *("9.9.9.0/24", "149.112.112.0/24", "2620:fe::/48"),  # Quad9
            *("208.67.222.0/24", "208.67.220.0/24", "2620:119:35::/48", "2620:119:53::/48"),  # OpenDNS
            *("94.140.14.0/24", "94.140.15.0/24", "2a10:50c0::/32"),  # AdGuard
            *(
                "185.228.168.0/24",
                "185.228.169.0/24",
                "2a0d:2a00:1::/48",
                "2a0d:2a00:2::/48",
            ),  # CleanBrowsing
            *("45.90.28.0/24", "45.90.30.0/24", "2a07:a8c0::/32", "2a07:a8c1::/32"),  # NextDNS
            *("76.76.2.0/24", "76.76.10.0/24", "2606:1a40::/32"),  # Control D
            *("194.242.2.0/24", "2a07:e340::/32"),  # Mullvad
            *("185.222.222.222", "45.11.45.11", "2a09::", "2a11::"),  # DNS.SB
            *("223.5.5.5", "223.6.6.6", "2400:3200::1", "2400:3200:baba::1"),  # Alibaba
            *("1.12.12.12", "120.53.53.53"),  # DNSPod
        ),
    },
)
"""DNS at other servers than the namespace's own: port 53 and port 853 (DNS over TLS and over QUIC) anywhere, and port
443 (DNS over HTTPS) at public resolvers that are known to serve it.  An unknown resolver is a web server like
any other; rules by name keep to what our own DNS has answered.
"""

PRESETS = {
    each.name: each for each in (LOOPBACK, HOST, PRIVATE, LINK_LOCAL, METADATA, MULTICAST, DNS_ELSEWHERE)
}


def preset_named(name: str) -> Preset | None:
    """Return the preset of that name, or None."""
    return PRESETS.get(name)
