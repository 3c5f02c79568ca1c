"""What a hybrid layer pattern says about layers and stages, by the arguments or the model's config.

``M-M*|-M*-/*-``: the main layers, among which ``|`` ends a pipeline stage, and behind each ``/``
those of one prediction layer.
"""

from __future__ import annotations

from megatron_mhc.settings.constraint import Constraint, Setting, hybrid_model, layer_pattern

# Symbol of a layer -> what it is.
LAYERS = {
    '*': 'attention',
    '+': 'latent attention',
    'D': 'sparse attention',
    'M': 'Mamba',
    'G': 'gated delta net',
    '-': 'an MLP',
    'E': 'experts',
}
# Not every release refuses it, and prediction layers would go by the layout, the others by the
# pattern.
LAYOUT_BESIDE_PATTERN = Constraint(
    '--pipeline-model-parallel-layout with --hybrid-layer-pattern',
    lambda get: hybrid_model(get) and get('pipeline_model_parallel_layout') is not None,
    'the pattern says itself which layers a stage has',
    "end every stage but the last by '|' in the pattern",
)


def main_pattern(get: Setting) -> str | None:
    """The main layers of the arguments' pattern; None of another model, and on a config."""
    pattern = layer_pattern(get)
    return pattern.partition('/')[0] if pattern else None
