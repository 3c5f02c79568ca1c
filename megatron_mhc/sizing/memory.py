"""Estimated memory of a rank and bytes on the wire, for a layout of ranks.

Weights, gradients and optimizer states follow from the parameters of a rank and Megatron's bf16
recipe with the distributed optimizer, and are exact but for padding. Activations are an estimate
for Transformer Engine layers with flash attention, the mHC kernels, evenly loaded experts and no
dropout. Left out: CUDA context, communication buffers, workspaces, fragmentation; keep about 10 %.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import asdict, dataclass

from megatron_mhc.schedules.catalog import SCHEDULES
from megatron_mhc.schedules.live import live_at_peak
from megatron_mhc.schedules.stage_layers import stage_at
from megatron_mhc.settings.recompute_cost import kept_cost, segment_size
from megatron_mhc.sizing.shape import DELTA_NET, EXPERTS, MAMBA, MLP, GroupedAttention, ModelShape
from megatron_mhc.sizing.size import LINEAR, REPLICATED, ends, layer_parameters
from megatron_mhc.sizing.stages import stage_counts

FP32 = 4
# Bytes that Transformer Engine keeps of a weight in fp8, beside its own: the weight and, for the
# backward, its transpose.
FP8_COPIES = 2
# Of a GPU's memory; the rest is for what the estimate leaves out.
USABLE = 0.9


@dataclass(frozen=True)
class Layout:
    """How ranks share a model.

    Args:
        gpus: ranks in all.
        pp: pipeline ranks P.
        ep: ranks that share the experts of a layer.
        tp: tensor-parallel ranks, of experts too; with sequence parallelism.
        cp: context-parallel ranks, which share the tokens of a sequence.
        micro_batch: sequences of a microbatch, b.
        schedule: of the pipeline; means nothing where P = 1.
        vpp: chunks a rank, of the schedule ``interleaved``; the others have their own number.

    Raises:
        ValueError: sizes that do not divide the ranks.
    """

    gpus: int
    pp: int = 1
    ep: int = 1
    tp: int = 1
    micro_batch: int = 1
    schedule: str = 'dualpipev-w'
    vpp: int = 2
    cp: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != 'schedule' and value < 1:
                raise ValueError(f'{name} = {value}: at least 1 is needed; give one')
        if self.schedule not in SCHEDULES:
            raise ValueError(f'schedule {self.schedule!r}: choose one of {", ".join(SCHEDULES)}')
        dense = 'tp x cp x pp' if self.cp > 1 else 'tp x pp'
        for names, size in ((dense, self._dense_ranks), ('tp x pp x ep', self._expert_ranks)):
            if self.gpus % size:
                raise ValueError(
                    f'{self.gpus} ranks are no multiple of {names} = {size} (tp {self.tp}, pp '
                    f'{self.pp}, ep {self.ep}); change --gpus or one of those'
                )

    @property
    def placement(self) -> str:
        """Which stages a pipeline rank holds, as ``schedules.catalog`` names it."""
        return SCHEDULES[self.schedule].placement if self.pp > 1 else 'line'

    @property
    def chunks(self) -> int:
        """Stages of a pipeline rank."""
        return self.vpp if self.placement == 'interleaved' else 2 if self.placement == 'v' else 1

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return self.pp * self.chunks

    @property
    def _dense_ranks(self) -> int:
        return self.tp * self.cp * self.pp

    @property
    def _expert_ranks(self) -> int:
        return self.tp * self.pp * self.ep

    @property
    def dp(self) -> int:
        """Data-parallel ranks: those with sequences of their own."""
        return self.gpus // self._dense_ranks

    @property
    def replicas(self) -> int:
        """Of what is not an expert; ranks of one sequence have the same weights."""
        return self.dp * self.cp

    @property
    def expert_dp(self) -> int:
        """Replicas of an expert."""
        return self.gpus // self._expert_ranks

    def microbatches(self, sequences: int) -> int:
        """m of a step of ``sequences``.

        Raises:
            ValueError: the batch does not divide.
        """
        if sequences % (self.micro_batch * self.dp):
            raise ValueError(
                f'a batch of {sequences} sequences is no multiple of {self.micro_batch} a '
                f'microbatch x {self.dp} data-parallel ranks; change one of them'
            )
        return sequences // (self.micro_batch * self.dp)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank.

    Args:
        weights: of the model's width, mapping parameters fp32.
        gradients: fp32.
        optimizer: two moments, and fp32 master weights of narrower ones, shared out over the
            replicas.
        live: activations at the peak, in whole forward passes of the rank.
        kept: activations of one such pass, without recomputed segments.
        kept_recompute: with it (mHC, section 4.3.2), in segments of the model's L_r, else the best.
        rebuilt: what a rebuilt segment holds at a time, once.
        logits: of the output layer, once.
    """

    weights: int
    gradients: int
    optimizer: int
    live: float
    kept: int
    kept_recompute: int
    rebuilt: int
    logits: int

    @property
    def states(self) -> int:
        """What is held between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + self.logits + int(self.live * self.kept)

    @property
    def total_recompute(self) -> int:
        return self.states + self.logits + self.rebuilt + int(self.live * self.kept_recompute)


def rank_memory(shape: ModelShape, layout: Layout, sequences: int) -> list[RankMemory]:
    """The memory of every pipeline rank, for a step of ``sequences``.

    Raises:
        ValueError: the batch or the layers do not divide, or the schedule does not exist.
    """
    microbatches = layout.microbatches(sequences)
    live: tuple[float, ...] = (1.0,)
    if layout.pp > 1:
        live = live_at_peak(layout.schedule, layout.pp, microbatches, layout.vpp)
    stages = stages_of(shape, layout.pp, layout.placement, layout.chunks)
    memory = []
    for rank, parts in enumerate(rank_parameters(shape, layout)):
        last = rank == layout.pp - 1
        memory.append(
            RankMemory(
                *_states(parts, layout, shape),
                live[rank],
                *_activations(shape, layout, stages[rank]),
                # Logits, and the fp32 softmax that cross entropy keeps.
                last * (shape.value_bytes + FP32) * _tokens(shape, layout) * shape.vocab,
            )
        )
    return memory


def rank_parameters(shape: ModelShape, layout: Layout) -> list[Counter[str]]:
    """Parameters by part of every pipeline rank's stages, before ``sharing`` divides them.

    Raises:
        ValueError: fewer layers than stages.
    """
    return _rank_parameters(shape, layout.pp, layout.placement, layout.chunks)


@functools.lru_cache(maxsize=256)
def _rank_parameters(shape: ModelShape, pp: int, placement: str, chunks: int) -> list[Counter[str]]:
    found = []
    for rank, held in enumerate(stages_of(shape, pp, placement, chunks)):
        last = rank == pp - 1
        first = last if placement == 'v' else rank == 0
        parts = ends(shape, first=first, last=last)
        if first and last and shape.tied:
            parts['embedding'] -= shape.vocab * shape.hidden
        for layer in (layer for stage in held for layer in stage):
            parts += layer_parameters(shape, layer)
        found.append(parts)
    return found


def sharing(part: str, layout: Layout) -> tuple[int, int]:
    """How many ranks divide a part of a stage's parameters, and the replicas of each share."""
    if part in ('routed_experts', 'engram_tables'):
        return layout.tp * layout.ep, layout.expert_dp
    return 1 if part in REPLICATED else layout.tp, layout.replicas


def stages_of(
    shape: ModelShape, pp: int, placement: str = 'v', chunks: int = 2
) -> list[list[range]]:
    """For each pipeline rank the decoder layers of its stages.

    Raises:
        ValueError: fewer layers, or parts of a pattern, than stages.
    """
    if pp == 1:
        return [[range(shape.layers)]]
    counts = stage_counts(shape, pp, placement, chunks)
    starts = [sum(counts[:stage]) for stage in range(pp * chunks)]
    return [
        [
            range(starts[stage], starts[stage] + counts[stage])
            for stage in (stage_at(rank, chunk, pp, placement) for chunk in range(chunks))
        ]
        for rank in range(pp)
    ]


def edge_bytes(shape: ModelShape, layout: Layout) -> int:
    """Bytes from one stage to the next and back, each way, per microbatch.

    n C values a token, and what is sent beside them: by single pass the n of H_pre, and token ids
    for a memory.
    """
    residual, width = shape.residual, shape.value_bytes
    values = residual.streams * shape.hidden + residual.edge_values(width)
    if shape.engram is not None:
        values += shape.engram.edge_values(width)
    return width * _tokens(shape, layout) * values


def _tokens(shape: ModelShape, layout: Layout) -> int:
    """Tokens of a microbatch on one rank: sequence and context parallelism divide them."""
    return layout.micro_batch * shape.sequence // (layout.tp * layout.cp)


def _states(parts: Counter[str], layout: Layout, shape: ModelShape) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states of one rank."""
    width = shape.value_bytes
    weights = gradients = optimizer = 0
    for part, whole in parts.items():
        split, replicas = sharing(part, layout)
        count = -(-whole // split)
        # The mapping is fp32 itself and needs no master copy.
        wide = part == 'mhc' or width == FP32
        weights += count * (FP32 if wide else width)
        if shape.fp8 and part in LINEAR:
            weights += count * FP8_COPIES
        gradients += count * FP32
        optimizer += -(-count * (2 if wide else 3) * FP32 // replicas)
    return weights, gradients, optimizer


def _activations(shape: ModelShape, layout: Layout, stages: list[range]) -> tuple[int, int, int]:
    """Bytes of a microbatch: kept, kept with recomputed segments, and rebuilt at a time."""
    hidden, residual = shape.hidden, shape.residual
    inside = sum(_inside(shape, layer) for stage in stages for layer in stage)
    sublayers = [sum(len(shape.symbols(layer)) for layer in stage) for stage in stages]
    token = shape.value_bytes * _tokens(shape, layout)
    if shape.full_recompute:
        return _full(shape, token, stages)
    if not residual.has_streams:
        # Input and output of the norm.
        kept = token * (inside + sum(sublayers) * 2 * hidden)
        return kept, kept, 0
    n = residual.streams
    # F_post,res needs every sublayer's output, with or without recomputation.
    always = inside + sum(sublayers) * hidden
    around = (n + 2) * hidden
    kept = always + sum(sublayers) * around
    size = residual.recompute_layer_num
    size = 'auto' if size == 'none' else size
    sizes = [segment_size(size, n, count) for count in sublayers]
    firsts = sum(kept_cost(n, *pair) for pair in zip(sublayers, sizes, strict=True))
    recomputed = always + firsts * hidden
    return token * kept, token * recomputed, token * max(sizes) * around


def _full(shape: ModelShape, token: int, stages: list[range]) -> tuple[int, int, int]:
    """The same where a layer keeps its input alone, n C values a token, and is run again."""
    layers = [layer for stage in stages for layer in stage]
    residual, hidden = shape.residual, shape.hidden
    around = (residual.streams + 3) * hidden if residual.has_streams else 2 * hidden
    kept = token * len(layers) * residual.streams * hidden
    again = max(_inside(shape, layer) + len(shape.symbols(layer)) * around for layer in layers)
    return kept, kept, token * again


def _inside(shape: ModelShape, layer: int) -> int:
    """Values a token that the sublayers of a layer keep, behind their norms."""
    return sum(_kept(shape, symbol) for symbol in shape.symbols(layer))


def _kept(shape: ModelShape, symbol: str) -> int:
    experts = shape.experts
    # What is fp32 in any model counts as so many values.
    wide = FP32 // shape.value_bytes
    # Before and behind the activation function.
    inner = 2 + shape.gated
    if symbol == MLP:
        return inner * shape.ffn
    if symbol == EXPERTS and experts:
        # Dispatched tokens; router logits and scores in fp32.
        values = experts.top_k * (shape.hidden + inner * experts.ffn) + inner * experts.shared_ffn
        return values + 2 * wide * experts.count
    for mixer, name in ((shape.mamba, MAMBA), (shape.delta_net, DELTA_NET)):
        if mixer and symbol == name:
            return mixer.kept(wide)
    attention, heads = shape.attention, shape.attention.heads
    # Inputs and output of flash attention, and the fp32 logarithm of its sums.
    if isinstance(attention, GroupedAttention):
        return 2 * (heads + attention.groups) * attention.head_dim + wide * heads
    values = heads * 2 * (attention.qk_dim + attention.rope_dim + attention.v_dim) + wide * heads
    latents = attention.kv_rank + (attention.q_rank or 0)
    return values + (1 + attention.latent_norm) * latents + attention.rope_dim
