"""Floating-point operations of a training step: the one place where they are written down.

A multiplication and an addition count as two. A backward counts as two forwards (one for the
gradient of the inputs, one for that of the weights), so a step is 3 forwards, with or without
recomputation: Megatron's convention for its TFLOP/s line, which ``patches/flops.py`` completes with
``residual_flops``.
"""

from __future__ import annotations

from collections import Counter

from megatron_mhc.engram.sizes import engram_flops
from megatron_mhc.manifolds.registry import num_logits
from megatron_mhc.manifolds.sizes import matrix_flops
from megatron_mhc.mudd.sizes import mudd_flops
from megatron_mhc.settings.residual import MAPPINGS, ResidualConfig
from megatron_mhc.sizing.shape import DELTA_NET, EXPERTS, MAMBA, MLP, GroupedAttention, ModelShape

# A forward and a backward in units of forwards.
STEP = 3
# What mixes the sequence, between linear layers.
ATTENTION_CORE, SCANS = 'attention_core', ('mamba_scan', 'delta_rule')


def step_flops(shape: ModelShape, sequences: int) -> int:
    """FLOPs of one optimizer step on ``sequences`` sequences of s tokens."""
    return STEP * sequences * shape.sequence * sum(token_flops(shape).values())


def token_flops(shape: ModelShape) -> Counter[str]:
    """Forward FLOPs of one token by part, on average over a causally masked sequence."""
    parts = Counter(
        mhc=residual_flops(shape.residual, shape.hidden, shape.sublayers),
        engram=engram_flops(shape.engram, shape.hidden, shape.residual.streams),
        head=head_flops(shape),
    )
    for symbols, layers in shape.kinds(range(shape.layers)).items():
        for part, flops in layer_flops(shape, symbols).items():
            parts[part] += layers * flops
    return parts


def head_flops(shape: ModelShape) -> int:
    """The same of the output layer."""
    return 2 * shape.hidden * shape.vocab


def layer_flops(shape: ModelShape, symbols: str) -> Counter[str]:
    """The same of one decoder layer with these sublayers; streams aside."""
    parts: Counter[str] = Counter()
    for symbol in symbols:
        parts.update(_sublayer(shape, symbol))
    return parts


def _sublayer(shape: ModelShape, symbol: str) -> dict[str, int]:
    hidden, experts = shape.hidden, shape.experts
    if symbol == MLP:
        return {'dense_mlp': _mlp(shape, shape.ffn)}
    if symbol == EXPERTS and experts:
        return {
            'router': 2 * hidden * experts.count,
            'routed_experts': experts.top_k * _mlp(shape, experts.ffn),
            'shared_experts': _mlp(shape, experts.shared_ffn),
        }
    if symbol == MAMBA and shape.mamba:
        names, found = ('mamba_projections', 'mamba_scan'), shape.mamba.flops(hidden)
    elif symbol == DELTA_NET and shape.delta_net:
        names, found = ('delta_projections', 'delta_rule'), shape.delta_net.flops(hidden)
    else:
        names, found = ('attention_projections', ATTENTION_CORE), _attention(shape)
    return dict(zip(names, found, strict=True))


def residual_flops(
    residual: ResidualConfig, hidden: int, sublayers: int, pattern: str | None = None
) -> int:
    """Forward FLOPs of one token in all that n streams add to a model (mHC, Eqs 3 and 7 to 9).

    Dense connections (mudd): ``mudd.sizes``. Gated residual: 4 n C R for the gates, 2 n C each for
    the norm and for u, once more before the output layer; 2 n^2 C for H_post, 2 n C to write.
    Attention Residuals: 2 C each for norm, logit and sum of a source of a read, 2 C to write.

    Per sublayer, and the merge of streams once::

        mapping, mhc     2 n C (K + 2n) + 2 n C      v phi, and the sum of squares of v
        mapping, hc      2 n C (n + 2) + 2 n C       the same for each stream by itself
        manifold, mhc    ``manifolds.sizes``         from K logits (Sinkhorn: n^2) to H_res
        F_pre            2 n C                       H_pre x
        F_post,res       2 n^2 C + 2 n C             H_res x + H_post^T y
        merge            n C; single pass 2 n C      learned: 2 n^2 C + 2 n C for its weights, 2 n C

    Args:
        residual: the settings; 0 FLOPs under ``standard``.
        hidden: C.
        sublayers: L.
        pattern: of a hybrid model, one symbol a layer; dense connections read it.
    """
    if residual.residual_type == 'mudd':
        layers = pattern or '*' * (sublayers // 2)
        return mudd_flops(hidden, layers, residual.mudd_variant == 'dynamic')
    if not residual.enabled:
        return 0
    if residual.residual_type == 'attention':
        sources = sum(residual.block_sums(done) for done in range(sublayers + 1))
        return 6 * hidden * sources + 2 * hidden * sublayers
    n, wide = residual.num_residual_streams, residual.num_residual_streams * hidden
    if residual.residual_type == 'gated':
        read = 4 * wide * residual.gated_rank + 4 * wide
        return sublayers * (read + 2 * wide * n + 2 * wide) + read
    mapping = 0
    # Maps that are all constants, or static, are read, not computed.
    if set(residual.fixed_mappings) != set(MAPPINGS):
        if residual.residual_type == 'mhc':
            mapping = 2 * wide * (num_logits(residual.manifold, n) + 2 * n) + 2 * wide
            mapping += matrix_flops(residual.manifold, n, residual.sinkhorn_iterations)
        elif residual.hc_variant == 'dynamic':
            mapping = 2 * wide * (n + 2) + 2 * wide
    merges = {'learned': 2 * wide * n + 4 * wide, 'pre': 2 * wide}
    merge = merges.get(residual.stream_merge or '', wide)
    return sublayers * (mapping + 2 * wide + 2 * wide * n + 2 * wide) + merge


def _attention(shape: ModelShape) -> tuple[int, int]:
    """Projections, and scores with values: a token sees half of the sequence on average."""
    hidden, attention = shape.hidden, shape.attention
    heads = attention.heads
    if isinstance(attention, GroupedAttention):
        qk = v = attention.head_dim
        keys = attention.groups * attention.head_dim
        matrices = hidden * (2 * heads * attention.head_dim + 2 * keys)
    else:
        qk, v = attention.qk_dim + attention.rope_dim, attention.v_dim
        rank = attention.q_rank
        matrices = hidden * heads * qk if rank is None else rank * (hidden + heads * qk)
        matrices += hidden * (attention.kv_rank + attention.rope_dim)
        matrices += attention.kv_rank * heads * (attention.qk_dim + v)
        matrices += heads * v * hidden
    return 2 * matrices, shape.sequence * heads * (qk + v)


def _mlp(shape: ModelShape, ffn: int) -> int:
    return 2 * shape.hidden * (2 + shape.gated) * ffn
