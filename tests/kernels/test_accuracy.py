"""The accuracy table: small and within its bounds here, and its command."""

import json

import pytest
import torch

from megatron_mhc.cli import main
from megatron_mhc.runtime import cpu_device

SMALL = ('--tokens', '5', '--hidden-size', '6')


def run(capsys, *options: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(['kernels', 'accuracy', *options])
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize('dtype', ['bf16', 'fp32'])
@pytest.mark.parametrize('n', ['1', '4'])
def test_every_quantity_is_within_its_bound(n, dtype, device, random_seed, capsys):
    options = (*SMALL, '--device', device.type, '--num-streams', n, '--dtype', dtype)
    code, out, _ = run(capsys, *options, '--seed', str(random_seed), '--json')
    found = json.loads(out)
    assert code == 0 and found['ok'], [row for row in found['rows'] if not row['ok']]
    assert {row['op'] for row in found['rows']} == {
        *('sinkhorn', 'mapping', 'pre', 'post_res', 'read, write', 'write_read, write + read')
    }
    assert len(found['rows']) == 34 and found['channels'] == 6
    assert bool(found['note']) == (device.type == 'cpu' and dtype == 'bf16')


def test_an_error_beyond_its_bound_is_told(device, capsys, monkeypatch):
    from megatron_mhc.kernels import accuracy

    monkeypatch.setattr(accuracy, 'SINKHORN_GRADIENT', 1e-12)
    code, out, _ = run(capsys, *SMALL, '--device', device.type, '--num-streams', '2')
    assert code == 1
    (line,) = [line for line in out.splitlines() if 'FAIL' in line]
    assert line.split()[:2] == ['sinkhorn', 'dlogits']


def test_what_is_no_number_is_null(device, capsys, monkeypatch):
    """Python's NaN is no JSON."""
    from megatron_mhc.kernels import accuracy

    row = accuracy.Row('pre', 'u', float('nan'), 1e-6, False)
    monkeypatch.setattr(accuracy, 'accuracy_table', lambda *shape, **more: [row])
    code, out, _ = run(capsys, *SMALL, '--device', device.type, '--json')
    assert code == 1 and 'NaN' not in out and json.loads(out)['rows'][0]['error'] is None


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (('--num-streams', '3'), ('--num-streams', '3', '8')),
        (('--tokens', '0'), ('--tokens: 0', 'from 1 to')),
        (('--dtype', 'fp64'), ('--dtype', 'fp64', 'bf16')),
        (('--device', 'tpu'), ('--device', 'tpu', 'cuda')),
        (('--device', 'cpu'), ('--device: cpu', 'set TRITON_INTERPRET=1')),
    ],
)
def test_wrong_input_is_one_line(options, words, capsys, monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    code, out, err = run(capsys, *options)
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert all(word in err for word in words), err


@pytest.mark.skipif(torch.cuda.is_available() and not cpu_device.is_installed(), reason='has a GPU')
def test_no_gpu_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    code, out, err = run(capsys, '--device', 'cuda')
    assert code == 2 and not out and '--device: cuda' in err and len(err.splitlines()) == 1
