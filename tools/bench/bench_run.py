"""The run behind ``bench.py``: who competes in what order, until the budget is spent."""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path

import bench_environment
import bench_report
import torch._functorch.config
from bench_calls import COMPOSITES
from bench_cases import all_cases
from bench_measure import OK, Row, measure, status_row
from bench_ours import OURS, Compiled
from bench_peers import PEERS
from bench_timer import GPU_SECONDS, CpuTimer, CudaTimer, make_timer

from megatron_mhc.kernels.peers.contender import Case, Contender, availability

REPORT_SECONDS = 60
"""How often the files are written again while the run goes on."""

Item = tuple[Case, type[Contender], str]


def run(options: argparse.Namespace, results: Path, argv: list[str], deadline: float) -> Path:
    """Measure what ``options`` asks for and write the report; returns its folder."""
    folder = options.output or bench_environment.new_folder(results, options.device)
    facts = bench_environment.describe(options.device, argv)
    contenders = _present(options, facts)
    # Backward is timed many times over one forward; compiled code, a peer's too, must allow that.
    torch._functorch.config.donated_buffer = False
    timer = make_timer(options.device, GPU_SECONDS / 4 if options.quick else GPU_SECONDS)
    bandwidth = timer.copy_bandwidth()
    for name, rate in bandwidth.items():
        facts[f'copy bandwidth, {name}'] = f'{rate / 1e9:.0f} GB/s (read + written)'
    cases = all_cases(options.hidden_sizes, options.tokens, options.num_streams, options.dtype)
    items = schedule(cases, contenders, options.ops)
    notes = [f'Timed by {timer.label}.']
    rows = _measure_all(items, timer, options.device, bandwidth, deadline, folder, facts, notes)
    left = sum(row.status.startswith('not run') for row in rows)
    if left:
        notes.append(f'{left} of {len(items)} measurements were not run: see the last table.')
    bench_report.write_all(folder, rows, facts, notes)
    return folder


def _present(options: argparse.Namespace, facts: dict[str, str]) -> list[type[Contender]]:
    """Those asked for that can run here; what became of the others goes into ``facts``."""
    asked = {*options.ours, *options.peers}
    present = []
    for kind in (*OURS, *PEERS):
        if kind.name not in asked:
            continue
        usable, remark = availability(kind)
        facts[f'implementation {kind.name}'] = remark if usable else f'absent: {remark}'
        print(f'{kind.name}: {remark if usable else f"absent: {remark}"}')
        if usable:
            present.append(kind)
    return present


def schedule(cases: list[Case], contenders: list[type[Contender]], ops: list[str]) -> list[Item]:
    """All measurements, the most telling ones first, those that compile for long last.

    Within one shape and op all contenders follow each other, ours first: they see the same clocks,
    and a peer that takes the device down takes nothing of ours with it.
    """
    # (headline shape, compiled by torch, composite op), most telling first.
    order = [
        (True, False, True),
        (True, False, False),
        (True, True, True),
        (False, False, True),
        (False, False, False),
        (True, True, False),
        (False, True, True),
        (False, True, False),
    ]

    def rank(item: Item) -> int:
        case, kind, op = item
        return order.index((case.headline, kind is Compiled, op in COMPOSITES))

    # Sorting is stable: within a rank the order of the product stays.
    items = ((case, kind, op) for case, op, kind in product(cases, ops, contenders))
    return sorted((item for item in items if item[2] not in item[1].without), key=rank)


def _measure_all(
    items: list[Item],
    timer: CpuTimer | CudaTimer,
    device: str,
    bandwidth: dict[str, float],
    deadline: float,
    folder: Path,
    facts: dict[str, str],
    notes: list[str],
) -> list[Row]:
    rows: list[Row] = []
    written, reason = time.monotonic(), ''
    try:
        for index, (case, kind, op) in enumerate(items):
            if not reason and time.monotonic() > deadline:
                reason = 'not run: the budget was spent'
            if reason:
                rows.append(status_row(case, kind.name, op, reason))
                continue
            found = measure(case, kind, op, timer, device, max(bandwidth.values()))
            rows += found
            print(f'[{index + 1}/{len(items)}] {case} {op} {kind.name}: {_brief(found)}')
            if not timer.recover():
                reason = f'not run: the device no longer answered after {kind.name} {op}'
            if time.monotonic() - written > REPORT_SECONDS:
                bench_report.write_all(folder, rows, facts, notes)
                written = time.monotonic()
    except KeyboardInterrupt:
        notes.append('Interrupted.')
    return rows


def _brief(rows: list[Row]) -> str:
    if not any(row.status == OK for row in rows):
        return rows[0].status if rows else 'nothing'
    return ', '.join(
        f'{row.direction} {row.mode} {row.median_us:.1f} us' if row.status == OK else row.status
        for row in rows
    )
