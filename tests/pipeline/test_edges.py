"""Pipeline edges: stages that disagree are stopped, with the rank and the widths named."""

from __future__ import annotations

import json
import pathlib
from types import SimpleNamespace

import pytest
import torch
from launch import launch

from megatron_mhc import ResidualConfig
from megatron_mhc.ops import post_res

WORKER = pathlib.Path(__file__).parents[1] / 'layouts' / 'edge_worker.py'


def test_stages_that_disagree_are_stopped(tmp_path):
    done = launch(2, WORKER, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2))
    assert first['equal'] == second['equal'] == ''
    assert 'rank 0 has [mhc, 4 streams of 32], its neighbour rank 1 has [mhc, 2' in first['streams']
    assert (
        'rank 1 has [mhc, 2 streams of 32], its neighbour rank 0 has [mhc, 4' in second['streams']
    )
    assert 'pipeline rank 1 announced no edge' in first['stock']


@pytest.mark.parametrize('sublayers', [1, 2, 3, 5])
def test_streams_span_one_vector_more_than_there_were_sublayers(sublayers):
    """So that nothing shorter than n C values has them, but behind very few sublayers."""
    n, width = 4, 16
    draw = torch.Generator().manual_seed(torch.seed() % 2**31)

    def random(*sizes):
        return torch.rand(sizes, generator=draw, dtype=torch.float64) + 0.1

    x = random(1, 1, width).expand(1, n, width).flatten(1)
    for _ in range(sublayers):
        x = post_res(x, random(1, width), random(1, n), random(1, n, n), backend='torch')
    assert torch.linalg.matrix_rank(x.unflatten(-1, (n, width))).item() == min(n, sublayers + 1)


@pytest.fixture
def communicate():
    """The widened ``_communicate`` around a function that returns the shape it was given."""
    from megatron_mhc.patches.p2p import P2P_PATCH

    config = SimpleNamespace(
        hidden_size=8,
        variable_seq_lengths=False,
        residual_config=ResidualConfig(num_residual_streams=4),
    )
    wrapped = P2P_PATCH.wrap(lambda self, *, tensor_shape, **kwargs: tensor_shape)

    def call(tensor_shape, **kwargs):
        return wrapped(SimpleNamespace(config=config), tensor_shape=tensor_shape, **kwargs)

    call.config = config
    return call


def test_messages_are_widened(communicate):
    assert communicate((5, 2, 8)) == (5, 2, 32)
    assert communicate(None, tensor_send_next=torch.zeros(5, 2, 32)) is None
    communicate.config.residual_config = ResidualConfig(single_pass=True, num_residual_streams=2)
    for dtype, values in ((torch.float32, 2), (torch.bfloat16, 6), (torch.float16, 6)):
        communicate.config.pipeline_dtype = dtype
        assert communicate((5, 2, 8)) == (5, 2, 16 + values)
    communicate.config.residual_config = ResidualConfig('standard')
    assert communicate((5, 2, 8)) == (5, 2, 8)
    communicate.config.residual_config = ResidualConfig()
    communicate.config.variable_seq_lengths = True
    assert communicate((5, 2, 8)) == (5, 2, 8)


@pytest.mark.parametrize('direction', ['tensor_send_next', 'tensor_send_prev'])
def test_a_narrow_message_is_not_sent(communicate, direction):
    """Without a stream, or without H_pre."""
    with pytest.raises(RuntimeError, match=rf'{direction} has shape \[5, 2, 8\]'):
        communicate((5, 2, 8), **{direction: torch.zeros(5, 2, 8)})
    communicate.config.residual_config = ResidualConfig(single_pass=True)
    communicate.config.pipeline_dtype = torch.float32
    with pytest.raises(RuntimeError, match=r'the edge carries 4 streams of 8 and H_pre; a module'):
        communicate((5, 2, 8), **{direction: torch.zeros(5, 2, 32)})


def test_shapes_are_negotiated_behind_the_final_norm():
    """With multi-token prediction alone on the last stage, some edges are one stream wide."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mhc.patches.p2p import negotiate_shapes_if_needed

    def config(layout, mtp_num_layers):
        return TransformerConfig(
            num_layers=4,
            hidden_size=8,
            num_attention_heads=2,
            mtp_num_layers=mtp_num_layers,
            pipeline_model_parallel_size=2,
            pipeline_dtype=torch.float32,
            pipeline_model_parallel_layout=layout,
        )

    for layout, mtp, negotiated in (
        ('Etttt|mL', 1, True),
        ('Ettt|tmL', 1, False),
        (None, 1, False),
        (None, None, False),
    ):
        settings = config(layout, mtp)
        negotiate_shapes_if_needed(settings)
        assert settings.variable_seq_lengths is negotiated, layout
