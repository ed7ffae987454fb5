"""Links that root makes for a member on interfaces of its own network namespace, as on the host's."""

from __future__ import annotations

from tests.support import needs
from tests.support.added_links import expected, made


def test_root_makes_links_on_interfaces_of_the_host() -> None:
    needs("unshare", "ip", "ping")
    assert made(["--net"]) == expected()
