"""What a test with the fixtures of docs/pytest.md costs: `python -m benchmarks.testing [TESTS]`.

Each figure is milliseconds of CPU for a test that is given a fixture and does nothing, with what its processes take,
by fixture and event loop, as one JSON object.  `import` is what the plugin takes in a run that does not use it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

from netns_kit.testing.ground import Ground

WARM_UP = 3
GIVEN: dict[str, Callable[[Ground], object]] = {
    "tap_pair": Ground.pair,
    "netns": Ground.namespace,
    "confined": Ground.confined,
}
IMPORT = """
import pytest, time
began = time.process_time()
import netns_kit.testing.plugin
print(time.process_time() - began)
"""


def cpu() -> float:
    """Return the seconds of CPU that this process and its children have taken."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


async def one_test(fixture: str) -> None:
    """Do what the plugin does for a test."""
    ground = Ground(Path)
    networks: Any = ground.networks()

    async def test() -> None:
        if fixture == "network":
            await networks()

    if fixture in GIVEN:
        GIVEN[fixture](ground)
    await ground.around(test)()


async def measure(fixture: str, tests: int) -> float:
    """Return the CPU time of a test, in milliseconds."""
    for _ in range(WARM_UP):
        await one_test(fixture)
    began = cpu()
    for _ in range(tests):
        await one_test(fixture)
    return round((cpu() - began) / tests * 1e3, 1)


def importing() -> float:
    """Return the CPU time of importing the plugin, in milliseconds: the least of some."""
    command = [sys.executable, "-c", IMPORT]
    done = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(5)]
    return round(min(map(float, done)) * 1e3, 1)


def main(tests: str = "30") -> None:
    found = {
        f"{fixture}, {backend}": anyio.run(measure, fixture, int(tests), backend=backend)
        for fixture in (*GIVEN, "network")
        for backend in ("asyncio", "trio")
    }
    print(json.dumps({**found, "import": importing()}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:2])
