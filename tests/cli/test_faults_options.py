"""--faults: what is read, and what is said of mistakes."""

from __future__ import annotations

import pytest

from netns_kit import ArgumentError, Faults
from netns_kit.cli.faults import faults_of


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("loss=1%,delay=50ms", Faults(loss=0.01, delay=0.05)),
        ("loss=0.5, jitter=2s ,rate=10Mbit/s", Faults(loss=0.5, jitter=2.0, rate="10Mbit/s")),
        ("refuse,to=*.example.org,to=192.0.2.0/24,ports=80,ports=8000-8999,protocol=tcp",
         Faults(refuse=True, to=["*.example.org", "192.0.2.0/24"], ports=[80, "8000-8999"], protocol="tcp")),
        ("blackhole,direction=in,seed=5", Faults(blackhole=True, direction="in", seed=5)),
        ("dns=timeout,dns-delay=1.5", Faults(dns="timeout", dns_delay=1.5)),
        ("reset-after=1000,queue=100000", Faults(reset_after=1000, queue=100000)),
    ],
)  # fmt: skip
def test_faults_of_a_command_line(text: str, faults: Faults) -> None:
    assert faults_of(text) == faults


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the names are loss, delay"),
        ("loss", "expected NAME=VALUE"),
        ("lost=1%", "the names are loss, delay"),
        ("loss=1%,loss=2%", "each once"),
        ("refuse=yes", "or blackhole or refuse"),
        ("loss=200%", "a probability, 0 to 1"),
        ("loss=10", "write loss=10%"),
        ("loss=much", "a probability, 0 to 1"),
        ("delay=50us", "seconds"),
        ("rate=10Mbit", 'write "10 Mbit/s"'),
        ("to=no name", "a domain name"),
        ("queue=1k", "a whole number"),
    ],
)
def test_what_is_no_fault(text: str, says: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        faults_of(text)
    assert says in str(caught.value)
