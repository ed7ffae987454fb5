"""What a client says first: of real clients, of all that RFC 9112 and RFC 8446 leave open, and of noise."""

from __future__ import annotations

import ssl
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.domain_names import to_wire
from netns_kit.policy.first_bytes import FIRST_BYTES_MAX, FirstBytes, Nothing, Seen

NAME = to_wire("www.example.org")
HTTP = b"GET /path?a=b HTTP/1.1\r\nAccept: */*\r\nHost: www.example.org\r\n\r\n"


def read(*pieces: bytes) -> Seen | Nothing | None:
    reader, found = FirstBytes(), None
    for each in pieces:
        found = reader.feed(each)
    return found


# -- TLS --------------------------------------------------------------------------------------------------


def spoken_by_python(name: str | None, most: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> bytes:
    """The first flight of the ssl module's client."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.maximum_version = most
    context.set_alpn_protocols(["h2", "http/1.1"])
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def sized(length: int, content: bytes) -> bytes:
    return len(content).to_bytes(length, "big") + content


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + sized(2, content)


def server_name(*names: bytes, kind: int = 0) -> bytes:
    return extension(0, sized(2, b"".join(bytes([kind]) + sized(2, each) for each in names)))


SNI = server_name(b"www.example.org")
GREASE = extension(0x0A0A, b"") + extension(0xFAFA, b"\0")


def hello(extensions: bytes | None, behind: bytes = b"", kind: int = 1) -> bytes:
    """A ClientHello with its message header."""
    body = b"\3\3" + bytes(32) + sized(1, bytes(32)) + sized(2, b"\x0a\x0a\x13\x01") + sized(1, b"\0")
    if extensions is not None:
        body += sized(2, extensions)
    return bytes([kind]) + sized(3, body + behind)


def records(message: bytes, *cuts: int, kind: int = 22, version: bytes = b"\3\1") -> bytes:
    """The message in records, cut at these places."""
    return b"".join(
        bytes([kind]) + version + sized(2, message[start:end])
        for start, end in pairwise([0, *cuts, len(message)])
    )


TLS = records(hello(GREASE + SNI), 1, 50)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_name_that_a_real_client_asks_for(version: ssl.TLSVersion) -> None:
    assert read(spoken_by_python("WWW.Example.org", version)) == Seen("tls", (NAME,))
    assert read(spoken_by_python(None, version)) == Seen("tls", (), "the ClientHello has no server_name")


@pytest.mark.parametrize("cuts", [(), (1,), (3, 4), (60,), tuple(range(1, 100))])
def test_a_client_hello_in_several_records(cuts: tuple[int, ...]) -> None:
    assert read(records(hello(SNI), *cuts)) == Seen("tls", (NAME,))


def test_whatever_follows_a_client_hello_is_not_looked_at() -> None:
    early = records(b"data", kind=23)
    assert read(TLS + early) == read(TLS, early) == Seen("tls", (NAME,))


@pytest.mark.parametrize("kind", [0xFE0D, 0xFFCE])
def test_an_encrypted_client_hello_is_told(kind: int) -> None:
    assert read(records(hello(SNI + extension(kind, b"sealed")))) == Seen("tls", (NAME,), ech=True)
    assert read(records(hello(extension(kind, b"sealed")))) == Seen(
        "tls", (), "the ClientHello has no server_name", ech=True
    )


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (records(hello(None)), "no server_name"),
        (records(hello(GREASE)), "no server_name"),
        (records(hello(server_name(b"www.example.org", b"other.example"))), "not one host name"),
        (records(hello(server_name(b"www.example.org", kind=1))), "not one host name"),
        (records(hello(extension(0, sized(2, b"\0" + sized(2, b"a.b")) + b"\0"))), "not one host name"),
        (records(hello(extension(0, b""))), "malformed"),
        (records(hello(SNI + SNI)), "extension twice"),
        (records(hello(GREASE + GREASE + SNI)), "extension twice"),
        (records(hello(server_name(b"192.0.2.1"))), "no domain name"),
        (records(hello(server_name(b"2001:db8::1"))), "no domain name"),
        (records(hello(server_name(b""))), "no domain name"),
        (records(hello(server_name(b"www.example.org\0.evil.example"))), "no domain name"),
        (records(hello(server_name("b\xfccher.example".encode()))), "no domain name"),
        (records(hello(server_name(b"a" * 64 + b".example"))), "no domain name"),
        (records(hello(SNI, b"\0")), "malformed"),
        (records(hello(SNI[:-1])), "malformed"),
        (records(b"\1\0\0\0"), "malformed"),
        (records(hello(SNI).replace(b"\3\3", b"\2\3", 1)), "malformed"),
        (records(hello(SNI, kind=2)), "no ClientHello"),
        (records(hello(SNI)[:9]) + records(b"\1\0", kind=21), "interrupted"),
        (records(hello(SNI)[:9]) + records(b"") + records(hello(SNI)[9:]), "interrupted"),
        (records(hello(SNI)[:9]) + records(hello(SNI)[9:], version=b"\2\0"), "interrupted"),
        (records(hello(extension(21, bytes(FIRST_BYTES_MAX)) + SNI), 9000), "more than 16384 bytes"),
        (b"\x16\3\1\x40\0" + bytes(FIRST_BYTES_MAX), "more than 16384 bytes"),
    ],
)
def test_a_client_hello_without_a_name_to_rely_on(stream: bytes, why: str) -> None:
    found = read(stream)
    assert isinstance(found, Seen)
    assert (found.kind, found.names) == ("tls", ())
    assert why in found.why


# -- HTTP -------------------------------------------------------------------------------------------------


def request(*fields: str, target: str = "/", method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    return "\r\n".join([f"{method} {target} {version}", *fields, "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    "stream",
    [
        HTTP,
        request("Host: www.example.org"),
        request("hOST:WWW.Example.ORG"),
        request("Host: \t www.example.org \t"),
        request("Host: www.example.org:8080"),
        request("Host: www.example.org:"),
        request("Host: www.example.org."),
        request("Host: www.example.org", version="HTTP/1.0"),
        request("Host: www.example.org", "X-Empty:", "X-Host: other.example"),
        request("Host: www.example.org", target="/caf\xe9?http://other.example"),
        request("Host: www.example.org", target="//other.example/"),
        request("Host: www.example.org", method="OPTIONS", target="*"),
        request("Host: www.example.org", method="M-SEARCH"),
        request("Host: www.example.org:80", target="http://www.example.org/path"),
        request("Host: www.example.org", target="HTTP://WWW.example.org.:80?query"),
        request("Host: www.example.org", "Content-Length: 99", method="POST")
        + b"Host: other.example\r\n\r\n",
        HTTP + request("Host: other.example"),  # pipelined
    ],
)
def test_the_name_that_a_request_asks_for(stream: bytes) -> None:
    assert read(stream) == Seen("http", (NAME,))


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (request(), "no Host field"),
        (request(target="http://www.example.org/"), "no Host field"),
        (request("Host: www.example.org", "Host: www.example.org"), "several Host"),
        (request("Host: www.example.org", "host: other.example"), "several Host"),
        (request("Host:"), "no domain name"),
        (request("Host: 192.0.2.1"), "no domain name"),
        (request("Host: 0x7f000001"), "no domain name"),
        (request("Host: 2130706433:80"), "no domain name"),
        (request("Host: [2001:db8::1]:80"), "no domain name"),
        (request("Host: www.example.org, other.example"), "no domain name"),
        (request("Host: www.example.org other.example"), "no domain name"),
        (request("Host: user@www.example.org"), "no domain name"),
        (request("Host: www.example.org:80:81"), "no domain name"),
        (request("Host: www%2eexample.org"), "no domain name"),
        (request("Host: www.example.org", target="http://other.example/"), "another name than Host"),
        (request("Host: www.example.org", target="http://other.example"), "another name than Host"),
        (request("Host: www.example.org", target="http://www.example.org@other.example/"), "no domain name"),
        (
            request("Host: www.example.org", target="http://www.example.org\\@other.example/"),
            "no domain name",
        ),
        (request("Host: www.example.org", target="http:///"), "no domain name"),
        (request("Host: www.example.org", target="http:other.example"), "no path"),
        (request("Host: www.example.org", target="other.example:443"), "no path"),
        (request("Host: www.example.org:443", method="CONNECT", target="www.example.org:443"), "tunnel"),
        (request("Accept: */*", " Host: other.example", "Host: www.example.org"), "folded"),
        (request(" Host: other.example", "Host: www.example.org"), "folded"),
        (request("Host: www.example.org", "\tother.example"), "folded"),
        (request("Host : www.example.org"), "malformed"),
        (request("Host"), "malformed"),
        (request("Host: www.example.org\0"), "malformed"),
        (request("Host: www.example.org\rHost: other.example"), "malformed"),
        (b"GET / HTTP/1.1\nHost: www.example.org\n\n", "CR LF"),
        (b"GET / HTTP/1.1\r\nHost: www.example.org\n\r\n", "CR LF"),
        (request("X: " + "x" * FIRST_BYTES_MAX, "Host: www.example.org"), "more than 16384 bytes"),
        (request(target="/" + "x" * FIRST_BYTES_MAX), "more than 16384 bytes"),
    ],
)
def test_a_request_without_a_name_to_rely_on(stream: bytes, why: str) -> None:
    found = read(stream)
    assert isinstance(found, Seen)
    assert (found.kind, found.names) == ("http", ())
    assert why in found.why


# -- both -------------------------------------------------------------------------------------------------

NEITHER = [
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"SSH-2.0-OpenSSH_10.0 Debian\r\n",
    b"GET /\r\n",
    b"GET  / HTTP/1.1\r\n",
    b"\r\nGET / HTTP/1.1\r\nHost: www.example.org\r\n\r\n",
    b" GET",
    b"G" * 33,
    b"\0\0\0\x08\x04\xd2\x16\x2f",  # PostgreSQL: may I speak TLS?
    b"*1\r\n$4\r\nPING\r\n",
    b"\x80\x2e\1\3\1",  # the ClientHello of SSL 2
    b"\x16\xfe\xfd",
    b"\x15\3\1\0\2\1\0",
]


@pytest.mark.parametrize("stream", NEITHER)
def test_what_is_neither(stream: bytes) -> None:
    assert read(stream) == Nothing("it is neither TLS nor HTTP/1")


@pytest.mark.parametrize("stream", [TLS, HTTP])
def test_more_is_needed_until_the_end(stream: bytes) -> None:
    reader = FirstBytes()
    assert [reader.feed(stream[at : at + 1]) for at in range(len(stream) - 1)] == [None] * (len(stream) - 1)
    found = reader.feed(stream[-1:])
    assert found
    assert reader.feed(b"anything") is found


@given(
    st.one_of(
        st.sampled_from([TLS, HTTP, spoken_by_python("www.example.org"), *NEITHER]),
        st.binary(max_size=300),
        st.binary(max_size=300).map(lambda rest: b"\x16\3\1" + rest),
        st.binary(max_size=300).map(lambda rest: records(b"\1" + sized(3, b"\3\3" + bytes(32) + rest))),
        st.binary(max_size=300).map(lambda rest: records(hello(rest))),
        st.text("GET /:Hhost.\r\n\t HTTP/1", max_size=60).map(str.encode),
        st.text("Hhost:.a \t", max_size=60).map(lambda text: request(*text.split("  "))),
        st.integers(-9, 9).map(
            lambda more: HTTP[:-4] + b"x" * (FIRST_BYTES_MAX - len(HTTP) + more) + HTTP[-4:]
        ),
    ),
    st.data(),
)
def test_the_result_depends_on_the_bytes_alone(stream: bytes, data: st.DataObject) -> None:
    """Whatever the segments, and whatever the bytes: nothing is raised, and what was told is told again."""
    if stream and data.draw(st.booleans()):
        noisy = bytearray(stream)
        for _ in range(data.draw(st.integers(1, 4))):
            noisy[data.draw(st.integers(0, len(noisy) - 1))] = data.draw(st.integers(0, 255))
        stream = bytes(noisy)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    assert read(*(stream[start:end] for start, end in pairwise([0, *cuts, len(stream)]))) == read(stream)
    found = read(stream)
    if isinstance(found, Seen):
        assert bool(found.names) is not bool(found.why)


def test_no_more_is_kept_than_told() -> None:
    for stream in (b"GET /", b"\x16\3\3\x40\0"):
        reader = FirstBytes()
        assert reader.feed(stream + b"a" * (FIRST_BYTES_MAX - len(stream) - 1)) is None
        found = reader.feed(b"a" * 100_000)
        assert found
        assert "more than 16384" in found.why
