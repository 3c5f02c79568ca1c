"""Rules of our own for some parameters, laid on top of what Megatron's optimizer decides for them.

Megatron gives each parameter the union of all overrides that match it, and stops where two of them
disagree. So ours are not added beside Megatron's (muP, decoupled learning rate, a caller's own) but
laid on top of what those decide for the same parameter. Parameters are found by name, which no
wrapper (Float16Module, DDP) changes but in its prefix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from megatron.core.optimizer import OptimizerConfig, ParamKey
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import combine_param_group_overrides
from torch import nn

Rule = dict[str, Any]
Overrides = dict[ParamKey, Rule]


def laid_on_top(
    overrides: Overrides | None,
    chunks: Iterable[nn.Module],
    kind: str,
    rule_of: Callable[[str, Rule], Rule | None],
) -> Overrides:
    """Overrides for ``_get_param_groups`` in which ``rule_of`` has the last word.

    Args:
        overrides: what Megatron or the caller asks for; unchanged for all other parameters.
        chunks: the model chunks, wrapped or not.
        kind: what our parameters are called.
        rule_of: ``(name, their rule) -> the whole rule``, or None for a parameter that is not ours.
    """
    overrides = overrides or {}
    own: dict[tuple[Any, ...], set[int]] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            theirs = combine_param_group_overrides(
                [rule for key, rule in overrides.items() if key.matches(parameter, name)]
            )
            rule = rule_of(name, theirs)
            if rule is not None:
                own.setdefault(tuple(sorted(rule.items())), set()).add(id(parameter))
    ours = frozenset().union(*own.values())
    others = {
        _key(f'{key!r} outside {kind}', functools.partial(_outside, key, ours)): rule
        for key, rule in overrides.items()
    }
    # An empty rule would make a second group with the settings of the unmatched parameters, and a
    # checkpoint could not tell the two apart.
    inside = {
        _key(f'{kind} {rule}', functools.partial(_inside, members)): dict(rule)
        for rule, members in own.items()
        if rule
    }
    return {**others, **inside}


def scaled_rates(factor: float, theirs: Rule, config: OptimizerConfig) -> Rule:
    """The learning rate and its minimum times ``factor``, as a part of a rule.

    Args:
        factor: 1 gives an empty rule.
        theirs: the rule that is scaled.
        config: whose ``lr`` and ``min_lr`` a parameter has that no override matches.
    """
    if factor == 1:
        return {}
    rates = {'max_lr': config.lr, 'min_lr': config.min_lr}
    scaled = {
        key: rate * factor
        for key, default in rates.items()
        if (rate := theirs.get(key, default)) is not None
    }
    # No scheduler reads lr_mult; releases before 0.19 tell groups of a checkpoint apart by it.
    return {**scaled, 'lr_mult': factor}


def _key(name: str, matches: Callable[..., bool]) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))


def _outside(key: ParamKey, ours: frozenset[int], parameter: nn.Parameter, name: str) -> bool:
    return id(parameter) not in ours and key.matches(parameter, name)


def _inside(members: set[int], parameter: nn.Parameter, name: str) -> bool:
    return id(parameter) in members
