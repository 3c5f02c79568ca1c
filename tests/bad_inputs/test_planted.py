"""No command runs code that stands in a file it is given: pickled, tagged in YAML, or as text."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
import yaml
from bad_files import KERNEL
from one_line import check, said

from megatron_mhc.cli import main


class Planted:
    """Makes a folder as it is unpickled."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


def saved(save, *words, **options) -> bytes:
    file = io.BytesIO()
    save(*((file if word is None else word) for word in words), **options)
    return file.getvalue()


# What makes a file in which code is planted, and what would run it.
PLANTS = {
    'pickle': (lambda ran: pickle.dumps(Planted(ran)), pickle.loads),
    'torch': (
        lambda ran: saved(torch.save, Planted(ran), None),
        lambda data: torch.load(io.BytesIO(data), weights_only=False),
    ),
    'numpy': (
        lambda ran: saved(np.save, None, np.array([Planted(ran)]), allow_pickle=True),
        lambda data: np.load(io.BytesIO(data), allow_pickle=True),
    ),
    'yaml': (
        lambda ran: f'!!python/object/apply:os.mkdir ["{ran}"]'.encode(),
        yaml.unsafe_load,
    ),
    'python': (lambda ran: f"__import__('os').mkdir('{ran}')".encode(), eval),
}
CONFIG = {'num_hidden_layers': 2, 'hidden_size': 8, 'hc_mult': 4, 'hc_sinkhorn_iters': 20}
INDEX = 'model.safetensors.index.json'
# Every command that reads a file, and that file; checkpoints of Megatron have tests of their own.
READERS = (
    ('schedule trace t.json', 't.json'),
    ('schedule trace t.json.gz', 't.json.gz'),
    ('schedule trace t.sqlite', 't.sqlite'),
    ('schedule show --plan plan.csv', 'plan.csv'),
    ('kernels report --record r.json', 'r.json'),
    ('study 3b --kernel-times r.csv', 'r.csv'),
    ('study 3b --hardware mine.yaml', 'mine.yaml'),
    ('report run', 'run/events.out.tfevents.1'),
    ('patch tree', 'tree/megatron/core/package_info.py'),
    ('convert v4 new', 'v4/config.json'),
    ('convert v4 new', 'v4/model.safetensors'),
    ('convert v4 new', f'v4/{INDEX}'),
    ('init_study.py --table --results r.jsonl', 'r.jsonl'),
    ('plot_losses.py --output x.png a=run', 'run/events.out.tfevents.1'),
)
# Files that are as they should be but for one value.
VALUES = (
    ('schedule show --plan plan.csv', 'plan.csv', 'microbatches 1\nplacement PLANT\n0F0 0B0\n'),
    ('schedule show --plan plan.csv', 'plan.csv', 'microbatches PLANT\nplacement 0\n0F0 0B0\n'),
    (
        'study 27b --kernel-times r.csv',
        'r.csv',
        'op,contender,dtype,status,mode,direction,hidden,streams,tokens,median_us\n'
        'layer,triton,bf16,ok,graph,fwd,2560,4,8192,PLANT\n',
    ),
    ('study 3b --hardware mine.yaml', 'mine.yaml', 'preset: h100\ntflops: "PLANT"\n'),
    ('study 3b --hardware mine.yaml', 'mine.yaml', 'preset: "PLANT"\n'),
    (
        'patch tree',
        'tree/megatron/core/package_info.py',
        'MAJOR = PLANT\nMINOR = 19\nPATCH = 0\n',
    ),
    ('convert v4 new', 'v4/config.json', json.dumps(CONFIG | {'hc_mult': 'PLANT'})),
    ('convert v4 new', f'v4/{INDEX}', json.dumps({'weight_map': {'a': 'PLANT'}})),
    ('init_study.py --table --results r.jsonl', 'r.jsonl', '"PLANT"\n'),
)


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """``run(line)``: a command or a script, in a folder with what it needs beside its file."""
    monkeypatch.chdir(tmp_path)
    for folder in ('run', 'tree/megatron/core', 'v4'):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / 'v4/config.json').write_text(json.dumps(CONFIG))
    return lambda line: (script if line[0].endswith('.py') else main)(line)


@pytest.mark.parametrize('plant', PLANTS)
def test_what_is_planted_would_run(plant, tmp_path):
    make, runs = PLANTS[plant]
    runs(make(tmp_path / 'ran'))
    assert (tmp_path / 'ran').is_dir()


@pytest.mark.parametrize(('line', 'file'), READERS)
@pytest.mark.parametrize('plant', PLANTS)
def test_a_planted_file_is_refused_and_does_not_run(plant, line, file, run, tmp_path):
    (tmp_path / file).write_bytes(PLANTS[plant][0](tmp_path / 'ran'))
    check(run, said(line))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(('line', 'file', 'text'), VALUES)
def test_a_planted_value_is_refused_and_does_not_run(line, file, text, run, tmp_path):
    plant = PLANTS['python'][0](tmp_path / 'ran').decode()
    (tmp_path / file).write_text(text.replace('PLANT', plant))
    check(run, said(line))
    assert not (tmp_path / 'ran').exists()


def test_names_in_a_trace_are_names(run, tmp_path):
    """They may be any text, and the report has them."""
    plant = PLANTS['python'][0](tmp_path / 'ran').decode()
    event = KERNEL | {'name': plant, 'args': {'stream': plant, 'correlation': plant}}
    (tmp_path / 't.json').write_text(json.dumps({'traceEvents': [event]}))
    with contextlib.suppress(SystemExit):
        run(['schedule', 'trace', 't.json'])
    assert not (tmp_path / 'ran').exists()
