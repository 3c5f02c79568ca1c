"""The groups of flags that Megatron's parser gains. Light: the launcher's help needs them alone."""

from __future__ import annotations

from megatron_mhc.optim.lr_steps import add_lr_step_arguments
from megatron_mhc.settings.groups import (
    ENGRAM_FLAGS,
    MONITOR_FLAGS,
    PIPELINE_FLAGS,
    RESIDUAL_FLAGS,
)

# What adds our argument groups, in the order in which --help shows them.
GROUPS = (
    RESIDUAL_FLAGS,
    ENGRAM_FLAGS,
    PIPELINE_FLAGS,
    add_lr_step_arguments,
    MONITOR_FLAGS,
)
