"""The seams of a user's tree as data that needs no Megatron: ``seams.json``, and a table of them.

``python -m megatron_mhc.patches.seam_table`` writes both from the registry; a test compares them.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from megatron_mhc.patches.engine import Patch
from megatron_mhc.patches.lr_steps import LR_STEPS_PATCH
from megatron_mhc.patches.monitor import MONITOR_PATCHES
from megatron_mhc.patches.registry import (
    ALL_PATCHES,
    COPIES_PATCHES,
    ENGRAM_PATCHES,
    RESIDUAL_PATCHES,
    SCHEDULE_PATCHES,
    SCHEDULE_TRAINING_PATCHES,
    TRAINING_PATCHES,
)

FOLDER = pathlib.Path(__file__).resolve().parent
BEGIN, END = '<!-- seams -->\n', '<!-- end of seams -->\n'


def rows() -> list[dict[str, Any]]:
    """Everything that ``megatron-mhc patch`` has to know of each seam, in the registry's order."""
    return [
        {
            'id': patch.id,
            'target': patch.target,
            'needed_by': _needed_by(patch),
            'reason': patch.reason,
            'reads': list(patch.reads),
            'fingerprints': dict(sorted(patch.fingerprints.items())),
        }
        for patch in ALL_PATCHES
        if patch.in_tree
    ]


def _needed_by(patch: Patch) -> str:
    uses = {
        '--residual-type': RESIDUAL_PATCHES + TRAINING_PATCHES,
        '--engram-layers': ENGRAM_PATCHES + TRAINING_PATCHES,
        '--pipeline-schedule': SCHEDULE_PATCHES + COPIES_PATCHES + SCHEDULE_TRAINING_PATCHES,
        '--mhc-monitor': MONITOR_PATCHES,
        '--lr-decay-style step': (LR_STEPS_PATCH,),
    }
    return ', '.join(flag for flag, patches in uses.items() if patch in patches) or 'every flag'


def table() -> str:
    """The seams as a Markdown table."""
    lines = ['| seam | put on | needed by | why |', '| --- | --- | --- | --- |']
    for row in rows():
        releases = ', '.join(row['fingerprints'])
        everywhere = len(row['fingerprints']) == len(ALL_PATCHES[0].fingerprints)
        only = '' if everywhere else f' (core {releases})'
        target = row['target'].removeprefix('megatron.')
        lines.append(f'| `{row["id"]}` | `{target}`{only} | {row["needed_by"]} | {row["reason"]} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Write ``seams.json`` and the table in ``README.md``."""
    (FOLDER / 'seams.json').write_text(json.dumps(rows(), indent=1) + '\n')
    readme = FOLDER / 'README.md'
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == '__main__':
    main()
