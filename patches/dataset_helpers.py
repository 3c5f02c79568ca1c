"""Patch: the build step of Megatron's C++ dataset helpers, which a wheel cannot run. On any device.

The wheel ships the helpers built, but not the Makefile that Megatron calls at start-up; ``make``
fails and the run exits. A source tree has the Makefile and keeps its build step.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

from megatron_mhc.patches.engine import Patch, on_every_release


def ships_prebuilt_helpers() -> bool:
    """Whether the installed Megatron-Core has the built helpers and no Makefile to build them."""
    datasets = importlib.util.find_spec('megatron.core.datasets')
    if datasets is None or datasets.origin is None:
        return False
    folder = pathlib.Path(datasets.origin).parent
    built = importlib.util.find_spec('megatron.core.datasets.helpers_cpp') is not None
    return built and not (folder / 'Makefile').exists()


def _skip(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: None


DATASET_HELPERS_PATCH = Patch(
    id='dataset-helpers',
    target='megatron.core.datasets.utils:compile_helpers',
    wrap=_skip,
    reason='the wheel ships the data helpers built, without the Makefile that would build them',
    fingerprints=on_every_release('e3b0c442'),
    # A tree has the Makefile.
    in_tree=False,
)
