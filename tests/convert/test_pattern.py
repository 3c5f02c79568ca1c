"""Patterns, names and saved arguments of both classes of models, without a checkpoint."""

from __future__ import annotations

import argparse
import types

import pytest
import torch

from megatron_mhc.convert.class_args import gpt_args, hybrid_args
from megatron_mhc.convert.layer_names import STACKED, Names, Part
from megatron_mhc.convert.moved import Moved
from megatron_mhc.convert.optimizer_state import check_optimizer
from megatron_mhc.convert.pattern import parsed, require_gpt_layers
from megatron_mhc.convert.source import Chunk, Entry, whole

GPT = {
    'num_layers': 4,
    'num_experts': None,
    'moe_layer_freq': 1,
    'mtp_num_layers': None,
    'multi_latent_attention': False,
    'pipeline_model_parallel_size': 1,
    'virtual_pipeline_model_parallel_size': None,
    'num_layers_per_virtual_pipeline_stage': None,
    'num_virtual_stages_per_pipeline_rank': None,
    'pipeline_model_parallel_layout': None,
    'decoder_first_pipeline_num_layers': None,
    'decoder_last_pipeline_num_layers': None,
    'account_for_embedding_in_pipeline_split': False,
    'account_for_loss_in_pipeline_split': False,
    'hybrid_layer_pattern': None,
    'spec': None,
}
VIRTUAL = {
    'pipeline_model_parallel_size': 2,
    'virtual_pipeline_model_parallel_size': 2,
    'num_layers_per_virtual_pipeline_stage': 1,
}
# What a GPT run was given -> its pattern; every one comes back as it was.
PATTERNS = {
    '*-*-*-*-': {},
    '*E*E*E*E': {'num_experts': 8},
    '*-*-*E*E': {'num_experts': 8, 'moe_layer_freq': [0, 0, 1, 1]},
    '+-+-+E+E/+E/+E': {
        'num_experts': 8,
        'moe_layer_freq': [0, 0, 1, 1],
        'multi_latent_attention': True,
        'mtp_num_layers': 2,
    },
    '*-|*-|*-|*-': VIRTUAL,
    '*-|*-*-*-': {
        'pipeline_model_parallel_size': 2,
        'pipeline_model_parallel_layout': 'Et|tttL',
    },
    '*-*-*-*-/*-': {'mtp_num_layers': 1, 'pipeline_model_parallel_size': 4},
}


def gpt(**values: object) -> argparse.Namespace:
    return argparse.Namespace(**GPT | values)


@pytest.mark.parametrize('pattern', PATTERNS)
def test_arguments_come_back(pattern):
    given = gpt(**PATTERNS[pattern])
    if '+' in pattern:
        symbols = pytest.importorskip('megatron.core.ssm.mamba_hybrid_layer_allocation').Symbols
        if '+' not in symbols.VALID_LAYERS:
            with pytest.raises(ValueError, match='latent attention is .* 0.19 or newer'):
                hybrid_args(given)
            return
    hybrid = hybrid_args(given)
    assert hybrid.hybrid_layer_pattern == str(parsed(pattern)) == pattern
    assert hybrid.num_layers == 8 and hybrid.moe_layer_freq == 1
    # Megatron refuses a pattern beside any of these.
    assert hybrid.num_layers_per_virtual_pipeline_stage is None
    assert hybrid.pipeline_model_parallel_layout is None
    assert vars(gpt_args(hybrid)) == vars(given)


def test_stages_that_are_given_otherwise():
    """Ends of unequal length are said twice as long; embedding and loss take a layer's place."""
    ends = gpt(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=1)
    hybrid = hybrid_args(ends)
    assert hybrid.decoder_first_pipeline_num_layers == 2 and '|' not in hybrid.hybrid_layer_pattern
    assert vars(gpt_args(hybrid)) == vars(ends)
    places = {f'account_for_{end}_in_pipeline_split': True for end in ('embedding', 'loss')}
    hybrid = hybrid_args(gpt(pipeline_model_parallel_size=3, **places))
    assert hybrid.hybrid_layer_pattern == '*-|*-*-|*-'
    assert not hybrid.account_for_loss_in_pipeline_split
    assert gpt_args(hybrid).pipeline_model_parallel_layout == 'Et|tt|tL'
    # A layout of the run, not of the model, which a GPT model cannot have.
    cut = gpt_args(argparse.Namespace(**GPT | VIRTUAL | {'hybrid_layer_pattern': '*|-*-*-|*|-'}))
    assert cut.num_layers == 4 and cut.virtual_pipeline_model_parallel_size is None


@pytest.mark.parametrize(
    ('pattern', 'message'),
    [
        ('*-M-', r'layer 2 is Mamba \(M\), which no GPT model has: it stays hybrid'),
        ('G-*-', r'layer 0 is gated delta net \(G\), which no GPT'),
        ('*-*-D-', r'layer 4 is sparse attention \(D\), which no GPT'),
        ('*-**', r'layer 3 is attention \(\*\) where a GPT model has an MLP or experts'),
        ('*--', r'layer 2 is an MLP \(-\) where a GPT model has attention'),
        ('E*', r'layer 0 is experts \(E\) where a GPT model has attention'),
        ('*-|*', 'its last layer, 2, is attention with no MLP'),
        ('*-*E/*-', r'a depth of prediction is \*- where a GPT model has its last layer, \*E'),
    ],
)
def test_patterns_that_gpt_models_cannot_have(pattern, message):
    with pytest.raises(ValueError, match=message) as refused:
        require_gpt_layers(pattern)
    assert '\n' not in str(refused.value) and f'{pattern}:' in str(refused.value)


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'hybrid_layer_pattern': '*-'}, 'it is a hybrid model already'),
        ({'use_rope_scaling': True}, '--use-rope-scaling, and a HybridModel has no'),
        ({'no_rope_freq': 4}, '--no-rope-freq 4, and it counts layers'),
        ({'window_attn_skip_freq': 2}, '--window-attn-skip-freq 2, and it counts'),
        ({'qk_layernorm': True}, '--qk-layernorm, and .* no norms of queries'),
        ({'spec': ['mine', 'spec']}, '--spec .*nothing tells'),
        ({'position_embedding_type': 'relative'}, '--position-embedding-type relative'),
        ({'enable_hyper_connections': True}, 'enable_hyper_connections, .* first --to mhc'),
        ({'engram_layers': [1]}, r'a memory \(--engram-layers\), .* are hashed by the number'),
        ({'num_experts': 2, 'moe_layer_freq': [1]}, 'names 1 layers where the model has 4'),
    ],
)
def test_what_a_hybrid_model_has_not(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        hybrid_args(gpt(**given))
    assert '\n' not in str(refused.value)


def test_what_an_own_spec_could_have_is_let_through():
    assert hybrid_args(gpt(qk_layernorm=True, spec=['a', 'b']), unchecked=True).spec is None
    stock = ['megatron.core.models.mamba.mamba_layer_specs', 'mamba_stack_spec']
    hybrid = argparse.Namespace(**GPT | {'hybrid_layer_pattern': '*-', 'spec': stock})
    assert gpt_args(hybrid).spec is None
    hybrid.spec = ['mine', 'stack']
    with pytest.raises(ValueError, match='--to gpt: it was trained with --spec'):
        gpt_args(hybrid)
    hybrid.hybrid_layer_pattern = None
    with pytest.raises(ValueError, match='no --hybrid-layer-pattern'):
        gpt_args(hybrid)


LAYER = 'decoder.layers.'
STATE = 'optimizer.state.exp_avg.'
# GPT name in a distributed checkpoint of unlike layers, hybrid name; local layers, then TE's.
PAIRS = {
    f'{LAYER}0.self_attention.linear_qkv.layer_norm_weight': f'{LAYER}0.self_attention.linear_qkv.'
    'layer_norm_weight',
    f'{LAYER}0.mlp.linear_fc1.layer_norm_bias': f'{LAYER}1.mlp.linear_fc1.layer_norm_bias',
    f'{LAYER}1.mlp.linear_fc1.layer_norm_weight': f'{LAYER}3.pre_mlp_layernorm.weight',
    f'{LAYER}1.mlp.router.expert_bias': f'{LAYER}3.mlp.router.expert_bias',
    f'{STATE}{LAYER}1.mlp.experts.experts.linear_fc1.weight': f'{STATE}{LAYER}3.mlp.experts.experts'
    '.linear_fc1.weight',
    f'{LAYER}1.self_attention_hyper_connection.alpha_res': f'{LAYER}2.self_attention_hyper_'
    'connection.alpha_res',
    'decoder.final_layernorm.weight': 'decoder.final_norm.weight',
    f'{STATE}decoder.final_layernorm.weight': f'{STATE}decoder.final_norm.weight',
    'decoder.stream_merge.bias': 'decoder.stream_merge.bias',
    f'{LAYER}1.key_layernorm.weight': f'{LAYER}2.key_layernorm.weight',
    'decoder.dense_aggregates.1.bias': 'decoder.dense_aggregates.1.bias',
    'rng_state/shard_0.0_1.1': 'rng_state/shard_0.0_1.1',
    'mtp.layers.0.transformer_layer.mlp.router.weight': 'mtp.layers.0.mtp_model_layer.layers.1.mlp.'
    'router.weight',
    'mtp.layers.0.transformer_layer.mlp.linear_fc1.layer_norm_weight': 'mtp.layers.0.mtp_model_'
    'layer.layers.1.pre_mlp_layernorm.weight',
    'mtp.layers.0.eh_proj.weight': 'mtp.layers.0.eh_proj.weight',
    f'{LAYER}1.mlp.experts.experts.linear_fc1._extra_state/shard_2_4': f'{LAYER}3.mlp.experts.'
    'experts.linear_fc1._extra_state/shard_2_4',
}


def test_names_of_unlike_layers():
    names = Names('*-*E', distributed=True, stacked=False, fused=True)
    assert names.to_hybrid(PAIRS) == {new: (Part(old),) for old, new in PAIRS.items()}
    assert names.to_gpt(PAIRS.values()) == {old: (Part(new),) for old, new in PAIRS.items()}
    # Transformer Engine has the norm before experts apart in both.
    engine = Names('*-*E', distributed=True, stacked=False, fused=None)
    apart = f'{LAYER}3.pre_mlp_layernorm.weight'
    assert engine.to_gpt([apart]) == {f'{LAYER}1.pre_mlp_layernorm.weight': (Part(apart),)}
    # Local layers with latent attention have all norms apart, and a hybrid one that of its MLP not.
    latent = Names('+-', distributed=True, stacked=False, fused=False)
    norms = [f'{LAYER}0.{norm}_layernorm.weight' for norm in ('input', 'pre_mlp')]
    new = [norms[0], f'{LAYER}1.mlp.linear_fc1.layer_norm_weight']
    assert [*latent.to_hybrid(norms)] == new and [*latent.to_gpt(new)] == norms
    # The format of one file names modules, which are the same in both.
    modules = Names('*-*E', distributed=False, stacked=False, fused=True)
    assert [*modules.to_hybrid([f'{LAYER}0.pre_mlp_layernorm.weight'])] == [
        f'{LAYER}1.pre_mlp_layernorm.weight'
    ]


def test_names_of_like_layers():
    """One tensor of all layers is one for each, and opaque states know where they lie."""
    names = Names('*E*E', distributed=True, stacked=True, fused=False)
    weight = f'{LAYER}mlp.router.weight'
    apart = [f'{LAYER}1.mlp.router.weight', f'{LAYER}3.mlp.router.weight']
    assert names.to_hybrid([weight]) == {new: (Part(weight, i),) for i, new in enumerate(apart)}
    assert names.to_gpt(apart[::-1]) == {weight: tuple(Part(name, STACKED) for name in apart)}
    states = {
        f'{LAYER}self_attention.linear_qkv._extra_state/shard_1_2': f'{LAYER}2.self_attention.'
        'linear_qkv._extra_state/shard_0_1',
        f'{LAYER}mlp.experts.linear_fc1._extra_state/shard_0.3_2.4': f'{LAYER}1.mlp.experts.'
        'linear_fc1._extra_state/shard_3_4',
    }
    assert names.to_hybrid(states) == {new: (Part(old),) for old, new in states.items()}
    assert names.to_gpt(states.values()) == {old: (Part(new),) for old, new in states.items()}
    assert not names.to_gpt(['output_layer._extra_state/shard_0_1'])
    with pytest.raises(ValueError, match='layer 2 or 3 has none, where the layers'):
        names.to_gpt(apart[:1])
    for name, message in (
        (f'{LAYER}0.cross_attention.weight', 'neither the attention nor the MLP'),
        (f'{LAYER}1.self_attention.linear_proj.weight', 'layer 1 has no such part'),
        (f'{LAYER}4.self_attention.linear_proj.weight', 'layer 4 has no such part'),
    ):
        with pytest.raises(ValueError, match=message):
            names.to_gpt([name])


class Held:
    """A source of tensors in memory, each in two parts."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def entry(self, name: str) -> Entry:
        shape = tuple(self.tensors[name].shape)
        half = (shape[0] // 2, *shape[1:])
        starts = [(i * half[0], *(0 for _ in half[1:])) for i in range(2)]
        return Entry(shape, torch.float32, tuple(Chunk(start, half) for start in starts))

    def chunk(self, name: str, chunk: Chunk) -> torch.Tensor:
        where = (slice(o, o + n) for o, n in zip(*chunk, strict=True))
        return self.tensors[name][tuple(where)]


def test_layers_are_cut_from_a_tensor_and_stacked_again(random_seed):
    """Whatever the parts in which it lies, one of them with two layers."""
    stack = torch.randn(4, 6, 2)
    cut = Moved(Held(all=stack), {str(i): (Part('all', i),) for i in range(4)}, {})
    for i in range(4):
        entry = cut.entries()[str(i)]
        assert entry.shape == (6, 2) and len(entry.chunks) == 1
        assert torch.equal(cut.chunk(str(i), entry.chunks[0]), stack[i])
    parts = tuple(Part(str(i), STACKED) for i in range(4))
    back = Moved(Held(**{str(i): stack[i] for i in range(4)}), {'all': parts}, {})
    entry = back.entries()['all']
    assert entry.shape == (4, 6, 2) and len(entry.chunks) == 8
    made = torch.full_like(stack, torch.nan)
    for chunk in entry.chunks:
        where = (slice(o, o + n) for o, n in zip(*chunk, strict=True))
        made[tuple(where)] = back.chunk('all', chunk)
    assert torch.equal(made, stack)
    with pytest.raises(ValueError, match='layers that are alike in the saved arguments differ'):
        Moved(Held(a=stack, b=stack[0]), {'x': (Part('a', STACKED), Part('b', STACKED))}, {})


def test_optimizer_state_that_cannot_be_carried():
    weight, other = whole(torch.zeros(2)), whole(torch.zeros(3))

    def check(run: dict, disk: str = 'torch_dist', state: dict | None = None) -> None:
        check_optimizer(
            types.SimpleNamespace(
                format=disk, entries={'a': weight, 'b': weight}, run=run, state=state or {}
            )
        )

    first = {'optimizer.state.exp_avg.a': weight, 'chained_1.optimizer.state.exp_avg.b': weight}
    check(first | {'rng_state/shard_0_1': Entry(None, None)})
    for run, message in (
        ({'optimizer.distributed.dp_group_idx_0.gbuf': weight}, 'fully-reshardable, or leave it'),
        ({'optimizer.state.exp_avg.a': other}, 'they do not belong together'),
        ({'optimizer.state.exp_avg.c': weight}, 'its weight none'),
        (first | {'optimizer.state.exp_avg_sq.a': weight}, 'exp_avg_sq of b is missing'),
    ):
        with pytest.raises(ValueError, match=message):
            check(run)
    with pytest.raises(ValueError, match='numbered .*--no-optim'):
        check({}, 'torch', {'optimizer': {'state': {}}})
    check({}, 'torch')
