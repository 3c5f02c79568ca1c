"""Mamba and gated delta net layers in plain torch compute what their papers' recurrences do."""

from __future__ import annotations

import pytest
import torch

from megatron_mhc import compat
from megatron_mhc.runtime.cpu_delta_rule import chunk_gated_delta_rule
from megatron_mhc.runtime.cpu_ssd import GatedRMSNorm, mamba_chunk_scan_combined

BATCH, HEADS, SIZE, GROUPS, STATE = 2, 4, 3, 2, 5
# (length, chunk): one token, one chunk that is not full, full ones, and a rest.
LENGTHS = [(1, 4), (3, 64), (12, 4), (13, 4), (9, 1)]
EXACT = {'rtol': 1e-9, 'atol': 1e-11}


@pytest.fixture
def drawn(random_seed):
    """``drawn(*shape)``: normal numbers in fp64, which want a gradient."""
    generator = torch.Generator().manual_seed(random_seed)

    def draw(*shape, scale=1.0):
        numbers = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return numbers.requires_grad_()

    return draw


def same_with_gradients(outputs, wanted, inputs, **tolerance):
    torch.testing.assert_close(outputs, wanted, **tolerance)
    losses = (sum((o * o.detach().cos()).sum() for o in side) for side in (outputs, wanted))
    gradients, references = (
        torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses
    )
    torch.testing.assert_close(gradients, references, **tolerance)
    assert all(gradient.abs().max() > 0 for gradient in references)


def state_space_inputs(drawn, length):
    x, dt = drawn(BATCH, length, HEADS, SIZE), drawn(BATCH, length, HEADS)
    B, C = (drawn(BATCH, length, GROUPS, STATE) for _ in range(2))
    return x, dt, drawn(HEADS, scale=0.5), B, C, drawn(BATCH, HEADS, SIZE, STATE)


def expanded(groups):
    return groups.repeat_interleave(HEADS // GROUPS, dim=2)


@pytest.mark.parametrize(('length', 'chunk'), LENGTHS)
def test_a_state_space_in_chunks_is_its_recurrence(drawn, length, chunk):
    from recurrences import state_space

    x, dt, A_log, B, C, state = inputs = state_space_inputs(drawn, length)
    A, step = -A_log.exp(), torch.nn.functional.softplus(dt)
    options = {'dt_softplus': True, 'initial_states': state, 'return_final_states': True}
    outputs = mamba_chunk_scan_combined(x, dt, A, B, C, chunk, **options)
    wanted = state_space(x, step, A, expanded(B), expanded(C), state=state)
    same_with_gradients(outputs, wanted, inputs, **EXACT)


@pytest.mark.parametrize('chunk', [4, 64])
@pytest.mark.parametrize('starts', [(1, 5), (4, 8, 9)])
def test_packed_sequences_of_a_state_space_do_not_meet(drawn, starts, chunk):
    from recurrences import state_space

    x, dt, A_log, B, C, _ = state_space_inputs(drawn, 13)
    A, bounds = -A_log.exp(), torch.tensor(starts)
    numbers = torch.bucketize(torch.arange(13), bounds, right=True).expand(BATCH, -1)
    options = {'seq_idx': numbers, 'return_final_states': True}
    outputs = mamba_chunk_scan_combined(x, dt.exp(), A, B, C, chunk, **options)
    wanted = state_space(x, dt.exp(), A, expanded(B), expanded(C), starts)
    same_with_gradients(outputs, wanted, (x, dt, A_log, B, C), **EXACT)


def test_decays_that_vanish_leave_gradients_finite(drawn):
    x, dt, A_log, B, C, _ = inputs = state_space_inputs(drawn, 13)
    single = [t.detach().float().requires_grad_() for t in inputs[:5]]
    x, dt, A_log, B, C = single
    y = mamba_chunk_scan_combined(x, 100 * dt.exp(), -A_log.exp(), B, C, 8)
    gradients = torch.autograd.grad(y.sum(), single)
    assert all(t.isfinite().all() for t in (y, *gradients))


def test_states_of_16_bit_inputs_are_kept_in_fp32(drawn):
    rounded = [t.detach().bfloat16() for t in state_space_inputs(drawn, 13)[:5]]
    x, dt, _, B, C = rounded
    A, step = -torch.arange(1.0, HEADS + 1), dt.exp()
    whole = mamba_chunk_scan_combined(x.float(), step.float(), A, B.float(), C.float(), 4)
    assert torch.equal(mamba_chunk_scan_combined(x, step, A, B, C, 4), whole.bfloat16())


def delta_inputs(drawn, length):
    q, k = (drawn(BATCH, length, HEADS, SIZE) for _ in range(2))
    g, beta = (drawn(BATCH, length, HEADS) for _ in range(2))
    return q, k, drawn(BATCH, length, HEADS, STATE), g, beta, drawn(BATCH, HEADS, SIZE, STATE)


@pytest.mark.parametrize(('length', 'chunk'), LENGTHS)
def test_a_delta_rule_in_chunks_is_its_recurrence(drawn, length, chunk):
    from recurrences import gated_delta_rule

    q, k, v, g, beta, state = inputs = delta_inputs(drawn, length)
    unit = torch.nn.functional.normalize(k, dim=-1)
    gates = -g.exp(), beta.sigmoid()
    options = {'initial_state': state, 'output_final_state': True, 'chunk_size': chunk}
    outputs = chunk_gated_delta_rule(q, unit, v, *gates, **options)
    wanted = gated_delta_rule(q, unit, v, *gates, state=state)
    same_with_gradients(outputs, wanted, inputs, **EXACT)


@pytest.mark.parametrize('starts', [(1, 5), (4, 8, 9)])
def test_packed_sequences_of_a_delta_rule_do_not_meet(drawn, starts):
    from recurrences import gated_delta_rule

    # One of the sequences is empty, as padding makes them.
    bounds = torch.tensor([0, *starts, starts[-1], 13])
    q, k, v, g, beta, _ = (t[:1] for t in delta_inputs(drawn, 13))
    gates = -g.exp(), beta.sigmoid()
    y, _ = chunk_gated_delta_rule(q, k, v, *gates, cu_seqlens=bounds, chunk_size=4)
    wanted, _ = gated_delta_rule(q, k, v, *gates, starts)
    torch.testing.assert_close(y, wanted, **EXACT)


def test_the_gated_norm_is_of_groups(drawn):
    norm = GatedRMSNorm(12, group_size=4, dtype=torch.float64)
    x, z = drawn(3, 2, 12), drawn(3, 2, 12)
    gated = (x * z * z.sigmoid()).view(3, 2, 3, 4)
    wanted = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x, z), wanted.view(3, 2, 12), **EXACT)


MAMBA = {'mamba_state_dim': STATE, 'mamba_head_dim': 8, 'mamba_num_groups': GROUPS}
DELTA_NET = {
    'linear_key_head_dim': 8,
    'linear_value_head_dim': 6,
    'linear_num_key_heads': 2,
    'linear_num_value_heads': 4,
    'activation_func': torch.nn.functional.silu,
}
MIXERS = {'M': ('mixer', 'mamba_layer'), 'G': ('self_attention', 'delta_net_layer')}


@pytest.fixture(params=MIXERS)
def layer(request, megatron, random_seed):
    """Megatron's mixer with random parameters, what calls it, and its truth in fp64."""
    import recurrences
    from hybrid_models import hybrid_model

    attribute, truth = MIXERS[request.param]
    model = hybrid_model(request.param, normalization='RMSNorm', **MAMBA, **DELTA_NET)
    mixer = getattr(model.decoder.layers[0], attribute)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rest = () if request.param == 'M' else (None,)
    return mixer, lambda x, **options: mixer(x, *rest, **options)[0], getattr(recurrences, truth)


@pytest.mark.parametrize('length', [1, 3, 70, 130])
def test_a_layer_is_its_recurrence(layer, length):
    mixer, run, truth = layer
    x = torch.randn(length, BATCH, 32)
    torch.testing.assert_close(run(x).double(), truth(mixer, x), rtol=1e-4, atol=1e-5)


def test_sequences_that_are_packed_in_a_layer_do_not_meet(layer):
    from megatron.core.packed_seq_params import PackedSeqParams

    mixer, run, truth = layer
    if compat.core_version().startswith('0.17') and 'delta' in truth.__name__:
        pytest.skip('core 0.17 has no packed sequences in a gated delta net')
    bounds = torch.tensor([0, 3, 70, 100], dtype=torch.int32)
    packed = PackedSeqParams('thd', bounds, bounds, total_tokens=100)
    x = torch.randn(100, 1, 32)
    y = run(x, packed_seq_params=packed)
    torch.testing.assert_close(y.double(), truth(mixer, x, (3, 70)), rtol=1e-4, atol=1e-5)
