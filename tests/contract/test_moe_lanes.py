"""A mixture of experts in fused slots: same bits, and all-to-alls under the other's compute.

With expert parallelism over two processes: ``python test_moe_lanes.py RANK STORE``.
"""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_mhc import ResidualConfig
from megatron_mhc.runtime import cpu_device

if __name__ == '__main__':
    cpu_device.install()

SEQUENCE, VOCABULARY = 8, 64
RESIDUALS = {'standard': None, 'mhc': {'init': 'identity', 'kernel_backend': 'torch'}}
ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='these models are on the CPU; a GPU needs its own checks'
)


def chunk(residual, dispatcher='alltoall', ep=1):
    """A chunk of two layers with four experts."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(5)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_token_dispatcher_type=dispatcher,
        moe_router_load_balancing_type='aux_loss',
        moe_aux_loss_coeff=0.01,
        expert_model_parallel_size=ep,
        add_bias_linear=False,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
    )
    if residual is not None:
        config.residual_config = ResidualConfig(**residual)
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
    )
    # Set later, because a model is otherwise asked which of two chunks it is.
    config.pipeline_config = SimpleNamespace(schedule='dualpipev')
    return model


def forward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(2, -1)
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous()).mean()


def gradients(model):
    taken = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


def one_after_the_other(forward, backward):
    backward()
    return forward(), None


def step(models, slot, seed=0):
    """Microbatch B's backward through one chunk in a slot with A's forward through the other."""
    first, second = models
    loss_b = forward(first, seed)
    loss_a, _ = slot(lambda: forward(second, seed + 1), loss_b.backward)
    loss_a.backward()
    losses = {'loss a': loss_a.detach(), 'loss b': loss_b.detach()}
    both = {f'{i} {n}': g for i, m in enumerate(models) for n, g in gradients(m).items()}
    return losses | both


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.fixture
def lanes(megatron):
    from megatron_mhc.patches import engine
    from megatron_mhc.patches.moe_lanes import MOE_LANE_PATCHES

    engine.apply(MOE_LANE_PATCHES)
    yield
    engine.revert(MOE_LANE_PATCHES)


class Logged(torch.autograd.Function):
    """Identity that tells when it is passed, forward and backward."""

    log: list[str] = []

    @staticmethod
    def forward(ctx, x, name):
        Logged.log.append(f'{name}(F)')
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        Logged.log.append(f'{ctx.name}(B)')
        return grad, None


@pytest.fixture
def log(megatron, monkeypatch):
    """What runs, in order: attention and experts from a hook, communication from underneath."""
    from megatron.core.transformer.moe import token_dispatcher

    def logging(name, original):
        @functools.wraps(original)
        def method(self, hidden_states, *args, **kwargs):
            result = original(self, hidden_states, *args, **kwargs)
            if isinstance(result, tuple):
                return Logged.apply(result[0], name), *result[1:]
            return Logged.apply(result, name)

        return method

    for kind in ('AlltoAll', 'AllGather'):
        dispatcher = getattr(token_dispatcher, f'MoE{kind}TokenDispatcher')
        for name in ('dispatch', 'combine'):
            original = getattr(dispatcher, f'token_{name}')
            monkeypatch.setattr(dispatcher, f'token_{name}', logging(name, original))
    monkeypatch.setattr(Logged, 'log', [])
    return Logged.log


def log_compute(models):
    def logging(name):
        return lambda module, inputs, output: (Logged.apply(output[0], name), *output[1:])

    for model in models:
        for layer in model.decoder.layers:
            layer.self_attention.register_forward_hook(logging('attention'))
            layer.mlp.experts.register_forward_hook(logging('experts'))


# What runs between two hand-overs; the backward lane begins.
FIRST_LAYER = ['combine(B)'], ['attention(F)', 'dispatch(F)']
MIDDLE = ['experts(B)', 'dispatch(B)'], ['experts(F)', 'combine(F)']
NEXT_LAYER = ['attention(B)', 'combine(B)'], ['attention(F)', 'dispatch(F)']
INTERLEAVED = (*FIRST_LAYER, *MIDDLE, *NEXT_LAYER, *MIDDLE, ['attention(B)'])


@pytest.mark.parametrize('post', ['compute', 'high'])
@pytest.mark.parametrize('dispatcher', ['alltoall', 'allgather'])
@pytest.mark.parametrize('residual', RESIDUALS)
def test_a_fused_slot_interleaves_and_changes_no_bit(log, lanes, residual, dispatcher, post):
    from megatron_mhc.residual.post_stream import use_post_stream
    from megatron_mhc.schedules.executor_lanes import run_lanes

    models = [chunk(RESIDUALS[residual], dispatcher) for _ in range(2)]
    log_compute(models)
    expected = step(models, one_after_the_other)
    if post == 'high':
        for model in models:
            use_post_stream(model)

    def slot(*parts):
        log.clear()
        results = run_lanes(*parts)
        assert log == list(itertools.chain(*INTERLEAVED))
        return results

    assert_equal(step(models, slot), expected)


def test_dense_layers_hand_over_where_post_res_has_a_stream(build, megatron):
    """Without communication, F_post,res is what the other microbatch may run beside."""
    from megatron_mhc.residual.post_stream import use_post_stream
    from megatron_mhc.schedules.executor_lanes import run_lanes

    residual = {'init': 'identity', 'kernel_backend': 'torch'}
    models = [build(residual, num_layers=2) for _ in range(2)]
    expected = step(models, one_after_the_other)
    log = []
    for lane, model in zip('BF', models, strict=True):
        use_post_stream(model)
        for layer in model.decoder.layers:
            layer.mlp.register_forward_hook(lambda *_, lane=lane: log.append(f'{lane}-forward'))
            layer.mlp.register_full_backward_hook(
                lambda *_, lane=lane: log.append(f'{lane}-backward')
            )

    def slot(*parts):
        log.clear()
        results = run_lanes(*parts)
        assert log == ['F-forward', 'B-backward'] * 2
        return results

    assert_equal(step(models, slot), expected)


@pytest.mark.parametrize('schedule', ['zb-v', None])
def test_models_without_fused_slots_are_left_alone(lanes, monkeypatch, schedule):
    from megatron_mhc.patches import moe_lanes

    def forbidden(*args):
        raise AssertionError('communication was moved')

    model = chunk(None)
    model.config.pipeline_config = SimpleNamespace(schedule=schedule) if schedule else None
    monkeypatch.setattr(moe_lanes, 'launch', forbidden)
    forward(model, 0).backward()
    model.config.pipeline_config = SimpleNamespace(schedule='dualpipev')
    with torch.no_grad():
        forward(model, 0)
    with pytest.raises(AssertionError, match='moved'):
        forward(model, 0)


def test_tensors_that_a_dispatcher_keeps_cross_streams_too():
    from megatron_mhc.patches.moe_lanes import _held

    class OnDevice(torch.Tensor):
        is_cuda = True

    own, managed = (torch.zeros(1).as_subclass(OnDevice) for _ in range(2))
    manager = SimpleNamespace(token_probs=managed, host=torch.zeros(1), group=None)
    dispatcher = SimpleNamespace(_comm_manager=manager, routing_map=own, capacity=3)
    assert [id(tensor) for tensor in _held(dispatcher)] == [id(own), id(managed)]


def test_expert_parallel_ranks_issue_their_collectives_in_one_order(tmp_path):
    """EP=2 over gloo: a wrong order would hang or exchange the wrong messages."""
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path[1:]])}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / 'store')],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], '\n'.join(outputs)
    assert all('equal' in output for output in outputs)


def run_rank(rank: int, store: str) -> None:
    """One of two expert-parallel ranks: different tokens on each, so unequal splits."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_mhc.patches import engine
    from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES
    from megatron_mhc.patches.moe_lanes import MOE_LANE_PATCHES
    from megatron_mhc.patches.registry import RESIDUAL_PATCHES
    from megatron_mhc.schedules.executor_lanes import run_lanes

    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{store}', rank=rank, world_size=2
    )
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    engine.apply(CPU_DEVICE_PATCHES + RESIDUAL_PATCHES + MOE_LANE_PATCHES)
    for residual, dispatcher in itertools.product(RESIDUALS.values(), ('alltoall', 'allgather')):
        models = [chunk(residual, dispatcher, ep=2) for _ in range(2)]
        expected = step(models, one_after_the_other, seed=10 * rank)
        assert_equal(step(models, run_lanes, seed=10 * rank), expected)
    torch.distributed.barrier()
    print('equal')


if __name__ == '__main__':
    run_rank(int(sys.argv[1]), sys.argv[2])
