"""What listens in a namespace, told from outside."""

from __future__ import annotations

import socket
import sys
from ipaddress import IPv4Address, IPv6Address

import pytest

from netns_kit import ListeningSocket, Namespace, NamespaceGone
from netns_kit.namespace import listening
from tests.support import needs_ipv6, needs_userns
from tests.support.servers import bounded

pytestmark = pytest.mark.anyio

MANY = """
import socket, sys
sockets = []
for number in range(1000):
    sockets.append(socket.create_server(("127.0.0.1", 0 if sys.argv[1] == "ports" else 80), reuse_port=True))
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _userns() -> None:
    needs_userns()


@bounded
async def test_what_listens_is_told_and_nothing_else() -> None:
    needs_ipv6()
    async with Namespace.create() as ns:
        assert await ns.listening() == ()
        opened = {}
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1"),
            ("tcp6", socket.AF_INET6, socket.SOCK_STREAM, "::"),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, "0.0.0.0"),
            ("udp6", socket.AF_INET6, socket.SOCK_DGRAM, "::1"),
            ("bound", socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1"),
            ("connected", socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.1"),
        ):
            sock = opened[name] = await ns.socket(family, kind)
            if name == "udp6":
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, 0))
            if name in ("tcp", "tcp6"):
                sock.listen()
        opened["connected"].connect(("127.0.0.1", 9))
        port = {name: sock.getsockname()[1] for name, sock in opened.items()}
        assert set(await ns.listening()) == {
            ListeningSocket("tcp", IPv4Address("127.0.0.1"), port["tcp"]),
            ListeningSocket("tcp", IPv6Address("::"), port["tcp6"], v6only=False),
            ListeningSocket("udp", IPv4Address("0.0.0.0"), port["udp"]),
            ListeningSocket("udp", IPv6Address("::1"), port["udp6"], v6only=True),
        }
        for sock in opened.values():
            sock.close()
        assert await ns.listening() == ()
    with pytest.raises(NamespaceGone):
        await ns.listening()


@pytest.mark.parametrize("what", ["ports", "sockets"])
@bounded
async def test_as_many_as_there_are(what: str) -> None:
    async with Namespace.create() as ns, await ns.popen([sys.executable, "-c", MANY, what]) as command:
        assert command.stdout is not None
        await command.stdout.receive()
        found = await ns.listening()
        assert len(found) == 1000
        assert len(set(found)) == (1000 if what == "ports" else 1)


@bounded
async def test_a_dump_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "DUMP_MAX", 40_000)
    async with Namespace.create() as ns, await ns.popen([sys.executable, "-c", MANY, "sockets"]) as command:
        assert command.stdout is not None
        await command.stdout.receive()
        with pytest.raises(OSError, match="more sockets listen in the namespace than can be listed"):
            await ns.listening()
