"""The groups of flags that Megatron's parser gains. Light: the launcher's help needs them alone."""

from __future__ import annotations

from megatron_mhc.optim.lr_steps import add_lr_step_arguments
from megatron_mhc.settings.flags_engram import add_engram_arguments
from megatron_mhc.settings.flags_monitor import add_monitor_arguments
from megatron_mhc.settings.flags_pipeline import add_pipeline_arguments
from megatron_mhc.settings.flags_residual import add_residual_arguments

# What adds our argument groups, in the order in which --help shows them.
GROUPS = (
    add_residual_arguments,
    add_engram_arguments,
    add_pipeline_arguments,
    add_lr_step_arguments,
    add_monitor_arguments,
)
