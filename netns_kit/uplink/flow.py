"""What is said of a flow before anything carries it: its endpoints, where it goes, which way it leaves."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Literal, NamedTuple

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.errors import AddressError, ArgumentError
from netns_kit.frozen import frozen
from netns_kit.subnet import Subnet

if TYPE_CHECKING:
    from typing_extensions import Self

Protocol = Literal["tcp", "udp", "icmp"]
DNS_PORT = 53
_ENDPOINT = re.compile(
    r"""^(?: (?: \[(?P<ipv6>[^\]]+)\] | (?P<ipv4>[0-9.]+) ) (?: :(?P<port>[0-9]{1,5}) )?
    | (?P<bare>[^\[\]]*:[^\[\]]*:[^\[\]]*) )$""",
    re.VERBOSE,
)


class _Endpoint(NamedTuple):
    address: Address
    port: int


class Endpoint(_Endpoint):
    """An address and a port.  For ICMP the port is the identifier, or 0.

    Raises `AddressError` for text that is no address, `ArgumentError` and `ArgumentTypeError` for what is no port.

    >>> str(Endpoint("2001:db8::1", 443))
    '[2001:db8::1]:443'
    """

    __slots__ = ()

    def __new__(cls, address: AddressLike, port: int) -> Self:
        arguments.port("port", port)
        return cls._make((arguments.address(address), port))

    def __reduce__(self) -> tuple[Callable[[str, int], Endpoint], tuple[str, int]]:
        return _endpoint, (str(self.address), self.port)  # an IPv6Address leaves its zone behind

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"

    @classmethod
    def parse(cls, text: AddressLike | Endpoint, default_port: int) -> Endpoint:
        """Return the endpoint that ADDRESS, IPV4:PORT or [IPV6]:PORT means, or an address, or an endpoint.

        Raises `AddressError`, and `ArgumentTypeError` for what has no such type.
        """
        if isinstance(text, Endpoint):
            return text
        if not isinstance(text, str):
            return cls(text, default_port)
        found = _ENDPOINT.match(text)
        try:
            if found is None:
                raise ValueError(text)
            port = int(found["port"] or default_port)
            if not 0 < port < 65536:
                raise ValueError(port)
            return cls(ip_address(found["ipv6"] or found["ipv4"] or found["bare"]), port)
        except ValueError as error:
            raise AddressError(
                f"{text!r}: expected ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT", fix="resolve names first"
            ) from error


def _endpoint(address: str, port: int) -> Endpoint:
    return Endpoint(address, port)


@frozen
class Flow:
    """A flow that the namespace opens, as its first packet names it, and the subnet it came from."""

    protocol: Literal["tcp", "udp", "icmp"]
    source: Endpoint
    destination: Endpoint
    subnet: Subnet
    served: bool = False
    """Whether the process that runs the stack answers it itself, as it does at the DNS address, if it may pass."""


@frozen
class Target:
    """The host's side of a flow: the first of these endpoints that answers.

    None of them: to nobody outside.  So a flow may go that is answered here (`Flow.served`); any other is refused.

    Raises:
        ArgumentError: something in the tuple is no `Endpoint`.
        ArgumentTypeError: it is no tuple.
    """

    endpoints: tuple[Endpoint, ...] = ()

    def __post_init__(self) -> None:
        given: object = self.endpoints
        if type(given) is not tuple or (given and type(given[0]) is not Endpoint):
            arguments.instance("endpoints", given, tuple, "a tuple of Endpoint")
            fix = "to refuse a flow, return a Refusal"
            raise ArgumentError("expected a tuple of Endpoint", "endpoints", arguments.shown(given), fix)


class Way(NamedTuple):
    """The way that datagrams leave by a socket that is there already."""

    source: str | None
    """The address they leave from; None: the socket's own."""
    interface: int
    """The index of the interface; 0: whichever the socket would take."""
