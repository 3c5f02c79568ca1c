"""``kernels report`` and the model: the gate beside the record, labels, GPUs, JSON."""

import json

import pytest
import torch
from reporting import ROOT, reports

pytest.importorskip('triton')

from megatron_mhc import compat  # noqa: E402
from megatron_mhc.kernels.roofline.gpus import GPUS  # noqa: E402
from megatron_mhc.kernels.roofline.launches import Shape, recorded_percent  # noqa: E402
from megatron_mhc.kernels.roofline.names import RECORDED  # noqa: E402
from megatron_mhc.kernels.roofline.predict import LABEL  # noqa: E402
from megatron_mhc.kernels.shipped import shipped_launches  # noqa: E402
from megatron_mhc.kernels.verdict import label  # noqa: E402

RECORD = json.loads((ROOT / 'kernels' / 'record.json').read_text())
# One kernel on the architecture of the record.
PRE = ('--num-streams', '4', '--kernel', 'pre_forward')


def test_the_record_has_a_prediction_of_every_kernel():
    """n = 4 on every Triton; a share of a copy."""
    shape, gpu = Shape(4096, 8192, 'bf16'), GPUS[RECORDED]
    for launch in shipped_launches(4, 4096, 8192, torch.bfloat16):
        for version in compat.TRITON_TESTED:
            percent = recorded_percent(launch, gpu, shape, RECORD, f'{version}+git')
            assert percent is not None and 0 < percent < 100, (label(launch), version)
        assert recorded_percent(launch, gpu, shape, RECORD, '3.5.0') is None
        assert recorded_percent(launch, GPUS['h100'], shape, RECORD, version) is None
        narrow = Shape(2560, 8192, 'bf16')
        assert recorded_percent(launch, gpu, narrow, RECORD, version) is None


def planted(path, percent: object, versions: list[str]) -> tuple[str, ...]:
    """The options with which ``PRE`` is held to ``percent`` of copy."""
    known = RECORD['predicted'] | {'kernels': {'pre_forward 4': percent}}
    path.write_text(json.dumps(RECORD | {'triton': versions, 'predicted': known, 'kernels': {}}))
    return ('--arch', '90', *PRE, '--record', str(path))


def test_the_gate_and_the_model_as_printed(tmp_path):
    import triton

    versions = ['3.5.0', triton.__version__.partition('+')[0]]
    worse, other, model, as_json, h100 = reports(
        planted(tmp_path / 'worse', [10.0, 99.0], versions),
        planted(tmp_path / 'other', [99.0], versions[:1]),
        ('--roofline', *PRE),
        ('--roofline', *PRE, '--json'),
        ('--roofline', '--gpu', 'h100', *PRE, '--json'),
    )
    assert worse.returncode == 1, worse.stdout + worse.stderr
    assert '% of copy predicted on h200' in worse.stdout and '99.0 % on record' in worse.stdout
    assert f'1 times {LABEL}: 1 held against the record' in worse.stdout
    # Another Triton is not held to it, and the report says that nothing was.
    assert other.returncode == 0, other.stdout + other.stderr
    assert 'none held against the record, which has none of this Triton' in other.stdout
    assert model.returncode == 0, model.stdout + model.stderr
    assert f'roofline: {LABEL}' in model.stdout and str(GPUS['h200']) in model.stdout
    assert '42 vectors of C' in model.stdout and 'no sum without pack' in model.stdout
    found = json.loads(as_json.stdout)
    assert found['roofline']['model'] == LABEL and found['roofline']['gpu'] == 'h200'
    (row,) = (row for row in found['kernels'] if row['kernel'] == 'pre_forward')
    assert row['arch'] == 90 and 'measured' not in row and 'profile' not in row
    seen = row['predicted']
    assert seen['model'] == LABEL and seen['bound'] == 'dram'
    # 5 vectors and 4 map values of each token.
    assert seen['megabytes'] == pytest.approx(8192 * (5 * 4096 * 2 + 16) / 1e6, abs=0.1)
    assert seen['copy_percent'] == pytest.approx(
        100 * seen['bounds_us']['dram'] / seen['microseconds'], abs=0.2
    )
    slower = json.loads(h100.stdout)['kernels'][0]['predicted']
    assert slower['gpu'] == 'h100' and slower['microseconds'] > 1.3 * seen['microseconds']


def test_wrong_gpus_are_one_line(tmp_path):
    path = tmp_path / 'record.json'
    path.write_text(json.dumps(RECORD | {'predicted': {'gpu': 'h200'}}))
    wrong = {
        ('--roofline', '--gpu', 'b200'): ('--gpu: b200', 'tcgen05', 'h200 h100 a100'),
        ('--roofline', '--gpu', 'tpu'): ('--gpu: tpu', 'no constants'),
        ('--gpu', 'h100'): ('--gpu: h100', '--roofline'),
        ('--roofline', '--arch', '80', '100'): ('--arch: 80 100', 'H200', '90'),
        ('--record', str(path)): ('--record', 'hidden_size'),
    }
    for result, words in zip(reports(*wrong), wrong.values(), strict=True):
        assert result.returncode == 2, result.stdout
        assert len(result.stderr.splitlines()) == 1 and not result.stdout
        assert all(word in result.stderr for word in words), result.stderr


def test_a_missing_disassembler_is_one_line():
    code = (
        'import triton\n'
        'nvidia = type(triton.knobs.nvidia)\n'
        'tool = nvidia.__dict__["nvdisasm"]\n'
        'tool.default_path = "/no/such/nvdisasm"\n'
    )
    (result,) = reports(PRE, code=code)
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert 'nvdisasm' in result.stderr and 'TRITON_NVDISASM_PATH' in result.stderr
