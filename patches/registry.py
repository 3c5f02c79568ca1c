"""All patches in the order in which they are applied."""

from __future__ import annotations

from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
from megatron_mhc.patches.combined_passes import COMBINED_PASSES_PATCHES
from megatron_mhc.patches.dataset_helpers import DATASET_HELPERS_PATCH
from megatron_mhc.patches.engine import Patch
from megatron_mhc.patches.float_parameters import FLOAT_PARAMETER_PATCHES
from megatron_mhc.patches.flops import FLOPS_PATCH
from megatron_mhc.patches.gpt_model import GPT_MODEL_PATCH
from megatron_mhc.patches.hybrid_model import HYBRID_MODEL_PATCHES
from megatron_mhc.patches.inverted_v import INVERTED_V_PATCHES
from megatron_mhc.patches.lr_steps import LR_STEPS_PATCH
from megatron_mhc.patches.mirrored import MIRRORED_PATCHES
from megatron_mhc.patches.moe_lanes import MOE_LANE_PATCHES
from megatron_mhc.patches.monitor import MONITOR_PATCHES
from megatron_mhc.patches.p2p import P2P_PATCH
from megatron_mhc.patches.param_groups import PARAM_GROUPS_PATCHES
from megatron_mhc.patches.pipeline_schedule import PIPELINE_SCHEDULE_PATCHES
from megatron_mhc.patches.run_start import RUN_START_PATCH
from megatron_mhc.patches.save_checkpoint import SAVE_CHECKPOINT_PATCH
from megatron_mhc.patches.skipped_iterations import SKIPPED_ITERATIONS_PATCH
from megatron_mhc.patches.tied_embedding import TIED_EMBEDDING_PATCH
from megatron_mhc.settings.pipeline import PipelineConfig

MODEL_PATCHES = (GPT_MODEL_PATCH, *HYBRID_MODEL_PATCHES, TIED_EMBEDDING_PATCH)
RESIDUAL_PATCHES = (
    *MODEL_PATCHES,
    P2P_PATCH,
    *PARAM_GROUPS_PATCHES,
    *FLOAT_PARAMETER_PATCHES,
)
ENGRAM_PATCHES = (*MODEL_PATCHES, P2P_PATCH, *PARAM_GROUPS_PATCHES)
# Megatron's training loop, which a caller of megatron.core alone does not load.
TRAINING_PATCHES = (FLOPS_PATCH, RUN_START_PATCH)
SCHEDULE_PATCHES = (
    *MODEL_PATCHES,
    *INVERTED_V_PATCHES,
    *PIPELINE_SCHEDULE_PATCHES,
    *MOE_LANE_PATCHES,
)
LINE_PATCHES = (*MODEL_PATCHES, *PIPELINE_SCHEDULE_PATCHES)
COPIES_PATCHES = (
    *MODEL_PATCHES,
    *MIRRORED_PATCHES,
    *PIPELINE_SCHEDULE_PATCHES,
    *MOE_LANE_PATCHES,
)
# Beside them where Megatron's training loop runs.
SCHEDULE_TRAINING_PATCHES = (RUN_START_PATCH, SAVE_CHECKPOINT_PATCH, SKIPPED_ITERATIONS_PATCH)
_ORDERED = (
    DATASET_HELPERS_PATCH,
    ARGUMENTS_PATCH,
    *RESIDUAL_PATCHES,
    *TRAINING_PATCHES,
    *SCHEDULE_PATCHES,
    *MIRRORED_PATCHES,
    *SCHEDULE_TRAINING_PATCHES,
    *COMBINED_PASSES_PATCHES,
    *MONITOR_PATCHES,
    LR_STEPS_PATCH,
)
ALL_PATCHES = tuple({patch.id: patch for patch in _ORDERED}.values())


def schedule_patches(pipeline: PipelineConfig) -> tuple[Patch, ...]:
    """Those of a schedule that is run from a plan."""
    if pipeline.mirrored:
        return COPIES_PATCHES
    return SCHEDULE_PATCHES if pipeline.on_v else LINE_PATCHES
