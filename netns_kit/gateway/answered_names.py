"""Answered names: whoever has to know what our DNS has answered is told here, behind the guard of the policy.

The policy's own pins (`netns_kit.policy.pins`) decide what may pass, and end with their answers.  What is noted here
decides nothing of that.  It lasts as long as somebody wants to know it: a program does not forget an address when a
TTL ends.

Of several workers one answers, and another may have the flow.  So each tells the others what it notes, before the
answer leaves; and what it has answered before, when somebody begins to want to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from netns_kit.dns.guard import Guard, Refused
from netns_kit.dns.message import TYPES, BadMessage, walk
from netns_kit.policy.addresses import canonical
from netns_kit.policy.index import NameTable
from netns_kit.policy.pins import PINS_PER_ANSWER, Pins

if TYPE_CHECKING:
    from netns_kit.policy.pins import Pin

_ADDRESS_SIZES = {TYPES["A"]: 4, TYPES["AAAA"]: 16}


class ListenedGuard:
    """A `Guard` that tells which answers leave, behind the policy's guard if there is one.

    Args:
        guard: The guard of the policy; None: there is none.
        heard: Called with the question and the message of each answer, before it leaves.
    """

    def __init__(self, guard: Guard | None, heard: Callable[[bytes, bytes], object]) -> None:
        self._guard = guard
        self._heard = heard

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
            self._heard(question, found)
        return found

    def names(self, name: bytes, address: bytes) -> bool:
        return self._guard is None or self._guard.names(name, address)


class AnsweredNames:
    """The names for which the DNS of a stack has given addresses, as far as somebody wants to know them.

    Args:
        share: Tells the other workers; None: there are none.
    """

    def __init__(self, share: Callable[[list[Pin]], object] | None) -> None:
        self._share = share
        self._wanted: dict[object, tuple[NameTable[bool], Callable[[], object]]] = {}
        self._pins = Pins()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody wants to know names."""
        return bool(self._wanted)

    def want(
        self,
        who: object,
        targets: Collection[str],
        changed: Callable[[], object],
        answered: Callable[[], Iterable[tuple[bytes, bytes]]],
    ) -> None:
        """Note what is answered for names from now on.

        Args:
            who: Who wants to know it: for each what was wanted before is forgotten.
            targets: The names, as targets of rules; none: it wants to know no more.
            changed: Called when an address has one name more.
            answered: Returns names and packed addresses that were answered before, which others are told.
        """
        self._wanted.pop(who, None)
        if targets:
            names = NameTable[bool]()
            for each in targets:
                names.get_or_set(each, True)
            self._wanted[who] = names, changed
            if self._share is not None:
                self._tell([each for each in answered() if names.matching(each[0])])

    def of(self, address: bytes) -> tuple[bytes, ...]:
        """Return the names of a packed address that were noted, on the wire and in lower case."""
        return self._pins.names(canonical(address), 0.0)

    def hear(self, question: bytes, message: bytes) -> None:
        """Note the addresses in an answer."""
        name = question[:-4].lower()
        if any(names.matching(name) for names, _ in self._wanted.values()):
            found = [(name, address) for address in addresses_in(question, message)]
            self._tell(found)
            self.note(found)

    def _tell(self, found: list[tuple[bytes, bytes]]) -> None:
        """Tell other workers."""
        for at in range(0, len(found) if self._share is not None else 0, PINS_PER_ANSWER):
            assert self._share is not None
            self._share([(*each, math.inf, False) for each in found[at : at + PINS_PER_ANSWER]])

    def note(self, found: Iterable[tuple[bytes, bytes]]) -> None:
        """Note names and their addresses, packed and canonical, which were answered here or by another worker."""
        news = [each for each in found if not self._pins.has(*each, 0.0)]
        for name, address in news:
            self._pins.add(name, address, math.inf)
        if news:
            for _, changed in self._wanted.values():
                changed()


def addresses_in(question: bytes, message: bytes) -> Iterator[bytes]:
    """Yield the first addresses in an answer, packed and canonical."""
    if int.from_bytes(question[-4:-2], "big") not in _ADDRESS_SIZES:
        return
    left = PINS_PER_ANSWER
    try:
        for found in walk(message, question):
            is_address = found.section == 1 and _ADDRESS_SIZES.get(found.kind) == found.end - found.data
            if is_address and left:
                left -= 1
                yield canonical(message[found.data : found.end])
    except BadMessage:
        return
