"""Relays: one flow of the stack beside one socket of the host.

`TcpRelay` joins a connection and a stream socket, `UdpRelay` a guest endpoint's flows and one datagram socket,
`PingRelay` an echo flow and a ping socket, `DnsRelay` the DNS server and its upstream sockets; a `ClientStream` is a
connection to that.
A relay owns its sockets: whatever ends first, the guest's side or the host's, it closes them and tells the other.

What the host's sockets report becomes what the guest would have seen without us: an ICMP error as it came
(`HostError`), else what `refusal_for` makes of the errno.  What the guest's packets ask of a router, TTL, traffic
class and not to be fragmented, the host's packets carry (`Marks`).

Stream sockets are edge-triggered: `TcpRelay` remembers that there may be more to read.  A relay reads no more than
the stack has room for, and no more than a few buffers per step, so one busy flow starves nobody.
"""

from .batches import Inbox, Outbox
from .dns import DnsRelay
from .dns_streams import ClientStream
from .ping import PingRelay
from .sockets import HostError, Marks, refusal_for
from .tcp import TcpRelay
from .udp import UdpRelay

__all__ = [
    "ClientStream",
    "DnsRelay",
    "HostError",
    "Inbox",
    "Marks",
    "Outbox",
    "PingRelay",
    "TcpRelay",
    "UdpRelay",
    "refusal_for",
]
