"""What ``megatron-mhc patch`` puts above a ``def`` of a user's Megatron tree: a seam with a switch.

A seam passes every call on, unchanged, until ``patches/engine.py`` applies its patch; then calls go
through the patch, whoever imported the name and when. The parser's seam applies its own patch when
it is first called, so that a pretrain script needs neither the launcher nor an import of ours.

Megatron's modules import this one while they are being imported themselves, hence nothing but the
standard library here.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.patches.placed import PLACED, Seam, plain

ENTRY = 'arguments'


def mhc_seam(id: str, accept: str | None = None) -> Callable[[Any], Any]:
    """Decorator: the place of patch ``id``.

    Args:
        id: of a patch in ``megatron_mhc/patches``.
        accept: fingerprint of a signature that no release has and that the user vouches for.
    """

    def place(declared: Any) -> Any:
        function, rebuild = plain(declared)
        seam = PLACED[id] = Seam(function, function, accept)
        if id == ENTRY:
            seam.current = functools.partial(_enter, seam)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return seam.current(*args, **kwargs)

        call.__dict__['seam'] = seam
        return rebuild(call)

    return place


def _enter(seam: Seam, *args: Any, **kwargs: Any) -> Any:
    from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
    from megatron_mhc.patches.engine import apply

    try:
        apply((ARGUMENTS_PATCH,))
    except RuntimeError as error:
        refuse(os.path.basename(sys.argv[0]), str(error))
    return seam.current(*args, **kwargs)
