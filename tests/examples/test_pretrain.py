"""The real training loop through the launcher, with a script that knows nothing of streams.

Numbers are compared in checkpoints, where every weight and optimizer state has all its bits; the
log prints seven digits.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from launch import launch

from megatron_mhc.runtime import save_lock

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'examples' / 'pretrain_gpt.py'
MODEL = (
    '--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 '
    '--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4 --mock-data '
    '--tokenizer-type NullTokenizer --vocab-size 255 --lr 1e-2 --min-lr 1e-3 --train-iters 9 '
    '--lr-decay-style cosine --weight-decay 0.1 --eval-iters 1 --eval-interval 100 '
    '--log-interval 1 --split 98,1,1 --num-workers 0 --untie-embeddings-and-output-weights'
).split()
PP2 = ['--pipeline-model-parallel-size', '2']
MHC = ['--residual-type', 'mhc', '--mhc-init', 'identity']
FULL = '--recompute-granularity full --recompute-method uniform --recompute-num-layers 1'.split()
FIXED_MASKS = ['--hidden-dropout', '0', '--attention-dropout', '0']  # each rank seeds its own
LINE = re.compile(r'iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+)')


ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}


def train(
    world: int, *flags: str, launcher: tuple[str, ...] = ('-m', 'megatron_mhc.run')
) -> dict[int, tuple[float, float]]:
    """Run to the end; iteration -> (loss, gradient norm)."""
    done = launch(world, *launcher, SCRIPT, *MODEL, *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {int(i): (float(loss), float(norm)) for i, loss, norm in LINE.findall(done.stdout)}


@pytest.fixture
def assert_equal_checkpoints(tensors):
    """``(a, b, iteration)``: every tensor of two checkpoint folders has the same bits."""

    def check(a: pathlib.Path, b: pathlib.Path, iteration: int) -> None:
        first, second = (tensors(folder / f'iter_{iteration:07d}') for folder in (a, b))
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.equal(value, second[key]), key

    return check


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """Nine iterations of mhc on two pipeline stages, saved every third."""
    folder = tmp_path_factory.mktemp('unbroken')
    curve = train(2, *PP2, *MHC, *FIXED_MASKS, '--save', str(folder), '--save-interval', '3')
    return folder, curve


def test_standard_is_bitwise_stock(tmp_path, assert_equal_checkpoints):
    """Against a driver that installs the CPU device and none of the residual patches."""
    stock = tmp_path / 'driver.py'
    stock.write_text(
        'import runpy, sys\n'
        'from megatron_mhc.runtime import cpu_device\n'
        'cpu_device.install()\n'
        'from megatron_mhc.patches import engine\n'
        'from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES\n'
        'from megatron_mhc.patches.dataset_helpers import DATASET_HELPERS_PATCH\n'
        'engine.apply((DATASET_HELPERS_PATCH, *CPU_DEVICE_PATCHES))\n'
        'sys.argv = sys.argv[1:]\n'
        'sys.path.insert(0, "")\n'
        'runpy.run_path(sys.argv[0], run_name="__main__")\n'
    )
    save = ('--save', str(tmp_path / 'stock'), '--save-interval', '9')
    train(1, *save, launcher=(str(stock),))
    train(1, '--save', str(tmp_path / 'ours'), '--save-interval', '9')
    assert_equal_checkpoints(tmp_path / 'stock', tmp_path / 'ours', 9)


def test_loss_falls(unbroken):
    _, curve = unbroken
    assert sorted(curve) == list(range(1, 10))
    assert curve[9][0] < curve[1][0] - 0.1


def test_killed_run_resumes_on_the_same_curve(unbroken, tmp_path, assert_equal_checkpoints):
    """kill -9 after the first checkpoint, then the same command again."""
    folder, _ = unbroken
    flags = (
        *PP2,
        *MHC,
        *FIXED_MASKS,
        '--save',
        str(tmp_path),
        '--load',
        str(tmp_path),
        '--save-interval',
        '3',
    )
    torchrun = ('torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m')
    command = [sys.executable, '-m', *torchrun, 'megatron_mhc.run', SCRIPT, *MODEL, *flags]
    with open(tmp_path / 'log', 'w') as log:
        first = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=ENVIRONMENT
        )
    tracker = tmp_path / 'latest_checkpointed_iteration.txt'
    deadline = time.monotonic() + 200
    while not tracker.is_file() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    # torchrun's workers, and the checkpoint writers they spawn, have sessions of their own.
    launcher = psutil.Process(first.pid)
    for process in (*launcher.children(recursive=True), launcher):
        process.kill()
    first.wait()
    assert tracker.is_file(), (tmp_path / 'log').read_text()[-3000:]
    assert not (tmp_path / 'iter_0000009').exists(), 'the run ended before it could be killed'
    lock = tmp_path / save_lock.NAME
    assert lock.is_file()
    train(2, *flags)
    assert not lock.exists()
    assert_equal_checkpoints(folder, tmp_path, 9)


def test_single_pass_in_bf16_is_the_same_over_stages(tmp_path, assert_equal_checkpoints):
    """Begun on one, gone on with on two that recompute their layers: bit for bit the run on one."""
    flags = (*MHC, *FIXED_MASKS, '--mhc-single-pass', '--bf16', '--clip-grad', '0')
    flags = (*flags, '--train-iters', '6', '--save-interval', '3')
    alone, stages = tmp_path / 'alone', tmp_path / 'stages'
    train(1, *flags, '--save', str(alone))
    at_three = ('--load', str(alone), '--ckpt-step', '3')
    resumed = train(2, *flags, *PP2, *FULL, *at_three, '--save', str(stages))
    assert sorted(resumed) == [4, 5, 6]
    assert_equal_checkpoints(alone, stages, 6)


@pytest.mark.parametrize(
    'layout',
    [
        ['--tensor-model-parallel-size', '2', '--sequence-parallel'],
        [*PP2, '--num-layers-per-virtual-pipeline-stage', '1'],
    ],
    ids=['tp2-sp', 'pp2-vpp2'],
)
def test_checkpoint_resumes_in_another_layout(unbroken, tmp_path, layout):
    folder, curve = unbroken
    resumed = train(2, *layout, *MHC, *FIXED_MASKS, '--load', str(folder), '--ckpt-step', '6')
    assert sorted(resumed) == [7, 8, 9]
    for iteration, (loss, norm) in resumed.items():
        assert norm == pytest.approx(curve[iteration][1], rel=2e-3), iteration
        if iteration > 8:  # Megatron averages the first two logged losses of every run
            assert loss == pytest.approx(curve[iteration][0], rel=1e-5), iteration


def test_refusal_reaches_the_shell_before_any_work(unbroken, tmp_path):
    folder, _ = unbroken
    done = launch(0, '-m', 'megatron_mhc.run', SCRIPT, *MODEL, '--load', folder)
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if 'error:' in line]
    assert len(error) == 1 and 'the checkpoint was trained with residual connections' in error[0]
    assert 'initializing torch distributed' not in done.stdout


def one_process(*flags: str, script: pathlib.Path = SCRIPT) -> tuple[int, str, str]:
    """Exit status, standard output, and the last line of standard error."""
    done = launch(0, '-m', 'megatron_mhc.run', script, *MODEL, *flags)
    return done.returncode, done.stdout, done.stderr.splitlines()[-1]


def test_a_folder_that_another_run_saves_into_is_refused(tmp_path):
    save_lock.hold(str(tmp_path))
    try:
        flags = (*MHC, '--save', str(tmp_path), '--save-interval', '3')
        status, output, error = one_process(*flags)
        assert status == 2 and 'building GPT model' not in output
        assert f'--save {tmp_path}: another run saves there, process {os.getpid()} on ' in error
    finally:
        save_lock.release(tmp_path / save_lock.NAME)


@pytest.mark.parametrize('how', [[], ['--async-save']], ids=['sync', 'async'])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(unbroken, tmp_path, how):
    """While it trains, no file may grow beyond 100 kB, as on a full disk."""
    script = tmp_path / 'pretrain_full.py'
    script.write_text(
        'import resource\n'
        'from megatron.training import training\n'
        'def limited(*args, original=training.train, **options):\n'
        '    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n'
        '    return original(*args, **options)\n'
        'training.train = limited\n' + SCRIPT.read_text()
    )
    folder = tmp_path / 'run'
    shutil.copytree(unbroken[0], folder)
    flags = ('--load', str(folder), '--save', str(folder), '--save-interval', '2', *how)
    more = ('--train-iters', '13', '--override-opt-param-scheduler')
    status, output, error = one_process(*MHC, *flags, *more, script=script)
    assert status == 1 and 'iteration       10/' in output
    assert f'error: --save {folder}: ' in error and 'could not be written (' in error
    assert f'iter_0000009 is whole and --load {folder} goes on from it' in error
    assert not (folder / save_lock.NAME).exists()


def test_the_adaptor_does_what_the_launcher_does(tmp_path):
    """One import line at the top of the script, no launcher."""
    script = tmp_path / 'pretrain_mine.py'
    script.write_text('import megatron_mhc.adaptor\n' + SCRIPT.read_text())
    flags = ('--residual-type', 'hc', '--train-iters', '2')
    done = launch(1, script, *MODEL, *flags, MEGATRON_MHC_DEVICE='auto')
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(LINE.findall(done.stdout)) == 2
    assert 'residual_type ................................... hc' in done.stdout


def test_interpreted_kernels_train_as_torch_does(tmp_path, tensors):
    """Every kernel in Megatron's loop: pipeline edges, biases and dropout included."""
    flags = [*PP2, *MHC, '--num-layers', '2', '--global-batch-size', '2', '--eval-iters', '0']
    # Adam would turn a rounding error of a tiny gradient into a whole step.
    flags += ['--optimizer', 'sgd', '--lr', '0.5', '--min-lr', '0.5', '--train-iters', '2']
    flags += ['--hidden-dropout', '0.1', '--save-interval', '2', '--mhc-kernel-backend']
    runs = {
        backend: train(2, *flags, backend, '--save', str(tmp_path / backend))
        for backend in ('torch', 'triton')
    }
    assert runs['torch'].keys() == runs['triton'].keys() == {1, 2}
    for iteration, (loss, norm) in runs['torch'].items():
        assert runs['triton'][iteration] == pytest.approx((loss, norm), rel=2e-6, abs=2e-3)
    first, second = (tensors(tmp_path / backend / 'iter_0000002') for backend in runs)
    assert first.keys() == second.keys()
    for key, value in first.items():
        if value.is_floating_point():
            torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-6, msg=key)
