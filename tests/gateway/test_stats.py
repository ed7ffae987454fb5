"""The record of counters is complete, and documented: each name that a part can count is in it, and on the page."""

from __future__ import annotations

import ast
import random
import re
from pathlib import Path

import netns_kit
from netns_kit import Stats, Subnet, TapDevice, Uplink
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.setup import Setup
from netns_kit.gateway.stats import complete
from netns_kit.stack.seq import MASK
from netns_kit.stack.states import State
from netns_kit.stack.windows import Tuner
from tests.support import ROOT, files

PACKAGE = Path(netns_kit.__file__).parent
PAGE = ROOT / "docs" / "observing.md"
NAMES = set(Stats.__annotations__)
SERVERS = {"dhcp/server.py": ("dhcp",), "dhcp/message.py": ("dhcp",), "dhcp/server6.py": ("dhcp6",),
           "dhcp/message6.py": ("dhcp6",)}  # fmt: skip


def described() -> dict[str, str]:
    """What the text behind each field says."""
    tree = ast.parse((PACKAGE / "gateway" / "stats.py").read_text(encoding="utf-8"))
    (record,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    found = {}
    for field, text in zip(record.body[1::2], record.body[2::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert isinstance(field.target, ast.Name)
        assert isinstance(text, ast.Expr)
        assert isinstance(text.value, ast.Constant)
        found[field.target.id] = str(text.value.value)
    return found


def reasons(file: str) -> set[str]:
    """Why a module drops things: what it says to `BadPacket` or `BadDhcpMessage`, and counts under `dropped`."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        said: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "BadPacket",
            "BadDhcpMessage",
            "BadParameter",
        ):
            said = node.args[:1]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("dropped"):
            said = [node.slice]
        for each in said:
            found |= {
                part.value
                for part in ast.walk(each)
                if isinstance(part, ast.Constant)
                and isinstance(part.value, str)
                and not part.value.startswith("-")
            }
    return {reason.replace("-", "_") for reason in found}


def test_whatever_can_be_dropped_is_in_the_record() -> None:
    expected = {f"{name}_{to}" for name in ("tcp", "udp", "icmp") for to in ("broadcast", "multicast")}
    for file in files():
        if file.startswith("stack/") or file in (
            "gateway/asking.py",
            "gateway/flow_router.py",
            "gateway/frame_pump.py",
            "forwarder/listeners.py",
        ):
            expected |= reasons(file)
    assert {name for name in NAMES if name.startswith("dropped_")} == {f"dropped_{each}" for each in expected}


def test_whatever_the_dhcp_servers_drop_is_in_the_record() -> None:
    for server in ("dhcp", "dhcp6"):
        said = {reason for file, whose in SERVERS.items() if server in whose for reason in reasons(file)}
        there = {
            name.removeprefix(f"{server}_dropped_") for name in NAMES if name.startswith(f"{server}_dropped_")
        }
        assert said == there, server


def test_whatever_else_is_counted_is_in_the_record() -> None:
    near, far = TapDevice.pair()
    engine = Engine()
    gateway = Gateway(engine, Setup(near, Uplink(dns=[]), Subnet.parse("10.0.2.0/24", ipv6=True)))
    counted = gateway.stats()
    gateway.close()
    engine.close()
    near.release()
    far.release()
    assert counted.keys() <= NAMES
    of_several = {"handed_over", "handed_over_lost", "policy_pins_lost"}
    states = {f"tcp_{state.name.lower()}" for state in State}
    rest = {name for name in NAMES - states - of_several if "dropped_" not in name}
    assert rest == counted.keys() - states, "and nothing is in it that nobody counts"
    assert states <= NAMES


def test_the_record_is_always_complete() -> None:
    record = complete({"tap_received": 3, "what_a_worker_made_up": 1})
    assert record.keys() == NAMES
    assert (record["tap_received"], record["tap_sent"]) == (3, 0)


def test_the_page_has_each_of_them() -> None:
    """To make the table anew: `python -m tests.gateway.test_stats`."""
    found = re.search(
        r"<!-- stats: begin -->\n(.*)<!-- stats: end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found
    assert found[1] == table()


def table() -> str:
    rows = (f"| `{name}` | {text} |\n" for name, text in described().items())
    return f"| name | |\n|---|---|\n{''.join(rows)}"


def test_bytes_are_counted_beyond_what_sequence_numbers_have() -> None:
    """The tuner looks at least once in a round trip, in which no window of TCP lets 4 GiB cross."""
    chance = random.Random(4)
    tuner, position, total, now = Tuner(4_000_000_000), 4_000_000_000, 0, 0.0
    while total < 5 << 32:
        size = chance.randrange(1 << 30)
        position, total, now = (position + size) & MASK, total + size, now + 0.1
        if chance.random() < 0.5 or (position + (1 << 30)) & MASK < 1 << 31:
            tuner.grown(1 << 20, position, now, chance.choice([0.0, 0.01]))
        assert tuner.crossed(position) == total


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    text = re.sub(r"(<!-- stats: begin -->\n).*(<!-- stats: end -->)", lambda found: found[1] + table() + found[2],
                  text, flags=re.DOTALL)  # fmt: skip
    PAGE.write_text(text, encoding="utf-8")
