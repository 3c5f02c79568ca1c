"""Which layers of a hybrid pattern the emulated CPU device has."""

from __future__ import annotations

from megatron_mhc.inputs.refusal import announce
from megatron_mhc.patches.hybrid_mixers import MIXERS

# Layers that need other packages, which need CUDA.
CUDA_ONLY = {'D': 'sparse attention (DSA)'}


def check_pattern(pattern: str | None) -> None:
    """Raise ValueError for what of ``--hybrid-layer-pattern`` the CPU cannot run.

    What it runs in torch alone is said.
    """
    for symbol, name in CUDA_ONLY.items():
        if symbol in (pattern or ''):
            raise ValueError(
                f"--hybrid-layer-pattern {pattern}: not on the CPU device, '{symbol}' ({name}) "
                "needs CUDA kernels; use others (attention is '*' or '+')."
            )
    # See cpu_mixers.
    slow = [name for symbol, name in MIXERS.items() if symbol in (pattern or '')]
    if slow:
        announce(f'{" and ".join(slow)} layers run in plain torch here, for their function alone')
