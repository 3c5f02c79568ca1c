"""The groups of flags, as ``--help`` and the page of flags show them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.flag import add_options
from megatron_mhc.settings.flags_lr import LrSteps
from megatron_mhc.settings.flags_monitor import MonitorConfig
from megatron_mhc.settings.pipeline import PipelineConfig, PipelineOptions
from megatron_mhc.settings.residual import ResidualConfig


@dataclass(frozen=True)
class Group:
    """Settings whose flags stand together; called with a parser, it adds them."""

    title: str
    description: str
    settings: tuple[type, ...]

    def __call__(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        group = parser.add_argument_group(self.title, self.description)
        for cls in self.settings:
            add_options(group, cls)
        return parser


RESIDUAL_FLAGS = Group(
    'residual connections',
    'Hyper-connections (HC, arXiv 2409.19606) and manifold-constrained hyper-connections (mHC, '
    'arXiv 2512.24880): n parallel residual streams of the hidden size. Multiway dynamic dense '
    'connections (MUDD, arXiv 2502.12170): sums of the outputs of all earlier layers. Gated '
    'residual (Qwen4-Exp): a gate for every channel. Attention Residuals (arXiv 2603.15031).',
    (ResidualConfig,),
)
ENGRAM_FLAGS = Group(
    'conditional memory',
    'Engram (arXiv 2601.07372): layers read tables of hashed n-grams of token ids. Works with '
    'every residual type; without --engram-layers nothing changes.',
    (EngramConfig,),
)
PIPELINE_FLAGS = Group(
    'pipeline schedules',
    'Schedules as data, proved before they run (megatron-mhc schedule shows them). All but 1f1b, '
    '1f1b-overlap, zb-h1 and interleaved hold two chunks per rank in a V, with both ends of the '
    'model on the last pipeline rank.',
    (PipelineConfig, PipelineOptions),
)
LR_FLAGS = Group(
    'learning rate steps',
    '--lr-decay-style step: warm-up, the base rate, then a multiple of it from each milestone on, '
    'never below --min-lr. With every residual type.',
    (LrSteps,),
)
MONITOR_FLAGS = Group(
    'monitors',
    "Stability of hyper-connections, as mhc/... through Megatron's TensorBoard and W&B writers "
    '(megatron-mhc report draws them). Measured in the first microbatch of the step that is '
    'reported; until then nothing waits for the device.',
    (MonitorConfig,),
)

EVERY_GROUP = (RESIDUAL_FLAGS, ENGRAM_FLAGS, PIPELINE_FLAGS, LR_FLAGS, MONITOR_FLAGS)
