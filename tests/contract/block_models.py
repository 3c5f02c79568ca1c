"""What the tests of small models share: their settings, specs and steps."""

from __future__ import annotations

import dataclasses
import pathlib
import re

import torch
from launch import launch

SCRIPT = pathlib.Path(__file__).parents[2] / 'examples' / 'pretrain_gpt.py'
SEQUENCE, BATCH = 4, 2
# Of any model here.
SMALL = {
    'hidden_size': 32,
    'ffn_hidden_size': 64,
    'num_attention_heads': 4,
    'use_cpu_initialization': True,
    'hidden_dropout': 0.0,
    'attention_dropout': 0.0,
    'persist_layer_norm': False,
    'gradient_accumulation_fusion': False,
    'masked_softmax_fusion': False,
    'bias_dropout_fusion': False,
}


def moe_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=False)


def split_spec(config):
    """Attention and MLP in layers of their own."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    whole = get_gpt_layer_local_spec()

    def without(*names):
        gone = {name: IdentityFuncOp if name.endswith('bda') else IdentityOp for name in names}
        submodules = dataclasses.replace(whole.submodules, **gone)
        return ModuleSpec(module=whole.module, submodules=submodules)

    attention = without('pre_mlp_layernorm', 'mlp', 'mlp_bda')
    mlp = without('input_layernorm', 'self_attention', 'self_attn_bda')
    return TransformerBlockSubmodules(
        layer_specs=[attention, mlp, mlp], layer_norm=whole.submodules.input_layernorm
    )


def forward(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (BATCH, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    torch.manual_seed(9)  # dropout
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous()).float().mean()


def taken(module):
    """All gradients, which the module no longer has."""
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return gradients


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def plain_step(model, seed=1):
    loss = forward(model, seed)
    loss.backward()
    return {'loss': loss.detach(), **taken(model)}


def assert_follows(model, step, reference_loss):
    """Loss and gradients of a model in fp64, its norms and maps in fp32 or wider, to rounding.

    Args:
        step: the fixture; reference_loss: tokens ``[2, 17]`` to the loss of each, written apart.
    """
    loss, gradients = step(model, seed=1)
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    expected = reference_loss(tokens)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    expected.mean().backward()
    whole = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / whole
        assert error < 1e-7, (name, error)


def train(folder, flags):
    """Train a small GPT by the launcher, 20 iterations with dropout, and save; its loss falls."""
    common = (
        '--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --lr 1e-2 '
        '--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 --mock-data '
        '--tokenizer-type NullTokenizer --vocab-size 255 --lr-decay-style constant --num-workers 0 '
        '--eval-iters 0 --eval-interval 99 --log-interval 1 --split 98,1,1 --hidden-dropout 0.1 '
        f'--save {folder} --save-interval 20 --train-iters 20 '
    )
    done = launch(1, '-m', 'megatron_mhc.run', SCRIPT, *(common + flags).split())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r'lm loss: (\S+)', done.stdout)]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
