"""The option --proxy: the uplink that a URL describes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from netns_kit.errors import NetnsKitError
from netns_kit.uplink.uplink import Uplink

if TYPE_CHECKING:
    from netns_kit.uplink.chooser import ChooserRule

_URL = re.compile(
    r"(?:(?P<scheme>[a-z0-9]+)://)?(?:(?P<user>[^:@/]*)(?::(?P<password>[^@/]*))?@)?"
    r"(?P<host>\[[^\]/@]+\]|[^:/@\[\]]+)(?::(?P<port>[0-9]{1,5}))?/?",
    re.IGNORECASE,
)
_FORM = "expected socks5://[USER:PASSWORD@]HOST[:PORT] or http://..."
_PORTS = {"socks": 1080, "socks5": 1080, "socks5h": 1080, "http": 8080}
_OTHERS = ("socks4", "socks4a", "https")  # that other programs speak
_DIRECT = re.compile(
    r"(?P<host>\[[^\]]+\]|[^:\[\]]+|[0-9a-f:]+(?:/[0-9]+)?)(?::(?P<port>[0-9]{1,5}))?", re.IGNORECASE
)


def add_proxy_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options about a proxy."""
    parser.add_argument(
        "--proxy",
        type=_checked,
        metavar="URL",
        help="send all flows through a proxy: socks5://[USER:PASSWORD@]HOST[:PORT], or http:// for CONNECT, which "
        "carries TCP alone.  Pings are refused.  The proxy is told names and resolves them: programs get addresses "
        "that stand for them.  With --dns, these resolvers are asked through the proxy, over TCP",
    )
    parser.add_argument(
        "--no-proxy",
        metavar="LIST",
        help="send flows to these past the proxy, as NO_PROXY has them: names with all that is below them, "
        "addresses, networks, each perhaps with :PORT, separated by commas",
    )
    parser.add_argument(
        "--proxy-names",
        choices=("proxy", "here"),
        default="proxy",
        help="who resolves names: with here, the proxy is told addresses alone (%(default)s)",
    )
    parser.add_argument(
        "--proxy-resolvers",
        choices=("proxy", "host"),
        help="with proxy, the host's resolvers are asked through the proxy, over TCP; with host, as without a proxy, "
        "which shows them the names",
    )


def uplink_from(options: argparse.Namespace, arguments: Mapping[str, Any]) -> Uplink:
    """Return the uplink that the options ask for.

    Args:
        options: The options, of which those of `add_proxy_options` are read.
        arguments: The arguments of any `Uplink`.
    """
    if options.proxy is None:
        return Uplink(**arguments)
    scheme, user, password, host, port = _parsed(options.proxy)
    from netns_kit.uplink.http_connect import HttpConnectUplink  # without a proxy nobody has these
    from netns_kit.uplink.socks5 import Socks5Uplink

    kind = HttpConnectUplink if scheme == "http" else Socks5Uplink
    asked = {"names": options.proxy_names, "resolvers": options.proxy_resolvers}
    if not options.no_proxy:
        return kind(_resolved(host, port), user, password, **asked, **arguments)
    from netns_kit.uplink.chooser import ChooserUplink

    rules = _past_the_proxy(options.no_proxy)
    return ChooserUplink(rules, kind(_resolved(host, port), user, password, **asked), **arguments)


def _past_the_proxy(text: str) -> list[ChooserRule]:
    """Return the rules of a `ChooserUplink` that NO_PROXY's text describes.

    Raises:
        NetnsKitError: A part of it cannot be used.
    """
    from netns_kit.uplink.chooser import choose

    rules: list[ChooserRule] = []
    for part in filter(None, re.split(r"[\s,]+", text)):
        found = _DIRECT.fullmatch(part)
        if found is None:
            fix = "write names, addresses and networks, perhaps with :PORT"
            raise NetnsKitError("--no-proxy cannot be understood", value=repr(part), fix=fix)
        host = found["host"].strip("[]").removeprefix("*.").lstrip(".")
        if host == "localhost":
            continue  # it never leaves the namespace
        is_name = re.fullmatch(r"[0-9./]+|.*:.*", host) is None
        targets = (host, f"*.{host}") if is_name and host != "*" else (host,)
        rules.append((choose(*targets, ports=None if found["port"] is None else int(found["port"])), None))
    return rules


def _checked(text: str) -> str:
    """Return the text, if it is a URL of a proxy.  What is said of another one does not show it."""
    try:
        _parsed(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _parsed(text: str) -> tuple[str, str | None, str | None, str, int]:
    """Return scheme, user name, password, host and port of a URL.  Raises ValueError without the URL in it."""
    found = _URL.fullmatch(text)
    scheme = (found["scheme"] or "http").lower() if found else ""
    if scheme in _OTHERS:
        raise ValueError(f"{_FORM}, not {scheme}://")
    if found is None or scheme not in _PORTS or not 0 < int(found["port"] or 1) < 65536:
        raise ValueError(f"{_FORM}; what is special in USER or PASSWORD is written as %XX")
    if (found["user"] is None) != (found["password"] is None):
        raise ValueError(f"{_FORM}, a password too")
    from urllib.parse import unquote  # it takes its time

    user, password = (None if found[each] is None else unquote(found[each]) for each in ("user", "password"))
    return scheme, user, password, found["host"], int(found["port"] or _PORTS[scheme])


def _resolved(host: str, port: int) -> str:
    """Return the proxy as address and port.  Its name is resolved once, by the host.

    Raises:
        NetnsKitError: It has no address.
    """
    from socket import SOCK_STREAM, gaierror, getaddrinfo

    try:
        found = [str(each[4][0]) for each in getaddrinfo(host.strip("[]"), port, type=SOCK_STREAM)]
    except (gaierror, UnicodeError):
        raise NetnsKitError(
            f"the proxy's name {host!r} cannot be resolved", fix="write its address"
        ) from None
    address = found[0]
    if address == "::1":  # a proxy for this host alone often listens on 127.0.0.1 alone
        address = next((each for each in found if each.startswith("127.")), address)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
