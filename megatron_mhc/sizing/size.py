"""Parameters of a model by part: pure arithmetic on a ``ModelShape``, exact to the last one."""

from __future__ import annotations

from collections import Counter

from megatron_mhc.engram.sizes import reader_parameters, table_parameters
from megatron_mhc.manifolds.registry import num_logits
from megatron_mhc.mudd.sizes import mudd_parameters
from megatron_mhc.settings.residual import MAPPINGS, ResidualConfig
from megatron_mhc.sizing.shape import (
    ATTENTION,
    EXPERTS,
    LATENT,
    MAMBA,
    MLP,
    GroupedAttention,
    ModelShape,
)

# Held by every tensor-parallel rank as a whole.
REPLICATED = ('norms', 'router', 'mhc', 'engram')
# Parts of a layer that are linear layers, but for biases and norms of latents.
LINEAR = ('attention', 'mamba', 'delta_net', 'dense_mlp', 'routed_experts', 'shared_experts')
PARTS = (
    'embedding',
    'attention',
    'mamba',
    'delta_net',
    'norms',
    'dense_mlp',
    'router',
    'routed_experts',
    'shared_experts',
    'mhc',
    'engram',
    'engram_tables',
    'head',
)


def parameters(shape: ModelShape) -> Counter[str]:
    """Parameters of the whole model by part, keys from ``PARTS``; tied weights count as the head.

    Megatron's buffers, such as the bias of loss-free balancing, are no parameters.
    """
    parts = ends(shape, first=True, last=True)
    if shape.tied:
        parts['embedding'] -= shape.vocab * shape.hidden
    for layer in range(shape.layers):
        parts += layer_parameters(shape, layer)
    if shape.residual.residual_type == 'mudd':
        dynamic = shape.residual.mudd_variant == 'dynamic'
        layers = '*' * shape.layers
        parts['mhc'] += mudd_parameters(shape.hidden, layers, dynamic, shape.norm_vectors)
    return parts


def summary(shape: ModelShape) -> dict[str, int]:
    """``total``, ``active`` and ``mhc``: all, those a token uses, those of the residual topology.

    Active leaves out the input embedding, of which a token reads one row, the tables of a
    conditional memory, of which it reads a few, and the experts that it is not sent to; the output
    layer counts (DeepSeek's way of counting; mHC, Table 5).
    """
    parts = parameters(shape)
    idle = 0
    if shape.experts:
        share = shape.experts.count - shape.experts.top_k
        idle = parts['routed_experts'] // shape.experts.count * share
    idle += parts['embedding'] + parts['engram_tables']
    total = parts.total()
    return {'total': total, 'active': total - idle, 'mhc': parts['mhc']}


def ends(shape: ModelShape, *, first: bool, last: bool) -> Counter[str]:
    """Embedding (V C, and learned positions); final norm, stream merge and output layer (V C)."""
    matrix = shape.vocab * shape.hidden
    parts: Counter[str] = Counter()
    if first:
        parts['embedding'] = matrix + shape.learned_positions * shape.hidden
    if last:
        parts['norms'] = _norm_parameters(shape)
        parts['mhc'] = merge_parameters(shape.residual, shape.hidden)
        parts['head'] = matrix
    return parts


def layer_parameters(shape: ModelShape, layer: int) -> Counter[str]:
    """Parameters of decoder layer ``layer`` (from 0) by part."""
    parts: Counter[str] = Counter()
    for symbol in shape.symbols(layer):
        parts += _sublayer(shape, symbol)
    if shape.engram and layer + 1 in shape.engram.layers:
        parts['engram'] = reader_parameters(shape.engram, shape.hidden, shape.residual.streams)
        parts['engram_tables'] = table_parameters(shape.engram)
    return parts


def _sublayer(shape: ModelShape, symbol: str) -> Counter[str]:
    """A sublayer with the norm before it and its maps."""
    hidden, experts = shape.hidden, shape.experts
    parts = Counter(norms=_norm_parameters(shape), mhc=mapping_parameters(shape.residual, hidden))
    if symbol in (ATTENTION, LATENT):
        parts['attention'] = _attention(shape)
    elif symbol == MLP:
        parts['dense_mlp'] = _mlp(shape, shape.ffn)
    elif symbol == EXPERTS and experts:
        parts['router'] = experts.count * (hidden + shape.linear_bias)
        parts['routed_experts'] = experts.count * _mlp(shape, experts.ffn)
        if experts.shared_ffn:
            parts['shared_experts'] = _mlp(shape, experts.shared_ffn)
    elif shape.mamba and symbol == MAMBA:
        parts['mamba'] = shape.mamba.parameters(hidden)
    elif shape.delta_net:
        parts['delta_net'] = shape.delta_net.parameters(hidden)
        parts['norms'] += shape.norm_vectors * shape.delta_net.value_dim
    return parts


def _norm_parameters(shape: ModelShape) -> int:
    """Of a norm before a sublayer, or before the output layer."""
    return 0 if shape.residual.norms_streams else shape.norm_vectors * shape.hidden


def mapping_parameters(residual: ResidualConfig, hidden: int) -> int:
    """Parameters of one sublayer's maps.

    mHC: phi n C x (K + 2n), b, three alphas, with K = n^2 logits of H_res for Sinkhorn; where K is
    0, one alpha less. HC: C x (n + 2), b, two scales; static: b only. Gated: gain n C, n C x 2R for
    the gates, n C x n for the writes. Attention Residuals: a query C.
    """
    n = residual.num_residual_streams
    if residual.residual_type == 'attention':
        return hidden
    if not residual.has_streams or set(residual.fixed_mappings) == set(MAPPINGS):
        return 0
    if residual.residual_type == 'mhc':
        logits = num_logits(residual.manifold, n)
        outputs = logits + 2 * n
        return outputs * n * hidden + outputs + 2 + (logits > 0)
    if residual.residual_type == 'gated':
        return merge_parameters(residual, hidden) + n * n * hidden
    outputs = n * n + 2 * n
    return outputs + (residual.hc_variant == 'dynamic') * ((n + 2) * hidden + 2)


def merge_parameters(residual: ResidualConfig, hidden: int) -> int:
    """Parameters of the n -> 1 merge before the final norm: of the learned and the gated one."""
    if residual.residual_type == 'gated':
        return residual.num_residual_streams * hidden * (1 + 2 * residual.gated_rank)
    if residual.residual_type == 'attention':
        return hidden
    if not residual.has_streams or residual.stream_merge != 'learned':
        return 0
    n = residual.num_residual_streams
    return n * n * hidden + n + 1


def _attention(shape: ModelShape) -> int:
    hidden, attention = shape.hidden, shape.attention
    heads = attention.heads
    bias = shape.linear_bias * hidden
    if isinstance(attention, GroupedAttention):
        queries, keys = heads * attention.head_dim, attention.groups * attention.head_dim
        qkv = (queries + 2 * keys) * (hidden + attention.qkv_bias)
        norm = attention.qk_norm * 2 * attention.head_dim * shape.norm_vectors
        return qkv + norm + queries * hidden + bias
    queries = heads * (attention.qk_dim + attention.rope_dim)
    if attention.q_rank is None:
        query = hidden * queries
    else:
        query = attention.q_rank * (hidden + queries)
    down = hidden * (attention.kv_rank + attention.rope_dim)
    up = attention.kv_rank * heads * (attention.qk_dim + attention.v_dim)
    norm = attention.latent_norm * ((attention.q_rank or 0) + attention.kv_rank)
    output = heads * attention.v_dim * hidden + bias
    return query + down + up + norm * shape.norm_vectors + output


def _mlp(shape: ModelShape, ffn: int) -> int:
    """Gated 3 C f, else 2 C f, and biases."""
    inner = (1 + shape.gated) * ffn
    return shape.hidden * (inner + ffn) + shape.linear_bias * (inner + shape.hidden)
