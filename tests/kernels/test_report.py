"""The byte model against the paper and the launches, and the compile report with its verdict."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from reporting import ROOT, reports

from megatron_mhc.kernels.traffic import Traffic, kernel_forms, our_forms, paper_forms

pytest.importorskip('triton')

from megatron_mhc import compat
from megatron_mhc.commands import kernels as kernels_cli  # noqa: E402
from megatron_mhc.kernels import shipped, traffic, verdict  # noqa: E402
from megatron_mhc.kernels.offline import Resources  # noqa: E402

RECORD = json.loads((ROOT / 'kernels' / 'record.json').read_text())
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
    assert ours['forward at the fused edge'].elements == 3 * n + 2
    assert ours['backward at the fused edge'].elements == 6 * n + 4
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
        assert sum(kinds.values()) == moved + kinds['parameters']
    # All kernels are there; u without g is for callers that use the maps alone.
    assert seen == set(kernel_forms(n)) - {'read_backward HAS_U'}


def test_a_step_moves_what_the_forms_say():
    """Two sublayers with a fused edge: a first read, the edge and a last write; backward twice."""
    n, channels, tokens, dtype = 4, 256, 64, torch.bfloat16
    launches = shipped.fused_edge_launches(n, channels, tokens, dtype)
    vectors = sum(traffic.launch_bytes_by_kind(launch)['streams'] for launch in launches)
    vectors //= tokens * channels * dtype.itemsize
    assert vectors == (2 * n + 1) + (3 * n + 2) + (2 * n + 1) + 2 * (6 * n + 4)


def test_shipped_kernels_are_as_they_should_be():
    """n = 4 on sm_90: no spills, 128-bit streams, matrix units on bf16; ``.ci/run`` has all."""
    some = ('projection mix', 'pre_forward', 'post_res_forward')
    (result,) = reports(('--arch', '90', '--num-streams', '4', '--json', '--kernel', *some))
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found['ok'] and not any(row['problems'] for row in found['kernels'])
    assert all(row['spill_bytes'] == row['stack_bytes'] == 0 for row in found['kernels'])
    assert all('?' not in row['narrowest'] for row in found['kernels'])
    rows = {row['kernel']: row for row in found['kernels']}
    assert {name.partition(' ')[0] for name in rows} == {name.partition(' ')[0] for name in some}
    assert rows['projection mix']['mma'].endswith('bf16')
    assert rows['pre_forward']['loads']['128'] == 4 and rows['pre_forward']['stores'] == {'128': 1}
    assert {'num_streams': 4, 'form': 'HC: total', 'elements': 34}.items() <= next(
        row for row in found['traffic'] if row['form'] == 'HC: total'
    ).items()


def test_masked_tails_do_not_spill():
    """Odd channels and tokens in bf16: the fused edge, which takes most registers for them."""
    # Two compiles in the process itself.
    alone = 'import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n'
    size = ('--hidden-size', '4095', '--tokens', '8191', '--kernel', 'projection mix')
    (result,) = reports(('--arch', '90', '--num-streams', '4', '--json', *size), code=alone)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(result.stdout)['kernels']
    assert [row['kernel'] for row in rows] == ['projection mix', 'projection mix bias dropout']
    assert all(row['spill_bytes'] == row['stack_bytes'] == 0 for row in rows)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize('channels', [4096, 4095])
def test_spills_that_are_known_excuse_no_others(dtype, channels):
    """136 bytes in ``read_backward``: of masked tails in three-term TF32 alone."""
    launches = shipped.shipped_launches(4, channels, 8191, dtype)
    launch = next(launch for launch in launches if verdict.label(launch) == 'read_backward g u')
    mma = 'wgmma.bf16' if dtype == torch.bfloat16 else 'wgmma.tf32'
    for spilled in (136, 160):
        found = Resources(255, 0, spilled, 0, 0, {}, {}, {}, {}, mma, 0)
        problems, notes = verdict.judge(launch, 90, found, RECORD, None)
        known = spilled == 136 and channels == 4095 and dtype != torch.bfloat16
        assert (len(problems), len(notes)) == (not known, known)


def test_the_record_covers_what_is_supported():
    """Every kernel for n = 1, 2, 4, every architecture and every Triton version."""
    assert RECORD['triton'] == [*compat.TRITON_TESTED]
    for n in (1, 2, 4):
        for launch in shipped.shipped_launches(n, 4096, 8192, torch.bfloat16):
            for arch in verdict.MULTIPROCESSORS:
                for version in compat.TRITON_TESTED:
                    state = verdict.recorded(launch, arch, RECORD, version, RECORD['dtype'])
                    assert state and int(state.partition(' ')[0]) > 0, (launch.name, n, arch)


# One kernel on one architecture as the record of whatever Triton is installed has it.
PRE = ('--arch', '90', '--num-streams', '4', '--kernel', 'pre_forward')


def record(path: Path, state: object, versions: list[str]) -> tuple[str, ...]:
    """The options with which ``PRE`` is held to a record that says ``state`` of it."""
    kernels = {'pre_forward 4': {'90': state}}
    path.write_text(json.dumps(RECORD | {'triton': versions, 'kernels': kernels}))
    return (*PRE, '--record', str(path))


def test_what_is_lost_beside_the_record_is_noticed(tmp_path):
    """Occupancy and the matrix unit, of this version and of no other."""
    import triton

    versions = ['3.5.0', triton.__version__.partition('+')[0]]
    lost = {
        '65 -': '64 warps an SM',
        ('1 -', '65 -'): '65 on record',
        '64 wgmma.bf16': 'matrix instructions -, wgmma.bf16 on record',
    }
    states = [*lost, '64 -', '16 -', ('65 -', '64 -')]
    found = reports(*(record(tmp_path / str(i), s, versions) for i, s in enumerate(states)))
    for result, words in zip(found, lost.values(), strict=False):
        assert result.returncode == 1, result.stdout + result.stderr
        assert words in result.stdout and 'pre_forward (n=4, sm_90)' in result.stdout
    for result in found[len(lost) :]:
        assert result.returncode == 0, result.stdout + result.stderr
        assert 'no row has a record' not in result.stdout


def test_the_report_says_which_triton_it_ran_on_and_that_it_has_no_record(tmp_path):
    import triton

    (result,) = reports(record(tmp_path / 'record', ['65 -', '65 -'], ['3.4.0', '3.5.0']))
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'no row has a record of this Triton' in result.stdout
    assert '3.4.0 3.5.0 on record' in result.stdout and 'not occupancy' in result.stdout
    first = result.stdout.splitlines()[0]
    assert first.startswith(f'Triton {triton.__version__} from {Path(triton.__file__).parent}')
    assert f'torch {torch.__version__}' in first


def test_everything_supported_is_looked_at_by_default():
    parser = argparse.ArgumentParser()
    kernels_cli.add_arguments(parser)
    options = parser.parse_args(['report'])
    assert options.arch == [80, 86, 89, 90, 100, 120] == [*verdict.MULTIPROCESSORS]
    assert options.num_streams == [1, 2, 4] and options.kernel is None


@pytest.mark.parametrize(
    ('arch', 'registers', 'shared', 'columns', 'num_warps', 'warps'),
    [
        (90, 32, 0, 0, 4, 64),
        (86, 32, 0, 0, 4, 48),
        # 128 registers: 16 warps; one more a thread: 136, and 12.
        (90, 128, 0, 0, 4, 16),
        (90, 129, 0, 0, 4, 12),
        (90, 129, 0, 0, 8, 8),
        # 64 KiB and 1 KiB of the system's: three times in 228 KiB, once in 100.
        (90, 32, 65536, 0, 8, 24),
        (120, 32, 65536, 0, 8, 8),
        (86, 32, 99 * 1024, 0, 8, 8),
        (86, 32, 99 * 1024 + 1, 0, 8, 0),
        # At most 16 blocks on sm_86 and 32 on sm_90, and 512 columns of tensor memory.
        (86, 16, 0, 0, 1, 16),
        (90, 16, 0, 0, 1, 32),
        (100, 32, 0, 128, 4, 16),
    ],
)
def test_resident_warps(arch, registers, shared, columns, num_warps, warps):
    """As the occupancy calculator of the CUDA toolkit counts them."""
    found = Resources(registers, 0, 0, shared, 0, {}, {}, {}, {}, '-', columns)
    assert verdict.resident_warps(arch, found, num_warps) == warps


@pytest.mark.parametrize(
    ('dtype', 'mma', 'fine'),
    [
        (torch.bfloat16, 'wgmma.bf16', True),
        (torch.bfloat16, 'mma.bf16 tcgen05.f16', True),
        (torch.bfloat16, 'mma.tf32', False),
        (torch.bfloat16, '-', False),
        (torch.float32, 'mma.tf32', True),
        (torch.float32, 'mma.bf16', False),
    ],
)
def test_operands_that_changed_type_are_noticed(dtype, mma, fine):
    launches = shipped.shipped_launches(2, 64, 64, dtype)
    launch = next(launch for launch in launches if launch.name == 'projection_kernel')
    found = Resources(32, 0, 0, 0, 0, {}, {}, {}, {}, mma, 0)
    problems, _ = verdict.judge(launch, 90, found, RECORD, None)
    assert bool(problems) != fine and all('operands' in text for text in problems)


def test_spills_and_narrow_accesses_are_noticed():
    """A tile that holds too much for its threads, and one too small for whole vectors."""
    code = (
        'from megatron_mhc.kernels.triton import post_res, pre\n'
        'post_res.BACKWARD[4] = post_res.Tile(4, 256, num_warps=1)\n'
        'pre.FORWARD[4] = pre.Tile(1, 256)\n'
    )
    options = ('--arch', '90', '--num-streams', '4', '--json', '--kernel')
    (result,) = reports((*options, 'post_res_backward', 'pre_forward'), code=code)
    assert result.returncode == 1, result.stdout + result.stderr
    problems = {row['kernel']: row['problems'] for row in json.loads(result.stdout)['kernels']}
    assert any('spills' in text for text in problems['post_res_backward dx'])
    assert any('bits an access' in text for text in problems['pre_forward'])


def test_wrong_input_is_one_line(tmp_path):
    path = tmp_path / 'record.json'
    path.write_text('{"kernels": {}}')
    wrong = {
        ('--arch', '70'): ('--arch: 70', 'sm_80', '90'),
        ('--num-streams', '3'): ('--num-streams: 3', '1 2 4 8'),
        ('--hidden-size', '0'): ('--hidden-size: 0', 'from 1 to'),
        ('--dtype', 'int8'): ('--dtype: int8', 'bf16'),
        ('--kernel', 'prex'): ('--kernel: prex', 'pre_forward'),
        ('--record', 'absent.json'): ('--record: absent.json',),
        ('--record', str(ROOT / 'pyproject.toml')): ('--record:', 'leave it out'),
        ('--record', str(path)): (f'--record: {path}', 'kernel_record.py'),
    }
    for result, words in zip(reports(*wrong), wrong.values(), strict=True):
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1 and not result.stdout
        assert all(word in result.stderr for word in words), result.stderr


def test_interpreter_is_one_line():
    (result,) = reports(('--json',), TRITON_INTERPRET='1')
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert 'TRITON_INTERPRET=1' in result.stderr and 'unset TRITON_INTERPRET' in result.stderr
