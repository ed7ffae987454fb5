"""DnsSettings: how the names of a namespace are resolved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from netns_kit import arguments
from netns_kit.arguments import AddressLike
from netns_kit.dns.server import Hook
from netns_kit.domain_names import to_text, to_wire
from netns_kit.frozen import frozen

from .flow import DNS_PORT, Endpoint

RESOLV_CONF = "/etc/resolv.conf"


@frozen
class DnsSettings:
    """Settings of DNS, for `Uplink`.  `Uplink(dns=[...])` is short for `Uplink(dns=DnsSettings([...]))`.

    >>> settings = DnsSettings(["192.0.2.53"], domains={"corp.example": ["10.1.0.53"]}, cache=False)
    >>> str(settings.domains["corp.example"][0])
    '10.1.0.53:53'

    Args:
        servers: The resolvers that the DNS server asks, `ADDRESS[:PORT]`.  None, the default: those of the host.  An
            empty list: none, so that only our own names are resolved (see `UserStack.add_record`).
        domains: Other resolvers for the names in certain domains.  If a name is in several of these domains, the
            longest one counts.  An empty list: names in that domain are not resolved.
        search: The search list for programs inside; None: the host's.
        hook: A plain function that is called with each query before anything else answers it.
            `netns_kit.dns.DnsQuery` is its argument and `netns_kit.dns.server.Verdict` its result.  It should be
            quick.  A worker imports it by name, as it does the policy of an `Uplink`.  If it raises or returns
            anything else, the query is answered with SERVFAIL, and the failure is logged.
        cache: Whether answers are kept for as long as their TTL allows.
        resolv_conf: The file that names the host's resolvers.  It is read again when it changes.
        unknown: The result code of the answer about a name that there is no resolver for: "servfail", so that a
            program may ask elsewhere, or "nxdomain", so that it knows that there is no such name.

    Raises:
        ArgumentError: There is no such result code.
        AddressError: A resolver is not an address or ADDRESS:PORT.
        DomainNameError: A domain is not a domain name.
        ArgumentTypeError: An argument has the wrong type; a `hook` that is a coroutine function is one case.
    """

    servers: tuple[Endpoint, ...] | None
    domains: Mapping[str, tuple[Endpoint, ...]]
    search: tuple[str, ...] | None
    hook: Hook | None
    cache: bool
    resolv_conf: str
    unknown: Literal["servfail", "nxdomain"]

    def __init__(
        self,
        servers: Iterable[AddressLike | Endpoint] | None = None,
        *,
        domains: Mapping[str, Iterable[AddressLike | Endpoint]] | None = None,
        search: Iterable[str] | None = None,
        hook: Hook | None = None,
        cache: bool = True,
        resolv_conf: str = RESOLV_CONF,
        unknown: Literal["servfail", "nxdomain"] = "servfail",
    ) -> None:
        arguments.plain_function("hook", hook)
        if domains is not None:
            arguments.mapping(
                "domains", domains, 'domains and their resolvers, like {"corp.example": [...]}, or None'
            )
        if search is not None:
            arguments.items("search", search, "a list of domains, or None")
            search = tuple(to_text(to_wire(each, "search")) for each in search)
        arguments.boolean("cache", cache)
        arguments.text("resolv_conf", resolv_conf, "the path of a file")
        arguments.one_of("unknown", unknown, ("servfail", "nxdomain"))
        servers = None if servers is None else resolvers("servers", servers)
        domains = {
            to_text(to_wire(domain, "domains")): resolvers(f"domains[{domain!r}]", given)
            for domain, given in (domains or {}).items()
        }
        arguments.fill(self, locals())

    @classmethod
    def of(cls, given: Iterable[AddressLike | Endpoint] | DnsSettings | None) -> DnsSettings:
        """Return the settings that `Uplink(dns=given)` means.

        Args:
            given: Settings, a list of resolvers, or None for the defaults.

        Raises:
            AddressError: A resolver is not an address or ADDRESS:PORT.
            ArgumentTypeError: It is neither settings nor a list of addresses.
        """
        if isinstance(given, DnsSettings):
            return given
        return cls(None if given is None else resolvers("dns", given))


def resolvers(name: str, given: Iterable[AddressLike | Endpoint]) -> tuple[Endpoint, ...]:
    """Return the endpoints that a list of resolvers describes.

    Raises:
        AddressError: One of them is not an address or ADDRESS:PORT.
        ArgumentTypeError: It is not a list of addresses.
    """
    arguments.items(name, given, "a list of addresses")
    return tuple(Endpoint.parse(each, DNS_PORT) for each in given)


def shortest(settings: DnsSettings) -> list[str] | DnsSettings | None:
    """Return the shortest argument for `Uplink(dns=...)` that gives these settings."""
    if settings != DnsSettings(settings.servers):
        return settings
    return None if settings.servers is None else [*map(str, settings.servers)]
