"""From the saved arguments of a checkpoint to its layout, and what the output is to say instead."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from megatron_mhc.convert.choices import STANDARD
from megatron_mhc.convert.layouts import (
    LAYOUTS,
    SINKHORN,
    StoredLayout,
    Streams,
    from_tensors,
    own_layout,
)
from megatron_mhc.convert.pattern import parsed, pattern_of
from megatron_mhc.convert.source import RUN_CONFIG, SHAPE, Source, model_config
from megatron_mhc.inputs.values import check_number
from megatron_mhc.settings.flag import flags_of
from megatron_mhc.settings.flags_residual import resolve_arguments, saved_residual_config
from megatron_mhc.settings.residual import (
    LEAST_NORM_EPS,
    NORM_EPS,
    NUMERICS,
    PAPER,
    ResidualConfig,
)

ITERATIONS = 'mhc_sinkhorn_iterations'
SAMPLES = ('consumed_train', 'consumed_valid', 'skipped_train')
# Those of which other projects have layouts.
MANIFOLDS = (SINKHORN, 'identity')
# How far the run had come: the output is a release, from which training starts anew.
PROGRESS = ('iteration', *(f'{kind}_samples' for kind in SAMPLES))


class Described(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        layout: None for a standard model, and then n and iterations are 0.
        stacked: all layers in one tensor, as distributed checkpoints have equal ones.
        learned: a learned merge.
        norm_eps: of the norm of all streams; that of ``mhc`` where a layout has it built in.
        numerics: ``--mhc-numerics`` under which ours compute the same.
        symbols: of the layers of a hybrid model; empty of a GPT model.
        single_pass: ``--mhc-single-pass``.
    """

    layout: StoredLayout | None
    num_layers: int
    hidden_size: int
    num_streams: int
    iterations: int
    stacked: bool
    learned: bool
    norm_eps: float = NORM_EPS
    symbols: str = ''
    numerics: str = PAPER
    single_pass: bool = False

    @property
    def name(self) -> str:
        return STANDARD if self.layout is None else self.layout.name

    def owned(self) -> list[str]:
        if self.layout is None:
            return []
        return self.layout.owned(self.num_layers, self.stacked, self.learned)


def describe(source: Source, origin: str = 'auto') -> Described:
    """The layout of ``source``, by its arguments, and by ``origin`` (``--from``) if they are mute.

    Raises:
        ValueError: ``origin`` contradicts the arguments, or the residual connections are of a kind
            that no other layout has.
    """
    args = source.args
    said = _layout_name(source)
    name = said if origin == 'auto' else origin
    files = name in LAYOUTS and LAYOUTS[name].model_types
    if said not in (name, STANDARD) or (said == STANDARD and (name == 'mhc' or files)):
        raise ValueError(
            f'--from {origin}: {source.folder} is a {said} checkpoint by its saved arguments; '
            'leave out --from'
        )
    if name in ('hc', 'mudd', 'gated', 'attention'):
        raise ValueError(
            f'{source.folder} has residual connections of type {name}, which no other layout has; '
            'only standard and mhc checkpoints are converted'
        )
    if getattr(args, 'engram_layers', None):
        raise ValueError(
            f'{source.folder} has a memory (--engram-layers), whose keys belong to its streams and '
            'which no other layout has: it stays as it is'
        )
    pattern = pattern_of(args)
    if pattern and name != STANDARD:
        raise of_gpt_alone(source, pattern)
    layout = LAYOUTS.get(name)
    stacked = are_stacked(source.entries)
    shape = (args.num_layers, args.hidden_size)
    if layout is None:
        _require_decoder(source)
        symbols = parsed(pattern).layers if pattern else ''
        return Described(None, *shape, 0, 0, stacked, False, symbols=symbols)
    learned, norm_eps = layout.head_always, NORM_EPS
    numerics, single_pass = layout.numerics, layout.single_pass
    if name == 'mhc':
        residual = _plain_mhc(source)
        learned, norm_eps = residual.stream_merge == 'learned', residual.norm_eps
        numerics, single_pass = residual.numerics, residual.single_pass
        layout = own_layout(residual.manifold)
    if layout.model_types:
        config = model_config(source.config)
        n, iterations = config[SHAPE[layout.streams]], config.get(SHAPE[ITERATIONS])
        norm_eps, stacked = _eps_of(source, layout, config), False
    else:
        n, iterations = getattr(args, layout.streams, None), getattr(args, ITERATIONS, None)
    if layout.manifold != SINKHORN:
        # No pass is made; the number is the default.
        iterations = ResidualConfig.sinkhorn_iterations
    if not isinstance(n, int) or not isinstance(iterations, int):
        raise ValueError(
            f'{source.folder}: the saved arguments name no number of streams, so it is no {name} '
            'checkpoint; leave out --from, or name another layout'
        )
    return Described(
        *(layout, *shape, n, iterations, stacked, learned, norm_eps),
        numerics=numerics,
        single_pass=single_pass,
    )


def _eps_of(source: Source, layout: StoredLayout, config: dict[str, Any]) -> float:
    """Of the norm of all streams, where the other constants have the one value that ours have."""
    for name, ours in layout.constants.items():
        theirs = config.get(name, ours)
        if theirs != ours:
            raise ValueError(
                f'{source.folder}: {name} {theirs} in its config.json: only {ours:g}, which all '
                'released models have, is converted'
            )
    usual = NUMERICS[layout.numerics].norm_eps
    eps = config.get('rms_norm_eps', usual)
    remedy = f'{layout.name} has {usual:g}'
    check_number('rms_norm_eps of config.json', eps, LEAST_NORM_EPS, 1.0, remedy)
    return float(eps)


def of_gpt_alone(source: Source, pattern: str) -> ValueError:
    """For a hybrid model where one of the layouts is asked for."""
    return ValueError(
        f'{source.folder} is a hybrid model, --hybrid-layer-pattern {pattern}, and layouts are '
        'those of layers with attention and an MLP, so only GPT models are converted to another; '
        'first --to gpt, and afterwards --to hybrid'
    )


def are_stacked(names: Iterable[str]) -> bool:
    """Whether all layers are in one tensor each, as distributed checkpoints have equal ones."""
    return not any(re.match(r'decoder\.layers\.\d', name) for name in names)


def _layout_name(source: Source) -> str:
    if source.format == 'safetensors':
        return source.layout.name
    for layout in LAYOUTS.values():
        if layout.flag and getattr(source.args, layout.flag, False):
            # It fills the modules of dev, and keeps its arguments elsewhere.
            bridge = layout.name == 'megatron-dev' and (source.folder / RUN_CONFIG).is_file()
            return 'megatron-bridge' if bridge else layout.name
    return getattr(source.args, 'residual_type', STANDARD)


def _require_decoder(source: Source) -> None:
    if not any(name.startswith('decoder.layers.') for name in source.entries):
        raise ValueError(
            f'{source.folder} has no decoder layers: only GPT and hybrid models are converted; '
            'name the checkpoint of one'
        )


def _plain_mhc(source: Source) -> ResidualConfig:
    residual = saved_residual_config(source.args)
    for what, given in (
        (f'--mhc-manifold {residual.manifold}', residual.manifold not in MANIFOLDS),
        (f'--mhc-fixed-mappings {" ".join(residual.fixed_mappings)}', residual.fixed_mappings),
        ('--mhc-stream-merge sum', residual.stream_merge == 'sum'),
    ):
        if given:
            raise ValueError(
                f'{source.folder} was trained with {what}, which no other layout has: it stays as '
                'it is'
            )
    return residual


def own_residual(args: argparse.Namespace) -> ResidualConfig:
    """The connections of a checkpoint of ours, of any type; one stream where it is stock."""
    if not hasattr(args, 'residual_type'):
        return ResidualConfig('standard')
    return saved_residual_config(args)


def norm_eps_of(args: argparse.Namespace) -> float:
    """eps of the model's norms, whose flag has had two names; Megatron's default where absent."""
    given = (getattr(args, name, None) for name in ('layernorm_epsilon', 'norm_epsilon'))
    return next((value for value in given if value is not None), 1e-5)


def read_streams(source: Source, described: Described, numerics: str | None = None) -> Streams:
    """The mapping parameters of ``source``.

    Args:
        numerics: ``--mhc-numerics`` of what they are for; that of ``source`` if None. A learned
            merge stays one where these compute it otherwise than the mean.

    Raises:
        ValueError: tensors are missing, or of other shapes than the arguments say.
    """
    assert described.layout is not None
    return from_tensors(
        source.tensor,
        described.layout,
        num_streams=described.num_streams,
        hidden_size=described.hidden_size,
        num_layers=described.num_layers,
        iterations=described.iterations,
        stacked=described.stacked,
        learned=described.learned,
        norm_eps=described.norm_eps,
        numerics=numerics or described.numerics,
        single_pass=described.single_pass,
        fold=numerics in (None, PAPER),
    )


def converted_args(
    args: argparse.Namespace,
    streams: Streams,
    layout: StoredLayout,
    init_gating_factor: float | None,
) -> argparse.Namespace:
    """The arguments of a run that would have saved ``streams`` in ``layout``."""
    args = copy.copy(args)
    for name in PROGRESS:
        setattr(args, name, 0)
    factor = init_gating_factor or getattr(args, 'mhc_init_gating_factor', None)
    # Ours, theirs, and by all their names: what is not set below was never given.
    ours = [flag.dest for flag in flags_of(ResidualConfig).values()]
    for name in (*ours, *_theirs()):
        if hasattr(args, name):
            delattr(args, name)
    values: dict[str, Any] = {
        layout.streams: streams.num_streams,
        'mhc_init_gating_factor': 0.01 if factor is None else factor,
    }
    if streams.manifold == SINKHORN:
        values[ITERATIONS] = streams.iterations
    if layout.name == 'mhc':
        merge = 'mean' if streams.head is None else 'learned'
        values |= {
            'residual_type': 'mhc',
            'mhc_manifold': streams.manifold,
            'mhc_single_pass': streams.single_pass,
            'mhc_stream_merge': None if streams.single_pass else merge,
            'mhc_norm_eps': streams.norm_eps,
            'mhc_numerics': streams.numerics,
        }
    if layout.flag:
        values[layout.flag] = True
    for name, value in values.items():
        setattr(args, name, value)
    if layout.name == 'mhc':
        resolve_arguments(args)
    return args


def _theirs() -> list[str]:
    return [name for layout in LAYOUTS.values() for name in (layout.flag, layout.streams) if name]
