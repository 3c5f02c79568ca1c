"""Estimates every layout of a sweep: what ``points`` holds, from costs, pipeline and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable

from megatron_mhc.settings.names import PLANNED_SCHEDULES
from megatron_mhc.settings.residual import ResidualConfig
from megatron_mhc.sizing.flops import step_flops
from megatron_mhc.sizing.memory import USABLE, Layout, edge_bytes, rank_memory
from megatron_mhc.sizing.shape import ModelShape
from megatron_mhc.study.costs import CostModel
from megatron_mhc.study.hardware import Hardware
from megatron_mhc.study.kernels import BytesModel, Measured
from megatron_mhc.study.names import FULL
from megatron_mhc.study.pipeline import Case, Step, run_steps
from megatron_mhc.study.points import Point, Study
from megatron_mhc.study.seconds import Costs, RankCosts
from megatron_mhc.study.sweep import Reason, Sweep, legal_layouts

# Told how much there is to do; gives what is told how much more is done.
Progress = Callable[[int], contextlib.AbstractContextManager[Callable[[int], object]]]
STANDARD = ResidualConfig('standard')
_NOT_IN_A_V = Reason(
    100,
    'full recomputation is not modelled where a plan splits the backward and keeps what W needs',
    'choose --schedule 1f1b or interleaved, or another --segments',
)


def run_study(
    shape: ModelShape,
    sequences: int,
    sweep: Sweep,
    hardware: Hardware,
    kernels: BytesModel | Measured,
    progress: Progress = lambda total: contextlib.nullcontext(bool),
) -> Study:
    """Look at every combination.

    Args:
        shape: the model; its residual connections say whether there are streams at all.
        sequences: of a step, on the fewest GPUs where the sweep's batch grows.
        sweep: what to combine.
        hardware: the machine.
        kernels: seconds of residual connections.
        progress: told the number of cases, a context of what is told how many more are done.

    Raises:
        ValueError: no layout exists, or no kernel time.
    """
    layouts, refused = legal_layouts(sweep, shape, sequences)
    shapes = variants(shape, sweep)
    plain = {one: dataclasses.replace(one, residual=STANDARD) for one in shapes}
    models = {
        one: CostModel(one, hardware, kernels) for one in dict.fromkeys([*shapes, *plain.values()])
    }
    pairs = [(one, layout) for one in models for layout in layouts if _runs(one, layout)]
    if len(pairs) < len(models) * len(layouts):
        refused[_NOT_IN_A_V] += sum(not _runs(one, layout) for one in shapes for layout in layouts)
    if not pairs:
        raise ValueError(f'no layout exists: {_NOT_IN_A_V.words}; {_NOT_IN_A_V.remedy}')
    cases = []
    with progress(2 * len(pairs)) as advance:
        for one, layout in pairs:
            model = models[one]
            microbatches = layout.microbatches(sweep.batch(sequences, layout.gpus))
            stages, hop = model.stages(layout), model.hop(layout)
            overlap = 0.0 if hardware.one_queue(layout.tp, layout.cp) else hardware.slot_overlap
            cases.append(Case(layout, microbatches, stages, hop, overlap))
            advance(1)
        steps = run_steps(cases, advance)
    sizes = zip(pairs, cases, steps, strict=True)
    found = {
        pair: (case, step, models[pair[0]].step(pair[1], case.stages)) for pair, case, step in sizes
    }
    points = []
    for one in shapes:
        for layout in layouts:
            if _runs(one, layout):
                seconds = _seconds(*found[plain[one], layout][1:])
                batch = sweep.batch(sequences, layout.gpus)
                points.append(_point(one, batch, hardware, *found[one, layout], seconds))
    return Study(points, refused)


def variants(shape: ModelShape, sweep: Sweep) -> list[ModelShape]:
    """The model with every n, size of segments and precision of the sweep."""
    given, found = shape.residual, []
    for n in sweep.streams if given.has_streams else (given.streams,):
        for segments, precision in itertools.product(sweep.recompute, sweep.precision):
            full, residual = segments == FULL, given
            if given.has_streams:
                size = 'none' if full else segments
                residual = dataclasses.replace(
                    given, num_residual_streams=n, recompute_layer_num=size
                )
            fp8 = precision == 'fp8'
            found.append(
                dataclasses.replace(shape, residual=residual, fp8=fp8, full_recompute=full)
            )
    return list(dict.fromkeys(found))


def _runs(shape: ModelShape, layout: Layout) -> bool:
    planned = layout.pp > 1 and layout.schedule in PLANNED_SCHEDULES
    return not (shape.full_recompute and planned)


def _seconds(step: Step, once: RankCosts) -> float:
    return step.makespan + once.exposed_reduce + once.optimizer + once.gather


def _point(
    shape: ModelShape,
    sequences: int,
    hardware: Hardware,
    case: Case,
    step: Step,
    once: RankCosts,
    plain: float,
) -> Point:
    layout, m = case.layout, case.microbatches
    seconds = _seconds(step, once)
    ranks = rank_memory(shape, layout, sequences)
    kept = shape.residual.has_streams and shape.residual.recompute_layer_num != 'none'
    kept = kept or shape.full_recompute
    memory = max(rank.total_recompute if kept else rank.total for rank in ranks)
    peak = layout.gpus * hardware.peak(shape.value_bytes)
    return Point(
        layout=layout,
        residual=shape.residual,
        precision='fp8' if shape.fp8 else 'bf16' if shape.value_bytes == 2 else 'fp32',
        recompute=FULL if shape.full_recompute else shape.residual.recompute_layer_num,
        global_batch=sequences,
        microbatches=m,
        step_s=seconds,
        tokens_per_gpu_s=sequences * shape.sequence / layout.gpus / seconds,
        mfu=step_flops(shape, sequences) / peak / seconds,
        bubble_share=step.bubble_share,
        exposed_pp_s=step.hops,
        exposed_tp_s=m * _largest(case, lambda stage: stage.collectives),
        exposed_cp_s=m * _largest(case, lambda stage: stage.ring),
        exposed_ep_s=step.exchange,
        exposed_dp_s=once.exposed_reduce + once.gather,
        optimizer_s=once.optimizer,
        mhc_overhead=seconds / plain - 1,
        memory_gib=memory / 2**30,
        fits=memory <= USABLE * hardware.memory,
        one_queue=hardware.one_queue(layout.tp, layout.cp),
        pp_bytes=m * _edges(layout) * edge_bytes(shape, layout),
        tp_bytes=m * _largest(case, lambda stage: stage.tensor_bytes),
        cp_bytes=m * _largest(case, lambda stage: stage.ring_bytes),
        ep_bytes=m * _largest(case, lambda stage: stage.expert_bytes),
        dp_bytes=once.data_bytes,
    )


def _holders(layout: Layout) -> list[int]:
    """The pipeline rank of every stage, as far as it matters who holds several."""
    pp = layout.pp
    if layout.placement == 'v':
        return [*range(pp), *range(pp)[::-1]]
    return [stage % pp for stage in range(layout.stages)]


def _largest(case: Case, value: Callable[[Costs], float]) -> float:
    """Of all ranks, the sum over its stages."""
    sums: dict[int, float] = defaultdict(float)
    for holder, stage in zip(_holders(case.layout), case.stages, strict=True):
        sums[holder] += value(stage)
    return max(sums.values())


def _edges(layout: Layout) -> int:
    """Tensors that the busiest rank sends a microbatch: activations on, and gradients back."""
    holders = _holders(layout)
    sent: Counter[int] = Counter({0: 0})
    for a, b in zip(holders, holders[1:], strict=False):
        if a != b:
            sent[a] += 1
            sent[b] += 1
    return max(sent.values())
