"""IndirectUplink: an uplink that carries flows by something else than a socket connected to their destination.

    route                as that of any `Uplink`; the policy is asked as ever
    dial                 a TCP flow: a stream through the proxy
    carriage             a UDP or ping flow: a `UdpAssociation`, sockets of another namespace, a refusal, or None for
                         a socket of the host
    dial_resolver        a connection of the DNS server's own, to a resolver

What leads to the host's loopback (the gateway's address, if it is allowed) never goes through a proxy.

`ProxyDial` is the dial through a proxy.  The protocol of the proxy is a *talk*: a generator without a socket, which
yields what it wants to send or to read, and raises `Fault` if there is to be no stream.

    connect(2) to the proxy --> Send, Read, ReadHead ... of the talk --> Connected
                    |                     |
                    +---------------------+--> Refused, and one notice for people
"""

from __future__ import annotations

import copy
import errno
import re
import socket
from collections.abc import Callable, Generator, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, TypedDict, get_args

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.dns import Manner
from netns_kit.dns.manner import DEFAULT
from netns_kit.domain_names import is_host_name
from netns_kit.errors import ArgumentError
from netns_kit.frozen import replace
from netns_kit.stack import Refusal

from .dial import Connected, Dial, Pending, Refused
from .direct import DirectDial
from .dns_settings import DnsSettings
from .elsewhere import NamespaceSockets, SocketSource
from .flow import Endpoint, Flow, NamedFlow, Target, Way
from .uplink import UdpFiltering, UdpPorts, Uplink

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from netns_kit.policy.policy import Policy

ProxyNames = Literal["proxy", "here"]
"""Who resolves the names of destinations: see `IndirectUplink`."""
ProxyResolvers = Literal["proxy", "host"]
"""How resolvers are reached: see `IndirectUplink`."""

TIME_LIMIT = 30.0
LARGEST_TIME_LIMIT = 3600.0
_SLOWER = 3.0  # seconds for a resolver behind a proxy, with a connection to make first
_PATIENCE = 8.0
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)


class UplinkOptions(TypedDict, total=False):
    """Settings that every `Uplink` has.

    Args:
        allow_host_loopback, allow_host_addresses, allow_link_local: See `Uplink`.
        bind4, bind6, device: See `Uplink`.
        dns, policy, any_source: See `Uplink`.
        udp_filtering, udp_ports: See `Uplink`.
    """

    allow_host_loopback: bool | Iterable[int]
    bind4: AddressLike | None
    bind6: AddressLike | None
    device: str | None
    dns: DnsSettings | Iterable[AddressLike | Endpoint] | None
    policy: Policy | Callable[[Flow], Refusal | None] | None
    any_source: bool
    allow_host_addresses: bool
    allow_link_local: bool
    udp_filtering: UdpFiltering
    udp_ports: UdpPorts


class ProxyOptions(UplinkOptions, total=False):
    """The settings of any `IndirectUplink`."""

    names: ProxyNames
    """Place where names are resolved, see `IndirectUplink`."""
    resolvers: ProxyResolvers | None
    """Way to the resolvers, see `IndirectUplink`."""
    time_limit: float
    """Seconds that the proxy has for one flow."""


class UdpAssociation(Protocol):
    """A way for the datagrams of one endpoint of the guest, through a proxy."""

    @property
    def proxy(self) -> Endpoint:
        """The proxy."""
        ...

    def dial(self) -> Dial:
        """Begin to connect the stream that the association lives as long as."""
        ...

    def open(self) -> socket.socket:
        """Return a non-blocking socket that is connected to the proxy's end for datagrams, after `dial` is over.

        Raises:
            OSError: The host's kernel refuses.
        """
        ...

    def header(self, destination: Endpoint) -> bytes:
        """Return what stands in front of each datagram to an endpoint.

        Args:
            destination: The endpoint.
        """
        ...

    def parse(self, datagram: bytes) -> tuple[tuple[bytes, int], memoryview] | None:
        """Return the sender of a datagram, packed address and port, and the payload; None if it cannot be read.

        Args:
            datagram: What the proxy has sent.
        """
        ...


Carriage: TypeAlias = "UdpAssociation | NamespaceSockets | Refusal | None"
"""What carries a UDP or ping flow, see `IndirectUplink.carriage`."""


class IndirectUplink(Uplink):
    """An uplink that leads through something else.

    Args:
        names: "proxy", the default: the proxy is told the name of a destination if it is known, and resolves it
            itself.  "here": it is told the address.
        resolvers: "proxy": resolvers are asked over TCP through the proxy, so that no name is sent by another way.  A
            resolver on the host's loopback cannot be reached so: give others with `dns`.  "host": resolvers are asked
            by the host itself, which shows them the names.  None, the default: none are asked about names that the
            proxy is told; programs get an address that stands for the name (docs/uplinks.md).  Where `dns` has
            resolvers, or a function is the policy, or the proxy is told no names, it is "proxy".
        time_limit: Seconds within which the proxy must have answered; then the flow is refused.
        options: The settings of any `Uplink`.

    Raises:
        ArgumentError: A value cannot be used.
        ArgumentTypeError: An argument has the wrong type.
    """

    is_indirect = True
    takes_names = False
    """Whether a destination can be told by its name, as a proxy can."""

    def __init__(
        self,
        *,
        names: ProxyNames = "proxy",
        resolvers: ProxyResolvers | None = None,
        time_limit: float = TIME_LIMIT,
        **options: Unpack[UplinkOptions],
    ) -> None:
        super().__init__(**options)
        arguments.one_of("names", names, get_args(ProxyNames))
        if resolvers is not None:
            arguments.one_of("resolvers", resolvers, get_args(ProxyResolvers))
        arguments.instance("time_limit", time_limit, (int, float), "a number of seconds")
        if not 0 < time_limit <= LARGEST_TIME_LIMIT:
            expected = f"expected seconds, more than 0 and {LARGEST_TIME_LIMIT:g} at most"
            raise ArgumentError(expected, "time_limit", arguments.shown(time_limit))
        self.wants_names = names == "proxy"
        self.resolvers_by = resolvers or "proxy"
        can_stand_in = self.wants_names and self.dns.servers is None and self._function is None
        self.stands_in = resolvers is None and self.takes_names and can_stand_in
        self.time_limit = float(time_limit)
        self._tell: Callable[[str], object] | None = None

    def attached(self, tell: Callable[[str], object], sources: Iterator[SocketSource]) -> Self:
        """Return a copy for one stack.

        Args:
            tell: Called with what people should know of the proxy.
            sources: A source of sockets for each of `namespaces`.
        """
        made = copy.copy(self)
        made._tell = tell
        return made

    def stands_for(self, name: str) -> bool:
        """Return whether programs get a stand-in as the address of a name.

        Args:
            name: The name, in small letters.
        """
        return self.stands_in

    def tell(self, text: str) -> None:
        """Tell people something, once for each text.

        Args:
            text: The text.  No credentials and no destination may be in it.
        """
        if self._tell is not None:
            self._tell(text)

    def dial_resolver(self, flow: Flow, target: Target) -> Dial:
        if self.resolvers_by == "host":
            return Uplink.dial(self, flow, target)
        resolver = target.candidates[0]
        if resolver.address.is_loopback:
            self.tell(
                f"names are not resolved: a proxy cannot reach {resolver}, a resolver on this host's loopback: "
                'give others (dns=["192.0.2.53"], --dns), or let the host ask (resolvers="host")'
            )
            return Refused(Refusal.NET_UNREACHABLE)
        return self.dial(flow, target)

    def carriage(self, flow: Flow, target: Target) -> Carriage:
        """Return what carries a UDP or ping flow, or how it is refused; None: a socket of the host.

        Args:
            flow: The flow, as the guest opens it.
            target: What `route` has returned for the flow.
        """
        raise NotImplementedError

    def dns_manner(self) -> Manner:
        manner = super().dns_manner()
        return manner if self.resolvers_by == "host" else _slower(manner)

    def dns_domain_manner(self) -> Manner:
        return DEFAULT if self.resolvers_by == "host" else _slower(DEFAULT)

    def way_by(
        self, host: IPv4Address | IPv6Address, device: str | None, target: IPv4Address | IPv6Address
    ) -> Way | None:
        return None  # datagrams to anywhere leave as `carriage` says


class ProxyUplink(IndirectUplink):
    """The way out through one proxy.

    Args:
        proxy: Address and port of the proxy.
        default_port: The port if it is left out.
        username, password: What the proxy is told.
        options: The settings of an `IndirectUplink`.

    Raises:
        AddressError: The proxy is no address with a port.
        ArgumentError: A value cannot be used.
        ArgumentTypeError: An argument has the wrong type.
    """

    kind = "proxy"

    def __init__(
        self,
        proxy: AddressLike | Endpoint,
        default_port: int,
        username: str | None,
        password: str | None,
        **options: Unpack[ProxyOptions],
    ) -> None:
        super().__init__(**options)
        self.proxy = Endpoint.parse(proxy, default_port)
        self._credentials = credentials(username, password)

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"(proxy={str(self.proxy)!r}, ", 1).replace(", )", ")")

    def _through(self, said: Talk, tos: int = 0) -> Dial:
        """Begin to connect to the proxy, and then to talk to it."""
        return ProxyDial(self, self.proxy, f"{self.kind} {self.proxy}", said, tos=tos).begin()


def _slower(manner: Manner) -> Manner:
    timeout, patience = max(manner.timeout, _SLOWER), max(manner.patience, _PATIENCE)
    return replace(manner, streams=True, timeout=timeout, patience=patience)


def is_direct(flow: Flow, target: Target) -> bool:
    """Return whether a flow leads to the host's loopback: by the gateway's address, or as somebody asked has said."""
    there = target.candidates[0]
    return there.address.is_loopback and there != flow.destination


def host_of(flow: Flow, target: Target, *, names: bool) -> str | Address:
    """Return what a proxy is told of a flow's destination: its name, if it may be told and is one, or its address.

    Raises:
        OSError: The address stands for a name that may not be told.
    """
    there = target.candidates[0]
    if names and isinstance(flow, NamedFlow) and flow.may_be_told and there == flow.destination:
        name = flow.name
        if name is not None and can_be_told(name):
            return name
    if flow.is_by_name and there == flow.destination:
        raise OSError(errno.EACCES, "a stand-in for a name that may not be told")
    return there.address


def can_be_told(name: str) -> bool:
    """Return whether a proxy may be told a name.

    It is not told one that it might take for an address, for itself, or for a name in its own domain.
    """
    last = name.rpartition(".")[2].lower()
    return "." in name and is_host_name(name) and last != "localhost" and not _NUMBER.fullmatch(last)


# -- talks ------------------------------------------------------------------------------------------------


class Send(NamedTuple):
    """A wish of a talk: send these bytes."""

    data: bytes


class Read(NamedTuple):
    """A wish of a talk: read exactly so many bytes."""

    size: int


class ReadHead(NamedTuple):
    """A wish of a talk: read up to and including the first empty line, and not a byte more."""

    limit: int


END_OF_HEAD = b"\r\n\r\n"
Talk: TypeAlias = "Generator[Send | Read | ReadHead, bytes, None]"
"""What is said to a proxy before there is a stream."""


class Fault(Exception):
    """The end of a talk without a stream.

    Args:
        why: How the guest's flow is refused.
        text: What people are told of the proxy; "": nothing, since this is about the one destination.
    """

    def __init__(self, why: Refusal, text: str = "") -> None:
        super().__init__(text or why.value)
        self.why = why
        self.text = text


class ProxyDial:
    """A `Pending` dial through a proxy.

    Args:
        uplink: Opens the socket, and tells people.
        proxy: The proxy.
        what: What the proxy is called in messages.
        talk: What is said to it.
        ttl, tos: TTL and traffic class of the guest's SYN, which the SYN to the proxy gets too.
    """

    __slots__ = ("_connecting", "_done", "_socket", "_talk", "_uplink", "_want", "what")

    def __init__(
        self, uplink: IndirectUplink, proxy: Endpoint, what: str, talk: Talk, *, tos: int = 0
    ) -> None:
        self._uplink = uplink
        self.what = what
        self._talk = talk
        self._connecting: Pending | None = None
        self._socket: socket.socket | None = None
        self._want: Send | Read | ReadHead = Send(b"")
        self._done = b""  # what has been read of that
        direct = DirectDial(uplink.open, (proxy,), proxy.address, 64, tos)
        dial = direct.begin()
        if not isinstance(dial, Refused):
            self._connecting = direct

    def begin(self) -> Dial:
        """Return the dial as it stands."""
        return (
            self._fail(Fault(Refusal.HOST_UNREACHABLE, "cannot be reached"))
            if self._connecting is None
            else self
        )

    def fileno(self) -> int:
        if self._connecting is not None:
            return self._connecting.fileno()
        return -1 if self._socket is None else self._socket.fileno()

    def advance(self, *, failed: bool) -> Dial:
        try:
            if self._connecting is not None:
                dial = self._connecting.advance(failed=failed)
                if dial is self._connecting:
                    return self
                if not isinstance(dial, Connected):
                    raise Fault(Refusal.HOST_UNREACHABLE, "cannot be reached")
                self._connecting, self._socket = None, dial.socket
                self._want = next(self._talk)
            return self._go_on()
        except Fault as fault:
            return self._fail(fault)

    def time_over(self) -> Refused:
        """Return how the flow is refused, since the proxy has not answered in time."""
        return self._fail(Fault(Refusal.HOST_UNREACHABLE, "does not answer in time"))

    def close(self) -> None:
        self._talk.close()
        for each in self._connecting, self._socket:
            if each is not None:
                each.close()
        self._connecting = self._socket = None

    def _fail(self, fault: Fault) -> Refused:
        if fault.text:
            self._uplink.tell(f"flows are refused: the {self.what} {fault.text}")
        return Refused(fault.why)

    def _go_on(self) -> Dial:
        """Do what the talk wants, as far as the socket lets it.  Raises `Fault`."""
        sock = self._socket
        if sock is None:  # it has been closed
            return self
        try:
            while self._do(sock, self._want):
                done, self._done = self._done, b""
                self._want = self._talk.send(done)
        except BlockingIOError:
            return self
        except OSError as error:
            raise Fault(Refusal.HOST_UNREACHABLE, "dies while it is asked") from error
        except StopIteration:
            self._socket = None
            return Connected(sock)
        return self

    def _do(self, sock: socket.socket, want: Send | Read | ReadHead) -> bool:
        """Do a part of what is wanted.  Return whether all of it is done.

        Raises:
            BlockingIOError: The socket lets no more be done now.
            OSError: The connection has ended.
            Fault: The proxy says too much.
        """
        if isinstance(want, Send):
            sent = sock.send(want.data) if want.data else 0
            self._want = want = Send(want.data[sent:])
            if want.data:
                return self._do(sock, want)
            return True
        while (size := self._wanted(sock, want)) > 0:
            data = sock.recv(size)
            if not data:
                raise OSError("end of file")
            self._done += data
            if isinstance(want, ReadHead) and len(self._done) > want.limit:
                raise Fault(
                    Refusal.HOST_UNREACHABLE, f"says more than {want.limit} bytes before it lets through"
                )
        return True

    def _wanted(self, sock: socket.socket, want: Read | ReadHead) -> int:
        """Return how many bytes to read, of which none is too many; 0: all are there.

        A head is looked at before it is taken: in pieces of the four bytes that may still belong to it, it costs a
        call for each piece, as often as the proxy likes.

        Raises:
            BlockingIOError: There are none now.
            OSError: The connection has ended.
        """
        done = self._done
        if isinstance(want, Read):
            return want.size - len(done)
        if done.endswith(END_OF_HEAD):
            return 0
        ahead = sock.recv(want.limit + 1 - len(done), socket.MSG_PEEK)
        before = done[1 - len(END_OF_HEAD) :]
        end = (before + ahead).find(END_OF_HEAD)
        return max(len(ahead), 1) if end < 0 else end + len(END_OF_HEAD) - len(before)


def credentials(username: Any, password: Any) -> tuple[bytes, bytes] | None:
    """Return user name and password as they are sent, or None if there are none.

    No message has them in it.

    Raises:
        ArgumentError: There is only one of them, or one cannot be sent.
        ArgumentTypeError: One is no text.
    """
    if username is None and password is None:
        return None
    found = []
    for knob, given in ("username", username), ("password", password):
        if given is None:
            other = "password" if knob == "username" else "username"
            raise ArgumentError(
                "expected text, since there is the other", knob, "None", f"leave out {other} too"
            )
        if not isinstance(given, str):
            arguments.instance(knob, type(given).__name__, type(None), "text, or None")
        encoded = given.encode()
        if not 0 < len(encoded) < 256 or any(octet < 32 or octet == 127 for octet in encoded):
            raise ArgumentError("expected 1 to 255 bytes of printable text", knob, "(not shown)")
        found.append(encoded)
    return found[0], found[1]
