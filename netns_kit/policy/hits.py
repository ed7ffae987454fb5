"""PolicyHits: how often each rule of a policy has decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from netns_kit.display.displayed import Displayed
from netns_kit.frozen import frozen

from .policy import Policy
from .rules import Rule

if TYPE_CHECKING:
    from netns_kit.display.view import View


@frozen
class RuleHits:
    """A rule, and how often it has decided since its policy was set."""

    rule: Rule
    """Rule of the policy, or its default as a rule."""
    flows: int
    """Number of flows that it has decided about, whichever way."""
    queries: int
    """Number of DNS queries and answers that it has refused, or would have, but for `audit`."""


@frozen
class PolicyHits(Displayed):
    """A policy, and how often each of its rules has decided.  A notebook shows it as a table, and `print` as text."""

    policy: Policy
    """Policy that decides."""
    rules: tuple[RuleHits, ...]
    """Rules in order, and the default as the last."""

    @classmethod
    def of(cls, policy: Policy, counted: Mapping[str, int]) -> PolicyHits:
        """Make the record of what an enforcer has counted; for parts of this library.

        Args:
            policy: The policy.
            counted: Flows by the label of their rule, and queries by "dns " and that.
        """
        numbers = (*range(len(policy.rules)), None)
        labels = [(number, policy.label(number)) for number in numbers]
        return cls(
            policy,
            tuple(
                RuleHits(policy.rule(number), counted.get(label, 0), counted.get(f"dns {label}", 0))
                for number, label in labels
            ),
        )

    def _view(self) -> View:
        from .display import policy_view

        return policy_view(self.policy, self.rules)
