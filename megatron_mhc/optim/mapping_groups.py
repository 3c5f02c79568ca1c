"""How the optimizer treats mapping parameters: weight decay, learning rate, and which optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch

from megatron.core.optimizer import OptimizerConfig
from torch import nn

from megatron_mhc.optim.group_rules import Overrides, Rule, laid_on_top, scaled_rates
from megatron_mhc.settings.refused_residual import DECOUPLED, WHY_NOT_DECOUPLED
from megatron_mhc.settings.residual import ResidualConfig

# The gated residual has three matrices for phi.
_MATRICES = ('mapping_proj.weight', 'down.weight', 'up.weight', 'write.weight')
PHI = tuple(
    f'*{place}.{matrix}'
    for place in ('hyper_connection', 'hyper_connection.gates', 'stream_merge')
    for matrix in _MATRICES
)
VECTORS = (
    '*hyper_connection.bias',
    '*hyper_connection.alpha*',
    '*hyper_connection.gates.gain',
    '*stream_merge.gain',
    '*hyper_connection.reader.query',
    '*stream_merge.query',
    '*stream_merge.bias',
    '*stream_merge.alpha*',
)


def with_mapping_rules(
    overrides: Overrides | None,
    chunks: Iterable[nn.Module],
    config: OptimizerConfig,
    residual: ResidualConfig,
) -> Overrides:
    """Overrides for ``_get_param_groups`` that treat mapping parameters as ``residual`` says.

    Args:
        overrides: what Megatron or the caller asks for; unchanged for all other parameters.
        chunks: the model chunks, wrapped or not.
        config: whose ``lr`` and ``min_lr`` a parameter has that no override matches.

    Raises:
        ValueError: ``mapping_optimizer='scalar'`` with a decoupled learning rate.
    """
    if residual.mapping_optimizer == 'scalar' and config.decoupled_lr is not None:
        raise ValueError(f'{DECOUPLED}: {WHY_NOT_DECOUPLED}; drop one of the two')

    def rule_of(name: str, theirs: Rule) -> Rule | None:
        if _any_match(name, VECTORS):
            return {**theirs, 'wd_mult': 0.0}
        if not _any_match(name, PHI):
            return None
        decay = {} if residual.mapping_weight_decay else {'wd_mult': 0.0}
        return {**theirs, **decay, **scaled_rates(residual.mapping_lr_mult, theirs, config)}

    return laid_on_top(overrides, chunks, 'mappings', rule_of)


def _any_match(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
