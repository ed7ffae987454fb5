"""WorkerInput: what a worker gets, its `Setup` and its links to the other workers; how it is sent and received.

`encode` pickles the records whole, whatever fields they have, because the owner is trusted.  Descriptors are passed
beside the text, which has their numbers in the worker.  `decode` imports each module from the file that the owner has
imported it from, or refuses.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping
from typing import NamedTuple

from netns_kit.errors import NotImportable
from netns_kit.frozen import replace
from netns_kit.gateway.setup import Setup
from netns_kit.gateway.worker_links import WorkerLinks

from .policy_check import FIX, pickled


class WorkerInput(NamedTuple):
    """The pickled records, with what is needed to unpickle them.

    `path` is where modules are looked for.  `modules` has the files of the modules that `content` names.
    """

    path: tuple[str, ...]
    modules: dict[str, str | None]
    content: bytes


def encode(setup: Setup, peers: WorkerLinks | None, numbers: Mapping[int, int]) -> bytes:
    """Return the text for a worker.

    Args:
        setup: The settings of the stack.
        peers: The worker's links to the others of the same namespace; None: there are none.
        numbers: The numbers in the worker of the descriptors that are passed beside: those of the tap and the links.

    Raises:
        NotImportable: A worker cannot have a part of it.
        DeviceGone: The device is not open.
    """
    there = replace(setup, tap=setup.tap.at(numbers[setup.tap.fileno()]), on_flow=None)
    content, names = pickled((there, peers), numbers)
    path = tuple(os.path.abspath(each) for each in sys.path)
    modules = {name: getattr(sys.modules[name], "__file__", None) for name in names}
    return pickle.dumps(tuple(WorkerInput(path, modules, content)))


def decode(text: bytes) -> tuple[Setup, WorkerLinks | None]:
    """Return what was given to `encode`.

    Raises:
        NotImportable: A module is not found, or is another one than the owner's.
    """
    given = WorkerInput(*pickle.loads(text))
    sys.path[:] = given.path
    try:
        setup, peers = pickle.loads(given.content)
    except Exception as error:
        raise NotImportable(
            f"the worker process cannot import the uplink's parts: {type(error).__name__}: {error}", fix=FIX
        ) from error
    for name, file in given.modules.items():
        found = getattr(sys.modules.get(name), "__file__", None)
        if found != file:
            raise NotImportable(f"the worker process finds {name} elsewhere, in {found}", name, file, FIX)
    return setup, peers
