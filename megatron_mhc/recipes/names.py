"""The words that ``megatron-mhc recipe`` takes: light, for ``--help``."""

from __future__ import annotations

# Those of ``RECIPES``, and of each of its ``LAYOUTS``.
MODELS = ('3b', '9b', '27b', '3b-1t', 'nemotron-h-8b', 'nemotron-nano-9b')
LAYOUT_NAMES = ('1gpu', '8gpu', '64gpu')
SIZES = ('gpus', 'tp', 'cp', 'pp', 'ep', 'dp', 'micro_batch')
