"""``megatron-mhc study --calibrate``: published figures beside what the study makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_mhc.inputs.table import table
from megatron_mhc.recipes.recipe import RECIPES
from megatron_mhc.schedules.catalog import make_plan
from megatron_mhc.schedules.longest_path import Path, walk
from megatron_mhc.schedules.plan import Kind, Plan
from megatron_mhc.schedules.validator import live_activations
from megatron_mhc.sizing.memory import Layout
from megatron_mhc.study.estimate import run_study
from megatron_mhc.study.hardware import Hardware
from megatron_mhc.study.kernels import BytesModel
from megatron_mhc.study.presets import PRESETS
from megatron_mhc.study.published import DUALPIPE, MHC_OVERHEAD, ZERO_BUBBLE
from megatron_mhc.study.sweep import Sweep

H800 = PRESETS['h800']
_MHC_LAYOUT = Layout(64, pp=4, ep=8)


class Row(NamedTuple):
    """One published figure.

    Args:
        source: where it is published.
        setting: what it is of.
        published: the figure.
        ours: the study's.
        unit: ``share``, ``units`` or ``overhead``.
    """

    source: str
    setting: str
    published: float
    ours: float
    unit: str

    @property
    def error(self) -> float:
        """Ours minus published; relative where the published figure is a time or a number."""
        return (
            self.ours - self.published if self.unit != 'units' else self.ours / self.published - 1
        )


def calibration() -> list[Row]:
    """All figures; nothing is fitted to them."""
    return [*_zero_bubble(), *_dualpipe(), *_overhead()]


def _zero_bubble() -> Iterator[Row]:
    source = 'ZB table 5'
    for one in ZERO_BUBBLE:
        times, hop = one.profile[:3], one.profile[3]
        for name, published in zip(('1f1b', 'interleaved', 'zb-h1'), one.rates, strict=True):
            chunks = one.layers // one.pp if name == 'interleaved' else 1
            plan = make_plan(name, one.pp, one.microbatches, chunks=chunks)
            step, work = _step(plan, chunks, times, hop)
            setting = f'{name} p{one.pp} m{one.microbatches}'
            yield Row(source, setting, published, (step - work) / step, 'share')
            if name == 'interleaved':
                # The paper leaves out p of the hops from the last rank back to the first.
                step -= one.pp * hop
                label = 'ZB, as it counts hops'
                yield Row(
                    label, f'{setting}, {one.pp} less', published, (step - work) / step, 'share'
                )


def _dualpipe() -> Iterator[Row]:
    for pp in (8, 16):
        for name, (bubble, copies, live) in DUALPIPE.items():
            plan = make_plan(name, pp, 4 * pp)
            step, work = _step(plan, 1, (1.0, 1.0, 1.0), 0.0)
            source = 'DualPipe table'
            label = f'{name} P{pp}'
            yield Row(source, f'{label} bubble', bubble(pp, 1, 1, 1), step - work, 'units')
            held = max(live_activations(plan))
            yield Row(source, f'{label} activations', live(pp), held, 'units')
            yield Row(source, f'{label} parameters', copies, plan.directions, 'units')


def _overhead() -> Iterator[Row]:
    """27B on 64 H800: the paper names neither machine nor layout nor the speed of its kernels."""
    hidden = dataclasses.replace(H800, post_overlap=1.0)
    for label, hardware, segments in (
        ('nothing hidden, stage recomputed', H800, 'stage'),
        ('F_post,res of MLPs hidden, stage recomputed', hidden, 'stage'),
        ('nothing hidden, nothing recomputed', H800, 'none'),
        ('F_post,res of MLPs hidden, nothing recomputed', hidden, 'none'),
    ):
        yield Row('mHC 4.3.3', label, MHC_OVERHEAD, mhc_overhead(hardware, segments), 'overhead')


def mhc_overhead(hardware: Hardware, segments: int | str) -> float:
    """Share by which the paper's 27B takes longer with n = 4 under ``dualpipev`` on 64 GPUs."""
    recipe, layout = RECIPES['27b'], _MHC_LAYOUT
    sweep = Sweep(
        *((layout.gpus,), (layout.tp,), (layout.pp,), (layout.ep,)),
        schedule=('dualpipev',),
        recompute=(segments,),
    )
    study = run_study(recipe.shape(), recipe.batch, sweep, hardware, BytesModel(hardware))
    return study.points[0].mhc_overhead


def _step(
    plan: Plan, chunks: int, times: tuple[float, float, float], hop: float
) -> tuple[float, float]:
    """Makespan of a plan, and the busiest rank's work."""
    path = walk(plan)
    forward, input_grad, weight_grad = (time / chunks for time in times)
    whole = {
        Kind.F: forward,
        Kind.I: input_grad,
        Kind.W: weight_grad,
        Kind.B: input_grad + weight_grad,
    }
    duration = {work: sum(whole[kind] for kind, _ in work) for rank in path.ranks for work in rank}
    return path.makespan(duration, hop), _work(path, duration)


def _work(path: Path, duration: dict[Any, float]) -> float:
    return max(sum(n * duration[work] for work, n in rank.items()) for rank in path.ranks)


def as_text(rows: list[Row]) -> str:
    """The table, its worst errors by source, and what was assumed."""
    cells = [('source', 'setting', 'published', 'ours', 'error')]
    for row in rows:
        digits = 4 if row.unit != 'units' else 1
        error = f'{row.error:+z.4f}' if row.unit != 'units' else f'{row.error:+z.1%}'
        figures = (f'{row.published:.{digits}f}', f'{row.ours:.{digits}f}', error)
        cells.append((row.source, row.setting, *figures))
    lines = [*table(cells, '<<>'), '']
    for source in dict.fromkeys(row.source for row in rows):
        errors = [abs(row.error) for row in rows if row.source == source]
        lines.append(f'{source}: {len(errors)} figures, largest error {max(errors):.4f}')
    lines += [
        '',
        'mHC 4.3.3: 27B, 64 x H800, pp 4, ep 8, dualpipev, 80 microbatches of one sequence; linear',
        f'layers at {H800.gemm_efficiency:.0%} of peak, attention at '
        f'{H800.attention_efficiency:.0%}, mHC kernels from bytes at {H800.kernel_efficiency:.0%} '
        'of memory bandwidth.',
        'The paper states none of these; nothing was fitted.',
    ]
    return '\n'.join(lines)
