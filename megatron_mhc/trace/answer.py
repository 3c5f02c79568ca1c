"""What ``megatron-mhc schedule trace`` answers: shares by rank, advice, limits exceeded."""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.table import table
from megatron_mhc.trace.command import LIMITS, OPTIONS
from megatron_mhc.trace.events import Trace, read_trace
from megatron_mhc.trace.overlap import ALL_TO_ALL, COLLECTIVES, P2P, measure, shares

PROGRAM = 'megatron-mhc schedule trace'
# Above these a result is worth a line of advice.
_NOTABLE_SHARE, _NOTABLE_DELAY_US = 0.1, 50.0


def main(options: argparse.Namespace) -> int:
    """Print the measurements; 1 when a limit is exceeded, else 0."""
    try:
        found = report([read_trace(path) for path in options.files])
        limits = {name: getattr(options, OPTIONS[name][2:].replace('-', '_')) for name in LIMITS}
        found['exceeded'] = exceeded(found['ranks'], limits)
    except OSError as error:
        refuse(PROGRAM, f'{error.filename}: {error.strerror}')
    except ValueError as error:
        refuse(PROGRAM, str(error))
    found['ok'] = not found['exceeded']
    print(json.dumps(found, indent=2) if options.json else '\n'.join(_lines(found)))
    return int(not found['ok'])


def report(traces: Sequence[Trace]) -> dict[str, Any]:
    """Measurements by rank and, for the files of one folder together, in total; plain values."""
    folders = [trace.path.resolve().parent for trace in traces]
    common = Path(os.path.commonpath(folders))
    pools, ranks = defaultdict(list), []
    for trace, folder in zip(traces, folders, strict=True):
        # Megatron's own name for the folder tells nothing of the run.
        run = folder.parent if folder.name == 'torch_profile' and folder != common else folder
        name = '.' if folder == common else str(run.relative_to(common))
        pool = measure(trace)
        pools[name].append(pool)
        ranks.append({'run': name, 'rank': trace.rank, 'file': str(trace.path), **shares([pool])})
    return {'ranks': ranks, 'totals': [{'run': run, **shares(p)} for run, p in pools.items()]}


def exceeded(ranks: Iterable[dict[str, Any]], limits: dict[str, float | None]) -> list[str]:
    """A line for every rank and limit that it exceeds.

    Raises:
        ValueError: a limit for something that a trace has nothing of.
    """
    lines = []
    for row in ranks:
        for name, limit in limits.items():
            if limit is None:
                continue
            value = _value(row, name)
            if value is None:
                raise ValueError(
                    f'{OPTIONS[name]}: nothing of that kind was measured in {row["file"]}; drop '
                    'the limit, or trace a run that has it'
                )
            if value > limit:
                words, unit = LIMITS[name]
                lines.append(
                    f'{row["file"]}: {words} {_shown(value, unit)}, limit {_shown(limit, unit)}'
                )
    return lines


def _value(row: dict[str, Any], name: str) -> float | None:
    if name == 'idle':
        return row['idle']
    if name == 'post_delay':
        delay = row['post_res'] and row['post_res']['delay_us']
        return delay and delay['90th']
    return row[name] and row[name]['exposed']


def _lines(found: dict[str, Any]) -> list[str]:
    head = ('run', 'rank', 'ms', 'idle', 'SEND/RECV', 'send', 'recv', 'all-to-all', 'collectives')
    cells: list[tuple[str, ...]] = [(*head, 'F_post,res', 'delay us', '90th', 'streams')]
    for total in found['totals']:
        rows = [row for row in found['ranks'] if row['run'] == total['run']]
        cells += [_cells(row, _rank(row)) for row in rows] + [_cells(total, 'all')]
    lines = table(cells, '<>') + [
        '',
        'ms: time from the first kernel to the last. idle: share of it in which no compute kernel',
        'runs. SEND/RECV (send, recv where the trace tells them apart), all-to-all, collectives:',
        'exposed communication, as a share of its own time: no compute kernel runs beside it;',
        'waiting for another rank counts. F_post,res: calls; delay us: from ready input to start,',
        'median and 90th percentile; streams, in brackets their priority.',
        '',
        *_advice(found),
    ]
    return lines + [f'exceeded: {line}' for line in found['exceeded']]


def _rank(row: dict[str, Any]) -> str:
    return Path(row['file']).name.split('.')[0] if row['rank'] is None else str(row['rank'])


def _cells(row: dict[str, Any], rank: str) -> tuple[str, ...]:
    kinds = (P2P, 'send', 'recv', ALL_TO_ALL, COLLECTIVES)
    post = row['post_res'] or {'calls': 0, 'delay_us': None, 'streams': []}
    delay = post['delay_us'] or {}
    return (
        row['run'],
        rank,
        f'{row["span_ms"]:.1f}',
        _shown(row['idle'], 'share'),
        *(_shown(row[kind] and row[kind]['exposed'], 'share') for kind in kinds),
        str(post['calls'] or '-'),
        *(_shown(delay.get(name), 'number') for name in ('median', '90th')),
        _streams(post['streams']) if rank != 'all' else '',
    )


def _streams(streams: list[dict[str, Any]]) -> str:
    if not streams:
        return '-'
    known = sorted({s['priority'] for s in streams if s['priority'] is not None})
    return f'{len(streams)}' + (f' ({", ".join(map(str, known))})' if known else '')


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return '-'
    return f'{value:.1%}' if unit == 'share' else f'{value:.1f}' + ' us' * (unit == 'us')


def _advice(found: dict[str, Any]) -> list[str]:
    lines = [
        'A good result: SEND/RECV exposed well below 1f1b at the same size, or under 10 %; all-to-',
        'all under 10 % in fused slots; F_post,res on streams of its own, delayed by a few us.',
    ]
    worst = {
        name: max((v for row in found['ranks'] if (v := _value(row, name)) is not None), default=0)
        for name in LIMITS
    }
    posts = [row['post_res'] for row in found['ranks'] if row['post_res']]
    if worst[P2P] > _NOTABLE_SHARE:
        lines += [
            '- SEND/RECV is exposed: set CUDA_DEVICE_MAX_CONNECTIONS=8 or more, as 1 puts all',
            '  streams in one queue; --pipeline-schedule dualpipev-w sends earlier; more',
            '  microbatches shorten the bubble. High for recv alone: it waits for a slower rank.',
        ]
    if worst[ALL_TO_ALL] > _NOTABLE_SHARE:
        lines += [
            '- All-to-all is exposed: --pipeline-schedule dualpipev runs it under the other',
            "  microbatch's compute.",
        ]
    if worst[COLLECTIVES] > _NOTABLE_SHARE:
        lines += ['- Collectives are exposed: --overlap-grad-reduce, or more microbatches a step.']
    if worst['post_delay'] > _NOTABLE_DELAY_US:
        shared = any(stream['shared'] for post in posts for stream in post['streams'])
        lines += [
            '- F_post,res waits on a stream with other compute: --mhc-post-stream high.'
            if shared
            else '- F_post,res waits although it has its own streams: a long kernel holds all SMs, '
            'maybe a\n  persistent one; choose attention and GEMM kernels that are not persistent.'
        ]
    if any((post['launched_late'] or 0) > 0.5 for post in posts):
        lines += [
            '- F_post,res is mostly launched after its input is ready: the host is the limit, not',
            '  the GPU; larger microbatches or fewer profiler options.',
        ]
    if any(post['measured'] == 0 for post in posts):
        lines += ['- Delays are not measured: the trace does not say what launched F_post,res.']
    return lines
