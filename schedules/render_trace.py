"""A timeline as a Chrome trace, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json

from megatron_mhc.schedules.plan import Kind
from megatron_mhc.schedules.render_rows import NAMES, rows
from megatron_mhc.schedules.render_window import Window
from megatron_mhc.schedules.timeline import LANES, Timeline

MICROSECONDS = 1000.0  # of the trace, per unit of the timeline


def render_trace(timeline: Timeline, window: Window | None = None) -> str:
    """The JSON of a trace: a process for each rank, a thread for each lane, a unit is 1 ms.

    With a ``window`` only the operations of which some is inside, each of them whole.
    """
    events: list[dict[str, object]] = []
    threads: dict[int, int] = {}
    for row in rows(timeline, LANES, window):
        if row.rank not in threads:
            events.append(_name('process_name', row.rank, 0, f'rank {row.rank}'))
            sort: dict[str, object] = {
                'name': 'process_sort_index',
                'ph': 'M',
                'pid': row.rank,
                'tid': 0,
            }
            events.append(sort | {'args': {'sort_index': row.rank}})
        thread = threads[row.rank] = threads.get(row.rank, -1) + 1
        events.append(_name('thread_name', row.rank, thread, row.name))
        for entry in row.entries:
            op = entry.op
            arguments: dict[str, int | None] = {'stage': op.stage, 'direction': op.direction}
            if op.kind is not Kind.FUSE and op.microbatch >= 0:
                arguments['microbatch'] = op.microbatch
            if op.kind is Kind.SEND:
                arguments['to rank'] = timeline.plan.peer(op)
            events.append(
                {
                    'name': str(op),
                    'cat': NAMES[op.kind],
                    'ph': 'X',
                    'pid': row.rank,
                    'tid': thread,
                    'ts': round(entry.start * MICROSECONDS, 3),
                    'dur': round((entry.end - entry.start) * MICROSECONDS, 3),
                    'args': arguments,
                }
            )
    plan = timeline.plan
    about = {'schedule': plan.schedule, 'pp': plan.pp, 'microbatches': plan.microbatches}
    return json.dumps({'traceEvents': events, 'displayTimeUnit': 'ms', 'otherData': about})


def _name(what: str, rank: int, thread: int, name: str) -> dict[str, object]:
    return {'name': what, 'ph': 'M', 'pid': rank, 'tid': thread, 'args': {'name': name}}
