"""What a policy costs a new flow: `python -m benchmarks.policy SECONDS`.

A gateway decides about flows to the same address, one after another, as it does for a guest: the uplink is asked,
and then the policy.  Nothing is sent.  It prints the microseconds of one flow, for each of `POLICIES`, as one JSON
object.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

from netns_kit import Policy, Subnet, TapDevice, Uplink
from netns_kit.domain_names import to_wire
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.setup import Setup
from netns_kit.policy.pins import Pin
from netns_kit.policy.rules import Rule
from netns_kit.stack.wire.flow_key import FlowKey

RULES, PINS = 1000, 10_000
TARGET = bytes((198, 51, 100, 7))
AT_ONCE = 200  # flows between two looks at the clock


def rules() -> Policy:
    """As many rules, every other by name; one in the middle allows the name of the target."""
    return Policy(
        "deny",
        [
            Rule("deny", [f"10.{number >> 8}.{number & 255}.0/24"], ports=[number + 1])
            if number % 2
            else Rule("allow", [f"*.n{number}.example"])
            for number in range(RULES)
        ],
    )


def pins(count: int) -> Iterator[Pin]:
    """What our DNS has answered: the target, and others."""
    yield to_wire(f"www.n{RULES // 2}.example"), TARGET, math.inf, False
    for number in range(count - 1):
        yield to_wire(f"www.n{number}.example"), bytes((198, 18, number >> 8, number & 255)), math.inf, False


POLICIES: dict[str, tuple[Callable[[], Policy | None], int]] = {
    "no policy": (lambda: None, 0),
    "no rules": (Policy.allow, 0),
    f"{RULES:,} rules, half of them by name": (rules, 1),
    f"{RULES:,} rules, {PINS:,} addresses of names": (rules, PINS),
}


def microseconds(policy: Policy | None, pinned: int, seconds: float) -> float:
    """The time of one flow: the median of many samples."""
    near, far = TapDevice.pair()
    engine = Engine()
    subnet = Subnet.parse("10.0.2.0/24")
    gateway = Gateway(engine, Setup(near, Uplink(dns=[]), subnet, policy=policy))
    if policy is not None:
        gateway.enforcer.learn(pins(pinned))
    route, clock = gateway.router.route, time.perf_counter
    keys = [FlowKey(subnet.guest.packed, TARGET, 1024 + number, 443).pack() for number in range(AT_ONCE)]
    samples: list[float] = []
    end = clock() + seconds
    while clock() < end or not samples:
        began = clock()
        for key in keys:
            found = route("udp", key)
        samples.append((clock() - began) / AT_ONCE)
        assert isinstance(found, tuple), "it may not pass"
    gateway.close()
    engine.close()
    near.release()
    far.release()
    return median(samples) * 1e6


if __name__ == "__main__":
    each = float(sys.argv[1]) / len(POLICIES)
    print(json.dumps({name: microseconds(make(), count, each) for name, (make, count) in POLICIES.items()}))
