"""Hooks that a worker process can import."""

from __future__ import annotations

from collections.abc import Sequence

from netns_kit import DnsQuery, Rcode, Record
from netns_kit.dns import Verdict


def known(records: Sequence[Record], query: DnsQuery) -> Verdict:
    """What these say of a name."""
    return [record for record in records if record.name == query.name.lower()] or None


TARGET = "a.test"


def hook(query: DnsQuery) -> Verdict:
    """One of each kind, by name; None for all others."""
    name = query.name.lower()
    if name == "renamed.example":
        return TARGET
    if name == "refused.example":
        return Rcode.REFUSED
    if name == "answered.example":
        return [Record(query.name, "192.0.2.99"), Record(query.name, "5 mail.example", "MX")]
    if name == "idna.example":
        return "b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.test"
    if name == "boom.example":
        raise ValueError("boom")
    if name == "bad.example":
        return 7  # type: ignore[return-value]  # what it must not say
    return None
