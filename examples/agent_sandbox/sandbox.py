"""Run an agent with a network that leads to an allow-list: `python sandbox.py POLICY AUDIT -- COMMAND...`."""

from __future__ import annotations

import argparse
import ipaddress
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import anyio

from netns_kit import (
    DnsQuery,
    DnsSettings,
    FlowAttribute,
    InterceptedStream,
    Network,
    Policy,
    Record,
    Uplink,
    Verdict,
)

NOWHERE = ipaddress.IPv4Network("198.18.0.0/15")
"""Addresses for names that are refused: no host of the internet has them (RFC 2544)."""
ADVICE = "Trying again gives the same answer: ask whoever runs the sandbox to allow it."


class Signposts:
    """Gives each refused name an address of its own, where requests are answered with the reason.

    No resolver is asked about such a name.

    Args:
        policy: The allow-list.
        audit: What is told of each name and request that is refused, as a line of JSON.
    """

    def __init__(self, policy: Policy, audit: TextIO) -> None:
        self.policy = policy
        self._audit = audit
        self._free = NOWHERE.hosts()
        self._given: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def __call__(self, query: DnsQuery) -> Verdict:
        """Return the name's signpost; None for a name that is allowed, which is looked up."""
        asked = self.policy.explain(query.name)
        if asked.allowed:
            return None
        if query.name not in self._given:
            address = self._given[query.name] = str(next(self._free))
            self._names[address] = query.name
            self._tell(protocol="dns", name=query.name, signpost=address, rule=asked.label)
        return [Record(query.name, self._given[query.name])]

    async def explain(self, stream: InterceptedStream) -> None:
        """Answer a request to a signpost: 403, and why."""
        async with stream:
            name = self._names[str(stream.extra(FlowAttribute.local).address)]
            request = (await stream.receive()).split(b"\r\n")[0].decode("ascii", "replace")
            asked = self.policy.explain(f"http://{name}/")
            self._tell(protocol="http", name=name, request=request, rule=asked.label)
            body = f"This sandbox does not let you reach {name}.\nRule: {asked.label}\n{ADVICE}\n".encode()
            head = f"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
            await stream.send(head.encode() + b"Connection: close\r\n\r\n" + body)

    def _tell(self, **what: str) -> None:
        self._audit.write(json.dumps({"time": time.time(), "kind": "refused", **what}) + "\n")


async def sandbox(policy: Policy, audit: Path, command: list[str], host_ports: Iterable[int] = ()) -> int:
    """Run the command, write what it has done to `audit`, and return its status."""
    if policy.default != "deny":
        raise SystemExit(f'default = "{policy.default}": an allow-list has default = "deny"')
    with audit.open("a", buffering=1) as file:
        signposts = Signposts(policy, file)
        uplink = Uplink(dns=DnsSettings(hook=signposts), allow_host_loopback=host_ports)
        shown = policy.allow(NOWHERE, ports=80, protocol="tcp", name="signposts").allow(only="dns")
        async with anyio.create_task_group() as tasks, Network(uplink=uplink, policy=shown) as net:
            await tasks.start(net.stack.log_events, audit)
            async with await net.stack.intercept(NOWHERE, signposts.explain, ports=80, protocol="tcp"):
                done = await net.run(command, stdout=None, stderr=None, check=False)
    return done.returncode


def summary(audit: Path) -> str:
    """Return what was reached and what was refused, from the audit log."""
    counted: dict[str, Counter[str]] = {"reached": Counter(), "refused": Counter()}
    names: dict[str, str] = {}
    for event in map(json.loads, audit.read_text().splitlines()):
        where = event.get("remote", "")
        name = names.get(where) or event.get("name") or where
        if event["kind"] == "refused" and "signpost" in event:
            names[event["signpost"]] = name
        if event["kind"] == "closed" and event["rule"] and where not in names:  # no rule is about our DNS
            size = f"{event['bytes_from_guest']} bytes out, {event['bytes_to_guest']} in"
            counted["reached"][f"{event['protocol']} {name}:{event['remote_port']}, {size}"] += 1
        elif event["kind"] == "refused":
            what = event.get("request") or event.get("remote_port") or "name"
            counted["refused"][f"{event['protocol']} {name} ({what}): {event['rule']}"] += 1
    lines = []
    for title, found in counted.items():
        lines += [f"{title}: {found.total()}", *(f"  {times} × {each}" for each, times in found.items())]
    return "\n".join(lines)


def main() -> int:
    """Read the command line, run the agent, and print the summary to standard error."""
    parser = argparse.ArgumentParser(description="Run an agent with a network that leads to an allow-list.")
    parser.add_argument("policy", type=Path, help="a TOML file: docs/policy.md")
    parser.add_argument("audit", type=Path, help="a file to which a line of JSON is appended for each event")
    parser.add_argument(
        "--host-port", type=int, action="append", default=[], help="a port of this host's loopback"
    )
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    status = anyio.run(sandbox, Policy.load(given.policy), given.audit, given.command, given.host_port)
    print(summary(given.audit), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
