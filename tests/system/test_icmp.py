"""ICMP, and what it says of TCP, over a path of several hops with real kernels at both ends.

The numbers are rows of an inventory of what other programs do.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket

import anyio
import pytest

from netns_kit import Network, Uplink
from tests.support import needs
from tests.support.multihop import (
    DNS,
    GATEWAY,
    GUEST,
    IP_MTU_DISCOVER,
    IP_RECVERR,
    MTU,
    NO_ROUTE,
    PMTUDISC_DONT,
    PMTUDISC_PROBE,
    PROHIBITED,
    R1,
    R2,
    UNREACHABLE,
    Hops,
    Icmp,
    S,
    echo_request,
    in_h,
    received,
    told,
)
from tests.support.servers import sent_again

ECHO_REPLY, UNREACHABLE_TYPE, TIME_EXCEEDED = 0, 3, 11
PATH = [GATEWAY, R1, R2, S]


async def output(net: Network, *command: str) -> str:
    """What a command says, whatever it thinks of it."""
    needs(command[0])
    return (await net.run(command, check=False)).stdout.decode()


async def raw_icmp(net: Network) -> socket.socket:
    """The guest's, with identifiers of its own."""
    return await net.namespace.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)


async def said(sock: socket.socket) -> Icmp:
    """The next ICMP message that the guest gets."""
    return Icmp.parse((await received(sock))[0])


# -- 94 to 96: echo -----------------------------------------------------------------------------------


THREE_PINGS = ("ping", "-n", "-c", "3", "-i", "0.05", "-w", "20")
"""Until three are answered, with a fourth sent meanwhile if one is late: else it waits for two round trips alone."""


@in_h()
async def test_ping_reaches_the_outside(hops: Hops) -> None:
    async with Network() as net:
        text = await output(net, *THREE_PINGS, S)
    found = re.findall(rf"64 bytes from {S}: icmp_seq=(\d+) ttl=(\d+)", text)
    assert found[:3] == [(number, "61") for number in "123"], text


@pytest.mark.parametrize("address", [GATEWAY, DNS])
@in_h(ping=False)
async def test_our_own_addresses_answer_ping_though_loopback_is_disallowed(hops: Hops, address: str) -> None:
    async with Network(uplink=Uplink(allow_host_loopback=False)) as net:
        text = await output(net, *THREE_PINGS, address)
        assert re.findall(rf"64 bytes from {address}: icmp_seq=(\d+)", text)[:3] == ["1", "2", "3"], text
        text = await output(net, "ping", "-n", "-c", "1", "-t", "1", "-s", "20000", address)
        assert f"20008 bytes from {address}: icmp_seq=1" in text, text


@in_h()
async def test_the_identifier_and_sequence_number_of_pings_are_the_guests(hops: Hops) -> None:
    probes = [(0x1234, 1), (0xFFFF, 1), (0, 1), (0x1234, 2), (0x1234, 0xFFFF), (0xFFFF, 0)]
    async with Network() as net:
        with await raw_icmp(net) as guest:
            for identifier, sequence in probes:
                guest.sendto(echo_request(identifier, sequence, b"%d" % sequence), (S, 0))
            replies = [await said(guest) for _ in probes]
    assert {(reply.sender, reply.type, reply.code) for reply in replies} == {(S, ECHO_REPLY, 0)}
    assert sorted((reply.rest >> 16, reply.rest & 0xFFFF, reply.body) for reply in replies) == sorted(
        (identifier, sequence, b"%d" % sequence) for identifier, sequence in probes
    )


@pytest.mark.parametrize("size", [0, 1, 56, 1400, 8000, 65507])
@in_h()
async def test_pings_of_every_size_come_back_with_the_ttl_of_the_path(hops: Hops, size: int) -> None:
    payload = os.urandom(size)
    async with Network() as net:
        with await raw_icmp(net) as guest:
            guest.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
            for sequence in range(2):
                guest.sendto(echo_request(7, sequence, payload), (S, 0))
                assert await said(guest) == Icmp(S, 61, ECHO_REPLY, 0, 7 << 16 | sequence, payload)


@in_h()
async def test_time_exceeded_quotes_the_guests_own_ping(hops: Hops) -> None:
    """As `mtr` probes: one raw socket, one identifier, the sequence number tells the hops apart."""
    payload = os.urandom(28)
    request = {ttl: echo_request(0xBEEF, 33000 + ttl, payload) for ttl in range(1, 5)}
    async with Network() as net:
        with await raw_icmp(net) as guest:
            for ttl, message in request.items():
                guest.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
                guest.sendto(message, (S, 0))
            answers = {answer.sender: answer for answer in [await said(guest) for _ in request]}
    assert sorted(answers) == sorted(PATH)
    assert answers.pop(S).type == ECHO_REPLY
    for sender, answer in answers.items():
        assert (answer.type, answer.code) == (TIME_EXCEEDED, 0)
        header, message = answer.body[:20], answer.body[20:]
        assert (socket.inet_ntoa(header[12:16]), socket.inet_ntoa(header[16:])) == (GUEST, S)
        assert header[9] == socket.IPPROTO_ICMP
        assert message == request[1 + PATH.index(sender)]


@pytest.mark.parametrize(("ttl", "sender"), [(1, GATEWAY), (2, R1), (3, R2)])
@in_h()
async def test_ping_shows_time_exceeded(hops: Hops, ttl: int, sender: str) -> None:
    async with Network() as net:
        text = await output(net, "ping", "-n", "-c", "2", "-i", "0.01", "-t", str(ttl), S)
    for sequence in (1, 2):
        assert f"From {sender} icmp_seq={sequence} Time to live exceeded" in text, text


@pytest.mark.parametrize(
    ("destination", "sender", "words"),
    [
        (PROHIBITED[R1], R1, "Packet filtered"),
        (PROHIBITED[R2], R2, "Packet filtered"),
        (UNREACHABLE[R2], R2, "Destination Host Unreachable"),
        (NO_ROUTE, R1, "Destination Net Unreachable"),
    ],
)
@in_h()
async def test_ping_shows_who_says_unreachable(hops: Hops, destination: str, sender: str, words: str) -> None:
    async with Network() as net:
        text = await output(net, "ping", "-n", "-c", "1", "-W", "5", destination)
    assert f"From {sender} icmp_seq=1 {words}" in text, text


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="icmp"),
        pytest.param(["--udp"], id="udp"),
        pytest.param(["--udp", "-L", "5000", "-P", "33434"], id="udp, numbered by its checksum"),
        pytest.param(["--tcp", "-P", "80"], id="tcp"),
    ],
)
@in_h()
async def test_mtr_shows_every_hop(hops: Hops, options: list[str]) -> None:
    command = ["mtr", "-n", "-c", "2", "-i", "0.1", "-G", "1.5", "--json"]
    async with Network() as net:
        with hops.tcp("S", 80):
            text = await output(net, *command, *options, S)
    hubs = json.loads(text)["report"]["hubs"]
    assert [(hub["host"], hub["Loss%"]) for hub in hubs] == [(host, 0.0) for host in PATH]


# -- ping sockets that are not permitted --------------------------------------------------------------


@in_h(ping=False)
async def test_where_ping_is_not_permitted_the_guest_and_the_log_say_so(
    hops: Hops, caplog: pytest.LogCaptureFixture
) -> None:
    async with Network() as net:
        for _ in range(2):
            text = await output(net, "ping", "-n", "-c", "1", "-W", "5", S)
            assert f"From {GATEWAY} icmp_seq=1 Packet filtered" in text, text
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1, "once"
    assert "net.ipv4.ping_group_range" in warnings[0].getMessage()


@in_h(ping=False, privileged=True)
async def test_ping_works_by_a_raw_socket_where_ping_sockets_are_not_permitted(
    hops: Hops, caplog: pytest.LogCaptureFixture
) -> None:
    async with Network() as net:
        text = await output(net, *THREE_PINGS, S)
        found = re.findall(rf"64 bytes from {S}: icmp_seq=(\d+) ttl=(\d+)", text)
        assert found[:3] == [(number, "61") for number in "123"], text
        with await raw_icmp(net) as guest:
            for identifier in (1, 2):  # each sees its own answer, and that once
                guest.sendto(echo_request(identifier, 9, b"x" * identifier), (S, 0))
            replies = sorted([await said(guest), await said(guest)], key=lambda reply: reply.rest)
            assert replies == [
                Icmp(S, 61, ECHO_REPLY, 0, identifier << 16 | 9, b"x" * identifier) for identifier in (1, 2)
            ]
            with pytest.raises(BlockingIOError):
                guest.recv(100)
        text = await output(net, "ping", "-n", "-c", "1", "-t", "2", S)
        assert f"From {R1} icmp_seq=1 Time to live exceeded" in text, text
        text = await output(net, "ping", "-n", "-c", "1", "-M", "do", "-s", "1472", S)
        assert f"From {R1} icmp_seq=1 Frag needed and DF set (mtu = {MTU})" in text, text
    assert not caplog.records


# -- 97: TCP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("destination", "error", "code", "offender"),
    [
        pytest.param(PROHIBITED[R1], errno.EHOSTUNREACH, 13, R1, id="prohibited by R1"),
        pytest.param(PROHIBITED[R2], errno.EHOSTUNREACH, 13, R2, id="prohibited by R2"),
        pytest.param(UNREACHABLE[R2], errno.EHOSTUNREACH, 1, R2, id="host unreachable from R2"),
        pytest.param(NO_ROUTE, errno.ENETUNREACH, 0, R1, id="net unreachable from R1"),
    ],
)
@in_h()
async def test_a_connection_that_icmp_forbids_fails_at_once(
    hops: Hops, destination: str, error: int, code: int, offender: str
) -> None:
    async with Network() as net:
        with await raw_icmp(net) as icmp:
            with await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
                client.connect_ex((destination, 80))
                await anyio.wait_writable(client)
                assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == error
                assert not sent_again(client)
            message = await said(icmp)
    assert (message.sender, message.type, message.code) == (offender, UNREACHABLE_TYPE, code)
    header = message.body[:20]
    assert (socket.inet_ntoa(header[12:16]), socket.inet_ntoa(header[16:])) == (GUEST, destination)
    assert header[9] == socket.IPPROTO_TCP
    assert message.body[22:24] == (80).to_bytes(2, "big")


@pytest.mark.parametrize(("ttl", "offender"), [(1, GATEWAY), (2, R1), (3, R2)])
@in_h()
async def test_a_syn_of_few_hops_is_told_where_it_ended(hops: Hops, ttl: int, offender: str) -> None:
    async with Network() as net:
        sock = await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
        with sock, hops.tcp("S") as listener:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
            assert sock.connect_ex(listener.getsockname()) == errno.EINPROGRESS
            error = await told(sock)
            assert (error.errno, error.type, error.code) == (errno.EHOSTUNREACH, TIME_EXCEEDED, 0)
            assert error.offender == offender
            assert error.sent_to == listener.getsockname()


@in_h()
async def test_traceroute_by_tcp_shows_every_hop(hops: Hops) -> None:
    async with Network() as net:
        with hops.tcp("S") as listener:
            port = str(listener.getsockname()[1])
            text = await output(net, "traceroute", "-T", "-n", "-q", "1", "-w", "2", "-p", port, S)
    assert [line.split()[:2] for line in text.splitlines()[1:]] == [
        [str(number), host] for number, host in enumerate(PATH, 1)
    ], text


@in_h()
async def test_traceroute_by_icmp_shows_every_hop(hops: Hops) -> None:
    async with Network() as net:
        text = await output(net, "traceroute", "-I", "-n", "-q", "2", "-w", "2", S)
    assert [line.split()[:2] for line in text.splitlines()[1:]] == [
        [str(number), host] for number, host in enumerate(PATH, 1)
    ], text
    assert "*" not in text


# -- 98: path MTU -------------------------------------------------------------------------------------


@in_h()
async def test_tracepath_shows_the_hops_and_the_mtu(hops: Hops) -> None:
    async with Network() as net:
        text = await output(net, "tracepath", "-n", S)
    seen = dict(re.findall(r"^ *(\d+): +([0-9.]+) ", text, re.MULTILINE))
    assert seen == {str(number): host for number, host in enumerate(PATH, 1)}, text
    assert re.search(rf"^ *\d+: +{R1} .*pmtu {MTU}", text, re.MULTILINE), text
    assert re.search(rf"Resume: pmtu {MTU} hops {len(PATH)} ", text), text


@in_h()
async def test_traceroute_shows_where_the_mtu_changes(hops: Hops) -> None:
    async with Network() as net:
        text = await output(net, "traceroute", "--mtu", "-n", "-q", "1", "-w", "2", S)
    found = re.findall(r"^ *\d+ +([0-9.]+) +[0-9.]+ ms *(F=\d+)?", text, re.MULTILINE)
    assert found == [(GATEWAY, "F=1500"), (R1, ""), (R2, f"F={MTU}"), (S, "")], text


@in_h()
async def test_a_ping_that_may_not_be_fragmented_is_told_the_mtu(hops: Hops) -> None:
    async with Network() as net:
        text = await output(net, "ping", "-n", "-c", "1", "-M", "do", "-s", "1472", S)
        assert f"From {R1} icmp_seq=1 Frag needed and DF set (mtu = {MTU})" in text, text
        text = await output(net, "ping", "-n", "-c", "1", "-M", "do", "-s", str(MTU - 28), S)
        assert f"{MTU - 20} bytes from {S}: icmp_seq=1" in text, text


@in_h()
async def test_every_probe_is_told_the_mtu(hops: Hops) -> None:
    """Also when the host's kernel knows it already; and the packet quoted is the guest's."""
    async with Network() as net:
        with await raw_icmp(net) as guest:
            guest.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
            for sequence in range(3):
                request = echo_request(5, sequence, bytes(1472))
                guest.sendto(request, (S, 0))
                message = await said(guest)
                assert (message.sender, message.type, message.code) == (R1, UNREACHABLE_TYPE, 4)
                assert message.rest == MTU
                assert request.startswith(message.body[20:])
                assert len(message.body) >= 28


@in_h()
async def test_a_link_of_the_host_that_is_narrower_than_the_guests_is_told(hops: Hops) -> None:
    async with Network(mtu=9000) as net:
        with await raw_icmp(net) as guest:
            guest.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
            request = echo_request(5, 1, bytes(4000))
            guest.sendto(request, (S, 0))
            message = await said(guest)
            assert (message.sender, message.type, message.code) == (GATEWAY, UNREACHABLE_TYPE, 4)
            assert message.rest == 1500
            assert request.startswith(message.body[20:])
