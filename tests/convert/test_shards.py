"""Safetensors as we write them, read by the library; one tensor at a time is in memory."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file

from megatron_mhc.convert import output
from megatron_mhc.convert.source import Entry, whole

VALUES = {
    'b.odd': torch.randn(7).bfloat16(),
    'a': torch.randn(3, 5),
    'half': torch.randn(2, 2, 3).half(),
    'scalar': torch.tensor(1.5),
    'none': torch.empty(0, 4),
    'tokens': torch.arange(5),
    'view': torch.randn(6, 4).t(),
    'bytes': torch.arange(9, dtype=torch.uint8),
    'eight': torch.randn(5).to(torch.float8_e4m3fn),
}


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (got[name], tensor)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize('most', [1 << 30, 60])
def test_the_library_reads_what_was_written(tmp_path, monkeypatch, most):
    monkeypatch.setattr(output, 'SHARD_BYTES', most)
    entries = {name: whole(tensor) for name, tensor in VALUES.items()}
    # How long it is is not known before it is read.
    entries['bytes'] = Entry(None, None)
    output.write_shards(tmp_path, entries, VALUES.get)
    files = sorted(tmp_path.glob('*.safetensors'))
    assert (len(files) > 1) == (most == 60)
    same({name: x for file in files for name, x in load_file(file).items()}, VALUES)
    for file in files:
        length = int.from_bytes(file.read_bytes()[:8], 'little')
        header = json.loads(file.read_bytes()[8:][:length])
        assert length % 8 == 0 and header.pop('__metadata__') == {'format': 'pt'}
        for name, described in header.items():
            # A mapped tensor must begin where its dtype may.
            assert described['data_offsets'][0] % VALUES[name].dtype.itemsize == 0, name


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    read = []

    def value(name):
        gc.collect()
        assert sum(tensor() is not None for tensor in read) <= 1
        tensor = torch.full((64,), float(name))
        read.append(weakref.ref(tensor))
        return tensor

    names = [str(number) for number in range(8)]
    output.write_shards(tmp_path, dict.fromkeys(names, whole(torch.empty(64))), value)
    got = load_file(tmp_path / 'model.safetensors')
    assert len(read) == 8 and all(got[name][0] == float(name) for name in names)
