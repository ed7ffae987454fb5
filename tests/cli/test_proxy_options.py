"""--proxy: what is read, and what is never shown."""

from __future__ import annotations

import argparse

import pytest

from netns_kit import HttpConnectUplink, Socks5Uplink, Uplink
from netns_kit.cli.proxy import add_proxy_options, uplink_from
from netns_kit.errors import NetnsKitError


def uplink(*words: str) -> Uplink:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_proxy_options(parser)
    return uplink_from(parser.parse_args(words), {"allow_host_loopback": True})


@pytest.mark.parametrize(
    ("url", "kind", "proxy"),
    [
        ("socks5://192.0.2.7", Socks5Uplink, "192.0.2.7:1080"),
        ("SOCKS5H://192.0.2.7:9050/", Socks5Uplink, "192.0.2.7:9050"),
        ("http://user:pass@[2001:db8::1]:3128", HttpConnectUplink, "[2001:db8::1]:3128"),
        ("http://192.0.2.7", HttpConnectUplink, "192.0.2.7:8080"),
    ],
)
def test_a_url(url: str, kind: type[Socks5Uplink | HttpConnectUplink], proxy: str) -> None:
    made = uplink("--proxy", url, "--proxy-names", "here", "--proxy-resolvers", "host")
    assert isinstance(made, kind)
    assert str(made.proxy) == proxy
    assert (made.wants_names, made.resolvers_by) == (False, "host")
    assert "allow_host_loopback=True" in repr(made)


def test_without_a_url_there_is_no_proxy() -> None:
    assert type(uplink()) is Uplink


@pytest.mark.parametrize(
    "url",
    [
        "192.0.2.7:1080", "socks4://me:s3cr3t@192.0.2.7", "https://me:s3cr3t@192.0.2.7", "socks5://s3cr3t@192.0.2.7",
        "socks5://me:s3cr3t@192.0.2.7:0", "socks5://me:s3cr3t@192.0.2.7:65536", "socks5://me:s3@cr3t@192.0.2.7", "",
    ],
)  # fmt: skip
def test_what_is_no_url_is_not_shown(url: str) -> None:
    with pytest.raises(argparse.ArgumentError) as caught:
        uplink("--proxy", url)
    assert "expected socks5://[USER:PASSWORD@]HOST[:PORT]" in str(caught.value)
    assert "cr3t" not in str(caught.value)


def test_a_name_that_has_no_address() -> None:
    with pytest.raises(NetnsKitError, match="cannot be resolved"):
        uplink("--proxy", "socks5://me:s3cr3t@proxy.invalid:1080")
