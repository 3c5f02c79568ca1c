"""The byte model against the paper and the launches, and the compile report with its ceilings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mhc.kernels.traffic import Traffic, kernel_forms, our_forms, paper_forms

pytest.importorskip('triton')

from megatron_mhc.kernels import shipped, traffic  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CEILINGS = ROOT / 'kernels' / 'ceilings.json'
# One channel count that fills tiles, and one that needs masked tails and odd-sized blocks.
CHANNELS = (4096, 100)


def test_table_2_of_the_paper():
    """mHC, Table 2 at n = 4: reads and writes in C and in map values, as printed there."""
    forms = paper_forms(4)
    assert forms['plain residual'] == Traffic(2, 1, 0, 0)
    assert forms['HC: maps'] == Traffic(4, 0, 0, 24)
    assert forms['HC: H_pre'] == Traffic(4, 1, 4, 0)
    assert forms['HC: H_post'] == Traffic(1, 4, 4, 0)
    assert forms['HC: H_res'] == Traffic(4, 4, 16, 0)
    assert forms['HC: merge'] == Traffic(8, 4, 0, 0)
    assert forms['HC: total'] == Traffic(21, 13, 24, 24)
    assert forms['HC: total'].elements == 34


@pytest.mark.parametrize('n', [1, 2, 3, 4, 8])
def test_forms_for_any_number_of_streams(n):
    total, ours = paper_forms(n)['HC: total'], our_forms(n)
    assert (total.reads, total.writes) == (5 * n + 1, 3 * n + 1)
    assert total.map_reads == total.map_writes == n * n + 2 * n
    three = ours['forward in three passes']
    assert (three.reads, three.writes) == (3 * n + 1, n + 1)
    assert ours['forward at the seam'].elements == 3 * n + 2
    assert ours['backward at the seam'].elements == 6 * n + 4
    # Fusing F_post,res: (3n+1)C -> (n+1)C read and 3nC -> nC written (mHC, Section 4.3.1).
    assert ours['F_post,res'] == Traffic(n + 1, n, n * n + n, 0)


@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('n', [1, 2, 4, 8])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_launches_move_what_the_formulas_say(n, channels, dtype):
    """Streams and maps to the byte; beside them only tensors that do not grow with the tokens."""
    tokens = 520
    seen = set()
    for launch in shipped.shipped_launches(n, channels, tokens, dtype):
        form, kinds = traffic.launch_traffic(launch), traffic.launch_bytes_by_kind(launch)
        seen.add(traffic.variant(launch))
        assert kinds['streams'] == form.elements * channels * dtype.itemsize * tokens
        moved = form.bytes(tokens, channels, dtype.itemsize)
        assert traffic.launch_bytes(launch) == moved + kinds['parameters']
    # All kernels are there; u without g is for callers that use the maps alone.
    assert seen == set(kernel_forms(n)) - {'read_backward HAS_U'}


def test_a_step_moves_what_the_forms_say():
    """Two sublayers with a seam: a first read, the seam and a last write; backward twice."""
    n, channels, tokens, dtype = 4, 256, 64, torch.bfloat16
    launches = shipped.seam_launches(n, channels, tokens, dtype)
    vectors = sum(traffic.launch_bytes_by_kind(launch)['streams'] for launch in launches)
    vectors //= tokens * channels * dtype.itemsize
    assert vectors == (2 * n + 1) + (3 * n + 2) + (2 * n + 1) + 2 * (6 * n + 4)


def report(*options: str, code: str = '', **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, where Triton compiles; ``code`` runs before it."""
    env = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    start = f'{code}\nfrom megatron_mhc.cli import main\nmain({["kernels", "report", *options]!r})'
    return subprocess.run(
        [sys.executable, '-c', start],
        env=env | {'PYTHONPATH': str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_shipped_kernels_keep_their_ceilings():
    """n = 4 on sm_90: no spills, 128-bit streams, matrix units on bf16."""
    result = report('--arch', '90', '--num-streams', '4', '--json')
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found['ok'] and not any(row['problems'] for row in found['kernels'])
    assert all(row['spill_bytes'] == row['stack_bytes'] == 0 for row in found['kernels'])
    assert all('?' not in row['narrowest'] for row in found['kernels'])
    rows = {row['kernel']: row for row in found['kernels']}
    assert rows['projection mix']['mma'].endswith('bf16')
    assert rows['pre_forward']['loads']['128'] == 4 and rows['pre_forward']['stores'] == {'128': 1}
    assert set(traffic.kernel_forms(4)) - {'read_backward HAS_U'} <= set(
        json.loads(CEILINGS.read_text())['kernels']
    )
    assert {'num_streams': 4, 'form': 'HC: total', 'elements': 34}.items() <= next(
        row for row in found['traffic'] if row['form'] == 'HC: total'
    ).items()


def test_a_lowered_ceiling_is_noticed(tmp_path):
    ceilings = json.loads(CEILINGS.read_text())
    ceilings['kernels']['pre_forward']['4']['90']['registers'] = 16
    path = tmp_path / 'ceilings.json'
    path.write_text(json.dumps(ceilings))
    options = ('--arch', '90', '--num-streams', '4', '--kernel', 'pre_forward')
    result = report(*options, '--ceilings', str(path))
    assert result.returncode == 1, result.stdout + result.stderr
    assert 'ceiling 16' in result.stdout and 'pre_forward (n=4, sm_90)' in result.stdout


def test_spills_and_narrow_accesses_are_noticed():
    """A tile that holds too much for its threads, and one too small for whole vectors."""
    code = (
        'from megatron_mhc.kernels.triton import post_res, pre\n'
        'post_res.BACKWARD[4] = post_res.Tile(4, 512, num_warps=1)\n'
        'pre.FORWARD[4] = pre.Tile(1, 256)\n'
    )
    options = ('--arch', '90', '--num-streams', '4', '--json', '--kernel')
    result = report(*options, 'post_res_backward', 'pre_forward', code=code)
    assert result.returncode == 1, result.stdout + result.stderr
    problems = {row['kernel']: row['problems'] for row in json.loads(result.stdout)['kernels']}
    assert any('spills' in text for text in problems['post_res_backward dx'])
    assert any('bits an access' in text for text in problems['pre_forward'])


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (('--arch', '70'), ('--arch: 70', 'sm_80', '90')),
        (('--num-streams', '3'), ('--num-streams: 3', '1 2 4 8')),
        (('--hidden-size', '0'), ('--hidden-size: 0', 'at least 1')),
        (('--dtype', 'int8'), ('--dtype: int8', 'bf16')),
        (('--kernel', 'prex'), ('--kernel: prex', 'pre_forward')),
        (('--ceilings', 'absent.json'), ('--ceilings: absent.json',)),
    ],
)
def test_wrong_input_is_one_line(options, words):
    result = report(*options)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert all(word in result.stderr for word in words), result.stderr


def test_interpreter_is_one_line():
    result = report('--json', TRITON_INTERPRET='1')
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert 'TRITON_INTERPRET=1' in result.stderr and 'unset TRITON_INTERPRET' in result.stderr
