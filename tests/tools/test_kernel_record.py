"""``tools/kernel_record.py --kernel``: what was not compiled anew stays on record."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tools'))

import kernel_record  # noqa: E402

PREDICTED = {'gpu': 'h200', 'hidden_size': 4096, 'tokens': 8192}
RECORD = {
    'triton': [*kernel_record.VERSIONS],
    'predicted': {**PREDICTED, 'kernels': {'pack 4': [9.0] * 4, 'pre_forward 4': [80.0] * 4}},
    'kernels': {'pack 4': {'90': '64 -'}, 'pre_forward 4': {'90': '64 -'}},
}


def report(warps: int, percent: float) -> dict:
    row = {'kernel': 'pre_forward', 'num_streams': 4, 'arch': 90, 'warps': warps, 'mma': '-'}
    row['predicted'] = {'gpu': 'h200', 'copy_percent': percent}
    return {'kernels': [row], 'hidden_size': 4096, 'tokens': 8192}


def renewed(predictions: bool, kernel: list[str]) -> dict:
    reports = [report(48, 90.0), report(48, 90.0), report(48, 90.0), report(32, 91.0)]
    options = argparse.Namespace(predictions=predictions, kernel=kernel)
    return kernel_record.renewed(RECORD, reports, options)


def test_rows_that_were_not_asked_for_stay():
    found = renewed(False, ['pre_forward'])
    assert found['kernels']['pack 4'] == {'90': '64 -'}
    assert found['kernels']['pre_forward 4'] == {'90': ['48 -', '48 -', '48 -', '32 -']}
    assert found['predicted']['kernels'] == {
        'pack 4': [9.0] * 4,
        'pre_forward 4': [90.0, 90.0, 90.0, 91.0],
    }
    assert renewed(True, ['pre_forward'])['kernels'] == RECORD['kernels']


def test_all_of_them_anew():
    assert [*renewed(False, [])['kernels']] == ['pre_forward 4']
    assert [*renewed(False, [])['predicted']['kernels']] == ['pre_forward 4']
