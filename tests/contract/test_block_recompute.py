"""Recompute in segments: same bits, F once, and nothing that the kernels make stays alive."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import weakref

import pytest
import torch
from block_models import (
    BATCH,
    SEQUENCE,
    assert_equal,
    forward,
    moe_spec,
    plain_step,
    split_spec,
    taken,
)

from megatron_mhc.commands.storage_meter import StorageMeter
from megatron_mhc.residual.hyper_connection import HyperConnection
from megatron_mhc.residual.layer import HyperConnectionLayerMixin
from megatron_mhc.residual.post_stream import settle, use_post_stream
from megatron_mhc.residual.recompute import RecomputedSegment, opened_segments
from megatron_mhc.settings.recompute_cost import segment_size

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='these models are on the CPU; tests/kernels uses the GPU'
)
HIDDEN, STREAMS = 32, 2
TOKENS = SEQUENCE * BATCH
ALL = 99  # sublayers
MOE = {
    'num_moe_experts': 4,
    'moe_router_topk': 2,
    'moe_token_dispatcher_type': 'alltoall',
    'moe_router_load_balancing_type': 'aux_loss',
    'moe_aux_loss_coeff': 0.01,
    'add_bias_linear': False,
}


def selective(*modules):
    chosen = {'recompute_granularity': 'selective', 'recompute_modules': list(modules)}
    return {**chosen, 'add_bias_linear': False}


# Values of --mhc-recompute-layer-num, for L = 4 sublayers.
SIZES = {'torch': (1, 2, 3, 'auto', 'stage', 4 + 5), 'triton': (3, 'auto')}
# name -> (residual settings, model settings, backends)
BOTH = ('torch', 'triton')
CASES = {
    'mhc': ({'init': 'identity'}, {}, BOTH),
    'hc': ({'residual_type': 'hc'}, {}, ('torch',)),
    'four-streams': ({'num_residual_streams': 4, 'sinkhorn_iterations': 4}, {}, ('triton',)),
    'no-edge-fusion': ({'edge_fusion': False}, {}, ('triton',)),
    'fixed-mappings': ({'fixed_mappings': ('post',)}, {}, ('torch',)),
    'learned-merge': ({'stream_merge': 'learned'}, {}, ('torch',)),
    'dropout': ({}, {'hidden_dropout': 0.3}, BOTH),
    'moe': ({}, MOE, BOTH),
    'fp32-residual': ({}, {'fp32_residual_connection': True}, ('torch',)),
    'bf16': ({}, {'params_dtype': torch.bfloat16, 'bf16': True}, BOTH),
    'core_attn': ({}, selective('core_attn'), ('torch',)),
    'mlp': ({}, selective('mlp'), ('torch',)),
    'layernorm': ({}, selective('layernorm'), BOTH),
}


@pytest.fixture
def share_storage(monkeypatch):
    """Megatron compiles this, for ``layernorm`` recomputation, when it is first needed."""
    from megatron.core.tensor_parallel import random

    def share(output, recomputed):
        output.untyped_storage().resize_(recomputed.untyped_storage().nbytes())
        output.data.copy_(recomputed)

    monkeypatch.setattr(random, '_get_share_storage', lambda: share)


@contextlib.contextmanager
def in_segments(layers, size=ALL):
    """The segments that the forward inside opens, of ``size`` sublayers of these layers."""
    layers = [m for m in layers.modules() if isinstance(m, HyperConnectionLayerMixin)]
    for layer in layers:
        layer.recompute_segment_size = size
    with opened_segments() as segments:
        yield segments
    for layer in layers:
        layer.recompute_segment_size = 0


@pytest.fixture
def stage(build):
    """``stage(**settings)`` -> a run of the layers in a middle stage, and the layers."""

    def make(residual=None, post='compute', **settings):
        model = build(residual or {'init': 'identity', 'kernel_backend': 'torch'}, **settings)

        def run(x):
            for layer in model.decoder.layers:
                x, _ = layer(x, None)
            return x

        if post == 'high':
            use_post_stream(model)
        return run, model.decoder.layers

    return make


def streams(seed=3, n=STREAMS):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SEQUENCE, BATCH, n * HIDDEN, generator=generator)
    return x.requires_grad_()


@pytest.mark.parametrize(
    'case, backend', [(case, backend) for case in CASES for backend in CASES[case][2]]
)
def test_no_bit_changes(build, share_storage, case, backend):
    residual, settings, _ = CASES[case]
    spec = moe_spec if settings is MOE else None

    def made(size):
        own = {**residual, 'kernel_backend': backend, 'recompute_layer_num': size}
        model = build(own, spec=spec, num_layers=2, **settings)
        return model.to(settings.get('params_dtype', torch.float32))

    expected = plain_step(made('none'))
    for size in SIZES[backend]:
        model = made(size)
        with opened_segments() as segments:
            loss = forward(model)
        sublayers = segment_size(size, model.config.residual_config.num_residual_streams, 4)
        assert len(segments) == math.ceil(4 / sublayers)
        loss.backward()
        assert_equal({'loss': loss.detach(), **taken(model)}, expected)


def test_no_bit_changes_where_attention_and_mlp_are_layers_of_their_own(build):
    model = build({'kernel_backend': 'torch'}, spec=split_spec)
    expected = plain_step(model)
    with in_segments(model):
        loss = forward(model)
    loss.backward()
    assert_equal({'loss': loss.detach(), **taken(model)}, expected)


@pytest.fixture
def reads(monkeypatch):
    calls = []
    original = HyperConnection.forward

    def counted(self, x):
        calls.append(self)
        return original(self, x)

    monkeypatch.setattr(HyperConnection, 'forward', counted)
    return calls


@pytest.mark.parametrize('by_plan', [True, False], ids=['rebuilt-by-the-plan', 'by-the-backward'])
@pytest.mark.parametrize('size', [1, 4, ALL])
def test_sublayers_run_once_and_kernels_twice(build, reads, size, by_plan):
    model = build({'kernel_backend': 'torch', 'recompute_layer_num': size})
    sublayers = []
    for layer in model.decoder.layers:
        for module in (layer.self_attention, layer.mlp):
            module.register_forward_hook(lambda module, *_: sublayers.append(module))
    with opened_segments() as segments:
        loss = forward(model)
    assert len(reads) == 6
    if by_plan:
        # Only the one that the backward begins with: 1 of 1, 2 of 4, 6 of 6 sublayers.
        segments[-1].rebuild()
        again = len(reads)
        assert again == 6 + {1: 1, 4: 2, ALL: 6}[size]
        segments[-1].rebuild()
        assert len(reads) == again
    loss.backward()
    assert len(reads) == 12 and len(sublayers) == 6


@contextlib.contextmanager
def metered(layers):
    """A meter of what is made inside; what hyper-connections make is owned."""
    meter, patched = StorageMeter(), pytest.MonkeyPatch()
    for module in layers.modules():
        if isinstance(module, HyperConnection):
            for name in ('forward', 'post'):
                patched.setattr(module, name, meter.owned(getattr(module, name)))
    with patched.context(), meter:
        yield meter
    patched.undo()


@pytest.mark.parametrize('post', ['compute', 'high'])
@pytest.mark.parametrize('backend', BOTH)
def test_only_first_streams_and_sublayer_outputs_are_kept(stage, backend, post):
    """mHC, section 4.3.2: n*C a token for the segment and C a token and sublayer."""
    residual = {'init': 'identity', 'kernel_backend': backend}
    run, layers = stage(residual, post, num_layers=2, add_bias_linear=False)
    sublayers, fp32 = 2 * len(layers), 4
    run(streams())  # caches the attention mask
    with metered(layers) as plain:
        output = run(streams())
    total, ours = plain.alive()
    of_sublayers = total - ours
    assert ours >= sublayers * TOKENS * (STREAMS + 1) * HIDDEN * fp32
    del output

    with metered(layers) as meter, in_segments(layers) as segments:
        output = run(streams())
    assert meter.alive() == (of_sublayers + output.nbytes, output.nbytes)
    (segment,) = segments
    kept = sum(tensor.nbytes for tensor in segment.kept)
    assert kept == TOKENS * (STREAMS + sublayers) * HIDDEN * fp32

    with metered(layers) as rebuilt:
        segment.rebuild()
    assert rebuilt.alive().owned > 0 and not segment.kept
    output.sum().backward()
    del output
    assert rebuilt.alive().owned == 0


@pytest.mark.parametrize('size', [4, 6])
@pytest.mark.parametrize('post', ['compute', 'high'])
def test_a_graph_that_is_given_up_frees_its_segments(stage, post, size):
    """At once: a reference cycle would hold the memory until it is collected."""
    run, layers = stage(post=post)
    with in_segments(layers, size) as segments:
        output = run(streams())
    freed = [weakref.ref(segment) for segment in segments]
    gc.disable()
    try:
        settle(output)
        del segments, output
        assert [segment() for segment in freed] == [None] * -(-6 // size)
    finally:
        gc.enable()


def test_the_output_of_a_stage_may_be_freed(stage):
    """Megatron replaces the data of what was sent, and starts the backward without it."""
    from megatron.core.pipeline_parallel import schedules

    run, layers = stage()
    expected_x = streams()
    run(expected_x).backward(torch.ones_like(expected_x))
    expected = {'x': expected_x.grad, **taken(layers)}
    x = streams()
    with in_segments(layers):
        output = run(x)
    grad = torch.ones_like(output)
    schedules.deallocate_output_tensor(output, True)
    assert output.numel() == 1
    schedules.custom_backward(output, grad)
    assert_equal({'x': x.grad, **taken(layers)}, expected)


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1)])
def test_many_microbatches_are_alive_and_rebuilt_in_any_order(build, order):
    models = [build({'kernel_backend': 'torch'}, hidden_dropout=0.2) for _ in range(2)]
    chunks = [models[0], models[1], models[0]]
    expected = [plain_step(chunk, seed) for seed, chunk in enumerate(chunks)]
    rebuilds, losses = [], []
    for seed, chunk in enumerate(chunks):
        with in_segments(chunk, 4) as segments:
            losses.append(forward(chunk, seed))
        rebuilds.append(segments[-1].rebuild)
    for index in order:
        rebuilds[index]()
    for index in reversed(order):
        losses[index].backward()
        step = {'loss': losses[index].detach(), **taken(chunks[index])}
        assert_equal(step, expected[index])


def test_ddp_gets_its_gradients(build):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = build({'kernel_backend': 'torch'})
    expected = plain_step(model)
    settings = DistributedDataParallelConfig(overlap_grad_reduce=True)
    wrapped = DistributedDataParallel(model.config, settings, model)
    wrapped.zero_grad_buffer()
    with in_segments(model):
        loss = forward(wrapped)
    loss.backward()
    wrapped.finish_grad_sync()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.main_grad, expected[name]), name


def test_without_gradients_there_is_nothing_to_do(build, reads):
    model = build({'kernel_backend': 'torch'})
    with torch.no_grad(), in_segments(model) as segments:
        loss = forward(model)
    assert not loss.requires_grad and not segments
    assert len(reads) == 6


@pytest.mark.parametrize('backend', BOTH)
def test_streams_that_others_touch_between_layers(build, backend):
    """A hook replaces, changes or uses the streams; what it made cannot be rebuilt, so is kept."""
    model = build({'init': 'identity', 'kernel_backend': backend})
    first, second, _ = model.decoder.layers
    used = []

    def replace(module, inputs, output):
        return output[0] * 1.5, *output[1:]

    def change_and_use(module, inputs, output):
        with torch.no_grad():
            output[0].mul_(0.5)
        used.append(output[0].square().mean())

    first.register_forward_hook(replace)
    second.register_forward_hook(change_and_use)

    def step():
        used.clear()
        loss = forward(model) + used[0]
        loss.backward()
        return {'loss': loss.detach(), **taken(model)}

    expected = step()
    with in_segments(model):
        got = step()
    assert_equal(got, expected)


def test_streams_that_two_layers_read(stage):
    """The second begins a segment of its own."""
    run, layers = stage()

    def step():
        x, _ = layers[0](streams(), None)
        outputs = [layer(x, None)[0].square().sum() for layer in layers[1:]]
        (outputs[0] * 2 + outputs[1]).backward()
        return taken(layers)

    expected = step()
    with in_segments(layers):
        got = step()
    assert_equal(got, expected)


def test_a_backward_that_skips_the_stage_output_rebuilds_too(stage):
    """A loss on streams inside the stage alone."""
    run, layers = stage()
    inner = []
    layers[1].register_forward_hook(lambda module, inputs, output: inner.append(output[0]))
    run(streams())
    inner.pop().square().sum().backward()
    expected = taken(layers)
    with in_segments(layers):
        run(streams())
    inner.pop().square().sum().backward()
    assert_equal(taken(layers), expected)


def test_other_kernels_than_in_the_forward_are_noticed(stage):
    run, layers = stage()
    with in_segments(layers) as segments:
        output = run(streams())
    its = layers[1].mlp_hyper_connection
    its.residual = dataclasses.replace(its.residual, kernel_backend='triton')
    with pytest.raises(RuntimeError, match='did not save the same tensors'):
        segments[0].rebuild()
    del output


def test_a_segment_is_freed_before_the_next_is_rebuilt(stage, monkeypatch):
    run, layers = stage()
    with in_segments(layers, 2) as segments:
        output = run(streams())
    order, made = [], []
    rebuild = RecomputedSegment.rebuild

    def noted(segment, stream=None):
        if not segment._steps:
            return
        order.append(segments.index(segment))
        slots = list(segment._slots)
        left_over = [tensor for tensor in made if tensor() is not None]
        assert not left_over, f'of {len(made)} tensors of the segments before'
        rebuild(segment, stream)
        made.extend(weakref.ref(slot.tensor) for slot in slots)

    monkeypatch.setattr(RecomputedSegment, 'rebuild', noted)
    output.sum().backward()
    assert order == [2, 1, 0] and made


def full(method, layers):
    return {
        'recompute_granularity': 'full',
        'recompute_method': method,
        'recompute_num_layers': layers,
    }


# recompute method, layers of a checkpoint, size of the segments -> opened: in forward, in backward.
# Three layers; a checkpoint's own forward keeps nothing, so opens none.
FULL = {
    ('uniform', 2, 3): (0, 3),
    ('uniform', 1, 'auto'): (0, 6),
    ('uniform', 1, 'stage'): (0, 3),
    ('block', 1, 2): (2, 1),
    ('block', 2, 'auto'): (2, 4),
}


@pytest.mark.parametrize('backend', BOTH)
@pytest.mark.parametrize('case', FULL)
def test_segments_inside_full_recomputation(build, backend, case):
    method, layers, size = case
    expected = plain_step(build({'kernel_backend': backend}))
    residual = {'kernel_backend': backend, 'recompute_layer_num': size}
    model = build(residual, **full(method, layers))
    with opened_segments() as forwards:
        loss = forward(model)
    with opened_segments() as backwards:
        loss.backward()
    assert (len(forwards), len(backwards)) == FULL[case]
    assert_equal({'loss': loss.detach(), **taken(model)}, expected)


def test_a_plan_rebuilds_the_segment_that_the_backward_begins_with(stage):
    from megatron_mhc.pipeline.chunk_stage import ChunkStage

    run, layers = stage()
    settings = {'is_last': False, 'evaluating': False, 'reduces': False}
    config = layers[0].config
    chunk = ChunkStage(
        layers, config, lambda m, x: (run(x), 0), recompute_stream='compute', **settings
    )
    with in_segments(layers, 4):
        chunk.forward(0, streams())
    first, last = chunk._segments[0]
    chunk.recompute(0)
    assert first.kept and not last.kept
