"""F_post,res on its own stream: same bits, and every tensor that crosses streams is waited for.

There is no device here. Streams, events and the allocator are imitated well enough to see a race:
every stream has a vector clock, events carry them from one to the other, and whatever reads a
tensor on a stream that cannot have seen it written is reported.
"""

from __future__ import annotations

import pytest
import torch
from layout_cases import MIXERS, MOE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mhc.residual import post_stream
from megatron_mhc.residual import recompute as block_recompute
from megatron_mhc.residual.attached import IN_FLIGHT
from megatron_mhc.residual.post_stream import left_in_flight, taken, use_post_stream
from megatron_mhc.residual.recompute import opened_segments
from megatron_mhc.schedules import executor_lanes, executor_streams

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='these models are on the CPU; a GPU needs its own checks'
)
SEQUENCE, BATCH, HIDDEN = 4, 2, 32
TORCH = {'init': 'identity', 'kernel_backend': 'torch'}
# name -> (residual settings, model settings)
CASES = {
    'mhc': (TORCH, {}),
    'mhc-kernels': ({'init': 'identity', 'kernel_backend': 'triton'}, {}),
    'hc': ({'residual_type': 'hc', 'kernel_backend': 'torch'}, {}),
    'standard': (None, {}),
    'standard-fp32': (None, {'fp32_residual_connection': True}),
    'mhc-dropout': (TORCH, {'hidden_dropout': 0.3}),
    'standard-dropout': (None, {'hidden_dropout': 0.3}),
    'mhc-moe': (TORCH, MOE),
    'standard-moe': (None, MOE),
    'hybrid-mhc': (TORCH, MOE),
    'hybrid-hc': ({'residual_type': 'hc', 'kernel_backend': 'torch'}, MOE),
    'hybrid-standard': (None, MOE),
}
# Each layer has one sublayer, of which ``-`` and ``E`` are moved.
PATTERN = '-M*E*-M'


def moe_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=False)


@pytest.fixture
def model(build):
    def make(case, **more):
        residual, settings = CASES[case]
        if case.startswith('hybrid'):
            from hybrid_models import hybrid_model

            own = {'residual_type': 'mhc', **residual} if residual else None
            return hybrid_model(PATTERN, own, **MIXERS, **settings)
        spec = moe_spec if settings is MOE else None
        return build(residual, spec=spec, num_layers=2, **{**settings, **more})

    return make


def forward(model):
    tokens = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    torch.manual_seed(9)  # dropout
    return model(tokens, positions, None, labels=tokens).float().mean()


def step(model, forward=forward):
    loss = forward(model)
    loss.backward()
    taken = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {'loss': loss.detach(), **taken}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


class Stream:
    """A stream with a vector clock: what of each stream must have happened before now."""

    def __init__(self, name):
        self.name, self.clock = name, {}

    def tick(self):
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def record_event(self):
        return dict(self.clock)

    def wait_event(self, event):
        for stream, ticks in event.items():
            self.clock[stream] = max(ticks, self.clock.get(stream, 0))


class Device(TorchDispatchMode):
    """Reports races, and tensors read on a stream that the allocator was not told of."""

    def __init__(self):
        super().__init__()
        self.streams = {'compute': Stream('compute')}
        self.written, self.told, self.alive = {}, set(), []
        self.races, self.untold, self.used = [], [], set()

    def stream(self, name, priority=0):
        assert priority == -1
        return self.streams.setdefault(name, Stream(name))

    def resized(self, storage):
        """Memory that is given back and asked for again belongs to the stream that asks."""
        here = torch.cuda.current_stream()
        self.written[storage._cdata] = here, here, here.tick()
        self.told = {told for told in self.told if told[0] != storage._cdata}

    def record_stream(self, tensor, stream):
        self.told.add((tensor.untyped_storage()._cdata, stream))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        given = {t.untyped_storage()._cdata for t in inputs}
        new = {t.untyped_storage()._cdata for t in outputs} - given
        if not new and outputs and not function._schema.is_mutable:
            return result  # a view
        assert not new & self.written.keys(), 'an address was used again'
        here = torch.cuda.current_stream()
        self.used.add(here.name)
        for storage in given & self.written.keys():
            owner, writer, ticks = self.written[storage]
            if here.clock.get(writer, 0) < ticks:
                self.races.append(f'{function} on {here.name} reads what {writer.name} writes')
            if owner is not here and (storage, here) not in self.told:
                self.untold.append(f'{function} on {here.name} reads memory of {owner.name}')
        ticks = here.tick()
        for storage in new | (given if function._schema.is_mutable else set()):
            owner = self.written.get(storage, (here,))[0]
            self.written[storage] = owner, here, ticks
        # No address in these tables may be used again, nor that of an input made before them.
        self.alive += [t.untyped_storage() for t in inputs + outputs]
        return result


@pytest.fixture
def device(monkeypatch):
    mode = Device()
    monkeypatch.setattr(post_stream, 'side_stream', mode.stream)
    monkeypatch.setattr(block_recompute, '_current_stream', lambda: torch.cuda.current_stream())
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda t, s: mode.record_stream(t, s))
    resize = torch.UntypedStorage.resize_

    def resize_(storage, size):
        mode.resized(storage)
        return resize(storage, size)

    monkeypatch.setattr(torch.UntypedStorage, 'resize_', resize_)
    with torch.cuda.stream(mode.streams['compute']):
        yield mode


@pytest.mark.parametrize('case', CASES)
def test_no_bit_changes_and_nothing_races(model, device, case):
    plain, moved = model(case), model(case)
    expected = step(plain)
    use_post_stream(moved)

    def watched(model):
        with device:
            return forward(model)

    assert_equal(step(moved, watched), expected)
    assert not device.races and not device.untold
    assert device.used == {'compute', 'post 0'}


def unordered(stream, function, *args):
    """``launch`` that does not wait for what its arguments are made of."""
    for tensor in tree_leaves(args):
        if isinstance(tensor, torch.Tensor):
            tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        return executor_streams.Launched(function(*args), stream)


@pytest.mark.parametrize('case', ['mhc', 'standard'])
@pytest.mark.parametrize('missing', ['wait-of-the-producer', 'wait-of-the-consumer', 'record'])
def test_a_missing_wait_is_noticed(model, device, monkeypatch, case, missing):
    moved = model(case)
    use_post_stream(moved)
    if missing == 'wait-of-the-producer':
        monkeypatch.setattr(post_stream, 'launch', unordered)
    elif missing == 'wait-of-the-consumer':
        monkeypatch.setattr(post_stream, 'settle', lambda x: None)
    else:
        monkeypatch.setattr(torch.Tensor, 'record_stream', lambda tensor, stream: None)
    with device:
        forward(moved)
    assert device.untold if missing == 'record' else device.races


@pytest.mark.parametrize('size', [2, 3, 6])
@pytest.mark.parametrize('broken', [False, True])
def test_a_rebuild_on_another_stream_is_waited_for(model, device, monkeypatch, broken, size):
    """The streams' results are read by sublayers' and by mHC's own backward."""
    moved = model('mhc')
    use_post_stream(moved)
    expected = step(moved)
    if broken:
        monkeypatch.setattr(executor_streams.Launched, 'result', lambda self: self._value)
        monkeypatch.setattr(post_stream, 'settle', lambda x: None)

    def dropped(model):
        for layer in model.decoder.layers:
            layer.recompute_segment_size = size
        with opened_segments() as blocks:
            loss = forward(model)
        device.races.clear()
        blocks[-1].rebuild(device.stream('high', -1))
        return loss

    with device:
        got = step(moved, dropped)
    assert_equal(got, expected)
    assert bool(device.races) == bool(device.untold) == broken
    assert 'high' in device.used


@pytest.mark.parametrize('case', ['mhc', 'standard'])
def test_a_stage_output_is_sent_from_the_stream_that_makes_it(model, device, case):
    moved = model(case)
    use_post_stream(moved)
    block = moved.decoder
    block.final_layernorm = None  # of another stage
    x = torch.randn(SEQUENCE, BATCH, HIDDEN)

    assert IN_FLIGHT.peek(block(hidden_states=x, attention_mask=None)) is None
    with device:
        with left_in_flight():
            output = block(hidden_states=x, attention_mask=None)
        launched = taken(output)
        assert IN_FLIGHT.peek(output) is None
        # As a pipeline schedule does once the output is sent.
        output.data = torch.empty(1)
        compute = device.streams['compute']
        before = dict(compute.clock)
        with launched.on_its_stream() as sent:
            assert torch.cuda.current_stream() is device.streams['post 0']
            assert sent.shape == x.shape[:-1] + (HIDDEN * (4 if case == 'mhc' else 1),)
            sent.clone()
        assert torch.cuda.current_stream() is compute and compute.clock == before
    assert not device.races
    # What is not in flight is taken as a tensor.
    assert taken(x).data_ptr() == x.data_ptr()


def test_the_next_chunk_on_the_same_rank_waits(model, device):
    first, second = model('mhc'), model('mhc')
    second.vp_stage = 1
    for chunk in (first, second):
        use_post_stream(chunk)
    first.decoder.final_layernorm = None
    second.decoder.pre_process = False
    with device:
        with left_in_flight():
            output = first.decoder(
                hidden_states=torch.randn(SEQUENCE, BATCH, HIDDEN), attention_mask=None
            )
        launched = taken(output)
        output.data = torch.empty(1)
        given = launched.result().requires_grad_()
        second.decoder.set_input_tensor(given)
        second.decoder(hidden_states=None, attention_mask=None)
    assert not device.races and not device.untold
    assert device.used == {'compute', 'post 0', 'post 1'}


@pytest.mark.parametrize('case', ['mhc', 'standard'])
def test_the_backward_hands_over_before_the_compute_stream_must_wait(model, monkeypatch, case):
    """A bias of F_post,res gets its gradient on the compute stream, so not before."""
    moved = model(case)
    use_post_stream(moved)
    last = moved.decoder.layers[-1].mlp
    loss, seen = forward(moved), []
    monkeypatch.setattr(
        executor_lanes,
        'yield_lane',
        lambda: seen.append((last.linear_fc2.bias.grad, last.linear_fc2.weight.grad)),
    )
    loss.backward()
    assert len(seen) == 2 and seen[0] == (None, None)
    assert last.linear_fc2.bias.grad is not None


@pytest.mark.parametrize('case', ['mhc', 'standard'])
def test_evaluation_stays_on_the_compute_stream(model, device, case):
    moved = model(case)
    use_post_stream(moved)
    moved.eval()
    with torch.no_grad(), device:
        forward(moved)
    assert device.used == {'compute'}


@pytest.mark.parametrize(
    'setting, value, flag',
    [
        ('recompute_granularity', 'full', '--recompute-granularity full'),
        ('cuda_graph_impl', 'local', '--cuda-graph-impl'),
        ('fine_grained_activation_offloading', True, '--fine-grained-activation-offloading'),
        ('cpu_offloading', True, '--cpu-offloading-num-layers'),
        ('overlap_moe_expert_parallel_comm', True, '--overlap-moe-expert-parallel-comm'),
    ],
)
def test_what_cannot_be_combined_is_refused(model, setting, value, flag):
    moved = model('standard')
    setattr(moved.config, setting, value)
    with pytest.raises(ValueError, match=flag):
        use_post_stream(moved)


def test_an_unknown_residual_add_is_refused(model):
    moved = model('standard')
    moved.decoder.layers[0].mlp_bda = lambda training, fused: None
    with pytest.raises(ValueError, match='get_bias_dropout_add'):
        use_post_stream(moved)
