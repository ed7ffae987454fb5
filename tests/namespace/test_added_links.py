"""What the kernel's refusals of a link mean."""

from __future__ import annotations

import errno

import pytest

from netns_kit import (
    AddedLink,
    ArgumentError,
    FeatureUnavailable,
    Ipvlan,
    Macvlan,
    NetnsKitError,
    NotPrivileged,
    Veth,
    Vlan,
)
from netns_kit.namespace.added_links import explain

LINKS = Macvlan("up0"), Ipvlan("up0"), Veth("nk0"), Vlan("eth0", 7)
OPTIONS = "CONFIG_MACVLAN", "CONFIG_IPVLAN", "CONFIG_VETH", "CONFIG_VLAN_8021Q"


def said(number: int, link: AddedLink) -> NetnsKitError | None:
    return explain(OSError(number, "no"), "more", link)


@pytest.mark.parametrize(("link", "option"), [*zip(LINKS, OPTIONS, strict=True)])
def test_what_a_kernel_lacks_is_named(link: AddedLink, option: str) -> None:
    error = said(errno.EOPNOTSUPP, link)
    assert isinstance(error, FeatureUnavailable)
    assert (error.knob, error.errno) == (option, errno.EOPNOTSUPP)
    assert "modprobe" in str(error)


@pytest.mark.parametrize("link", LINKS)
def test_privilege_that_lacks_is_named_with_where(link: AddedLink) -> None:
    error = said(errno.EPERM, link)
    assert isinstance(error, NotPrivileged)
    assert error.knob == "CAP_NET_ADMIN"
    assert ("root" in str(error)) == (not isinstance(link, Vlan)), "inside it is the namespace that decides"


@pytest.mark.parametrize("link", LINKS)
def test_a_name_that_is_taken_is_an_argument(link: AddedLink) -> None:
    error = said(errno.EEXIST, link)
    assert isinstance(error, ArgumentError)
    assert (error.knob, error.value) == ("name", "'more'")


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL, errno.ENODEV])
@pytest.mark.parametrize("link", LINKS)
def test_a_parent_that_cannot_be_used_is_an_argument(link: AddedLink, number: int) -> None:
    error = said(number, link)
    if isinstance(link, Veth):
        assert error is None, "it has no parent"
    else:
        assert isinstance(error, ArgumentError)
        assert (error.knob, error.value) == ("parent", repr(link.parent))


def test_what_is_not_known_stays_as_the_kernel_says_it() -> None:
    assert said(errno.ENOBUFS, LINKS[0]) is None
