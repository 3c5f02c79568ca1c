"""All patches in the order in which they are applied."""

from __future__ import annotations

from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
from megatron_mhc.patches.dataset_helpers import DATASET_HELPERS_PATCH
from megatron_mhc.patches.float_parameters import FLOAT_PARAMETER_PATCHES
from megatron_mhc.patches.gpt_model import GPT_MODEL_PATCH
from megatron_mhc.patches.p2p import P2P_PATCH
from megatron_mhc.patches.param_groups import PARAM_GROUPS_PATCH

RESIDUAL_PATCHES = (
    GPT_MODEL_PATCH,
    P2P_PATCH,
    PARAM_GROUPS_PATCH,
    *FLOAT_PARAMETER_PATCHES,
)
ALL_PATCHES = (DATASET_HELPERS_PATCH, ARGUMENTS_PATCH, *RESIDUAL_PATCHES)
