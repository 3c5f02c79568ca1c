"""How many hardware queues the streams of a GPU may have: Megatron's rule, in one place."""

from __future__ import annotations

CONNECTIONS = 'CUDA_DEVICE_MAX_CONNECTIONS'
# Major number of its compute capability.
BLACKWELL = 10


def one_queue(tp: int, cp: int = 1, compute_capability: int = 0) -> bool:
    """Whether all streams of a GPU have to share one hardware queue, and do not overlap.

    Megatron 0.17 to 0.19 (and main) ends a run with tensor or context parallelism unless
    ``CUDA_DEVICE_MAX_CONNECTIONS`` is 1, on GPUs before Blackwell.

    Args:
        tp, cp: tensor- and context-parallel ranks.
        compute_capability: major number, of a GPU; 0 where nobody has named one.
    """
    return (tp > 1 or cp > 1) and compute_capability < BLACKWELL


def connections(one: bool) -> str:
    """What ``CUDA_DEVICE_MAX_CONNECTIONS`` is to be; below 8 streams wait for each other."""
    return '1' if one else '32'
