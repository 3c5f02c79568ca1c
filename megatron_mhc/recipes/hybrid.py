"""Published hybrid models on Megatron's flags: Mamba-2, attention and MLPs, one sublayer a layer.

Sizes are those of ``config.json`` beside the weights on Hugging Face (``nvidia/Nemotron-H-8B-Base-
8K``, ``nvidia/NVIDIA-Nemotron-Nano-9B-v2-Base``), which agree with the papers (arXiv 2504.03624 and
2508.14444): no position embedding, squared ReLU, RMSNorm, no biases, embeddings untied. Batch,
sequence, steps, warm-up and the cosine from 3e-4 to its tenth are those of NVIDIA's pre-training
configuration of the first (Megatron-Bridge, ``nemotronh_8b_pretrain_config``), not of the run that
made the weights; the second, pruned and distilled in fact, is given the same. Adam's betas, weight
decay and gradient clipping are chosen here, as for the mHC paper's models.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_mhc.settings.residual import ResidualConfig
from megatron_mhc.sizing.memory import Layout
from megatron_mhc.sizing.mixers import Mamba
from megatron_mhc.sizing.shape import MAMBA, GroupedAttention, ModelShape

if TYPE_CHECKING:
    from megatron_mhc.recipes.recipe import Flags

PATTERN = 'hybrid-layer-pattern'
# Megatron's layers, under the name that every release has for them.
_STACK = ('megatron.core.models.mamba.mamba_layer_specs', 'mamba_stack_spec')


@dataclass(frozen=True)
class HybridRecipe:
    """A hybrid model; what both have in common are the defaults.

    Args:
        name: on the command line.
        pattern: a symbol for each layer.
        hidden: C.
        ffn: intermediate size of an MLP.
        heads: of attention, ``groups`` of keys and values, each of width ``head_dim``.
        mamba: sizes of Mamba-2.
        batch: sequences of a step.
        steps: of training, the first ``warmup`` with a rising learning rate.
        learning_rate, last_rate: the highest, and that at the end.
        vocab: V.
        sequence: s.
    """

    name: str
    pattern: str
    hidden: int
    ffn: int
    heads: int
    mamba: Mamba
    groups: int = 8
    head_dim: int = 128
    batch: int = 768
    steps: int = 1_168_251
    warmup: int = 2000
    learning_rate: float = 3e-4
    last_rate: float = 3e-5
    vocab: int = 131072
    sequence: int = 8192

    @property
    def tokens(self) -> int:
        """Tokens of the whole training."""
        return self.batch * self.steps * self.sequence

    def shape(self, residual: str | ResidualConfig = 'mhc') -> ModelShape:
        """The model for ``sizing``; ``residual``: its type, or all of its settings."""
        return ModelShape(
            layers=len(self.pattern),
            hidden=self.hidden,
            ffn=self.ffn,
            vocab=self.vocab,
            sequence=self.sequence,
            attention=GroupedAttention(self.heads, self.groups, self.head_dim),
            gated=False,
            residual=ResidualConfig(residual) if isinstance(residual, str) else residual,
            pattern=self.pattern,
            mamba=self.mamba if MAMBA in self.pattern else None,
        )

    def model_flags(self, layout: Layout) -> Flags:
        """Of the model but for its pattern, which the layout cuts into stages."""
        return {
            'spec': _STACK,
            'hidden-size': self.hidden,
            'ffn-hidden-size': self.ffn,
            'num-attention-heads': self.heads,
            'group-query-attention': True,
            'num-query-groups': self.groups,
            'kv-channels': self.head_dim,
            'mamba-num-heads': self.mamba.heads,
            'mamba-head-dim': self.mamba.head_dim,
            'mamba-num-groups': self.mamba.groups,
            'mamba-state-dim': self.mamba.state,
            'position-embedding-type': 'none',
            'seq-length': self.sequence,
            'max-position-embeddings': self.sequence,
            'make-vocab-size-divisible-by': self.vocab // layout.tp,
            'untie-embeddings-and-output-weights': True,
            'squared-relu': True,
            'disable-bias-linear': True,
            'normalization': 'RMSNorm',
            'norm-epsilon': 1e-5,
        }

    def schedule_flags(self) -> Flags:
        """How the learning rate falls."""
        return {'lr-decay-style': 'cosine', 'min-lr': self.last_rate}


HYBRIDS = (
    HybridRecipe(
        'nemotron-h-8b',
        'M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-',
        hidden=4096,
        ffn=21504,
        heads=32,
        mamba=Mamba(heads=128, head_dim=64, groups=8, state=128),
    ),
    HybridRecipe(
        'nemotron-nano-9b',
        'M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-',
        hidden=4480,
        ffn=15680,
        heads=40,
        mamba=Mamba(heads=128, head_dim=80, groups=8, state=128),
    ),
)
_ON_EIGHT = Layout(8, pp=2, tp=2, schedule='1f1b')
HYBRID_LAYOUTS = {
    recipe.name: {
        '1gpu': Layout(1, schedule='1f1b'),
        '8gpu': _ON_EIGHT,
        '64gpu': dataclasses.replace(_ON_EIGHT, gpus=64),
    }
    for recipe in HYBRIDS
}


def scaled_down_hybrid(recipe: HybridRecipe) -> HybridRecipe:
    """The same flags at sizes of a laptop."""
    return dataclasses.replace(
        recipe,
        pattern='M-*-M-',
        hidden=64,
        ffn=128,
        heads=4,
        groups=2,
        head_dim=16,
        mamba=Mamba(heads=8, head_dim=16, groups=2, state=16),
        batch=16,
        steps=20,
        warmup=2,
        vocab=256,
        sequence=64,
    )
