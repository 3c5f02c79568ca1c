"""CUDA graphs over n streams: behind a flag until a GPU has run them, and what they cannot capture.

A replay runs kernels, no Python. So whatever a sublayer does in Python beside starting kernels, and
whatever travels from layer to layer as an attribute of a tensor, is refused or left out.
"""

from __future__ import annotations

from megatron_mhc.settings.constraint import (
    Constraint,
    Refusals,
    Setting,
    captured_parts,
    cuda_graphs,
)
from megatron_mhc.settings.names import MAPPED_TYPES, RESIDUAL_TYPES

FLAG = '--mhc-cuda-graphs'
_GRAPHS = '--cuda-graph-impl / --enable-cuda-graph'

NEVER = Refusals(
    '--residual-type {}',
    'use --residual-type standard',
    (
        Constraint(
            _GRAPHS,
            cuda_graphs,
            'its layers have not been fitted to the static inputs of a graph',
            'use --cuda-graph-impl none',
        ),
    ),
    tuple(kind for kind in RESIDUAL_TYPES[1:] if kind not in MAPPED_TYPES),
)
UNASKED = Refusals(
    '--residual-type {}',
    'use --residual-type standard',
    (
        Constraint(
            _GRAPHS,
            cuda_graphs,
            'no GPU has captured n streams yet, although nothing known stands against it',
            f'use --cuda-graph-impl none, or be the first with {FLAG}',
        ),
    ),
    MAPPED_TYPES,
)


def _parts_of_moe(get: Setting) -> bool:
    parts = {'moe_router', 'moe_preprocess'}
    return cuda_graphs(get) and bool(parts & captured_parts(get))


ASKED = Refusals(
    FLAG,
    f'drop {FLAG} and the graphs',
    (
        Constraint(
            f'{FLAG} without --cuda-graph-impl',
            # Of the command line alone: a checkpoint's model is also built without its graphs.
            lambda get: bool(get('residual_type')) and not cuda_graphs(get),
            'there is no graph',
            'add --cuda-graph-impl local, transformer_engine or full_iteration',
        ),
        Constraint(
            '--cuda-graph-modules moe_router or moe_preprocess',
            _parts_of_moe,
            'the end of an MoE layer would be a graph of its own, whose bias and dropout '
            'F_post,res gets from Python',
            'leave them out of the modules',
        ),
        Constraint(
            '--overlap-moe-expert-parallel-comm',
            lambda get: bool(get('overlap_moe_expert_parallel_comm')),
            'passes hand over in Python, between the kernels that a graph would hold',
            'drop the flag',
        ),
        Constraint(
            '--mhc-monitor / --mhc-alarm',
            lambda get: bool(get('mhc_monitor')) or get('mhc_alarm') not in (None, 'off'),
            'samples are taken by Python in the forward, which a replay does not run',
            'drop the flag',
        ),
    ),
    MAPPED_TYPES,
)
