"""Which tensor of Megatron's is which of transformers', read in both directions.

Names are those of Transformer Engine's layers in ``torch_dist`` checkpoints, where a norm belongs
to the linear layer behind it; ``complete.stored_name`` finds those of others.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mhc.manifolds.registry import num_logits
from megatron_mhc.settings.residual import MAPPINGS

Config = dict[str, Any]
LAYERS, OUR_LAYERS = 'decoder.layers.', 'model.layers.'


class Kind(NamedTuple):
    """How one of Megatron's tensors becomes several, and they one again."""

    split: Callable[[Tensor, Config], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], Config], Tensor]


def _heads(config: Config) -> tuple[int, list[int]]:
    groups, size = config['num_key_value_heads'], config['head_dim']
    return groups, [config['num_attention_heads'] // groups * size, size, size]


def _split_qkv(value: Tensor, config: Config) -> list[Tensor]:
    groups, sizes = _heads(config)
    return [part.flatten(0, 1) for part in value.unflatten(0, (groups, -1)).split(sizes, dim=1)]


def _join_qkv(parts: Sequence[Tensor], config: Config) -> Tensor:
    groups, _ = _heads(config)
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


WHOLE = Kind(lambda value, config: [value], lambda parts, config: parts[0])
# Queries, keys and values, group after group of heads.
QKV = Kind(_split_qkv, _join_qkv)
# Gate and up projection.
HALVES = Kind(lambda value, config: value.chunk(2), lambda parts, config: torch.cat([*parts]))


# The same of all experts of a layer, ``[experts, ...]`` in one tensor.
EACH = Kind(
    lambda value, config: value.unbind(),
    lambda parts, config: torch.stack([*parts]),
)
EACH_HALVES = Kind(
    lambda value, config: [half for expert in value for half in expert.chunk(2)],
    lambda parts, config: torch.stack([torch.cat([*p]) for p in itertools.batched(parts, 2)]),
)
EXPERTS = 'mlp.experts.experts.'
# Norms that a checkpoint has under other names than Transformer Engine's, by these.
OTHERS = 'megatron_norms'


class Row(NamedTuple):
    """One tensor of Megatron's and what it is for transformers; in a layer without its prefix."""

    megatron: str
    ours: tuple[str, ...]
    kind: Kind = WHOLE


@dataclasses.dataclass
class _Rows:
    config: Config
    rows: list[Row] = dataclasses.field(default_factory=list)

    def add(self, megatron: str, ours: str, kind: Kind = WHOLE, bias: object = None) -> None:
        """A linear layer: ``ours`` names one module or several; a bias where it is true."""
        for end in ('weight', 'bias') if bias else ('weight',):
            names = tuple(f'{name}.{end}' for name in ours.split())
            self.rows.append(Row(f'{megatron}.{end}', names, kind))

    def norm(self, megatron: str, ours: str) -> None:
        """``megatron`` ends before ``weight``: with a dot, or with ``layer_norm_``."""
        has_bias = self.config['normalization'] == 'LayerNorm'
        for end in ('weight', 'bias') if has_bias else ('weight',):
            self.rows.append(Row(megatron + end, (f'{ours}.{end}',)))

    def streams(self, module: str) -> None:
        for name in _mapping_names(self.config):
            own = name.removeprefix('gates.').removeprefix('reader.')
            self.rows.append(Row(f'{module}.{name}', (f'{module}.{own}',)))


# Of gates, and of a query: Megatron's module -> names in it; transformers has them without it.
_GATES = ('gain', 'down.weight', 'up.weight', 'write.weight')


def _mapping_names(config: Config) -> list[str]:
    """Parameters of a residual connection."""
    if config['residual_type'] == 'gated':
        return [f'gates.{name}' for name in _GATES]
    if config['residual_type'] == 'attention':
        return ['reader.query']
    if set(config['fixed_mappings']) == set(MAPPINGS):
        return []
    if config['residual_type'] == 'hc':
        dynamic = ['mapping_proj.weight', 'alpha_width', 'alpha_depth']
        return ['bias', *(dynamic if config['hc_variant'] == 'dynamic' else [])]
    alphas = ['alpha_pre', 'alpha_post', 'alpha_res']
    logits = num_logits(config['manifold'], config['num_residual_streams'])
    return ['mapping_proj.weight', 'bias', *alphas[: 3 if logits else 2]]


def rows_outside(config: Config) -> list[Row]:
    """Both ends of the model, under whole names."""
    rows = _Rows(config)
    rows.add('embedding.word_embeddings', 'model.embed_tokens')
    if config['position_embedding_type'] == 'learned_absolute':
        rows.add('embedding.position_embeddings', 'model.position_embeddings')
    rows.rows += [
        Row(f'decoder.stream_merge.{name}', (f'model.stream_merge.{name}',))
        for name in _merge_names(config)
    ]
    if has_norms(config):
        rows.norm('decoder.final_layernorm.', 'model.norm')
    if not config['tie_word_embeddings']:
        rows.add('output_layer', 'lm_head')
    return rows.rows


def _merge_names(config: Config) -> list[str]:
    kind = config['residual_type']
    if kind == 'gated':
        return [*_GATES[:-1]]
    if kind == 'attention':
        return ['query']
    learned = kind != 'standard' and config['stream_merge'] == 'learned'
    return ['mapping_proj.weight', 'bias', 'alpha'] if learned else []


def has_norms(config: Config) -> bool:
    """Whether layers and the model have norms; gated reads are normed already."""
    return bool(config['residual_type'] != 'gated')


def rows_of_layer(config: Config, layer: int) -> list[Row]:
    """One layer, under names without its prefix."""
    rows = _Rows(config)
    fused = 'self_attention.linear_qkv.layer_norm_'
    if has_norms(config):
        rows.norm('input_layernorm.' if config['kv_lora_rank'] else fused, 'input_layernorm')
    if config['kv_lora_rank']:
        _latent(rows)
    else:
        qkv = 'self_attn.q_proj self_attn.k_proj self_attn.v_proj'
        rows.add('self_attention.linear_qkv', qkv, QKV, config['qkv_bias'])
        if config['qk_norm']:
            rows.norm('self_attention.q_layernorm.', 'self_attn.q_norm')
            rows.norm('self_attention.k_layernorm.', 'self_attn.k_norm')
    rows.add('self_attention.linear_proj', 'self_attn.o_proj', bias=config['attention_bias'])
    experts = has_experts(config, layer)
    fused = 'mlp.linear_fc1.layer_norm_'
    if has_norms(config):
        rows.norm('pre_mlp_layernorm.' if experts else fused, 'post_attention_layernorm')
    if experts:
        _experts(rows)
    else:
        _mlp(rows, 'mlp')
    if config['residual_type'] != 'standard':
        rows.streams('self_attention_hyper_connection')
        rows.streams('mlp_hyper_connection')
    others = config.get(OTHERS, {})
    return [row._replace(megatron=others.get(row.megatron, row.megatron)) for row in rows.rows]


def _latent(rows: _Rows) -> None:
    """Projections of multi-latent attention, with the norms of what is between two of them."""
    theirs, ours, config = 'self_attention.', 'self_attn.', rows.config
    pairs = [('kv', 'kv_a_proj', 'kv_a_layernorm', 'kv_b_proj')]
    if config['q_lora_rank']:
        pairs.insert(0, ('q', 'q_a_proj', 'q_a_layernorm', 'q_b_proj'))
    else:
        rows.add(f'{theirs}linear_q_proj', f'{ours}q_proj')
    for name, down, norm, up in pairs:
        rows.add(f'{theirs}linear_{name}_down_proj', ours + down)
        if config['qk_norm']:
            rows.norm(f'{theirs}linear_{name}_up_proj.layer_norm_', ours + norm)
        rows.add(f'{theirs}linear_{name}_up_proj', ours + up)


def has_experts(config: Config, layer: int) -> bool:
    return bool(config['num_experts'] and config['expert_layers'][layer])


def _mlp(rows: _Rows, module: str) -> None:
    bias = rows.config['mlp_bias']
    if rows.config['gated_mlp']:
        rows.add(f'{module}.linear_fc1', f'{module}.gate_proj {module}.up_proj', HALVES, bias)
    else:
        rows.add(f'{module}.linear_fc1', f'{module}.up_proj', bias=bias)
    rows.add(f'{module}.linear_fc2', f'{module}.down_proj', bias=bias)


def _experts(rows: _Rows) -> None:
    config = rows.config
    rows.add('mlp.router', 'mlp.gate')
    if config['router_bias']:
        rows.rows.append(Row('mlp.router.expert_bias', ('mlp.expert_bias',)))
    numbers = range(config['num_experts'])
    into = ('gate_proj', 'up_proj') if config['gated_mlp'] else ('up_proj',)
    first = ' '.join(f'mlp.experts.{e}.{name}' for e in numbers for name in into)
    rows.add(f'{EXPERTS}linear_fc1', first, EACH_HALVES if config['gated_mlp'] else EACH)
    second = ' '.join(f'mlp.experts.{e}.down_proj' for e in numbers)
    rows.add(f'{EXPERTS}linear_fc2', second, EACH)
    if config['shared_expert_intermediate_size']:
        _mlp(rows, 'mlp.shared_experts')
    if config['shared_expert_gate']:
        rows.rows.append(Row('mlp.shared_experts.gate_weight', ('mlp.shared_gate.weight',)))


def one_by_one(row: Row) -> list[Row]:
    """The rows of each expert, as files of the ``torch`` format have them."""
    halves = row.kind is EACH_HALVES
    names = itertools.batched(row.ours, 2 if halves else 1)
    kind, end = HALVES if halves else WHOLE, row.megatron.removeprefix(EXPERTS)
    return [
        Row(f'mlp.experts.local_experts.{expert}.{end}', own, kind)
        for expert, own in enumerate(names)
    ]


def all_rows(config: Config) -> Iterator[tuple[int | None, Row]]:
    """Every row of the model with the number of its layer; None outside of them."""
    yield from ((None, row) for row in rows_outside(config))
    for layer in range(config['num_hidden_layers']):
        yield from ((layer, row) for row in rows_of_layer(config, layer))


def stateful_modules(config: Config, layer: int | None) -> list[str]:
    """Modules of Megatron's or of Transformer Engine's that save a state, without the prefix."""
    if layer is None:
        return ['decoder.final_layernorm'] if has_norms(config) else []
    inside = {row.megatron.rpartition('.')[0] for row in rows_of_layer(config, layer)}
    inside = {name for name in inside if 'hyper_connection' not in name and 'router' not in name}
    return sorted(inside | {'self_attention.core_attention'})


def our_names(row: Row, layer: int | None) -> list[str]:
    prefix = '' if layer is None else f'{OUR_LAYERS}{layer}.'
    return [prefix + name for name in row.ours]
