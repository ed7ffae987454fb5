"""Read resolv.conf(5) as the C library does, and write it.

>>> conf = parse("search lan\\nnameserver fe80::1%eth0\\nnameserver 127.0.0.53\\noptions timeout:2 edns0")
>>> conf.nameservers, conf.search, conf.timeout
((IPv6Address('fe80::1%eth0'), IPv4Address('127.0.0.53')), ('lan',), 2)

Options are of three kinds, see `ResolvConf.manner` and `ResolvConf.options_for_clients`:

- how the servers are asked, which we do: timeout, attempts, rotate, use-vc, single-request, single-request-reopen;
- what the servers can do or may be trusted with: edns0, trust-ad, and again the two of single requests;
- the program that asks, independent of the servers: ndots, no-aaaa, debug, inet6, and all unknown ones.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from math import ceil

from netns_kit.frozen import frozen

from .manner import DEFAULT, Manner

LOCAL = IPv4Address("127.0.0.1")  # resolv.conf(5): without a nameserver line, the one on the local machine

DEFAULT_TIMEOUT, MAX_TIMEOUT = 5, 30  # RES_TIMEOUT and its silent cap, seconds
DEFAULT_ATTEMPTS, MAX_ATTEMPTS = 2, 5  # RES_DFLRETRY and its silent cap
LONGEST_PATIENCE = MAX_TIMEOUT - 5  # a client cannot be told to wait longer than the cap

_OF_THE_WAY = ("timeout:", "attempts:", "rotate", "use-vc")
_ONE_AT_A_TIME = ("single-request", "single-request-reopen")
_OF_THE_SERVERS = ("edns0", "trust-ad", *_ONE_AT_A_TIME)


@frozen
class ResolvConf:
    """The contents of a resolv.conf."""

    nameservers: tuple[IPv4Address | IPv6Address, ...] = (LOCAL,)
    """All nameservers in order, with scope ids; never empty.  The C library uses only three."""
    search: tuple[str, ...] = ()
    """The search list as written.  A single "." is kept: it means "no search list"."""
    options: tuple[str, ...] = ()
    """All options in order, as written, known or not."""
    timeout: int = DEFAULT_TIMEOUT
    """Seconds to wait for one nameserver, 1 to 30."""
    attempts: int = DEFAULT_ATTEMPTS
    """Rounds through the nameservers, 1 to 5."""

    def manner(self) -> Manner:
        """Return how to ask the servers, according to the options.

        The C library's default timeout is ignored: it is long because the library does not remember which server is
        silent.  With any other timeout a query is given up when the C library would give it up.
        """
        given = frozenset(self.options)
        timeout, patience = DEFAULT.timeout, DEFAULT.patience
        if self.timeout != DEFAULT_TIMEOUT:
            timeout = min(self.timeout, LONGEST_PATIENCE)
            patience = min(self.timeout * self.attempts * len(self.nameservers), LONGEST_PATIENCE)
        return Manner(
            timeout=timeout,
            attempts=self.attempts,
            patience=patience,
            rotate="rotate" in given,
            streams="use-vc" in given,
            ports=not given.isdisjoint(_ONE_AT_A_TIME),
        )

    def options_for_clients(self, *, same_servers: bool) -> tuple[str, ...]:
        """Return the options for programs that ask us.

        `same_servers`: whether these servers are asked in the end, so that statements about them hold.  Programs are
        told to wait for us as long as these servers may take.
        """
        options = tuple(
            each
            for each in self.options
            if not each.startswith(_OF_THE_WAY[:2])
            and each not in _OF_THE_WAY
            and (same_servers or each not in _OF_THE_SERVERS)
        )
        if same_servers:
            if self.timeout != DEFAULT_TIMEOUT:
                options += (f"timeout:{ceil(self.manner().patience) + 1}",)
            if self.attempts != DEFAULT_ATTEMPTS:
                options += (f"attempts:{self.attempts}",)
        return options

    def written(self) -> str:
        """Return the text of this resolv.conf; timeout and attempts appear if they are among the options."""
        lines = [f"nameserver {each}" for each in self.nameservers]
        if self.search:
            lines.append(f"search {' '.join(self.search)}")
        if self.options:
            lines.append(f"options {' '.join(self.options)}")
        return "".join(f"{line}\n" for line in lines)


def parse(text: str) -> ResolvConf:
    """Read the text of a resolv.conf.  Never raises: invalid lines are ignored, as by the C library.

    A keyword counts only in the first column; # and ; begin a comment there and before a later word.  The last of
    several search (or domain) lines counts; options add up.  An IPv4 nameserver must have four numbers: the shorter
    forms of inet_aton(3) are ignored.
    """
    nameservers: list[IPv4Address | IPv6Address] = []
    search: list[str] = []
    options: list[str] = []
    for line in text.split("\n"):
        keyword, *values = _words(line)
        if not line.startswith(keyword) or not values:
            continue
        if keyword == "nameserver":
            try:
                nameservers.append(ip_address(values[0]))
            except ValueError:
                continue
        elif keyword == "search":
            search = values
        elif keyword == "domain":
            search = values[:1]
        elif keyword == "options":
            options += values
    return ResolvConf(
        tuple(nameservers) or (LOCAL,),
        tuple(search),
        tuple(options),
        _number(options, "timeout:", DEFAULT_TIMEOUT, MAX_TIMEOUT),
        _number(options, "attempts:", DEFAULT_ATTEMPTS, MAX_ATTEMPTS),
    )


def _words(line: str) -> list[str]:
    """Return the line's words up to a comment; one empty word if there are none."""
    words = line.split()
    for index, word in enumerate(words):
        if word[0] in "#;":
            del words[index:]
            break
    return words or [""]


def _number(options: list[str], name: str, default: int, most: int) -> int:
    """Return the last readable value of an option, between 1 and its cap."""
    number = default
    for option in options:
        if option.startswith(name):
            try:
                number = min(max(int(option[len(name) :]), 1), most)
            except ValueError:
                continue
    return number
