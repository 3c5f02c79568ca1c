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
    check_bool,
    check_integer,
    check_number,
    shown,
)
from megatron_mhc.kernels.defaults import NORM_EPS
from megatron_mhc.manifolds.registry import manifold_names, num_logits
from megatron_mhc.manifolds.sizes import INIT_PRESETS

RESIDUAL_TYPES = ('standard', 'hc', 'mhc', 'mudd')
# Those with n streams.
STREAM_TYPES = ('hc', 'mhc')
STREAM_MERGES = ('mean', 'sum', 'learned')
MAPPINGS = ('pre', 'post', 'res')
HC_VARIANTS = MUDD_VARIANTS = ('dynamic', 'static')
MAPPING_OPTIMIZERS = ('matrix', 'scalar')
# The names of megatron_mhc.ops, which needs torch; settings do not.
KERNEL_BACKENDS = ('auto', 'triton', 'torch')
RECOMPUTE_BLOCKS = ('none', 'stage', 'auto')
RECOMPUTE_STREAMS = ('compute', 'high')
PAPER_NORM_EPS = 1e-20
"""mHC, Table 5; what was trained before ``norm_eps`` could be set has it."""
# Smaller ones are no normal numbers in fp32, in which the norm is computed.
LEAST_NORM_EPS = 1.2e-38
PROJECTION_PRECISIONS = ('auto', 'bf16x2', 'tf32', 'tf32x3', 'ieee')

# What has no effect without Sinkhorn-Knopp, which the fused ops contain.
_SINKHORN = ('sinkhorn_iterations', 'projection_precision', 'seam_fusion')
# Settings that the other residual type has to itself.
_HC = ('hc_variant', 'hc_tanh')
_MHC = ('manifold', 'init', 'single_pass', *_SINKHORN)
_STREAMS = (
    *('num_residual_streams', 'init_gating_factor', 'stream_merge', 'fixed_mappings'),
    *('mapping_weight_decay', 'mapping_lr_mult', 'mapping_optimizer', 'kernel_backend'),
    'norm_eps',
    *('recompute_layer_num', 'recompute_stream'),
)
_FOREIGN = {
    'hc': (*_MHC, 'mudd_variant'),
    'mhc': (*_HC, 'mudd_variant'),
    'mudd': (*_HC, *_MHC, *_STREAMS),
}


@dataclass(frozen=True)
class ResidualConfig:
    """Residual connections of every decoder layer. Plain values only, so that it can be saved.

    Args:
        residual_type: ``standard`` (x + F(x)), ``hc`` (hyper-connections, arXiv 2409.19606),
            ``mhc`` (manifold-constrained hyper-connections, arXiv 2512.24880) or ``mudd`` (multiway
            dynamic dense connections, arXiv 2502.12170), which has one stream.
        num_residual_streams: n >= 1, the expansion rate (both papers: 4).
        manifold: what H_res is kept on: ``sinkhorn`` (doubly stochastic, the paper's projection),
            another one of ``megatron_mhc.manifolds``, or the name of an entry point. mhc only.
        sinkhorn_iterations: passes of mHC Eq 9 (paper: 20). mhc with ``sinkhorn`` only.
        norm_eps: added to the mean square whose root divides the streams of a token, in the mapping
            of mhc and in the learned merge (DeepSeek-V4: 1e-6; the paper: 1e-20). The maps of hc
            take the norm and the eps of the model.
        init_gating_factor: initial alpha (both papers: 0.01).
        init: ``uniform`` (zero biases: H_pre = 1/2, H_post = 1, H_res = 1/n) or ``identity`` (H_res
            near I, each sublayer reading and writing mostly one home stream). mhc only.
        stream_merge: how n streams become one before the final norm. None: ``sum`` for hc (its
            paper), ``mean`` for mhc (its paper does not say); with ``single_pass`` always ``pre``.
        single_pass: read with the H_pre of the sublayer before, and merge with that of the last
            (DeepSeek-V4.1). mhc only.
        fixed_mappings: maps held at their ablation values H_pre = 1/n, H_post = 1, H_res = I
            (mHC, Table 1).
        hc_variant: ``dynamic`` (maps depend on the token) or ``static``. hc only.
        hc_tanh: tanh on the dynamic part of hc.
        mudd_variant: ``dynamic`` (weights depend on the token) or ``static``. mudd only.
        mapping_weight_decay: apply weight decay to the projection phi. Biases and gating factors
            are never decayed.
        mapping_lr_mult: factor >= 0 on the learning rate of phi, its minimum included.
        mapping_optimizer: under Muon and its like, whether phi is a ``matrix`` (Muon) or goes with
            the ``scalar`` parameters (Adam). Biases and gating factors always do.
        kernel_backend: ``auto`` (Triton kernels where they run), ``triton`` (an error where they do
            not) or ``torch``.
        projection_precision: how the kernels multiply phi; ``auto`` follows the streams. mhc only.
        seam_fusion: where the kernels run, F_post,res and the next mapping in one pass. mhc only.
        recompute_layer_num: drop what the mHC kernels produce and rebuild it in the backward, in
            blocks of that many sublayers, attention and MLP each counted (mHC, section 4.3.2).
            ``auto``: the size of least memory for each stage (Eq 20). ``stage``: one block a stage
            or virtual chunk. ``none``: keep everything.
        recompute_stream: where it is rebuilt ahead of the backward, under a schedule that does so:
            ``compute``, or ``high``, a stream of high priority. None: ``compute``.
        seed: seeds the mapping's own generator; the other weights keep their random stream.

    Raises:
        ValueError: a value is out of range; the message names the flag that sets it.
    """

    residual_type: str = 'mhc'
    num_residual_streams: int = 4
    manifold: str = 'sinkhorn'
    sinkhorn_iterations: int = 20
    norm_eps: float = NORM_EPS
    init_gating_factor: float = 0.01
    init: str = 'uniform'
    stream_merge: str | None = None
    single_pass: bool = False
    fixed_mappings: tuple[str, ...] = ()
    hc_variant: str = 'dynamic'
    hc_tanh: bool = True
    mudd_variant: str = 'dynamic'
    mapping_weight_decay: bool = True
    mapping_lr_mult: float = 1.0
    mapping_optimizer: str = 'matrix'
    kernel_backend: str = 'auto'
    projection_precision: str = 'auto'
    seam_fusion: bool = True
    recompute_layer_num: int | str = 'none'
    recompute_stream: str | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        _one_of('--residual-type', self.residual_type, RESIDUAL_TYPES)
        for flag, value, most, paper in (
            ('--mhc-num-residual-streams', self.num_residual_streams, MOST_STREAMS, 4),
            ('--mhc-sinkhorn-iterations', self.sinkhorn_iterations, MOST_ITERATIONS, 20),
        ):
            check_integer(flag, value, 1, most, f'the paper uses {paper}')
        for flag, value, why in (
            (
                '--mhc-init-gating-factor',
                self.init_gating_factor,
                'it scales the token-dependent part of each map, and the papers use 0.01',
            ),
            (
                '--mhc-mapping-lr-mult',
                self.mapping_lr_mult,
                'it multiplies the learning rate of phi; leave it out for that of all',
            ),
        ):
            check_number(flag, value, 0, MOST_FACTOR, why)
        for name in ('single_pass', 'hc_tanh', 'mapping_weight_decay', 'seam_fusion'):
            check_bool(name, getattr(self, name))
        check_integer('--seed', self.seed, 0, MOST_SEED, 'it seeds the mappings, use 1234')
        check_number(
            *('--mhc-norm-eps', self.norm_eps, LEAST_NORM_EPS, 1.0),
            f'it is added to a mean square in fp32; leave it out for {NORM_EPS:g}',
        )
        _one_of('--mhc-init', self.init, INIT_PRESETS)
        self._refuse_given(_FOREIGN.get(self.residual_type, ()), 'residual_type')
        self._check_merge()
        if not self.takes_norm_eps and self.norm_eps != NORM_EPS and self.enabled:
            raise ValueError(
                f'--mhc-norm-eps {self.norm_eps:g} has no effect with --residual-type hc but in '
                '--mhc-stream-merge learned: its maps take the eps of the model (--norm-epsilon); '
                'drop it'
            )
        if not isinstance(self.fixed_mappings, tuple | list):
            raise ValueError(
                f'--mhc-fixed-mappings {shown(self.fixed_mappings)}: wanted several of '
                f'{", ".join(MAPPINGS)}; give them in a tuple'
            )
        for mapping in self.fixed_mappings:
            _one_of('--mhc-fixed-mappings', mapping, MAPPINGS)
        self._check_manifold()
        object.__setattr__(self, 'fixed_mappings', tuple(sorted(set(self.fixed_mappings))))
        _one_of('--mhc-mapping-optimizer', self.mapping_optimizer, MAPPING_OPTIMIZERS)
        _one_of('--hc-variant', self.hc_variant, HC_VARIANTS)
        _one_of('--mudd-variant', self.mudd_variant, MUDD_VARIANTS)
        _one_of('--mhc-kernel-backend', self.kernel_backend, KERNEL_BACKENDS)
        _one_of('--mhc-projection-precision', self.projection_precision, PROJECTION_PRECISIONS)
        self._check_recompute()

    def _refuse_given(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f'{name}={getattr(self, name)!r} has no effect with {why}='
                    f'{getattr(self, why)!r}: leave it at its default'
                )

    def _check_merge(self) -> None:
        if self.single_pass and self.stream_merge not in (None, 'pre'):
            raise ValueError(
                f'--mhc-stream-merge {self.stream_merge} has no effect with --mhc-single-pass, '
                "under which the last sublayer's H_pre merges the streams; drop one of the two"
            )
        if self.single_pass:
            object.__setattr__(self, 'stream_merge', 'pre')
        elif self.residual_type != 'mudd':
            merge = self.stream_merge
            if merge is None:
                merge = 'sum' if self.residual_type == 'hc' else 'mean'
            _one_of('--mhc-stream-merge', merge, STREAM_MERGES)
            object.__setattr__(self, 'stream_merge', merge)

    def _check_manifold(self) -> None:
        _one_of('--mhc-manifold', self.manifold, manifold_names())
        if self.manifold == 'sinkhorn':
            return
        if 'res' in self.fixed_mappings:
            raise ValueError(
                f'--mhc-manifold {self.manifold} has no effect with --mhc-fixed-mappings res, '
                'which holds H_res at I; drop one of the two'
            )
        self._refuse_given(_SINKHORN, 'manifold')
        try:
            num_logits(self.manifold, self.num_residual_streams)
        except ValueError as error:
            raise ValueError(f'--mhc-manifold {self.manifold}: {error}') from error

    def _check_recompute(self) -> None:
        blocks, stream = self.recompute_layer_num, self.recompute_stream
        number = isinstance(blocks, int) and not isinstance(blocks, bool)
        if blocks not in RECOMPUTE_BLOCKS and not (number and 1 <= blocks <= 2 * MOST_LAYERS):
            raise ValueError(
                f'--mhc-recompute-layer-num {shown(blocks)}: wanted {", ".join(RECOMPUTE_BLOCKS)} '
                f'or a number of sublayers from 1 to {2 * MOST_LAYERS} (attention and MLP each '
                'count one); use auto'
            )
        if blocks != 'none':
            object.__setattr__(self, 'recompute_stream', stream or 'compute')
        elif stream is not None:
            raise ValueError(
                f'--mhc-recompute-stream {stream} has no effect without --mhc-recompute-layer-num: '
                'nothing is rebuilt; drop it or add --mhc-recompute-layer-num auto'
            )
        if self.single_pass and blocks != 'none':
            raise ValueError(
                f'--mhc-recompute-layer-num {blocks} with --mhc-single-pass: a block rebuilds its '
                'reads from the streams alone; drop one of the two'
            )
        _one_of('--mhc-recompute-stream', self.recompute_stream, (None, *RECOMPUTE_STREAMS))

    @property
    def enabled(self) -> bool:
        """Whether anything differs from stock Megatron."""
        return self.residual_type != 'standard'

    @property
    def takes_norm_eps(self) -> bool:
        """Whether ``norm_eps`` is part of the function that the model computes."""
        return self.residual_type == 'mhc' or self.stream_merge == 'learned'

    @property
    def streams(self) -> int:
        """n, or 1 where there is one residual stream."""
        return self.num_residual_streams if self.residual_type in STREAM_TYPES else 1

    def describe(self) -> str:
        """One line for logs and error messages."""
        if not self.enabled:
            return 'standard'
        if self.residual_type not in STREAM_TYPES:
            return f'residual_type={self.residual_type} mudd_variant={self.mudd_variant}'
        return ' '.join(f'{key}={value}' for key, value in dataclasses.asdict(self).items())


def _one_of(flag: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        choices = ', '.join(filter(None, allowed))
        raise ValueError(f'{flag} {shown(value)}: unknown value; choose one of {choices}')
