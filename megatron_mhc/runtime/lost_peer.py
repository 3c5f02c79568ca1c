"""Name the rank that ended first, where a collective only says that a connection was lost.

Every rank leaves its identity in the store of ``torch.distributed`` when training begins, and its
last words there when an exception ends it. A rank that lost a connection looks both up: what ended
another rank by an exception has been said by then, and a rank of its own machine that was killed is
missing there. What it finds first it says for all others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_mhc.runtime.process_identity import ProcessIdentity, is_gone, this_process

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# Seconds to look for a culprit; a store that has gone too must not keep a rank from ending.
PATIENCE = 5.0
KEY = 'megatron_mhc/ranks'
FIRST = f'{KEY}/first'
# What gloo, NCCL and the store say when the other end has gone.
LOST = (
    'gloo/transport',
    'Connection closed by peer',
    'Connection reset by peer',
    'Broken pipe',
    'NCCL error',
    'remote process exited',
    'Failed to recv',
)


def enter() -> None:
    """Leave this rank's identity in the store; called once process groups exist."""
    identity = json.dumps(dataclasses.asdict(this_process()))
    _store().set(f'{KEY}/{dist.get_rank()}', identity)


def is_lost_connection(error: BaseException) -> bool:
    """Whether ``error`` tells of another process's end and not of a fault of this one."""
    kinds = (ConnectionError, dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)
    if isinstance(error, kinds) or any(word in str(error) for word in LOST):
        return True
    # Where a message of ours stands around it.
    return error.__cause__ is not None and is_lost_connection(error.__cause__)


def last_words(error: BaseException, text: str) -> str | None:
    """Tell the other ranks what ends this one; returns what is known of a rank that ended first.

    Takes at most PATIENCE seconds, whatever has become of the store.

    Args:
        error: what ends this rank.
        text: the same in one line.

    Returns:
        A line that names a rank, or None where ``error`` is this rank's own.
    """
    if not dist.is_initialized():
        return None
    lost = is_lost_connection(error)
    answer: list[str] = []

    def look() -> None:
        try:
            answer.append(_first(lost, text))
        except RuntimeError:
            answer.append(_store_is_gone())

    # A thread that a store without an answer holds up ends with the process.
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(PATIENCE + 1)
    if not lost:
        return None
    return answer[0] if answer else _store_is_gone()


def _first(lost: bool, text: str) -> str:
    store, rank = _store(), dist.get_rank()
    if not lost:
        return store.compare_set(FIRST, '', f'rank {rank} ended first: {text}').decode()
    store.set(f'{KEY}/{rank}/lost', text)
    neighbours = _on_this_node(store, rank)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if store.check([FIRST]):
            return store.get(FIRST).decode()
        for other, process in neighbours.items():
            if is_gone(process):
                line = f'rank {other} ended first: {process} is gone without a word, as after kill'
                line += ' -9 or for want of memory; its log and `dmesg` may say more'
                return store.compare_set(FIRST, '', line).decode()
        time.sleep(0.05)
    silent = [
        str(other)
        for other in range(dist.get_world_size())
        if other != rank and not store.check([f'{KEY}/{other}/lost'])
    ]
    which = f'ranks that have said nothing: {", ".join(silent[:16])}' if silent else 'all lost one'
    return f'no rank has said within {PATIENCE:g} s why it ended ({which}); read their logs'


def _on_this_node(store: Store, rank: int) -> dict[int, ProcessIdentity]:
    """The other ranks of this node; launchers number them in one go."""
    local = int(os.environ.get('LOCAL_RANK', '0'))
    first, count = rank - local, int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
    others = [other for other in range(first, first + count) if other != rank]
    return {
        other: ProcessIdentity(**json.loads(store.get(f'{KEY}/{other}')))
        for other in others
        if store.check([f'{KEY}/{other}'])
    }


def _store_is_gone() -> str:
    # torchrun keeps the store itself; without it rank 0 does.
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        return 'the rendezvous store does not answer: torchrun on its first node has ended'
    return 'the rendezvous store does not answer: rank 0, which keeps it, ended first'


def _store() -> Store:
    return dist.distributed_c10d._get_default_store()
