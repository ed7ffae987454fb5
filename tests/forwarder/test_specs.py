"""Port specifications: what people write, what it means, and what is said of what means nothing."""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.errors import ArgumentTypeError, NetnsKitError, PortSpecError
from netns_kit.forwarder import specs
from netns_kit.forwarder.ports import Follow, Mode, PortForward, UnixSocket
from netns_kit.forwarder.specs import BRACKETS, EXAMPLE, parse, parse_all
from netns_kit.host import addresses, sysctl
from tests.support import ROOT

ANY, ANY6 = IPv4Address("0.0.0.0"), IPv6Address("::")
LOCAL, LOCAL6 = IPv4Address("127.0.0.1"), IPv6Address("::1")
GUEST, GUEST6 = IPv4Address("10.0.2.100"), IPv6Address("fd00::100")
SOCK = UnixSocket("/run/x.sock")


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host that is the same everywhere: two interfaces, a name, a hosts file, its range of ephemeral ports."""
    own = [LOCAL, LOCAL6, IPv4Address("192.0.2.7"), IPv6Address("2001:db8::7")]
    file = tmp_path / "hosts"
    file.write_text("127.0.0.1 localhost\n127.0.1.1 box\n192.0.2.8 Web.Internal web\n2001:db8::8 web\n")
    monkeypatch.setattr(addresses, "of_host", lambda: own)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "box", "6", "1", "x86_64")))
    monkeypatch.setattr(specs, "HOSTS", str(file))
    monkeypatch.setattr(sysctl, "numbers", {specs.EPHEMERAL: (32768, 60999)}.__getitem__)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("8080", PortForward("tcp", ANY, 8080, None, 8080)),
        (":8080", PortForward("tcp", ANY, 8080, None, 8080)),
        ("8080:80", PortForward("tcp", ANY, 8080, None, 80)),
        (":8080:80", PortForward("tcp", ANY, 8080, None, 80)),
        ("127.0.0.1:8080:80", PortForward("tcp", LOCAL, 8080, None, 80)),
        ("127.0.0.1:8080:80/tcp", PortForward("tcp", LOCAL, 8080, None, 80)),
        ("127.0.0.1:8080", PortForward("tcp", LOCAL, 8080, None, 8080)),
        ("53:53/udp", PortForward("udp", ANY, 53, None, 53)),
        ("udp:53", PortForward("udp", ANY, 53, None, 53)),
        ("tcp:53", PortForward("tcp", ANY, 53, None, 53)),
        ("udp:53:5353/udp", PortForward("udp", ANY, 53, None, 5353)),
        ("8080:10.0.2.100:80", PortForward("tcp", ANY, 8080, GUEST, 80)),
        ("127.0.0.1:8080:10.0.2.100:80", PortForward("tcp", LOCAL, 8080, GUEST, 80)),
        ("0:80", PortForward("tcp", ANY, 0, None, 80)),
        ("127.0.0.1:0:65535", PortForward("tcp", LOCAL, 0, None, 65535)),
        ("[::1]:8080:80", PortForward("tcp", LOCAL6, 8080, None, 80)),
        ("[::]:8080:[fd00::100]:80", PortForward("tcp", ANY6, 8080, GUEST6, 80)),
        ("[fe80::1%eth0]:80", PortForward("tcp", "fe80::1%eth0", 80, None, 80)),
        ("%eth0:8080:80", PortForward("tcp", ANY, 8080, None, 80, "eth0")),
        ("192.0.2.1%br-1.5:8080:80", PortForward("tcp", "192.0.2.1", 8080, None, 80, "br-1.5")),
        # podman's: without a port of the host, any that is free
        ("127.0.0.1::80", PortForward("tcp", LOCAL, 0, None, 80)),
        ("127.0.0.1::80/udp", PortForward("udp", LOCAL, 0, None, 80)),
        ("%lo::80", PortForward("tcp", ANY, 0, None, 80, "lo")),
        # pasta's: the address before a slash, not in brackets
        ("%eth0/22", PortForward("tcp", ANY, 22, None, 22, "eth0")),
        ("192.0.2.1%eth0/22", PortForward("tcp", "192.0.2.1", 22, None, 22, "eth0")),
        ("2001:db8::7/22:23", PortForward("tcp", "2001:db8::7", 22, None, 23)),
        ("::1%lo/22/udp", PortForward("udp", LOCAL6, 22, None, 22, "lo")),
        ("udp:::1/22", PortForward("udp", LOCAL6, 22, None, 22)),
        ("8080:10.0.2.100/80", PortForward("tcp", ANY, 8080, GUEST, 80)),
        ("::1/8080:fd00::100/80", PortForward("tcp", LOCAL6, 8080, GUEST6, 80)),
        # rootlesskit's: the version of IP beside the protocol
        ("0.0.0.0:8080:10.0.2.100:80/tcp4", PortForward("tcp", ANY, 8080, GUEST, 80)),
        ("8080:80/tcp4", PortForward("tcp", ANY, 8080, None, 80)),
        ("8080:80/tcp6", PortForward("tcp", ANY6, 8080, None, 80)),
        ("udp6:53", PortForward("udp", ANY6, 53, None, 53)),
        ("udp6:53/udp", PortForward("udp", ANY6, 53, None, 53)),
        ("udp:53/udp6", PortForward("udp", ANY6, 53, None, 53)),
        ("[::1]:8080:10.0.2.100:80/tcp6", PortForward("tcp", LOCAL6, 8080, GUEST, 80)),
        ("localhost:80/tcp6", PortForward("tcp", LOCAL6, 80, None, 80)),
        # unix sockets
        ("unix:/run/x.sock:80", PortForward("tcp", SOCK, 0, None, 80)),
        ("unix:/run/x.sock:80/tcp", PortForward("tcp", SOCK, 0, None, 80)),
        ("tcp:unix:@a.b:10.0.2.100:80", PortForward("tcp", UnixSocket("@a.b"), 0, GUEST, 80)),
        ("8080:unix:/run/x.sock", PortForward("tcp", ANY, 8080, SOCK, 0)),
        ("tcp6:localhost::unix:@a", PortForward("tcp", LOCAL6, 0, UnixSocket("@a"), 0)),
        ("unix:/run/x.sock:unix:@a", PortForward("tcp", SOCK, 0, UnixSocket("@a"), 0)),
        ("unix:/a%3ab%2C%25:80", PortForward("tcp", UnixSocket("/a:b,%"), 0, None, 80)),
        ("unix:/a b%C3%A4:80", PortForward("tcp", UnixSocket("/a bä"), 0, None, 80)),
        ("unix:/a%FF:80", PortForward("tcp", UnixSocket("/a\udcff"), 0, None, 80)),
        ("80:unix:/srv%2Ftcp", PortForward("tcp", ANY, 80, UnixSocket("/srv/tcp"), 0)),
        # options
        ("80,mode=fd", PortForward("tcp", ANY, 80, None, 80, mode="fd")),
        ("80:81/udp,optional,freebind", PortForward("udp", ANY, 80, None, 81, freebind=True, optional=True)),
        ("80:unix:/a,mode=socket", PortForward("tcp", ANY, 80, UnixSocket("/a"), 0, mode="socket")),
        ("unix:/a:80,mode=fd", PortForward("tcp", UnixSocket("/a"), 0, None, 80, mode="fd")),
    ],
)
def test_one_port(spec: str, expected: PortForward) -> None:
    assert parse(spec) == (expected,)


@pytest.mark.parametrize(
    ("spec", "pairs"),
    [
        ("8000-8002", [(8000, 8000), (8001, 8001), (8002, 8002)]),
        ("8000-8001:80-81", [(8000, 80), (8001, 81)]),
        ("8000-8000:80", [(8000, 80)]),
        ("65534-65535:1-2", [(65534, 1), (65535, 2)]),
        ("22-24:32-34", [(22, 32), (23, 33), (24, 34)]),
        ("22,25-26:80-81,443", [(22, 22), (25, 80), (26, 81), (443, 443)]),
        ("127.0.0.1/22,:23", [(22, 22), (0, 23)]),
        ("127.0.0.1::80-82", [(0, 80), (0, 81), (0, 82)]),
        ("2000-2005,~2001-2003", [(2000, 2000), (2004, 2004), (2005, 2005)]),
        ("~2001-2003,2000-2005:80-85,~2000", [(2004, 84), (2005, 85)]),
        ("127.0.0.1::80,~80", [(0, 80)]),
        ("none", []),
        ("80,~80", []),
    ],
)
def test_lists_and_ranges_one_by_one(spec: str, pairs: list[tuple[int, int]]) -> None:
    found = [each for each in parse(spec) if isinstance(each, PortForward)]
    assert [(forward.host_port, forward.guest_port) for forward in found] == pairs


@pytest.mark.parametrize(
    ("spec", "hosts"),
    [
        ("localhost:80", [LOCAL, LOCAL6]),
        ("LocalHost%lo/80", [LOCAL, LOCAL6]),
        ("localhost:80/udp4", [LOCAL]),
        ("box:80", [IPv4Address("192.0.2.7"), IPv6Address("2001:db8::7")]),
        ("web:80", [IPv4Address("192.0.2.8"), IPv6Address("2001:db8::8")]),
        ("web.internal:80", [IPv4Address("192.0.2.8")]),
        ("tcp6:web:80", [IPv6Address("2001:db8::8")]),
    ],
)
def test_names_of_the_host(spec: str, hosts: list[object]) -> None:
    assert [each.host for each in parse(spec)] == hosts


def test_localhost_where_there_is_no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "of_host", list)
    assert [each.host for each in parse("localhost:80")] == [LOCAL]
    assert [str(each.host) for each in parse("box:80")] == ["127.0.1.1"], "as the hosts file has it"


def test_a_host_without_a_hosts_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "HOSTS", "/nowhere/hosts")
    with pytest.raises(PortSpecError, match="/nowhere/hosts"):
        parse("web:80")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("auto", [Follow("tcp")]),
        ("auto/udp", [Follow("udp")]),
        ("tcp6:auto", [Follow("tcp", ANY6)]),
        ("192.0.2.2/auto", [Follow("tcp", "192.0.2.2")]),
        ("::1/auto", [Follow("tcp", "::1")]),
        ("[::1]%lo:auto", [Follow("tcp", "::1", "lo")]),
        ("%lo/auto,mode=socket", [Follow("tcp", device="lo", mode="socket")]),
        ("8000-8010,auto", [Follow("tcp", include=[(8000, 8010)])]),
        ("auto,80,8000-8010", [Follow("tcp", include=[(80, 80), (8000, 8010)])]),
        ("auto,~25,~80-90", [Follow("tcp", exclude=[(25, 25), (80, 90)])]),
        ("80-90,~81,auto/udp", [Follow("udp", include=[(80, 90)], exclude=[(81, 81)])]),
        ("localhost:auto", [Follow("tcp", LOCAL), Follow("tcp", LOCAL6)]),
    ],
)
def test_auto_is_a_rule(spec: str, expected: list[Follow]) -> None:
    assert list(parse(spec)) == expected


@pytest.mark.parametrize(
    ("spec", "excluded"), [("all", set()), ("all,~25", {25}), ("~20000-20010", {*range(20000, 20011)})]
)
def test_all_is_whatever_the_kernel_gives_to_nobody(spec: str, excluded: set[int]) -> None:
    forwards = [each for each in parse(spec) if isinstance(each, PortForward)]
    assert {each.host_port for each in forwards} == {*range(1, 32768), *range(61000, 65536)} - excluded
    assert all(each.optional and each.guest_port == each.host_port for each in forwards)


NAMES = "an address, localhost, this machine's name or a name of HOSTS"
END = "',', '/' or the end"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "a port at character 1, not the end"),
        (":", "a port at character 2, not the end"),
        ("x", f"tcp: or udp: or {NAMES} at character 1, not 'x'"),
        ("80x", f"{END} at character 3, not 'x'"),
        ("-80", "a port at character 1, not '-80'"),
        ("80-", "the last port at character 4, not the end"),
        ("80:", "a port inside at character 4, not the end"),
        ("80:x", "an address or a port inside at character 4, not 'x'"),
        ("80:80:80", f"{END} at character 6, not ':'"),
        ("127.0.0.1", "':' and a port at character 10, not the end"),
        ("127.0.0.1:", "a port at character 11, not the end"),
        ("localhost", "':' and a port at character 10, not the end"),
        ("65536:80", "a port (0 to 65535) at character 1, not '65536'"),
        ("80:65536", "a port inside (1 to 65535) at character 4, not '65536'"),
        ("80:0", "a port inside (1 to 65535) at character 4, not '0'"),
        ("2-1", "the last port (2 to 65535) at character 3, not '1'"),
        ("0", "':' and a port inside (host port 0 is any that is free) at character 2, not the end"),
        ("0-3:1-4", "':' and a port inside (host port 0 is any that is free) at character 2, not '-3'"),
        ("80-82:80-81", "3 ports inside (as many as on the host) at character 7, not '80-81'"),
        ("80:80-81", "1 port inside (as many as on the host) at character 4, not '80-81'"),
        ("80/sctp", "tcp or udp at character 4, not 'sctp'"),
        ("80/tcp/tcp", "',' or the end at character 7, not '/'"),
        ("80/tcpx", "tcp or udp at character 4, not 'tcpx'"),
        ("tcp:80/udp", "tcp (as before the ports) at character 8, not 'udp'"),
        ("udp4:80/udp6", "udp4 (as before the ports) at character 9, not 'udp6'"),
        ("tcp:sctp:80", f"{NAMES} at character 5, not 'sctp'"),
        ("256.0.0.1:80:80", f"tcp: or udp: or {NAMES} at character 1, not '256.0.0.1'"),
        ("db:80", f"tcp: or udp: or {NAMES} at character 1, not 'db'"),
        ("80:web:80", "an address or a port inside at character 4, not 'web'"),
        ("80:[::1]", "':' and a port inside at character 9, not the end"),
        ("[::1:80", "']' at character 8, not the end"),
        ("[::g]:80", "an IPv6 address at character 2, not '::g'"),
        ("[]:80", "an IPv6 address at character 2, not ']'"),
        ("::1:80", "a port at character 2, not ':'"),
        ("fe80::1:80", f"tcp: or udp: or {NAMES} at character 1, not 'fe80'"),
        ("tcp4:[::1]:80", "an IPv4 address at character 6, not '['"),
        ("127.0.0.1:80/tcp6", "an IPv6 address at character 1, not '127.0.0.1'"),
        ("tcp4:unix:/a:80", "an IPv4 address at character 6, not 'unix'"),
        ("127.0.0.1%:80", "the name of an interface (1 to 15 characters) at character 11, not ':'"),
        ("%a-name-too-long-by-one:80",
         "the name of an interface (1 to 15 characters) at character 2, not 'a-name-too-long-by-one'"),
        ("80%lo", f"{END} at character 3, not '%'"),
        (" 80", "a port at character 1, not ' 80'"),
        ("80 ", f"{END} at character 3, not ' '"),
        ("80\n", f"{END} at character 3, not '\\n'"),
        ("８0", "a port at character 1, not '８0'"),
        ("80,", "a port, '~', auto or an option at character 4, not the end"),
        ("80,freebnd", "a port, '~', auto or an option at character 4, not 'freebnd'"),
        ("80,mode", "a port, '~', auto or an option at character 4, not 'mode'"),
        ("80,mode=tunnel", "stack, socket, transparent or fd at character 9, not 'tunnel'"),
        ("80,mode=fd,mode=fd", "another option at character 12, not 'mode=fd'"),
        ("80,freebind,81", "mode=, freebind or optional at character 13, not '81'"),
        ("~0", "a port (1 to 65535) at character 2, not '0'"),
        ("none,80", "the end behind none at character 6, not '80'"),
        ("80,none", "a port or '~' at character 4, not 'none'"),
        ("~80,none", "a port or '~' at character 5, not 'none'"),
        ("all,80", "'~' or an option behind all at character 5, not '80'"),
        ("80,all", "a port or '~' at character 4, not 'all'"),
        ("auto,auto", "a port or '~' at character 6, not 'auto'"),
        ("80,81:82,auto", "',' or the end (auto keeps the numbers) at character 6, not ':'"),
        ("auto,freebind", "an option that goes with auto at character 6, not 'freebind'"),
        ("all:80", f"{END} at character 4, not ':'"),
        ("unix:run/x:80",
         "an absolute path or @NAME (at most 107 bytes, no null) at character 6, not 'run/x'"),
        ("unix::80", "an absolute path or @NAME (at most 107 bytes, no null) at character 6, not ':'"),
        ("unix:/a", "':' and what it leads to at character 8, not the end"),
        ("unix:/a:", "a port inside at character 9, not the end"),
        ("unix:/a:80-81", "1 port inside (as many as on the host) at character 9, not '80-81'"),
        ("unix:/a%4:80", "two hexadecimal digits at character 9, not '4'"),
        ("80-81:unix:/a", "2 ports inside (as many as on the host) at character 7, not 'unix:/a'"),
        ("80:unix:/a:b", f"{END} at character 11, not ':'"),
        ("udp:unix:/a:80", "tcp (a unix socket carries streams) at character 1, not 'udp'"),
        ("80:unix:/a,mode=fd", "the mode socket (for a unix socket) at character 17, not 'fd'"),
        ("unix:/a:80,mode=stack", "the mode socket (for a unix socket) at character 17, not 'stack'"),
        ("unix:/a:80,freebind", "no freebind beside a unix socket at character 12, not 'freebind'"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(spec: str, said: str) -> None:
    with pytest.raises(PortSpecError) as caught:
        parse(spec)
    fix = BRACKETS if spec in ("::1:80", "fe80::1:80") else EXAMPLE
    assert str(caught.value) == f"port={spec!r}: expected {said.replace('HOSTS', specs.HOSTS)}; {fix}"
    assert isinstance(caught.value, (ValueError, NetnsKitError))


def test_the_path_of_a_unix_socket_has_no_protocol_behind_it() -> None:
    with pytest.raises(PortSpecError) as caught:
        parse("8080:unix:/a/tcp")
    assert str(caught.value) == (
        "port='8080:unix:/a/tcp': expected ',' or the end behind a unix socket at character 13, not '/'; "
        "it is tcp; a path that ends like this is written with %2F"
    )


PAGE = (ROOT / "docs" / "ports.md").read_text(encoding="utf-8")
EXAMPLES, _, MISTAKES = PAGE.partition("## Mistakes")
MISTAKES = MISTAKES.partition("## ")[0]


@pytest.mark.parametrize(("spec", "cell"), re.findall(r"^\| `([^`]+)` \|([^|]*)\|", EXAMPLES, re.MULTILINE))
def test_the_pages_examples(spec: str, cell: str) -> None:
    assert [each.spec for each in parse(spec)] == re.findall("`([^`]+)`", cell)


@pytest.mark.parametrize(
    ("spec", "said"), re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", MISTAKES, re.MULTILINE)
)
def test_the_pages_mistakes(spec: str, said: str) -> None:
    with pytest.raises(PortSpecError, match=re.escape(f": expected {said}; ")):
        parse(spec)


@pytest.mark.parametrize("spec", ["1" * 5000, "1-" + "1" * 5000, "x" * 5000, "unix:/" + "a" * 5000 + ":80"])
def test_what_is_too_long_is_a_mistake_too(spec: str) -> None:
    with pytest.raises(PortSpecError) as caught:
        parse(spec)
    assert len(str(caught.value)) < 1000


def test_only_text_and_records_are_ports() -> None:
    forward, rule = PortForward("tcp", LOCAL, 80, None, 80), Follow("udp")
    assert parse_all([forward, "81", rule, "auto"]) == [forward, *parse("81"), rule, Follow("tcp")]
    for given_ in (80, None, b"80"):
        with pytest.raises(ArgumentTypeError, match="expected text, a PortForward or a Follow"):
            parse_all([given_])  # type: ignore[list-item]  # the mistake


pieces = st.sampled_from(
    "80 0 8000-8010 65535 : :: / , ~ % %lo [ ] [::1] ::1 fe80::1 127.0.0.1 10.0.2.100 localhost box x tcp: "
    "udp: tcp6: /tcp /udp /tcp4 auto all none unix: /run/x @a %2F mode= stack socket fd freebind optional é".split()
)


@given(st.text(alphabet="0123456789.:-/%[]~,@tcpudnixal =", max_size=24) | st.lists(pieces).map("".join))
def test_what_is_accepted_is_printed_so_that_it_means_the_same(spec: str) -> None:
    """Whatever is written, only one error is raised."""
    try:
        found = parse(spec)
    except PortSpecError:
        return
    for each in found[:20]:
        assert parse(each.spec) == (each,)


ports = st.integers(1, 65535)
addresses_ = st.ip_addresses() | st.just(IPv6Address("fe80::1%eth0"))
modes: st.SearchStrategy[Mode | None] = st.sampled_from([None, "stack", "socket", "transparent", "fd"])
devices = st.none() | st.from_regex(r"[^:/\s\0]{1,15}", fullmatch=True)
sockets = st.builds(
    UnixSocket,
    st.from_regex(r"[/@][^\0]{1,20}", fullmatch=True)
    | st.sampled_from(["/a/tcp", "/a/udp6", "/tcp/a", "/a\udcff", "@/tcp4", "/%", "/a,b:c~"]),
)
forwards = st.one_of(
    st.builds(PortForward, st.sampled_from(["tcp", "udp"]), addresses_, st.integers(0, 65535),
              st.none() | addresses_, ports, devices, modes, st.booleans(), st.booleans()),
    st.builds(PortForward, st.just("tcp"), addresses_, st.integers(0, 65535), sockets, st.just(0), devices,
              st.sampled_from([None, "socket"]), st.booleans(), st.booleans()),
    st.builds(PortForward, st.just("tcp"), sockets, st.just(0), st.none() | addresses_, ports, st.none(),
              st.sampled_from([None, "socket", "fd"]), st.just(False), st.booleans()),
    st.builds(PortForward, st.just("tcp"), sockets, st.just(0), sockets, st.just(0), optional=st.booleans()),
)  # fmt: skip
ranges = st.lists(st.tuples(ports, ports).map(lambda pair: (min(pair), max(pair))), max_size=3)
other_modes = modes.filter(lambda each: each != "fd")
follows = st.builds(Follow, st.sampled_from(["tcp", "udp"]), addresses_, devices, ranges, ranges, other_modes)


@given(forwards | follows)
def test_what_is_printed_means_the_same(each: PortForward | Follow) -> None:
    assert parse(each.spec) == (each,)
