"""What ``megatron-mhc recipe`` answers: parameters, memory, messages and FLOPs of a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from megatron_mhc.inputs.quiet import quiet
from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.table import table
from megatron_mhc.manifolds.registry import num_logits
from megatron_mhc.recipes.beyond import layout_beyond
from megatron_mhc.recipes.names import SIZES
from megatron_mhc.recipes.recipe import LAYOUTS, RECIPES, SEGMENTS, AnyRecipe, recipe_flags
from megatron_mhc.recipes.script import flags_text
from megatron_mhc.settings.residual import ResidualConfig
from megatron_mhc.sizing.divides import check_model
from megatron_mhc.sizing.flops import STEP, step_flops, token_flops
from megatron_mhc.sizing.memory import FP32, USABLE, Layout, RankMemory, edge_bytes, rank_memory
from megatron_mhc.sizing.shape import ModelShape
from megatron_mhc.sizing.size import PARTS, parameters, summary

GIB = 2**30
GPUS = {'80 GB': 79 * GIB, '141 GB': 139 * GIB}


def main(options: argparse.Namespace) -> int:
    """Run one of the subcommands; 0, 1 where the built model differs, or a refusal."""
    try:
        return _list(options) if options.topic == 'list' else _show(options)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        refuse(f'megatron-mhc recipe {options.topic}', ' '.join(str(error).split()))


def describe(
    recipe: AnyRecipe, layout: Layout, residual: str | ResidualConfig = 'mhc'
) -> dict[str, Any]:
    """All figures of a recipe on a layout, as plain values: parameters, bytes and FLOPs.

    Args:
        residual: the residual type, or all settings.

    Raises:
        ValueError: the layout does not fit the model or its batch.
    """
    shape = recipe.shape(residual)
    ranks = rank_memory(shape, layout, recipe.batch)
    check_model(shape, layout)
    fields = [field.name for field in dataclasses.fields(ranks[0])]
    fields += ['total', 'total_recompute']
    forward = token_flops(shape)
    return {
        'name': recipe.name,
        'residual_type': shape.residual.residual_type,
        'manifold': _manifold(shape),
        **summary(shape),
        'parameters': {part: parameters(shape)[part] for part in PARTS},
        'layout': {
            **dataclasses.asdict(layout),
            'dp': layout.dp,
            'expert_dp': layout.expert_dp,
            'microbatches': layout.microbatches(recipe.batch),
        },
        'memory': [{field: getattr(rank, field) for field in fields} for rank in ranks],
        'fits': [gpu for gpu, size in GPUS.items() if fullest(ranks) <= USABLE * size],
        'edge_bytes': edge_bytes(shape, layout) if layout.pp > 1 else 0,
        'flops': {
            'token': STEP * sum(forward.values()),
            'step': step_flops(shape, recipe.batch),
            'mhc_share': forward['mhc'] / sum(forward.values()),
        },
        'tokens': recipe.tokens,
    }


def _manifold(shape: ModelShape) -> dict[str, Any] | None:
    """What H_res is kept on and what that costs: mapping parameters, and maps of a sublayer."""
    residual, n = shape.residual, shape.residual.num_residual_streams
    if residual.residual_type != 'mhc':
        return None
    logits = num_logits(residual.manifold, n)
    return {
        'name': residual.manifold,
        'logits': logits,
        'parameter_bytes': FP32 * summary(shape)['mhc'],
        # Logits and maps of pre, post and res.
        'token_bytes': FP32 * (logits + 2 * n + n * n + 2 * n),
    }


def fullest(ranks: list[RankMemory]) -> int:
    """Estimated bytes of the rank that needs most, with recomputation in segments."""
    return max(rank.total_recompute for rank in ranks)


def verdict(figures: dict[str, Any]) -> str:
    """One line on whether the layout fits on a GPU, from ``describe``."""
    need = max(rank['total_recompute'] for rank in figures['memory']) / GIB
    fitting = ' and '.join(f'{gpu}: {"yes" if gpu in figures["fits"] else "no"}' for gpu in GPUS)
    return f'estimated {need:.0f} GiB on the fullest rank; fits GPUs of {fitting}'


def layout_of(options: argparse.Namespace) -> Layout:
    """The named layout, with the sizes that the options change.

    Raises:
        ValueError: sizes that contradict each other.
    """
    largest = max(layout.gpus for layout in LAYOUTS[options.name].values())
    beyond = options.gpus is not None and options.gpus > largest
    named = LAYOUTS[options.name][options.layout or ('64gpu' if beyond else '8gpu')]
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    dp = given.pop('dp', None)
    if dp is None:
        return (
            layout_beyond(RECIPES[options.name].batch, named, given)
            if beyond
            else (dataclasses.replace(named, **given))
        )
    cp = given.get('cp', named.cp)
    model = given.get('tp', named.tp) * cp * given.get('pp', named.pp)
    shared = 'tp x cp x pp' if cp > 1 else 'tp x pp'
    if given.setdefault('gpus', dp * model) != dp * model:
        raise ValueError(
            f'--dp {dp} x {shared} = {dp * model} ranks, but --gpus {given["gpus"]}; drop one'
        )
    return dataclasses.replace(named, **given)


def _list(options: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = [
        {
            'name': recipe.name,
            **summary(recipe.shape()),
            'tokens': recipe.tokens,
            'layouts': {
                name: dataclasses.asdict(one) for name, one in LAYOUTS[recipe.name].items()
            },
        }
        for recipe in RECIPES.values()
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    cells = [('name', 'total', 'active', 'mHC', 'tokens', 'layouts')]
    for row in rows:
        total, active = (f'{row[key] / 1e9:.3f} B' for key in ('total', 'active'))
        mhc, tokens = f'{row["mhc"] / 1e6:.2f} M', f'{row["tokens"] / 1e9:.0f} B'
        cells.append((row['name'], total, active, mhc, tokens, ', '.join(row['layouts'])))
    print(*table(cells, '<>>>><'), sep='\n')
    return 0


def _show(options: argparse.Namespace) -> int:
    recipe = RECIPES[options.name]
    residual = ResidualConfig(options.residual_type)
    if options.mhc_manifold:
        if options.residual_type != 'mhc':
            raise ValueError(
                f'--mhc-manifold has no effect with --residual-type {options.residual_type}; drop '
                'one of the two'
            )
        residual = dataclasses.replace(residual, manifold=options.mhc_manifold)
    layout = layout_of(options)
    figures = describe(recipe, layout, residual)
    run = residual
    if residual.has_streams:
        run = dataclasses.replace(residual, recompute_layer_num=SEGMENTS)
    figures['flags'] = flags_text(recipe_flags(recipe, layout, run))
    if options.build:
        from megatron_mhc.recipes.build import built_summary

        # Megatron prints its arguments.
        with quiet():
            figures['built'] = built_summary(recipe, residual)
    print(json.dumps(figures, indent=2) if options.json else _text(figures))
    return int('built' in figures and any(figures[k] != n for k, n in figures['built'].items()))


def _text(figures: dict[str, Any]) -> str:
    layout = figures['layout']
    lines = [f'{figures["name"]}, residual type {figures["residual_type"]}', '', 'parameters']
    lines += [
        f'  {part:24}{n:18,}' for part, n in figures['parameters'].items() if n and part != 'mhc'
    ]
    for key in ('total', 'active', 'mhc'):
        built = f'   built: {figures["built"][key]:,}' if 'built' in figures else ''
        lines.append(f'  {key:24}{figures[key]:18,}{built}')
    if figures['manifold']:
        cost = figures['manifold']
        lines.append(
            f'  manifold {cost["name"]}: {cost["logits"]} logits of H_res; all maps take '
            f'{cost["parameter_bytes"] / 2**20:.1f} MiB of fp32 parameters, and '
            f'{cost["token_bytes"]} bytes a token and sublayer'
        )
    shared = f' x cp {layout["cp"]}' if layout['cp'] > 1 else ''
    lines += [
        '',
        f'layout: {layout["gpus"]} ranks = tp {layout["tp"]}{shared} x pp {layout["pp"]} x dp '
        f'{layout["dp"]}, ep {layout["ep"]} x expert dp {layout["expert_dp"]}; '
        f'{layout["microbatches"]} microbatches of {layout["micro_batch"]}'
        + (f', {layout["schedule"]}' if layout['pp'] > 1 else ''),
        '',
        'estimated GiB of a rank (live: forward passes at the peak; recompute: mHC in segments)',
    ]
    head = ('pp rank', 'weights', 'gradients', 'optimizer', 'live x kept', 'logits', 'sum')
    cells: list[tuple[object, ...]] = [(*head, 'with recompute')]
    for rank, memory in enumerate(figures['memory']):
        gib = {key: f'{value / GIB:.1f}' for key, value in memory.items()}
        gib['live'] = f'{memory["live"]:.1f} x {gib["kept"]}'
        keys = ('weights', 'gradients', 'optimizer', 'live', 'logits', 'total', 'total_recompute')
        cells.append((rank, *(gib[key] for key in keys)))
    lines += (f'  {line}' for line in table(cells, '>'))
    flops = figures['flops']
    lines += [
        '  with recomputation in segments: ' + verdict(figures),
        '',
        f'between stages: {figures["edge_bytes"] / 2**20:.0f} MiB each way per microbatch',
        f'FLOPs: {flops["token"]:.4g} a token, {flops["step"]:.4g} a step, of which mHC '
        f'{100 * flops["mhc_share"]:.2f} %',
        '',
        'flags, beside those of data and logging:',
        '    ' + figures['flags'],
    ]
    return '\n'.join(lines)
