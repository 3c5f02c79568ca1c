"""What a model's ``TransformerConfig`` carries for us, which model, optimizer and schedule share.

A caller may set any of these attributes before a model is built; ``GPTModel`` sets those that the
command line asks for (``patches/gpt_model.py``), so that whoever reads them later needs no flags.
"""

from __future__ import annotations

from typing import Any

from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.pipeline import PipelineConfig
from megatron_mhc.settings.residual import ResidualConfig


class OnConfig[T]:
    """One attribute of a ``TransformerConfig``, by its name there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def attach(self, config: Any, value: T | None) -> None:
        """Set it, for all that share ``config``."""
        setattr(config, self.name, value)

    def peek(self, config: Any) -> T | None:
        """Its value; None where nobody set it."""
        return getattr(config, self.name, None)


# Read by the pipeline's edges and step and by the p2p patch: width of an edge, where to rebuild.
RESIDUAL: OnConfig[ResidualConfig] = OnConfig('residual_config')
# Read by the optimizer's patch, which demands that some model has it. Set by ``engram/memory.py``.
ENGRAM: OnConfig[EngramConfig] = OnConfig('engram_config')
# Read by the patches of the schedule and of the experts: the plan that a step is run from.
PIPELINE: OnConfig[PipelineConfig] = OnConfig('pipeline_config')
# ``compute`` or ``high``. Read by the pipeline's step: whether fused slots take turns.
POST_STREAM: OnConfig[str] = OnConfig('mhc_post_stream')
