"""``--mhc-single-pass``: what it is refused with, reads that got lost, and its messages."""

from __future__ import annotations

import pytest
import torch

from megatron_mhc import ResidualConfig
from megatron_mhc.residual.layer import build_hyper_connection
from megatron_mhc.residual.message import pack, unpack
from megatron_mhc.residual.single_pass import start
from megatron_mhc.residual.stream_merge import StreamMerge
from megatron_mhc.settings.flags_residual import residual_config_from_args, same_structure

SINGLE = '--residual-type mhc --mhc-single-pass '
REFUSED = {
    '--mhc-post-stream high': '--mhc-post-stream high cannot be combined with --mhc-single-pass',
    '--mhc-stream-merge mean': "the last sublayer's H_pre merges the streams",
    '--mhc-recompute-layer-num auto': 'rebuilds its reads from the streams alone',
    '--residual-type hc': '--mhc-single-pass has no effect with --residual-type hc',
}


@pytest.mark.parametrize('flags', REFUSED)
def test_refused_in_one_line(refused, flags):
    assert REFUSED[flags] in refused(SINGLE + flags)


def test_saved_arguments_describe_the_same_model(parse):
    args = parse(*SINGLE.split())
    single, usual = ResidualConfig(single_pass=True), ResidualConfig()
    assert (args.mhc_single_pass, args.mhc_stream_merge) == (True, 'pre')
    assert same_structure(residual_config_from_args(args), single)
    assert not same_structure(single, usual)
    with pytest.raises(ValueError, match='--mhc-stream-merge pre: unknown value'):
        ResidualConfig(stream_merge='pre')


class Settings:
    hidden_size, sequence_parallel = 8, False


def test_reads_with_the_map_of_the_sublayer_before(random_seed):
    """The first sublayer reads stream 0, the merge takes the last map, and both must arrive."""
    residual = ResidualConfig(single_pass=True, num_residual_streams=3)
    first, second = (build_hyper_connection(Settings, residual, number) for number in (0, 1))
    for module in (first, second):
        torch.nn.init.normal_(module.bias)
    x = torch.randn(5, 2, 3 * 8)
    with pytest.raises(RuntimeError, match='which --mhc-single-pass cannot follow'):
        first(x)
    start(x, 3)
    _, u, carried = first(x)
    assert torch.equal(u, x[..., :8])
    written = first.post(torch.randn_like(u), carried)
    with pytest.raises(RuntimeError, match='did not arrive'):
        second(written)
    first.hand_over(written, carried)
    expected = torch.einsum('sbn,sbnc->sbc', first.maps(x)[0], written.unflatten(-1, (3, 8)))
    torch.testing.assert_close(second(written)[1], expected)
    merged = StreamMerge(8, residual)(written)
    assert torch.equal(merged, second(written)[1])


def test_a_read_without_its_gradient_is_not_used(random_seed):
    """A checkpoint runs layers without a graph; what they attached is not what they computed."""
    residual = ResidualConfig(single_pass=True, num_residual_streams=3)
    first, second = (build_hyper_connection(Settings, residual, number) for number in (0, 1))
    x = start(torch.randn(5, 2, 3 * 8), 3)
    with torch.no_grad():
        _, u, carried = first(x)
        written = first.hand_over(first.post(u, carried), carried)
        second(written)
    with pytest.raises(RuntimeError, match='did not arrive'):
        second(written.requires_grad_())


def test_a_message_is_read_as_what_was_packed(random_seed):
    residual = ResidualConfig(single_pass=True, num_residual_streams=3)
    first, second = (build_hyper_connection(Settings, residual, number) for number in (0, 1))
    _, u, carried = first(first.received(start(torch.randn(5, 2, 3 * 8), 3, in_message=True)))
    usual = first.hand_over(first.post(u, carried), carried)
    first.ends_stage = True
    message = first.hand_over(first.post(u, carried), carried)
    assert message.shape == (5, 2, 3 * 8 + residual.edge_values(4))
    _, u, carried = second(usual)
    _, same, maps = second(second.received(message))
    assert torch.equal(same, u) and torch.equal(maps.h_res, carried.h_res)
    assert torch.equal(StreamMerge(8, residual)(message), second(usual)[1])
    for module in (StreamMerge(8, residual), lambda x: second(second.received(x))):
        with pytest.raises(RuntimeError, match='hidden states of width 26 where 3 streams'):
            module(message[..., :-1])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_message_keeps_every_bit_there_and_back(random_seed, dtype):
    """Of any fp32, infinite, subnormal and NaN among them, in values that are all finite."""
    n, width, wide = 3, 5, torch.promote_types(dtype, torch.float32)
    x = torch.randn(7, 3, n * width).to(dtype).requires_grad_()
    bits = torch.randint(-(2**31), 2**31, (7, 3, n)).to(torch.int32)
    any_fp32 = bits.view(torch.float32)
    h_pre = any_fp32.to(wide).requires_grad_()
    sent = pack(x, h_pre)
    assert sent.shape[-1] == n * width + ResidualConfig(
        single_pass=True, num_residual_streams=n
    ).edge_values(dtype.itemsize)
    assert sent.dtype == dtype and sent._base is None
    if dtype.itemsize == 2:
        assert sent.isfinite().all()
    message = sent.detach().requires_grad_()
    streams, read = unpack(message, n, n * width)
    assert streams._base is None and streams.data_ptr() == message.data_ptr()
    assert torch.equal(streams, x) and torch.equal(as_bits(read), as_bits(h_pre))
    gradients = torch.randn_like(x), any_fp32.flip(0).to(wide)
    torch.autograd.backward((streams, read), gradients)
    sent.backward(message.grad)
    assert torch.equal(x.grad, gradients[0])
    assert torch.equal(as_bits(h_pre.grad), as_bits(gradients[1]))


def as_bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().view(torch.int64 if x.dtype == torch.float64 else torch.int32)
