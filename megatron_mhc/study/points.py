"""The figures of a study: one row for each layout, number of streams and size of segments."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_mhc.settings.residual import ResidualConfig
from megatron_mhc.sizing.flops import step_flops
from megatron_mhc.sizing.memory import USABLE, Layout, edge_bytes, rank_memory
from megatron_mhc.sizing.shape import ModelShape
from megatron_mhc.study.costs import CostModel, Costs, RankCosts
from megatron_mhc.study.hardware import Hardware
from megatron_mhc.study.kernels import BytesModel, Measured
from megatron_mhc.study.pipeline import Case, Step, run_steps
from megatron_mhc.study.sweep import Reason, Sweep, legal_layouts

STANDARD = ResidualConfig('standard')


@dataclass(frozen=True)
class Point:
    """One layout, with seconds of a step and bytes that the busiest rank sends in it.

    Args:
        layout: the ranks.
        residual: streams and segments.
        microbatches: m.
        step_s: the whole step.
        tokens_per_gpu_s: tokens a second and GPU.
        mfu: FLOPs of the model (``model_flops``) by what the GPUs could do.
        bubble_share: of the pipeline's time.
        exposed_pp_s: by how much hops make the step longer.
        exposed_tp_s: collectives of tensor parallelism.
        exposed_ep_s: by how much the all-to-all makes the step longer.
        exposed_dp_s: gradient reduction behind the backward, and the gather of parameters.
        optimizer_s: Adam.
        mhc_overhead: by which share the step is longer than with standard residual connections.
        memory_gib: estimated, of the fullest rank.
        fits: within ``USABLE`` of a GPU.
        one_queue: needs ``CUDA_DEVICE_MAX_CONNECTIONS=1``, so that no streams overlap.
        pp_bytes, tp_bytes, ep_bytes, dp_bytes: sent.
    """

    layout: Layout
    residual: ResidualConfig
    microbatches: int
    step_s: float
    tokens_per_gpu_s: float
    mfu: float
    bubble_share: float
    exposed_pp_s: float
    exposed_tp_s: float
    exposed_ep_s: float
    exposed_dp_s: float
    optimizer_s: float
    mhc_overhead: float
    memory_gib: float
    fits: bool
    one_queue: bool
    pp_bytes: float
    tp_bytes: float
    ep_bytes: float
    dp_bytes: float

    @property
    def streams(self) -> int:
        """n; 1 without streams."""
        return self.residual.streams

    def as_dict(self) -> dict[str, object]:
        """Plain values, the layout's first."""
        layout = self.layout
        sizes = {
            **{name: getattr(layout, name) for name in ('gpus', 'tp', 'pp')},
            'vpp': layout.chunks,
            **{name: getattr(layout, name) for name in ('ep', 'dp')},
            'schedule': layout.schedule if layout.pp > 1 else '-',
            'micro_batch': layout.micro_batch,
            'streams': self.streams,
            'recompute': self.residual.recompute_layer_num,
        }
        rest = [field.name for field in dataclasses.fields(self)][2:]
        return sizes | {name: getattr(self, name) for name in rest}


@dataclass(frozen=True)
class Study:
    """Everything that was found.

    Args:
        points: of all layouts that exist.
        refused: how many do not, for which reason.
    """

    points: list[Point]
    refused: Counter[Reason]

    @property
    def streams(self) -> dict[int, list[Point]]:
        """Points by n: another n is another model, and not a faster layout of the same."""
        found: dict[int, list[Point]] = {}
        for point in self.points:
            found.setdefault(point.streams, []).append(point)
        return found


def best_of(points: Iterable[Point]) -> Point | None:
    """The shortest step of those that fit, then the least memory; None if none fits."""
    fitting = [point for point in points if point.fits]
    return min(fitting, key=lambda point: (point.step_s, point.memory_gib), default=None)


def run_study(
    shape: ModelShape,
    sequences: int,
    sweep: Sweep,
    hardware: Hardware,
    kernels: BytesModel | Measured,
    progress: Callable[[int], Callable[[int], object]] = lambda total: bool,
) -> Study:
    """Look at every combination.

    Args:
        shape: the model; its residual connections say whether there are streams at all.
        sequences: of a step.
        sweep: what to combine.
        hardware: the machine.
        kernels: seconds of residual connections.
        progress: told the number of cases, gives what is told how many more are done.

    Raises:
        ValueError: no layout exists, or no kernel time.
    """
    layouts, refused = legal_layouts(sweep, shape, sequences)
    variants = residuals(shape.residual, sweep)
    models = {
        residual: CostModel(dataclasses.replace(shape, residual=residual), hardware, kernels)
        for residual in {*variants, STANDARD}
    }
    pairs = [(residual, layout) for residual in models for layout in layouts]
    advance = progress(2 * len(pairs))
    cases = []
    for residual, layout in pairs:
        model = models[residual]
        microbatches = layout.microbatches(sequences)
        stages, hop = model.stages(layout), model.hop(layout)
        overlap = 0.0 if hardware.one_queue(layout.tp) else hardware.slot_overlap
        cases.append(Case(layout, microbatches, stages, hop, overlap))
        advance(1)
    steps = run_steps(cases, advance)
    sizes = zip(pairs, cases, steps, strict=True)
    found = {
        pair: (case, step, models[pair[0]].step(pair[1], case.stages)) for pair, case, step in sizes
    }
    points = []
    for residual in variants:
        for layout in layouts:
            plain = _seconds(*found[STANDARD, layout][1:])
            shape = models[residual].shape
            points.append(_point(shape, sequences, hardware, *found[residual, layout], plain))
    return Study(points, refused)


def residuals(given: ResidualConfig, sweep: Sweep) -> list[ResidualConfig]:
    """The kinds of residual connections to look at, as the sweep varies them."""
    if not given.has_streams:
        return [given]
    return [
        dataclasses.replace(given, num_residual_streams=n, recompute_layer_num=segments)
        for n in sweep.streams
        for segments in sweep.recompute
    ]


def pareto(points: Iterable[Point]) -> list[Point]:
    """Those that fit and that no other beats in step time, memory and GPUs; fastest first."""
    points = (point for point in points if point.fits)
    ordered = sorted(points, key=lambda p: (p.step_s, p.memory_gib, p.layout.gpus))
    front: list[Point] = []
    for point in ordered:
        beaten = any(
            other.memory_gib <= point.memory_gib and other.layout.gpus <= point.layout.gpus
            for other in front
        )
        if not beaten:
            front.append(point)
    return front


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
    memory = max(rank.total_recompute if kept else rank.total for rank in ranks)
    peak = layout.gpus * hardware.peak(shape.value_bytes)
    return Point(
        layout=layout,
        residual=shape.residual,
        microbatches=m,
        step_s=seconds,
        tokens_per_gpu_s=sequences * shape.sequence / layout.gpus / seconds,
        mfu=step_flops(shape, sequences) / peak / seconds,
        bubble_share=step.bubble_share,
        exposed_pp_s=step.hops,
        exposed_tp_s=m * _largest(case, lambda stage: stage.collectives),
        exposed_ep_s=step.exchange,
        exposed_dp_s=once.exposed_reduce + once.gather,
        optimizer_s=once.optimizer,
        mhc_overhead=seconds / plain - 1,
        memory_gib=memory / 2**30,
        fits=memory <= USABLE * hardware.memory,
        one_queue=hardware.one_queue(layout.tp),
        pp_bytes=m * _edges(layout) * edge_bytes(shape, layout),
        tp_bytes=m * _largest(case, lambda stage: stage.tensor_bytes),
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
