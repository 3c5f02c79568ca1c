"""The figures of a study: one row for each layout, number of streams and size of segments."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mhc.settings.residual import ResidualConfig
from megatron_mhc.sizing.memory import Layout
from megatron_mhc.study.sweep import Reason


@dataclass(frozen=True)
class Point:
    """One layout, with seconds of a step and bytes that the busiest rank sends in it.

    Args:
        layout: the ranks.
        residual: streams and segments.
        precision: what linear layers multiply in.
        recompute: segments of L_r, or ``full``.
        global_batch: sequences of a step.
        microbatches: m.
        step_s: the whole step.
        tokens_per_gpu_s: tokens a second and GPU.
        mfu: FLOPs of the model (``model_flops``) by what the GPUs could do.
        bubble_share: of the pipeline's time.
        exposed_pp_s: by how much hops make the step longer.
        exposed_tp_s: collectives of tensor parallelism.
        exposed_cp_s: keys and values of context parallelism that attention does not hide.
        exposed_ep_s: by how much the all-to-all makes the step longer.
        exposed_dp_s: gradient reduction behind the backward, and the gather of parameters.
        optimizer_s: Adam.
        mhc_overhead: by which share the step is longer than with standard residual connections.
        memory_gib: estimated, of the fullest rank.
        fits: within ``USABLE`` of a GPU.
        one_queue: needs ``CUDA_DEVICE_MAX_CONNECTIONS=1``, so that no streams overlap.
        pp_bytes, tp_bytes, cp_bytes, ep_bytes, dp_bytes: sent.
    """

    layout: Layout
    residual: ResidualConfig
    precision: str
    recompute: int | str
    global_batch: int
    microbatches: int
    step_s: float
    tokens_per_gpu_s: float
    mfu: float
    bubble_share: float
    exposed_pp_s: float
    exposed_tp_s: float
    exposed_cp_s: float
    exposed_ep_s: float
    exposed_dp_s: float
    optimizer_s: float
    mhc_overhead: float
    memory_gib: float
    fits: bool
    one_queue: bool
    pp_bytes: float
    tp_bytes: float
    cp_bytes: float
    ep_bytes: float
    dp_bytes: float

    @property
    def streams(self) -> int:
        """n; 1 without streams."""
        return self.residual.streams

    @property
    def schedule(self) -> str:
        """Of the pipeline; ``-`` where there is none."""
        return self.layout.schedule if self.layout.pp > 1 else '-'

    @property
    def schedule_name(self) -> str:
        """The same for people, with the chunks of ``interleaved``."""
        if self.layout.pp == 1:
            return 'no pipeline'
        chunks = self.layout.placement == 'interleaved'
        return self.schedule + (f' x{self.layout.vpp}' if chunks else '')

    @property
    def exposed(self) -> float:
        """Seconds of communication that nothing covers."""
        inner = self.exposed_tp_s + self.exposed_cp_s + self.exposed_ep_s
        return self.exposed_pp_s + inner + self.exposed_dp_s

    @property
    def sent(self) -> float:
        """Bytes that the busiest rank sends in a step."""
        return self.pp_bytes + self.tp_bytes + self.cp_bytes + self.ep_bytes + self.dp_bytes

    def as_dict(self) -> dict[str, object]:
        """Plain values, the layout's first."""
        layout = self.layout
        sizes = {
            **{name: getattr(layout, name) for name in ('gpus', 'tp', 'cp', 'pp')},
            'vpp': layout.chunks,
            **{name: getattr(layout, name) for name in ('ep', 'dp')},
            'schedule': self.schedule,
            'micro_batch': layout.micro_batch,
            'streams': self.streams,
            'recompute': self.recompute,
            'precision': self.precision,
        }
        rest = [field.name for field in dataclasses.fields(self)][4:]
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


def breakdown(point: Point) -> dict[str, float]:
    """Seconds of a step by what they are spent on; compute is what is left."""
    pipeline = point.step_s - point.exposed_dp_s - point.optimizer_s
    parts = {
        'bubble': max(0.0, point.bubble_share * pipeline - point.exposed_pp_s),
        'pipeline hops': point.exposed_pp_s,
        'tensor parallel': point.exposed_tp_s,
        'context parallel': point.exposed_cp_s,
        'expert all-to-all': point.exposed_ep_s,
        'data parallel': point.exposed_dp_s,
        'optimizer': point.optimizer_s,
    }
    return {'compute': point.step_s - sum(parts.values())} | parts


def best_of(points: Iterable[Point]) -> Point | None:
    """The shortest step of those that fit, then the least memory; None if none fits."""
    fitting = [point for point in points if point.fits]
    return min(fitting, key=lambda point: (point.step_s, point.memory_gib), default=None)


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
