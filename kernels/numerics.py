"""What each project computes where the mHC paper leaves a choice, by name; no torch here.

All keep phi, b and alpha alike, and all are told here in our orientation: H_res mixes as
``x'[i] = sum_j H_res[i, j] x[j]``. A project that applies the transpose of its matrix has rows
where this says columns, and `megatron-mhc convert` transposes what it stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mhc.kernels.defaults import NORM_EPS

PAPER = 'paper'


@dataclass(frozen=True)
class Numerics:
    """The conventions of one project.

    Args:
        sinkhorn: ``exact``: columns first, rows last, nothing added. ``added``: the same order from
            a softmax over columns, with ``eps`` added to it and to every sum. ``clamped``: rows
            first, columns last, sums of at least ``eps``.
        pre_eps: added to H_pre = sigma(...); post_eps: to H_post = 2 sigma(...).
        norm_outside: the norm is sqrt(mean square) + eps, not sqrt(mean square + eps).
        norm_eps: that eps where ``--mhc-norm-eps`` is left out; norm_eps_fixed: no other is theirs.
        narrow: parameters, norm, maps and Sinkhorn in the dtype of the streams, not in fp32.
        rounded: maps that are rounded to the dtype of the streams before they are applied.
        mix_rounds: H_res x and H_post y are rounded to that dtype before they are added.
        merge: how streams become one; None: any way.
        merge_eps: added to the gates of a learned merge; ``model``: the eps of the model's norms,
            which is in the norm of the merge too.
        manifold: what their H_res is kept on.
        source: whose code this is.
    """

    sinkhorn: str = 'exact'
    eps: float = 0.0
    pre_eps: float = 0.0
    post_eps: float = 0.0
    norm_outside: bool = False
    norm_eps: float = NORM_EPS
    norm_eps_fixed: bool = False
    narrow: bool = False
    rounded: tuple[str, ...] = ()
    mix_rounds: bool = False
    merge: str | None = None
    merge_eps: float | str = 0.0
    manifold: str = 'sinkhorn'
    source: str = ''


NUMERICS = {
    PAPER: Numerics(source='arXiv 2512.24880, Eq 9 and 14-19'),
    'deepseek-v4': Numerics(
        sinkhorn='added',
        eps=1e-6,
        pre_eps=1e-6,
        merge='learned',
        merge_eps=1e-6,
        source="DeepSeek-V4's released inference code",
    ),
    'megatron-dev': Numerics(
        sinkhorn='added',
        eps=1e-6,
        pre_eps=1e-6,
        norm_outside=True,
        norm_eps_fixed=True,
        rounded=('pre', 'post', 'res'),
        merge='learned',
        merge_eps='model',
        source='Megatron-LM dev d48bd6be, its fused mix',
    ),
    'megatron-main': Numerics(
        sinkhorn='clamped',
        eps=1e-6,
        norm_outside=True,
        norm_eps_fixed=True,
        narrow=True,
        mix_rounds=True,
        merge='mean',
        source='Megatron-LM main d98e8a64',
    ),
    'glm-5.3': Numerics(
        sinkhorn='added',
        eps=1e-6,
        pre_eps=1e-6,
        norm_eps=1e-5,
        rounded=('post', 'res'),
        mix_rounds=True,
        merge='mean',
        source='glm5_next of transformers 5.24',
    ),
    'hy4': Numerics(
        pre_eps=1e-6,
        post_eps=1e-6,
        norm_eps=1e-5,
        merge='learned',
        merge_eps=1e-6,
        manifold='identity',
        source='hy_v4 of transformers 5.24',
    ),
}


def takes_triton(numerics: str, op: str) -> bool:
    """Whether the kernels compute ``op`` under these conventions."""
    if op == 'post_res':
        return not NUMERICS[numerics].mix_rounds
    return op == 'pre' or numerics == PAPER
