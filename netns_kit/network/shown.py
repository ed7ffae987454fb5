"""The files that commands in a network see in place of the host's."""

from __future__ import annotations

import os
from collections.abc import Iterable

from netns_kit.dns import Record, hosts
from netns_kit.host.paths import text_of
from netns_kit.policy.policy import Policy
from netns_kit.uplink.dns_settings import RESOLV_CONF
from netns_kit.userstack.userstack import UserStack

HOSTS = "/etc/hosts"


async def shown_files(
    stack: UserStack, own: Policy | None = None, beside: Iterable[Record] = ()
) -> dict[str, str]:
    """Return the text of resolv.conf and of the hosts file, by path: see `Network.files`.

    Args:
        stack: The stack of the network.
        own: The policy of the member, if it has one of its own.
        beside: The records of other networks that the member is of; a name that is here too is not theirs.

    Raises:
        StackClosed: The stack is not open.
    """
    resolv_conf = stack.uplink.resolv_conf(*stack.subnet.resolvers)
    records = await stack.records()
    names = {each.name for each in records}
    records += tuple(each for each in beside if each.name not in names)
    ours = [
        (each.name, each.value) for each in records if each.type in ("A", "AAAA") and "*" not in each.name
    ]
    asked_for: list[str] = []
    policy = stack.policy if own is None else own
    if policy is not None and any(rule.has_names for rule in policy.rules):
        ours, asked_for = [], [name for name, _ in ours]
    others = "" if stack.uplink.is_in_memory else text_of(HOSTS)
    text = hosts.written(os.uname().nodename, ours, others, left_out=asked_for)
    return {RESOLV_CONF: resolv_conf, HOSTS: text}
