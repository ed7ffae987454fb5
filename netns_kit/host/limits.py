"""What a process sets for itself that has nobody else in it: a worker, and the commands.

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
    """Have the garbage collector look seldom, and never at what has been made so far, which stays.

    A flow is no cycle and goes by its reference count, so there is little for the collector to find.  What it would
    visit are the flows that are alive, and nothing else happens in the meantime.
    """
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    gc.enable()
