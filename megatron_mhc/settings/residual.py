"""The settings of a residual topology, checked value by value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_mhc.inputs.values import (
    MOST_FACTOR,
    MOST_ITERATIONS,
    MOST_LAYERS,
    MOST_SEED,
    MOST_STREAMS,
    MOST_WIDTH,
    check_integer,
)
from megatron_mhc.kernels.defaults import BACKENDS, PRECISIONS
from megatron_mhc.kernels.defaults import NORM_EPS as NORM_EPS
from megatron_mhc.kernels.numerics import NUMERICS as NUMERICS
from megatron_mhc.kernels.numerics import PAPER as PAPER
from megatron_mhc.manifolds.registry import manifold_names
from megatron_mhc.settings.flag import ON_OFF, check, refuse_stray, setting, structure
from megatron_mhc.settings.names import (
    MAPPED_TYPES,
    RECOMPUTE_SEGMENTS,
    RESIDUAL_TYPES,
    STREAM_TYPES,
)
from megatron_mhc.settings.residual_rules import resolve

MAPPINGS = ('pre', 'post', 'res')
# The values of them: megatron_mhc/residual/start.py, which needs torch.
INITS = ('identity', 'uniform', 'equal-writes', 'prenorm', 'mean-reads')
GATED_INITS = ('normal', 'prenorm')
PAPER_NORM_EPS = 1e-20
"""mHC, Table 5; what was trained before ``norm_eps`` could be set has it."""
# Smaller ones are no normal numbers in fp32, in which the norm is computed.
LEAST_NORM_EPS = 1.2e-38

# With which residual type, and manifold, a setting has an effect.
_STREAMS, _MAPPED = {'residual_type': STREAM_TYPES}, {'residual_type': MAPPED_TYPES}
_HC, _MHC, _MUDD, _GATED, _ATTENTION = (
    {'residual_type': (name,)} for name in ('hc', 'mhc', 'mudd', 'gated', 'attention')
)
# The fused ops contain Sinkhorn-Knopp.
_SINKHORN = {**_MHC, 'manifold': ('sinkhorn',)}
# Those that read and write in one pass compute as the paper does.
_FUSED = {**_SINKHORN, 'numerics': (PAPER,)}


@dataclass(frozen=True)
class ResidualConfig:
    """Residual connections of every decoder layer. Plain values only, so that it can be saved.

    Each field but ``seed`` says what it is through its flag: meaning, range, and the residual types
    that it belongs to. ``python -m megatron_mhc.run --help`` and ``megatron-mhc docs flags`` print
    them. ``seed`` seeds the mapping's own generator; the other weights keep their random stream.

    Raises:
        ValueError: a value is out of range, or has no effect; the message names the flag or field.
    """

    residual_type: str = setting(
        'mhc',
        '--residual-type',
        choices=RESIDUAL_TYPES,
        structural=True,
        help='residual connection of every decoder layer: `standard` (x + F(x)), `hc` (arXiv '
        '2409.19606), `mhc` (arXiv 2512.24880), `gated` (as Qwen4-Exp), '
        '`attention` (arXiv 2603.15031, by blocks) or `mudd` (arXiv 2502.12170)',
        absent='standard',
        source='stock Megatron',
    )
    num_residual_streams: int = setting(
        4,
        '--mhc-num-residual-streams',
        int,
        least=1,
        most=MOST_STREAMS,
        only=_STREAMS,
        structural=True,
        metavar='N',
        help='number of residual streams n, the expansion rate',
        source='both papers',
    )
    manifold: str = setting(
        'sinkhorn',
        '--mhc-manifold',
        choices=manifold_names,
        only=_MHC,
        structural=True,
        metavar='NAME',
        help='what H_res is kept on: `sinkhorn`, `permutation`, `kronecker` or `orthostochastic` '
        '(doubly stochastic, by iteration or exactly), `orthogonal` (rotations), `diagonal` (n '
        'sigmoids), `identity`, or an entry point of the group `megatron_mhc.manifolds`',
        source='the mHC paper',
    )
    sinkhorn_iterations: int = setting(
        20,
        '--mhc-sinkhorn-iterations',
        int,
        least=1,
        most=MOST_ITERATIONS,
        only=_SINKHORN,
        structural=True,
        metavar='T',
        help='column-then-row passes of the Sinkhorn-Knopp projection of H_res',
        source='the mHC paper',
    )
    numerics: str = setting(
        PAPER,
        '--mhc-numerics',
        choices=tuple(NUMERICS),
        only=_MHC,
        structural=True,
        help='whose numerics: `paper`, or as `deepseek-v4`, `megatron-dev`, `megatron-main`, '
        '`glm-5.3` or, on the manifold `identity`, `hy4` compute, for weights that came from there '
        'or go there: order of Sinkhorn-Knopp, eps and where it stands, what is rounded, merge',
        more='all but paper take torch for the mapping; what differs is in the guide numerics',
        source='the mHC paper',
    )
    # None until it is resolved, as for the merge.
    norm_eps: float = setting(
        None,
        '--mhc-norm-eps',
        float,
        least=LEAST_NORM_EPS,
        most=1.0,
        why='it is added to a mean square in fp32',
        only=_MAPPED,
        structural=True,
        metavar='EPS',
        help="added to the mean square of a token's streams before its root divides them, in the "
        'maps of mhc and in a learned merge',
        more='the mHC paper uses 1e-20, with which a token of zeros multiplies its gradient by '
        '1e10; the maps of hc use --norm-epsilon',
        said='`1e-6`, for glm-5.3 `1e-5`',
        source='DeepSeek-V4 and Megatron-LM',
    )
    init_gating_factor: float = setting(
        0.01,
        '--mhc-init-gating-factor',
        float,
        most=MOST_FACTOR,
        only=_MAPPED,
        metavar='ALPHA',
        help='initial alpha, the factor on the token-dependent part of each map',
        source='both papers',
    )
    init: str = setting(
        'identity',
        '--mhc-init',
        choices=INITS,
        only=_MHC,
        help='initial biases of the maps: `identity` (H_res near I, one home stream per sublayer), '
        '`uniform` (all zero, as in Megatron-LM: H_pre 1/2, H_post 1, H_res 1/n), `equal-writes` '
        '(`identity` with H_post 1), `prenorm` (`equal-writes` as exactly a pre-norm network at '
        'step 0: phi 0) or `mean-reads` (H_pre and a learned merge 1/n, H_post 1, as Hy4)',
        more='with identity, H_res learns from the start; the mHC paper does not say; megatron-mhc '
        'docs initial-values has the comparison',
    )
    stream_merge: str | None = setting(
        None,
        '--mhc-stream-merge',
        choices=('mean', 'sum', 'learned'),
        only=_MAPPED,
        structural=True,
        said='`sum` for hc, `mean` for mhc',
        help='how n streams become one before the final norm: `mean`, `sum` (which also divides '
        'the initial std of output projections by sqrt(n)) or `learned` (the head of DeepSeek-V4)',
        more='HC uses the sum, the mHC paper does not say',
    )
    single_pass: bool = setting(
        False,
        '--mhc-single-pass',
        bool,
        only=_MHC,
        structural=True,
        help='a sublayer reads with the H_pre of the one before it, the first one reads stream 0, '
        'and the last H_pre merges the streams (DeepSeek-V4.1)',
    )
    fixed_mappings: tuple[str, ...] = setting(
        (),
        '--mhc-fixed-mappings',
        many=True,
        choices=MAPPINGS,
        only=_MAPPED,
        structural=True,
        metavar='MAP',
        help='maps held at their ablation values: `pre` at 1/n, `post` at 1, `res` at I (mHC, '
        'Table 1)',
    )
    hc_variant: str = setting(
        'dynamic',
        '--hc-variant',
        choices=('dynamic', 'static'),
        only=_HC,
        structural=True,
        help='whether maps depend on the token (`dynamic`) or not (`static`)',
    )
    hc_tanh: bool = setting(
        True,
        '--hc-no-tanh',
        bool,
        only=_HC,
        structural=True,
        said='kept',
        help='leave out the tanh of the dynamic part',
    )
    mudd_variant: str = setting(
        'dynamic',
        '--mudd-variant',
        choices=('dynamic', 'static'),
        only=_MUDD,
        structural=True,
        help='whether weights of the dense connections depend on the token (`dynamic`) or not '
        '(`static`)',
    )
    gated_rank: int = setting(
        320,
        '--gated-residual-rank',
        int,
        least=1,
        most=MOST_WIDTH,
        only=_GATED,
        structural=True,
        metavar='R',
        help='rank of the gates, which weigh every channel of every stream by itself',
        source='Qwen4-Exp',
    )
    gated_init: str = setting(
        'normal',
        '--gated-residual-init',
        choices=GATED_INITS,
        only=_GATED,
        help='where the gates start: `normal` (all projections as linear layers, gains 1) or '
        '`prenorm` (as exactly a pre-norm network at step 0)',
        source='Qwen4-Exp in transformers',
    )
    attention_block_size: int = setting(
        24,
        '--attention-residual-block-size',
        int,
        least=1,
        most=2 * MOST_LAYERS,
        why='it counts sublayers, attention and MLP separately',
        only=_ATTENTION,
        structural=True,
        metavar='N',
        help='sublayers, attention and MLP each one, whose outputs add up to one source of the '
        'softmax',
        more='Inkling2 has 12',
        source='Kimi K3',
    )
    mapping_weight_decay: bool = setting(
        True,
        '--mhc-mapping-weight-decay',
        bool,
        choices=ON_OFF,
        only=_STREAMS,
        help='weight decay of the projection phi; biases and gating factors never decay',
        more='HC decays its dynamic part, DeepSeek-V4 its phi',
    )
    mapping_lr_mult: float = setting(
        1.0,
        '--mhc-mapping-lr-mult',
        float,
        most=MOST_FACTOR,
        why='it multiplies the learning rate of phi',
        only=_STREAMS,
        metavar='F',
        help='factor on the learning rate of phi, including its minimum',
        more='applied on top of muP; biases and gating factors keep the learning rate of the model',
    )
    mapping_optimizer: str = setting(
        'matrix',
        '--mhc-mapping-optimizer',
        choices=('matrix', 'scalar'),
        only=_STREAMS,
        help='under Muon and the like, treat phi as a `matrix` (Muon, as in DeepSeek-V4) or as a '
        '`scalar` parameter (Adam)',
        more='biases and gating factors are always scalar, see --muon-scalar-optimizer',
    )
    kernel_backend: str = setting(
        'auto',
        '--mhc-kernel-backend',
        # The names of megatron_mhc.ops, which needs torch; settings do not.
        choices=BACKENDS,
        only=_STREAMS,
        help='`auto`: Triton kernels where they run, otherwise torch; `triton`: an error where '
        'they do not run; `torch`: the reference',
        more='the kernels run on NVIDIA GPUs from sm_80 on, with 1, 2, 4 or 8 streams; with auto, '
        'one line says which were chosen and why',
    )
    projection_precision: str = setting(
        'auto',
        '--mhc-projection-precision',
        choices=PRECISIONS,
        only=_FUSED,
        help='how the kernels multiply phi: `bf16x2` (phi as high and low part in bf16, for bf16 '
        'streams), or both factors in fp32 as `tf32`, `tf32x3` or `ieee`',
        more='auto is bf16x2 for bf16 streams, tf32x3 for others',
    )
    edge_fusion: bool = setting(
        True,
        '--mhc-no-edge-fusion',
        bool,
        formerly='--mhc-no-seam-fusion',
        only=_FUSED,
        said='one pass',
        help='have the kernels write the streams of one sublayer and read them for the next in two '
        'passes, with the same result',
    )
    recompute_layer_num: int | str = setting(
        'none',
        '--mhc-recompute-layer-num',
        int,
        choices=RECOMPUTE_SEGMENTS,
        least=1,
        most=2 * MOST_LAYERS,
        why='it counts sublayers, attention and MLP separately',
        only=_STREAMS,
        metavar='{none,stage,auto,N}',
        help='drop what the mHC kernels produce and rebuild it in the backward, in segments of N '
        'sublayers: `auto` is the N of least memory for each stage, `stage` one segment per stage '
        'or virtual chunk (mHC, section 4.3.2)',
        more="attention and MLP each count as one sublayer, as in the paper's L, and never run "
        'again',
    )
    recompute_stream: str | None = setting(
        None,
        '--mhc-recompute-stream',
        choices=('compute', 'high'),
        only=_STREAMS,
        said='`compute`',
        help='stream on which a schedule run from a plan rebuilds the segment that the backward '
        'begins with: `compute`, or `high`, one of high priority',
    )
    cuda_graphs: bool = setting(
        False,
        '--mhc-cuda-graphs',
        bool,
        only=_MAPPED,
        help='let Megatron capture layers or iterations of n streams (`--cuda-graph-impl`), which '
        'no GPU has run yet',
    )
    seed: int = 1234

    def __post_init__(self) -> None:
        # What settings of a single pass have once they are resolved; it cannot be asked for.
        if self.single_pass is True and self.stream_merge == 'pre':
            object.__setattr__(self, 'stream_merge', None)
        check(self)
        check_integer('--seed', self.seed, 0, MOST_SEED, 'it seeds the mappings, use 1234')
        if self.enabled:
            refuse_stray(self)
        resolve(self)

    @property
    def enabled(self) -> bool:
        """Whether anything differs from stock Megatron."""
        return self.residual_type != 'standard'

    @property
    def takes_norm_eps(self) -> bool:
        """Whether ``norm_eps`` is part of the function that the model computes."""
        return self.residual_type == 'mhc' or self.stream_merge == 'learned'

    @property
    def has_streams(self) -> bool:
        """Whether the residual stream is n streams, with maps between them."""
        return self.residual_type in STREAM_TYPES

    @property
    def takes_merge(self) -> bool:
        """Whether a flag says how streams are merged; ``standard`` keeps the defaults of mhc."""
        return self.residual_type in ('standard', *MAPPED_TYPES)

    @property
    def norms_streams(self) -> bool:
        """Whether reads are normed already, so that sublayers have no norm in front of them."""
        return self.residual_type == 'gated'

    @property
    def wraps_sublayers(self) -> bool:
        """Whether every sublayer has a connection of its own in place of the stock residual."""
        return self.has_streams or self.residual_type == 'attention'

    def block_sums(self, sublayers: int) -> int:
        """Sums of Attention Residuals after so many sublayers, the embedding's included."""
        return 1 + -(-sublayers // self.attention_block_size)

    @property
    def streams(self) -> int:
        """n, or 1 where there is one residual stream."""
        return self.num_residual_streams if self.has_streams else 1

    def edge_values(self, value_bytes: int) -> int:
        """Values a token, of ``value_bytes`` each, between pipeline stages beside the streams.

        Single pass sends H_pre along, n values of fp32: as themselves, or each as three of 16 bits.
        """
        return self.streams * (3 if value_bytes == 2 else 1) if self.single_pass else 0

    def describe(self) -> str:
        """One line for logs and error messages."""
        if not self.enabled:
            return 'standard'
        if not self.has_streams:
            return ' '.join(f'{key}={value}' for key, value in structure(self))
        return ' '.join(f'{key}={value}' for key, value in dataclasses.asdict(self).items())
