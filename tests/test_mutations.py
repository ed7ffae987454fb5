"""The table of mutations keeps up with the code; `python -m tests.mutations` applies them."""

from __future__ import annotations

import re

import pytest

from tests.mutations import Mutation, mutations
from tests.support import ROOT

ROWS = range(63, 102)
ELSEWHERE = {92}  # IPv6 fragments: in packet diagrams, until there is IPv6 to reach


@pytest.mark.parametrize("mutation", [pytest.param(each, id=each.name) for each in mutations()])
def test_it_breaks_what_is_there(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.old!r} in {mutation.file}"
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    file, _, test = mutation.test.partition("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")


def test_every_row_is_broken_once() -> None:
    found = {int(number) for each in mutations() for number in re.findall(r"^\d+", each.name)}
    assert found >= set(ROWS) - ELSEWHERE
