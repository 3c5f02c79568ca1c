"""Which layers of a hybrid pattern the emulated CPU device runs for their function alone."""

from __future__ import annotations

from megatron_mhc.inputs.refusal import announce
from megatron_mhc.patches.hybrid_mixers import KERNELS
from megatron_mhc.settings.hybrid_stages import LAYERS


def announce_slow_layers(pattern: str | None) -> None:
    """Say which layers of ``--hybrid-layer-pattern`` have the kernels of a package, here torch."""
    slow = [LAYERS[symbol] for symbol in KERNELS if symbol in (pattern or '')]
    if slow:
        announce(f'{" and ".join(slow)} layers run in plain torch here, for their function alone')
