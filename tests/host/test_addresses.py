"""The addresses of the host's interfaces."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from netns_kit.host.addresses import of_host
from tests.support import needs_ipv6


def test_the_hosts_own_addresses() -> None:
    own = of_host()
    assert ip_address("127.0.0.1") in own
    for address in own:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((str(address), 0))


def test_those_of_ipv6() -> None:
    needs_ipv6()
    assert ip_address("::1") in of_host()
