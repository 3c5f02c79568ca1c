"""The torch truth of every op: any float dtype up to fp64, any device, readable as the equations.

Shape legend (shared by code and docs): s sequence, b microbatch, n streams, C hidden size,
T = s*b tokens, L sublayers. Leading dimensions are free and written ``...`` (Megatron: ``[s, b]``).
The streams of a token are one vector of n*C values, stream index outer.
"""

from megatron_mhc.kernels.reference.conventions import (
    gates_as,
    mapping_as,
    merge_gates_as,
    post_res_as,
    sinkhorn_as,
)
from megatron_mhc.kernels.reference.mapping import mapping_ref, scaled_projection_ref
from megatron_mhc.kernels.reference.read import read_ref
from megatron_mhc.kernels.reference.sinkhorn import sinkhorn_ref
from megatron_mhc.kernels.reference.streams import post_res_ref, pre_ref

__all__ = [
    'gates_as',
    'mapping_as',
    'mapping_ref',
    'merge_gates_as',
    'post_res_as',
    'post_res_ref',
    'pre_ref',
    'read_ref',
    'scaled_projection_ref',
    'sinkhorn_as',
    'sinkhorn_ref',
]
