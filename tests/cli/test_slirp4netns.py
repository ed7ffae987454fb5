"""slirp4netns's command line, word by word: what callers look for, and what people see who mistype."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from netns_kit.cli.slirp4netns.command import Order, Wrong, parse, run
from tests.support import ROOT, needs

PODMAN = """
    --disable-host-loopback --mtu --enable-sandbox --enable-seccomp --cidr --outbound-addr --enable-ipv6
""".split()
ROOTLESSKIT = """
    --netns-type --enable-ipv6 --cidr --disable-host-loopback --api-socket --enable-sandbox --enable-seccomp
""".split()
ENABLE = "'--enable-ipv6' '--enable-sandbox' '--enable-seccomp'"
MTU = "MTU must be a positive integer (< 65522)"
SLASHED = "CIDR needs to be a network address like 10.0.2.0/24, not like 10.0.2.100/24"


def order(line: str) -> Order:
    found = parse(line.split(), "slirp4netns")
    assert found is not None
    return found


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_has_what_callers_look_for(capfd: pytest.CaptureFixture[str], word: str) -> None:
    assert run([word], "slirp4netns") == 0
    shown, errors = capfd.readouterr()
    assert shown.startswith("Usage: slirp4netns [OPTION]... PID|PATH")
    assert [each for each in PODMAN + ROOTLESSKIT if each not in shown] == []
    assert errors == ""


@pytest.mark.parametrize("word", ["--version", "-v"])
def test_version_has_what_tests_of_callers_look_for(capfd: pytest.CaptureFixture[str], word: str) -> None:
    assert run([word], "slirp4netns") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("slirp4netns version 1.")
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "commit", "libslirp", "SLIRP_CONFIG_VERSION_MAX", "libseccomp",
    ]  # fmt: skip
    assert "SLIRP_CONFIG_VERSION_MAX: 4" in lines


WITH_USAGE = [
    ("", ""),
    ("1", ""),
    ("--netns-type=path", ""),
    ("x tap0", "PID must be a positive integer"),
    ("0 tap0", "PID must be a positive integer"),
    ("--mtu=0 1 tap0", MTU),
    ("-m 65522 1 tap0", MTU),
    ("-mx 1 tap0", MTU),
    ("-r -1 1 tap0", "ready-fd must be a non-negative integer"),
    ("--ready-fd=x 1 tap0", "ready-fd must be a non-negative integer"),
    ("-e -1 1 tap0", "exit-fd must be a non-negative integer"),
    (
        "--netns-type=path /nonexistent tap0",
        "existing path expected when --netns-type=path: No such file or directory",
    ),
    (
        "--netns-type=nonsense /nonexistent tap0",
        "existing path expected when --netns-type=path: No such file or directory",
    ),
    (
        "--macaddress=52:54:00:12:34:56 1 tap0",
        "--macaddr cannot be specified when --configure or -c is not specified",
    ),
    ("--target-type=x 1 tap0", '--target-type must be either "netns" or "bess"'),
    ("--x 1 tap0", "slirp4netns: unrecognized option '--x'"),
    ("--x=y 1 tap0", "slirp4netns: unrecognized option '--x=y'"),
    ("-Z 1 tap0", "slirp4netns: invalid option -- 'Z'"),
    ("-cZ 1 tap0", "slirp4netns: invalid option -- 'Z'"),
    ("1 tap0 --mtu", "slirp4netns: option '--mtu' requires an argument"),
    ("1 tap0 -m", "slirp4netns: option requires an argument -- 'm'"),
    ("--configure=1 1 tap0", "slirp4netns: option '--configure' doesn't allow an argument"),
    (
        "--e 1 tap0",
        f"slirp4netns: option '--e' is ambiguous; possibilities: '--exit-fd' {ENABLE}",
    ),
]
WITHOUT = [
    ("--cidr=10.0.2.0 1 tap0", "invalid CIDR: 10.0.2.0"),
    ("--cidr=10.0.2.0/x 1 tap0", "invalid CIDR: 10.0.2.0/x"),
    ("--cidr=10.0.2.0/024 1 tap0", "invalid CIDR: 10.0.2.0/024"),
    ("--cidr=300.1.1.1/24 1 tap0", "invalid network address: 300.1.1.1"),
    ("--cidr=10.0.2.0/26 1 tap0", "prefix length needs to be 1-25"),
    ("--cidr=10.0.2.0/0 1 tap0", "prefix length needs to be 1-25"),
    ("--cidr=10.0.2.1/30 1 tap0", "prefix length needs to be 1-25"),
    ("--cidr=10.0.2.100/24 1 tap0", SLASHED),
]
OURS = [
    ("--netns-type=tapfd x", "TAPFD must a file descriptor", True),
    ("--cidr=127.0.0.0/8 1 tap0", "127.0.0.0/8", False),
    (
        "--outbound-addr=no-device 1 tap0",
        "outbound-addr has to be valid ipv4 address or interface name.",
        False,
    ),
    ("--outbound-addr=::1 1 tap0", "outbound-addr has to be valid ipv4 address or interface name.", False),
    (
        "--outbound-addr6=no-device 1 tap0",
        "outbound-addr6 has to be valid ipv6 address or interface name.",
        False,
    ),
    ("-c --macaddress=zz 1 tap0", '"zz" is an invalid MAC address.', False),
    ("-c --macaddress=52:54:00:12:34:5 1 tap0", "macaddress has to be a valid MAC address", False),
]


@pytest.mark.parametrize(
    ("line", "text", "usage"),
    [(*each, True) for each in WITH_USAGE] + [(*each, False) for each in WITHOUT] + OURS,
)
def test_what_is_wrong_is_told_and_the_status_is_one(
    capfd: pytest.CaptureFixture[str], line: str, text: str, usage: bool
) -> None:
    assert run(line.split(), "slirp4netns") == 1
    shown, errors = capfd.readouterr()
    assert text in errors
    assert bool(errors) == bool(text)
    assert shown.startswith("Usage: slirp4netns") is usage


@pytest.mark.parametrize(("line", "text"), WITH_USAGE + WITHOUT)
def test_slirp4netns_says_the_same(line: str, text: str) -> None:
    """If it stops at the command line, as it does for each of these."""
    needs("slirp4netns")
    theirs = subprocess.run(
        ["slirp4netns", *line.split()], capture_output=True, text=True, timeout=100, check=False
    )
    assert theirs.stderr.partition("\n")[0] == text
    assert theirs.returncode == 1
    assert ("Usage: " in theirs.stdout) is ((line, text) in WITH_USAGE)


@pytest.mark.parametrize(
    "line",
    [
        "-c -e 3 -r 4 -m 65520 -6 -a /api 1 tap0",
        "-ce3 -r4 -m65520 -6a/api 1 tap0",
        "-6cm 65520 -a /api -e 3 -r 4 1 tap0",
        "--configure --exit-fd 3 --ready-fd 4 --mtu 65520 --enable-ipv6 --api-socket /api 1 tap0",
        "--configure --exit-fd=3 --ready-fd=4 --mtu=65520 --enable-ipv6 --api-socket=/api 1 tap0",
        "1 --conf --exit=3 tap0 --read=4 --mt=65520 --enable-i --api=/api",
        "-c -e 9 -e 3 -r 4 -m 65520 -6 -a /api -- 1 tap0",
    ],
)
def test_options_come_in_every_form_of_getopt_long(line: str) -> None:
    found = order(line)
    assert found == order(
        "--configure --exit-fd=3 --ready-fd=4 --mtu=65520 --enable-ipv6 --api-socket=/api 1 tap0"
    )
    assert (found.exit_fd, found.ready_fd, found.mtu, found.api) == (3, 4, 65520, "/api")
    assert (found.kind, found.target, found.tap, found.configure) == ("pid", "1", "tap0", True)
    assert str(found.subnet.ipv6 and found.subnet.ipv6.guest_interface) == "fd00::100/64"


def test_defaults() -> None:
    found = order("1 tap0")
    assert (found.mtu, str(found.subnet.network), found.loopback, found.dns) == (
        1500,
        "10.0.2.0/24",
        True,
        True,
    )
    assert found.subnet.ipv6 is None
    assert not any((found.configure, found.sandbox, found.seccomp, found.outbound))
    assert [found.exit_fd, found.ready_fd, found.api, found.userns, found.mac] == [None] * 5


@pytest.mark.parametrize("line", ["--disable-host-loopback", "--no-host-loopback"])
def test_the_old_name_of_an_option_is_as_good(line: str) -> None:
    assert not order(f"{line} 1 tap0").loopback
    assert order("--create-sandbox 1 tap0").sandbox


@pytest.mark.parametrize(
    ("line", "kind", "tap"),
    [
        ("--netns-type=path /proc/self/ns/net tap0", "path", "tap0"),
        ("--netns-type=pid 1 tap0", "pid", "tap0"),
        ("--netns-type=tapfd 7", "tapfd", ""),
        ("--target-type=bess /tmp/bess.sock", "bess", ""),
        ("--target-type=netns 1 tap0", "pid", "tap0"),
    ],
)
def test_what_the_first_argument_is(line: str, kind: str, tap: str) -> None:
    found = order(line)
    assert (found.kind, found.tap) == (kind, tap)


def test_an_interface_stands_for_its_address() -> None:
    assert order("--outbound-addr=lo 1 tap0").outbound == {4: "127.0.0.1"}
    assert order("--outbound-addr=192.0.2.1 --outbound-addr6=2001:db8::1 1 tap0").outbound == {
        4: "192.0.2.1",
        6: "2001:db8::1",
    }


def test_too_many_arguments_and_what_is_experimental_only_warn(capfd: pytest.CaptureFixture[str]) -> None:
    assert order("--enable-seccomp --enable-ipv6 --outbound-addr=lo 1 tap0 more") is not None
    assert capfd.readouterr().out.splitlines() == [
        "WARNING: too many arguments",
        "WARNING: Support for seccomp is experimental",
        "WARNING: Support for IPv6 is experimental",
        "WARNING: Support for --outbound-addr is experimental",
    ]


def test_a_wrong_line_raises_before_anything_is_done() -> None:
    with pytest.raises(Wrong):
        parse(["--x"], "slirp4netns")


@pytest.mark.parametrize("words", [["slirp4netns", "--help"], ["slirp4netns", "-v"]])
def test_it_is_a_command_of_netns_kit(words: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "netns_kit", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "slirp4netns" in done.stdout


def test_the_installed_command_is_a_script_of_the_wheel() -> None:
    """Its first line is what every installer puts an interpreter in: no flags, which pip drops and uv garbles."""
    script = "scripts/netns-kit-slirp4netns"
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "[tool.hatch.build.targets.wheel.shared-scripts]\n# no entry" in settings
    assert f'"{script}" = "netns-kit-slirp4netns"\n' in settings
    assert (ROOT / script).read_text(encoding="utf-8").startswith("#!python\n")
    assert os.access(ROOT / script, os.X_OK)
