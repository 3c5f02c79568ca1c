"""``megatron-mhc kernels report --roofline --peers``: other projects' sublayers beside ours."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from typing import TYPE_CHECKING

from megatron_mhc.inputs.progress import progress
from megatron_mhc.inputs.table import table
from megatron_mhc.kernels.peers.names import PEERS
from megatron_mhc.kernels.roofline.predict import LABEL

if TYPE_CHECKING:
    from typing import Any

    from megatron_mhc.kernels.peers.contender import Contender
    from megatron_mhc.kernels.roofline.gpus import Gpu
    from megatron_mhc.kernels.roofline.launches import Shape

HEADING = f'a sublayer of each, forward + backward: {LABEL}'
EXPLAINED = (
    'torch: kernels of torch, each its bytes at the speed of a copy and 2 us; what a peer reads '
    'again from L2 is not counted; of a tuned kernel the fastest configuration counts'
)


def beside(
    asked: list[str], sublayers: list[dict[str, Any]], gpu: Gpu, shape: Shape
) -> list[dict[str, Any]]:
    """Ours and each peer, for each of our ``sublayers`` (one for each n).

    A peer that is absent, does not take the shape, or cannot be predicted has the ``reason``.
    """
    from megatron_mhc.kernels.peers.contender import Case
    from megatron_mhc.kernels.roofline.peers import Ours, eager_of

    wanted = PEERS if 'all' in asked else tuple(name for name in PEERS if name in asked)
    rows: list[dict[str, Any]] = []
    for part in sublayers:
        case = Case(shape.hidden_size, shape.tokens, part['num_streams'], shape.dtype)
        row: dict[str, Any] = {'peer': 'ours', 'num_streams': case.streams}
        if part['missing']:
            row['reason'] = f'no sum without {", ".join(part["missing"])}'
        else:
            eager = eager_of(Ours, case, gpu)
            total = part['predicted_us'] + 1e6 * eager.seconds
            moved = part['megabytes'] + eager.moved / 1e6
            row |= {'torch_kernels': eager.count, 'torch_us': 1e6 * eager.seconds}
            row |= {'launches': part['launches'], 'configurations': 0, 'spilling': []}
            row |= {'predicted_us': total, 'megabytes': moved}
            row['copy_percent'] = 100 * 1e12 * moved / gpu.copy / total
        rows.append(row)
        rows += [_peer(name, case, gpu, row.get('predicted_us')) for name in wanted]
    return rows


def _peer(name: str, case: Any, gpu: Gpu, ours: float | None) -> dict[str, Any]:
    from megatron_mhc.kernels.peers.contender import availability
    from megatron_mhc.kernels.roofline.peers import KINDS, as_fields, sublayer_of

    kind: type[Contender] = next(kind for kind in KINDS if kind.name == name)
    row: dict[str, Any] = {'peer': name, 'num_streams': case.streams}
    # What a peer says when it is imported is no part of the report.
    with contextlib.redirect_stdout(sys.stderr):
        there, remark = availability(kind)
        if not there:
            return row | {'reason': f'absent: {remark}'}
        row['version'] = remark
        try:
            if why := kind(case, 'meta').unsupported():
                return row | {'reason': f'does not take this shape: {why}'}
            meter = partial(_meter, name)
            found = as_fields(*sublayer_of(kind, case, gpu, meter), gpu)
        except Exception as error:  # whatever a peer does, the report goes on
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return row | {'reason': f'cannot be predicted: {lines[0]}'}
    kernels = found['kernels']
    row |= found | {
        'launches': sum(kernel['times'] for kernel in kernels),
        'configurations': sum(kernel['configurations'] for kernel in kernels),
    }
    return row | {'times_ours': found['predicted_us'] / ours} if ours else row


def _meter(name: str, total: int) -> Any:
    print(f'{name}: {total} to compile', file=sys.stderr)
    return progress(total, name)


def peer_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The sublayers side by side as printed; below, the kernels of each peer."""
    header = ('whose', 'n', 'launches', 'torch', 'MB', 'us', '% of copy', 'times ours', 'spilling')
    cells: list[tuple[object, ...]] = [header]
    kernels: list[tuple[object, ...]] = [
        ('whose', 'kernel', 'times', 'us', '% of copy', 'bound', 'spills', 'fastest of')
    ]
    notes = []
    for row in rows:
        if 'reason' in row:
            notes.append(f'{row["peer"]}, n = {row["num_streams"]}: {row["reason"]}')
            continue
        if 'version' in row:
            notes.append(f'{row["peer"]}: {row["version"]}, {row["configurations"]} compiled')
        times = f'{row["times_ours"]:.2f}' if 'times_ours' in row else '-'
        cells.append(
            (
                *(row['peer'], row['num_streams'], row['launches'], row['torch_kernels']),
                *(f'{row["megabytes"]:.0f}', f'{row["predicted_us"]:.0f}'),
                *(f'{row["copy_percent"]:.0f}', times, ' '.join(row['spilling']) or 'none'),
            )
        )
        for kernel in row.get('kernels', ()):
            numbers = (f'{kernel["microseconds"]:.0f}', f'{kernel["copy_percent"]:.0f}')
            chosen = f'{kernel["configurations"]}: {kernel["chosen"]}' if kernel['chosen'] else '-'
            kernels.append(
                (
                    *(row['peer'], kernel['kernel'], kernel['times'], *numbers, kernel['bound']),
                    *(kernel['spill_bytes'], chosen),
                )
            )
    text = ['', HEADING, *table(cells, '<>>>>>>><'), EXPLAINED]
    if len(kernels) > 1:
        text += ['', *table(kernels, '<<>>><><')]
    return [*text, *notes]
