"""What a step does on this rank, counted: lanes that hand over, activations that stages keep."""

from __future__ import annotations

import contextlib
import weakref

from megatron_mhc.patches import combined_passes
from megatron_mhc.pipeline.chunk_stage import ChunkStage
from megatron_mhc.schedules.executor_lanes import _Lanes


@contextlib.contextmanager
def counted_lanes():
    """How often passes run at once on this rank, and how often they hand over."""
    counts, run_lanes, hand_over = [0, 0], combined_passes.run_lanes, _Lanes.hand_over

    def counted(*passes):
        counts[0] += 1
        return run_lanes(*passes)

    def handed(lanes):
        counts[1] += 1
        return hand_over(lanes)

    combined_passes.run_lanes, _Lanes.hand_over = counted, handed
    try:
        yield counts
    finally:
        combined_passes.run_lanes, _Lanes.hand_over = run_lanes, hand_over


@contextlib.contextmanager
def counted_activations():
    """The most microbatches whose graph or weight gradients the stages of this rank have kept."""
    held, stages, forward = [0], weakref.WeakSet(), ChunkStage.forward

    def counted(stage, microbatch, x):
        result = forward(stage, microbatch, x)
        stages.add(stage)
        held[0] = max(held[0], sum(len(one._kept) + len(one._weights) for one in stages))
        return result

    ChunkStage.forward = counted
    try:
        yield held
    finally:
        ChunkStage.forward = forward
