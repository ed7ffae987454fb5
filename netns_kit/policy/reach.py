"""Reach: whether each rule of a policy can decide about anything, and can be held to.

A rule that an earlier one covers wholly is never asked.  A deny by name is worth nothing if the addresses of the name
are let through behind it.  Both are errors when the rule is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from netns_kit.errors import PolicyError

from .addresses import NetworkTable
from .index import NameTable, parts_of
from .presets import HOST, PRIVATE
from .rules import Rule, RuleAction, Spaces, covers, is_name, meets, spaces


class _Entry(NamedTuple):
    """A rule at one of its targets."""

    number: int
    lowest: int
    highest: int
    about: Spaces

    @classmethod
    def of(cls, number: int, about: Spaces) -> _Entry:
        ranges = [each for ranges in about.values() for each in ranges]
        return cls(number, min(first for first, _ in ranges), max(last for _, last in ranges), about)


def _covering(entries: Iterable[_Entry], part: Spaces) -> Iterator[int]:
    """Yield the rules that are about all ports of a part."""
    _, low, high, _ = _Entry.of(0, part)
    for number, lowest, highest, about in entries:
        if lowest <= low and high <= highest and covers(about, part):
            yield number


class Reach:
    """What the rules so far are about.

    Args:
        default: The action of the default.
        rules: The rules so far.
    """

    def __init__(self, default: RuleAction, rules: Iterable[Rule] = ()) -> None:
        self._default = default
        self.rules: list[Rule] = []
        self._networks: NetworkTable[list[_Entry]] = NetworkTable()
        self._names: NameTable[list[_Entry]] = NameTable()
        self._host: list[_Entry] = []
        self._everything: list[_Entry] = []
        self._queries: NameTable[list[int]] = NameTable()  # the rules that decide about queries
        self._all_queries: list[int] = []
        self._denied_names: dict[tuple[object, ...], _Entry] = {}  # one rule for each set of ports
        for rule in rules:
            self.add(rule)

    def add(self, rule: Rule) -> None:
        """Add a rule behind the others.

        Raises:
            PolicyError: The rule cannot decide about anything, or cannot be held to.  It is not added.
        """
        self._check_decides(rule)
        self._check_private(rule)
        self._check_denied_names(rule)
        self._check_leaves_something(rule)
        self._note(rule)

    # -- checks -------------------------------------------------------------------------------------------

    def _check_leaves_something(self, rule: Rule) -> None:
        """Raise `PolicyError` if a rule lets everything pass: that is what a default is for.

        Such a rule comes of a list of targets that happens to be empty.
        """
        if rule.action != "deny" and rule.only is None and not rule.targets and rule.is_whole:
            raise PolicyError(
                "expected a target, ports or a protocol: without them the rule is about everything, and the default"
                " about nothing",
                "targets", "()", f"make sure that there are some, or begin with Policy.{rule.action}()",
            )  # fmt: skip

    def _check_decides(self, rule: Rule) -> None:
        """Raise `PolicyError` if an earlier rule decides about all that a target of this one is about."""
        for target in rule.targets or ("",):
            earlier = self._earlier(rule, target)
            if earlier is not None:
                raise self._unreachable(rule, target, earlier)

    def _earlier(self, rule: Rule, target: str) -> int | None:
        """Return the first rule that leaves a target of this one nothing to decide about, or None."""
        by_name = is_name(target) if target else False
        if rule.only is None:
            found = self._covering(rule, target)
            if found is not None or not by_name or rule.action == "deny":
                pass
            elif (query := self._deciding_query(target)) is not None and self.rules[query].action == "deny":
                found = query
            return found
        return self._deciding_query(target)

    def _covering(self, rule: Rule, target: str) -> int | None:
        """Return the first rule that decides about all flows that a target of this one is about, or None."""
        if target and not is_name(target) and target != HOST.name:
            return self._covering_networks(rule, target)
        lists = [self._everything]
        if target == HOST.name:
            lists.append(self._host)
        elif target:
            lists.extend(self._names.covering(target))
        about = spaces(rule)
        return min((number for each in lists for number in _covering(each, about)), default=None)

    def _covering_networks(self, rule: Rule, target: str) -> int | None:
        """Return the first rule that decides about all parts of a target, or None."""
        of_each = []
        for network, within in parts_of(target):
            about = spaces(rule, within)
            if about:
                lists = (self._everything, *self._networks.covering(network))
                of_each.append({number for each in lists for number in _covering(each, about)})
        return min(set.intersection(*of_each), default=None) if of_each else None

    def _deciding_query(self, target: str) -> int | None:
        """Return the first rule that decides about all queries for the names of a target, or None."""
        named = [number for found in self._queries.covering(target) for number in found] if target else []
        return min((*named, *self._all_queries), default=None)

    def _unreachable(self, rule: Rule, target: str, earlier: int) -> PolicyError:
        other = self.rules[earlier]
        told = label(earlier, other)
        what = "queries" if rule.only is not None else "flows"
        value = repr(target) if target else "()"
        fix = "put it before that rule, or leave it out"
        if other.action == "deny" and other.only == "dns" and rule.only is None:
            cause = f"expected a name that is resolved: {told} refuses the queries for it"
        elif other.action == rule.action:
            cause = (
                f"expected a target that is not covered yet: {told} decides about all these {what} already"
            )
            fix = "leave it out" if not other.looks else fix
        else:
            cause = f"expected a target that no other rule contradicts: {told} decides about all these {what}"
        return PolicyError(cause, "targets", value, fix)

    def _check_private(self, rule: Rule) -> None:
        """Raise `PolicyError` if private answers are allowed, but an earlier rule denies all private addresses."""
        if not rule.private:
            return
        about = spaces(rule)
        for number, other in enumerate(self.rules):
            if other.action == "deny" and PRIVATE.name in other.targets and covers(spaces(other), about):
                raise PolicyError(
                    f"expected private addresses to be let pass: {label(number, other)} comes first and denies them",
                    "private", True, "put it before that rule",
                )  # fmt: skip

    def _check_denied_names(self, rule: Rule) -> None:
        """Raise `PolicyError` if flows to a name that is denied are let pass when they are opened by address."""
        if rule.only is not None:
            return
        if rule.action == "deny":
            if rule.has_names and self._default != "deny":
                raise PolicyError(
                    f'expected only="dns": the default is to {self._default}, so who knows an address of the name'
                    f" passes by the default",
                    "targets", repr(next(filter(is_name, rule.targets))),
                    'write only="dns" to refuse the queries alone, or begin with Policy.deny()',
                )  # fmt: skip
            return
        for about in self._nameless(rule):
            _, low, high, _ = _Entry.of(0, about)
            for number, lowest, highest, denied in self._denied_names.values():
                if lowest <= high and low <= highest and meets(about, denied):
                    other = label(number, self.rules[number])
                    raise PolicyError(
                        f"expected it before {other}: addresses of a name that is denied there would pass here",
                        "targets", shown_targets(rule),
                        'put it there, or write only="dns" into that rule, which then refuses the queries alone',
                    )  # fmt: skip

    def _nameless(self, rule: Rule) -> Iterator[Spaces]:
        if not rule.targets:
            yield spaces(rule)
        for target in rule.targets:
            if not is_name(target):
                for ports in {ports for _, ports in parts_of(target)} or {()}:
                    if about := spaces(rule, ports):
                        yield about

    # -- notes --------------------------------------------------------------------------------------------

    def _note(self, rule: Rule) -> None:
        number = len(self.rules)
        self.rules.append(rule)
        decides = rule.action != "deny" or rule.is_whole
        about = spaces(rule)
        for target in rule.targets or ("",):
            named = bool(target) and is_name(target)
            if decides and not target:
                self._all_queries.append(number)
            elif decides and named:
                self._queries.get_or_set(target, []).append(number)
            if rule.only is not None:
                continue
            if not target:
                self._everything.append(_Entry.of(number, about))
            elif target == HOST.name:
                self._host.append(_Entry.of(number, about))
            elif named:
                self._names.get_or_set(target, []).append(_Entry.of(number, about))
            else:
                for network, within in parts_of(target):
                    about_part = spaces(rule, within)
                    if about_part:
                        self._networks.get_or_set(network, []).append(_Entry.of(number, about_part))
        if rule.action == "deny" and rule.has_names and rule.only is None:
            self._denied_names.setdefault((rule.ports, rule.protocol), _Entry.of(number, about))


def shown_targets(rule: Rule) -> str:
    return ", ".join(map(repr, rule.targets)) or "()"


def label(number: int, rule: Rule) -> str:
    """Return what messages call a rule; numbers begin with 1 there."""
    return f"rule {number + 1}{f' ({rule.name})' if rule.name else ''}: {rule}"
