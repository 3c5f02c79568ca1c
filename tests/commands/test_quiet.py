"""What Megatron prints, warns of and logs is kept from who asks a command; errors are not."""

from __future__ import annotations

import logging
import types
import warnings

import pytest

from megatron_mhc.commands import recompute_answer as recompute
from megatron_mhc.inputs.quiet import quiet


def noise(*_, **__):
    print('------------------------ arguments ------------------------')
    warnings.warn('Apex is not installed', stacklevel=1)
    logging.getLogger('torch').warning('no CUDA runtime')


def test_noise_is_swallowed_and_then_heard_again(capfd, recwarn):
    with quiet():
        noise()
    assert capfd.readouterr() == ('', '') and not recwarn
    print('heard')
    with pytest.warns(UserWarning):
        warnings.warn('heard', stacklevel=1)
    assert capfd.readouterr().out == 'heard\n' and logging.root.manager.disable == 0


def test_what_is_raised_is_heard(capfd):
    with pytest.raises(ValueError, match='wrong'), quiet():
        noise()
        raise ValueError('wrong')
    assert capfd.readouterr().out == '' and logging.root.manager.disable == 0


def test_recompute_prints_its_table_alone(answer, monkeypatch, recwarn):
    """Bytes that cancel are 0.0, without a sign."""
    layers = [types.SimpleNamespace(recompute_segment_size=0)]
    block = types.SimpleNamespace(layers=layers)
    monkeypatch.setattr(recompute, 'start_megatron', noise)
    monkeypatch.setattr(recompute, 'build', lambda *_: noise() or block)
    monkeypatch.setattr(recompute, 'measure', lambda *_: noise() or recompute.Row(-1, 0, 9, 0))
    status, out, err = answer('recompute --num-sublayers 4 --segments none')
    assert (status, err) == (0, '') and not recwarn
    head, row = out.splitlines()
    assert head.split()[:2] == ['L', 'segments'] and row.split()[:2] == ['4', 'none']
    assert '-0.0' not in row
