"""podman, rootlesskit and Buildah, run by an ordinary user, with our slirp4netns in place of the one they know.

They have a home, a runtime directory and a storage of their own, in a directory with a short name: the path of a
socket of theirs has 107 bytes at most.  The image is busybox.  crun makes no container where both kinds of cgroups
are mixed, so they run in a mount namespace that shows a cgroup2 and nothing else.  It takes a user namespace to mount
that: it is the one that podman and Buildah would have made for themselves, and they are told that it is there.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import needs, needs_ipv6, needs_subids, needs_tun
from tests.support.servers import SECONDS, closed_port, hello, tcp_server
from tests.support.slirp import executable

pytestmark = pytest.mark.usefixtures("leaks")

APPLETS = "sh ip ping nc cat nslookup sleep httpd ls grep hostname true".split()
PODMAN = "--disable-host-loopback --mtu=65520 --enable-sandbox --enable-seccomp --enable-ipv6".split()
LOG = 'open("{}/started", "a").write(__import__("json").dumps([os.getpid(), *sys.argv[1:]]) + "\\n")'


class Machine:
    """A directory with all that the runtimes have of their own."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.runtime = top / "run"
        self.rootfs = top / "rootfs"
        self.bin = top / "bin"
        for directory in (self.runtime, self.rootfs / "bin", self.bin, top / "home"):
            directory.mkdir(parents=True, mode=0o700)
        for name in ("etc", "proc", "sys", "dev", "tmp", "run"):
            (self.rootfs / name).mkdir()
        busybox = shutil.which("busybox")
        assert busybox is not None
        shutil.copy(busybox, self.rootfs / "bin/busybox")
        for applet in APPLETS:
            (self.rootfs / "bin" / applet).symlink_to("busybox")
        (self.rootfs / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
        self.program = executable(self.bin, "slirp4netns", LOG.format(top))
        (top / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\nrunroot = "{top}/run/st"\ngraphroot = "{top}/st"\n'
        )
        (top / "containers.conf").write_text(
            '[containers]\ncgroups = "disabled"\n[network]\nnetwork_backend = "netavark"\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "crun"\n'
            f'network_cmd_path = "{self.program}"\n'
        )
        (top / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        ids = {"UID": os.getuid(), "GID": os.getgid()}
        self.environment = {
            "_CONTAINERS_USERNS_CONFIGURED": "done",
            **{f"_CONTAINERS_ROOTLESS_{name}": str(number) for name, number in ids.items()},
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(top / "home"),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "CONTAINERS_CONF": str(top / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(top / "storage.conf"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    @contextmanager
    def inhabited(self) -> Iterator[None]:
        """The namespaces are there."""
        words = ["unshare", "--user", "--map-root-user", "--map-auto", "--mount", "--cgroup", "sh", "-c"]
        words.append("mount -t cgroup2 none /sys/fs/cgroup && echo && exec cat")
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"\n", "no cgroup2 can be mounted"
            self.enter = ["nsenter", "--preserve-credentials", "--user", "--mount", "--cgroup"]
            self.enter += [f"--target={holder.pid}", "env", f"--chdir={self.top}"]
            try:
                yield
            finally:
                holder.kill()

    def run(self, *command: str, check: bool = True) -> str:
        """What a command prints.  Its children may keep what it prints to open."""
        with tempfile.TemporaryFile("w+") as shown, tempfile.TemporaryFile("w+") as errors:
            status = subprocess.call(
                [*self.enter, *command], stdin=subprocess.DEVNULL, stdout=shown, stderr=errors, env=self.environment,
                timeout=SECONDS * 2,
            )  # fmt: skip
            shown.seek(0)
            errors.seek(0)
            text = shown.read()
            assert not check or status == 0, f"{command}:\n{text}{errors.read()}"
        return text

    def podman(self, *words: str, check: bool = True) -> str:
        return self.run("podman", *words, check=check)

    def container(self, network: str, script: str, *words: str) -> str:
        """What a shell prints in a container with this network."""
        command = [
            "run",
            "--rm",
            f"--network={network}",
            *words,
            "--rootfs",
            str(self.rootfs),
            "sh",
            "-c",
            script,
        ]
        return self.podman(*command)

    def started(self) -> tuple[int, list[str]]:
        """The pid and the arguments of our program as it was last started, but to tell about itself."""
        lines = [json.loads(line) for line in (self.top / "started").read_text().splitlines()]
        pid, *words = next(line for line in reversed(lines) if line[1:] != ["--help"])
        return pid, words


@contextmanager
def ended(pid: int) -> Iterator[None]:
    """The process runs, and ends by the end of the block or soon after."""
    pidfd = os.pidfd_open(pid)
    try:
        assert not select.select([pidfd], [], [], 0)[0], "it has ended already"
        yield
        assert select.select([pidfd], [], [], SECONDS)[0], "it still runs"
    finally:
        os.close(pidfd)


def ordinary(*commands: str) -> None:
    """The running test is for an ordinary user, who has subordinate ids."""
    if os.geteuid() == 0:
        pytest.skip("rootless runtimes are an ordinary user's")
    needs(*commands, "crun", "busybox", "unshare")
    needs_subids()
    needs_tun()


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    ordinary("podman")
    top = Path(tempfile.mkdtemp(prefix="nk"))
    machine = Machine(top)
    with machine.inhabited():
        try:
            yield machine
        finally:
            machine.podman("rm", "--force", "--all", "--time=0", check=False)
            machine.run("rm", "-rf", *(str(each) for each in top.iterdir()), check=False)
            shutil.rmtree(top)


@contextmanager
def running(machine: Machine, network: str, *words: str, command: str = "sleep 1000") -> Iterator[str]:
    """A container in the background: its name."""
    name = f"c{time.monotonic_ns()}"
    machine.podman(
        "run", "--detach", f"--name={name}", f"--network={network}", *words, "--rootfs", str(machine.rootfs),
        *command.split(),
    )  # fmt: skip
    try:
        yield name
    finally:
        machine.podman("rm", "--force", "--time=0", name)


def fetch(port: int, path: str = "passwd") -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=SECONDS) as answer:
        text: bytes = answer.read()
    return text


# -- podman ---------------------------------------------------------------------------------------------


def test_by_default_a_container_does_not_reach_the_hosts_loopback(machine: Machine) -> None:
    with tcp_server(hello) as port:
        shown = machine.container(
            "slirp4netns", f"cat /etc/resolv.conf; nc -w5 10.0.2.2 {port} </dev/null; echo $?"
        )
    assert shown.splitlines()[0] == "nameserver 10.0.2.3"
    assert shown.splitlines()[-1] == "1"
    assert "hello" not in shown
    _, words = machine.started()
    assert words[: len(PODMAN)] == PODMAN
    assert words[len(PODMAN) : -2] == ["-c", "-e", "3", "-r", "4", "--netns-type=path"]


def test_what_podman_is_told_is_what_the_container_has(machine: Machine) -> None:
    needs_ipv6()
    options = "slirp4netns:allow_host_loopback=true,mtu=9000,cidr=10.11.12.0/24,enable_ipv6=true"
    with tcp_server(hello) as port, tcp_server(hello, ("::1", 0)) as port6:
        shown = machine.container(options, f"ip address show tap0; nc -w60 10.11.12.2 {port} </dev/null")
        assert machine.container(options, f"nc -w60 fd00::2 {port6} </dev/null") == "hello"
    assert " mtu 9000 " in shown
    assert " 10.11.12.100/24 " in shown
    assert " fd00::100/64 " in shown
    assert shown.endswith("hello")


def test_without_ipv6_there_is_none(machine: Machine) -> None:
    assert "fd00::" not in machine.container("slirp4netns:enable_ipv6=false", "ip address show tap0")


@pytest.mark.parametrize("handler", ["slirp4netns", "rootlesskit"])
def test_ports_are_published_and_the_end_of_the_container_is_ours(machine: Machine, handler: str) -> None:
    port = closed_port()
    published = f"--publish=127.0.0.1:{port}:80"
    with running(
        machine, f"slirp4netns:port_handler={handler}", published, command="httpd -f -h /etc"
    ) as name:
        assert fetch(port).startswith(b"root:")
        pid, words = machine.started()
        assert ("--api-socket" in words) is (handler == "slirp4netns")
        with ended(pid):
            machine.podman("stop", "--time=0", name)


def test_containers_of_a_network_know_each_other_and_the_world(machine: Machine) -> None:
    """The rootless network namespace: one of us for all containers, without an exit pipe, killed by its pid."""
    needs("netavark" if shutil.which("netavark") else "/usr/lib/podman/netavark", "iptables")
    needs("/usr/lib/podman/aardvark-dns")
    machine.podman("network", "create", "net1")
    try:
        port = closed_port()
        with running(
            machine,
            "net1",
            "--network-alias=web",
            f"--publish=127.0.0.1:{port}:80",
            command="httpd -f -h /etc",
        ):
            pid, words = machine.started()
            assert "-e" not in words
            shown = machine.container(
                "net1", "nslookup web; nc -w60 web 80 </etc/hostname; ping -c1 -W5 10.0.2.2"
            )
            assert machine.started()[0] == pid, "there is one for all"
            assert "web.dns.podman" in shown
            assert "400 Bad Request" in shown
            assert "1 packets received" in shown
            assert fetch(port).startswith(b"root:")
            with ended(pid):
                machine.podman("rm", "--force", "--all", "--time=0")
    finally:
        machine.podman("network", "rm", "--force", "net1")


def test_two_containers_of_a_network_know_each_other_and_find_who_is_restarted(machine: Machine) -> None:
    """Each by the other's name, however often one of them has gone, and one of us carries both."""
    needs("netavark" if shutil.which("netavark") else "/usr/lib/podman/netavark", "iptables")
    needs("/usr/lib/podman/aardvark-dns")
    machine.podman("network", "create", "net2")
    server = "httpd -f -h /etc"
    mac = "--mac-address=02:00:00:00:02:02"  # podman announces no new one; who has the old one waits a minute
    try:
        with (
            running(machine, "net2", "--network-alias=one", command=server) as one,
            running(machine, "net2", "--network-alias=two", mac, command=server) as two,
        ):
            pid, _ = machine.started()
            for _ in range(2):
                for container, other in ((one, "two"), (two, "one")):
                    # podman's resolver, and the other's server, take their time after a restart
                    ask = f"until nc -w5 {other} 80 </etc/hostname"
                    tries = "do n=$((n + 1)); [ $n -lt 60 ] || exit 1; sleep 1; done"
                    shown = machine.podman("exec", container, "sh", "-c", f"{ask}; {tries}")
                    assert "400 Bad Request" in shown
                machine.podman("restart", "--time=0", two)
            assert machine.started()[0] == pid
    finally:
        machine.podman("network", "rm", "--force", "net2")


def test_podman_is_told_why_it_failed(machine: Machine) -> None:
    network = "slirp4netns:outbound_addr=192.0.2.1"
    assert "true" in machine.container(network, "echo true"), "an address may come later"
    with tempfile.TemporaryFile("w+") as errors:
        command = [
            *machine.enter,
            "podman",
            "run",
            "--rm",
            "--network=slirp4netns:cidr=127.0.0.0/8",
            "--rootfs",
            str(machine.rootfs),
            "true",
        ]
        assert subprocess.call(command, env=machine.environment, stderr=errors, timeout=SECONDS) == 126
        errors.seek(0)
        assert "expected a network whose addresses hosts may have" in errors.read()


# -- rootlesskit ----------------------------------------------------------------------------------------

INSIDE = """
ip -br address show tap0; cat /etc/resolv.conf; cat /sys/class/net/tap0/mtu; echo ready
exec busybox httpd -f -p 80 -h /etc
"""


@contextmanager
def rootlesskit(machine: Machine, *words: str) -> Iterator[tuple[int, list[str]]]:
    """It, and what its command has printed; the process's pid.  Its state directory is in ours."""
    command = ["rootlesskit", f"--state-dir={machine.top}/rk", "--net=slirp4netns", "--copy-up=/etc", *words]
    command += [f"--slirp4netns-binary={machine.program}", "sh", "-c", INSIDE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=machine.environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        shown = []
        while line := process.stdout.readline():
            if line == "ready\n":
                break
            shown.append(line.strip())
        try:
            assert line, process.communicate()[1]
            yield process.pid, shown
        finally:
            with ended(machine.started()[0]):
                process.kill()
            process.communicate()
            shutil.rmtree(machine.top / "rk", ignore_errors=True)


@pytest.mark.parametrize("sandbox", ["auto", "false"])
@pytest.mark.parametrize("driver", ["builtin", "slirp4netns"])
def test_rootlesskit(machine: Machine, driver: str, sandbox: str) -> None:
    """Its tap is there before us and configured after; killed, it takes us along."""
    ordinary("rootlesskit")
    port = closed_port()
    options = [
        "--mtu=65520",
        "--disable-host-loopback",
        f"--port-driver={driver}",
        f"--publish=127.0.0.1:{port}:80/tcp",
    ]
    options += [f"--slirp4netns-sandbox={sandbox}", f"--slirp4netns-seccomp={sandbox}"]
    with rootlesskit(machine, *options) as (_, shown):
        assert shown[0].startswith("tap0             UP             10.0.2.100/24")
        assert shown[1:] == ["nameserver 10.0.2.3", "65520"]
        _, words = machine.started()
        assert words[:5] == ["--mtu", "65520", "-r", "3", "--disable-host-loopback"]
        assert ("--enable-sandbox" in words) is ("--enable-seccomp" in words) is (sandbox == "auto")
        assert until_answered(port).startswith(b"root:")


def until_answered(port: int) -> bytes:
    """The server inside may not listen yet, which a forwarder of connections tells by closing them."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return fetch(port)
        except OSError:
            assert time.monotonic() < deadline
            os.sched_yield()


# -- Buildah --------------------------------------------------------------------------------------------


def test_buildah(machine: Machine) -> None:
    """It starts us for each RUN, by our name, and kills us when that is done."""
    ordinary("buildah")
    (machine.top / "Containerfile").write_text(
        "FROM scratch\nCOPY rootfs/ /\nRUN nc -w60 10.0.2.2 $PORT </dev/null >/got && cat /got\n".replace(
            "$PORT", str(port := closed_port())
        )
    )
    with tcp_server(hello, ("127.0.0.1", port)):
        shown = machine.run(
            "buildah", "bud", "--isolation=rootless",
            f"--signature-policy={machine.top}/policy.json", "--file=Containerfile", ".",
        )  # fmt: skip
    assert "hello" in shown
    pid, words = machine.started()
    assert words[:5] == ["--mtu", "65520", "-r", "3", "-c"]
    with suppress(ProcessLookupError), ended(pid):
        pass
