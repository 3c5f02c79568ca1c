"""``megatron-mhc convert SRC DST --to megatron``: back from a folder of transformers'."""

from __future__ import annotations

import pathlib

from megatron_mhc.convert.conversion import Progress, silent
from megatron_mhc.convert.hf.export import Exported
from megatron_mhc.convert.output import (
    Content,
    atomic_folder,
    check_destination,
    write_distributed,
)
from megatron_mhc.convert.source import open_source


def restore(
    source: str | pathlib.Path,
    destination: str | pathlib.Path,
    *,
    dry_run: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a ``torch_dist`` release of Megatron's; arguments as for ``export``.

    What ``export`` wrote comes back under the names it had, with every bit. The saved arguments are
    Megatron's defaults but for those that describe the model.

    Raises:
        ValueError: SRC is no such folder, or cannot be read; nothing was then written.
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination)
    check_destination(destination, source, overwrite)
    opened = open_source(source)
    if opened.format != 'hf':
        raise ValueError(
            f'--to megatron: {source} is no folder that transformers reads, but one of Megatron '
            'already; choose another layout, or hf'
        )
    content = Content(opened, list(opened.entries), {}, {**opened.common, 'iteration': 0})
    report = Exported(opened.config, len(opened.entries), content.nbytes, 0)
    if dry_run:
        return report
    with atomic_folder(destination) as folder:
        with (progress or silent)(content.nbytes) as content.advance:
            write_distributed(folder, content)
        if verify:
            from megatron_mhc.convert.hf.verify import require_equal

            report.verified = require_equal(folder, opened.folder)
    return report
