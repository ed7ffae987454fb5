"""The words in which taps are asked for: linux/if_tun.h.  What an open one can do is `netns_kit.tap.device`'s."""

from __future__ import annotations

IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000

TAP_FLAGS = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, IFF_TAP | IFF_NO_PI)
"""How a tap is opened, best first."""
GUEST_QUEUE = 16384
"""Packets the guest's kernel keeps for us while we are busy; of the usual 1000 it drops ACKs by the thousand when
hundreds of connections receive at once."""
