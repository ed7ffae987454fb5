"""--proxy: what is read, and what is never shown."""

from __future__ import annotations

import argparse
import socket

import pytest

from netns_kit import ChooserUplink, Endpoint, Flow, HttpConnectUplink, Socks5Uplink, Subnet, Uplink
from netns_kit.cli.proxy import add_proxy_options, uplink_from
from netns_kit.errors import NetnsKitError
from netns_kit.uplink.flow import NamedFlow


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
        ("192.0.2.7:3128", HttpConnectUplink, "192.0.2.7:3128"),
        ("socks://192.0.2.7:1081/", Socks5Uplink, "192.0.2.7:1081"),
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
        "s3cr3t@192.0.2.7:1080", "socks4://me:s3cr3t@192.0.2.7", "https://me:s3cr3t@192.0.2.7", "socks5://s3cr3t@192.0.2.7",
        "socks5://me:s3cr3t@192.0.2.7:0", "socks5://me:s3cr3t@192.0.2.7:65536", "socks5://me:s3@cr3t@192.0.2.7", "",
    ],
)  # fmt: skip
def test_what_is_no_url_is_not_shown(url: str) -> None:
    with pytest.raises(argparse.ArgumentError) as caught:
        uplink("--proxy", url)
    assert "expected socks5://[USER:PASSWORD@]HOST[:PORT]" in str(caught.value)
    assert "cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "direct", "proxied"),
    [
        ("corp.example", ["corp.example", "a.b.corp.example"], ["xcorp.example"]),
        (".corp.example, localhost", ["a.corp.example"], ["example"]),
        ("*.corp.example:8443", [], ["a.corp.example"]),
        ("10.0.0.0/8 192.0.2.1", ["10.1.2.3", "192.0.2.1"], ["11.0.0.1"]),
        ("2001:db8::/32,[fd00::1]:80", ["2001:db8::5", "fd00::1"], ["fd00::2"]),
    ],
)
def test_what_goes_past_the_proxy(text: str, direct: list[str], proxied: list[str]) -> None:
    made = uplink("--proxy", "socks5://me:s3cr3t@192.0.2.7", "--no-proxy", text)
    assert isinstance(made, ChooserUplink)
    assert "s3cr3t" not in repr(made)
    subnet = Subnet.parse("10.77.0.0/24", ipv6=False)
    for each in direct + proxied:
        is_name = not each.replace(".", "").isdigit() and ":" not in each
        there = Endpoint("203.0.113.1" if is_name else each, 80)
        flow = Flow("tcp", Endpoint("10.77.0.100", 1), there, subnet)
        way = made.way_for(NamedFlow.of(flow, each) if is_name else flow)
        assert (way is None) == (each in direct), each


@pytest.mark.parametrize("text", ["a:b:c:d.example", "example.org:http", "10.0.0.0/33", "*"])
def test_exceptions_that_make_no_sense(text: str) -> None:
    with pytest.raises(NetnsKitError):
        uplink("--proxy", "socks5://192.0.2.7", "--no-proxy", text)


def test_a_proxy_that_speaks_something_else_is_named() -> None:
    with pytest.raises(argparse.ArgumentError, match="not socks4://"):
        uplink("--proxy", "socks4://192.0.2.7")


def test_a_proxy_on_localhost_is_the_one_of_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*addresses: str) -> object:
        return lambda *_, **__: [(0, 0, 0, "", (each, 1080)) for each in addresses]

    for addresses, proxy in (
        (("::1", "127.0.0.1"), "127.0.0.1:1080"),
        (("::1",), "[::1]:1080"),
        (("2001:db8::1", "192.0.2.7"), "[2001:db8::1]:1080"),
    ):
        monkeypatch.setattr(socket, "getaddrinfo", found(*addresses))
        made = uplink("--proxy", "socks5h://localhost:1080")
        assert isinstance(made, Socks5Uplink)
        assert str(made.proxy) == proxy


def test_a_name_that_has_no_address() -> None:
    with pytest.raises(NetnsKitError, match="cannot be resolved"):
        uplink("--proxy", "socks5://me:s3cr3t@proxy.invalid:1080")
