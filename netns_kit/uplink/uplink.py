"""The uplink: how flows leave the namespace.

`Uplink.route` decides about a flow: it returns where the flow goes, or how it is refused.  `Uplink.dial` connects a
TCP flow.  `Uplink.open` makes a socket of the host for a flow of any transport.  To send flows elsewhere, override
one of them in a subclass.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Container, Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.dns import Manner, ResolvConf, parse_resolv_conf
from netns_kit.dns.manner import DEFAULT
from netns_kit.errors import AddressError, ArgumentError, ArgumentTypeError, SysctlError
from netns_kit.host import diagnosis, sysctl
from netns_kit.host.abi import IPV6_MTU
from netns_kit.policy.presets import METADATA
from netns_kit.stack import Refusal, Transport

from .dial import Dial
from .direct import DirectDial
from .dns_settings import DnsSettings, shortest
from .flow import DNS_PORT, Endpoint, Flow, Target, Way
from .sockets import leave_from

if TYPE_CHECKING:
    from netns_kit.policy.policy import Policy

__all__ = [
    "IF_INET6",
    "UdpFiltering",
    "UdpPorts",
    "Uplink",
    "is_host_address",
    "is_reachable",
    "source_address",
    "source_of",
]

IF_INET6 = "/proc/net/if_inet6"  # every address of IPv6, if only loopback's
UdpFiltering = Literal["address-and-port-dependent", "endpoint-independent"]
"""The senders whose datagrams may come in, in the words of RFC 4787 section 5: see `Uplink`."""
UdpPorts = Literal["ephemeral", "any"]
"""The ports of the host that datagrams may be sent from: see `Uplink`."""
_KINDS = {"tcp": socket.SOCK_STREAM | socket.SOCK_NONBLOCK, "udp": socket.SOCK_DGRAM | socket.SOCK_NONBLOCK}
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_ICMP = {socket.AF_INET: socket.IPPROTO_ICMP, socket.AF_INET6: socket.IPPROTO_ICMPV6}


_LOOPBACK: dict[int, Address] = {4: IPv4Address("127.0.0.1"), 6: IPv6Address("::1")}
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052
_NAT64_LOCAL = bytes.fromhex("0064ff9b0001")  # RFC 8215: where IPv4 is embedded, only its translator knows


class Uplink:
    """The way out for flows: through sockets of the process that runs the stack.

    Args:
        allow_host_loopback: Whether the gateway's address stands for the host's loopback (127.0.0.1, and ::1 for
            IPv6).  False: no (the default).  True: yes.  A list of ports: for these ports only.
        bind4, bind6: Source address of outgoing sockets.  The name of an interface stands for the first address that
            the interface has now.
        device: Interface that outgoing sockets are bound to.
        dns: `DnsSettings`, or a list of resolvers, `ADDRESS[:PORT]`.  None, the default: the resolvers of the host's
            resolv.conf, which is read again when it changes.  An empty list: no resolvers, so that only our own names
            are resolved (see `UserStack.add_record`).
        policy: A `Policy`, or a plain function.  The stack enforces a policy for flows and for names, and it can be
            replaced while the stack runs, see `UserStack.set_policy`.
            A function is called with each new flow that would otherwise be carried, including flows to the gateway
            and flows that this process answers itself (`Flow.served`: queries to the DNS address).  If it returns a
            `Refusal`, the flow is refused in that way; if it returns None, the flow is carried.  If it raises or
            returns anything else, the flow is refused and the failure is logged.  It is called on the driver's
            thread, so it should be quick.  The flow's addresses are objects of `ipaddress`: compare them with such
            objects, not with strings.  A stack with `driver="worker"` imports the function by name in another
            process.  It must then be a function at the top of a module, or a `functools.partial` or frozen dataclass
            of immutable values.  That process does not see later changes here, such as changed globals of a module.
        any_source: Whether guests may open flows from addresses outside their subnet, as a guest that routes for
            others does.  By default such packets are dropped and counted.
        allow_host_addresses: Whether flows may reach the host's own addresses, where its services listen.  These are
            all addresses that the kernel takes for local when the flow is opened, except 127.0.0.0/8, which is never
            reached this way.  True by default; docs/security.md tells what that means.
        allow_link_local: Whether flows may reach link-local addresses, and the other addresses (`METADATA`) at which
            clouds give a machine its credentials.  True by default; docs/security.md tells what that means.
        udp_filtering: Whose datagrams may come in at a UDP port that the namespace has opened (RFC 4787 section 5).
            "address-and-port-dependent", the default: only those of endpoints that the port has sent to.
            "endpoint-independent" ("full cone"): those of any endpoint that `route` lets the port send to.
        udp_ports: Which of a guest's UDP source ports are used on the host too, if they are free there.  "ephemeral",
            the default: those that the kernel gives to programs which ask for no port (net.ipv4.ip_local_port_range
            without net.ipv4.ip_local_reserved_ports), so that no guest gets the port of a service.  "any": all ports
            that this user may bind.

    Raises:
        AddressError: An address is not valid.
        ArgumentError: Another value cannot be used.
        ArgumentTypeError: An argument has the wrong type; a `policy` that is a coroutine function is one case.

    Attributes:
        is_indirect: Whether it is an `IndirectUplink`, such as one through a proxy.
        is_in_memory: Whether it is an `InMemoryUplink`, such as a `FakeInternet`.
        wants_names: Whether its flows are to have the names of their destinations (`Flow.name`).  Only the flows of
            an `IndirectUplink` have them.
        stands_in: Whether names are answered with addresses that stand for them, see `IndirectUplink`.
        namespaces: The namespaces in which sockets are opened for it, see `NamespaceUplink`.
    """

    stands_in = False
    is_indirect = False
    is_in_memory = False
    wants_names = False
    namespaces: tuple[Any, ...] = ()

    def __init__(
        self,
        *,
        allow_host_loopback: bool | Iterable[int] = False,
        bind4: AddressLike | None = None,
        bind6: AddressLike | None = None,
        device: str | None = None,
        dns: DnsSettings | Iterable[AddressLike | Endpoint] | None = None,
        policy: Policy | Callable[[Flow], Refusal | None] | None = None,
        any_source: bool = False,
        allow_host_addresses: bool = True,
        allow_link_local: bool = True,
        udp_filtering: UdpFiltering = "address-and-port-dependent",
        udp_ports: UdpPorts = "ephemeral",
    ) -> None:
        self._function = _function(policy)
        self._loopback = _ports(allow_host_loopback)
        self._bind = {
            socket.AF_INET: None if bind4 is None else source_address(bind4, 4),
            socket.AF_INET6: None if bind6 is None else source_address(bind6, 6),
        }
        if device is not None:
            arguments.text("device", device, "the name of an interface, or None")
            if not 0 < len(device.encode()) < 16:
                raise ArgumentError(
                    "expected the name of an interface, 1 to 15 bytes", "device", repr(device)
                )
        self._device = device
        self.dns = DnsSettings.of(dns)
        for name, flag in (
            ("any_source", any_source),
            ("allow_host_addresses", allow_host_addresses),
            ("allow_link_local", allow_link_local),
        ):
            arguments.boolean(name, flag)
        arguments.one_of("udp_filtering", udp_filtering, get_args(UdpFiltering))
        arguments.one_of("udp_ports", udp_ports, get_args(UdpPorts))
        self.udp_filtering = udp_filtering
        self._kept_ports = _ephemeral_ports() if udp_ports == "ephemeral" else range(1, 65536)
        self.any_source = any_source
        self._allow_host_addresses = allow_host_addresses
        self._allow_link_local = allow_link_local
        self._policy = policy
        self._read: tuple[int, int, int] | None = None
        self._adopt(ResolvConf())

    def __repr__(self) -> str:
        settings = {
            "allow_host_loopback": True if self._loopback is True else sorted(self._loopback or ()) or None,
            "bind4": self._bind[socket.AF_INET],
            "bind6": self._bind[socket.AF_INET6],
            "device": self._device,
            "dns": shortest(self.dns),
            "policy": self._policy,
            "udp_filtering": None if self.udp_filtering == get_args(UdpFiltering)[0] else self.udp_filtering,
        }
        told = (f"{name}={value!r}" for name, value in settings.items() if value is not None)
        return f"{type(self).__name__}({', '.join(told)})"

    @property
    def policy(self) -> Policy | Callable[[Flow], Refusal | None] | None:
        """The policy, as the constructor got it."""
        return self._policy

    @property
    def rules(self) -> Policy | None:
        """The policy that the stack enforces, if the constructor got one that is no function."""
        policy = self._policy
        return None if policy is self._function else cast("Policy", policy)

    def route(self, flow: Flow) -> Target | Refusal:
        """Return where a flow goes, or how it is refused.

        It may read resolv.conf again; otherwise it has no effects.  If it raises, the flow is refused.

        Args:
            flow: The flow, as the guest wants to open it.
        """
        target = self._target(flow)
        if isinstance(target, Refusal) or self._function is None:
            return target
        refusal = self._function(flow)
        if not isinstance(refusal, Refusal | None):
            raise TypeError(
                f"the policy returned {refusal!r}: expected a Refusal, or None to let the flow pass"
            )
        return refusal or target

    def _target(self, flow: Flow) -> Target | Refusal:
        address, port = flow.destination
        local = flow.subnet.of(address)
        if local is None:
            return Refusal.NET_UNREACHABLE
        if address == local.dns:
            if port == DNS_PORT and flow.protocol != "icmp":
                return Target(self.resolvers())
            return Target() if flow.served else Refusal.RESET
        if flow.served:
            return Target()
        if address in local.gateways:
            if not self._host_port_allowed(flow.protocol, port):
                return Refusal.PROHIBITED
            return Target((Endpoint._make((_LOOPBACK[address.version], port)),))
        if not is_reachable(address):
            return Refusal.PROHIBITED
        if address in local.network:
            return Refusal.HOST_UNREACHABLE  # the subnet has no other host
        embedded = _embedded(address)
        if not self._allow_link_local and (embedded.is_link_local or embedded in METADATA):
            return Refusal.PROHIBITED
        if not self._allow_host_addresses and (is_host_address(address) or is_host_address(embedded)):
            return Refusal.PROHIBITED
        return Target((flow.destination,))

    def _host_port_allowed(self, protocol: Transport, port: int) -> bool:
        """Return whether that port of the host's loopback may be reached.

        For "icmp", `port` is an identifier, so a list of ports does not allow it.
        """
        if isinstance(self._loopback, bool):
            return self._loopback
        return protocol != "icmp" and port in self._loopback

    def resolvers(self) -> tuple[Endpoint, ...]:
        """Return the current resolvers in order.  As long as they do not change, it is the same tuple object."""
        if self.dns.servers is not None:
            return self.dns.servers
        self._host_conf()
        return self._resolvers

    def resolv_conf(self, *nameservers: IPv4Address | IPv6Address) -> str:
        """Return the text of a resolv.conf with these nameservers, the search list, and options of the host's.

        The options are those that concern programs.  "ndots" is left out if the search list is not the host's.  What
        describes the host's resolvers is left out if others are used.

        Args:
            nameservers: The addresses of the nameservers, in order.
        """
        search = self.search()
        options = self._host_conf().options_for_clients(same_servers=self.dns.servers is None)
        if self.dns.search is not None or self.stands_in:
            options = tuple(each for each in options if not each.startswith("ndots:"))
        return ResolvConf(nameservers, search, options).written()

    def dns_manner(self) -> Manner:
        """Return how resolvers are asked: as the host's resolv.conf says if they are the host's, else by default."""
        return DEFAULT if self.dns.servers is not None else self._host_conf().manner()

    def dns_domain_manner(self) -> Manner:
        """Return how the resolvers of single domains are asked (`DnsSettings.domains`)."""
        return DEFAULT

    def search(self) -> tuple[str, ...]:
        """Return the current search list: the domains in which a short name is looked up.  A lone "." means none."""
        if self.dns.search is None and self.stands_in:
            return (".",)  # each name has an address, so the first domain would always do
        return self._host_conf().search if self.dns.search is None else self.dns.search

    def _host_conf(self) -> ResolvConf:
        """Return the host's resolv.conf, read again if it has changed; if it cannot be read, as it was last read."""
        try:
            status = os.stat(self.dns.resolv_conf)
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stamp != self._read:
                with open(self.dns.resolv_conf, encoding="utf-8", errors="replace") as file:
                    self._adopt(parse_resolv_conf(file.read()))
                self._read = stamp
        except OSError:  # before the first reading, that is what resolv.conf(5) says of a missing file
            pass
        return self._conf

    def _adopt(self, conf: ResolvConf) -> None:
        self._conf = conf
        self._resolvers = tuple(Endpoint(server, DNS_PORT) for server in conf.nameservers)

    def reads(self) -> tuple[str, ...]:
        """Return the files that `route` and `open` may read.  The sandbox of a worker keeps them readable."""
        return (self.dns.resolv_conf,) if self.dns.servers is None else ()

    def check(self) -> None:
        """Check that the host has the address and the device to send from.

        Raises:
            ArgumentError: The host lacks one of them.
            FeatureUnavailable: The kernel is too old to let this user bind sockets to a device.
        """
        for family, address in self._bind.items():
            if address is not None or self._device is not None:
                version = 4 if family == socket.AF_INET else 6
                anywhere = ip_address("192.0.2.1" if version == 4 else "2001:db8::1")  # never sent to
                try:
                    self.open("tcp", anywhere).close()
                except OSError as error:
                    if error.errno == errno.EAFNOSUPPORT and address is None:
                        continue  # a kernel without IPv6 has the device nevertheless
                    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
                        what = f"bind{version}" if error.errno == errno.EADDRNOTAVAIL else "device"
                        value = address if error.errno == errno.EADDRNOTAVAIL else self._device
                        fix = "choose one that `ip address` shows on the host"
                        raise ArgumentError(
                            "expected an address or interface of the host", what, value, fix
                        ) from error
                    if error.errno == errno.EPERM and self._device is not None:
                        raise diagnosis.feature("SO_BINDTODEVICE", error, "5.7", "setsockopt") from error
                    raise

    def ipv6_missing(self) -> str | None:
        """Return why this host has no IPv6, or None if it has IPv6, even without a route to anywhere."""
        try:
            with open(IF_INET6, "rb") as file:
                return None if file.read(1) else "net.ipv6.conf.all.disable_ipv6 is 1"
        except OSError:
            return "its kernel has none"

    def source(self, target: IPv4Address | IPv6Address) -> str | None:
        """Return the source address of sockets to an address; None: the kernel chooses.

        Args:
            target: The address.  For an address of the host's loopback the result is None.
        """
        return None if target.is_loopback else self._bind[_FAMILY[target.version]]

    def open(self, protocol: Transport, target: IPv4Address | IPv6Address, port: int = 0) -> socket.socket:
        """Return a new non-blocking socket that can reach an address.

        Args:
            protocol: The transport of the socket.
            target: The address to reach.
            port: The local port wanted for a UDP socket.  It gets another port if this one is not free or not allowed
                by `udp_ports`.

        Raises:
            OSError: The host's kernel refuses; no socket is left open.
        """
        family = _FAMILY[target.version]
        sock = _ping_socket(family) if protocol == "icmp" else socket.socket(family, _KINDS[protocol])
        source, device = self._leaves_from(target)
        return leave_from(sock, protocol, source, device, port if port in self._kept_ports else 0)

    def dial(self, flow: Flow, target: Target, *, ttl: int = 64, tos: int = 0) -> Dial:
        """Begin to connect a TCP flow to the first candidate of its target that answers.  It never blocks.

        Args:
            flow: The flow, as the guest opens it.
            target: What `route` has returned for the flow.
            ttl, tos: TTL and traffic class of the guest's SYN.  The host's SYN gets them, with one hop less, as from
                a router.
        """
        return DirectDial(self.open, target.candidates, flow.destination.address, ttl, tos).begin()

    def dial_resolver(self, flow: Flow, target: Target) -> Dial:
        """Begin to connect a flow of the DNS server's own to a resolver.  It never blocks.

        Args:
            flow: The flow.
            target: The resolver.
        """
        return self.dial(flow, target)

    def _leaves_from(self, target: Address) -> tuple[str | None, str | None]:
        """Return the source address and the interface that sockets to `target` are bound to; None: not bound."""
        return self.source(target), None if target.is_loopback else self._device

    def way_by(
        self, host: IPv4Address | IPv6Address, device: str | None, target: IPv4Address | IPv6Address
    ) -> Way | None:
        """Return how a published port's UDP socket sends to an address, or None if it must not.

        Answers of the guest should come from the port that the client knows, so they leave by the published port's
        socket if they can.  They cannot if that socket is bound to another address or interface than the uplink uses,
        if the target is not reached from there, or if a subclass overrides `open`.  Then a socket of their own is
        opened for them.

        Args:
            host: The address that the socket is bound to.
            device: The interface that it is bound to; None: none.
            target: The address to send to.
        """
        if type(self).open is not Uplink.open or host.version != target.version:
            return None
        source, through = self._leaves_from(target)
        if not host.is_unspecified:
            if host.is_loopback != target.is_loopback or source not in (None, str(host)):
                return None
            source = None
        if device is None:
            try:
                return Way(source, 0 if through is None else socket.if_nametoindex(through))
            except OSError:  # the interface has gone
                return None
        if through not in (None, device) or target.is_loopback != (device == _LOOPBACK_DEVICE):
            return None
        if through is None and not target.is_loopback and source_of(target, device) != source_of(target):
            return None  # that interface does not lead there
        return Way(source, 0)


_LOOPBACK_DEVICE = "lo"
_DISCARD_PORT = 9  # for sockets that are connected, but send nothing
_LARGEST_LINK_MTU = 65535  # bytes; only "lo", and the device of a VRF, have 65536


def _socket(family: socket.AddressFamily, kind: int, number: int = 0) -> socket.socket:
    return socket.socket(family, kind | socket.SOCK_NONBLOCK, number)


def source_of(target: Address, device: str | None = None) -> str:
    """Return the source address that the host's kernel chooses for packets to `target`; "" if there is no route.

    With `device`, only routes by that interface count.
    """
    try:
        with _socket(_FAMILY[target.version], socket.SOCK_DGRAM) as sock:
            if device is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            sock.connect((str(target), _DISCARD_PORT))
            source: str = sock.getsockname()[0]
            return source
    except OSError:
        return ""


def _ping_socket(family: socket.AddressFamily) -> socket.socket:
    """Return a ping socket or, where net.ipv4.ping_group_range forbids it, a raw socket if that is allowed."""
    try:
        return _socket(family, socket.SOCK_DGRAM, _ICMP[family])
    except PermissionError as error:
        try:
            return _socket(family, socket.SOCK_RAW, _ICMP[family])
        except PermissionError:
            raise error from None


def _ephemeral_ports() -> Container[int]:
    """Return the ports that the kernel gives to programs which ask for no port (ip_local_port_range in ip(7))."""
    try:
        first, last = sysctl.numbers("net.ipv4.ip_local_port_range")
        reserved = sysctl.read("net.ipv4.ip_local_reserved_ports")
    except (SysctlError, ValueError):
        return range(0)  # they cannot be found out, so none is kept
    ports = set(range(first, last + 1))
    for each in filter(None, reserved.split(",")):
        start, _, end = each.partition("-")
        ports.difference_update(range(int(start), int(end or start) + 1))
    return frozenset(ports)


def _function(policy: object) -> Callable[[Flow], Refusal | None] | None:
    """Return the policy if it is a function, or None if it is a `Policy` or there is none.

    Raises:
        ArgumentTypeError: It is neither.
    """
    if policy is None:
        return None
    module = sys.modules.get("netns_kit.policy.policy")  # whoever has one has imported it
    if module is not None and isinstance(policy, module.Policy):
        return None
    if not callable(policy):
        raise ArgumentTypeError(
            "expected a Policy, a plain function, or None", "policy", arguments.shown(policy)
        )
    arguments.plain_function("policy", policy)
    return cast("Callable[[Flow], Refusal | None]", policy)


def _ports(allowed: object) -> bool | frozenset[int]:
    if isinstance(allowed, bool):
        return allowed
    fix = f"write [{allowed}]" if isinstance(allowed, int) else None
    if not isinstance(allowed, Iterable) or isinstance(allowed, str | bytes):
        raise ArgumentTypeError(
            "expected a bool, or a list of ports", "allow_host_loopback", arguments.shown(allowed), fix
        )
    ports = tuple(allowed)
    for port in ports:
        arguments.port("allow_host_loopback", port, 1)
    return frozenset(ports)


def source_address(given: AddressLike, version: int) -> str:
    """Return a source address, which is given as an address or by the name of an interface that has one.

    Raises:
        AddressError: The text is neither, or the interface has no address of that version.
        ArgumentTypeError: It is neither text nor an address.
    """
    try:
        address = arguments.address(given, f"bind{version}")
    except AddressError:
        from netns_kit.host.addresses import first_address

        found = first_address(str(given), version)
    else:
        found = str(address) if address.version == version else None
    if found is None:
        raise AddressError(
            f"expected an IPv{version} address of the host, or an interface that has one",
            f"bind{version}",
            arguments.shown(str(given)),
        )
    return found


def is_host_address(address: Address) -> bool:
    """Return whether packets to `address` are delivered to this host itself.

    A socket can be bound to such an address and to no other (bind(2)).  That finds all of IPv4.  Of IPv6 it finds
    only the addresses of interfaces.  Others are delivered here too: those of routes of type "local", and the subnet
    anycast addresses of a router.  The route to these goes by the loopback, which is seen by its MTU: no other link
    has one that large.
    """
    try:
        with _socket(_FAMILY[address.version], socket.SOCK_DGRAM) as sock:
            try:
                sock.bind((str(address), 0))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
            else:
                return True
            if address.version == 4:
                return False
            sock.connect((str(address), _DISCARD_PORT))
            return sock.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU) > _LARGEST_LINK_MTU
    except OSError as error:
        # these three errors mean "no"; after any other the address must count as the host's, to be safe
        return error.errno not in (errno.EAFNOSUPPORT, errno.ENETUNREACH, errno.EHOSTUNREACH)


def _embedded(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address embeds (NAT64, 6to4), else `address` itself."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return IPv4Address(address.packed[12:])
        return address.sixtofour or address
    return address


@lru_cache(maxsize=1024)
def is_reachable(address: Address) -> bool:
    """Return whether packets to `address` may leave the host at all.

    The unspecified address would lead to the host itself, and an IPv6 link-local address to one of its neighbours.
    For an IPv6 address that embeds an IPv4 address, the embedded one decides.
    """
    if isinstance(address, IPv6Address):
        if _embedded(address) is not address:
            return is_reachable(_embedded(address))
        # no host has any other address in ::/8, and the kernel would send to an IPv4-mapped one by IPv4
        if address.packed[0] == 0 and not address.packed.startswith(_NAT64_LOCAL):
            return False
        return not (address.is_multicast or address.is_link_local)
    return not (address.is_loopback or address.is_unspecified or address.is_multicast or _is_class_e(address))


def _is_class_e(address: IPv4Address) -> bool:
    return address.packed[0] >= 240 or address.packed[0] == 0
