"""Storms of datagrams: very many programs, each with a port of its own, one question and one answer.

What must hold: sockets stay within the bound, whoever is active keeps its flow, no answer under way is lost, and
the memory comes back.  Short by default: 2,500 exchanges with each driver; with NETNS_KIT_LONG=1: 50,000.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from typing import Any

import anyio
import pytest

from netns_kit.gateway.setup import DriverName
from tests.support import LONG, ROOT, descriptors, needs_tun
from tests.support.load import MIB, leaked, resident
from tests.support.storms import BATCH, DESCRIPTORS, ROUND, SECONDS, Servers, storms

pytestmark = pytest.mark.timeout(400)

EXCHANGES = 50_000 if LONG else 2_500
FLOWS = 512
STEADY = 100  # programs that go on all the time


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
async def test_a_storm_of_datagrams(anyio_backend_name: str, record_property: Any) -> None:
    needs_tun()
    servers = Servers()
    driver: DriverName = "thread" if anyio_backend_name == "asyncio" else "loop"
    with anyio.fail_after(SECONDS):
        async with storms(servers, driver, udp_flows=FLOWS, udp_one_way=1.0, udp_stream=1.0) as (
            network,
            run,
        ):
            held, sizes = descriptors(), [resident()]
            for rounds in (5, *[EXCHANGES // ROUND // 2] * 2):  # the first to warm up
                servers.restart()
                start = anyio.current_time()
                fate = await run(rounds * ROUND, BATCH, STEADY, 1.0)
                took = anyio.current_time() - start
                assert fate == {
                    "answered": rounds * ROUND,
                    "steady": rounds * STEADY,
                    "names": rounds,
                    "refused": 0,
                    "lost": 0,
                }
                assert len(held) + FLOWS // 2 < servers.most < len(held) + FLOWS + 20
                assert len(servers.places) == STEADY
                await network.gone(5.0)
                assert descriptors() == held
                gc.collect()
                sizes.append(resident())
            record_property("exchanges_per_second", round(rounds * (ROUND + STEADY + 1) / took))
    assert leaked(sizes) < 4 * MIB, sizes


# -- with few descriptors -----------------------------------------------------------------------------


def test_a_storm_where_descriptors_are_few() -> None:
    """Connections are refused when there are too many, and datagrams make room for others; a connection goes on,
    names are resolved all the time, nothing dies, and afterwards new connections are made as before.
    """
    needs_tun()
    child = subprocess.run(
        [sys.executable, "-m", "tests.support.storms"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert 100 <= told["connections"] <= DESCRIPTORS // 2 + 1
    assert told["named"]
    fate = told["fate"]
    assert fate["answered"] >= 100
    assert fate["answered"] + fate["refused"] + fate["lost"] == 400
    assert fate["names"] == 1
    assert DESCRIPTORS // 2 < told["most"] < DESCRIPTORS - 16
