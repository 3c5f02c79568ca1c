"""Which layers of a hybrid pattern the emulated CPU device has."""

from __future__ import annotations

# Layers that need other packages, which need CUDA.
CUDA_ONLY = {'M': 'Mamba', 'G': 'gated delta net', 'D': 'sparse attention (DSA)'}


def check_pattern(pattern: str | None) -> None:
    """Raise ValueError for what of ``--hybrid-layer-pattern`` the CPU cannot run."""
    for symbol, name in CUDA_ONLY.items():
        if symbol in (pattern or ''):
            raise ValueError(
                f"--hybrid-layer-pattern {pattern}: not on the CPU device, '{symbol}' ({name}) "
                "needs CUDA kernels; use attention ('*' or '+'), MLP ('-') and experts ('E')."
            )
