"""Megatron's layer layout for the inverted V, and for two copies of a model."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_mhc.schedules import mirrored
from megatron_mhc.schedules.inverted_v import CHUNKS, by_chunk_and_rank, holder_of, stage_of


class _TwoStages(PipelineParallelLayerLayout):
    """A layout whose ranks hold two stages each, in another order than Megatron's."""

    # Layers of every stage, in forward order.
    _stages: list[list[LayerType]]

    def _stage_of(self, rank: int, chunk: int) -> int:
        raise NotImplementedError

    def get_layer_offset(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Number of layers of ``layer_type`` before this chunk, in forward order."""
        if pp_rank is None:
            pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        before = self._stages[: self._stage_of(pp_rank, vp_stage or 0)]
        return sum(layers.count(layer_type) for layers in before)


class InvertedVLayout(_TwoStages):
    """A layer layout written in stage order (``Et|tt|tt|tL``) and held in an inverted V.

    Args:
        layout: one entry a stage, first to last, in Megatron's notation (string or list of lists).
        pipeline_model_parallel_size: P; the layout has 2 P stages.
    """

    def __init__(self, layout: str | list[Any], pipeline_model_parallel_size: int) -> None:
        ranks = pipeline_model_parallel_size
        stages = (
            self.parse_str_to_list(layout) if isinstance(layout, str) else [list(s) for s in layout]
        )
        if len(stages) != CHUNKS * ranks:
            raise ValueError(
                f'--pipeline-model-parallel-layout {layout}: {len(stages)} stages, but a V on '
                f'{ranks} pipeline ranks has {CHUNKS * ranks}; separate them by |'
            )
        super().__init__(by_chunk_and_rank(stages, ranks), ranks)
        self.input_data = layout
        holders = (holder_of(stage, ranks) for stage in range(CHUNKS * ranks))
        self._stages = [self.layout[rank][chunk] for rank, chunk in holders]
        # In stage order, as the checks of the base class expect it.
        self.flatten_layout = [layer for stage in self._stages for layer in stage]

    def _stage_of(self, rank: int, chunk: int) -> int:
        return stage_of(rank, chunk, self.pipeline_model_parallel_size)


class MirroredLayout(_TwoStages):
    """The stages of a model, written twice (``mirrored.doubled``), held by two ranks each.

    Args:
        layout: one entry a stage, first to last, and again.
        pipeline_model_parallel_size: P, as many as stages.
    """

    def __init__(self, layout: str, pipeline_model_parallel_size: int) -> None:
        ranks = pipeline_model_parallel_size
        stages = self.parse_str_to_list(mirrored.single(layout))
        if len(stages) != ranks:
            raise ValueError(
                f'--pipeline-model-parallel-layout {layout}: {len(stages)} stages, but each copy '
                f'has one on each of {ranks} pipeline ranks; give {ranks} stages separated by |'
            )
        super().__init__(
            [stages[mirrored.stage_of(r, c, ranks)] for c in range(CHUNKS) for r in range(ranks)],
            ranks,
        )
        self.input_data = layout
        # One copy, in stage order, as the checks of the base class expect it.
        self._stages = [
            self.layout[stage][mirrored.chunk_of(stage, ranks)] for stage in range(ranks)
        ]
        self.flatten_layout = [layer for stage in self._stages for layer in stage]

    def _stage_of(self, rank: int, chunk: int) -> int:
        return mirrored.stage_of(rank, chunk, self.pipeline_model_parallel_size)
