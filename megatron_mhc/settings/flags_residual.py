"""Command-line flags of the residual topology: their argparse group, and from values to settings.

Every flag defaults to None, so that a flag given in vain (``--mhc-...`` under ``standard``) is told
apart from one left out; ``resolve_arguments`` then fills in the papers' values.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Container

from megatron_mhc.inputs.values import flag_of, integer, number
from megatron_mhc.settings.residual import (
    HC_VARIANTS,
    INIT_PRESETS,
    KERNEL_BACKENDS,
    MAPPING_OPTIMIZERS,
    MAPPINGS,
    MUDD_VARIANTS,
    PAPER_NORM_EPS,
    PROJECTION_PRECISIONS,
    RECOMPUTE_BLOCKS,
    RECOMPUTE_STREAMS,
    RESIDUAL_TYPES,
    STREAM_MERGES,
    ResidualConfig,
)

# argument -> (ResidualConfig field, residual types it applies to)
FIELDS = {
    'mhc_num_residual_streams': ('num_residual_streams', ('hc', 'mhc')),
    'mhc_manifold': ('manifold', ('mhc',)),
    'mhc_sinkhorn_iterations': ('sinkhorn_iterations', ('mhc',)),
    'mhc_norm_eps': ('norm_eps', ('hc', 'mhc')),
    'mhc_init_gating_factor': ('init_gating_factor', ('hc', 'mhc')),
    'mhc_init': ('init', ('mhc',)),
    'mhc_stream_merge': ('stream_merge', ('hc', 'mhc')),
    'mhc_single_pass': ('single_pass', ('mhc',)),
    'mhc_fixed_mappings': ('fixed_mappings', ('hc', 'mhc')),
    'mhc_mapping_weight_decay': ('mapping_weight_decay', ('hc', 'mhc')),
    'mhc_mapping_lr_mult': ('mapping_lr_mult', ('hc', 'mhc')),
    'mhc_mapping_optimizer': ('mapping_optimizer', ('hc', 'mhc')),
    'hc_variant': ('hc_variant', ('hc',)),
    'hc_tanh': ('hc_tanh', ('hc',)),
    'mudd_variant': ('mudd_variant', ('mudd',)),
    'mhc_kernel_backend': ('kernel_backend', ('hc', 'mhc')),
    'mhc_projection_precision': ('projection_precision', ('mhc',)),
    'mhc_seam_fusion': ('seam_fusion', ('mhc',)),
    'mhc_recompute_layer_num': ('recompute_layer_num', ('hc', 'mhc')),
    'mhc_recompute_stream': ('recompute_stream', ('hc', 'mhc')),
}
# Arguments whose flag switches them off.
NEGATED = {'hc_tanh': '--hc-no-tanh', 'mhc_seam_fusion': '--mhc-no-seam-fusion'}


def add_residual_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``residual connections`` group to ``parser`` and return it."""
    group = parser.add_argument_group(
        'residual connections',
        'Hyper-connections (HC, arXiv 2409.19606) and manifold-constrained hyper-connections '
        '(mHC, arXiv 2512.24880): n parallel residual streams of the hidden size. Multiway dynamic '
        'dense connections (MUDD, arXiv 2502.12170): sums of all outputs of earlier layers.',
    )
    group.add_argument(
        '--residual-type',
        choices=RESIDUAL_TYPES,
        default='standard',
        help='residual connection of every decoder layer (default: standard, stock Megatron)',
    )
    group.add_argument(
        '--mhc-num-residual-streams',
        type=integer(),
        metavar='N',
        help='number of residual streams n >= 1, the expansion rate (default: 4, both papers)',
    )
    group.add_argument(
        '--mhc-manifold',
        metavar='NAME',
        help='what H_res is kept on: sinkhorn, permutation or kronecker = doubly stochastic, by '
        'iteration or exactly; orthogonal = rotations; identity = I; or an entry point of the '
        'group megatron_mhc.manifolds (default: sinkhorn, mHC; mhc only)',
    )
    group.add_argument(
        '--mhc-sinkhorn-iterations',
        type=integer(),
        metavar='T',
        help='column-then-row passes of the Sinkhorn-Knopp projection of H_res (default: 20, '
        'mHC; mhc only)',
    )
    group.add_argument(
        '--mhc-norm-eps',
        type=number(),
        metavar='EPS',
        help='added to the mean square by which the streams of a token are divided for their maps '
        'and a learned merge; the paper has 1e-20, under which a token of zeros multiplies its '
        'gradient by 1e10 (default: 1e-6, as in DeepSeek-V4 and Megatron-LM)',
    )
    group.add_argument(
        '--mhc-init-gating-factor',
        type=number(),
        metavar='ALPHA',
        help='initial factor of the token-dependent part of each map (default: 0.01, both papers)',
    )
    group.add_argument(
        '--mhc-init',
        choices=INIT_PRESETS,
        help='initial mapping biases: uniform = zero (H_pre 1/2, H_post 1, H_res 1/n), identity = '
        'H_res near I with one home stream per sublayer, under which H_res learns from the start '
        '(default: uniform; mhc only; the paper does not say)',
    )
    group.add_argument(
        '--mhc-stream-merge',
        choices=STREAM_MERGES,
        help='how n streams become one before the final norm; sum also divides the initial std of '
        'output projections by sqrt(n) (default: sum for hc, its paper; mean for mhc)',
    )
    group.add_argument(
        '--mhc-single-pass',
        action='store_const',
        const=True,
        help='a sublayer reads with the H_pre of the one before it, the first one stream 0, and '
        'the last H_pre merges the streams, as in DeepSeek-V4.1 (default: each with its own; mhc '
        'on one pipeline stage)',
    )
    group.add_argument(
        '--mhc-fixed-mappings',
        nargs='+',
        choices=MAPPINGS,
        metavar='MAP',
        help='maps held at their ablation value: pre = 1/n, post = 1, res = identity (default: '
        'none; mHC Table 1)',
    )
    group.add_argument(
        '--mhc-mapping-weight-decay',
        choices=('on', 'off'),
        help='weight decay on the projection phi; biases and gating factors never decay (default: '
        'on: HC decays its dynamic part, DeepSeek-V4 its phi)',
    )
    group.add_argument(
        '--mhc-mapping-lr-mult',
        type=number(),
        metavar='F',
        help='factor on the learning rate of phi, minimum included, on top of muP; biases and '
        'gating factors keep the rate of the model (default: 1)',
    )
    group.add_argument(
        '--mhc-mapping-optimizer',
        choices=MAPPING_OPTIMIZERS,
        help='phi under --optimizer muon and its like: matrix = Muon, as in DeepSeek-V4, scalar = '
        'Adam (--muon-scalar-optimizer) like biases and gating factors (default: matrix)',
    )
    group.add_argument(
        '--hc-variant',
        choices=HC_VARIANTS,
        help='maps that depend on the token, or static ones (default: dynamic; hc only)',
    )
    group.add_argument(
        '--hc-no-tanh',
        action='store_const',
        const=False,
        dest='hc_tanh',
        help='leave out the tanh of the dynamic part (default: tanh; hc only)',
    )
    group.add_argument(
        '--mudd-variant',
        choices=MUDD_VARIANTS,
        help='weights of the sums that depend on the token, or static ones (default: dynamic; '
        'mudd only)',
    )
    group.add_argument(
        '--mhc-kernel-backend',
        choices=KERNEL_BACKENDS,
        help='auto: fused Triton kernels where they run (NVIDIA GPU from sm_80, 1, 2, 4 or 8 '
        'streams), else torch, and one line that says which and why; triton: an error where they '
        'do not run; torch: the reference (default: auto)',
    )
    group.add_argument(
        '--mhc-projection-precision',
        choices=PROJECTION_PRECISIONS,
        help='how the kernels multiply phi: bf16x2 = high and low part in bf16, for bf16 streams; '
        'the others are both factors in fp32 (default: auto: bf16x2, tf32x3 for other streams)',
    )
    group.add_argument(
        '--mhc-no-seam-fusion',
        action='store_const',
        const=False,
        dest='mhc_seam_fusion',
        help='kernels: write the streams of one sublayer and read them for the next in two passes, '
        'with the same result (default: in one; mhc only)',
    )
    group.add_argument(
        '--mhc-recompute-layer-num',
        type=integer(words=RECOMPUTE_BLOCKS),
        metavar='{none,stage,auto,N}',
        help='drop what the mHC kernels produce and rebuild it in the backward, without running '
        'attention or MLP again, in blocks of N sublayers (attention and MLP each count one, as L '
        'in the paper); auto = the N of least memory for the sublayers of each stage, stage = one '
        'block a stage or virtual chunk (default: none; mHC section 4.3.2)',
    )
    group.add_argument(
        '--mhc-recompute-stream',
        choices=RECOMPUTE_STREAMS,
        help='stream on which a schedule run from a plan rebuilds the block that the backward '
        'begins with (default: compute)',
    )
    return parser


def parsed_arguments() -> argparse.Namespace | None:
    """Megatron's global arguments; None before they are parsed, or where only core is in use.

    The training package is not imported for it: a caller of ``megatron.core`` has no use for it.
    """
    return getattr(sys.modules.get('megatron.training.global_vars'), '_GLOBAL_ARGS', None)


def residual_config_from_args(args: argparse.Namespace) -> ResidualConfig:
    """The settings that ``args`` describes; ``standard`` where the flags are absent.

    Raises:
        ValueError: a flag is out of range, or does not apply to the chosen residual type.
    """
    residual_type = getattr(args, 'residual_type', 'standard')
    values = {}
    for name, (field, types) in FIELDS.items():
        value = getattr(args, name, None)
        # Without streams a release may have flags of these names for itself.
        if value is None or residual_type == 'standard':
            continue
        if residual_type not in types:
            raise _in_vain(name, residual_type)
        values[field] = value
    if 'mapping_weight_decay' in values:
        values['mapping_weight_decay'] = values['mapping_weight_decay'] in ('on', True)
    if 'fixed_mappings' in values:
        values['fixed_mappings'] = tuple(values['fixed_mappings'])
    seed = getattr(args, 'seed', None)
    if seed is not None:
        values['seed'] = seed
    return ResidualConfig(residual_type=residual_type, **values)


def _in_vain(name: str, residual_type: str) -> ValueError:
    flag, types = NEGATED.get(name, flag_of(name)), FIELDS[name][1]
    return ValueError(
        f'{flag} has no effect with --residual-type {residual_type}: it belongs to '
        f'{" and ".join(types)}; drop it or set --residual-type {types[-1]}'
    )


def saved_residual_config(args: argparse.Namespace) -> ResidualConfig:
    """The settings with which a checkpoint that has these ``args`` was trained.

    One from before ``--mhc-norm-eps`` was trained with the paper's.
    """
    if getattr(args, 'mhc_norm_eps', None) is None:
        plain = residual_config_from_args(args)
        if plain.takes_norm_eps:
            return dataclasses.replace(plain, norm_eps=PAPER_NORM_EPS)
    return residual_config_from_args(args)


def resolve_arguments(args: argparse.Namespace, shared: Container[str] = ()) -> ResidualConfig:
    """Write the settings back to ``args`` with defaults filled in, as plain values.

    Megatron saves the namespace with every checkpoint and prints it, so both then tell what ran.

    Args:
        shared: arguments that belong to the Megatron release without streams of ours.
    """
    if args.residual_type == 'standard':
        for name in FIELDS:
            if name not in shared and getattr(args, name, None) is not None:
                raise _in_vain(name, 'standard')
    residual = residual_config_from_args(args)
    for name, (field, types) in FIELDS.items():
        if residual.residual_type in types:
            value = getattr(residual, field)
            setattr(args, name, list(value) if isinstance(value, tuple) else value)
    return residual


def same_structure(a: ResidualConfig, b: ResidualConfig) -> bool:
    """Whether weights trained under ``a`` compute the same function under ``b``."""
    return _structure(a) == _structure(b)


def _structure(residual: ResidualConfig) -> tuple:
    if not residual.enabled:
        return (residual.residual_type,)
    if residual.residual_type == 'mudd':
        return 'mudd', residual.mudd_variant
    fields = dataclasses.asdict(residual)
    names = ['residual_type', 'num_residual_streams', 'stream_merge', 'fixed_mappings']
    own = {
        'hc': ['hc_variant', 'hc_tanh'],
        'mhc': ['manifold', 'sinkhorn_iterations', 'single_pass'],
    }
    names += own[residual.residual_type]
    if residual.takes_norm_eps:
        names.append('norm_eps')
    return tuple(fields[name] for name in names)
