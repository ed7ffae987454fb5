"""What is known of a flow before it is carried: the flow, its target, and how its packets leave."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.errors import AddressError, ArgumentError
from netns_kit.frozen import frozen
from netns_kit.stack import Transport
from netns_kit.subnet import Subnet

if TYPE_CHECKING:
    from typing_extensions import Self

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
    """An address and a port.

    Args:
        address: Text, or an object of `ipaddress`.
        port: A number from 0 to 65535.  For ICMP it is the identifier, or 0.

    Raises:
        AddressError: The text is not an address.
        ArgumentError: The port is out of range.
        ArgumentTypeError: An argument has the wrong type.

    >>> str(Endpoint("2001:db8::1", 443))
    '[2001:db8::1]:443'
    """

    __slots__ = ()

    def __new__(cls, address: AddressLike, port: int) -> Self:
        arguments.port("port", port)
        return cls._make((arguments.address(address), port))

    def __reduce__(self) -> tuple[Callable[[str, int], Endpoint], tuple[str, int]]:
        return _endpoint, (str(self.address), self.port)  # a pickled IPv6Address would lose its zone

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"

    @classmethod
    def parse(cls, text: AddressLike | Endpoint, default_port: int) -> Endpoint:
        """Return the endpoint that a text describes.  An address gets the default port; an endpoint is returned as it
        is.

        Args:
            text: ADDRESS, IPV4:PORT or [IPV6]:PORT, as text; or an address; or an `Endpoint`.
            default_port: The port of an address without a port.

        Raises:
            AddressError: The text does not describe an endpoint.
            ArgumentError: The default port is out of range.
            ArgumentTypeError: An argument has the wrong type.
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
            expected = "expected ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT"
            raise AddressError(expected, "address", arguments.shown(text), "resolve names first") from error


def _endpoint(address: str, port: int) -> Endpoint:
    return Endpoint(address, port)


@frozen
class Flow:
    """A flow that the namespace opens, as its first packet describes it."""

    protocol: Transport
    """Transport of the flow."""
    source: Endpoint
    """Address and port in the namespace."""
    destination: Endpoint
    """Address and port that the program inside wants to reach."""
    subnet: Subnet
    """Subnet of the namespace, with the addresses of the gateway."""
    served: bool = False
    """True if the process that runs the stack answers the flow itself, as at the DNS address."""

    @property
    def name(self) -> str | None:
        """The name of the destination, if the uplink wants to know it and our DNS has answered with the address."""
        return None

    @property
    def is_by_name(self) -> bool:
        """True if the destination's address stands for a name, and leads nowhere (`netns_kit.dns.stand_ins`)."""
        return False


class NamedFlow(Flow):
    """A flow whose destination's name is known, for an uplink that wants to know it (`Uplink.wants_names`).

    Attributes:
        may_be_told: Whether a proxy may be told the name instead of the address.  A policy that has decided about the
            address has not decided about what a proxy makes of the name.
    """

    __slots__ = ("_is_by_name", "_name", "may_be_told")

    _name: str | None
    _is_by_name: bool
    may_be_told: bool

    @classmethod
    def of(cls, flow: Flow, name: str | None, *, is_by_name: bool = False) -> NamedFlow:
        """Return a flow with the name of its destination.  A stand-in may stand for none any more."""
        made = cls(flow.protocol, flow.source, flow.destination, flow.subnet, flow.served)
        object.__setattr__(made, "_name", name)
        object.__setattr__(made, "_is_by_name", is_by_name)
        object.__setattr__(made, "may_be_told", False)
        return made

    @property
    def name(self) -> str | None:
        return self._name

    @property
    def is_by_name(self) -> bool:
        return self._is_by_name

    def allow_telling(self) -> None:
        """Let a proxy be told the name."""
        object.__setattr__(self, "may_be_told", True)


@frozen
class Target:
    """A destination for a flow, as the host sees it.

    Args:
        candidates: Addresses and ports, in the order in which they are tried; the first that answers is used.  Only a
            flow that this process answers itself (`Flow.served`) may have none; any other is then refused.

    Raises:
        ArgumentError: An item of the tuple is not an `Endpoint`.
        ArgumentTypeError: `candidates` is not a tuple.
    """

    candidates: tuple[Endpoint, ...] = ()

    def __post_init__(self) -> None:
        given: object = self.candidates
        if type(given) is not tuple or (given and type(given[0]) is not Endpoint):
            arguments.instance("candidates", given, tuple, "a tuple of Endpoint")
            fix = "to refuse a flow, return a Refusal"
            raise ArgumentError("expected a tuple of Endpoint", "candidates", arguments.shown(given), fix)


class Way(NamedTuple):
    """The way by which datagrams leave a socket that is already open."""

    source: str | None
    """Source address of the datagrams; None: the address that the socket is bound to."""
    interface: int
    """Index of the interface that they leave by; 0: the kernel chooses."""
