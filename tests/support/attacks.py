"""A program that runs inside a namespace, as its root, and tries to get out; `World.tries` starts it.

Its argument is JSON, a list of steps: the name of a function of this module, and its arguments.  It prints JSON: how
each step went, as far as the program can tell.  Besides the standard library it imports nothing, but pyroute2 if an
interface is to be made.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

PATIENCE = 5.0
"""Seconds to wait for an answer."""
SOON = 0.05
"""Seconds to wait for one that nobody is expected to give."""
GUEST, GATEWAY, DNS = "10.0.2.100", "10.0.2.2", "10.0.2.3"
GUEST_6 = "fd00::100"
TAP = "tap0"
GATEWAY_MAC = b"\x52\x55" + socket.inet_aton(GATEWAY)
SO_BINDTODEVICE = 25  # asm-generic/socket.h
TYPES = {"A": 1, "CNAME": 5, "PTR": 12, "TXT": 16, "AAAA": 28, "SVCB": 64, "HTTPS": 65, "ANY": 255}
RCODES = {0: "NOERROR", 2: "SERVFAIL", 3: "NXDOMAIN", 5: "REFUSED"}
MORE_FRAGMENTS = 0x2000
WAYS = (
    "in order",
    "the last one first",
    "the first one of eight bytes",
    "the first one to an allowed address",
    "the first one again with another port",
    "an overlap that changes the port",
    "none but the last one",
    "one that is the whole",
)
"""What `fragments` does."""

_numbers = itertools.count(int.from_bytes(os.urandom(2), "big") >> 1)


def outcome(action: Callable[[], str]) -> str:
    """What `action` returns; or the name of the error that it ends with, "silence", "no name", "closed"."""
    try:
        return action()
    except socket.gaierror:
        return "no name"
    except TimeoutError:
        return "silence"
    except OSError as error:
        if type(error).__module__ == "ssl":
            return str(getattr(error, "reason", error))
        return errno.errorcode.get(error.errno or 0, str(error))


def _open(
    host: str,
    port: int,
    kind: int,
    device: str = "",
    source: str = "",
    patience: float = PATIENCE,
    source_port: int = 0,
) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=kind)[0]
    sock = socket.socket(family, kind)
    sock.settimeout(patience)
    if device:
        sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, device.encode())
    if source or source_port:
        sock.bind((source, source_port))
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def tcp(
    host: str, port: int, say: str = "hello", device: str = "", source: str = "", patience: float = PATIENCE
) -> str:
    """Connect, say something, and hear what comes back."""

    def talk() -> str:
        with _open(host, port, socket.SOCK_STREAM, device, source, patience) as sock:
            sock.sendall(say.encode())
            return sock.recv(4096).decode("ascii", "replace") or "closed"

    return outcome(talk)


def udp(
    host: str, port: int, say: str = "hello", device: str = "", source: str = "", patience: float = PATIENCE
) -> str:
    """Send a datagram, and hear what comes back."""

    def talk() -> str:
        with _open(host, port, socket.SOCK_DGRAM, device, source, patience) as sock:
            sock.send(say.encode())
            return sock.recv(4096).decode("ascii", "replace")

    return outcome(talk)


def http(host: str, port: int, names: Sequence[str]) -> str:
    """Ask in one connection for a page of each of these hosts, and tell how the last answer begins."""

    def talk() -> str:
        with _open(host, port, socket.SOCK_STREAM) as sock:
            said = b""
            for name in names:
                sock.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
                said = sock.recv(4096)
            return " ".join(said.decode().split("\r\n")[0].split()[:2]) or "closed"

    return outcome(talk)


def client_hello(name: str | None) -> bytes:
    """The first bytes of a TLS connection; without a name there is no server_name in them."""
    import ssl  # 10 ms

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def tls(host: str, port: int, name: str | None, pieces: int = 1) -> str:
    """Say a ClientHello, in so many pieces: "heard" if it came back as it was, else how it ended."""

    def talk() -> str:
        hello = client_hello(name)
        with _open(host, port, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            size = -(-len(hello) // pieces)
            for start in range(0, len(hello), size):
                sock.sendall(hello[start : start + size])
                time.sleep(0.01 if pieces > 1 else 0)  # each its own segment, as far as a sender can say
            back = b""
            while len(back) < len(hello) and (data := sock.recv(4096)):
                back += data
            if back == hello:
                return "heard"
            return f"alert {back[6]}" if back[:1] == b"\x15" else "closed"

    return outcome(talk)


def ping(host: str, say: str = "hello", type: int = 8, code: int = 0) -> str:
    """Send an ICMP message, by default an echo request, and tell whether what it said came back."""
    message = _icmp(type, code, struct.pack("!HH", os.getpid() & 0xFFFF, 1) + say.encode())

    def talk() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            sock.sendto(message, (host, 0))
            end = time.monotonic() + (PATIENCE if type == 8 else 0)
            while (left := end - time.monotonic()) > 0 and select.select([sock], [], [], left)[0]:
                packet = sock.recv(4096)
                if packet[20] == 0 and packet.endswith(say.encode()):
                    return say
                if packet[20] == 3:
                    return f"unreachable {packet[21]}"
        raise TimeoutError

    return outcome(talk)


def ask(server: str, name: str, kind: str = "A", protocol: str = "udp") -> str:
    """Ask a DNS server: the code it answers with, and the addresses."""

    def talk() -> str:
        with _open(server, 53, socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM) as sock:
            message = query(name, kind)
            if protocol == "udp":
                sock.send(message)
                answer = sock.recv(4096)
            else:
                sock.sendall(len(message).to_bytes(2, "big") + message)
                size = int.from_bytes(sock.recv(2, socket.MSG_WAITALL), "big")
                answer = sock.recv(size, socket.MSG_WAITALL)
            return " ".join([RCODES.get(answer[3] & 15, "another"), *sorted(addresses(answer))])

    return outcome(talk)


def query(name: str, kind: str = "A") -> bytes:
    """A DNS message that asks."""
    labels = b"".join(bytes((len(each),)) + each.encode() for each in name.rstrip(".").split("."))
    number = next(_numbers) & 0xFFFF
    return struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, TYPES[kind], 1)


def reply(name: str, address: str) -> bytes:
    """A DNS message that answers: what somebody forges."""
    asked = query(name)
    record = struct.pack("!HHHIH", 0xC00C, 1, 1, 3600, 4) + socket.inet_aton(address)
    return asked[:2] + struct.pack("!5H", 0x8180, 1, 1, 0, 0) + asked[12:] + record


def addresses(message: bytes) -> Iterator[str]:
    """Those of the records of an answer, in whatever section they are."""
    _, _, questions, *counts = struct.unpack_from("!6H", message)
    at = 12
    for number in range(questions + sum(counts)):
        while message[at] and message[at] < 0xC0:
            at += message[at] + 1
        at += 2 if message[at] else 1
        if number < questions:
            at += 4
            continue
        kind, _, _, size = struct.unpack_from("!HHIH", message, at)
        at += 10
        if kind in (1, 28):
            yield socket.inet_ntop(socket.AF_INET if kind == 1 else socket.AF_INET6, message[at : at + size])
        at += size


def messages(server: str, allowed: str, denied: str) -> str:
    """Send messages of DNS that mention a denied name beside an allowed one, where nobody may look for it."""
    first, second = query(allowed), query(denied)
    record = reply(denied, "192.0.2.99")[12:]
    head = [0x0100, 1, 0, 0, 0]
    size, *_ = map(len, denied.split("."))
    dotted = second.replace(
        bytes((size,)), bytes((len(denied),)), 1
    )  # one label, with another's length in it
    strange = [
        _message([0x0100, 2, 0, 0, 0], first[12:] + second[12:]),
        _message([0x0100, 2, 0, 0, 0], second[12:] + first[12:]),
        _message([0x0100, 1, 1, 0, 0], first[12:] + record),
        _message([0x0100, 1, 0, 0, 1], first[12:] + record),
        _message(head, first[12:] + second),
        *(_message([code << 11, *head[1:]], second[12:]) for code in (1, 2, 4, 5, 15)),
        _message(head, second[12:-2] + b"\0\3"),
        _message(head, second[12:-4] + b"\0\xfc\0\1"),
        dotted,
    ]

    def talk() -> str:
        with _open(server, 53, socket.SOCK_DGRAM) as sock:
            for each in strange:
                sock.send(each)
                with _open(server, 53, socket.SOCK_STREAM) as stream, suppress(OSError):
                    stream.sendall(len(each).to_bytes(2, "big") + each)
                    stream.recv(1)
        return "sent"

    return outcome(talk)


def _message(numbers: list[int], rest: bytes) -> bytes:
    return struct.pack("!6H", next(_numbers) & 0xFFFF, *numbers) + rest


# -- packets that no socket would send -----------------------------------------------------------------


def checksum(data: bytes) -> bytes:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (total ^ 0xFFFF).to_bytes(2, "big")


def _icmp(type: int, code: int, rest: bytes) -> bytes:
    head = bytes((type, code))
    return head + checksum(head + b"\0\0" + rest) + rest


def _pack(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def _sum(layer4: bytes, at: int, source: str, target: str, protocol: int) -> bytes:
    ends = _pack(source) + _pack(target)
    pseudo = ends + (
        struct.pack("!IHBB", len(layer4), 0, 0, protocol)
        if ":" in target
        else struct.pack("!BBH", 0, protocol, len(layer4))
    )
    return layer4[:at] + checksum(pseudo + layer4) + layer4[at + 2 :]


def ipv4(
    target: str, protocol: int, payload: bytes, source: str = GUEST, number: int = 0, part: int = 0
) -> bytes:
    """A packet, or a part of one: `part` is the field of flags and offset."""
    head = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(payload), number, part, 64, protocol)
    ends = _pack(source) + _pack(target)
    return head + checksum(head + b"\0\0" + ends) + ends + payload


def datagram(target: str, port: int, payload: bytes, source: str, source_port: int = 40000) -> bytes:
    """A UDP header and its payload."""
    header = struct.pack("!HHHH", source_port, port, 8 + len(payload), 0)
    return _sum(header + payload, 6, source, target, 17)


def syn(target: str, port: int, payload: bytes, source: str) -> bytes:
    """A TCP header with SYN, and data."""
    header = struct.pack("!HHIIBBHHH", 40001, port, 1, 0, 5 << 4, 2, 65535, 0, 0)
    return _sum(header + payload, 16, source, target, 6)


def put(packets: Sequence[bytes]) -> str:
    """Put packets on the link, to the gateway's link address."""

    def send() -> str:
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as sock:
            for each in packets:
                sock.sendto(each, (TAP, 0x86DD if each[0] >> 4 == 6 else 0x0800, 0, 0, GATEWAY_MAC))
        return "sent"

    return outcome(send)


def spoofed(sources: Sequence[str], target: str, port: int) -> str:
    """A datagram, a SYN with data and a ping in the name of each of these."""
    packets = []
    for source in sources:
        packets.append(ipv4(target, 17, datagram(target, port, b"spoofed", source), source))
        packets.append(ipv4(target, 6, syn(target, port, b"spoofed", source), source))
        packets.append(ipv4(target, 1, _icmp(8, 0, b"\0\7\0\1spoofed"), source))
    return put(packets)


def forged_answer(name: str, address: str) -> str:
    """A DNS answer in the name of our DNS address and of resolvers, to whomever may believe it."""
    message = reply(name, address)
    packets = []
    for source, target in (DNS, GATEWAY), (DNS, DNS), (GUEST, DNS), (GATEWAY, DNS), (DNS, GUEST):
        packets.append(ipv4(target, 17, datagram(target, 53, message, source, 53), source))
    return put(packets)


def fragments(way: str, denied: str, allowed: str, port: int, denied_port: int) -> str:
    """A datagram in fragments, in one of the ways that have been got past filters."""
    whole = datagram(denied, port, bytes(8) + b"fragments" * 16, GUEST)
    other = datagram(allowed, port, bytes(8) + b"fragments" * 16, GUEST)
    more, cut = MORE_FRAGMENTS, 64

    def part(target: str, data: bytes, number: int, at: int, flags: int) -> bytes:
        return ipv4(target, 17, data, GUEST, number, flags | at // 8)

    if way == "in order":
        packets = [part(denied, whole[:cut], 1, 0, more), part(denied, whole[cut:], 1, cut, 0)]
    elif way == "the last one first":
        packets = [part(denied, whole[cut:], 2, cut, 0), part(denied, whole[:cut], 2, 0, more)]
    elif way == "the first one of eight bytes":
        packets = [part(denied, whole[:8], 3, 0, more), part(denied, whole[8:], 3, 8, 0)]
    elif way == "the first one to an allowed address":
        packets = [part(allowed, other[:cut], 4, 0, more), part(denied, whole[cut:], 4, cut, 0)]
    elif way == "the first one again with another port":
        elsewhere = datagram(allowed, denied_port, bytes(8) + b"fragments" * 16, GUEST)
        packets = [
            part(allowed, other[:cut], 5, 0, more),
            part(allowed, elsewhere[:cut], 5, 0, more),
            part(allowed, other[cut:], 5, cut, 0),
            part(allowed, elsewhere[:cut], 5, 0, more),
        ]
    elif way == "an overlap that changes the port":
        elsewhere = datagram(allowed, denied_port, bytes(8) + b"fragments" * 16, GUEST)
        packets = [
            part(allowed, other[:cut], 6, 0, more),
            part(allowed, elsewhere[:16], 6, 0, more),
            part(allowed, other[cut:], 6, cut, 0),
        ]
    elif way == "none but the last one":
        packets = [part(denied, whole[cut:], 7, cut, 0)]
    else:
        packets = [ipv4(denied, 17, whole, GUEST, 8, more)]  # whole, and said to be a part
    return put(packets)


def fragments_6(denied: str, port: int) -> str:
    """A datagram in fragments of IPv6: in order, the last one first, and one that is whole."""
    whole = datagram(denied, port, b"fragments" * 16, GUEST_6)

    def part(data: bytes, number: int, at: int, more: int) -> bytes:
        return ipv6(denied, 44, struct.pack("!BBHI", 17, 0, at | more, number) + data)

    first, last = (whole[:64], 0, 1), (whole[64:], 64, 0)
    pieces = [(1, first), (1, last), (2, last), (2, first), (3, (whole, 0, 0))]
    return put([part(data, number, at, more) for number, (data, at, more) in pieces])


def other_packets(denied: str, denied_6: str, allowed: str, allowed_6: str, port: int) -> str:
    """Packets of other protocols, some with one for a denied host inside; and with a list of hosts to pass by."""
    inside = ipv4(denied, 17, datagram(denied, port, b"inside", GUEST))
    inside_6 = ipv6(denied_6, 17, datagram(denied_6, port, b"inside", GUEST_6))
    packets = [
        ipv4(allowed, number, inside) for number in (2, 4, 33, 46, 47, 50, 51, 89, 94, 112, 132, 136, 253)
    ]
    packets += [
        ipv6(allowed_6, number, inside_6) for number in (4, 41, 47, 50, 51, 59, 89, 132, 135, 139, 253)
    ]
    for option in (131, 137):  # loose and strict source route: by the allowed host to the denied one
        route = bytes((option, 7, 4)) + _pack(denied) + b"\0"
        payload = datagram(allowed, port, b"by a source route", GUEST)
        head = struct.pack("!BBHHHBB", 0x47, 0, 28 + len(payload), 0, 0, 64, 17)
        ends = _pack(GUEST) + _pack(allowed)
        packets.append(head + checksum(head + b"\0\0" + ends + route) + ends + route + payload)
    for kind in (0, 2, 4):  # routing headers of IPv6
        header = struct.pack("!BBBBI", 17, 2, kind, 1, 0) + _pack(denied_6)
        packets.append(
            ipv6(allowed_6, 43, header + datagram(denied_6, port, b"by a routing header", GUEST_6))
        )
    return put(packets)


def insists(host: str, port: int, datagrams: int) -> None:
    """Try again and again, until killed.  The first time has been when this says so."""
    say([tcp(host, port), udp(host, datagrams)])
    while True:
        tcp(host, port, patience=SOON)
        udp(host, datagrams, patience=SOON)


def probes(host: str, port: int, datagrams: int) -> dict[str, list[str]]:
    """Try all the time, until a line on standard input tells the times between which it was refused.

    Returns:
        What was said in vain within one of those, or was answered within or outside of them.
    """
    tried: list[tuple[float, float, str, str]] = []
    ports, is_over = iter(range(10000, 60000)), threading.Event()  # one of a flow that goes on is that flow

    def talk(kind: int, at: int, source: int, said: str) -> str:
        with _open(host, at, kind, patience=SOON, source_port=source) as sock:
            sock.sendall(said.encode())
            return sock.recv(4096).decode()

    def run() -> None:
        while not is_over.is_set():
            for kind, at in (socket.SOCK_STREAM, port), (socket.SOCK_DGRAM, datagrams):
                source = next(ports)
                said, began = f"<{source}>", time.monotonic()
                told = outcome(partial(talk, kind, at, source, said))
                tried.append((began, time.monotonic(), said, told))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for each in threads:
        each.start()
    say("it tries")
    refused = json.loads(sys.stdin.readline())
    is_over.set()
    for each in threads:
        each.join()
    found: dict[str, list[str]] = {"refused": [], "passed": [], "allowed": []}
    for began, ended, said, told in tried:
        if any(start <= began and ended <= end for start, end in refused):
            if told != "silence":  # whose packets may have waited until it was allowed
                found["passed" if told == said else "refused"].append(said)
        elif told == said:
            found["allowed"].append(said)
    return found


def ipv6(target: str, protocol: int, payload: bytes, source: str = GUEST_6) -> bytes:
    """A packet."""
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + _pack(source) + _pack(target) + payload


def mapped(address: str, port: int) -> str:
    """What no kernel sends: packets of IPv6 to an IPv4-mapped address, whose way out would be an IPv4 socket's."""
    target = f"::ffff:{address}"
    return put(
        [
            ipv6(target, 17, datagram(target, port, b"mapped", GUEST_6)),
            ipv6(target, 6, syn(target, port, b"mapped", GUEST_6)),
        ]
    )


# -- interfaces ---------------------------------------------------------------------------------------


REACHING = ("macvlan", "address", "route", "mac")
"""What the gateway hears of; nobody is at the other end of other interfaces."""


@contextmanager
def second_interface(kind: str, host: str) -> Iterator[tuple[str, str]]:
    """Make one, or change the first one, and have a way by it to `host`: its name, and an address to speak from."""
    from pyroute2 import IPRoute  # 150 ms

    name, address = f"{kind}9", "172.16.9.1"
    with IPRoute() as ip:
        (tap,) = ip.link_lookup(ifname=TAP)

        def gateway_is(neighbour: str) -> None:
            mac = ":".join(f"{each:02x}" for each in GATEWAY_MAC)
            ip.neigh("replace", dst=neighbour, lladdr=mac, ifindex=tap, state="permanent")

        if kind == "address":
            ip.addr("add", index=tap, address="10.0.2.77", prefixlen=24)
            yield TAP, "10.0.2.77"
        elif kind == "route":
            ip.route("add", dst=f"{host}/32", oif=tap, scope="link")
            gateway_is(host)
            yield TAP, GUEST
        elif kind == "mac":
            ip.link("set", index=tap, state="down")
            ip.link("set", index=tap, address="02:00:00:00:99:99")
            ip.link("set", index=tap, state="up")
            ip.route("replace", dst="0.0.0.0/0", gateway=GATEWAY)
            for each in (GATEWAY, DNS):
                gateway_is(each)
            yield TAP, GUEST
        else:
            options = {"veth": {"peer": "veth10"}, "macvlan": {"link": tap, "macvlan_mode": "bridge"}}.get(
                kind, {}
            )
            ip.link("add", ifname=name, kind=kind, **options)
            (index,) = ip.link_lookup(ifname=name)
            gateway = "172.16.9.2"
            if kind == "macvlan":
                address, gateway = "10.0.2.78", GATEWAY
            ip.addr("add", index=index, address=address, prefixlen=24)
            ip.link("set", index=index, state="up")
            ip.route("add", dst=f"{host}/32", gateway=gateway, oif=index)
            try:
                yield name, address
            finally:
                ip.link("del", index=index)


def beside(kind: str, host: str, port: int) -> list[str]:
    """Try by a second interface: how a datagram and a connection went."""
    try:
        with second_interface(kind, host) as (name, address):
            how = (host, port, "beside", name, address, PATIENCE if kind in REACHING else SOON)
            return [udp(*how), tcp(*how)]
    except Exception as error:
        return [f"not made: {type(error).__name__} {error}"]


def held(host: str, port: int, datagrams: int) -> list[str]:
    """Have a connection, a UDP socket and pings to `host` answer; after a line on standard input, have them again."""
    with _open(host, port, socket.SOCK_STREAM) as stream, _open(host, datagrams, socket.SOCK_DGRAM) as sock:

        def talk(how: socket.socket, say: str) -> str:
            how.sendall(say.encode())
            return how.recv(4096).decode() or "closed"

        before = [talk(stream, "before"), talk(sock, "before"), ping(host, "before")]
        say(before)
        sys.stdin.readline()
        return [
            outcome(lambda: talk(stream, "after")),
            outcome(lambda: talk(sock, "after")),
            ping(host, "after"),
        ]


def until_refused(host: str, port: int, seconds: float) -> str:
    """Connect again and again: how the first time went that did not go well."""
    end = time.monotonic() + seconds
    while (told := tcp(host, port)) == "hello" and time.monotonic() < end:
        time.sleep(0.05)
    return told


def say(what: object) -> None:
    """Print a line of JSON."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    steps = json.loads(sys.argv[1])
    say([globals()[name](*arguments) for name, *arguments in steps])
