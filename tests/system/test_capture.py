"""A capture of a whole network: the same from every driver, and what tshark counts in it."""

from __future__ import annotations

import errno
import io
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest

from netns_kit import ArgumentError, CaptureError, CaptureFilter, Network, StackClosed, Uplink
from tests.support import needs_tun, needs_userns
from tests.support.pcapng import INBOUND, OUTBOUND, Contents, read

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

DRIVERS: dict[str, dict[str, Any]] = {
    "thread": {"driver": "thread"},
    "loop": {"driver": "loop"},
    "worker": {"driver": "worker"},
    "two workers": {"driver": "worker", "queues": 2},
}
SIZES = (1, 1000, 300_000)
DATAGRAMS = 20
PROGRAM = f"""
import socket, sys
port, port6 = map(int, sys.argv[1:])
for size in {SIZES}:
    with socket.create_connection(("host.containers.internal", port)) as sock:
        sock.sendall(bytes(size))
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536): pass
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.connect(("10.0.2.2", port6))
    for number in range({DATAGRAMS}):
        sock.send(bytes(100))
        sock.recv(200)
"""


@pytest.fixture(params=DRIVERS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    needs_userns()
    needs_tun()
    return {"uplink": Uplink(allow_host_loopback=True), **DRIVERS[request.param]}


async def echo(stream: anyio.abc.SocketStream) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)


async def echo_datagrams(sock: anyio.abc.UDPSocket) -> None:
    async for data, (host, port) in sock:
        await sock.sendto(data, host, port)


async def run(net: Network) -> None:
    """What the programs do: TCP, UDP, and DNS for one name."""
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as server,
        await anyio.create_udp_socket(local_host="127.0.0.1") as sock,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(server.serve, echo)
        tasks.start_soon(echo_datagrams, sock)
        port = server.extra(anyio.abc.SocketAttribute.local_port)
        other = sock.extra(anyio.abc.SocketAttribute.local_port)
        await net.run([sys.executable, "-c", PROGRAM, str(port), str(other)])
        tasks.cancel_scope.cancel()


async def test_what_tshark_counts_is_what_the_programs_did(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "mixed.pcapng"
    async with Network(**options) as net, net.stack.capture(path) as capture:
        await run(net)
    found = read(path.read_bytes())
    assert capture.ended is None
    assert capture.size == path.stat().st_size
    assert found.interface[2] == b"tap0"
    assert found.counter(5) == capture.lost == 0
    assert found.counter(4) == found.counter(6) == capture.frames <= len(found.packets)
    assert found.names["10.0.2.2"] == "gateway.containers.internal"
    comments = Counter(each.comment.split()[3].rstrip(",") for each in found.packets if each.comment)
    assert comments["tcp"] == len(SIZES)
    assert comments["udp"] >= 1
    if shutil.which("tshark") is None:
        pytest.skip("tshark is not installed")
    counted = Counter[tuple[str, str, str]]()
    for protocol, stream, way, size in tshark(path):
        counted[protocol, stream, way] += int(size or 0)
    for direction in OUTBOUND, INBOUND:
        sizes = [counted["tcp", str(n), str(direction)] for n in range(len(SIZES))]
        assert sorted(sizes) == list(SIZES), "the order is that of each worker"
        streams = {
            stream for protocol, stream, each in counted if protocol == "udp" and each == str(direction)
        }
        assert DATAGRAMS * 108 in {counted["udp", stream, str(direction)] for stream in streams}


def tshark(path: Path) -> list[tuple[str, str, str, str]]:
    """Protocol, stream, direction and bytes of each TCP segment and datagram, as tshark reads them."""
    fields = ["tcp.stream", "tcp.len", "udp.stream", "udp.length", "frame.packet_flags_direction"]
    words = [word for field in fields for word in ("-e", field)]
    checked = ["-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE"]
    words += ["-e", "_ws.expert.message", "-e", "udp.checksum.status"]
    text = subprocess.run(
        ["tshark", "-n", "-r", path, *checked, "-T", "fields", "-E", "occurrence=f", *words],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = []
    for line in text.splitlines():
        tcp, tcp_size, udp, udp_size, flags, _, status = line.split("\t")
        assert status in ("", "1", "2"), "the checksum of a datagram is good"
        way = str(int(flags, 16))
        if tcp:
            found.append(("tcp", tcp, way, tcp_size))
        elif udp:
            found.append(("udp", udp, way, udp_size))
    return found


class Full(io.RawIOBase):
    """A file on a disk that becomes full."""

    def __init__(self, room: int) -> None:
        self.text = bytearray()
        self._room = room

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        taken = bytes(data)[: self._room - len(self.text)]
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.text += taken
        return len(taken)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        assert whence == 1
        self._at = len(self.text) + offset
        return self._at

    def truncate(self, size: int | None = None, /) -> int:
        del self.text[self._at :]
        return self._at


async def test_a_full_disk_ends_the_capture_and_not_the_stack(options: dict[str, Any]) -> None:
    file = Full(20_000)
    async with Network(**options) as net:
        with pytest.raises(CaptureError, match="No space left") as caught:
            async with net.stack.capture(file) as capture:  # type: ignore[arg-type]  # mypy: no BinaryIO
                await run(net)
        assert caught.value.errno == errno.ENOSPC
        assert capture.ended == "error"
        assert read(bytes(file.text)).packets, "whole blocks"
        await run(net)
        with pytest.raises(CaptureError, match="cannot be written"):
            async with net.stack.capture("/nowhere/at/all"):
                pass


async def test_bounds(options: dict[str, Any], tmp_path: Path) -> None:
    async with (
        Network(**options) as net,
        net.stack.capture(tmp_path / "small", max_bytes=8192) as small,
        net.stack.capture(tmp_path / "short", max_seconds=0.05) as short,
    ):
        await run(net)
        for each in small, short:
            await anyio.to_thread.run_sync(each._thread.join, 10)
        await run(net)
    assert (small.ended, short.ended) == ("bytes", "seconds")
    text = (tmp_path / "small").read_bytes()
    assert 4096 < len(text) <= 8192
    assert read(text).packets
    assert read((tmp_path / "short").read_bytes()).statistics


async def test_a_filter_and_what_is_no_setting(options: dict[str, Any]) -> None:
    file = io.BytesIO()
    async with Network(**options) as net:
        async with net.stack.capture(
            file, where=CaptureFilter(protocol="udp", network="10.0.2.2"), snaplen=60
        ):
            await run(net)
        found: Contents = read(file.getvalue())
        assert len(found.packets) == 2 * DATAGRAMS
        assert {each.data[23] for each in found.packets} == {17}
        assert {(len(each.data), each.size) for each in found.packets} == {(60, 142)}
        for wrong in {"snaplen": 1}, {"max_bytes": 1}, {"max_seconds": 0}, {"where": "tcp"}:
            with pytest.raises(ArgumentError, match=next(iter(wrong))):
                net.stack.capture(file, **wrong)
    with pytest.raises(StackClosed):
        async with net.stack.capture(file):
            pass


async def test_a_stack_that_is_closed_first_leaves_a_whole_file(options: dict[str, Any]) -> None:
    file = io.BytesIO()
    async with Network(**options) as net:
        capture = await net.stack.capture(file).__aenter__()
        await run(net)
    await capture.__aexit__(None, None, None)
    assert read(file.getvalue()).packets
