"""Every bad flag of a training run is refused as soon as the command line is read."""

from __future__ import annotations

import argparse

import pytest
from bad_launcher import ROWS
from one_line import check, label

MODEL = ['--num-layers', '2', '--hidden-size', '32', '--num-attention-heads', '4']


@pytest.fixture(scope='module')
def parser():
    """Megatron's own, with the seams in it, built once for all lines."""
    from megatron.training import arguments

    from megatron_mhc.patches import engine
    from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
    from megatron_mhc.patches.registry import ALL_PATCHES

    engine.apply((ARGUMENTS_PATCH,))
    yield arguments.add_megatron_arguments(
        argparse.ArgumentParser(prog='pretrain', allow_abbrev=False)
    )
    engine.revert(ALL_PATCHES)


@pytest.mark.parametrize('row', ROWS, ids=[f'{i}-{label(row)}' for i, row in enumerate(ROWS)])
def test_refused_in_one_line(parser, row, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    check(lambda line: parser.parse_args([*MODEL, *line]), row)
