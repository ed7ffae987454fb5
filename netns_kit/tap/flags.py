"""The words in which taps are asked for: linux/if_tun.h.  What an open one can do is `netns_kit.tap.device`'s."""

from __future__ import annotations

from netns_kit.host.abi import IFF_NO_PI, IFF_TAP, IFF_VNET_HDR

TAP_FLAGS = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, IFF_TAP | IFF_NO_PI)
"""How a tap is opened, best first."""
GUEST_QUEUE = 16384
"""Packets the guest's kernel keeps for us while we are busy; of the usual 1000 it drops ACKs by the thousand when
hundreds of connections receive at once."""
