"""The DNS forwarder at 10.0.2.3, without its sockets.

    query --> DnsServer: hook? --> Zone: ours? --> cache: known? --> DnsProxy: which resolver? --> Send
                                                                                        Answer <-- response

`DnsServer` decides what answers a query: the caller's hook, the names we own (`Zone`, made of `Record`), a cache, or
the host's resolvers through `DnsProxy`, which relays byte for byte.  `parse_resolv_conf` says which resolvers those
are, and `parse_untrusted` reads the part of a hostile message that all of them need.  A message is handled alike
whether it came in a datagram or in a stream (`Framing`).

Law of this package: no socket, no clock, no log, no file.
"""

from __future__ import annotations

from netns_kit.dns.exchanges import DnsTransport, Upstream
from netns_kit.dns.framing import Framing, framed
from netns_kit.dns.manner import Manner
from netns_kit.dns.message import BadMessage, Rcode, parse_untrusted
from netns_kit.dns.proxy import Action, Answer, DnsProxy, Send
from netns_kit.dns.records import Record
from netns_kit.dns.resolvconf import ResolvConf
from netns_kit.dns.resolvconf import parse as parse_resolv_conf
from netns_kit.dns.server import DnsQuery, DnsServer, Hook, Verdict
from netns_kit.dns.zone import Zone

__all__ = [
    "Action",
    "Answer",
    "BadMessage",
    "DnsProxy",
    "DnsQuery",
    "DnsServer",
    "DnsTransport",
    "Framing",
    "Hook",
    "Manner",
    "Rcode",
    "Record",
    "ResolvConf",
    "Send",
    "Upstream",
    "Verdict",
    "Zone",
    "framed",
    "parse_resolv_conf",
    "parse_untrusted",
]
