"""What a study prints of its layouts."""

from __future__ import annotations

from megatron_mhc.inputs.table import table
from megatron_mhc.settings.queues import CONNECTIONS, connections
from megatron_mhc.sizing.memory import USABLE
from megatron_mhc.study.hardware import Hardware
from megatron_mhc.study.points import Point, Study, best_of

# Column -> its head and format.
_COLUMNS = {
    'gpus': ('gpus', 'd'),
    'tp': ('tp', 'd'),
    'cp': ('cp', 'd'),
    'pp': ('pp', 'd'),
    'vpp': ('vpp', 'd'),
    'ep': ('ep', 'd'),
    'dp': ('dp', 'd'),
    'schedule': ('schedule', ''),
    'micro_batch': ('b', 'd'),
    'microbatches': ('m', 'd'),
    'streams': ('n', 'd'),
    'recompute': ('L_r', ''),
    'precision': ('prec.', ''),
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
        row = point.as_dict() | {'exposed': point.exposed, 'wire_gib': point.sent / 2**30}
        cells.append([f'{row[name]:{form}}' for name, (_, form) in _COLUMNS.items()])
    return '\n'.join(table(cells, '>'))


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


def queues(point: Point, hardware: Hardware) -> str:
    """What to export beside the flags of a layout; where streams cannot overlap, the way out."""
    setting = f'with {CONNECTIONS}={connections(point.one_queue)}'
    if not point.one_queue:
        return setting
    out = 'a layout with --tp 1 has more queues, and so has a GPU from Blackwell on (b200)'
    if point.layout.ep > 1:
        # Megatron only warns of it, and of FSDP, which n streams do not take.
        out += '; with --overlap-moe-expert-parallel-comm and a stock schedule it may be 32 too'
    return (
        f'{setting}, which Megatron 0.17 to 0.19 demands of tensor parallelism on {hardware.name}: '
        f'streams do not overlap, and nothing here counts on it; {out}'
    )
