"""Optimizer state that belongs to weights by name, so that it can be carried under new names."""

from __future__ import annotations

import copy
import re
from typing import Any

from megatron_mhc.convert.source import Source

# ``optimizer.state.exp_avg.decoder.layers...``: of Adam, of Muon, and the fp32 weights themselves.
STATE = re.compile(r'(?:chained_\d+\.)?optimizer\.state\.(?P<kind>\w+?)\.(?P<name>.+)')
OF_OPTIMIZER = ('optimizer.', 'chained_')
PLAIN = ('optimizer', 'opt_param_scheduler')
LEAVE_OUT = 'or leave it out with --no-optim'


def check_optimizer(source: Source) -> None:
    """Raise ValueError unless optimizer state is by weight, and there of each that has any.

    Raises:
        ValueError: it is numbered, or laid out by ranks; or a part of it is missing.
    """
    if source.format == 'torch':
        if source.state.get('optimizer'):
            raise ValueError(
                'optimizer state of the format torch is numbered in the order of one model; save '
                'it once in the distributed format, with --ckpt-convert-format torch_dist '
                f'--ckpt-convert-save FOLDER, {LEAVE_OUT}'
            )
        return
    kinds: dict[str, set[str]] = {}
    for name, entry in source.run.items():
        if not name.startswith(OF_OPTIMIZER) or entry.shape is None:
            continue
        found = STATE.fullmatch(name)
        if found is None:
            raise ValueError(
                f'{name} is optimizer state of one layout of ranks, not of weights; save it once '
                f'more with --dist-ckpt-optim-fully-reshardable, {LEAVE_OUT}'
            )
        weight = source.entries.get(found['name'])
        if weight is None or weight.shape != entry.shape:
            shape = 'none' if weight is None else list(weight.shape or ())
            raise ValueError(
                f'{name} has shape {list(entry.shape)}, and its weight {shape}: they do not belong '
                f'together; take another copy, {LEAVE_OUT}'
            )
        kinds.setdefault(found['kind'], set()).add(found['name'])
    every = set().union(*kinds.values())
    for kind, names in kinds.items():
        if every - names:
            raise ValueError(
                f'{kind} of {min(every - names)} is missing, which others of the optimizer have; '
                f'take another copy, {LEAVE_OUT}'
            )


def without_optimizer(state: dict[str, Any], run: list[str]) -> tuple[dict[str, Any], list[str]]:
    """``state`` and names of a run that saved no optimizer."""
    args = copy.copy(state['args'])
    args.no_save_optim = True
    kept = {name: value for name, value in state.items() if name not in PLAIN}
    return kept | {'args': args}, [name for name in run if not name.startswith(OF_OPTIMIZER)]
