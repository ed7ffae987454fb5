"""Namespaces of a real kernel: made, joined, used from outside, and nothing left of them."""

# ruff: noqa: PT012 - what raises is a whole `async with` block

from __future__ import annotations

import errno
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.abc
import pytest

from netns_kit import errors
from netns_kit.errors import (
    AddressError,
    IdMapError,
    NamespaceGone,
    NotPrivileged,
    OwnNamespace,
    PortInUseError,
    PrivilegedPortError,
    SysctlError,
    TunUnavailable,
)
from netns_kit.namespace.agent_client import Done
from netns_kit.namespace.namespace import Namespace
from netns_kit.namespace.namespace_links import Interface, InterfaceAddress, Route
from tests.support import ROOT, Possessions, needs, needs_ipv6, needs_subids, needs_tun, needs_userns, subids
from tests.support.servers import SECONDS

pytestmark = pytest.mark.anyio

IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
ROOT_USER = os.geteuid() == 0


@pytest.fixture(autouse=True)
def _userns() -> None:
    needs_userns()


@asynccontextmanager
async def entered(ns: Namespace) -> AsyncIterator[Namespace]:
    """With a bound on all waiting in it."""
    with anyio.fail_after(SECONDS):
        async with ns:
            yield ns


def inode(pid: int | str, kind: str = "net") -> int:
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


@contextmanager
def stranger() -> Iterator[int]:
    """A process of ours, not the library's, in a user and network namespace of its own: its pid."""
    needs("unshare")
    code = "import sys; print(1, flush=True); sys.stdin.read()"
    command = ["unshare", "-Urn", sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


async def uid_map(ns: Namespace) -> list[list[int]]:
    text = (await ns.run(["cat", "/proc/self/uid_map"])).stdout.decode()
    return [[int(word) for word in line.split()] for line in text.splitlines()]


async def test_a_new_namespace() -> None:
    async with entered(Namespace.create()) as ns:
        assert inode(ns.pid) != inode("self")
        assert inode(ns.pid, "user") != inode("self", "user")
        assert int((await ns.run(["stat", "-L", "-c", "%i", "/proc/self/ns/net"])).stdout) == inode(ns.pid)
        assert await ns.links() == (Interface(1, "lo", 65536, "00:00:00:00:00:00", True),)
        assert InterfaceAddress(1, IPv4Interface("127.0.0.1/8")) in await ns.addresses()
        assert await ns.routes() == ()


async def test_ids() -> None:
    uid, gid = os.geteuid(), os.getegid()
    async with entered(Namespace.create()) as ns:
        assert await uid_map(ns) == [[0, uid, 1]]
        assert (await ns.run("id -u; id -g")).stdout == b"0\n0\n"
    async with entered(Namespace.create(ids="same")) as ns:
        assert await uid_map(ns) == [[uid, uid, 1]]
        assert (await ns.run("id -u; id -g")).stdout == f"{uid}\n{gid}\n".encode()
    with pytest.raises(ValueError, match="subids"):
        Namespace.create(ids="everything")  # type: ignore[arg-type]  # that is the test


async def test_subordinate_ids() -> None:
    if not ROOT_USER:
        needs_subids()
    async with entered(Namespace.create(ids="subids")) as ns:
        if ROOT_USER:
            expected = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]  # noqa: ASYNC240
            assert await uid_map(ns) == [[int(first), int(first), int(count)] for first, _, count in expected]
        else:
            assert await uid_map(ns) == [[0, os.getuid(), 1], [1, *(subids() or ())]]
        assert (await ns.run("id -u; id -g")).stdout == b"0\n0\n"
        drop = "import os; os.setgroups([]); os.setgid(7); os.setuid(7); print(os.getuid(), os.getgid())"
        assert (await ns.run([sys.executable, "-S", "-c", drop])).stdout == b"7 7\n"


@pytest.mark.skipif(ROOT_USER, reason="root needs no newuidmap")
async def test_subordinate_ids_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = Possessions()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(IdMapError, match="newuidmap: No such file or directory; install") as caught:
        async with Namespace.create(ids="subids"):
            pass
    assert caught.value.errno == errno.ENOENT
    tool = tmp_path / "newuidmap"
    tool.write_text("#!/bin/sh\necho 'newuidmap: write to uid_map failed' >&2; exit 1\n")
    tool.chmod(0o755)
    said = "write to uid_map failed; .*/newuidmap is uid .*, mode 0755; newuidmap must be setuid root"
    with pytest.raises(IdMapError, match=said):
        async with Namespace.create(ids="subids"):
            pass
    assert not before.difference()


async def test_a_host_that_denies_namespaces_is_told_which_setting(anyio_backend_name: str) -> None:
    code = """if True:
        import anyio, errno, sys
        from netns_kit.errors import UserNamespaceDenied
        from netns_kit.namespace.namespace import Namespace
        open("/proc/sys/user/max_%s_namespaces" % sys.argv[1], "w").write("0")
        async def main():
            try:
                async with Namespace.create():
                    pass
            except UserNamespaceDenied as exc:
                print(errno.errorcode[exc.errno], exc.knob, exc.value, exc.fix)
        anyio.run(main, backend=sys.argv[2])
    """
    for kind in ("user", "net"):
        async with entered(Namespace.create()) as ns:
            argv = [sys.executable, "-c", code, kind, anyio_backend_name]
            said = (await ns.run(argv, cwd=ROOT, stderr=None)).stdout.decode()
            assert said.startswith(f"ENOSPC user.max_{kind}_namespaces 0 raise it"), said


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_say_their_parts_and_travel(name: str) -> None:
    error = getattr(errors, name)("it failed", "some.knob", 3, "turn it")
    is_argument = isinstance(error, errors.ArgumentError)
    assert str(error) == (
        "some.knob=3: it failed; turn it" if is_argument else "it failed; some.knob is 3; turn it"
    )
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.knob, copy.value) == (str(error), "some.knob", 3)
    assert getattr(copy, "errno", None) == getattr(error, "errno", None)
    if isinstance(error, OSError):
        assert error.errno


async def test_attach_by_pid_path_and_descriptor() -> None:
    before = Possessions()
    with stranger() as pid:
        path = f"/proc/{pid}/ns/net"
        fd = os.open(path, os.O_RDONLY)
        try:
            for ns in (Namespace.attach(pid=pid), Namespace.attach(path=path), Namespace.attach(fd=fd)):
                async with entered(ns):
                    assert inode(ns.pid) == inode(pid)
                    assert inode(ns.pid, "user") == inode(pid, "user")
                    assert (await ns.run(["id", "-u"])).stdout == b"0\n"
                    await ns.configure_link("lo")
                    assert (await ns.links())[0].up
            os.fstat(fd)  # still ours
        finally:
            os.close(fd)
    assert not before.difference()


async def test_a_recycled_pid_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    with stranger() as pid:
        old = os.pidfd_open(pid)
    with stranger() as pid, monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", lambda _: old)  # as if the number had passed on since
        with pytest.raises(NamespaceGone, match="no such process"):
            async with Namespace.attach(pid=pid):
                pass


async def test_attach_to_a_namespace_of_the_library_and_to_our_own() -> None:
    async with entered(Namespace.create()) as first, entered(Namespace.attach(pid=first.pid)) as second:
        assert inode(first.pid) == inode(second.pid)
    if ROOT_USER:  # joining what one is in takes CAP_SYS_ADMIN all the same
        async with entered(Namespace.attach(path="/proc/self/ns/net")) as ns:
            assert inode(ns.pid) == inode("self")


def is_in_our_network(pid: int) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/ns/net", "/proc/self/ns/net")
    except PermissionError:
        return False


async def test_attach_says_what_is_wrong(tmp_path: Path) -> None:
    before = Possessions()

    async def enter(ns: Namespace) -> None:
        async with ns:
            pass

    with pytest.raises(ValueError, match="exactly one"):
        Namespace.attach()
    with pytest.raises(ValueError, match="exactly one"):
        Namespace.attach(pid=1, path="/")
    with pytest.raises(FileNotFoundError):
        await enter(Namespace.attach(path=tmp_path / "missing"))
    for wrong in (tmp_path, "/etc/passwd", "/proc/self/ns/mnt"):
        with pytest.raises(OSError, match="not a network namespace") as caught:
            await enter(Namespace.attach(path=wrong))
        assert caught.value.errno == errno.EINVAL
    process = await anyio.run_process("echo $$")
    with pytest.raises(NamespaceGone, match="no such process"):
        await enter(Namespace.attach(pid=int(process.stdout)))
    if not ROOT_USER:
        ours = Namespace.attach(path="/proc/self/ns/net", allow_current=True)
        if not is_in_our_network(1):  # as in a container, whose process 1 may be ours
            with pytest.raises(NotPrivileged):
                await enter(Namespace.attach(pid=1))
        for denied in (Namespace.attach(pid=1, allow_current=True), ours):
            with pytest.raises(NotPrivileged) as refused:
                await enter(denied)
            assert refused.value.errno in {errno.EPERM, errno.EACCES}
    assert not before.difference()


@pytest.mark.parametrize("way", ["pid", "path", "proc", "fd"])
async def test_attaching_to_the_callers_own_namespace_is_refused(way: str) -> None:
    """A process that has not unshared yet would have its taps and routes made where the caller is."""
    before = Possessions()
    late = await anyio.open_process(["/bin/cat"])
    async with late, AsyncExitStack() as held:
        fd = os.open("/proc/self/ns/net", os.O_RDONLY)
        held.callback(os.close, fd)
        targets: dict[str, dict[str, Any]] = {
            "pid": {"pid": late.pid},
            "path": {"path": f"/proc/self/fd/{fd}"},
            "proc": {"path": f"/proc/{late.pid}/ns/net"},
            "fd": {"fd": fd},
        }
        target = targets[way]
        with pytest.raises(OwnNamespace, match=r"is the caller's own; .* allow_current=True"):
            async with Namespace.attach(**target):
                pass
        if ROOT_USER:
            async with Namespace.attach(**target, allow_current=True) as ns:
                assert os.stat(f"/proc/{ns.pid}/ns/net").st_ino == os.fstat(fd).st_ino
        late.kill()
    assert not before.difference()


async def test_the_current_namespace() -> None:
    async with entered(Namespace.current()) as ns:
        assert inode(ns.pid) == inode("self")
        assert inode(ns.pid, "user") == inode("self", "user")
        assert (await ns.run(["id", "-u"])).stdout == f"{os.getuid()}\n".encode()
        assert await ns.links()
        if not ROOT_USER:
            with pytest.raises(NotPrivileged):
                await ns.configure_link("lo", mtu=1500)
            with pytest.raises(TunUnavailable, match="CAP_NET_ADMIN"):
                await ns.open_tap("nk0", [IFF_TAP | IFF_NO_PI])
            with pytest.raises(PermissionError):
                await ns.run(["true"], files={"/etc/hosts": ""})


async def test_sockets_are_of_the_namespace() -> None:
    async with entered(Namespace.create()) as ns, await ns.listen_tcp() as listener:
        port: int = listener.extra(anyio.abc.SocketAttribute.local_port)
        with socket.socket() as outside:
            assert outside.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED

        async def echo(stream: anyio.abc.SocketStream) -> None:
            async with stream:
                async for chunk in stream:
                    await stream.send(chunk)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, echo)
            async with await ns.connect_tcp("127.0.0.1", port) as stream:
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
            code = f"s = socket.create_connection(('127.0.0.1', {port})); s.send(b'x'); print(s.recv(9))"
            said = await ns.run([sys.executable, "-c", f"import socket; {code}"])
            assert said.stdout == b"b'x'\n"
            tasks.cancel_scope.cancel()


async def test_sockets_that_cannot_be_had() -> None:
    async with entered(Namespace.create()) as ns:
        before = Possessions()
        with pytest.raises(ConnectionRefusedError):
            await ns.connect_tcp("127.0.0.1", 9)
        with pytest.raises(OSError) as caught:
            await ns.connect_tcp(IPv4Address("192.0.2.1"), 9)
        assert caught.value.errno == errno.ENETUNREACH
        with pytest.raises(AddressError, match="expected an IPv4 or IPv6 address; resolve names first"):
            await ns.connect_tcp("localhost", 9)
        async with await ns.listen_tcp(port=80):  # its root may
            with pytest.raises(
                PortInUseError, match="80/tcp in the namespace is taken by this process"
            ) as taken:
                await ns.listen_tcp(port=80)
            assert taken.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError) as family:
            await ns.socket(99, socket.SOCK_STREAM)
        assert family.value.errno == errno.EAFNOSUPPORT
        with await ns.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            assert not sock.getblocking()
            assert sock.family == socket.AF_INET6
        assert not before.difference()


BIND = """
import socket, sys
for family, address in (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"):
    for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM:
        socket.socket(family, kind).bind((address, 80))
"""


async def test_low_ports_need_no_privilege_inside() -> None:
    needs_ipv6()
    name = "net.ipv4.ip_unprivileged_port_start"
    host = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()  # noqa: ASYNC240
    async with entered(Namespace.create(ids="same")) as ns:
        assert await ns.get_sysctl(name) == "0"
        await ns.run([sys.executable, "-c", BIND])
        await ns.set_sysctl(name, 81)
        if not ROOT_USER:
            refused = await ns.run([sys.executable, "-c", BIND], check=False, stderr=subprocess.PIPE)
            assert b"PermissionError" in refused.stderr
    assert Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text() == host  # noqa: ASYNC240


async def test_who_has_a_port_inside_is_named() -> None:
    serve = "import socket; s = socket.create_server(('127.0.0.1', 80)); print('on', flush=True); s.accept()"
    async with (
        entered(Namespace.create()) as ns,
        await ns.popen([sys.executable, "-c", serve], stdout=subprocess.PIPE) as server,
    ):
        assert server.stdout
        await server.stdout.receive()
        with pytest.raises(PortInUseError, match=rf"taken by process \d+, {sys.executable} -c"):
            await ns.listen_tcp(port=80)


async def test_a_low_port_of_the_host_needs_one() -> None:
    start = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())  # noqa: ASYNC240
    if ROOT_USER or start <= 80:
        pytest.skip("this user may use port 80")
    async with Namespace.current() as ns:
        with pytest.raises(PrivilegedPortError, match=f"port 80 in the namespace; .* is {start}"):
            await ns.listen_tcp(port=80)


async def test_sysctls_are_the_namespaces() -> None:
    needs_tun()
    needs("ip")
    name = "net.ipv4.ip_default_ttl"
    host = Path("/proc/sys/net/ipv4/ip_default_ttl").read_text().strip()  # noqa: ASYNC240
    async with entered(Namespace.create()) as ns:
        assert await ns.get_sysctl(name) == "64"
        await ns.set_sysctl(name, 33)
        assert await ns.get_sysctl("net/ipv4/ip_default_ttl") == "33"
        await ns.set_sysctl("net.ipv4.ping_group_range", "0 0")
        assert (await ns.get_sysctl("net.ipv4.ping_group_range")).split() == ["0", "0"]
        await ns.run("ip tuntap add eth0.1 mode tap")
        await ns.set_sysctl("net.ipv4.conf.eth0/1.rp_filter", 2)
        assert await ns.get_sysctl("net/ipv4/conf/eth0.1/rp_filter") == "2"
        wrong = [
            ("net.ipv4.no_such", errno.ENOENT),
            ("net.ipv4", errno.EISDIR),
            ("kernel.hostname", errno.EINVAL),
            ("net/../kernel/hostname", errno.EINVAL),
            ("net.ipv4...kernel.hostname", errno.EINVAL),
            ("net.//.kernel.hostname", errno.EINVAL),
            ("/net/ipv4/ip_default_ttl", errno.EINVAL),
            ("net.ipv4\0.x", errno.EINVAL),
            ("", errno.EINVAL),
        ]
        for bad, number in wrong:
            with pytest.raises(SysctlError) as caught:
                await ns.get_sysctl(bad)
            assert (bad, caught.value.errno) == (bad, number)
            with pytest.raises(SysctlError):
                await ns.set_sysctl(bad, "x")
        with pytest.raises(SysctlError, match="ip_default_ttl is 1000") as refused:
            await ns.set_sysctl(name, 1000)
        assert refused.value.errno == errno.EINVAL
    assert Path("/proc/sys/net/ipv4/ip_default_ttl").read_text().strip() == host  # noqa: ASYNC240


async def test_a_tap_and_its_configuration() -> None:
    needs_tun()
    needs("ip")
    plain = IFF_TAP | IFF_NO_PI
    async with entered(Namespace.create()) as ns:
        tap = await ns.open_tap("tap0", [IFF_NO_PI, plain])  # the first is EINVAL: neither tun nor tap
        try:
            assert (tap.name, tap.flags & 0xFFF, tap.existed) == ("tap0", IFF_TAP, False)
            assert not os.get_blocking(tap.fd)
            for again in (False, True):
                if again:
                    await ns.run("ip route add 10.9.0.0/16 via 10.0.2.7")
                await ns.configure_link(
                    "tap0",
                    mtu=9000,
                    mac="02:00:00:00:00:05",
                    address=IPv4Interface("10.0.2.100/24"),
                    gateway=IPv4Address("10.0.2.2"),
                    neighbours={IPv4Address("10.0.2.2"): bytes((2, 0, 0, 0, 0, again))},
                )
            link = (await ns.links())[-1]
            assert link == Interface(link.index, "tap0", 9000, "02:00:00:00:00:05", True)
            assert InterfaceAddress(link.index, IPv4Interface("10.0.2.100/24")) in await ns.addresses()
            routes = [route for route in await ns.routes() if route.destination.version == 4]
            assert routes == [
                Route(IPv4Network("0.0.0.0/0"), IPv4Address("10.0.2.2"), link.index, 0),
                Route(IPv4Network("10.0.2.0/24"), None, link.index, 0),
                Route(IPv4Network("10.9.0.0/16"), IPv4Address("10.0.2.7"), link.index, 0),
            ]
            known = await ns.run(["ip", "neigh"], stdout=subprocess.PIPE)
            assert known.stdout.split() == b"10.0.2.2 dev tap0 lladdr 02:00:00:00:00:01 PERMANENT".split()
            with pytest.raises(TunUnavailable, match="in use") as busy:
                await ns.open_tap("tap0", [plain])
            assert busy.value.errno == errno.EBUSY
        finally:
            os.close(tap.fd)
        with pytest.raises(TunUnavailable):
            await ns.open_tap("lo", [plain])
        with pytest.raises(OSError, match="No such device") as gone:
            await ns.configure_link("tap0", mtu=1500)
        assert gone.value.filename == "tap0"
        await ns.run(["ip", "tuntap", "add", "tap1", "mode", "tap"])
        tap = await ns.open_tap("tap1", [plain])
        os.close(tap.fd)
        assert tap.existed


async def test_moving_a_link_in() -> None:
    needs_tun()
    needs("ip")
    async with entered(Namespace.create()) as ns:
        with pytest.raises(OSError, match="No such device"):
            await ns.move_link_in("no-such-link")
        if not ROOT_USER:
            name = next(name for _, name in socket.if_nameindex() if name != "lo")
            with pytest.raises(NotPrivileged, match=name):
                await ns.move_link_in(name)
    if ROOT_USER:
        await anyio.run_process(["ip", "tuntap", "add", "nkmoved", "mode", "tap"])
        async with entered(Namespace.create()) as ns:
            await ns.move_link_in("nkmoved")
            assert "nkmoved" in {link.name for link in await ns.links()}
            assert "nkmoved" not in {name for _, name in socket.if_nameindex()}


async def test_ipv6_addresses_and_routes() -> None:
    needs_tun()
    needs("ip")
    async with entered(Namespace.create()) as ns:
        await ns.run(
            "set -e; ip tuntap add t0 mode tap; ip link set t0 up; ip addr add fd00::100/64 dev t0 nodad;"
            "ip -6 route add fd01::/48 via fd00::1"
        )
        index = (await ns.links())[-1].index
        assert InterfaceAddress(index, IPv6Interface("fd00::100/64")) in await ns.addresses()
        assert Route(IPv6Network("fd01::/48"), IPv6Address("fd00::1"), index, 1024) in await ns.routes()


async def test_an_ipv6_address_is_usable_at_once() -> None:
    """Or it is said why not; to do it again is fine."""
    needs_tun()
    address, gateway = IPv6Interface("fd00::100/64"), IPv6Address("fd00::2")
    async with entered(Namespace.create()) as ns:
        tap = await ns.open_tap("tap0", [IFF_TAP | IFF_NO_PI])
        try:
            for _ in range(2):
                assert await ns.configure_link("tap0", address6=address, gateway6=gateway) is None
                with await ns.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                    sock.bind((str(address.ip), 0))
            ways = [way for way in await ns.routes() if way.destination == IPv6Network("::/0")]
            assert [way.gateway for way in ways] == [gateway]
            await ns.set_sysctl("net.ipv6.conf.tap0.disable_ipv6", 1)
            why = await ns.configure_link("tap0", address6=address, gateway6=gateway)
            assert why == "net.ipv6.conf.tap0.disable_ipv6 is 1"
        finally:
            os.close(tap.fd)


async def test_a_dead_agent_ends_the_block() -> None:
    before = Possessions()
    with anyio.fail_after(SECONDS):
        with pytest.raises(NamespaceGone, match="agent"):
            async with Namespace.create() as ns:
                os.kill(ns.pid, signal.SIGKILL)
                await ns.wait_closed()
        with pytest.raises(NamespaceGone):
            await ns.get_sysctl("net.ipv4.ip_forward")
        with pytest.raises(NamespaceGone):
            await ns.run(["true"])
    assert not before.difference()


def state_of(pid: int) -> str:
    """As proc_pid_stat(5) has it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("pids", ["own", "host"])
async def test_a_holder_that_is_stopped_and_continued_stays(pids: Literal["own", "host"]) -> None:
    """As `kill -STOP %1` in a shell does it to all of a job."""
    with anyio.fail_after(SECONDS):
        async with Namespace.create(pids=pids) as ns:
            for number, state in ((signal.SIGSTOP, "T"), (signal.SIGCONT, "S")):
                os.kill(ns.pid, number)
                while state_of(ns.pid) != state:
                    await anyio.lowlevel.checkpoint()
                await ns.run(["true"])  # whose end the agent learns together with that


async def test_the_end_is_one_error_whatever_is_being_started() -> None:
    """And none of the kernel's, which starts nothing any more in a PID namespace that is ending."""
    errors: list[Exception] = []

    async def command(ns: Namespace) -> None:
        try:
            await ns.run(["sleep", "600"])
        except Exception as error:
            errors.append(error)

    with anyio.fail_after(SECONDS):
        for spared in range(20):
            with suppress(NamespaceGone):
                async with Namespace.create() as ns, anyio.create_task_group() as tasks:
                    for _ in range(6):
                        tasks.start_soon(command, ns)
                    for _ in range(spared):
                        await anyio.lowlevel.checkpoint()
                    os.kill(ns.pid, signal.SIGKILL)
    assert len(errors) == 120
    assert not [error for error in errors if not isinstance(error, NamespaceGone)]


async def test_the_end_of_the_process_attached_to_ends_the_block() -> None:
    with stranger() as pid, anyio.fail_after(SECONDS), pytest.raises(NamespaceGone, match="process"):
        async with Namespace.attach(pid=pid) as ns:
            os.kill(pid, signal.SIGKILL)
            await ns.wait_closed()


async def test_after_the_block_it_is_gone() -> None:
    ns = Namespace.create()
    with pytest.raises(NamespaceGone, match="not open"):
        await ns.run(["true"])
    async with entered(ns):
        pid = ns.pid
    assert not Path(f"/proc/{pid}").exists()  # noqa: ASYNC240
    with pytest.raises(NamespaceGone, match="closed"):
        await ns.run(["true"])
    with pytest.raises(RuntimeError, match="once"):
        await ns.__aenter__()


async def test_an_error_of_the_body_is_bare() -> None:
    with pytest.raises(ZeroDivisionError):
        async with entered(Namespace.create()):
            _ = 1 / 0


async def test_cancelled_at_any_moment_nothing_is_left() -> None:
    before = Possessions()
    for milliseconds in range(0, 40, 2):
        with anyio.move_on_after(milliseconds / 1000):
            async with Namespace.create() as ns:
                await ns.run(["sleep", "60"])
    assert not before.difference()


async def test_the_agent_survives_bad_requests() -> None:
    async with entered(Namespace.create()) as ns:
        control = ns._agent._child.channel.socket
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reader, writer = os.pipe()
        try:
            for record in (
                b"{",
                b"@",
                b"[]",
                b"{}",
                b'{"op": 1}',
                b'{"op": "spawn"}',
                b'{"op": "socket"}',
                b"\xff",
            ):
                control.send(record)
                socket.send_fds(control, [record], [writer])
                socket.send_fds(control, [record], [theirs.fileno()])
                socket.send_fds(control, [record], [theirs.fileno(), writer])
                await anyio.wait_readable(ours)
                assert b'"errno"' in ours.recv(4096)
                ours.recv(4096)
            for op in ("open_tap", "configure_link", "sysctl_get", "sysctl_set", "socket", "nothing"):
                with pytest.raises(OSError):
                    await ns._ask(Done, op, name=7, family=[], flags=None, mac="zz", value=None)
        finally:
            for thing in (ours, theirs):
                thing.close()
            os.close(reader)
            os.close(writer)
        assert await ns.get_sysctl("net.ipv4.ip_forward") == "0"
        assert (await ns.run(["true"])).returncode == 0
