"""How the optimizer treats the tables: Adam, no weight decay, a learning rate of their own."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch

from megatron.core.optimizer import OptimizerConfig
from torch import nn

from megatron_mhc.optim.group_rules import Overrides, Rule, laid_on_top, scaled_rates
from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.model_config import ENGRAM

TABLES = '*decoder.engram.layer_*.table.weight'


def with_table_rules(
    overrides: Overrides | None,
    chunks: Iterable[nn.Module],
    config: OptimizerConfig,
    engram: EngramConfig,
) -> Overrides:
    """Overrides for ``_get_param_groups`` that treat the tables as ``engram`` says.

    Adam is theirs under Muon too, by a mark that ``EngramTable`` sets.
    """

    def rule_of(name: str, theirs: Rule) -> Rule | None:
        if not fnmatch(name, TABLES):
            return None
        return {**theirs, 'wd_mult': 0.0, **scaled_rates(engram.lr_mult, theirs, config)}

    return laid_on_top(overrides, chunks, 'tables', rule_of)


def require_memory(chunks: Iterable[nn.Module], engram: EngramConfig) -> None:
    """Raise RuntimeError where the script built something else than a model that has a memory."""
    for chunk in chunks:
        if ENGRAM.peek(chunk.config) is None:
            raise RuntimeError(
                f'--engram-layers {" ".join(map(str, engram.layers))} had no effect: only GPTModel '
                'and HybridModel are given a memory; use one of them or leave the flag out'
            )
