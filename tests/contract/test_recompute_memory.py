"""Bytes of recompute segments, counted one by one, against the paper's formula."""

from __future__ import annotations

import argparse
import gc
import json

import pytest
import torch

from megatron_mhc import ResidualConfig
from megatron_mhc.commands import recompute
from megatron_mhc.commands import recompute_answer as recompute_memory
from megatron_mhc.commands.storage_meter import StorageMeter
from megatron_mhc.inputs import refusal
from megatron_mhc.settings.recompute_cost import best_segment, kept_cost, segment_cost

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='these models are on the CPU; the command runs on a GPU too'
)
N, HIDDEN, TOKENS = 4, 1024, 4
VALUE = 4 * HIDDEN * TOKENS  # bytes of C values a token


def measured(sublayers, size, full=0, backend='torch', hidden=HIDDEN, tokens=TOKENS):
    """Of layers with little in their sublayers."""
    # What is kept does not depend on the passes, which the interpreter takes its time for.
    passes = {'sinkhorn_iterations': 2} if backend == 'triton' else {}
    residual = ResidualConfig(kernel_backend=backend, recompute_layer_num=size, **passes)
    block = recompute_memory.build(
        sublayers // 2, residual, hidden, full, ffn_hidden_size=32, kv_channels=8
    )
    return recompute_memory.measure(block, tokens, N * hidden)


@pytest.mark.parametrize('sublayers', [24, 60])
def test_memory_is_the_formula(megatron, sublayers):
    """Kept: to the byte. Peak: C a sublayer of the segment below the formula, which counts the norm
    of its input (that belongs to the sublayer and stays), and at most 2 C above that."""
    for size in ('auto', 12):
        row = measured(sublayers, size)
        number = best_segment(N, sublayers) if size == 'auto' else size
        assert row.kept_by_mhc == kept_cost(N, sublayers, number) * VALUE
        above = row.peak_of_mhc / VALUE - segment_cost(N, sublayers, number)
        assert 0 <= above + number <= 2


def test_kernels_keep_what_the_formula_says(megatron):
    """Interpreted, hence few sublayers."""
    plain, blocks = (measured(6, size, backend='triton', hidden=128) for size in ('none', 3))
    value = 4 * 128 * TOKENS
    assert blocks.kept_by_mhc == kept_cost(N, 6, 3) * value
    # Streams and sublayer input; 45 numbers of the maps.
    assert plain.kept_by_mhc == pytest.approx(6 * (N + 1 + 45 / 128) * value, rel=0.05)
    assert blocks.kept < plain.kept


def test_auto_needs_less_than_any_other_block(megatron):
    """Streams alone decide between the sizes; attention and MLP keep the same."""
    peaks = {size: measured(24, size).peak_of_mhc for size in ('auto', 1, 12, 'stage')}
    assert min(peaks, key=peaks.get) == 'auto'


def test_blocks_lower_the_peak_of_full_recomputation(megatron):
    without, within = (
        measured(24, size, full=6, hidden=64, tokens=64) for size in ('none', 'auto')
    )
    assert within.kept == without.kept
    assert within.peak < 0.9 * without.peak


def test_the_command_prints_one_table_or_one_object(megatron, monkeypatch, answer, capsys):
    """What is said while it measures is kept from the user."""
    monkeypatch.setattr(recompute_memory, 'start_megatron', lambda: print('initialized'))
    line = 'recompute --sublayers 4 --hidden-size 16 --segments none 2'
    status, out, err = answer(line)
    head, *rows = out.splitlines()
    assert status == 0 and head.split()[:3] == ['L', 'segments', 'L_r'] and len(rows) == 2
    assert rows[1].split()[:3] == ['4', '2', '2'] and err == ''
    found = json.loads(answer(f'{line} --json')[1])
    assert [row['segment_size'] for row in found['rows']] == [None, 2]
    assert f'{found["rows"][1]["kept_by_mhc"]:.1f}' == rows[1].split()[3]
    assert found['rows'][1]['kept_by_formula'] == kept_cost(4, 4, 2)


def test_meter_counts_every_byte():
    meter = StorageMeter()

    def both(x):
        return (x * 2).exp()

    x = torch.randn(1000, requires_grad=True)
    with meter:
        y = meter.owned(both)(x)
        z = both(y)
        before = meter.alive()
        z.untyped_storage().resize_(0)
        assert meter.alive().total == before.total - 4000
        z.untyped_storage().resize_(4000)
        assert meter.alive() == before
        # An alias is no new storage.
        alias = y.view(10, 100).detach()
        assert meter.alive() == before
    del y, z, alias
    gc.collect()
    assert meter.alive() == (0, 0) and meter.peak().total == 12000


def test_command_refuses_odd_numbers_of_sublayers(capsys):
    parser = argparse.ArgumentParser()
    recompute.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(['--sublayers', '3', '--kernel-backend', 'torch'])
    assert 'use even numbers' in capsys.readouterr().err


def test_the_choice_is_said_once(build, capsys):
    refusal.announce.cache_clear()
    for _ in range(2):
        build({'recompute_layer_num': 'auto'}, num_layers=12)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if 'layer-num auto' in line]
    assert 'L_r = 4 for 24 sublayers of a stage' in line
    assert '(kept 24C, at most 48C, without 144C values a token)' in line


def test_a_stream_that_nothing_overlaps_with_is_refused(build):
    with pytest.raises(ValueError, match='high has no effect with the stock schedules'):
        build({'recompute_layer_num': 'stage', 'recompute_stream': 'high'})
