"""Options that several commands have: one thing, one word.

The first name is the one of help, messages and pages; the others are older ones, and Megatron's or
the launcher's for the same thing. They are taken as well.
"""

from __future__ import annotations

import argparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STREAMS = ('--num-residual-streams', '--num-streams', '--mhc-num-residual-streams')
SEGMENTS = ('--segments', '--blocks', '--recompute', '--mhc-recompute-layer-num')
CHUNKS = ('--vpp', '--chunks', '--num-virtual-stages-per-pipeline-rank')
SCHEDULE = ('--schedule', '--pipeline-schedule')
CP = ('--cp', '--context-parallel-size')
TP = ('--tp', '--tensor-model-parallel-size')
PP = ('--pp', '--pipeline-model-parallel-size')
EP = ('--ep', '--expert-model-parallel-size')
MICRO_BATCH = ('--micro-batch-size', '--micro-batch')
KERNEL_BACKEND = ('--kernel-backend', '--mhc-kernel-backend')
SUBLAYERS = ('--num-sublayers', '--sublayers')
FULL = ('--recompute-num-layers', '--full')
REBUILDING = ('--recompute-time', '--recompute')
STEP = ('--step', '--ckpt-step')


class WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Not ``in``, for which 0.0 is False.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def add_option(add: Any, names: tuple[str, ...], **settings: Any) -> None:
    """An option with several names, of which help has the first.

    Args:
        add: ``add_argument`` of a parser or a group.
        names: all of them.
        settings: of ``add_argument``.
    """
    action = add(names[0], **settings)
    settings |= {'dest': action.dest, 'default': argparse.SUPPRESS, 'help': argparse.SUPPRESS}
    for name in names[1:]:
        add(name, **settings)
