"""Read and write hosts(5).

>>> [(str(entry.address), entry.names) for entry in parse("192.0.2.5 db  db.lan # ours\\nnonsense\\n")]
[('192.0.2.5', ('db', 'db.lan'))]
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

LOCAL = "127.0.0.1", "::1"


class Entry(NamedTuple):
    """A line: an address and its names."""

    address: IPv4Address | IPv6Address
    names: tuple[str, ...]


def parse(text: str) -> list[Entry]:
    """Return the entries of a hosts file's text, in order.  Never raises: invalid lines are left out."""
    entries = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) > 1:
            try:
                entries.append(Entry(ip_address(words[0]), tuple(words[1:])))
            except ValueError:
                continue
    return entries


def written(hostname: str, ours: Iterable[tuple[str, str]], outer: str) -> str:
    """Return the text of a hosts file.

    It has localhost and `hostname`, which are the machine itself; `ours`, pairs of name and address; and the entries
    of the text `outer`, without names that are there already.
    """
    lines = [
        (LOCAL[0], ["localhost", hostname]),
        (LOCAL[1], ["localhost", "ip6-localhost", "ip6-loopback", hostname]),
    ]
    lines += [(address, [name]) for name, address in ours]
    told = {name.lower() for _, names in lines for name in names}
    for entry in parse(outer):
        names = [name for name in entry.names if name.lower() not in told]
        if names:
            lines.append((str(entry.address), names))
    return "".join(f"{address} {' '.join(dict.fromkeys(names))}\n" for address, names in lines)
