"""What ``megatron-mhc schedule`` answers: a plan, its picture, its proof, its times."""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
from collections import Counter
from math import inf
from pathlib import Path
from typing import Any

from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.table import table
from megatron_mhc.schedules.catalog import SCHEDULES, make_plan, too_many
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import COMMUNICATION, Kind, Plan
from megatron_mhc.schedules.plan_text import read_plan, write_csv, write_text
from megatron_mhc.schedules.render_svg import render_svg
from megatron_mhc.schedules.render_text import render_text
from megatron_mhc.schedules.render_trace import render_trace
from megatron_mhc.schedules.render_window import window_of
from megatron_mhc.schedules.simulator import simulate
from megatron_mhc.schedules.timeline import COMPUTE_LANE, HIGH_LANE, LANES, Timeline
from megatron_mhc.schedules.times import Times
from megatron_mhc.schedules.validator import validate

PROGRAM = 'megatron-mhc schedule'
# A file of the largest plan that can be followed, and operations that can be given times singly.
_MOST_BYTES, _MOST_TIMED = 2**28, 2**20
# Enough for the sums of a step; the digits behind are rounding.
_DIGITS = 9
_PICTURES = ('drawing', 'svg', 'png', 'trace')
# What ``simulate`` and ``compare`` print: key, words, and what they mean.
_FIGURES = (
    ('makespan', 'total time', 'of one step, until the last rank is done'),
    ('work', 'compute', 'of the busiest rank'),
    ('bubble', 'bubble', 'time in which the busiest rank does not compute'),
    ('span_bubble', 'inner bubble', "between a rank's first and last operation, where it is most"),
    ('exposed_hop', 'exposed comm.', 'time that the rank that waits most stands still for tensors'),
    ('peak_live', 'in flight', 'microbatches whose activations a rank holds at once, at most'),
)


def main(options: argparse.Namespace) -> int:
    """Run one of the subcommands; 0, or a refusal with status 2."""
    run = {
        'list': _list,
        'show': _show,
        'validate': _validate,
        'simulate': _simulate,
        'compare': _compare,
    }[options.topic]
    # A plan is millions of tuples without cycles, which collecting would walk through in vain.
    collects = gc.isenabled()
    gc.disable()
    try:
        run(options)
    except (ValueError, RuntimeError) as error:
        refuse(f'{PROGRAM} {options.topic}', ' '.join(str(error).split()))
    finally:
        if collects:
            gc.enable()
    return 0


def _list(options: argparse.Namespace) -> None:
    found = [
        {
            'name': schedule.name,
            'description': schedule.description,
            'needs': schedule.constraint or 'any pp and m',
            'source': schedule.source,
        }
        for schedule in SCHEDULES.values()
    ]
    if options.json:
        print(json.dumps({'schedules': found}, indent=2))
        return
    for row in found:
        print(f'{row["name"]:14} {row["description"]}')
        print(f'{"":14} needs {row["needs"]}; {row["source"]}')


def _show(options: argparse.Namespace) -> None:
    _check_extent(options)
    plan = _plan(options)
    if options.json:
        ranks = [[str(op) for op in ops] for ops in plan.ranks]
        print(json.dumps(_names(plan) | {'placement': plan.placement, 'ranks': ranks}))
        return
    if options.format in ('text', 'csv'):
        write = write_csv if options.format == 'csv' else write_text
        content: str | bytes = write(plan)
    else:
        timeline = _timeline(plan, options)
        content = _draw(timeline, options)
    if options.output is None:
        if isinstance(content, bytes):
            raise ValueError('argument --format png: not for a terminal; give --output FILE')
        sys.stdout.write(content)
        return
    try:
        options.output.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise ValueError(
            f'argument --output: {options.output}: {error.strerror}; name another file'
        ) from error


def _check_extent(options: argparse.Namespace) -> None:
    """Raise ValueError for a part of a picture where there is none to cut."""
    shape = '--json' if options.json else f'--format {options.format}'
    taken = {'--from': options.start, '--to': options.end, '--width': options.width}
    if not options.json and options.format in _PICTURES:
        if options.format != 'trace':
            return
        taken = {'--width': options.width}
    for flag, value in taken.items():
        if value is not None:
            raise ValueError(f'{flag} {value:g} has no effect with {shape}; drop one of them')


def _draw(timeline: Timeline, options: argparse.Namespace) -> str | bytes:
    window, width = window_of(timeline, options.start, options.end), options.width
    if options.format == 'svg':
        return render_svg(timeline, window=window, widest=width or inf)
    if options.format == 'trace':
        return render_trace(timeline, window)
    if options.format == 'png':
        from megatron_mhc.commands.schedule_png import WIDTH, render_png

        return render_png(timeline, window, WIDTH if width is None else width)
    if width is None:
        # A file is no narrower than a step is long.
        wide = options.output is not None or not sys.stdout.isatty()
        width = 0 if wide else shutil.get_terminal_size().columns
    lanes = LANES if options.lowered else (COMPUTE_LANE, HIGH_LANE)
    return render_text(timeline, width, lanes, window)


def _validate(options: argparse.Namespace) -> None:
    plan = _plan(options)
    if plan.kinds.isdisjoint(COMMUNICATION):
        plan = lower(plan, reduce=Kind.REDUCE not in plan.kinds)
        validate(plan)
    counts = Counter(leaf.kind for _, _, leaf in plan.leaves())
    if options.json:
        print(json.dumps(_names(plan) | {'valid': True, 'operations': counts}))
        return
    print(
        f'{plan.schedule} is valid with its communication: {plan.pp} ranks, {plan.microbatches} '
        f'microbatches, {", ".join(f"{count} {kind}" for kind, count in counts.items())}'
    )


def _simulate(options: argparse.Namespace) -> None:
    plan = _plan(options)
    timeline = _timeline(plan, options)
    found = _numbers(timeline, options.hop)
    if options.json:
        print(json.dumps(found))
        return
    print(
        f'{plan.schedule}: {plan.pp} ranks, {plan.microbatches} microbatches, hop {options.hop:g}'
    )
    share = f'{100 * found["bubble_share"]:.1f} % of the total time; '
    cells = [
        (words, f'{found[key]:.6g}', share * (key == 'bubble') + note)
        for key, words, note in _FIGURES
    ]
    print(*table(cells, '<><'), sep='\n')


def _compare(options: argparse.Namespace) -> None:
    if None in (options.pp, options.microbatches):
        raise ValueError('--pp and --microbatches: both are needed to compare; give both')
    reason = too_many(options.pp, options.microbatches, options.chunks)
    if reason is not None:
        raise ValueError(reason)
    # What is wrong with the times is wrong with all schedules.
    _times(options)
    rows, refused = [], []
    for name in SCHEDULES:
        try:
            plan = make_plan(name, options.pp, options.microbatches, chunks=options.chunks)
            if plan.forward_only:
                continue
            timeline = _timeline(_lower(plan, options), options)
        except ValueError as error:
            refused.append({'schedule': name, 'reason': str(error)})
            continue
        found = _numbers(timeline, options.hop)
        rows.append(found | {'hops': _hops(plan), 'model_copies': plan.directions})
    rows.sort(key=lambda row: row['makespan'])
    if options.json:
        numbers = {'pp': options.pp, 'microbatches': options.microbatches, 'hop': options.hop}
        print(json.dumps(numbers | {'schedules': rows, 'refused': refused}))
        return
    print(f'{options.pp} ranks, {options.microbatches} microbatches, hop {options.hop:g}')
    figures = [figure for figure in _FIGURES if figure[0] != 'work']
    head = ('schedule', *(words for _, words, _ in figures), 'bubble %', 'hops', 'parameters')
    cells = [
        (
            *(row['schedule'], *(f'{row[key]:.6g}' for key, _, _ in figures)),
            *(f'{100 * row["bubble_share"]:.1f}', row['hops'], f'{row["model_copies"]}x'),
        )
        for row in rows
    ]
    print(*table([head, *cells], '<>'), sep='\n')
    for row in refused:
        print(f'{row["schedule"]:14} refused: {row["reason"]}')
    print()
    notes = [(words, note) for _, words, note in figures]
    notes.append(('hops', "how often a microbatch's activation goes from rank to rank"))
    notes.append(('parameters', 'that a rank holds, against its share of one model'))
    print(*table(notes), sep='\n')


def _plan(options: argparse.Namespace) -> Plan:
    """The validated plan that the options name."""
    numbers = options.pp, options.microbatches
    if (options.schedule is None) == (options.plan is None):
        raise ValueError('--schedule or --plan: one of them; give a NAME of list, or a FILE')
    if options.plan is not None:
        if numbers != (None, None):
            raise ValueError('a plan file has its own numbers; leave out --pp and --microbatches')
        if options.live_bound is not None:
            raise ValueError('--live-bound has no effect with --plan; drop it')
        plan = _read(options.plan)
    elif None in numbers:
        raise ValueError(f'--schedule {options.schedule} needs --pp and --microbatches; give both')
    else:
        held = {'chunks': options.chunks, 'live_bound': options.live_bound}
        plan = make_plan(options.schedule, *numbers, **held)
    validate(plan, live_bound=options.live_bound)
    return _lower(plan, options)


def _read(path: Path) -> Plan:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(
                f'{path.stat().st_size} bytes, at most {_MOST_BYTES}: more operations than can be '
                'followed singly; give fewer microbatches'
            )
        return read_plan(path.read_text())
    except OSError as error:
        raise ValueError(
            f'argument --plan: {path}: {error.strerror}; name a file to read'
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f'argument --plan: {path}: not text; name a plan') from error
    except ValueError as error:
        raise ValueError(f'argument --plan: {path}: {error}') from error


def _lower(plan: Plan, options: argparse.Namespace) -> Plan:
    if not getattr(options, 'lowered', False):
        return plan
    reduces = Kind.REDUCE not in plan.kinds
    lowered = lower(plan, recompute=options.recompute > 0, reduce=reduces)
    validate(lowered)
    return lowered


def _timeline(plan: Plan, options: argparse.Namespace) -> Timeline:
    """The simulated plan."""
    count = sum(map(len, plan.ranks))
    if count > _MOST_TIMED:
        raise ValueError(
            f'{count} operations are too many to give times singly, at most {_MOST_TIMED}; give '
            'fewer microbatches, the bubble does not grow with them'
        )
    return simulate(plan, _times(options))


def _times(options: argparse.Namespace) -> Times:
    return Times(
        forward=options.forward,
        input_grad=options.input_grad,
        weight_grad=options.weight_grad,
        recompute=options.recompute,
        hop=options.hop,
        reduce=options.reduce,
        fused_slot_factor=options.fused_slot_factor,
        stage_scale=tuple(options.stage_scale or ()),
        recompute_stream=options.recompute_stream,
        link_contention=options.link_contention,
    )


def _names(plan: Plan) -> dict[str, Any]:
    return {'schedule': plan.schedule, 'pp': plan.pp, 'microbatches': plan.microbatches}


def _numbers(timeline: Timeline, hop: float) -> dict[str, Any]:
    """What ``simulate --json`` prints; in units of one rank's whole forward by default."""
    keys = ('work', 'makespan', 'bubble', 'peak_live', 'span_bubble', 'bubble_share', 'exposed_hop')
    found = {key: round(getattr(timeline, key), _DIGITS) for key in keys}
    return _names(timeline.plan) | {'hop': hop} | found


def _hops(plan: Plan) -> int:
    """How often the activation of one microbatch goes from rank to rank."""
    holders = plan.placement[0]
    return sum(a != b for a, b in zip(holders, holders[1:], strict=False))
