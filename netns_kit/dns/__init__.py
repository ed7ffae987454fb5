"""The DNS forwarder at 10.0.2.3, without its sockets.

`DnsProxy` relays queries and answers between clients and the host's resolvers, `parse_resolv_conf` says which
resolvers those are, `parse_untrusted` reads as much of a hostile message as both need.  Only the UDP half is
here: over TCP a resolver is an ordinary byte stream and is relayed as one.

Law of this package: no socket, no clock, no log, no file.
"""

from __future__ import annotations

from netns_kit.dns.message import BadMessage, parse_untrusted
from netns_kit.dns.proxy import Action, Answer, DnsProxy, Send, Upstream
from netns_kit.dns.resolvconf import ResolvConf
from netns_kit.dns.resolvconf import parse as parse_resolv_conf

__all__ = [
    "Action",
    "Answer",
    "BadMessage",
    "DnsProxy",
    "ResolvConf",
    "Send",
    "Upstream",
    "parse_resolv_conf",
    "parse_untrusted",
]
