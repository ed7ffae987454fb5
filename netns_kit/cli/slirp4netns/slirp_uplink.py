"""SlirpUplink: an `Uplink` that refuses and binds as slirp4netns does, where an `Uplink` does it otherwise.

- A port of the gateway that is closed is ENETUNREACH for programs inside; here, "administratively prohibited".
- So is a port of the DNS address other than 53.  With `--disable-dns` nothing there answers, whatever is sent there.
- An address to send from is that of connections to the host's loopback too.
- A datagram may come from anywhere ("full cone"): a TFTP server answers from another port than the one asked.
"""

from __future__ import annotations

from netns_kit.arguments import Address
from netns_kit.stack import Refusal
from netns_kit.subnet import Subnet
from netns_kit.uplink.flow import DNS_PORT, Flow, Target
from netns_kit.uplink.uplink import Uplink


class SlirpUplink(Uplink):
    """The uplink of a command line.

    Args:
        loopback: Whether the gateway's address means the host's loopback.
        dns: Whether names are resolved.
        bind4, bind6: Source addresses of outgoing sockets.
    """

    def __init__(
        self, *, loopback: bool, dns: bool, bind4: str | None = None, bind6: str | None = None
    ) -> None:
        super().__init__(
            allow_host_loopback=loopback,
            bind4=bind4,
            bind6=bind6,
            dns=None if dns else (),
            udp_filtering="endpoint-independent",
        )
        self._sources = {4: bind4, 6: bind6}
        self._has_dns = dns

    def route(self, flow: Flow) -> Target | Refusal:
        subnet: Subnet = flow.subnet
        address, port = flow.destination
        if address in subnet.resolvers:
            if not self._has_dns:
                return Refusal.DROP
            if port != DNS_PORT:
                return Refusal.NET_UNREACHABLE
        found = super().route(flow)
        network = subnet.of(address)
        if found is Refusal.PROHIBITED and network is not None and address in network.gateways:
            return Refusal.NET_UNREACHABLE
        return found

    def source(self, target: Address) -> str | None:
        return self._sources[target.version]
