"""How settings of a residual topology follow from each other, and which exclude each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_mhc.kernels.defaults import NORM_EPS
from megatron_mhc.kernels.numerics import NUMERICS, PAPER, takes_triton
from megatron_mhc.manifolds.registry import num_logits

if TYPE_CHECKING:
    from megatron_mhc.settings.residual import ResidualConfig


def resolve(config: ResidualConfig) -> None:
    """Fill in what is left to the other settings, in place.

    Raises:
        ValueError: two settings contradict each other.
    """
    _resolve_merge(config)
    _resolve_norm_eps(config)
    _check_manifold(config)
    _check_backend(config)
    _resolve_recompute(config)
    _check_graphs(config)


def _resolve_merge(config: ResidualConfig) -> None:
    if config.single_pass and config.stream_merge is not None:
        raise ValueError(
            f'--mhc-stream-merge {config.stream_merge} has no effect with --mhc-single-pass, '
            "where the last sublayer's H_pre merges the streams; drop one of the two"
        )
    theirs = NUMERICS[config.numerics].merge
    if config.single_pass:
        # That of DeepSeek-V4.1, which computes as V4 does.
        if config.numerics not in (PAPER, 'deepseek-v4'):
            raise ValueError(
                f'--mhc-numerics {config.numerics} with --mhc-single-pass: that project has no '
                'single pass, so nothing tells how it would compute one; use --mhc-numerics '
                'deepseek-v4 or paper'
            )
        object.__setattr__(config, 'stream_merge', 'pre')
    elif config.stream_merge is None and config.takes_merge:
        merge = theirs or ('sum' if config.residual_type == 'hc' else 'mean')
        object.__setattr__(config, 'stream_merge', merge)
    elif theirs not in (None, config.stream_merge):
        raise ValueError(
            f'--mhc-stream-merge {config.stream_merge} contradicts --mhc-numerics '
            f'{config.numerics}, whose merge is {theirs}; leave it out or use --mhc-numerics '
            'paper'
        )


def _resolve_norm_eps(config: ResidualConfig) -> None:
    rules = NUMERICS[config.numerics]
    if config.norm_eps is None:
        if config.takes_merge:
            object.__setattr__(config, 'norm_eps', rules.norm_eps)
    elif rules.norm_eps_fixed and config.norm_eps != rules.norm_eps:
        raise ValueError(
            f'--mhc-norm-eps {config.norm_eps:g} contradicts --mhc-numerics {config.numerics}, '
            f'where it is {rules.norm_eps:g}; leave it out or use --mhc-numerics paper'
        )
    elif config.enabled and not config.takes_norm_eps and config.norm_eps != NORM_EPS:
        raise ValueError(
            f'--mhc-norm-eps {config.norm_eps:g} has no effect with --residual-type hc except '
            'with --mhc-stream-merge learned: the maps of hc use the eps of the model '
            '(--norm-epsilon); drop it'
        )


def _check_backend(config: ResidualConfig) -> None:
    # On another manifold the mapping is torch's under every name.
    fused = config.manifold == 'sinkhorn'
    triton = config.kernel_backend == 'triton'
    if triton and fused and not takes_triton(config.numerics, 'mapping'):
        raise ValueError(
            f'--mhc-kernel-backend triton: the kernels compute as --mhc-numerics {PAPER} does, '
            f'not as {config.numerics} does; use auto, which then takes torch for the mapping'
        )


def _check_manifold(config: ResidualConfig) -> None:
    theirs = NUMERICS[config.numerics].manifold
    if config.numerics != PAPER and config.manifold != theirs:
        raise ValueError(
            f'--mhc-numerics {config.numerics} with --mhc-manifold {config.manifold}: that project '
            f'keeps H_res on {theirs}; use --mhc-manifold {theirs}, or --mhc-numerics {PAPER}'
        )
    if config.manifold == 'sinkhorn':
        return
    if 'res' in config.fixed_mappings:
        raise ValueError(
            f'--mhc-manifold {config.manifold} has no effect with --mhc-fixed-mappings res, '
            'which holds H_res at I; drop one of the two'
        )
    try:
        num_logits(config.manifold, config.num_residual_streams)
    except ValueError as error:
        raise ValueError(f'--mhc-manifold {config.manifold}: {error}') from error


def _resolve_recompute(config: ResidualConfig) -> None:
    segments, stream = config.recompute_layer_num, config.recompute_stream
    if segments == 'none' and stream is not None:
        raise ValueError(
            f'--mhc-recompute-stream {stream} has no effect without --mhc-recompute-layer-num: '
            'nothing is rebuilt; drop it or add --mhc-recompute-layer-num auto'
        )
    if segments != 'none' and config.single_pass:
        raise ValueError(
            f'--mhc-recompute-layer-num {segments} with --mhc-single-pass: a segment rebuilds '
            'its reads from the streams alone; drop one of the two'
        )
    if segments != 'none':
        object.__setattr__(config, 'recompute_stream', stream or 'compute')


def _check_graphs(config: ResidualConfig) -> None:
    if not config.cuda_graphs:
        return
    if config.single_pass:
        raise ValueError(
            '--mhc-single-pass with --mhc-cuda-graphs: H_pre travels from layer to layer beside '
            'the tensor that a graph has as its input; drop one of the two'
        )
    if config.recompute_layer_num != 'none':
        raise ValueError(
            f'--mhc-recompute-layer-num {config.recompute_layer_num} with --mhc-cuda-graphs: it '
            'frees memory that a graph takes to stay where it was; drop one of the two'
        )
