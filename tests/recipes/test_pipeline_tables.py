"""Figures of ``docs/schedules.md`` that follow from sizes: memory of two copies, and messages."""

from __future__ import annotations

import dataclasses

from megatron_mhc import ResidualConfig
from megatron_mhc.recipes.recipe import RECIPES
from megatron_mhc.sizing.memory import Layout, edge_bytes, rank_memory


def test_two_copies_hold_twice_the_states():
    """As ``docs/schedules.md`` has it: of two ranks of 1F1B, and beside a V."""
    shape, batch = RECIPES['27b'].shape(), RECIPES['27b'].batch

    def states(schedule):
        ranks = rank_memory(shape, Layout(64, pp=8, ep=8, schedule=schedule), batch)
        return [rank.states / 2**30 for rank in ranks]

    line = states('1f1b')
    mirrored = [a + b for a, b in zip(line, line[::-1], strict=True)]
    assert round(max(mirrored), 1) == 17.4
    assert round(max(states('dualpipev-w')), 1) == round(max(states('zb-v')), 1) == 8.7


def test_what_can_make_a_message_shorter():
    """The table of ``docs/schedules.md``, in MiB."""
    shape = RECIPES['27b'].shape()

    def mib(layout, **changes):
        return round(edge_bytes(dataclasses.replace(shape, **changes), layout) / 2**20, 1)

    line = Layout(8, pp=2)
    assert mib(line, residual=ResidualConfig('standard')) == 20 and mib(line) == 80
    assert mib(line, residual=ResidualConfig(single_pass=True)) == 80.1
    assert mib(line, value_bytes=4) == 160
    assert mib(line, residual=ResidualConfig(num_residual_streams=2)) == 40
    assert mib(Layout(8, pp=2, tp=2)) == mib(Layout(8, pp=2, cp=2)) == 40
