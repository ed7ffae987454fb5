"""The DNS forwarder at 10.0.2.3, without its sockets.

    query --> DnsServer: hook? --> Zone: ours? --> cache: known? --> DnsProxy: whom to ask --> Send
                                                                                  Answer <-- response

`DnsServer` decides who answers: a function of the caller's, the names we own (`Zone`, made of `Record`), a cache, or
the host's resolvers, by way of `DnsProxy`, which relays byte for byte.  `parse_resolv_conf` says which resolvers they
are, and `parse_untrusted` reads as much of a hostile message as all of them need.  How a message has come, in a
datagram or in a stream (`Framing`), makes no difference.

Law of this package: no socket, no clock, no log, no file.
"""

from __future__ import annotations

from netns_kit.dns.framing import Framing, framed
from netns_kit.dns.manner import Manner
from netns_kit.dns.message import BadMessage, Rcode, parse_untrusted
from netns_kit.dns.proxy import Action, Answer, DnsProxy, DnsTransport, Send, Upstream
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
