"""Uplink: the policy as a table, the resolvers as the host has them, the sockets as they were asked for."""

from __future__ import annotations

import errno
import os
import pickle
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.errors import AddressError, DomainNameError
from netns_kit.host import sysctl
from netns_kit.stack import Refusal
from netns_kit.stack.user import Transport
from netns_kit.subnet import Subnet
from netns_kit.uplink import sockets
from netns_kit.uplink.dns_settings import DnsSettings
from netns_kit.uplink.flow import Endpoint, Flow, Target
from netns_kit.uplink.uplink import UdpPorts, Uplink, is_host_address
from tests.support import needs_ping

pytestmark = pytest.mark.usefixtures("leaks")

SUBNET = Subnet.parse("10.0.2.0/24", ipv6=True)
RESOLVERS = ["192.0.2.53", "127.0.0.53:5353", "[2001:db8::53]:54"]
DNS = Target(
    (
        Endpoint(IPv4Address("192.0.2.53"), 53),
        Endpoint(IPv4Address("127.0.0.53"), 5353),
        Endpoint(IPv6Address("2001:db8::53"), 54),
    )
)
REFUSED, PROHIBITED, NOBODY = Refusal.RESET, Refusal.PROHIBITED, Refusal.HOST_UNREACHABLE


def flow(to: str, protocol: Transport = "tcp") -> Flow:
    address, port = to.rsplit(":", 1)
    return Flow(
        protocol,
        Endpoint(IPv4Address("10.0.2.100"), 40000),
        Endpoint(ip_address(address.strip("[]")), int(port)),
        SUBNET,
    )


def target(to: str) -> Target:
    return Target((flow(to).destination,))


@pytest.mark.parametrize(
    ("protocol", "to", "expected"),
    [
        # the world
        ("tcp", "192.0.2.1:80", target("192.0.2.1:80")),
        ("udp", "192.0.2.1:53", target("192.0.2.1:53")),
        ("icmp", "192.0.2.1:0", target("192.0.2.1:0")),
        ("tcp", "10.0.3.1:80", target("10.0.3.1:80")),
        ("tcp", "[2001:db8::1]:80", target("[2001:db8::1]:80")),
        ("tcp", "223.255.255.255:80", target("223.255.255.255:80")),
        # the DNS address
        ("udp", "10.0.2.3:53", DNS),
        ("tcp", "10.0.2.3:53", DNS),
        ("tcp", "10.0.2.3:80", REFUSED),
        ("udp", "10.0.2.3:5353", REFUSED),
        ("icmp", "10.0.2.3:53", REFUSED),
        ("udp", "[fd00::3]:53", DNS),
        ("tcp", "[fd00::3]:53", DNS),
        ("udp", "[fd00::3]:5353", REFUSED),
        ("icmp", "[fd00::3]:0", REFUSED),
        # the gateway is the host's loopback, and that is not granted
        ("tcp", "[fd00::2]:80", PROHIBITED),
        ("udp", "[fe80::2]:80", PROHIBITED),
        ("tcp", "10.0.2.2:80", PROHIBITED),
        ("udp", "10.0.2.2:53", PROHIBITED),
        # the subnet has nobody else
        ("tcp", "10.0.2.1:80", NOBODY),
        ("tcp", "10.0.2.100:80", NOBODY),
        ("udp", "10.0.2.255:137", NOBODY),
        ("tcp", "10.0.2.0:80", NOBODY),
        ("tcp", "[fd00::1]:80", NOBODY),
        ("icmp", "[fd00::100]:0", NOBODY),
        ("tcp", "[fd00::]:80", NOBODY),
        ("tcp", "[fd00:0:0:1::1]:80", target("[fd00:0:0:1::1]:80")),
        # what would mean the host itself, or no host
        ("tcp", "127.0.0.1:80", PROHIBITED),
        ("udp", "127.255.255.254:53", PROHIBITED),
        ("icmp", "127.0.0.1:0", PROHIBITED),
        ("tcp", "0.0.0.0:80", PROHIBITED),
        ("tcp", "0.0.0.1:80", PROHIBITED),
        ("udp", "0.255.255.255:80", PROHIBITED),
        ("udp", "224.0.0.251:5353", PROHIBITED),
        ("udp", "239.255.255.250:1900", PROHIBITED),
        ("tcp", "240.0.0.1:80", PROHIBITED),
        ("udp", "255.255.255.255:67", PROHIBITED),
        ("tcp", "[::1]:80", PROHIBITED),
        ("tcp", "[::]:80", PROHIBITED),
        ("udp", "[ff02::fb]:5353", PROHIBITED),
        # the same, dressed as IPv6; what is of a link; what is nobody's
        ("tcp", "[fe80::1]:80", PROHIBITED),
        ("udp", "[febf::7]:5353", PROHIBITED),
        ("tcp", "[::127.0.0.1]:80", PROHIBITED),
        ("tcp", "[::192.0.2.1]:80", PROHIBITED),
        ("tcp", "[100::1]:80", target("[100::1]:80")),
        ("tcp", "[64:ff9b::127.0.0.1]:80", PROHIBITED),
        ("udp", "[64:ff9b::224.0.0.1]:80", PROHIBITED),
        ("tcp", "[64:ff9b::192.0.2.1]:80", target("[64:ff9b::192.0.2.1]:80")),
        ("tcp", "[64:ff9b:1::7f00:1]:80", target("[64:ff9b:1::7f00:1]:80")),
        ("tcp", "[::ffff:127.0.0.1]:80", PROHIBITED),
        ("tcp", "[::ffff:0.0.0.0]:80", PROHIBITED),
        ("udp", "[::ffff:224.0.0.1]:80", PROHIBITED),
        ("tcp", "[::ffff:240.0.0.1]:80", PROHIBITED),
        ("tcp", "[2002:7f00:1::]:80", PROHIBITED),
        ("tcp", "[2002:7f00:1::1]:80", PROHIBITED),
    ],
)
def test_where_flows_go(protocol: Transport, to: str, expected: Target | Refusal) -> None:
    assert Uplink(dns=RESOLVERS).route(flow(to, protocol)) == expected


@pytest.mark.parametrize("to", ["[::ffff:192.0.2.1]:80", "[::ffff:10.0.2.2]:80", "[::ffff:10.0.2.3]:53"])
def test_an_ipv4_mapped_address_is_never_on_the_wire(to: str) -> None:
    assert Uplink(dns=RESOLVERS, allow_host_loopback=True).route(flow(to)) is PROHIBITED


@pytest.mark.parametrize(
    ("granted", "port", "expected"),
    [
        (True, 80, target("127.0.0.1:80")),
        (True, 1, target("127.0.0.1:1")),
        (False, 80, PROHIBITED),
        ((), 80, PROHIBITED),
        ([80, 443], 80, target("127.0.0.1:80")),
        (iter([80, 443]), 443, target("127.0.0.1:443")),
        ({80}, 81, PROHIBITED),
        (range(8000, 9000), 8999, target("127.0.0.1:8999")),
        (range(8000, 9000), 9000, PROHIBITED),
    ],
)
def test_the_hosts_loopback(granted: bool, port: int, expected: Target | Refusal) -> None:
    uplink = Uplink(allow_host_loopback=granted)
    expected6 = target(f"[::1]:{port}") if isinstance(expected, Target) else expected
    for protocol in ("tcp", "udp"):
        assert uplink.route(flow(f"10.0.2.2:{port}", protocol)) == expected
        assert uplink.route(flow(f"[fd00::2]:{port}", protocol)) == expected6
        assert uplink.route(flow(f"[fe80::2]:{port}", protocol)) == expected6
    assert uplink.route(flow(f"[::1]:{port}")) is PROHIBITED
    assert uplink.route(flow(f"127.0.0.1:{port}")) is PROHIBITED, "by its own name, never"


@pytest.mark.parametrize(
    ("granted", "expected"), [(True, "127.0.0.1:80"), (False, None), ([80, 443], None), ([], None)]
)
def test_an_echo_has_no_port(granted: bool, expected: str | None) -> None:
    """Its identifier, which the guest chooses, is none: of a list of ports it is not."""
    found = Uplink(allow_host_loopback=granted).route(flow("10.0.2.2:80", "icmp"))
    assert found == (PROHIBITED if expected is None else target(expected))


@pytest.mark.parametrize("to", ["2001:db8::1", "fd00::2", "fd00::3", "::1", "fe80::2"])
def test_without_ipv6_there_is_no_way(to: str) -> None:
    without = Subnet.parse("10.0.2.0/24")
    asked = Flow("tcp", flow(f"[{to}]:53").source, Endpoint(ip_address(to), 53), without)
    assert Uplink(allow_host_loopback=True).route(asked) is Refusal.NET_UNREACHABLE


def test_a_policy_is_asked_of_what_would_go_out() -> None:
    asked: list[Flow] = []

    def policy(asked_of: Flow) -> Refusal | None:
        asked.append(asked_of)
        return Refusal.DROP if asked_of.destination.port == 25 else None

    uplink = Uplink(policy=policy, dns=RESOLVERS)
    assert uplink.route(flow("192.0.2.1:25")) is Refusal.DROP
    assert uplink.route(flow("192.0.2.1:80")) == target("192.0.2.1:80")
    assert asked == [flow("192.0.2.1:25"), flow("192.0.2.1:80")]
    asked.clear()
    for refused in ("127.0.0.1:80", "0.0.0.0:80", "10.0.2.7:80", "10.0.2.2:80"):
        assert isinstance(uplink.route(flow(refused)), Refusal)
    assert asked == [], "what is refused anyway"


def test_route_can_be_replaced() -> None:
    class Elsewhere(Uplink):
        def route(self, flow: Flow) -> Target | Refusal:
            return target("192.0.2.9:9")

    assert Elsewhere().route(flow("127.0.0.1:80")) == target("192.0.2.9:9")


@given(st.ip_addresses(), st.integers(1, 65535), st.sampled_from(("tcp", "udp", "icmp")))
def test_nothing_leads_to_the_host_unasked(
    address: IPv4Address | IPv6Address, port: int, protocol: Transport
) -> None:
    found = Uplink(dns=["192.0.2.53"]).route(
        Flow(protocol, flow("1.1.1.1:1").source, Endpoint(address, port), SUBNET)
    )
    if isinstance(found, Target):
        for endpoint in found.candidates:
            mapped = getattr(endpoint.address, "ipv4_mapped", None) or endpoint.address
            assert not any((mapped.is_loopback, mapped.is_unspecified, mapped.is_multicast))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1", ("192.0.2.1", 53)),
        ("192.0.2.1:5353", ("192.0.2.1", 5353)),
        ("::1", ("::1", 53)),
        ("[::1]", ("::1", 53)),
        ("[::1]:54", ("::1", 54)),
        ("fe80::1%lo", ("fe80::1%lo", 53)),
    ],
)
def test_endpoints_as_people_write_them(text: str, expected: tuple[str, int]) -> None:
    endpoint = Endpoint.parse(text, 53)
    assert endpoint == (ip_address(expected[0]), expected[1])
    assert Endpoint.parse(str(endpoint), 1) == endpoint


@pytest.mark.parametrize(
    "text",
    ["", "x", "localhost", "1.2.3.4:", "1.2.3.4:0", "1.2.3.4:65536", "1.2.3.4:http", "[::1]:", ":53"],
)
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(AddressError, match="expected ADDRESS"):
        Endpoint.parse(text, 53)


@pytest.mark.parametrize("text", ["[::1", "[::1]53", "[::1]x", "1.2.3.4:+53", "1.2.3.4: 53", "1.2.3.4:5_3"])
def test_what_is_no_endpoint_either(text: str) -> None:
    with pytest.raises(AddressError):
        Endpoint.parse(text, 53)


@pytest.mark.parametrize(
    "options",
    [
        {"bind4": "::1"},
        {"bind4": "no-such-device"},
        {"bind4": ""},
        {"bind6": "127.0.0.1"},
        {"dns": ["resolver"]},
    ],
)
def test_bad_addresses_are_refused_at_once(options: dict[str, str]) -> None:
    with pytest.raises(AddressError):
        Uplink(**options)  # type: ignore[arg-type]  # that is the test


# -- resolvers ----------------------------------------------------------------------------------------


def resolvers(uplink: Uplink) -> list[str]:
    return [str(endpoint) for endpoint in uplink.resolvers()]


def test_the_hosts_resolvers_are_followed(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 192.0.2.1\nnameserver 127.0.0.53\n")
    uplink = Uplink(dns=DnsSettings(resolv_conf=str(conf)))
    assert resolvers(uplink) == ["192.0.2.1:53", "127.0.0.53:53"]
    assert uplink.route(flow("10.0.2.3:53", "udp")) == Target(uplink.resolvers())
    conf.write_text("nameserver 2001:db8::1\n")
    assert resolvers(uplink) == ["[2001:db8::1]:53"]
    replacement = tmp_path / "new"
    replacement.write_text("nameserver 2001:db8::2\n")
    stamp = conf.stat()
    os.utime(replacement, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    replacement.rename(conf)  # same time, same size, another file: as a DHCP client does it
    assert resolvers(uplink) == ["[2001:db8::2]:53"]
    conf.unlink()
    assert resolvers(uplink) == ["[2001:db8::2]:53"], "the last that were known"


def test_the_file_is_read_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 192.0.2.1\n")
    uplink = Uplink(dns=DnsSettings(resolv_conf=str(conf)))
    first = uplink.resolvers()
    monkeypatch.setattr("builtins.open", None)
    assert uplink.resolvers() is first


def test_no_resolv_conf_means_the_local_machine(tmp_path: Path) -> None:
    uplink = Uplink(dns=DnsSettings(resolv_conf=str(tmp_path / "absent")))
    assert resolvers(uplink) == ["127.0.0.1:53"]
    (tmp_path / "absent").write_text("nameserver 192.0.2.1\n")
    assert resolvers(uplink) == ["192.0.2.1:53"]


def test_dns_replaces_the_hosts(tmp_path: Path) -> None:
    assert resolvers(Uplink(dns=RESOLVERS)) == ["192.0.2.53:53", "127.0.0.53:5353", "[2001:db8::53]:54"]
    assert resolvers(Uplink(dns=[])) == []


def test_without_resolvers_names_are_resolved_where_they_are_asked_for() -> None:
    assert Uplink(dns=[]).route(flow("10.0.2.3:53", "udp")) == Target()
    assert Uplink(dns=[]).route(flow("10.0.2.3:54", "udp")) is REFUSED


def test_domains_with_resolvers_of_their_own() -> None:
    settings = DnsSettings(domains={"Corp.example.": ["192.0.2.1", "[::1]:5353"], "ads.example": []})
    found = {domain: [str(each) for each in given] for domain, given in settings.domains.items()}
    assert found == {"Corp.example": ["192.0.2.1:53", "[::1]:5353"], "ads.example": []}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"servers": "192.0.2.1"}, TypeError),
        ({"domains": {"a.example": "192.0.2.1"}}, TypeError),
        ({"domains": {"a.example": ["resolver"]}}, AddressError),
        ({"domains": {"a..b": ["192.0.2.1"]}}, DomainNameError),
        ({"search": "a.example"}, TypeError),
        ({"search": ["a b"]}, DomainNameError),
        ({"hook": 7}, TypeError),
    ],
)
def test_settings_of_dns_that_make_no_sense(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        DnsSettings(**options)


def test_the_search_list_is_the_hosts_as_it_is_now(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("search one.example\noptions ndots:2 edns0\n")
    uplink, other = (
        Uplink(dns=DnsSettings(resolv_conf=str(conf))),
        Uplink(dns=DnsSettings(resolv_conf=str(conf), search=["b.example", "."])),
    )
    assert uplink.search() == ("one.example",)
    conf.write_text("search two.example three.example\n")
    assert uplink.search() == ("two.example", "three.example")
    assert other.search() == ("b.example", ".")
    dns = ip_address("10.0.2.3")
    assert uplink.resolv_conf(dns, ip_address("fd00::3")).splitlines() == [
        "nameserver 10.0.2.3", "nameserver fd00::3", "search two.example three.example"
    ]  # fmt: skip
    assert (
        Uplink(dns=DnsSettings(resolv_conf=str(tmp_path / "absent"))).resolv_conf(dns)
        == "nameserver 10.0.2.3\n"
    )


# -- sockets ------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Listens on every address of the host."""
    with socket.create_server(("0.0.0.0", 0)) as sock:
        sock.settimeout(10)
        yield sock


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("address", ["192.0.2.1", "127.0.0.1", "2001:db8::1", "::1"])
def test_sockets_do_not_block(protocol: Transport, address: str) -> None:
    target = ip_address(address)
    with Uplink().open(protocol, target) as sock:
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        assert sock.family == (socket.AF_INET if target.version == 4 else socket.AF_INET6)


def test_a_udp_socket_has_the_guests_port_if_it_is_free() -> None:
    uplink, anyone = Uplink(), IPv4Address("192.0.2.1")
    with uplink.open("udp", anyone) as first:
        port = first.getsockname()[1]
    with uplink.open("udp", anyone, port) as second, uplink.open("udp", anyone, port) as third:
        assert second.getsockname()[1] == port
        assert third.getsockname()[1] not in (0, port)


def test_the_source_address_of_what_goes_out() -> None:
    uplink = Uplink(bind4="127.0.0.9", bind6="::1")
    with uplink.open("udp", IPv4Address("192.0.2.1"), 0) as sock:
        assert sock.getsockname()[0] == "127.0.0.9"
    with uplink.open("udp", IPv6Address("2001:db8::1")) as sock:
        assert sock.getsockname()[0] == "::1"
    with uplink.open("tcp", IPv4Address("192.0.2.1")) as sock:
        assert sock.getsockname()[0] == "127.0.0.9"


def test_but_not_of_what_goes_to_the_hosts_loopback(server: socket.socket) -> None:
    with Uplink(bind4="192.0.2.77").open("tcp", IPv4Address("127.0.0.1")) as sock:
        sock.setblocking(True)
        sock.connect(("127.0.0.1", server.getsockname()[1]))
        accepted, peer = server.accept()
        accepted.close()
        assert peer[0] == "127.0.0.1"


def test_a_source_address_that_is_not_the_hosts() -> None:
    with pytest.raises(OSError, match="assign requested") as caught:
        Uplink(bind4="203.0.113.99").open("tcp", IPv4Address("192.0.2.1"))
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_a_udp_port_of_ipv6_leaves_that_of_ipv4_free() -> None:
    """And hears no IPv4, which would come from mapped addresses."""
    uplink = Uplink()
    with uplink.open("udp", IPv6Address("::1")) as sock:
        port = sock.getsockname()[1]
        with uplink.open("udp", IPv4Address("127.0.0.1"), port) as other:
            assert other.getsockname()[1] == port


class WithoutIPv6(socket.socket):
    """As a kernel without IPv6 has it."""

    def __init__(self, family: int = -1, *rest: int, **named: object) -> None:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        super().__init__(family, *rest, **named)  # type: ignore[arg-type]  # whatever it was called with


def test_a_kernel_without_ipv6(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uplink, addresses = Uplink(), tmp_path / "if_inet6"
    monkeypatch.setattr("netns_kit.uplink.uplink.IF_INET6", str(addresses))
    assert uplink.ipv6_missing() == "its kernel has none"
    addresses.write_text("")
    assert uplink.ipv6_missing() == "net.ipv6.conf.all.disable_ipv6 is 1"
    addresses.write_text("00000000000000000000000000000001 01 80 10 80       lo\n")
    assert uplink.ipv6_missing() is None
    monkeypatch.setattr("socket.socket", WithoutIPv6)
    Uplink(device="lo").check()
    Uplink(bind4="127.0.0.1").check()
    with pytest.raises(OSError, match="not supported"):
        Uplink(bind6="::1").check()


def test_the_interface_of_what_goes_out() -> None:
    def bound_to(sock: socket.socket) -> bytes:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")

    uplink = Uplink(device="lo")
    for protocol in ("tcp", "udp"):
        with uplink.open(protocol, IPv4Address("192.0.2.1")) as sock:
            assert bound_to(sock) == b"lo"
        with uplink.open(protocol, IPv4Address("127.0.0.1")) as sock:
            assert bound_to(sock) == b""
    with pytest.raises(OSError, match="No such device"):
        Uplink(device="no-such-link").open("tcp", IPv4Address("192.0.2.1"))


def test_a_ping_socket() -> None:
    needs_ping()
    with Uplink(bind4="127.0.0.9").open("icmp", IPv4Address("192.0.2.1")) as sock:
        assert sock.proto == socket.IPPROTO_ICMP
        assert not sock.getblocking()


@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
def test_the_hosts_own_addresses_may_be_refused(protocol: Transport) -> None:
    """What is local is the kernel's to say: all of 127.0.0.0/8 is, for one."""
    assert is_host_address(IPv4Address("127.9.9.9"))
    assert not is_host_address(IPv4Address("192.0.2.1"))
    uplink = Uplink(allow_host_addresses=False)
    assert uplink.route(flow("192.0.2.1:80", protocol)) == target("192.0.2.1:80")


def test_what_cannot_be_found_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("netns_kit.uplink.uplink._socket", no_more)
    assert Uplink(allow_host_addresses=False).route(flow("192.0.2.1:80")) is PROHIBITED


@pytest.mark.parametrize(
    "to",
    [
        "169.254.169.254:80",
        "169.254.0.1:1",
        "100.100.100.200:80",
        "[fd00:ec2::254]:80",
        "[64:ff9b::a9fe:a9fe]:80",
        "[2002:a9fe:a9fe::1]:80",
    ],
)
def test_link_local_and_metadata_may_be_refused(to: str) -> None:
    assert isinstance(Uplink().route(flow(to)), Target)
    assert Uplink(allow_link_local=False).route(flow(to)) is PROHIBITED


@pytest.mark.parametrize(
    ("ports", "kept", "asked"),
    [
        ("ephemeral", True, 41234),
        ("ephemeral", False, 5353),
        ("ephemeral", False, 51820),
        ("any", True, 5353),
    ],
)
def test_which_udp_ports_a_guest_keeps(
    monkeypatch: pytest.MonkeyPatch, ports: UdpPorts, kept: bool, asked: int
) -> None:
    """Not one that a service of the host would want."""
    known = {"ip_local_port_range": "32768 60999", "ip_local_reserved_ports": "51820,52000-52010"}
    monkeypatch.setattr(sysctl, "read", lambda name: known[name.rpartition(".")[2]])
    asking: list[int] = []

    def leave_from(
        sock: socket.socket, protocol: Transport, address: None, device: None, port: int
    ) -> socket.socket:
        asking.append(port)  # which this machine may use for something else
        return sockets.leave_from(sock, protocol, address, device, 0)

    monkeypatch.setattr("netns_kit.uplink.uplink.leave_from", leave_from)
    with Uplink(udp_ports=ports).open("udp", IPv4Address("192.0.2.1"), asked) as sock:
        address, port = sock.getsockname()
    assert asking == [asked if kept else 0]
    assert (address, port > 0) == ("0.0.0.0", True)


def test_a_resolver_keeps_its_zone_on_the_way_to_a_worker() -> None:
    """An IPv6Address that is pickled does not."""
    sent = pickle.loads(pickle.dumps(Uplink(dns=["[fe80::1%eth0]:53", "192.0.2.1"])))
    assert [str(each) for each in sent.resolvers()] == ["[fe80::1%eth0]:53", "192.0.2.1:53"]
