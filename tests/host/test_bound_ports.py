"""Who has a port that is taken: this process, another of the same user, another user, nobody any more."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

from netns_kit.host import bound_ports
from tests.support import needs_ipv6
from tests.support.servers import SECONDS

LOCAL = IPv4Address("127.0.0.1")
HOLDER = """
import os, socket, sys
family, kind, address = socket.AddressFamily(int(sys.argv[1])), socket.SocketKind(int(sys.argv[2])), sys.argv[3]
sock = socket.socket(family, kind)
if family == socket.AF_INET6:
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, sys.argv[4] == "only")
sock.bind((address, 0))
if kind == socket.SOCK_STREAM:
    sock.listen()
child = sys.argv[4] == "fork" and os.fork()
if not child:
    print(sock.getsockname()[1], flush=True)
    sys.stdin.read()
else:
    os.waitpid(child, 0)
"""


@contextmanager
def held(address: str = "127.0.0.1", protocol: str = "tcp", only: str = "") -> Iterator[tuple[int, int]]:
    """Have another process bind a port; yield its process id and the port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    command = [sys.executable, "-c", HOLDER, str(int(family)), str(int(kind)), address, only]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.pid, int(process.stdout.readline())
        process.communicate(timeout=SECONDS)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_another_process_is_named_with_its_command(protocol: str, bound: str) -> None:
    with held(bound, protocol) as (pid, port):
        named = bound_ports.holder(protocol, LOCAL, port)
        assert named
        assert named.startswith(f"process {pid}, {sys.executable} -c")
        assert named.isprintable()  # the command line has line breaks
        assert len(named) < 200
        assert bound_ports.holder(protocol, IPv4Address("0.0.0.0"), port) == named
        elsewhere = bound_ports.holder(protocol, IPv4Address("127.0.0.2"), port)
        assert elsewhere == (None if bound == "127.0.0.1" else named)
        other = bound_ports.holder("udp" if protocol == "tcp" else "tcp", LOCAL, port)
        assert other != named, "another test may have that port of the other protocol"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_wildcard_of_ipv6_has_ports_of_ipv4(protocol: str) -> None:
    needs_ipv6()
    with held("::", protocol) as (pid, port):
        for wanted in ("127.0.0.1", "0.0.0.0", "::1", "::"):
            named = bound_ports.holder(protocol, ip_address(wanted), port)
            assert named
            assert named.startswith(f"process {pid}, ")
    with held("::1", protocol, "only") as (_, port):
        assert bound_ports.holder(protocol, LOCAL, port) is None
        assert bound_ports.holder(protocol, IPv6Address("fe80::1"), port) is None


def test_a_socket_of_the_same_family_is_surer() -> None:
    needs_ipv6()
    with held("::", "tcp", "only") as (_, port), socket.create_server(("127.0.0.1", port)):
        assert bound_ports.holder("tcp", LOCAL, port) == "this process"


def test_this_process_is_not_named_by_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        assert bound_ports.holder("tcp", LOCAL, sock.getsockname()[1]) == "this process"


def test_those_who_have_inherited_it_are_counted() -> None:
    with held(only="fork") as (pid, port):
        named = bound_ports.holder("tcp", LOCAL, port)
        assert named
        assert named.startswith(f"process {pid}, ")
        assert named.endswith(" and 1 more")


def test_a_client_keeps_a_listener_from_its_port() -> None:
    """A port that the kernel has chosen for a connection may be one that somebody wants to publish."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        port = client.getsockname()[1]
        assert bound_ports.holder("tcp", LOCAL, port) == "this process"


def test_a_connection_that_the_kernel_is_closing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        port = client.getsockname()[1]
        accepted = server.accept()[0]
        client.close()  # first, so that TIME-WAIT is its
        assert accepted.recv(1) == b""
        accepted.close()
        assert bound_ports.holder("tcp", LOCAL, port) == "a connection that the kernel is closing"


def test_another_users_process_is_its_uid(monkeypatch: pytest.MonkeyPatch) -> None:
    with held() as (pid, port):

        def listdir(path: str, listdir: Callable[[str], list[str]] = os.listdir) -> list[str]:
            if path == f"/proc/{pid}/fd":
                raise PermissionError
            return listdir(path)

        monkeypatch.setattr(os, "listdir", listdir)
        assert bound_ports.holder("tcp", LOCAL, port) == f"a process of uid {os.geteuid()}"


@pytest.mark.parametrize("abstract", [False, True])
def test_who_listens_at_a_unix_socket(abstract: bool, short_path: Path) -> None:
    path = f"@{short_path}" if abstract else f"{short_path}/a socket"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0{path[1:]}" if abstract else path)
        assert bound_ports.path_holder(path) is None
        sock.listen()
        assert bound_ports.path_holder(path) == "this process"
    assert bound_ports.path_holder(path) is None


def test_nobody_has_a_free_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    assert bound_ports.holder("tcp", LOCAL, port) is None


def test_whether_a_port_may_be_bound_is_tried() -> None:
    start = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    assert bound_ports.may_bind(max(start, 1))
    with socket.create_server(("", 0)) as taken:
        assert bound_ports.may_bind(taken.getsockname()[1])
    if start > 1:
        assert bound_ports.may_bind(start - 1) == (os.geteuid() == 0)
