"""The options of `netns-kit run` and `attach` that say what a namespace's network is like."""

from __future__ import annotations

import argparse
import inspect
from functools import partial
from typing import Any, get_args

from netns_kit import arguments
from netns_kit.dns import Record
from netns_kit.forwarder.ports import MODES
from netns_kit.forwarder.specs import SYNTAX, parse_all, parse_reverse
from netns_kit.forwarder.specs import parse as parse_ports
from netns_kit.gateway.setup import DriverName
from netns_kit.namespace.namespace import Namespace
from netns_kit.network.network import DEFAULT_IFNAME, DEFAULT_MTU, Network
from netns_kit.subnet import DEFAULT_CIDR, DEFAULT_CIDR6, SMALLEST_IPV6_MTU, Subnet, Subnet6
from netns_kit.tap.device import QUEUES_MAX, TAP_MTU_MAX, check_mtu
from netns_kit.uplink.dns_settings import DnsSettings
from netns_kit.uplink.flow import DNS_PORT, Endpoint
from netns_kit.uplink.uplink import UdpFiltering, Uplink, source_address

from .command_line import HOST_LOOPBACK, Parser, assigned, repeatable, value, whole_number
from .faults import add_faults_options
from .policy import add_policy_options, check_policy, policy_of
from .program import notice
from .proxy import add_proxy_options, uplink_from

_ALL_PORTS = "all"
_DOMAIN = "DOMAIN=ADDRESS[:PORT]"


def add_network_options(parser: Parser) -> None:
    """Declare the options."""
    _add_ports(parser)
    _add_link(parser)
    _add_reach(parser)
    add_policy_options(parser)
    add_faults_options(parser)
    _add_dns(parser)
    _add_stack(parser)
    _add_source(parser)


def _add_ports(parser: Parser) -> None:
    syntax = SYNTAX.replace("%", "%%")  # as argparse has it
    repeatable(
        parser, "-p", "--publish", dest="ports", check=parse_ports, metavar="SPEC",
        help=f"forward ports of the host: {syntax}; without ADDRESS on all of the host's IPv4 addresses; port 0: any "
        "that is free, told on standard error; also auto, all, lists with ~ for what is left out, and unix:PATH on "
        "either side (docs/ports.md)",
    )  # fmt: skip
    parser.add_argument(
        "--port-mode",
        choices=MODES,
        help="how connections to forwarded ports get inside, where SPEC has no mode=: through the stack, from the "
        "client's address (stack); by a socket inside, which also reaches its loopback addresses (socket), or one "
        "with the client's address (transparent); or as the listening socket that the command is given (fd).  The "
        "default is socket for unix sockets and loopback addresses inside, else stack",
    )
    repeatable(
        parser, "-R", "--reverse", check=parse_reverse, metavar="SPEC",
        help="lead a port inside out: [tcp:|udp:][INSIDE:]PORT:[ADDRESS:]PORT[/PROTO], either end also unix:PATH "
        "(inside unix:@NAME is the namespace's alone); without INSIDE on 127.0.0.1 there; the host's loopback is "
        "reached by this whatever --host-loopback says",
    )  # fmt: skip


def _add_link(parser: Parser) -> None:
    parser.add_argument(
        "--mtu", type=whole_number(lambda number: check_mtu(number, TAP_MTU_MAX)), default=DEFAULT_MTU,
        help="of the namespace's interface (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--cidr", dest="subnet", type=value(Subnet.parse), default=DEFAULT_CIDR, metavar="CIDR",
        help="the namespace's network (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--ipv6", action="store_true", help="IPv6 too; where there is none, IPv4 is served")
    parser.add_argument(
        "--cidr6", type=value(Subnet6), metavar="PREFIX/64",
        help=f"the namespace's IPv6 network ({DEFAULT_CIDR6}); it implies --ipv6",
    )  # fmt: skip
    parser.add_argument(
        "--dhcp", dest="by_dhcp", action="store_true",
        help="leave the interface without an address, for the command's own DHCP client; forwarded ports lead to "
        "the address that it gets",
    )  # fmt: skip


def _add_reach(parser: Parser) -> None:
    repeatable(
        parser, HOST_LOOPBACK, dest="allow_host_loopback", check=_check_port, metavar="PORT",
        help="let the gateway's address mean the host's 127.0.0.1, and of IPv6 ::1: on all ports or, with =PORT, on "
        "that one",
    )  # fmt: skip
    add_proxy_options(parser)
    parser.add_argument(
        "--no-host-addresses", dest="allow_host_addresses", action="store_false",
        help="refuse the host's own addresses, at which its services listen; --host-loopback is apart from it",
    )  # fmt: skip
    parser.add_argument(
        "--no-link-local", dest="allow_link_local", action="store_false",
        help="refuse link-local addresses, and those at which clouds tell a machine its credentials",
    )  # fmt: skip


def _add_dns(parser: Parser) -> None:
    repeatable(
        parser, "--dns", default=None, check=lambda text: Endpoint.parse(text, DNS_PORT),
        metavar="ADDRESS[:PORT]", help="a resolver to use instead of the host's",
    )  # fmt: skip
    repeatable(
        parser, "--dns-domain", dest="dns_domains", check=_check_domain, metavar=_DOMAIN,
        help="a resolver for names in that domain",
    )  # fmt: skip
    repeatable(
        parser, "--dns-record", dest="records", check=Record.parse, metavar="NAME=ADDRESS",
        help="a name that is resolved here",
    )  # fmt: skip
    repeatable(
        parser, "--dns-search", default=None, check=lambda text: DnsSettings(search=[text]), metavar="DOMAIN",
        help="where to look short names up, instead of the host's search list; . for nowhere",
    )  # fmt: skip
    parser.add_argument(
        "--no-dns-cache", dest="dns_cache", action="store_false", help="ask the resolvers each time"
    )
    parser.add_argument(
        "--intercept-dns",
        action="store_true",
        help="answer DNS to any address as at the DNS address: whoever is asked, these names and resolvers answer",
    )


def _add_stack(parser: Parser) -> None:
    parser.add_argument(
        "--udp-filtering", choices=get_args(UdpFiltering), default=get_args(UdpFiltering)[0],
        help="whose datagrams may come in to a UDP port opened inside: of those it has sent to (the default), or "
        'anybody\'s ("full cone")',
    )  # fmt: skip
    parser.add_argument(
        "--driver", choices=get_args(DriverName), default="thread",
        help="where the stack runs: on a thread (the default), on the event loop, or in a sandboxed worker process",
    )  # fmt: skip
    parser.add_argument(
        "--queues", type=whole_number(lambda number: arguments.whole_number("queues", number, 1, QUEUES_MAX)),
        default=1, metavar="N",
        help="with --driver worker: share the connections out among N processes (%(default)s)",
    )  # fmt: skip


def _add_source(parser: Parser) -> None:
    for version, what in ((4, "source address of outgoing connections"), (6, "the same for IPv6")):
        check = partial(source_address, version=version)
        parser.add_argument(f"--bind{version}", type=value(check), metavar="ADDRESS", help=what)
    parser.add_argument(
        "--device", type=value(lambda text: Uplink(device=text)), metavar="NAME",
        help="interface that outgoing connections are bound to",
    )  # fmt: skip


def network_from(
    options: argparse.Namespace, namespace: Namespace | None = None, ifname: str = DEFAULT_IFNAME
) -> Network:
    """Return the network that `add_network_options` ask for: each option is the argument of that name."""
    asked = {
        **vars(options),
        "ports": (),  # see `publish`
        "policy": policy_of(options),
        "allow_host_loopback": _loopback(options.allow_host_loopback),
        "dns": DnsSettings(
            options.dns,
            domains=_domains(options.dns_domains),
            search=options.dns_search,
            cache=options.dns_cache,
        ),
        "ipv6": _ipv6(options),
        "configure": "link" if options.by_dhcp else True,
        "namespace": namespace,
        "ifname": ifname,
    }
    uplink = uplink_from(options, {**_arguments_of(Uplink, asked), "policy": None})  # the network has it
    return Network(**{**_arguments_of(Network, asked), "uplink": uplink})


def _arguments_of(kind: type, asked: dict[str, Any]) -> dict[str, Any]:
    return {name: asked[name] for name in inspect.signature(kind).parameters if name in asked}


def with_value(word: str) -> str:
    """A bare --host-loopback is for all ports."""
    return f"{word}={_ALL_PORTS}" if word == HOST_LOOPBACK else word


def check_options(parser: Parser, options: argparse.Namespace) -> None:
    """Complain of options that need others."""
    if options.queues > 1 and options.driver != "worker":
        parser.error(f"--queues {options.queues}: it needs --driver worker")
    if (options.ipv6 or options.cidr6 is not None) and options.mtu < SMALLEST_IPV6_MTU:
        parser.error(f"--mtu {options.mtu}: --ipv6 needs {SMALLEST_IPV6_MTU} or more")
    check_policy(parser, options)


async def publish(network: Network, options: argparse.Namespace) -> None:
    """Forward the ports, once we may have as many descriptors as there are, and tell those asked for as port 0."""
    asked = [each.settled(options.port_mode) for each in parse_all(options.ports)]
    known = set(asked)
    for forward in await network.forwarder.add(*asked):
        if forward not in known:
            notice(f"netns-kit: {forward}")
    for reverse in network.forwarder.reverses():
        if reverse not in network.reverse:
            notice(f"netns-kit: {reverse}")


def _domains(values: list[str]) -> dict[str, list[str]]:
    domains: dict[str, list[str]] = {}
    for each in values:
        domain, resolver = assigned(each, _DOMAIN)
        domains.setdefault(domain, []).append(resolver)
    return domains


def _loopback(values: list[str]) -> bool | frozenset[int]:
    if _ALL_PORTS in values:
        return True
    return frozenset(int(value) for value in values)


def _ipv6(options: argparse.Namespace) -> Subnet6 | bool:
    if not options.ipv6 and options.cidr6 is None:
        return False
    by_dhcp: bool = options.by_dhcp
    return Subnet6(options.cidr6 or DEFAULT_CIDR6, managed=by_dhcp, other=by_dhcp)


def _check_port(text: str) -> None:
    if text != _ALL_PORTS and not (text.isdigit() and 0 < int(text) < 65536):
        raise ValueError(f"{text!r}: expected a port, 1 to 65535")


def _check_domain(text: str) -> None:
    DnsSettings(domains=_domains([text]))
