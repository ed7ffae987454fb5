"""Networks of several namespaces: servers that a test has in a member, and what programs inside say."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.abc

from netns_kit import AddressLike, CommandFailed, Member, Network
from netns_kit.namespace.background import beside
from tests.support.servers import SECONDS

Handler = Callable[[anyio.abc.SocketStream], Awaitable[None]]
EVERYTHING = 3  # ETH_P_ALL, linux/if_ether.h
FIRST, MARK = b"the first one", b"the last one"

ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as sock:
    while data := sock.recv(4096):
        sys.stdout.buffer.write(data)
"""
"""What a program inside reads from a server."""
ASK_UDP = """
import socket, sys
address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)[0]
with socket.socket(*address[:3]) as sock:
    sock.settimeout(20)
    sock.connect(address[4])
    sock.send(b"?")
    print(sock.recv(4096).decode())
"""


@asynccontextmanager
async def network(**options: Any) -> AsyncIterator[Network]:
    """A network, with a bound on all waiting in it."""
    with anyio.fail_after(SECONDS):
        async with Network(**options) as net:
            yield net


async def say_who(stream: anyio.abc.SocketStream) -> None:
    """Tell the client its address, as the server sees it."""
    async with stream:
        host = str(stream.extra(anyio.abc.SocketAttribute.remote_address)[0])
        await stream.send(host.removeprefix("::ffff:").encode())


async def echo(stream: anyio.abc.SocketStream) -> None:
    """Send back what comes, until the client ends."""
    async with stream:
        with suppress(anyio.BrokenResourceError):  # the client has gone
            async for data in stream:
                await stream.send(data)


@asynccontextmanager
async def serving(
    member: Member | Network, port: int, handler: Handler = say_who, host: AddressLike = "0.0.0.0"
) -> AsyncIterator[None]:
    """Have a server in a member, as long as the block runs."""
    async with (
        await member.namespace.listen_tcp(host, port) as listener,
        beside(listener.serve, handler),
    ):
        yield


async def output(member: Member | Network, *command: str) -> str:
    """What a command writes, which has to succeed."""
    try:
        return (await member.run(command)).stdout.decode().strip()
    except CommandFailed as error:
        raise AssertionError(str(error)) from error


async def status(member: Member | Network, *command: str) -> int:
    """How a command ends."""
    return (await member.run(command, check=False)).returncode


async def ask(member: Member | Network, host: str, port: int) -> str:
    """What a server says to a program in a member."""
    return await output(member, sys.executable, "-ISc", ASK, host, str(port))


async def ask_udp(member: Member | Network, host: str, port: int) -> str:
    """What a server answers to a datagram of a program in a member."""
    return await output(member, sys.executable, "-ISc", ASK_UDP, host, str(port))


@asynccontextmanager
async def wire(member: Member | Network, ifname: str = "eth0") -> AsyncIterator[socket.socket]:
    """A socket for whole frames on the link of a member."""
    kind = socket.SOCK_RAW
    with await member.namespace.socket(socket.AF_PACKET, kind, socket.htons(EVERYTHING)) as sock:
        sock.bind((ifname, EVERYTHING))
        yield sock


async def carried(out: socket.socket, frame: bytes, heard: socket.socket) -> None:
    """Send a frame with `FIRST` until it arrives: a kernel starts a new link in its own time, and drops till then."""
    while True:
        out.send(frame)
        with anyio.move_on_after(0.5):
            await arrived(heard, FIRST)
            return


async def arrived(sock: socket.socket, mark: bytes = MARK) -> list[bytes]:
    """The frames that have come until the one with the mark."""
    frames: list[bytes] = []
    while True:
        await anyio.wait_readable(sock)
        frame = sock.recv(4096)
        if mark in frame:
            return frames
        frames.append(frame)
