"""Sockets that listen already, as forwards."""

from __future__ import annotations

import socket

import pytest

from netns_kit.forwarder.binding import described


@pytest.mark.parametrize("device", [None, "lo"])
def test_a_socket_of_one_device_is_told_as_that(device: str | None) -> None:
    with socket.socket() as sock:
        if device is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        on = "" if device is None else f"%{device}"
        assert described(sock, 80, None).spec == f"127.0.0.1{on}:{port}:80/tcp"
