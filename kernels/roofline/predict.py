"""Time of a kernel on a GPU from its machine code: a model, never a measurement.

Each bound is the time that one resource alone would need; they overlap in part, which a 4-norm of
all and a start and end of 2 us stand for. Likely error 30 %, pessimistic where latency or the
load-store pipe binds. Bounds of resources follow Williams et al., "Roofline", and, for latency,
Little's law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mhc.kernels.roofline.gpus import Gpu
from megatron_mhc.kernels.roofline.pipes import TIMED
from megatron_mhc.kernels.roofline.profile import Section

LABEL = 'predicted, static model of the SASS, not measured; about 30 % off'
NORM = 4
ENDS = 2.0e-6  # seconds of every kernel in which not all SMs work
STARTED = 400  # cycles from the launch of a block to its first instruction
QUARTERS = 4  # of an SM, each with its own issue slot and pipes; the load-store pipe is shared


@dataclass(frozen=True)
class Work:
    """What a launch makes of its code.

    ``grid`` blocks of ``warps`` warps, of which an SM holds ``resident`` at a time (from verdict).
    ``dram_bytes`` are those of every tensor once, ``l2_bytes`` what is read again and comes from
    L2. ``passes`` is how often a program goes through each loop, inner loops per pass of the outer.
    """

    grid: int
    warps: int
    resident: int
    dram_bytes: int
    l2_bytes: int
    passes: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """``seconds``, and what each resource alone would need in ``bounds``, by its name.

    ``per_kilobyte`` are instructions of a warp for each 1000 bytes of memory traffic, by pipe;
    ``in_flight`` bytes that an SM has under way from memory on average, if nothing but its loads
    made it wait.
    """

    seconds: float
    bounds: dict[str, float]
    per_kilobyte: dict[str, float]
    in_flight: float

    @property
    def bound(self) -> str:
        """The resource that would take longest."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def copy_percent(self) -> float:
        """Time of a copy of the same bytes, in percent of the predicted time."""
        return 100 * self.bounds['dram'] / self.seconds


def predict(sections: Sequence[Section], work: Work, gpu: Gpu) -> Prediction:
    """The time of a launch whose code has ``sections``, in seconds.

    Raises:
        ValueError: the code has another number of loops than ``work.passes``.
    """
    if len(sections) != len(work.passes) + 1:
        raise ValueError(f'{len(sections) - 1} loops in the code, {len(work.passes)} expected')
    weights = _weights(sections, work.passes)
    spent, issued = _sums(sections, weights)
    blocks = math.ceil(work.grid / gpu.sms)  # of the busiest SM
    warps = blocks * work.warps
    bounds = {
        'dram': work.dram_bytes / gpu.copy,
        'l2': (work.dram_bytes + work.l2_bytes) / gpu.l2,
        'issue': warps * sum(issued.values()) / QUARTERS / gpu.clock,
    }
    for pipe in TIMED:
        share = 1 if pipe == 'lsu' else QUARTERS
        bounds[pipe] = warps * spent.get(pipe, 0.0) / share / gpu.clock
    alone = STARTED + sum(
        weight * section.latency for section, weight in zip(sections, weights, strict=True)
    )
    bounds['latency'] = alone * math.ceil(blocks / work.resident) / gpu.clock
    under_way = _in_flight(sections, weights, alone, gpu)
    kilobytes = work.dram_bytes / 1000
    total = work.grid * work.warps
    return Prediction(
        seconds=sum(bound**NORM for bound in bounds.values()) ** (1 / NORM) + ENDS,
        bounds=bounds,
        per_kilobyte={pipe: count * total / kilobytes for pipe, count in issued.items()},
        in_flight=under_way * min(blocks, work.resident) * work.warps,
    )


def _weights(sections: Sequence[Section], passes: tuple[float, ...]) -> list[float]:
    """How often each section runs in a program."""
    weights = [1.0]
    # A loop stands behind the one around it.
    for section, count in zip(sections[1:], passes, strict=True):
        weights.append(count * weights[section.inside or 0])
    return weights


def _sums(
    sections: Sequence[Section], weights: list[float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Cycles and instructions of one warp by pipe."""
    spent: dict[str, float] = {}
    issued: dict[str, float] = {}
    for section, weight in zip(sections, weights, strict=True):
        for pipe, count in section.issued.items():
            issued[pipe] = issued.get(pipe, 0.0) + weight * count
            spent[pipe] = spent.get(pipe, 0.0) + weight * section.cycles[pipe]
    return spent, issued


def _in_flight(sections: Sequence[Section], weights: list[float], cycles: float, gpu: Gpu) -> float:
    """Bytes of one warp under way in the mean of ``cycles``, each for the latency of memory."""
    loaded = sum(w * (s.loaded + s.copied) for s, w in zip(sections, weights, strict=True))
    return loaded * gpu.dram_cycles / cycles
