"""Operations: what may be asked of a stack that runs, wherever it runs.

A *feature* is a class on the engine's side that serves one subject: leases, records, forwards, flows, events.  Its
methods that may be asked for from outside are marked with `operation`, and nothing else has to know of them: the
name, the types of the arguments and of the answer, and how the answers of several workers become one are all said
there.  Arguments and answers are plain values (see `netns_kit.child.codec`), because a socket may lie in between.  An
operation that has a parameter of the name "now" is given the engine's time, and one that has "fds" the descriptors
that were handed over with the question, which are its own from then on, also if it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar, cast, get_type_hints

Join = Callable[[Sequence[Any]], Any]
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
_JOIN = "_join_of_answers"
_GIVEN = ("now", "fds")  # parameters that are no arguments of the question


class Asked(Protocol):
    """What operations may be asked of: a `UserStack`, or what runs it."""

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Do an operation, and return its answer, see `UserStack.ask`."""
        ...

    async def hand(
        self,
        fds: Sequence[Sequence[int]],
        operation: Callable[..., T],
        *arguments: object,
        flow: int | None = None,
    ) -> T:
        """Do the same with descriptors, see `UserStack.hand`."""
        ...


def operation(join: Join | None = None) -> Callable[[F], F]:
    """Mark a method as one that may be asked for.

    Args:
        join: Makes one answer of those of all workers.  None: the first worker is asked alone, because it has all
            that there is of this feature.
    """

    def mark(function: F) -> F:
        vars(function)[_JOIN] = join
        return function

    return mark


def operations_of(*features: type) -> Mapping[str, Callable[..., Any]]:
    """Return the operations of these features by name, that of the class and that of the method."""
    methods = (each for feature in features for each in vars(feature).values() if callable(each))
    return {each.__qualname__: each for each in methods if _JOIN in getattr(each, "__dict__", ())}


def join_of(asked: Callable[..., Any]) -> Join | None:
    """Return how the answers of several workers to an operation become one, see `operation`."""
    return cast("Join | None", vars(asked)[_JOIN])


@cache
def types_of(asked: Callable[..., Any]) -> tuple[tuple[Any, ...], Any]:
    """Return the types of an operation's arguments, and that of its answer."""
    hints = get_type_hints(asked)
    answer = hints.pop("return")
    return tuple(kind for name, kind in hints.items() if name not in _GIVEN), answer


def chained(answers: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Join tuples by putting one behind the other."""
    return tuple(each for answer in answers for each in answer)


def summed(answers: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Join counters by adding those of one name."""
    total: dict[str, int] = {}
    for answer in answers:
        for name, count in answer.items():
            total[name] = total.get(name, 0) + count
    return total


def same(answers: Sequence[Any]) -> Any:
    """Join answers that are all alike by taking the first."""
    return answers[0]
