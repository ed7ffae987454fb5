"""What TLS clients say first, and how they are refused."""

from __future__ import annotations

import ssl
from contextlib import suppress

ACCESS_DENIED = b"\x15\x03\x03\x00\x02\x02\x31"
"""The alert of RFC 8446 section 6: fatal, access_denied."""


def client_hello(name: str | None) -> bytes:
    """The first flight of the ssl module's client to that name; None: to an address, so that there is no name."""
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()
