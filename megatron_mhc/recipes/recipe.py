"""The models of the mHC paper (arXiv 2512.24880, Table 5) on Megatron's flags, and all layouts.

Those of ``hybrid.py`` are beside them. A recipe is data; ``recipe_flags`` writes it as command-line
flags by topic. ``examples/recipe.py`` launches it or prints it as a script, ``megatron-mhc recipe``
sizes it up.

The mHC paper leaves open what is chosen here: bias updates of 1e-3 (DeepSeek-V3, arXiv 2412.19437)
and no auxiliary loss; initial std 0.02 and gradient clipping at 1.0 (Megatron's defaults); no norm
after the latent of MLA, since ``--qk-layernorm`` without a query latent also norms the queries'
input a second time in core 0.19, and is refused by its local layers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_mhc.recipes.hybrid import (
    HYBRID_LAYOUTS,
    HYBRIDS,
    PATTERN,
    HybridRecipe,
    scaled_down_hybrid,
)
from megatron_mhc.schedules.inverted_v import written
from megatron_mhc.settings import queues
from megatron_mhc.settings.residual import NUMERICS, PAPER, ResidualConfig
from megatron_mhc.sizing.memory import Layout
from megatron_mhc.sizing.shape import Experts, LatentAttention, ModelShape
from megatron_mhc.sizing.stages import stage_counts, staged_pattern

# A flag's value: True for a flag without one, a tuple for several.
Flags = dict[str, object]

# 0.316 and 0.1 of the base rate from 80 % and 90 % of the steps on.
STEP_SCHEDULE: Flags = {
    'lr-decay-style': 'step',
    'lr-step-milestones': (0.8, 0.9),
    'lr-step-rates': (0.316, 0.1),
}
SEGMENTS = 'auto'
SEGMENT_RECOMPUTE: Flags = {'mhc-recompute-layer-num': SEGMENTS}


@dataclass(frozen=True)
class Recipe:
    """One column of Table 5; what all of its models share are the defaults.

    Args:
        name: on the command line.
        layers: decoder layers; the first one is dense.
        hidden: C.
        expert_ffn: intermediate size of an expert; the dense MLP's is 8 times that.
        heads: of attention.
        experts: routed experts of a layer; of which a token uses ``top_k``, and all ``shared``.
        batch: sequences of a step.
        steps: of training, the first ``warmup`` with a rising learning rate.
        learning_rate: the highest.
        vocab: V.
        sequence: s.
        kv_rank, qk_dim, rope_dim, v_dim: of ``LatentAttention``.
        grouped_gemm: experts of a rank in one call.
    """

    name: str
    layers: int
    hidden: int
    expert_ffn: int
    heads: int
    experts: int
    batch: int
    steps: int
    learning_rate: float
    top_k: int = 6
    shared: int = 2
    warmup: int = 2000
    vocab: int = 129280
    sequence: int = 4096
    kv_rank: int = 512
    qk_dim: int = 128
    rope_dim: int = 64
    v_dim: int = 128
    grouped_gemm: bool = True

    @property
    def dense_ffn(self) -> int:
        return 8 * self.expert_ffn

    @property
    def shared_ffn(self) -> int:
        return self.shared * self.expert_ffn

    @property
    def tokens(self) -> int:
        """Tokens of the whole training."""
        return self.batch * self.steps * self.sequence

    def shape(self, residual: str | ResidualConfig = 'mhc') -> ModelShape:
        """The model for ``model_size``, ``model_flops`` and ``model_memory``.

        ``residual``: its type, or all of its settings.
        """
        return ModelShape(
            layers=self.layers,
            hidden=self.hidden,
            ffn=self.dense_ffn,
            vocab=self.vocab,
            sequence=self.sequence,
            attention=LatentAttention(
                heads=self.heads,
                kv_rank=self.kv_rank,
                qk_dim=self.qk_dim,
                rope_dim=self.rope_dim,
                v_dim=self.v_dim,
            ),
            experts=Experts(
                count=self.experts,
                top_k=self.top_k,
                ffn=self.expert_ffn,
                shared_ffn=self.shared_ffn,
                layers=(False,) + (True,) * (self.layers - 1),
            ),
            residual=ResidualConfig(residual) if isinstance(residual, str) else residual,
        )

    def schedule_flags(self) -> Flags:
        """How the learning rate falls."""
        return STEP_SCHEDULE


AnyRecipe = Recipe | HybridRecipe
_3B = Recipe('3b', 12, 1280, 896, 16, 64, batch=320, steps=30_000, learning_rate=8.6e-4)
RECIPES: dict[str, AnyRecipe] = {
    recipe.name: recipe
    for recipe in (
        _3B,
        Recipe('9b', 18, 1920, 1280, 24, 64, batch=512, steps=50_000, learning_rate=5.9e-4),
        Recipe('27b', 30, 2560, 1536, 32, 72, batch=1280, steps=50_000, learning_rate=4.0e-4),
        dataclasses.replace(_3B, name='3b-1t', batch=2560, steps=100_000, learning_rate=9.0e-4),
        *HYBRIDS,
    )
}

_ONE, _EIGHT, _SMALL = Layout(1), Layout(8, pp=2, ep=4), Layout(64, pp=2, ep=8)
_LARGE = Layout(64, pp=4, ep=8)
LAYOUTS = {
    '3b': {'1gpu': _ONE, '8gpu': _EIGHT, '64gpu': _SMALL},
    '9b': {'1gpu': _ONE, '8gpu': _EIGHT, '64gpu': _LARGE},
    '27b': {'1gpu': _ONE, '8gpu': _EIGHT, '64gpu': _LARGE},
    '3b-1t': {'1gpu': _ONE, '8gpu': _EIGHT, '64gpu': _SMALL},
    **HYBRID_LAYOUTS,
}


def scaled_down(recipe: AnyRecipe, layout: Layout) -> tuple[AnyRecipe, Layout]:
    """The same kinds of modules and the same flags at sizes that a laptop's CPU trains in a minute.

    Of the layout two ranks of each kind are left. Experts run one by one: without Transformer
    Engine Megatron has no grouped product.
    """
    tp, pp, ep = (min(size, 2) for size in (layout.tp, layout.pp, layout.ep))
    fewer = dataclasses.replace(layout, gpus=tp * pp * ep, tp=tp, pp=pp, ep=ep)
    if isinstance(recipe, HybridRecipe):
        return scaled_down_hybrid(recipe), fewer
    small = dataclasses.replace(
        recipe,
        layers=6,
        hidden=64,
        expert_ffn=32,
        heads=4,
        experts=8,
        top_k=2,
        batch=16,
        steps=20,
        warmup=2,
        vocab=256,
        sequence=64,
        kv_rank=16,
        qk_dim=16,
        rope_dim=8,
        v_dim=16,
        grouped_gemm=False,
    )
    return small, fewer


def recipe_flags(
    recipe: AnyRecipe,
    layout: Layout,
    residual: str | ResidualConfig = 'mhc',
    one_queue: bool | None = None,
) -> dict[str, Flags]:
    """The flags by topic, data and logging aside.

    Args:
        recipe: the model.
        layout: the ranks.
        residual: its type, recomputed in segments of the best size; or its settings.
        one_queue: as for ``parallel_flags``; None for a GPU that nobody has named.
    """
    if one_queue is None:
        one_queue = queues.one_queue(layout.tp, layout.cp)
    if isinstance(residual, str):
        segments = 'none' if residual == 'standard' else SEGMENTS
        residual = ResidualConfig(residual, recompute_layer_num=segments)
    parallel = parallel_flags(recipe.shape(residual), layout, one_queue)
    if isinstance(recipe, HybridRecipe):
        model = {'MODEL_ARGS': {PATTERN: parallel.pop(PATTERN), **recipe.model_flags(layout)}}
    else:
        model = {'MODEL_ARGS': _model(recipe, layout), 'MOE_ARGS': _experts(recipe)}
    return {
        **model,
        'RESIDUAL_ARGS': residual_flags(residual),
        'TRAINING_ARGS': _training(recipe, layout),
        'PARALLEL_ARGS': parallel,
    }


def words(flags: Flags) -> list[list[str]]:
    """``{'swiglu': True, 'betas': (0.9, 0.95)}`` -> one list of words for each flag."""
    return [
        [f'--{name}', *([] if value is True else _several(value))] for name, value in flags.items()
    ]


def _several(value: object) -> list[str]:
    values = value if isinstance(value, tuple) else (value,)
    # ``str`` would take a word of a class of its own for any.
    return [one if isinstance(one, str) else str(one) for one in values]


def _model(recipe: Recipe, layout: Layout) -> Flags:
    return {
        'num-layers': recipe.layers,
        'hidden-size': recipe.hidden,
        'ffn-hidden-size': recipe.dense_ffn,
        'num-attention-heads': recipe.heads,
        'multi-latent-attention': True,
        'kv-lora-rank': recipe.kv_rank,
        'qk-head-dim': recipe.qk_dim,
        'qk-pos-emb-head-dim': recipe.rope_dim,
        'v-head-dim': recipe.v_dim,
        'position-embedding-type': 'rope',
        # MLA's default is YaRN for a context of 160 thousand tokens, and its fusion is YaRN's.
        'rope-type': 'rope',
        'rotary-base': 10000,
        'no-rope-fusion': True,
        'seq-length': recipe.sequence,
        'max-position-embeddings': recipe.sequence,
        # Whatever tokenizer is used, the vocabulary is padded to the paper's.
        'make-vocab-size-divisible-by': recipe.vocab // layout.tp,
        'untie-embeddings-and-output-weights': True,
        'swiglu': True,
        'disable-bias-linear': True,
        'normalization': 'RMSNorm',
        'norm-epsilon': 1e-20,
    }


def _experts(recipe: Recipe) -> Flags:
    flags: Flags = {
        'num-experts': recipe.experts,
        'moe-layer-freq': f'([0]+[1]*{recipe.layers - 1})',
        'moe-ffn-hidden-size': recipe.expert_ffn,
        'moe-shared-expert-intermediate-size': recipe.shared_ffn,
        'moe-router-topk': recipe.top_k,
        'moe-router-score-function': 'sigmoid',
        'moe-router-enable-expert-bias': True,
        'moe-router-bias-update-rate': 1e-3,
        'moe-router-load-balancing-type': 'none',
        'moe-router-dtype': 'fp32',
        'moe-token-dispatcher-type': 'alltoall',
    }
    if recipe.grouped_gemm:
        flags['moe-grouped-gemm'] = True
    return flags


def residual_flags(residual: ResidualConfig) -> Flags:
    """The residual connections' settings that a study or recipe chooses."""
    flags: Flags = {'residual-type': residual.residual_type}
    if residual.has_streams:
        flags['mhc-num-residual-streams'] = residual.streams
        flags['mhc-init-gating-factor'] = residual.init_gating_factor
        if residual.numerics != PAPER:
            flags['mhc-numerics'] = residual.numerics
        if residual.norm_eps != NUMERICS[residual.numerics].norm_eps:
            flags['mhc-norm-eps'] = residual.norm_eps
        if residual.recompute_layer_num != 'none':
            flags['mhc-recompute-layer-num'] = residual.recompute_layer_num
    if residual.residual_type == 'mhc' and residual.manifold == 'sinkhorn':
        flags['mhc-sinkhorn-iterations'] = residual.sinkhorn_iterations
    elif residual.residual_type == 'mhc':
        flags['mhc-manifold'] = residual.manifold
    return flags


def _training(recipe: AnyRecipe, layout: Layout) -> Flags:
    paper: Flags = {'adam-eps': 1e-20} if isinstance(recipe, Recipe) else {}
    return {
        'bf16': True,
        'micro-batch-size': layout.micro_batch,
        'global-batch-size': recipe.batch,
        'train-iters': recipe.steps,
        'optimizer': 'adam',
        'adam-beta1': 0.9,
        'adam-beta2': 0.95,
        **paper,
        'weight-decay': 0.1,
        'clip-grad': 1.0,
        'init-method-std': 0.02,
        'hidden-dropout': 0,
        'attention-dropout': 0,
        'lr': recipe.learning_rate,
        'lr-warmup-iters': recipe.warmup,
        **recipe.schedule_flags(),
    }


def parallel_flags(shape: ModelShape, layout: Layout, one_queue: bool) -> Flags:
    """The ranks, the schedule, and the layers of each stage where they do not divide.

    Args:
        shape: the model; the pattern of a hybrid one is among the flags, cut into stages.
        layout: the ranks.
        one_queue: all streams share a hardware queue, as Megatron demands of tensor parallelism
            before Blackwell: then a stream of its own hides nothing.
    """
    flags: Flags = {
        'tensor-model-parallel-size': layout.tp,
        'pipeline-model-parallel-size': layout.pp,
        'expert-model-parallel-size': layout.ep,
        'use-distributed-optimizer': True,
        'overlap-grad-reduce': True,
        # So that another layout or schedule can go on with the optimizer's state.
        'dist-ckpt-optim-fully-reshardable': True,
    }
    if layout.tp > 1:
        flags['sequence-parallel'] = True
    if layout.cp > 1:
        flags['context-parallel-size'] = layout.cp
    if layout.pp > 1:
        flags['pipeline-schedule'] = layout.schedule
        if not one_queue:
            flags['mhc-post-stream'] = 'high'
    counts = [shape.layers]
    if layout.pp > 1:
        counts = stage_counts(shape, layout.pp, layout.placement, layout.chunks)
    if shape.pattern:
        flags[PATTERN] = staged_pattern(shape, counts)
    elif shape.layers % layout.stages:
        flags['pipeline-model-parallel-layout'] = written(counts)
    elif layout.placement == 'interleaved':
        flags['num-virtual-stages-per-pipeline-rank'] = layout.chunks
    return flags
