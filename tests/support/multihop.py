"""A host that is several hops away from its server, for as long as one test runs.

    H 10.1.0.1 ------ 10.1.0.2 R1 10.2.0.1 ------ 10.2.0.2 R2 10.3.0.1 ------ 10.3.0.2 S
                                       (MTU 1400)

IPv6 has the same numbers: fd01:0:0:1::1 and ::2, and so on.  It takes kernels a second or two to find such a link
ready for IPv6.

Each is a network namespace, all of them in one user namespace; `in_h` runs a test in a child process that
makes them and lives in H.  There `Network` is what it would be on any unprivileged user's machine, while
sockets of the others are a `with hops.at("S")` away, so that a test reads as one story of both ends.  Nothing
has a name and nothing else runs: with the child, the namespaces are gone.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import signal
import socket
import struct
import sys
import traceback
import warnings
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, NamedTuple, NoReturn

import anyio
import pytest
from pyroute2 import IPRoute
from typing_extensions import ParamSpec

from tests.support import Possessions, needs_tun
from tests.support.servers import SECONDS

P = ParamSpec("P")

H, R1, R2, S = "10.1.0.1", "10.1.0.2", "10.2.0.2", "10.3.0.2"
"""Who answers in whose name, seen from H."""
MTU = 1400
"""Of the link between the routers; the others have 1500."""
PROHIBITED = {R1: "10.8.1.1", R2: "10.9.1.1"}
"""By router, an address that it answers "administratively prohibited" for."""
UNREACHABLE = {R1: "10.8.2.1", R2: "10.9.2.1"}
"""By router, an address that it answers "host unreachable" for."""
NO_ROUTE = "10.99.0.1"
"""R1 knows no way to it."""
GUEST, GATEWAY, DNS = "10.0.2.100", "10.0.2.2", "10.0.2.3"
"""In the guest that H has."""

H_6, R1_6, R2_6, S_6 = "fd01:0:0:1::1", "fd01:0:0:1::2", "fd01:0:0:2::2", "fd01:0:0:3::2"
PROHIBITED_6, NO_ROUTE_6 = "fd08::1", "fd09::1"
"""What R1 answers so for."""
GUEST_6, GATEWAY_6, DNS_6 = "fd00::100", "fd00::2", "fd00::3"

_ADDRESS = {"H": H, "R1": R1, "R2": R2, "S": S}
_LINKS = (("H", "R1", 1500), ("R1", "R2", MTU), ("R2", "S", 1500))
_ROUTES = {
    "H": {"0.0.0.0/0": "10.1.0.2"},
    "R1": {
        "10.3.0.0/24": "10.2.0.2",
        "10.9.0.0/16": "10.2.0.2",
        "10.8.1.0/24": "prohibit",
        "10.8.2.0/24": "unreachable",
    },
    "R2": {"10.1.0.0/24": "10.2.0.1", "10.9.1.0/24": "prohibit", "10.9.2.0/24": "unreachable"},
    "S": {"0.0.0.0/0": "10.3.0.1"},
}
_ROUTES_6 = {
    "H": {"::/0": R1_6},
    "R1": {"fd01:0:0:3::/64": R2_6, "fd08::/64": "prohibit"},
    "R2": {"fd01:0:0:1::/64": "fd01:0:0:2::1"},
    "S": {"::/0": "fd01:0:0:3::1"},
}
_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    # Routers say all they have to say.  Not by icmp_ratelimit: at 0 it takes away the budget, five and then one
    # each second, that they have for routes that lead nowhere.
    "net/ipv4/icmp_ratemask": "0",
    "net/ipv4/icmp_msgs_per_sec": "100000",  # older kernels have but one, the machine's, and that is enough
    "net/ipv4/icmp_msgs_burst": "10000",
    "net/ipv4/ip_unprivileged_port_start": "0",
    "net/ipv6/conf/all/forwarding": "1",
    # Nobody waits for a link-local address to be found free.
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/icmp/ratelimit": "0",
}

IFA_F_NODAD = 2  # linux/if_addr.h
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
_CAPABILITY_VERSION = 0x20080522  # linux/capability.h, version 3: two words of 32 bits each
CAP_NET_BIND_SERVICE, CAP_NET_BROADCAST, CAP_NET_ADMIN, CAP_NET_RAW = 10, 11, 12, 13

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> None:
    if getattr(_libc, name)(*args):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def drop_network_capabilities() -> None:
    """What remains is an unprivileged user, as far as the network goes (capget(2))."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    data = ctypes.create_string_buffer(24)
    call("capget", header, data)
    mask = ~sum(1 << cap for cap in (CAP_NET_BIND_SERVICE, CAP_NET_BROADCAST, CAP_NET_ADMIN, CAP_NET_RAW))
    effective, permitted, inheritable, *high = struct.unpack("=6I", data)
    call("capset", header, struct.pack("=6I", effective & mask, permitted & mask, inheritable & mask, *high))


class Hops:
    """The four namespaces; the calling thread is in H, and the whole process in a user namespace of its own."""

    def __init__(self, *, ping: bool = True, privileged: bool = False) -> None:
        uid, gid = os.geteuid(), os.getegid()
        call("unshare", CLONE_NEWUSER)
        for file, text in ("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1"):
            Path("/proc/self", file).write_text(text)
        self._namespaces: dict[str, int] = {}
        for name in _ADDRESS:
            self._make(name)
        for number, (left, right, mtu) in enumerate(_LINKS, 1):
            self._join(number, left, right, mtu)
        for name, routes in _ROUTES.items():
            with self.at(name), IPRoute() as ip:
                for destination, way in (routes | _ROUTES_6[name]).items():
                    how = {"type": way} if way.isalpha() else {"gateway": way}
                    ip.route("add", dst=destination, **how)
        self._enter("H")
        if ping:  # for our group, the only one that is mapped; a new namespace has it for none
            Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 0")
        if not privileged:
            drop_network_capabilities()

    def _make(self, name: str) -> None:
        call("unshare", CLONE_NEWNET)
        self._namespaces[name] = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        for key, value in _SYSCTLS.items():
            if (path := Path("/proc/sys", key)).exists():
                path.write_text(value)
        with IPRoute() as ip:
            ip.link("set", index=1, state="up")

    def _join(self, number: int, left: str, right: str, mtu: int) -> None:
        """The end of a link is called after whom it leads to."""
        peer = {"ifname": left, "net_ns_fd": self._namespaces[right], "mtu": mtu}
        with self.at(left), IPRoute() as ip:
            ip.link("add", ifname=right, kind="veth", mtu=mtu, peer=peer)
        for host, (here, there) in enumerate(((left, right), (right, left)), 1):
            with self.at(here), IPRoute() as ip:
                (index,) = ip.link_lookup(ifname=there)
                ip.addr("add", index=index, address=f"10.{number}.0.{host}", prefixlen=24)
                ip.link("set", index=index, state="up")
                address = f"fd01:0:0:{number}::{host}"
                ip.addr("add", index=index, address=address, prefixlen=64, flags=IFA_F_NODAD)

    def _enter(self, name: str) -> None:
        call("setns", self._namespaces[name], CLONE_NEWNET)

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Sockets that this thread makes are those of `name`."""
        self._enter(name)
        try:
            yield
        finally:
            self._enter("H")

    def udp(self, name: str, port: int = 0, *, address: str | None = None) -> socket.socket:
        """A non-blocking socket of `name`, bound to its own address or to another."""
        family = socket.AF_INET6 if ":" in (address or "") else socket.AF_INET
        with self.at(name):
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.bind((address or _ADDRESS[name], port))
        return sock

    def tcp(self, name: str, port: int = 0, *, address: str | None = None) -> socket.socket:
        """A listener of `name`."""
        family = socket.AF_INET6 if ":" in (address or "") else socket.AF_INET
        with self.at(name):
            return socket.create_server((address or _ADDRESS[name], port), family=family)


Body = Callable[Concatenate[Hops, P], Awaitable[None]]


def in_h(*, ping: bool = True, privileged: bool = False) -> Callable[[Body[P]], Callable[P, None]]:
    """The test's body runs in H, on asyncio: it is given `Hops`, then the fixtures and parameters it names.

    `ping`: whether net.ipv4.ping_group_range lets it have ping sockets.  `privileged`: whether it keeps the
    capabilities of the user namespace's root.  It has `SECONDS`, and must leave nothing behind.
    """

    def decorate(body: Body[P]) -> Callable[P, None]:
        @wraps(body)
        def test(*args: P.args, **kwargs: P.kwargs) -> None:
            needs_tun()
            in_child(lambda: _run(body, Hops(ping=ping, privileged=privileged), *args, **kwargs))

        _, *parameters = inspect.signature(body).parameters.values()
        test.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # pytest goes by it
        return test

    return decorate


def _run(body: Body[P], hops: Hops, *args: P.args, **kwargs: P.kwargs) -> None:
    async def bounded() -> None:
        with anyio.fail_after(SECONDS):
            await body(hops, *args, **kwargs)

    before = Possessions()
    anyio.run(bounded)
    difference = before.difference()
    assert not difference, "\n".join(["not as it was before:", *difference])


def in_child(function: Callable[[], None]) -> None:
    """Call it in a child process.  What it raises there is how the running test ends here."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # At times an event loop of an earlier test still has idle threads, which hold no lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        _call_and_tell(function, writer)
    os.close(writer)
    try:
        with open(reader, encoding="utf-8") as pipe:
            said = pipe.read()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == _SKIPPED:
        pytest.skip(said)
    elif code:
        pytest.fail(said or f"the child died: exit status {code}", pytrace=False)


_SKIPPED = 77


def _call_and_tell(function: Callable[[], None], writer: int) -> NoReturn:
    code, said = 1, ""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(2 * SECONDS)  # should it hang where no event loop sees it
        function()
        code = 0
    except pytest.skip.Exception as skip:
        code, said = _SKIPPED, str(skip)
    except BaseException as error:
        said = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    finally:
        with suppress(OSError), open(writer, "w", encoding="utf-8") as pipe:
            pipe.write(said)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# -- what both ends see -------------------------------------------------------------------------------

IP_RECVERR, IP_RECVTOS, IP_RECVTTL, IP_MTU_DISCOVER = 11, 13, 12, 10  # linux/in.h
PMTUDISC_DONT, PMTUDISC_PROBE = 0, 3
_EXTENDED_ERROR = struct.Struct("=IBBBxIxxxx")  # struct sock_extended_err, and a sockaddr_in of the offender
_OFFENDER = slice(20, 24)


class Told(NamedTuple):
    """What ICMP has told a socket (ip(7), IP_RECVERR)."""

    errno: int
    type: int
    code: int
    info: int
    offender: str
    payload: bytes
    sent_to: tuple[str, int]


async def told(sock: socket.socket) -> Told:
    """The next error of a socket that has set IP_RECVERR."""
    while True:
        try:
            payload, ancillary, _, sent_to = sock.recvmsg(1 << 16, 512, socket.MSG_ERRQUEUE)
        except BlockingIOError:
            await anyio.wait_readable(sock)
            continue
        ((_, _, data),) = ancillary
        error, origin, type, code, info = _EXTENDED_ERROR.unpack_from(data)
        assert origin == 2, "an ICMP message, not the kernel's own idea"
        return Told(error, type, code, info, socket.inet_ntoa(data[_OFFENDER]), payload, sent_to)


async def received(sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
    """The next datagram, and who has sent it."""
    await anyio.wait_readable(sock)
    payload, sender = sock.recvfrom(1 << 16)
    return payload, sender


async def received_with(sock: socket.socket, kind: int) -> tuple[bytes, int]:
    """The next datagram, and its IP_TOS or IP_TTL, which the socket has asked for."""
    await anyio.wait_readable(sock)
    payload, ((level, found, data),), _, _ = sock.recvmsg(1 << 16, 64)
    assert (level, found) == (socket.IPPROTO_IP, kind)
    return payload, data[0]


class Icmp(NamedTuple):
    """An ICMP message as a raw socket sees it: who it is from, its TTL, its head, and what follows."""

    sender: str
    ttl: int
    type: int
    code: int
    rest: int  # identifier and sequence number, or an error's
    body: bytes

    @classmethod
    def parse(cls, packet: bytes) -> Icmp:
        assert checksum(packet[:20]) == checksum(packet[20:]) == 0
        type, code, _, rest = struct.unpack_from("!BBHI", packet, 20)
        return cls(socket.inet_ntoa(packet[12:16]), packet[8], type, code, rest, packet[28:])


def checksum(data: bytes) -> int:
    """RFC 1071, the plain way."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def echo_request(identifier: int, sequence: int, payload: bytes = b"") -> bytes:
    """An ICMP echo request for a raw socket."""
    head = struct.pack("!BBHHH", 8, 0, 0, identifier, sequence)
    return struct.pack("!BBHHH", 8, 0, checksum(head + payload), identifier, sequence) + payload
