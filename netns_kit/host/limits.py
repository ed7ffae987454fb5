"""Settings of a process that is wholly this library's: a worker, and the commands.

A program that imports netns_kit decides these things for itself; docs/performance.md tells what helps.
"""

from __future__ import annotations

import gc
import resource

THRESHOLDS = (2000, 20, 100)


def raise_descriptor_limit() -> None:
    """Raise the soft limit on descriptors to the hard one: nearly each flow has one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def calm_collector() -> None:
    """Make the garbage collector run seldom, and never visit what exists now, since that stays.

    A flow is no cycle and is freed by its reference count, so there is little for the collector to find.  It would
    visit the flows that are alive, and hold up everything meanwhile.
    """
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    gc.enable()
