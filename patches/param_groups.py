"""Patch: the optimizer's parameter groups, where weight decay and learning rate are decided.

It is also the first point after every model chunk is built, hence where a run is stopped whose
script builds no such model: ``--residual-type`` would otherwise silently do nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from megatron.core.optimizer import get_standard_config_overrides
from torch import nn

from megatron_mhc.compat import core_minor, core_version
from megatron_mhc.engram.groups import require_memory, with_table_rules
from megatron_mhc.mudd.layer import MuddLayerMixin
from megatron_mhc.optim.mapping_groups import with_mapping_rules
from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.patches.gpt_model import residual_of
from megatron_mhc.residual.block import HyperConnectionBlockMixin
from megatron_mhc.settings.flags_engram import engram_of
from megatron_mhc.settings.residual import ResidualConfig


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    none_means_standard = core_minor(core_version() or '') == '0.17'

    def _get_param_groups(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        chunks = bound.arguments['model_chunks']
        residual, engram = residual_of(chunks[0].config), engram_of(chunks[0].config)
        if residual.enabled or engram is not None:
            config, overrides = bound.arguments['config'], bound.arguments['config_overrides']
            if overrides is None and none_means_standard:
                overrides = get_standard_config_overrides(config)
            if residual.enabled:
                require_widened(chunks, residual)
                overrides = with_mapping_rules(overrides, chunks, config, residual)
            if engram is not None:
                require_memory(chunks, engram)
                overrides = with_table_rules(overrides, chunks, config, engram)
            bound.arguments['config_overrides'] = overrides
        return original(*bound.args, **bound.kwargs)

    return _get_param_groups


def require_widened(chunks: Iterable[nn.Module], residual: ResidualConfig) -> None:
    """Raise RuntimeError for a model that has neither n streams nor dense connections."""
    widened = (HyperConnectionBlockMixin, MuddLayerMixin)
    for chunk in chunks:
        if not any(isinstance(module, widened) for module in chunk.modules()):
            inner: Any = chunk
            while hasattr(inner, 'module'):
                inner = inner.module
            raise RuntimeError(
                f'--residual-type {residual.residual_type} had no effect: the script built a '
                f'{type(inner).__name__}, and only GPTModel and HybridModel are widened to n '
                'streams; use one of them or --residual-type standard'
            )


READS = ('model_chunks', 'config', 'config_overrides')
PARAM_GROUPS_PATCHES = (
    Patch(
        id='param-groups',
        target='megatron.core.optimizer:_get_param_groups',
        wrap=_wrap,
        reason='mapping parameters are told by name; the first point where all chunks are built',
        fingerprints=on_every_release('40033d09'),
        reads=READS,
    ),
    Patch(
        id='param-groups-muon',
        target='megatron.core.optimizer.muon:_get_param_groups',
        wrap=_wrap,
        reason='0.17 builds the groups of Muon under a name of its own',
        fingerprints={'0.17': '40033d09'},
        reads=READS,
        # A seam on a def serves every module that imports it by name.
        in_tree=False,
    ),
)
