"""Stats: the counters of a stack, as one record that is always complete.

Each part counts by name, and `complete` makes the record.  tests/gateway/test_stats.py checks that every name which a
part can count is here, and the table of docs/observing.md is made of this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, cast


class Stats(TypedDict):
    """Gauges and counters of a stack by name; every key is always present.

    The text of a gauge says "at this moment".  All others count since the stack was opened and never decrease.  With
    several workers each value is the sum of theirs.
    """

    tcp_connections: int
    """TCP connections in the table in any state at this moment."""
    tcp_syn_held: int
    """TCP connections whose SYN waits for the host's side to be decided, at this moment."""
    tcp_syn_sent: int
    """TCP connections that the guest has not answered yet, at this moment."""
    tcp_syn_received: int
    """TCP connections whose handshake the guest has not finished, at this moment."""
    tcp_established: int
    """TCP connections open in both directions, at this moment."""
    tcp_fin_wait_1: int
    """TCP connections whose host side has ended, which the guest has not acknowledged, at this moment."""
    tcp_fin_wait_2: int
    """TCP connections whose host side has ended, at this moment."""
    tcp_close_wait: int
    """TCP connections whose guest side has ended, at this moment."""
    tcp_closing: int
    """TCP connections both of whose sides have ended at the same time, at this moment."""
    tcp_last_ack: int
    """TCP connections whose sides have both ended, the guest's first, at this moment."""
    tcp_time_wait: int
    """TCP connections that have ended and only linger, at this moment."""
    tcp_closed: int
    """TCP connections that are being removed at this moment: mostly 0."""
    tcp_time_waits: int
    """TCP connections that have ended and are only remembered at this moment."""
    tcp_pending: int
    """TCP connections of the guest at this moment whose handshake is not over."""
    tcp_memory: int
    """Bytes that all TCP connections keep at this moment, see `Limits.tcp_memory`."""
    udp_flows: int
    """UDP flows at this moment."""
    echo_flows: int
    """Ping flows at this moment."""
    fragments: int
    """Bytes of incomplete packets at this moment."""
    neighbours: int
    """Link addresses of the guest known at this moment."""
    waiting_frames: int
    """Frames that wait at this moment for the guest's link address."""
    flows_refused: int
    """Flows of the guest refused by the uplink, or because descriptors had run out."""
    flows_asked: int
    """Flows of the guest that wait for `on_flow` at this moment."""
    policy_refused: int
    """Flows of the guest refused by the policy."""
    policy_audited: int
    """Flows of the guest that the policy would have refused, but for `audit`."""
    policy_pins: int
    """Addresses at this moment that names were resolved to, for rules by name."""
    policy_pins_evicted: int
    """Addresses of names forgotten too early, because there were too many."""
    tap_received: int
    """Frames read from the device."""
    tap_sent: int
    """Frames written to the device."""
    tap_refused: int
    """Frames that the guest's kernel did not take: its link is down, or they are malformed."""
    tap_dropped: int
    """Frames lost because the device's queue was full."""
    handed_over: int
    """Frames and connections handed from one worker to another; 0 with one."""
    handed_over_lost: int
    """Frames and connections lost because the other worker's inbox was full, or no descriptor was left there."""
    policy_pins_lost: int
    """Addresses of allowed names that a worker did not learn because its inbox was full, as messages; 0 with one."""
    dns_queries: int
    """DNS queries accepted to be relayed, repetitions not counted."""
    dns_joined: int
    """DNS queries that waited for the answer to the same query of another client."""
    dns_clients: int
    """Connections of clients to the DNS address at this moment."""
    dns_probes: int
    """Copies of DNS queries sent to see whether an upstream is back."""
    dns_repeated: int
    """DNS queries that came again while they were under way."""
    dns_answered: int
    """DNS queries answered by an upstream, SERVFAIL and REFUSED included."""
    dns_gave_up: int
    """DNS queries that no upstream has answered: SERVFAIL."""
    dns_failovers: int
    """Further messages sent to an upstream for a query."""
    dns_timeouts: int
    """Waits for an upstream that ended without an answer."""
    dns_evicted: int
    """DNS queries dropped for younger ones."""
    dns_malformed: int
    """DNS messages from either side that were invalid and not relayed."""
    dns_unmatched: int
    """Answers of an upstream to no query: forged, repeated or late."""
    dns_pending: int
    """DNS queries under way at this moment."""
    dns_hooked: int
    """DNS queries that the hook has answered, refused or renamed."""
    dns_owned: int
    """DNS queries for names of our own."""
    dns_cached: int
    """DNS queries answered from the cache."""
    dns_refused_by_policy: int
    """DNS queries that the policy has refused, and answers that it has not let pass."""
    dns_cut: int
    """DNS answers from which the policy has cut records."""
    dns_cache_entries: int
    """Answers in the cache at this moment."""
    dns_sockets: int
    """Sockets to upstreams at this moment."""
    dropped_arp_not_ethernet_ipv4: int
    """ARP packets not of Ethernet and IPv4."""
    dropped_arp_truncated: int
    """ARP packets cut short."""
    dropped_checksum: int
    """Packets with a wrong checksum."""
    dropped_ethernet_not_ours: int
    """Frames to another link address."""
    dropped_ethernet_truncated: int
    """Frames cut short."""
    dropped_ethernet_type: int
    """Frames of another protocol than IP and ARP."""
    dropped_flooded: int
    """Frames of unknown flows dropped in a flood, when too many wait already."""
    dropped_fragment_headers: int
    """First fragments that do not have all the headers."""
    dropped_fragment_length: int
    """Fragments whose length is no multiple of 8."""
    dropped_fragment_nested: int
    """Fragments of a fragment."""
    dropped_fragment_overlap: int
    """Fragments that overlap others: the packet is dropped."""
    dropped_fragment_timeout: int
    """Packets whose fragments did not all come in time."""
    dropped_fragment_too_long: int
    """Fragments that would make a packet too long."""
    dropped_icmp_broadcast: int
    """Pings to a broadcast address."""
    dropped_icmp_multicast: int
    """Pings to a multicast group."""
    dropped_icmp_not_unicast: int
    """Pings from or to an address that no host may have."""
    dropped_icmp_quoted: int
    """ICMP errors that quote nothing of ours."""
    dropped_icmp_truncated: int
    """ICMP messages cut short."""
    dropped_icmp_type: int
    """ICMP messages of a type that is ignored."""
    dropped_ip_link_local: int
    """Packets of IPv6 from or to a link-local address, which are not forwarded."""
    dropped_ip_protocol: int
    """Packets of a protocol that is not carried."""
    dropped_ip_source_foreign: int
    """Packets from an address that is not of the subnet, see `Uplink`."""
    dropped_ip_source_ours: int
    """Packets from an address of ours."""
    dropped_ip_ttl: int
    """Packets whose TTL or hop limit ran out."""
    dropped_ipv4_checksum: int
    """IPv4 headers with a wrong checksum."""
    dropped_ipv4_header: int
    """IPv4 headers that are invalid."""
    dropped_ipv4_length: int
    """IPv4 packets with a wrong length."""
    dropped_ipv4_truncated: int
    """IPv4 packets cut short."""
    dropped_ipv6_extension: int
    """Extension headers of IPv6 that are invalid."""
    dropped_ipv6_extensions: int
    """IPv6 packets with too many extension headers."""
    dropped_ipv6_header: int
    """IPv6 headers that are invalid."""
    dropped_ipv6_length: int
    """IPv6 packets with a wrong length."""
    dropped_ipv6_next_header: int
    """IPv6 headers that name no header that may follow."""
    dropped_ipv6_off: int
    """IPv6 packets while IPv6 is off."""
    dropped_ipv6_option: int
    """Options of IPv6 that forbid further processing."""
    dropped_ipv6_options: int
    """IPv6 packets with too many options."""
    dropped_ipv6_routing: int
    """Routing headers of IPv6, which are not followed."""
    dropped_ipv6_truncated: int
    """IPv6 packets cut short."""
    dropped_limit_descriptors: int
    """Flows ended, or SYNs forgotten, to make room for others: the process has no more descriptors."""
    dropped_limit_echo_flows: int
    """Ping flows ended for others, see `Limits.echo_flows`."""
    dropped_limit_fragments: int
    """Incomplete packets dropped for others, see `Limits.fragments`."""
    dropped_limit_held: int
    """Datagrams of flows that wait for `on_flow`, beyond those that are kept."""
    dropped_limit_neighbours: int
    """Link addresses forgotten for others, see `Limits.neighbours`."""
    dropped_limit_tcp_connections: int
    """SYNs refused, see `Limits.tcp_connections`."""
    dropped_limit_tcp_memory: int
    """Segments not taken, see `Limits.tcp_memory`."""
    dropped_limit_tcp_out_of_order: int
    """Segments beyond a hole not kept, see `Limits.tcp_out_of_order`."""
    dropped_limit_tcp_pending: int
    """SYNs on hold forgotten, see `Limits.tcp_pending`."""
    dropped_limit_tcp_time_waits: int
    """Ended connections forgotten for others, see `Limits.tcp_time_waits`."""
    dropped_limit_udp_flows: int
    """UDP flows ended for others, see `Limits.udp_flows`."""
    dropped_limit_waiting_frames: int
    """Frames dropped that waited for a link address, see `Limits.waiting_frames`."""
    dropped_ndp_header: int
    """Neighbour discovery that does not come from this link."""
    dropped_ndp_option: int
    """Options of neighbour discovery that are invalid."""
    dropped_ndp_probe: int
    """Probes for duplicates, ARP's included, that are invalid."""
    dropped_ndp_solicited: int
    """Solicited advertisements to a group."""
    dropped_ndp_source: int
    """Neighbour discovery, or ARP, from an address that no host may have."""
    dropped_ndp_target: int
    """Neighbour discovery about an address that no host may have."""
    dropped_ndp_truncated: int
    """Neighbour discovery cut short."""
    dropped_ndp_type: int
    """Neighbour discovery of a type that is not known."""
    dropped_service_reply: int
    """Answers of a service that could not be sent."""
    dropped_tcp_broadcast: int
    """TCP segments to a broadcast address."""
    dropped_tcp_multicast: int
    """TCP segments to a multicast group."""
    dropped_tcp_not_unicast: int
    """SYNs from or to an address that no host may have."""
    dropped_tcp_no_timestamp: int
    """TCP segments without the timestamp that was agreed on."""
    dropped_tcp_offset: int
    """TCP headers with a wrong length."""
    dropped_tcp_old_timestamp: int
    """TCP segments with a timestamp of the past (PAWS)."""
    dropped_tcp_stray: int
    """TCP segments of no connection, answered with RST."""
    dropped_tcp_truncated: int
    """TCP segments cut short."""
    dropped_udp_broadcast: int
    """Datagrams to a broadcast address."""
    dropped_udp_filtered: int
    """Datagrams for the guest from an address that it has not sent to."""
    dropped_udp_length: int
    """Datagrams with a wrong length, or too long to be sent to the guest."""
    dropped_udp_multicast: int
    """Datagrams to a multicast group."""
    dropped_udp_ports: int
    """Datagrams of clients of a forwarded port, dropped because no port was left."""
    dropped_udp_segments: int
    """Super-datagrams of more segments than a kernel makes."""
    dropped_udp_source: int
    """Datagrams from an address that no host may have."""
    dropped_udp_truncated: int
    """Datagrams cut short."""
    dropped_unresolved: int
    """Frames for the guest dropped because its link address is unknown."""
    dropped_virtio_truncated: int
    """Frames without a whole virtio header."""
    dhcp_sent_offer: int
    """DHCPOFFER messages sent."""
    dhcp_sent_ack: int
    """DHCPACK messages sent."""
    dhcp_sent_nak: int
    """DHCPNAK messages sent."""
    dhcp_dropped_client_id: int
    """DHCP messages with a client identifier that is invalid."""
    dhcp_dropped_exhausted: int
    """DHCP messages for which there was no address left."""
    dhcp_dropped_hardware_address: int
    """DHCP messages whose link address is not the frame's."""
    dhcp_dropped_hardware_length: int
    """DHCP messages whose link address is not of Ethernet."""
    dhcp_dropped_magic: int
    """DHCP messages without DHCP's magic number."""
    dhcp_dropped_no_address: int
    """DHCP messages without an address that they need."""
    dhcp_dropped_no_lease: int
    """DHCP messages about an unknown lease."""
    dhcp_dropped_no_request: int
    """DHCP messages that are no requests."""
    dhcp_dropped_option_length: int
    """DHCP messages with an option of a wrong length."""
    dhcp_dropped_other_server: int
    """DHCP messages meant for another server."""
    dhcp_dropped_overload: int
    """DHCP messages with an overload option that is invalid."""
    dhcp_dropped_port: int
    """DHCP messages from another port than a client's."""
    dhcp_dropped_relay_foreign: int
    """DHCP messages by a relay agent of another network."""
    dhcp_dropped_truncated: int
    """DHCP messages cut short."""
    dhcp_dropped_type: int
    """DHCP messages of a type that no client sends."""
    dhcp6_sent_advertise: int
    """DHCPv6 messages of type ADVERTISE sent."""
    dhcp6_sent_reply: int
    """DHCPv6 messages of type REPLY sent."""
    dhcp6_dropped_associations: int
    """DHCPv6 messages with more associations than are served."""
    dhcp6_dropped_duid: int
    """DHCPv6 messages with a DUID that is invalid."""
    dhcp6_dropped_exhausted: int
    """DHCPv6 messages for which there was no address left."""
    dhcp6_dropped_no_address: int
    """DHCPv6 messages without an address that they need."""
    dhcp6_dropped_no_client_id: int
    """DHCPv6 messages without the client's DUID."""
    dhcp6_dropped_option_length: int
    """DHCPv6 messages with an option of a wrong length."""
    dhcp6_dropped_other_server: int
    """DHCPv6 messages meant for another server."""
    dhcp6_dropped_port: int
    """DHCPv6 messages from another port than a client's."""
    dhcp6_dropped_server_id: int
    """DHCPv6 messages with or without a server's DUID against the rules."""
    dhcp6_dropped_truncated: int
    """DHCPv6 messages cut short."""
    dhcp6_dropped_type: int
    """DHCPv6 messages of a type that no client sends."""
    dhcp6_dropped_unicast: int
    """DHCPv6 messages sent by unicast, which was not allowed."""


def complete(counted: Mapping[str, int]) -> Stats:
    """Make the complete record; what was not counted is 0."""
    return cast("Stats", {name: counted.get(name, 0) for name in Stats.__annotations__})
