"""What F_post,res on a stream of its own cannot be combined with, whatever the residual."""

from __future__ import annotations

from megatron_mhc.settings.constraint import (
    Constraint,
    Refusals,
    cuda_graphs,
    full_recompute,
    offloads,
)

_ROWS = (
    Constraint(
        '--recompute-granularity full',
        full_recompute,
        'its backward reruns forward passes, which is not tested with a second stream',
        'use --recompute-granularity selective',
    ),
    Constraint(
        '--cuda-graph-impl / --enable-cuda-graph',
        cuda_graphs,
        'a replayed layer does not wait for its input',
        'use --cuda-graph-impl none',
    ),
    Constraint(
        '--fine-grained-activation-offloading / --cpu-offloading-num-layers',
        offloads,
        'the residual would be offloaded while F_post,res still reads it',
        'use selective recomputation',
    ),
    Constraint(
        '--overlap-moe-expert-parallel-comm',
        lambda get: bool(get('overlap_moe_expert_parallel_comm')),
        'its schedule calls the residual add of a layer by hand',
        'drop the flag',
    ),
)
POST_STREAM = Refusals('--mhc-post-stream high', 'use --mhc-post-stream compute', _ROWS)
