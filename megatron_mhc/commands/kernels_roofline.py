"""``megatron-mhc kernels report --roofline``: the model's options, its rows, and how they print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mhc.commands.kernels_peers import peer_lines
from megatron_mhc.inputs.table import table
from megatron_mhc.kernels.defaults import ARCHITECTURES
from megatron_mhc.kernels.roofline.gpus import GPUS
from megatron_mhc.kernels.roofline.launches import Shape, by_streams, sublayer
from megatron_mhc.kernels.roofline.measured import measured
from megatron_mhc.kernels.roofline.names import RECORDED
from megatron_mhc.kernels.roofline.predict import LABEL
from megatron_mhc.kernels.traffic import paper_forms

if TYPE_CHECKING:
    import argparse
    from typing import Any

    from megatron_mhc.kernels.roofline.gpus import Gpu
    from megatron_mhc.kernels.roofline.predict import Prediction

# A clone of the repository has them; a wheel has not.
BENCH = Path(__file__).resolve().parents[2] / 'tools' / 'bench'
SHOWN = ('fma', 'alu', 'xu', 'tensor', 'lsu')


def chosen(options: argparse.Namespace) -> tuple[Gpu, list[int]]:
    """The GPU of the predictions, and the compute capabilities to compile for.

    Raises:
        ValueError: ``--gpu`` has nothing to act on, or ``--arch`` leaves out that of the GPU.
    """
    if not options.roofline:
        if options.gpu is not None:
            raise ValueError(
                f'argument --gpu: {options.gpu}: --roofline alone prints times of a GPU; add it, '
                'or leave --gpu out'
            )
        if options.peers is not None:
            raise ValueError(
                f'argument --peers: {" ".join(options.peers)}: --roofline alone predicts; add it, '
                'or leave --peers out'
            )
        return GPUS[RECORDED], options.arch
    gpu = GPUS[options.gpu or RECORDED]
    if options.arch == [*ARCHITECTURES]:
        return gpu, [gpu.arch]
    if gpu.arch not in options.arch:
        seen = ' '.join(map(str, options.arch))
        raise ValueError(
            f'argument --arch: {seen}: {gpu.title} is {gpu.arch}; add it, or leave --arch out'
        )
    return gpu, options.arch


def fields(seen: Prediction, gpu: Gpu) -> dict[str, Any]:
    """A prediction as plain values; microseconds, megabytes of 10^6, and KB of 10^3 bytes."""
    return {
        'model': LABEL,
        'gpu': gpu.name,
        'microseconds': round(seen.seconds * 1e6, 1),
        'copy_percent': round(seen.copy_percent, 1),
        'bound': seen.bound,
        'bounds_us': {name: round(value * 1e6, 1) for name, value in seen.bounds.items()},
        'megabytes': round(seen.bounds['dram'] * gpu.copy / 1e6, 1),
        'instructions_per_kb': {k: round(v, 2) for k, v in seen.per_kilobyte.items()},
        'in_flight_kb': round(seen.in_flight / 1e3, 1),
        'needed_kb': round(gpu.needed_bytes / 1e3, 1),
    }


def shown_before(gpu: Gpu, shape: Shape) -> dict[str, tuple[float, str]]:
    """What ``measured`` finds in the results of the bench.

    Raises:
        ValueError: a file there is not as it should be.
    """
    return measured(BENCH / 'results', gpu.name, shape)


def roofline(
    rows: list[dict[str, Any]],
    gpu: Gpu,
    shape: Shape,
    itemsize: int,
    seen: dict[str, tuple[float, str]],
) -> dict[str, Any]:
    """The part of the report that ``--roofline`` adds: the GPU, and sums over sublayers.

    ``seen`` is what was ``shown_before``; a row that it has a time for gets it.
    """
    rows = [row for row in rows if row['arch'] == gpu.arch]
    seconds = by_streams(
        (row['num_streams'], row['kernel'], row['predicted']['microseconds'] / 1e6)
        for row in rows
        if row.get('predicted')
    )
    for row in rows:
        time = seen.get(f'{row["kernel"]} {row["num_streams"]}')
        if row.get('predicted') and time:
            row['measured'] = {'microseconds': time[0], 'source': time[1]}
    streams = sorted({row['num_streams'] for row in rows})
    return {
        'model': LABEL,
        'gpu': gpu.name,
        'constants': str(gpu),
        'sublayers': [sublayer(n, shape, itemsize, gpu, seconds.get(n, {})) for n in streams],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The model's part of the report as printed."""
    model = found['roofline']
    rows = [row for row in found['kernels'] if row.get('predicted')]
    text = [f'\nroofline: {model["model"]}', model['constants'], '']
    text += _kernels([row for row in rows if row['predicted']['gpu'] == model['gpu']])
    text += [
        '',
        'instructions of warps by pipe, per KB of memory traffic; KB under way on an SM, were '
        'there no other waits, of those that keep memory busy',
    ]
    text += [_sublayer(part) for part in model['sublayers']]
    if 'peers' in model:
        text += peer_lines(model['peers'])
    unknown = {row['unpredicted'] for row in found['kernels'] if row.get('unpredicted')}
    text += [f'not predicted: {why}' for why in sorted(unknown)]
    return text


def _kernels(rows: list[dict[str, Any]]) -> list[str]:
    header = ('kernel', 'n', 'MB', 'warps', *SHOWN, 'other', 'KB under way', 'bound', 'us')
    cells: list[tuple[object, ...]] = [(*header, '% of copy', 'measured us')]
    for row in rows:
        seen = row['predicted']
        counts = seen['instructions_per_kb']
        other = sum(count for pipe, count in counts.items() if pipe not in SHOWN)
        cells.append(
            (
                *(row['kernel'], row['num_streams'], seen['megabytes'], row['warps']),
                *(f'{counts.get(pipe, 0.0):.1f}' for pipe in SHOWN),
                f'{other:.1f}',
                f'{seen["in_flight_kb"]:.0f}/{seen["needed_kb"]:.0f}',
                *(seen['bound'], f'{seen["microseconds"]:.0f}', f'{seen["copy_percent"]:.0f}'),
                _measured(row),
            )
        )
    return table(cells, '<>>>>>>>>>>><>>')


def _measured(row: dict[str, Any]) -> str:
    seen = row.get('measured')
    return f'{seen["microseconds"]:.0f} ({seen["source"]})' if seen else '-'


def _sublayer(part: dict[str, Any]) -> str:
    n, paper = part['num_streams'], paper_forms(part['num_streams'])['HC: total'].elements
    text = (
        f'sublayer, forward + backward, n = {n}: {part["vectors"]} vectors of C per token, '
        f'{part["megabytes"]:.0f} MB, {part["bytes_us"]:.0f} us for the bytes alone; '
    )
    if part['missing']:
        return text + f'no sum without {", ".join(part["missing"])}'
    return (
        f'{text}predicted {part["predicted_us"]:.0f} us, {part["copy_percent"]:.0f} % of copy '
        f'(HC op by op moves {paper} vectors forward alone: mHC, Table 2)'
    )
