"""A capture of a whole network: the same from every driver, and what tshark counts in it."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from socket import IPPROTO_TCP
from typing import Any

import anyio
import anyio.abc
import pytest

from netns_kit import ArgumentError, CaptureError, CaptureFilter, Network, StackClosed, Uplink
from netns_kit.gateway.frame_capture import SMALL
from netns_kit.stack.ranges import RangeSet
from netns_kit.stack.seq import add, distance
from netns_kit.tap.pcapng import NOT_SUMMED, SUPER_SEGMENT
from tests.support import needs, needs_ipv6, needs_tun, needs_userns
from tests.support.pcapng import INBOUND, OUTBOUND, Contents, read

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.usefixtures("leaks")]

DRIVERS: dict[str, dict[str, Any]] = {
    "thread": {"driver": "thread"},
    "loop": {"driver": "loop"},
    "worker": {"driver": "worker"},
    "two workers": {"driver": "worker", "queues": 2},
}
SIZES = (1, 1000, 300_000)
DATAGRAMS = 20
HEADERS = 14 + 20 + 32  # Ethernet, IPv4, TCP with a timestamp
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


MIXED = """
import json, socket, struct, subprocess, sys
server, server6, datagrams, gateway6 = sys.argv[1:]
streams = []

def tcp(address, size):
    with socket.create_connection(address) as sock:
        port, received = sock.getsockname()[1], 0
        sock.sendall(bytes(size))
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(65536): received += len(data)
    streams.append(["tcp", port, int(address[1]), size, received])

def udp(family, address, messages, segment=None):
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        if segment: sock.setsockopt(17, 103, segment)  # UDP_SEGMENT
        sent = received = 0
        for message in messages:
            sent += sock.send(message)
            while received < sent: received += len(sock.recv(65536))
        streams.append(["udp", sock.getsockname()[1], int(address[1]), sent, received])

for size in 0, 1, 5000, 400_000, 1_000_000:
    tcp(("10.0.2.2", server), size)
    tcp((gateway6, server6), size)
udp(socket.AF_INET, ("10.0.2.2", int(datagrams)), [bytes(n) for n in range(1, 400, 40)])
udp(socket.AF_INET, ("10.0.2.2", int(datagrams)), [bytes(10 * 1000)], 1000)
question = b"\\4host\\12containers\\10internal\\0" + struct.pack("!HH", 1, 1)
for number in range(6):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("10.0.2.3", 53))
        sent = sock.send(struct.pack("!HHHHHH", number, 0x100, 1, 0, 0, 0) + question)
        streams.append(["udp", sock.getsockname()[1], 53, sent, len(sock.recv(1000))])
for address, count in ("10.0.2.2", 3), (gateway6, 2):
    subprocess.run(["ping", "-n", "-c", str(count), "-i", "0.3", address], check=True, stdout=subprocess.DEVNULL)
print(json.dumps(streams))
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
    assert all(each.flags & NOT_SUMMED for each in found.packets if each.size > SMALL)
    comments = Counter(each.comment.split()[3].rstrip(",") for each in found.packets if each.comment)
    assert comments["tcp"] == len(SIZES)
    assert comments["udp"] >= 1
    segments = [
        each.data for each in found.packets if each.data[23] == IPPROTO_TCP and len(each.data) > HEADERS
    ]
    assert len(segments) == len(set(segments)), "each once: what a kernel sends again has another timestamp"
    needs("tshark")
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
    """Protocol, stream, direction and bytes of each TCP segment and datagram, as tshark reads them.

    Of bytes that a kernel has sent again, since a busy machine was late, the first time counts.
    """
    fields = [
        "tcp.stream",
        "tcp.len",
        "tcp.seq_raw",
        "udp.stream",
        "udp.length",
        "frame.packet_flags_direction",
    ]
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
    arrived: dict[tuple[str, str], RangeSet] = {}
    for line in text.splitlines():
        tcp, tcp_size, seq, udp, udp_size, flags, _, status = line.split("\t")
        assert status in ("", "1", "2"), "the checksum of a datagram is good"
        way = str(int(flags, 16))
        if tcp:
            before, start, end = (
                arrived.setdefault((tcp, way), RangeSet()),
                int(seq),
                add(int(seq), int(tcp_size)),
            )
            fresh = sum(distance(*each) for each in before.missing(start, end)) if tcp_size != "0" else 0
            if fresh:
                before.add(start, end)
            found.append(("tcp", tcp, way, str(fresh)))
        elif udp:
            found.append(("udp", udp, way, udp_size))
    return found


async def test_each_protocol_and_stream_has_what_the_programs_did(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """TCP with super-segments, over IPv4 and IPv6, UDP with super-datagrams, DNS, and pings."""
    needs_ipv6()
    needs("tshark")
    path = tmp_path / "mixed.pcapng"
    async with (
        Network(ipv6=True, mtu=1500, **options) as net,
        await anyio.create_tcp_listener(local_host="127.0.0.1") as server,
        await anyio.create_tcp_listener(local_host="::1") as server6,
        await anyio.create_udp_socket(local_host="127.0.0.1") as sock,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(server.serve, echo)
        tasks.start_soon(server6.serve, echo)
        tasks.start_soon(echo_datagrams, sock)
        ports = [str(each.extra(anyio.abc.SocketAttribute.local_port)) for each in (server, server6, sock)]
        assert net.subnet.ipv6 is not None
        async with net.stack.capture(path) as capture:
            done = await net.run([sys.executable, "-c", MIXED, *ports, str(net.subnet.ipv6.gateway)])
        tasks.cancel_scope.cancel()
    assert capture.lost == 0
    assert capture.ended is None
    wanted = sorted(map(tuple, json.loads(done.stdout)))
    frames = tshark_fields(
        path,
        *("tcp.srcport", "tcp.dstport", "tcp.len", "udp.srcport", "udp.dstport", "udp.length"),
        *("frame.packet_flags_direction", "frame.len", "dns.flags.response", "icmp.type", "icmpv6.type"),
    )
    carried = {way: Counter[tuple[str, int, int]]() for way in (OUTBOUND, INBOUND)}
    counted = Counter[str]()
    largest = 0
    for tcp_from, tcp_to, tcp_size, udp_from, udp_to, udp_size, way, size, dns, icmp, icmp6 in frames:
        protocol, ends, carries = ("udp", (udp_from, udp_to), int(udp_size or 8) - 8)
        if tcp_from:
            protocol, ends, carries = "tcp", (tcp_from, tcp_to), int(tcp_size)
            largest = max(largest, int(size))
        if ends[0]:
            direction = int(way, 16)
            here, there = map(int, ends if direction == OUTBOUND else reversed(ends))
            carried[direction][protocol, here, there] += carries
        counted["query" if dns in ("0", "False") else "answer" if dns else ""] += 1
        counted[f"icmp {icmp}" if icmp else f"icmp6 {icmp6}"] += 1
    streams = sorted({*carried[OUTBOUND], *carried[INBOUND]})
    assert [(*each, carried[OUTBOUND][each], carried[INBOUND][each]) for each in streams] == wanted
    assert largest > 10_000, "super-segments are whole"
    flags = {(each.size > 1514, each.flags) for each in read(contents_of(path)).packets}
    assert (
        {(True, SUPER_SEGMENT), (False, 0)}
        <= flags
        <= {(True, SUPER_SEGMENT), (False, 0), (False, SUPER_SEGMENT)}
    )
    assert counted["query"] == counted["answer"] == 6
    assert counted["icmp 8"] == counted["icmp 0"] == 3
    assert counted["icmp6 128"] == counted["icmp6 129"] == 2


def tshark_fields(path: Path, *fields: str) -> list[list[str]]:
    """Fields of each frame but repetitions, as tshark reads them."""
    words = [word for field in fields for word in ("-e", field)]
    text = subprocess.run(
        [
            "tshark",
            "-n",
            "-r",
            path,
            "-Y",
            "not tcp.analysis.retransmission",
            "-T",
            "fields",
            "-E",
            "occurrence=f",
            *words,
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [line.split("\t") for line in text.splitlines()]


def contents_of(path: str | Path) -> bytes:
    return Path(path).read_bytes()


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
            assert each._thread is not None
            await anyio.to_thread.run_sync(each._thread.join, 10)
        await run(net)
    assert (small.ended, short.ended) == ("bytes", "seconds")
    text = (tmp_path / "small").read_bytes()
    assert 4096 < len(text) <= 8192
    assert read(text).packets
    assert read((tmp_path / "short").read_bytes()).statistics


async def test_files_one_after_another(options: dict[str, Any], tmp_path: Path) -> None:
    files = 3
    async with (
        Network(**options) as net,
        net.stack.capture(tmp_path / "all", snaplen=100),
        net.stack.capture(
            tmp_path / "some.pcapng", snaplen=100, max_bytes=13_000, files=files, processes=True
        ) as capture,
    ):
        for _ in range(3):
            await run(net)
    assert capture.ended is None
    assert capture.lost == 0
    assert sorted(capture.paths) == [
        str(tmp_path / name) for name in sorted(os.listdir(tmp_path)) if name != "all"
    ]
    numbers = [int(path.removesuffix(".pcapng").rpartition("_")[2]) for path in capture.paths]
    assert numbers == [(numbers[0] + step) % files for step in range(len(numbers))], "the oldest is the first"
    texts = list(map(contents_of, capture.paths))
    assert len(texts) > 1
    assert all(len(text) <= 13_000 for text in texts)
    contents = list(map(read, texts))
    assert all(each.packets and each.statistics for each in contents)
    if options.get("queues", 1) == 1:  # else the order is that of each worker
        frames = [b"".join(packet.data for each in contents for packet in each.packets)]
        frames.append(b"".join(packet.data for packet in read(contents_of(tmp_path / "all")).packets))
        assert frames[0] in frames[1], "nothing is lost between two files"
    assert capture.size == len(texts[-1])


async def test_the_last_frames_are_written_when_they_are_asked_for(
    options: dict[str, Any], tmp_path: Path
) -> None:
    async with Network(**options) as net:
        async with net.stack.capture(None, max_bytes=40_000, snaplen=200) as capture:
            await run(net)
            await capture.dump(tmp_path / "before")
            await run(net)
            await run(net)
            file = io.BytesIO()
            await capture.dump(file)
            with pytest.raises(CaptureError, match="cannot be written") as caught:
                await capture.dump("/nowhere/at/all")
            assert caught.value.value == "/nowhere/at/all"
        await capture.dump(tmp_path / "after")
        async with net.stack.capture(tmp_path / "file") as other:
            with pytest.raises(ArgumentError, match="in memory"):
                await other.dump(file)
    assert capture.ended is None
    before, at_last = read((tmp_path / "before").read_bytes()), read(file.getvalue())
    for each in before, at_last, read((tmp_path / "after").read_bytes()):
        assert 20_000 < sum(map(len, (packet.data for packet in each.packets))) < 40_000 or each is before
        assert each.statistics
        assert each.names["10.0.2.2"] == "gateway.containers.internal", "though its block was the oldest"
    assert at_last.packets[-1].time > before.packets[-1].time
    assert at_last.section.get(1, b"").startswith(b"flow "), "the flows that are under way"


async def test_which_process_it_was_is_said_once_it_is_known(options: dict[str, Any], tmp_path: Path) -> None:
    program = """
import socket, sys, time
with socket.create_connection(("10.0.2.2", int(sys.argv[1]))) as sock:
    for _ in range(1000):
        sock.sendall(b"a")
        sock.recv(1)
        time.sleep(0.01)
        if not sys.stdin.closed and __import__("select").select([sys.stdin], [], [], 0)[0]: break
"""
    path = tmp_path / "file"
    async with (
        Network(**options) as net,
        await anyio.create_tcp_listener(local_host="127.0.0.1") as server,
        anyio.create_task_group() as tasks,
        net.stack.capture(path, processes=True),
    ):
        tasks.start_soon(server.serve, echo)
        port = str(server.extra(anyio.abc.SocketAttribute.local_port))
        async with await net.popen([sys.executable, "-c", program, port], stdin=subprocess.PIPE) as process:
            with anyio.fail_after(60):
                while b"process " not in contents_of(path):  # noqa: ASYNC110  # it is a file
                    await anyio.sleep(0.05)
            assert process.stdin is not None
            await process.stdin.aclose()
            await process.wait()
        tasks.cancel_scope.cancel()
    comments = [each.comment for each in read(path.read_bytes()).packets if " tcp" in each.comment]
    assert len(comments) == 2
    assert comments[1].startswith(f"{comments[0]}, process ")
    assert comments[1].endswith(" (python)") or "(python" in comments[1]


async def test_a_filter_and_what_is_no_setting(options: dict[str, Any]) -> None:
    file = io.BytesIO()
    async with Network(**options) as net:
        async with net.stack.capture(file, where=CaptureFilter("10.0.2.2", protocol="udp"), snaplen=60):
            await run(net)
        found: Contents = read(file.getvalue())
        assert len(found.packets) == 2 * DATAGRAMS
        assert {each.data[23] for each in found.packets} == {17}
        assert {(len(each.data), each.size) for each in found.packets} == {(60, 142)}
        for wrong in (
            {"snaplen": 1},
            {"max_bytes": 1},
            {"max_seconds": 0},
            {"files": 2},
            {"processes": 1},
            {"where": "1.2"},
        ):
            with pytest.raises(ArgumentError, match="targets" if "where" in wrong else next(iter(wrong))):
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
