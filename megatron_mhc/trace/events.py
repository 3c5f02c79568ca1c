"""Reads the GPU kernels of one rank from a profiler's file, with what launched them.

Two formats: the Chrome trace of torch's profiler (``.json`` or ``.json.gz``) and the SQLite export
of Nsight Systems (``nsys export --type sqlite``). A kernel is tied to the host thread that launched
it by its correlation id, and to the operators and ranges that were open on that thread then.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import re
import sqlite3
import zlib
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_KERNEL_TABLE = 'CUPTI_ACTIVITY_KIND_KERNEL'
_LAUNCH_TABLE = 'CUPTI_ACTIVITY_KIND_RUNTIME'
_NO_KERNELS = (
    '{path}: no GPU kernels in it; a run on the CPU, or a profiler without CUDA activity, leaves '
    'none: trace a run on GPUs'
)
_ONE_RANK = 'this reads one file per rank: write one for each process'
_RANK = re.compile(r'rank[-_ .]?(\d+)', re.IGNORECASE)


class Range(NamedTuple):
    """An operator or a named range on a host thread; times in ns."""

    start: int
    end: int
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """One kernel on the GPU.

    Args:
        name: as the profiler has it, demangled.
        start, end: ns, on the clock of the host ranges.
        stream: CUDA stream as the profiler numbers it.
        thread: host thread that launched it; None if the file does not say.
        launched: ns, when it did.
        ranges: what was open on that thread then, innermost first.
        collective: what torch calls the communication, such as ``send`` or ``all_to_allv``.
    """

    name: str
    start: int
    end: int
    stream: int
    thread: Any = None
    launched: int | None = None
    ranges: tuple[Range, ...] = ()
    collective: str = ''


@dataclass(frozen=True)
class Trace:
    """Kernels of one rank by start time; ``rank`` and priorities where the file knows them."""

    path: Path
    rank: int | None
    kernels: tuple[Kernel, ...]
    priorities: dict[int, int]


def read_trace(path: Path) -> Trace:
    """Read a Chrome trace or an nsys export, told apart by content.

    Raises:
        OSError: cannot be read; ValueError: not a trace, damaged, without GPU kernels, or of
            several ranks.
    """
    with path.open('rb') as file:
        head = file.read(16)
    if path.suffix in ('.nsys-rep', '.qdrep'):
        raise ValueError(f'{path}: a report of nsys; first: nsys export --type sqlite {path}')
    found = _read_nsys(path) if head.startswith(b'SQLite format 3') else _read_chrome(path, head)
    kernels = tuple(sorted(found.kernels, key=lambda kernel: (kernel.start, kernel.end)))
    rank = found.rank
    if rank is None and (named := _RANK.search(path.name)):
        rank = int(named[1])
    return Trace(path, rank, kernels, found.priorities)


def _read_chrome(path: Path, head: bytes) -> Trace:
    try:
        data = path.read_bytes()
        found = json.loads(gzip.decompress(data) if head.startswith(b'\x1f\x8b') else data)
    except EOFError:
        raise ValueError(f'{path}: the gzip file ends early; copy or trace it again') from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f'{path}: damaged gzip ({error}); copy or trace it again') from None
    except (ValueError, RecursionError):
        raise ValueError(
            f'{path}: not JSON, nested too deeply, or cut off; give a Chrome trace of the torch '
            'profiler, or an SQLite export of nsys'
        ) from None
    events = found.get('traceEvents') if isinstance(found, dict) else found
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise ValueError(
            f'{path}: JSON but not a Chrome trace: it has no list of traceEvents; name another'
        )
    try:
        kernels, priorities = _chrome_kernels(path, events)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f'{path}: an event is not as torch writes it: {error!r}; trace it again'
        ) from None
    distributed = found.get('distributedInfo') if isinstance(found, dict) else None
    rank = distributed.get('rank') if isinstance(distributed, dict) else None
    return Trace(path, rank, kernels, priorities)


def _chrome_kernels(
    path: Path, events: list[dict[str, Any]]
) -> tuple[tuple[Kernel, ...], dict[int, int]]:
    kernels, ranges = [], defaultdict(list)
    launches: dict[Any, tuple[Any, int]] = {}
    for event in events:
        if event.get('ph') != 'X':
            continue
        category = str(event.get('cat', '')).lower()
        if category == 'kernel':
            kernels.append(event)
        elif category in ('cuda_runtime', 'cuda_driver'):
            correlation = event['args'].get('correlation')
            launches.setdefault(correlation, ((event['pid'], event['tid']), _ns(event['ts'])))
        elif category in ('cpu_op', 'user_annotation'):
            start = _ns(event['ts'])
            span = Range(start, start + _ns(event.get('dur', 0)), event['name'])
            ranges[event['pid'], event['tid']].append(span)
    if not kernels:
        raise ValueError(_NO_KERNELS.format(path=path))
    devices = {event['args'].get('device', event['pid']) for event in kernels}
    processes = {
        launches[event['args'].get('correlation')][0][0]
        for event in kernels
        if event['args'].get('correlation') in launches
    }
    _require_one(path, devices, processes)
    priorities = {
        event['args']['stream']: event['args']['priority']
        for event in kernels
        if isinstance(event['args'].get('priority'), int)
    }
    plain = []
    for event in kernels:
        args, start = event['args'], _ns(event['ts'])
        stream, name = args.get('stream', event['tid']), str(args.get('Collective name', ''))
        end = start + _ns(event.get('dur', 0))
        plain.append((event['name'], start, end, stream, args.get('correlation'), name))
    return _with_launches(plain, launches, ranges), priorities


def _ns(microseconds: float | str) -> int:
    with contextlib.suppress(ValueError):
        if math.isfinite(float(microseconds)):
            return round(float(microseconds) * 1000)
    raise TypeError(f'time {microseconds!r}')


def _read_nsys(path: Path) -> Trace:
    try:
        with closing(sqlite3.connect(f'{path.resolve().as_uri()}?mode=ro', uri=True)) as database:
            return _nsys_kernels(path, database)
    except (sqlite3.Error, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path}: SQLite, but not as nsys exports it, or damaged ({error}); again: nsys export '
            '--type sqlite REPORT.nsys-rep'
        ) from None


def _nsys_kernels(path: Path, database: sqlite3.Connection) -> Trace:
    tables = {name for (name,) in database.execute('SELECT name FROM sqlite_master')}
    if 'StringIds' not in tables:
        raise ValueError(f'{path}: an SQLite file, but not an export of nsys: no table StringIds')
    # Tables of which there was nothing to write are left out.
    if _KERNEL_TABLE not in tables:
        raise ValueError(_NO_KERNELS.format(path=path))
    names = dict(database.execute('SELECT id, value FROM StringIds'))
    columns = {row[1] for row in database.execute(f'PRAGMA table_info({_KERNEL_TABLE})')}
    process = 'globalPid' if 'globalPid' in columns else '0'
    rows = database.execute(
        f'SELECT demangledName, start, "end", streamId, correlationId, deviceId, {process} '
        f'FROM {_KERNEL_TABLE}'
    ).fetchall()
    if not rows:
        raise ValueError(_NO_KERNELS.format(path=path))
    _require_one(path, {row[5] for row in rows}, {row[6] for row in rows})
    launches: dict[Any, tuple[Any, int]] = {}
    ranges, priorities = defaultdict(list), {}
    if _LAUNCH_TABLE in tables:
        query = f'SELECT correlationId, globalTid, start FROM {_LAUNCH_TABLE}'
        for correlation, thread, start in database.execute(query):
            launches.setdefault(correlation, (thread, start))
    if 'NVTX_EVENTS' in tables:
        query = 'SELECT globalTid, start, "end", text, textId FROM NVTX_EVENTS WHERE "end" NOTNULL'
        for thread, start, end, text, text_id in database.execute(query):
            # emit_nvtx appends ', seq = 12' and the like to the name of an operator.
            name = (text or names.get(text_id) or '').partition(', ')[0]
            ranges[thread].append(Range(start, end, name))
    if 'TARGET_INFO_CUDA_STREAM' in tables:
        query = 'SELECT streamId, priority FROM TARGET_INFO_CUDA_STREAM'
        priorities = dict(database.execute(query))
    plain = [(names.get(row[0], ''), *row[1:5], '') for row in rows]
    return Trace(path, None, _with_launches(plain, launches, ranges), priorities)


def _require_one(path: Path, devices: set[Any], processes: set[Any]) -> None:
    if len(devices) > 1:
        listed = ', '.join(sorted(map(str, devices)))
        raise ValueError(f'{path}: kernels of several GPUs ({listed}); {_ONE_RANK}')
    if len(processes) > 1:
        raise ValueError(f'{path}: kernels of {len(processes)} processes; {_ONE_RANK}')


def _with_launches(
    plain: list[tuple[Any, ...]],
    launches: dict[Any, tuple[Any, int]],
    ranges: dict[Any, list[Range]],
) -> tuple[Kernel, ...]:
    """Kernels with thread, launch time and the ranges around it."""
    by_thread: dict[Any, list[tuple[int, int, int, int, str, str]]] = defaultdict(list)
    kernels = []
    for name, start, end, stream, correlation, collective in plain:
        thread, launched = launches.get(correlation, (None, 0))
        if thread is None:
            kernels.append(Kernel(name, start, end, stream, collective=collective))
        else:
            by_thread[thread].append((launched, start, end, stream, name, collective))
    for thread, items in by_thread.items():
        opened = sorted(ranges.get(thread, ()), key=lambda span: (span.start, -span.end))
        # Not a stack: ranges of asynchronous work end out of order.
        upcoming, active = 0, []
        for launched, start, end, stream, name, collective in sorted(items):
            while upcoming < len(opened) and opened[upcoming].start <= launched:
                active.append(opened[upcoming])
                upcoming += 1
            active = [span for span in active if span.end >= launched]
            around = tuple(reversed(active))
            kernels.append(Kernel(name, start, end, stream, thread, launched, around, collective))
    return tuple(kernels)
