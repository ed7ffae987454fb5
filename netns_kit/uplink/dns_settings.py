"""DnsSettings: how the names of a namespace are resolved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
        servers: the resolvers behind the namespace's DNS address, `ADDRESS[:PORT]`; None: those of the host; empty:
            nobody, and only names of our own are resolved (see `UserStack.add_record`).
        domains: resolvers for names in certain domains; the longest domain that fits counts, and an empty list is
            nobody.
        search: the search list for programs inside; None: the host's.
        hook: a plain function, asked about each query before all else; see `netns_kit.dns.DnsQuery` and
            `netns_kit.dns.server.Verdict` for what it is told and may say.  It should be quick, and a worker imports
            it by name, as the policy of an `Uplink`.  If it raises, or says something else, the query is answered
            with SERVFAIL and that is logged.
        cache: whether answers are kept, for as long as they allow.
        resolv_conf: the file that says which the host's resolvers are, followed when it changes.

    Raises:
        AddressError: what is given for a resolver is no address or port.
        DomainNameError: what is given for a domain is none.
        ArgumentTypeError: something has no such type, a coroutine function among them.
    """

    servers: tuple[Endpoint, ...] | None
    domains: Mapping[str, tuple[Endpoint, ...]]
    search: tuple[str, ...] | None
    hook: Hook | None
    cache: bool
    resolv_conf: str

    def __init__(
        self,
        servers: Iterable[AddressLike | Endpoint] | None = None,
        *,
        domains: Mapping[str, Iterable[AddressLike | Endpoint]] | None = None,
        search: Iterable[str] | None = None,
        hook: Hook | None = None,
        cache: bool = True,
        resolv_conf: str = RESOLV_CONF,
    ) -> None:
        arguments.plain_function("hook", hook)
        if domains is not None:
            arguments.mapping(
                "domains", domains, 'domains and their resolvers, like {"corp.example": [...]}, or None'
            )
        if search is not None:
            arguments.items("search", search, "a list of domains, or None")
        arguments.boolean("cache", cache)
        arguments.text("resolv_conf", resolv_conf, "the path of a file")
        arguments.fill(
            self,
            servers=None if servers is None else resolvers("servers", servers),
            domains={
                to_text(to_wire(domain, "domains")): resolvers(f"domains[{domain!r}]", given)
                for domain, given in (domains or {}).items()
            },
            search=None if search is None else tuple(to_text(to_wire(each, "search")) for each in search),
            hook=hook,
            cache=cache,
            resolv_conf=resolv_conf,
        )

    @classmethod
    def of(cls, given: Iterable[AddressLike | Endpoint] | DnsSettings | None) -> DnsSettings:
        """Return the settings that `Uplink(dns=given)` means.

        Args:
            given: settings, a list of resolvers, or None for the defaults.

        Raises:
            AddressError: what is given for a resolver is no address or port.
            ArgumentTypeError: it is neither settings nor a list of addresses.
        """
        if isinstance(given, DnsSettings):
            return given
        return cls(None if given is None else resolvers("dns", given))


def resolvers(name: str, given: Iterable[AddressLike | Endpoint]) -> tuple[Endpoint, ...]:
    """Return the endpoints that a list of resolvers means.

    Raises:
        AddressError: one of them is no address or port.
        ArgumentTypeError: it is no list of addresses.
    """
    arguments.items(name, given, "a list of addresses")
    return tuple(Endpoint.parse(each, DNS_PORT) for each in given)


def shortest(settings: DnsSettings) -> list[str] | DnsSettings | None:
    """Return what `Uplink(dns=...)` is given for these settings, as short as it can be."""
    if settings != DnsSettings(settings.servers):
        return settings
    return None if settings.servers is None else [*map(str, settings.servers)]
