"""Port specifications, as people write them.

    [tcp:|udp:][host address][%device][:]host port[-last][:[guest address:]guest port[-last]][/tcp|/udp]

>>> for forward in parse("127.0.0.1:8080:80/tcp"):
...     print(forward)
127.0.0.1:8080 -> 80/tcp
>>> [str(forward) for forward in parse("udp:5000-5001:10.0.2.100:6000-6001")]
['0.0.0.0:5000 -> 10.0.2.100:6000/udp', '0.0.0.0:5001 -> 10.0.2.100:6001/udp']
>>> str(parse("[::1]%lo:8443")[0])
'[::1]%lo:8443 -> 8443/tcp'
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal, cast

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.errors import PortSpecError
from netns_kit.frozen import frozen

EXAMPLE = (
    "expected [tcp:|udp:][ADDRESS:]PORT[-LAST][:[GUEST:]PORT[-LAST]][/PROTO], like 127.0.0.1:8080:80/tcp"
)
ANY = IPv4Address("0.0.0.0")
_PREFIX = re.compile(r"(tcp|udp):(.*)")
_SUFFIX = re.compile(r"(.*)/(tcp|udp)")
_SPEC = re.compile(
    r"""
    (?: (?P<host> \[[^\]]*\] | [0-9]+(?:\.[0-9]+){3} )? (?: %(?P<device>[^:/\s]{1,15}) )? : )?
    (?P<port> [0-9]+ (?: -[0-9]+ )? )
    (?: : (?: (?P<guest> \[[^\]]*\] | [0-9]+(?:\.[0-9]+){3} ) : )? (?P<to> [0-9]+ (?: -[0-9]+ )? ) )?
    """,
    re.VERBOSE,
)


@frozen
class PortForward:
    """One host port that leads to one guest port.

    `host_port` 0: the kernel chooses; what `Forwarder.add` returns has the number.  `guest` None: the namespace's
    configured address.  `device`: the host's interface that it listens on, None for any.

    Raises `PortSpecError` for what is no port, `AddressError` for what is no address, `ArgumentError` for another
    protocol and `ArgumentTypeError` for what has no such type.
    """

    protocol: Literal["tcp", "udp"]
    host: IPv4Address | IPv6Address
    host_port: int
    guest: IPv4Address | IPv6Address | None
    guest_port: int
    device: str | None

    def __init__(
        self,
        protocol: Literal["tcp", "udp"],
        host: AddressLike,
        host_port: int,
        guest: AddressLike | None,
        guest_port: int,
        device: str | None = None,
    ) -> None:
        arguments.one_of("protocol", protocol, ("tcp", "udp"))
        for name, port in (("host_port", host_port), ("guest_port", guest_port)):
            arguments.instance(name, port, int, "a port, as a number")
        if device is not None:
            arguments.text("device", device, "the name of an interface, or None")
        arguments.fill(
            self,
            protocol=protocol,
            host=arguments.address(host, "host"),
            host_port=host_port,
            guest=None if guest is None else arguments.address(guest, "guest"),
            guest_port=guest_port,
            device=device,
        )
        if not 0 <= host_port < 65536 or not 0 < guest_port < 65536:
            raise PortSpecError(f"{self}: expected ports of 1 to 65535, and on the host also 0")

    @property
    def listens_on(self) -> str:
        """The host's side, for messages."""
        host = f"[{self.host}]" if self.host.version == 6 else str(self.host)
        return f"{host}{'%' + self.device if self.device else ''}:{self.host_port}"

    def __str__(self) -> str:
        guest = (
            "" if self.guest is None else f"{self.guest}:" if self.guest.version == 4 else f"[{self.guest}]:"
        )
        return f"{self.listens_on} -> {guest}{self.guest_port}/{self.protocol}"


def parse(spec: str) -> tuple[PortForward, ...]:
    """Return the forwards that `spec` asks for, a range one by one.

    Raises `PortSpecError`, and `ArgumentTypeError` for what is no text.
    """
    arguments.text("spec", spec, "text or a PortForward", 'write it like "127.0.0.1:8080:80/tcp"')
    protocol, rest = "tcp", spec
    prefix, suffix = _PREFIX.fullmatch(spec), _SUFFIX.fullmatch(spec)
    if prefix:
        protocol, rest = prefix.groups()
        suffix = None if suffix is None else _SUFFIX.fullmatch(rest)
    if suffix:
        rest, named = suffix.groups()
        if prefix and named != protocol:
            raise PortSpecError(f"port {spec!r} says both {protocol} and {named}: expected one", fix=EXAMPLE)
        protocol = named
    found = _SPEC.fullmatch(rest)
    if found is None:
        raise PortSpecError(f"port {spec!r} cannot be understood{_hint(rest)}", fix=EXAMPLE)
    host = ANY if found["host"] is None else _address(spec, found["host"])
    guest = None if found["guest"] is None else _address(spec, found["guest"])
    ports = _range(spec, found["port"], lowest=0)
    targets = ports if found["to"] is None else _range(spec, found["to"], lowest=1)
    if len(ports) != len(targets):
        raise PortSpecError(
            f"port {spec!r}: expected as many guest ports as host ports, not {len(ports)} and {len(targets)}",
            fix=EXAMPLE,
        )
    if targets[0] == 0:
        fix = "host port 0 is any that is free, and needs a guest port: 0:80"
        raise PortSpecError(f"port {spec!r}: expected a guest port of 1 to 65535, not 0", fix=fix)
    kind = cast("Literal['tcp', 'udp']", protocol)
    return tuple(
        PortForward(kind, host, port, guest, target, found["device"])
        for port, target in zip(ports, targets, strict=True)
    )


def _address(spec: str, text: str) -> Address:
    try:
        return ip_address(text.strip("[]"))
    except ValueError as error:
        raise PortSpecError(f"port {spec!r}: expected an address, not {text}", fix=EXAMPLE) from error


def _hint(rest: str) -> str:
    """What it probably is that cannot be understood, where that is often written."""
    if found := re.match(r"(?!tcp:|udp:)([A-Za-z][\w.-]*):", rest):
        return f": {found[1]} is no address, and neither tcp nor udp"
    if found := re.search(r"/(?!tcp$|udp$)([^/]*)$", rest):
        return f": {found[1]!r} is neither tcp nor udp"
    if "::" in rest:
        return ": an IPv6 address stands in brackets, like [::1]:8080:80"
    return ""


def _range(spec: str, text: str, *, lowest: int) -> range:
    first, _, last = text.partition("-")
    start, end = int(first), int(last or first)
    if not lowest <= start <= end <= 65535 or (start == 0 and last):
        raise PortSpecError(
            f"port {spec!r}: expected a port or a range of ports, 1 to 65535, not {text}", fix=EXAMPLE
        )
    return range(start, end + 1)
