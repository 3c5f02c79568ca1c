"""What a study prints, and the files that it writes: CSV, flags, a picture."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mhc.inputs.table import table
from megatron_mhc.recipes.recipe import Flags, words
from megatron_mhc.sizing.memory import USABLE
from megatron_mhc.study.hardware import Hardware
from megatron_mhc.study.points import Point, Study, best_of, pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONNECTIONS = 'CUDA_DEVICE_MAX_CONNECTIONS'
CSV, PARETO, PICTURE, FLAGS = 'points.csv', 'pareto.csv', 'study.png', 'flags-n{}.sh'
# Column -> its head and format.
_COLUMNS = {
    'gpus': ('gpus', 'd'),
    'tp': ('tp', 'd'),
    'pp': ('pp', 'd'),
    'vpp': ('vpp', 'd'),
    'ep': ('ep', 'd'),
    'dp': ('dp', 'd'),
    'schedule': ('schedule', ''),
    'micro_batch': ('b', 'd'),
    'microbatches': ('m', 'd'),
    'streams': ('n', 'd'),
    'recompute': ('L_r', ''),
    'step_s': ('step, s', '.4g'),
    'mfu': ('MFU', '.1%'),
    'bubble_share': ('bubble', 'z.1%'),
    'exposed': ('comm., s', 'z.3g'),
    'mhc_overhead': ('mHC', 'z.1%'),
    'memory_gib': ('mem., GiB', '.1f'),
    'wire_gib': ('sent, GiB', '.1f'),
}


def points_table(points: list[Point]) -> str:
    """One line for each point; ``comm.`` is all communication that nothing covers."""
    cells = [[head for head, _ in _COLUMNS.values()]]
    for point in points:
        row = point.as_dict() | {'exposed': exposed(point), 'wire_gib': sent(point) / 2**30}
        cells.append([f'{row[name]:{form}}' for name, (_, form) in _COLUMNS.items()])
    return '\n'.join(table(cells, '>'))


def exposed(point: Point) -> float:
    """Seconds of communication that nothing covers."""
    return point.exposed_pp_s + point.exposed_tp_s + point.exposed_ep_s + point.exposed_dp_s


def sent(point: Point) -> float:
    """Bytes that the busiest rank sends in a step."""
    return point.pp_bytes + point.tp_bytes + point.ep_bytes + point.dp_bytes


def refusals(study: Study) -> str:
    """How many layouts do not exist, by reason; empty where all do."""
    lines = [f'{study.refused.total()} more layouts do not exist:'] if study.refused else []
    counts: dict[str, int] = {}
    for reason, count in study.refused.items():
        counts[reason.words] = counts.get(reason.words, 0) + count
    for why, count in sorted(counts.items(), key=lambda item: -item[1]):
        lines.append(f'{count:8}  {why}')
    return '\n'.join(lines)


def verdict(points: list[Point], hardware: Hardware) -> str:
    """One line on the best layout, or on why there is none."""
    best, limit = best_of(points), USABLE * hardware.memory_gib
    if best is None:
        least = min(points, key=lambda point: point.memory_gib)
        return (
            f'nothing fits: the least memory is {least.memory_gib:.1f} GiB of {limit:.1f} GiB '
            f'({USABLE:.0%} of {hardware.name}); use more --gpus, larger --pp, --ep or --tp'
        )
    return (
        f'best of those that fit: {best.step_s:.4g} s a step, {best.tokens_per_gpu_s:.0f} tokens a '
        f'second and GPU, MFU {best.mfu:.1%}, mHC {best.mhc_overhead:+z.1%}, {best.memory_gib:.1f} '
        f'of {limit:.1f} GiB'
    )


def connections(point: Point) -> str:
    """What ``CUDA_DEVICE_MAX_CONNECTIONS`` is to be for a layout."""
    return '1' if point.one_queue else '32'


def queues(point: Point, hardware: Hardware) -> str:
    """What to export beside the flags of a layout; where streams cannot overlap, the way out."""
    setting = f'with {CONNECTIONS}={connections(point)}'
    if not point.one_queue:
        return setting
    out = 'a layout with --tp 1 has more queues, and so has a GPU from Blackwell on (b200)'
    if point.layout.ep > 1 and not point.residual.enabled:
        # Megatron only warns of it, and of FSDP; n streams take neither.
        out += '; with --overlap-moe-expert-parallel-comm and a stock schedule it may be 32 too'
    return (
        f'{setting}, which Megatron 0.17 to 0.19 demands of tensor parallelism on {hardware.name}: '
        f'streams do not overlap, and nothing here counts on it; {out}'
    )


def flags_text(topics: dict[str, Flags]) -> str:
    """Flags for a shell, a topic a line."""
    lines = [' '.join(shlex.join(line) for line in words(flags)) for flags in topics.values()]
    return ' \\\n    '.join(line for line in lines if line)


def make_folder(folder: Path) -> None:
    """Make sure that there is a folder to write to, before anything is computed.

    Raises:
        ValueError: there cannot be.
        RuntimeError: matplotlib is not installed.
    """
    if importlib.util.find_spec('matplotlib') is None:
        raise RuntimeError(
            '--output: drawing needs matplotlib, which is not installed; pip install matplotlib'
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f'{PICTURE}.part'
        part.write_bytes(b'')
        part.unlink()
    except OSError as error:
        raise ValueError(f'--output {folder}: {error.strerror}; name another folder') from error


def write(
    folder: Path, study: Study, hardware: Hardware, title: str, flags: dict[int, str]
) -> None:
    """Write all files to ``folder``, each at once or not at all.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        _replace(folder / CSV, _csv(study.points).encode())
        _replace(
            folder / PARETO,
            _csv([point for points in study.streams.values() for point in pareto(points)]).encode(),
        )
        for n, text in flags.items():
            _replace(folder / FLAGS.format(n), (text + '\n').encode())
        _replace(folder / PICTURE, picture(study, hardware, title))
    except OSError as error:
        raise ValueError(f'--output {folder}: {error.strerror}; name another folder') from error


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + '.part')
    part.write_bytes(content)
    os.replace(part, path)


def _csv(points: list[Point]) -> str:
    file = io.StringIO()
    if points:
        writer = csv.DictWriter(file, points[0].as_dict(), lineterminator='\n')
        writer.writeheader()
        writer.writerows(point.as_dict() for point in points)
    return file.getvalue()


PARTS = {
    'compute': 'tab:blue',
    'bubble': 'lightgray',
    'pipeline hops': 'tab:orange',
    'tensor parallel': 'tab:purple',
    'expert all-to-all': 'tab:red',
    'data parallel': 'tab:brown',
    'optimizer': 'tab:green',
}


def breakdown(point: Point) -> dict[str, float]:
    """Seconds of a step by what they are spent on; compute is what is left."""
    pipeline = point.step_s - point.exposed_dp_s - point.optimizer_s
    parts = {
        'bubble': max(0.0, point.bubble_share * pipeline - point.exposed_pp_s),
        'pipeline hops': point.exposed_pp_s,
        'tensor parallel': point.exposed_tp_s,
        'expert all-to-all': point.exposed_ep_s,
        'data parallel': point.exposed_dp_s,
        'optimizer': point.optimizer_s,
    }
    return {'compute': point.step_s - sum(parts.values())} | parts


def picture(study: Study, hardware: Hardware, title: str) -> bytes:
    """PNG: step time against memory of all points, and where the time of the best ones goes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout='constrained')
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=10)
    _scatter(left, study, hardware)
    _bars(right, study)
    file = io.BytesIO()
    canvas.print_figure(file, format='png', dpi=90)
    return file.getvalue()


def _name(point: Point) -> str:
    layout = point.layout
    if layout.pp == 1:
        return 'no pipeline'
    return layout.schedule + (f' x{layout.vpp}' if layout.placement == 'interleaved' else '')


def _scatter(axes: Axes, study: Study, hardware: Hardware) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for name in sorted({_name(point) for point in study.points}):
        mine = [point for point in study.points if _name(point) == name]
        axes.scatter(
            [p.memory_gib for p in mine], [p.step_s for p in mine], s=8, alpha=0.5, label=name
        )
    front = pareto(study.points)
    if front:
        front.sort(key=lambda point: point.memory_gib)
        lowest = [p for p in front if p.layout.gpus == front[-1].layout.gpus]
        axes.plot([p.memory_gib for p in lowest], [p.step_s for p in lowest], 'k-', lw=1)
    axes.axvline(USABLE * hardware.memory_gib, color='gray', ls='--', lw=1)
    axes.set(xscale='log', yscale='log', ylabel='step, s')
    axes.set_xlabel('memory of the fullest rank, GiB')
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter('{x:g}')
        axis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7)


def _bars(axes: Axes, study: Study) -> None:
    """The best fitting point of every schedule; of all where none fits."""
    fitting = [point for point in study.points if point.fits] or study.points
    best: dict[str, Point] = {}
    for point in sorted(fitting, key=lambda point: point.step_s):
        best.setdefault(_name(point), point)
    rows = list(best.items())[::-1]
    labels = [
        f'{name}\ntp {p.layout.tp} pp {p.layout.pp} ep {p.layout.ep} b {p.layout.micro_batch}'
        for name, p in rows
    ]
    start = [0.0] * len(rows)
    for part, colour in PARTS.items():
        values = [breakdown(point)[part] for _, point in rows]
        axes.barh(labels, values, left=start, color=colour, label=part)
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.tick_params(axis='y', labelsize=7)
    axes.set_xlabel('step, s')
    axes.legend(fontsize=7, ncol=4, loc='lower center', bbox_to_anchor=(0.4, 1.0), frameon=False)
