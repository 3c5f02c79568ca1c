"""``--mhc-single-pass``: what it is refused with, and a read that got lost."""

from __future__ import annotations

import pytest
import torch

from megatron_mhc import ResidualConfig
from megatron_mhc.residual.layer import build_hyper_connection
from megatron_mhc.residual.single_pass import start
from megatron_mhc.residual.stream_merge import StreamMerge
from megatron_mhc.settings.flags_residual import residual_config_from_args, same_structure

SINGLE = '--residual-type mhc --mhc-single-pass '
REFUSED = {
    '--pipeline-model-parallel-size 2': 'use tensor, sequence or data parallelism, or drop --mhc-s',
    '--recompute-granularity full --recompute-method uniform --recompute-num-layers 1': 'selective',
    '--mtp-num-layers 1': '--mtp-num-layers cannot be combined with --mhc-single-pass',
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
