"""How the optimizer treats mapping parameters: weight decay, learning rate, and which optimizer.

Megatron gives each parameter the union of all overrides that match it, and stops where two of them
disagree. So ours are not added beside Megatron's (muP, decoupled learning rate, a caller's own) but
laid on top of what those decide for the same parameter. Parameters are found by name, which no
wrapper (Float16Module, DDP) changes but in its prefix.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from megatron.core.optimizer import OptimizerConfig, ParamKey
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import combine_param_group_overrides
from torch import nn

from megatron_mhc.config import ResidualConfig
from megatron_mhc.constraints import DECOUPLED, WHY_NOT_DECOUPLED

PHI = ('*hyper_connection.mapping_proj.weight', '*stream_merge.mapping_proj.weight')
VECTORS = (
    '*hyper_connection.bias',
    '*hyper_connection.alpha*',
    '*stream_merge.bias',
    '*stream_merge.alpha*',
)
Overrides = dict[ParamKey, dict[str, Any]]


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
    overrides = overrides or {}
    rates = {'max_lr': config.lr, 'min_lr': config.min_lr}
    own: dict[tuple, set[int]] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if _any_match(name, PHI + VECTORS):
                theirs = combine_param_group_overrides(
                    [rule for key, rule in overrides.items() if key.matches(parameter, name)]
                )
                rule = _rule(name, theirs, rates, residual)
                own.setdefault(tuple(sorted(rule.items())), set()).add(id(parameter))
    mapping = frozenset().union(*own.values())
    others = {
        _key(f'{key!r} outside mappings', functools.partial(_outside, key, mapping)): rule
        for key, rule in overrides.items()
    }
    # An empty rule would make a second group with the settings of the unmatched parameters, and a
    # checkpoint could not tell the two apart.
    inside = {
        _key(f'mappings {rule}', functools.partial(_inside, members)): dict(rule)
        for rule, members in own.items()
        if rule
    }
    return {**others, **inside}


def _rule(
    name: str, theirs: dict[str, Any], rates: dict[str, float | None], residual: ResidualConfig
) -> dict[str, Any]:
    """What one mapping parameter gets: ``theirs`` and, on top, our own."""
    if _any_match(name, VECTORS):
        return {**theirs, 'wd_mult': 0.0}
    decay = {} if residual.mapping_weight_decay else {'wd_mult': 0.0}
    factor = residual.mapping_lr_mult
    if factor == 1:
        return {**theirs, **decay}
    scaled = {
        key: rate * factor
        for key, default in rates.items()
        if (rate := theirs.get(key, default)) is not None
    }
    # No scheduler reads lr_mult; releases before 0.19 tell groups of a checkpoint apart by it.
    return {**theirs, **decay, **scaled, 'lr_mult': factor}


def _any_match(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _key(name: str, matches) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))


def _outside(key: ParamKey, mapping: frozenset[int], parameter: nn.Parameter, name: str) -> bool:
    return id(parameter) not in mapping and key.matches(parameter, name)


def _inside(members: set[int], parameter: nn.Parameter, name: str) -> bool:
    return id(parameter) in members
