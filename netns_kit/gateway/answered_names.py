"""Answered names: whoever has to know what our DNS has answered is told here, behind the guard of the policy.

The policy's own pins (`netns_kit.policy.pins`) decide what may pass, and end with their answers.  What is noted here
decides nothing of that.  It lasts as long as somebody wants to know it: a program does not forget an address when a
TTL ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from netns_kit.dns.guard import Guard, Refused
from netns_kit.dns.message import TYPES, BadMessage, walk
from netns_kit.domain_names import to_wire
from netns_kit.policy.addresses import canonical
from netns_kit.policy.pins import PINS_PER_ANSWER, Pins

_ADDRESS_SIZES = {TYPES["A"]: 4, TYPES["AAAA"]: 16}


class AnswerListener(Protocol):
    """A function that is told of each answer before it leaves.  Its arguments are those of `Guard.answer`."""

    def __call__(
        self, question: bytes, message: bytes, now: float, client: bytes, *, ours: bool
    ) -> object: ...


class ListenedGuard:
    """A `Guard` that tells which answers leave, behind the policy's guard if there is one.

    Args:
        guard: The guard of the policy; None: there is none.
        listeners: The functions that are told.
    """

    def __init__(self, guard: Guard | None, listeners: Sequence[AnswerListener]) -> None:
        self._guard = guard
        self._listeners = listeners

    def question(self, name: bytes, kind: int, client: bytes) -> Refused | None:
        return None if self._guard is None else self._guard.question(name, kind, client)

    def alias(self, name: bytes, kind: int, client: bytes) -> Refused | None:
        return None if self._guard is None else self._guard.alias(name, kind, client)

    def answer(
        self, question: bytes, message: bytes, now: float, client: bytes, *, ours: bool
    ) -> bytes | Refused:
        found: bytes | Refused = message
        if self._guard is not None:
            found = self._guard.answer(question, message, now, client, ours=ours)
        if not isinstance(found, Refused):
            for listener in self._listeners:
                listener(question, found, now, client, ours=ours)
        return found

    def names(self, name: bytes, address: bytes) -> bool:
        return self._guard is None or self._guard.names(name, address)


class AnsweredNames:
    """The names for which our DNS has given addresses, from now on; and those that are known by then.

    Args:
        names_of: Returns the names of a packed address in our own records.
        name_of: Returns the name for which our DNS has given a packed address last, or None.
        changed: Called when an address has one name more.
    """

    def __init__(
        self,
        names_of: Callable[[bytes], tuple[bytes, ...]],
        name_of: Callable[[bytes], str | None],
        changed: Callable[[], object],
    ) -> None:
        self._names_of = names_of
        self._name_of = name_of
        self._changed = changed
        self._pins = Pins()

    def of(self, address: bytes) -> tuple[bytes, ...]:
        """Return the names of a packed address, on the wire and in lower case."""
        names = self._names_of(address) + self._pins.names(canonical(address), 0.0)
        last = self._name_of(address)
        return names if last is None else (*names, to_wire(last).lower())

    def hear(self, question: bytes, message: bytes, now: float, client: bytes, *, ours: bool) -> None:
        """Note the addresses in an answer: this is an `AnswerListener`."""
        size = _ADDRESS_SIZES.get(int.from_bytes(question[-4:-2], "big"))
        if size is None:
            return
        name, left = question[:-4].lower(), PINS_PER_ANSWER
        try:
            for found in walk(message, question):
                is_address = found.section == 1 and _ADDRESS_SIZES.get(found.kind) == found.end - found.data
                if is_address and left:
                    left -= 1
                    self._note(name, canonical(message[found.data : found.end]))
        except BadMessage:
            return

    def _note(self, name: bytes, address: bytes) -> None:
        if not self._pins.has(name, address, 0.0):
            self._pins.add(name, address, math.inf)
            self._changed()
