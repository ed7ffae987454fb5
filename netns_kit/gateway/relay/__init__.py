"""Relays: each connects flows of the stack to sockets of the host.

`TcpRelay` connects a connection of the guest to a stream socket.  `UdpRelay` connects the flows of a guest's endpoint
to one datagram socket.  `PingRelay` connects an echo flow to a ping socket.  `DnsRelay` connects the DNS server to
sockets of its upstreams, and `ClientStream` a connection of the guest to the DNS server.  A relay owns its sockets.
When either side ends, it closes them and tells the other side.

Errors of the host's sockets reach the guest as it would have seen them without us: an ICMP error as it arrived, else
the error that fits the errno.  The host's packets have the TTL, traffic class and "don't fragment" bit of the guest's
packets.  `netns_kit.uplink.sockets` does both.

Stream sockets are edge-triggered, so `TcpRelay` remembers whether there may be more to read.  A relay reads no more
than the stack has room for, and only a few buffers in each step, so that one busy flow does not starve the others.
"""

from .batches import Inbox, Outbox
from .dns import DnsRelay
from .dns_streams import ClientStream
from .ping import PingRelay
from .tcp import TcpRelay
from .udp import UdpRelay

__all__ = ["ClientStream", "DnsRelay", "Inbox", "Outbox", "PingRelay", "TcpRelay", "UdpRelay"]
