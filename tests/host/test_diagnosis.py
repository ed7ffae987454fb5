"""From what failed, and what a host says of itself, to the cause: hosts of every kind, none of them this one."""

from __future__ import annotations

import errno
import os

import pytest

from netns_kit.errors import NetnsKitError, SysctlError
from netns_kit.host import diagnosis, sysctl
from netns_kit.host.diagnosis import APPARMOR, CLONE, LABEL, PING_GROUPS, SECCOMP, TUN, Host

UBUNTU = Host({CLONE: "1", APPARMOR: "1", "user.max_user_namespaces": "9"})
DEBIAN = Host({CLONE: "0", "user.max_user_namespaces": "9"})
DOCKER = Host({"user.max_user_namespaces": "9"}, seccomp=True, label="docker-default (enforce)")
PLAIN = Host({"user.max_user_namespaces": "9", "user.max_net_namespaces": "3"}, label="unconfined")


@pytest.mark.parametrize(
    ("number", "step", "host", "filtered", "knob", "value"),
    [
        (errno.EPERM, "unshare user", DEBIAN, False, CLONE, 0),
        (errno.EPERM, "unshare net", DEBIAN, False, None, None),
        (errno.EACCES, "unshare user", UBUNTU, False, APPARMOR, 1),
        (errno.EACCES, "map", UBUNTU, False, APPARMOR, 1),
        (errno.EPERM, "loopback", UBUNTU, False, APPARMOR, 1),
        (errno.EACCES, "mount", UBUNTU, None, APPARMOR, 1),
        (errno.EPERM, "unshare user", UBUNTU._replace(seccomp=True), True, SECCOMP, 2),
        (errno.EPERM, "unshare user", UBUNTU._replace(seccomp=True), False, APPARMOR, 1),
        (errno.ENOSYS, "unshare user", PLAIN._replace(seccomp=True), True, SECCOMP, 2),
        (errno.ENOSPC, "unshare user", PLAIN, False, "user.max_user_namespaces", 9),
        (errno.EUSERS, "unshare user", PLAIN, False, "user.max_user_namespaces", 9),
        (errno.ENOSPC, "unshare net", PLAIN, False, "user.max_net_namespaces", 3),
        (errno.ENOSPC, "mount", PLAIN, None, "user.max_mnt_namespaces", None),
        (errno.EINVAL, "unshare user", PLAIN, False, "CONFIG_USER_NS", "not set"),
        (errno.EINVAL, "unshare net", PLAIN, False, "CONFIG_NET_NS", "not set"),
        (errno.EPERM, "unshare user", DOCKER, True, SECCOMP, 2),
        (errno.EPERM, "mount", DOCKER, None, SECCOMP, 2),
        (errno.EACCES, "unshare net", DOCKER, False, LABEL, "docker-default (enforce)"),
        (errno.EPERM, "map", DOCKER._replace(label=""), False, None, None),
        (errno.EPERM, "unshare user", PLAIN._replace(seccomp=True), False, SECCOMP, 2),
        (errno.EPERM, "unshare user", PLAIN._replace(chrooted=True), False, "the root directory", "a chroot's"),
        (errno.EPERM, "unshare user", PLAIN, False, None, None),
    ],
)  # fmt: skip
def test_why_there_is_no_namespace(
    number: int, step: str, host: Host, filtered: bool | None, knob: str | None, value: object
) -> None:
    denied = diagnosis.user_namespace(number, step, host, filtered=filtered)
    assert isinstance(denied, PermissionError)
    assert denied.errno == number
    assert (denied.knob, denied.value) == (knob, value)
    assert denied.fix
    assert denied.fix in str(denied)


@pytest.mark.parametrize(
    ("groups", "gid", "fix"),
    [
        ("1 0", 1000, '"1000 1000"'),
        ("65534 65534", 1000, '"1000 1000"'),
        ("0 99", 1000, '"0 1000"'),
        ("2000 3000", 1000, '"1000 3000"'),
    ],
)
def test_the_least_that_lets_this_group_ping(groups: str, gid: int, fix: str) -> None:
    error = diagnosis.ping(errno.EACCES, Host({PING_GROUPS: groups}, gid=gid, seccomp=True))
    assert (error.knob, error.value) == (PING_GROUPS, groups)
    assert fix in str(error.fix)


def test_ping_groups_are_not_blamed_for_what_they_allow() -> None:
    host = Host({PING_GROUPS: "0 2147483647"}, gid=1000)
    assert diagnosis.ping(errno.EPERM, host._replace(seccomp=True)).knob == SECCOMP
    assert diagnosis.ping(errno.EPERM, host).knob is None
    assert diagnosis.ping(errno.EPROTONOSUPPORT, host).knob is None


@pytest.mark.parametrize(
    ("number", "path", "knob", "value"),
    [
        (errno.ENOENT, TUN, TUN, "missing"),
        (errno.ENODEV, TUN, TUN, "without a driver"),
        (errno.ENXIO, TUN, TUN, "without a driver"),
        (errno.EPERM, TUN, TUN, "denied"),
        (errno.EBUSY, "tap7", "tap7", "in use"),
        (errno.EPERM, "tap7", "CAP_NET_ADMIN", "missing"),
        (errno.EINVAL, "tap7", "tap7", None),
    ],
)
def test_why_there_is_no_tap(number: int, path: str, knob: str, value: object) -> None:
    error = diagnosis.tun(OSError(number, os.strerror(number), path), "tap7")
    assert (error.errno, error.knob, error.value) == (number, knob, value)
    assert error.fix


def test_why_there_is_no_ipv6() -> None:
    assert diagnosis.ipv6(errno.EAFNOSUPPORT, {}).value == "not in the kernel"
    for knob in ("net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.lo.disable_ipv6"):
        error = diagnosis.ipv6(errno.EADDRNOTAVAIL, {"net.ipv6.conf.all.disable_ipv6": "0", knob: "1"})
        assert (error.knob, error.value) == (knob, 1)
    assert diagnosis.ipv6(errno.EADDRNOTAVAIL, {}).knob is None


def test_denied_and_absent_are_told_apart() -> None:
    host = Host(release="4.9", seccomp=True)
    denied = diagnosis.feature("pidfds", PermissionError(errno.EPERM, "no"), "5.3", "pidfd_open", host)
    absent = diagnosis.feature("pidfds", OSError(errno.ENOSYS, "no"), "5.3", "pidfd_open", host)
    assert (denied.knob, denied.value) == (SECCOMP, 2)
    assert "allow pidfd_open" in str(denied)
    assert (absent.knob, absent.value, absent.fix) == ("Linux", "4.9", "Linux 5.3 or newer")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (diagnosis.layer("landlock", "disabled"), "add landlock to lsm="),
        (diagnosis.layer("landlock", "unsupported"), "Linux 5.13"),
        (diagnosis.layer("seccomp", "Permission denied"), "let the container"),
        (diagnosis.layer("no such layer", None), "do not require it"),
        (diagnosis.id_ranges("newuidmap", "it failed", None, Host()), "cap_setuid"),
        (diagnosis.id_ranges("newgidmap", "it failed", None, Host(no_new_privs=True)), "without no_new_privs"),
        (diagnosis.privileged_port(80, "of the host", 1024), "sysctl net.ipv4.ip_unprivileged_port_start=80"),
    ],
)  # fmt: skip
def test_what_would_put_it_right(error: NetnsKitError, said: str) -> None:
    assert said in str(error)


# -- sysctls ----------------------------------------------------------------------------------------------


def test_both_spellings_of_a_sysctl() -> None:
    assert sysctl.path("net.ipv4.conf.eth0/1.rp_filter") == "net/ipv4/conf/eth0.1/rp_filter"
    assert sysctl.path("net/ipv4/conf/eth0.1/rp_filter") == "net/ipv4/conf/eth0.1/rp_filter"
    assert sysctl.read("kernel.ostype") == sysctl.read("kernel/ostype") == "Linux"
    assert len(sysctl.numbers("net.ipv4.tcp_rmem")) == 3


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("kernel.no_such_sysctl", errno.ENOENT),
        ("kernel", errno.EISDIR),
        ("net/../kernel/ostype", errno.EINVAL),
        ("/kernel/ostype", errno.EINVAL),
        ("kernel..ostype", errno.EINVAL),
        ("kernel.\0", errno.EINVAL),
        ("", errno.EINVAL),
    ],
)
def test_a_sysctl_that_cannot_be_read(name: str, number: int) -> None:
    with pytest.raises(SysctlError) as caught:
        sysctl.read(name)
    assert caught.value.errno == number


def test_a_sysctl_is_checked() -> None:
    sysctl.check("kernel.ostype", "Linux")
    sysctl.check("net.ipv4.tcp_rmem", sysctl.numbers("net.ipv4.tcp_rmem"))
    with pytest.raises(SysctlError, match=r'kernel.ostype is Linux; sysctl -w kernel.ostype="7"') as caught:
        sysctl.check("kernel.ostype", 7)
    assert caught.value.value == "Linux"
    with pytest.raises(SysctlError, match="not a number"):
        sysctl.numbers("kernel.ostype")
