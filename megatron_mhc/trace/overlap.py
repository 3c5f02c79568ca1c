"""What a traced rank did with its time: communication that compute covered, delay of F_post,res.

Two kernels of one kind that run at once count once: all times are lengths of unions of intervals.
"""

from __future__ import annotations

import bisect
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_mhc.kernels.profiler_names import FUSED_EDGE, POST_KERNELS, POST_RANGE
from megatron_mhc.trace.events import Kernel, Trace

COMPUTE, P2P, ALL_TO_ALL, COLLECTIVES = 'compute', 'p2p', 'all_to_all', 'collectives'
_WORDS = (
    (ALL_TO_ALL, re.compile('all_?to_?all')),
    (P2P, re.compile('send|recv')),
    (COLLECTIVES, re.compile('gather|scatter|reduce|broadcast')),
)
# Sorted, disjoint (start, end) pairs in ns.
Intervals = list[tuple[int, int]]


def kind_of(kernel: Kernel) -> str:
    """Compute or the kind of communication, from the name of a kernel and of its launch."""
    name = kernel.name.lower()
    if 'deep_ep' in name:
        return ALL_TO_ALL
    if not name.startswith(('nccl', 'rccl')):
        return COMPUTE
    # The names of other kernels say what they do.
    labels = [*_labels(kernel), name] if re.search('sendrecv|generic', name) else [name]
    for label in labels:
        for kind, pattern in _WORDS:
            if pattern.search(label):
                return kind
    return COLLECTIVES


def union(kernels: Iterable[Kernel]) -> Intervals:
    """When at least one of ``kernels`` runs."""
    merged: Intervals = []
    for start, end in sorted((kernel.start, kernel.end) for kernel in kernels):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def overlap(a: Intervals, b: Intervals) -> int:
    """For how long, in ns, both are on."""
    i = j = total = 0
    while i < len(a) and j < len(b):
        total += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def _length(intervals: Intervals) -> int:
    return sum(end - start for start, end in intervals)


def _labels(kernel: Kernel) -> list[str]:
    names = [kernel.collective, *(span.name for span in kernel.ranges)]
    return [name.lower() for name in names if name]


def _direction(kernel: Kernel) -> str | None:
    for label in _labels(kernel):
        found = {word for word in ('send', 'recv') if word in label}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def measure(trace: Trace) -> dict[str, Any]:
    """Times in ns and delays of one rank: what adds up over ranks, for ``shares``."""
    kinds = defaultdict(list)
    for kernel in trace.kernels:
        kinds[kind_of(kernel)].append(kernel)
    for kernel in kinds[P2P]:
        if direction := _direction(kernel):
            kinds[direction].append(kernel)
    compute = union(kinds[COMPUTE])
    pool: dict[str, Any] = {
        'kernels': len(trace.kernels),
        'span': max(kernel.end for kernel in trace.kernels) - trace.kernels[0].start,
        'busy': _length(compute),
    }
    for name in (P2P, 'send', 'recv', ALL_TO_ALL, COLLECTIVES):
        on = union(kinds[name])
        time = _length(on)
        pool[name] = len(kinds[name]), time, time - overlap(on, compute)
    return pool | _post(trace, kinds)


def _post(trace: Trace, kinds: dict[str, list[Kernel]]) -> dict[str, Any]:
    calls: dict[Any, list[Kernel]] = {}
    for kernel in kinds[COMPUTE]:
        key = _call(kernel)
        if key is not None:
            calls.setdefault(key, []).append(kernel)
    arrivals = sorted(kernel.end for kernel in kinds[P2P] if _direction(kernel) != 'send')
    launches = defaultdict(list)
    for kernel in sorted(
        (kernel for kernel in trace.kernels if kernel.launched is not None), key=_launched
    ):
        launches[kernel.thread].append(kernel)
    delays, late = [], 0
    for call in calls.values():
        first = min(call, key=lambda kernel: (kernel.start, kernel.end))
        ready = _ready(first, call, launches, arrivals)
        if ready is not None:
            delays.append(first.start - ready)
            late += _launched(first) > ready
    on_stream = Counter(call[0].stream for call in calls.values())
    own = {id(kernel) for call in calls.values() for kernel in call}
    others = Counter(kernel.stream for kernel in kinds[COMPUTE] if id(kernel) not in own)
    streams = [
        {
            'stream': stream,
            'priority': trace.priorities.get(stream),
            'calls': number,
            'shared': others[stream] > number,
        }
        for stream, number in sorted(on_stream.items())
    ]
    return {'calls': len(calls), 'delays': delays, 'late': late, 'streams': streams}


def _launched(kernel: Kernel) -> int:
    """Of a kernel whose launch the trace has."""
    assert kernel.launched is not None
    return kernel.launched


def _call(kernel: Kernel) -> Any:
    """What the kernels of one F_post,res share; None for a kernel of anything else."""
    for span in kernel.ranges:
        if span.name == POST_RANGE:
            return kernel.thread, span
    fused_edge = any(span.name.startswith(FUSED_EDGE) for span in kernel.ranges)
    return id(kernel) if kernel.name.startswith(POST_KERNELS) and not fused_edge else None


def _ready(
    first: Kernel, call: list[Kernel], launches: dict[Any, list[Kernel]], arrivals: list[int]
) -> int | None:
    """When the inputs of ``first`` were there, in ns; None if nothing tells."""
    if first.launched is None:
        return None
    earlier = launches[first.thread]
    at = bisect.bisect_left(earlier, first.launched, key=_launched)
    # What still ran when the call began is not what it waited for.
    producer = next(
        (kernel for kernel in reversed(earlier[:at])
         if kernel.end <= first.start and kernel not in call),
        None,
    )  # fmt: skip
    if producer is not None:
        if kind_of(producer) != COMPUTE:
            return producer.end
        between = any(
            _any_between(others, _launched(producer), first.launched)
            for thread, others in launches.items()
            if thread != first.thread
        )
        if not between:
            return producer.end
    index = bisect.bisect_right(arrivals, first.start) - 1
    since = producer.end if producer is not None else -1
    return arrivals[index] if index >= 0 and arrivals[index] > since else None


def _any_between(kernels: list[Kernel], start: int, end: int) -> bool:
    at = bisect.bisect_right(kernels, start, key=_launched)
    return at < len(kernels) and _launched(kernels[at]) < end


def shares(pools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares, ms and delay statistics (us) of one or several ``measure``, as plain values.

    Returns:
        ``idle`` and, for every kind of communication, ``exposed`` in 0 to 1; None where a trace has
        nothing of the kind.
    """

    def total(name: str) -> int:
        return sum(pool[name] for pool in pools)

    row: dict[str, Any] = {
        'kernels': total('kernels'),
        'span_ms': total('span') / 1e6,
        'idle': 1 - total('busy') / total('span') if total('span') else 0.0,
    }
    for name in (P2P, 'send', 'recv', ALL_TO_ALL, COLLECTIVES):
        number, time, bare = (sum(pool[name][i] for pool in pools) for i in range(3))
        exposed = bare / time if time else 0.0
        row[name] = None if not number else {
            'kernels': number, 'ms': time / 1e6, 'exposed_ms': bare / 1e6, 'exposed': exposed,
        }  # fmt: skip
    delays = sorted(delay / 1e3 for pool in pools for delay in pool['delays'])
    row['post_res'] = None if not total('calls') else {
        'calls': total('calls'),
        'measured': len(delays),
        'delay_us': {
            'median': statistics.median(delays),
            '90th': delays[-(-9 * len(delays) // 10) - 1],
            'max': delays[-1],
        } if delays else None,
        'launched_late': total('late') / len(delays) if delays else None,
        # Streams are numbered by each process for itself.
        'streams': [stream for pool in pools for stream in pool['streams']],
    }  # fmt: skip
    return row
