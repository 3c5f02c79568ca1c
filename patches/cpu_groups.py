"""Patch of the emulated CPU device: process groups that hold this rank alone.

Of Megatron's two dozen groups a rank most have one member in a small layout, and each would keep
threads of gloo's that wake a hundred times a second. A group of one exchanges nothing and waits for
nobody, so all of them can be the same object; larger groups of equal ranks are left as they are,
since collectives in flight on two groups may be begun in another order on another rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import distributed

from megatron_mhc.patches.engine import Patch, on_every_release


def _one_group_of_one(original: Callable[..., Any]) -> Callable[..., Any]:
    alone = None

    def create(ranks=None, *args, **kwargs):
        nonlocal alone
        if ranks is None or len(ranks) != 1:
            return original(ranks, *args, **kwargs)
        if distributed.get_rank() not in ranks:
            return distributed.GroupMember.NON_GROUP_MEMBER
        if not _alive(alone):
            # Only its member makes it, so ranks need not agree on whether it exists.
            alone = original(ranks, use_local_synchronization=True)
        return alone

    return create


def _alive(group: distributed.ProcessGroup | None) -> bool:
    try:
        return group is not None and len(distributed.get_process_group_ranks(group)) == 1
    except (KeyError, ValueError):
        # Destroyed, by itself or with the world it belonged to.
        return False


CPU_GROUPS_PATCH = Patch(
    id='cpu-groups-of-one',
    target='megatron.core.parallel_state:create_group',
    wrap=_one_group_of_one,
    reason='a dozen groups of this rank alone would hold three threads of gloo each',
    fingerprints=on_every_release('db33c09b'),
)
