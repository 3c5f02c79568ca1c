"""Monitors, alarm and report in Megatron's own loop, from the command line."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest
from launch import launch

from megatron_mhc.cli import main as cli
from megatron_mhc.monitor.report import Run, loss_gap, read_run

ROOT = pathlib.Path(__file__).parents[2]
POISONED = ROOT / 'tests' / 'layouts' / 'poisoned_pretrain.py'
MODEL = (
    '--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 '
    '--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4 --mock-data '
    '--tokenizer-type NullTokenizer --vocab-size 255 --lr 1e-2 --min-lr 1e-3 --train-iters 6 '
    '--eval-iters 1 --eval-interval 3 --log-interval 2 --split 98,1,1 --num-workers 0 '
    '--hidden-dropout 0 --attention-dropout 0 --untie-embeddings-and-output-weights '
)
ALARM = re.compile(r'\[megatron-mhc\] alarm at iteration (\d+): (.*)')
PP2 = '--pipeline-model-parallel-size 2 '
VPP2 = PP2 + '--num-virtual-stages-per-pipeline-rank 2 '
MHC = '--residual-type mhc --mhc-init identity '


def run(world: int, flags: str, poison: str = 'none:0:0') -> subprocess.CompletedProcess:
    words = ('-m', 'megatron_mhc.run', POISONED, *(MODEL + flags).split())
    return launch(world, *words, MHC_POISON=poison)


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
    """A sound run on two stages whose report draws each sublayer."""
    folder = tmp_path_factory.mktemp('watched')
    flags = f'{MHC}{PP2}--mhc-monitor --mhc-monitor-per-layer --mhc-alarm stop '
    done = run(2, flags + f'--tensorboard-dir {folder}')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert not ALARM.search(done.stderr)
    return folder


def test_scalars_and_maps_are_written(watched):
    seen = read_run(watched, 'run')
    assert len(seen.h_res) == len(seen.composite) == 8 and len(seen.gains) == 4
    own = {tag: points for tag, points in seen.scalars.items() if tag.startswith('mhc/')}
    for tag in (
        *('amax-gain-forward', 'amax-gain-backward', 'amax-composite-gain-backward'),
        *('column-sum-error', 'res-offdiag-mean', 'pre-entropy', 'post-max', 'stream-rms'),
        *('stream-similarity', 'mapping-grad-norm', 'nonfinite-outputs', 'row-sum-error'),
        *('res-logit-max', 'res-logit-grad-max', 'res-saturated', 'write-share'),
        *('stream-effective-rank', 'h-res-0-3', 'h-res-2-2/layer-4-attention'),
        *('amax-composite-gain-forward/layer-1-attention', 'stream-norm-ratio/layer-4-mlp'),
    ):
        assert list(own[f'mhc/{tag}']) == [2, 4, 6], tag
    assert len([tag for tag in own if tag.count('/') == 2]) == 8 * len(
        [tag for tag in own if tag.count('/') == 1]
    )
    assert own['mhc/amax-composite-gain-forward'][6] == pytest.approx(1, abs=1e-5)
    assert own['mhc/res-saturated'][6] == 0 and 0 < own['mhc/res-logit-grad-max'][6]
    assert 1.01 < own['mhc/stream-effective-rank'][6] < 4
    # The mapping is a part of the whole, whose norm is before clipping as well.
    for iteration, norm in own['mhc/mapping-grad-norm'].items():
        assert 0 < norm < seen.scalars['grad-norm'][iteration]


def test_report_is_drawn_of_several_runs(watched, tmp_path, capsys):
    page = tmp_path / 'page.png'
    with pytest.raises(SystemExit) as end:
        cli(['report', f'a={watched}', f'b={watched}', '-o', str(page), '--sublayers', '0', '5'])
    assert end.value.code == 0 and capsys.readouterr().out.strip() == str(page)
    assert page.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n' and page.stat().st_size > 50_000


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['report', 'nowhere'], 'LOGDIR nowhere: no such folder; name the folder of'),
        (['report', 'WATCHED', '--sublayers', '8'], '--sublayers 8: WATCHED has sublayers 0 to 7'),
        (['report', 'WATCHED', '-o', 'page.xyz'], '--output page.xyz: unknown format .xyz'),
    ],
)
def test_report_refuses_in_one_line(watched, capsys, arguments, said):
    with pytest.raises(SystemExit) as end:
        cli([argument.replace('WATCHED', str(watched)) for argument in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and said.replace('WATCHED', str(watched)) in line


@pytest.fixture
def standard(tmp_path):
    """Events of a run without monitors."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path / 'standard'
    with SummaryWriter(str(folder)) as writer:
        for step, loss in enumerate((5.0, 4.0, 3.5, 3.0), start=1):
            writer.add_scalar('lm loss', loss, step)
    return folder


def test_report_refuses_runs_of_which_none_has_monitors(standard, capsys):
    with pytest.raises(SystemExit):
        cli(['report', f'standard={standard}'])
    (line,) = capsys.readouterr().err.splitlines()
    assert 'standard have no mhc/h-res; train with --mhc-monitor' in line


def test_a_run_without_monitors_is_the_others_baseline(watched, standard, tmp_path, capsys):
    page = tmp_path / 'page.png'
    with pytest.raises(SystemExit) as end:
        cli(['report', f'standard={standard}', f'mhc={watched}', '-o', str(page)])
    assert end.value.code == 0 and page.stat().st_size > 50_000
    base, run = read_run(standard, 'standard'), read_run(watched, 'mhc')
    gap, losses = loss_gap(run, base), run.scalars['lm loss']
    # Where both have a loss; a tenth of four points is one.
    assert gap == {step: losses[step] - base.scalars['lm loss'][step] for step in (1, 2, 3, 4)}
    assert set(loss_gap(base, base).values()) == {0.0}


def test_the_gap_is_smoothed():
    losses = {step: float(step) for step in range(1, 31)}
    run = Run('run', {'lm loss': losses}, None, [], [], [])
    base = Run('base', {'lm loss': dict.fromkeys(losses, 0.0)}, None, [], [], [])
    gap = loss_gap(run, base)
    assert (gap[1], gap[2], gap[3], gap[30]) == (1.0, 1.5, 2.0, 29.0)


@pytest.mark.parametrize(
    ('flags', 'poison', 'where'),
    [
        # Iteration 3 is not a log step: the gradient norm calls for the report.
        (MHC + PP2, 'mlp:2:3', 'layer 2 mlp (pipeline rank 0): its output'),
        (MHC + VPP2, 'attention:2:3', 'layer 2 attention (pipeline rank 1): its output'),
        (
            MHC + PP2 + '--pipeline-schedule dualpipev --mhc-recompute-layer-num stage ',
            'map:2:3',
            'layer 2 mlp (pipeline rank 0): its H_post or H_res',
        ),
        ('--residual-type hc ' + PP2, 'explode:4:4', 'layer 4 mlp (pipeline rank 1): H_res has'),
        ('--residual-type hc ' + VPP2, 'explode:3:4', 'layer 3 mlp (pipeline rank 0): H_res has'),
        (MHC + PP2, 'saturate:3:4', 'layer 3 mlp (pipeline rank 1): 100% of the rows of H_res'),
        # Whoever reads the streams sees that they are one.
        (MHC + VPP2, 'collapse:2:4', 'layer 3 attention (pipeline rank 0): the streams that it'),
    ],
)
def test_a_planted_fault_is_named_and_ends_all_ranks(flags, poison, where, tmp_path):
    done = run(2, f'{flags}--mhc-alarm stop --save {tmp_path} --save-interval 100', poison)
    # The others are ended as soon as one rank is gone, so that only that one tells.
    assert done.returncode == 3, done.stderr[-3000:]
    ((iteration, line),) = ALARM.findall(done.stderr)
    assert iteration == poison.rpartition(':')[2] and line.startswith(where), line
    assert not list(tmp_path.iterdir())


def test_streams_that_start_equal_raise_no_alarm():
    done = run(1, '--residual-type mhc --mhc-init uniform --mhc-alarm stop ')
    assert done.returncode == 0 and not ALARM.search(done.stderr), done.stderr[-3000:]


def test_warn_goes_on_where_megatrons_check_is_off():
    flags = f'{MHC}--mhc-alarm warn --no-check-for-nan-in-loss-and-grad '
    done = run(1, flags, 'mlp:2:3')
    assert done.returncode == 0, done.stderr[-3000:]
    found = ALARM.findall(done.stderr)
    # At once, then at each interval.
    assert [iteration for iteration, _ in found] == ['3', '4', '6']
    assert found[0][1].startswith('layer 2 mlp') and 'ends here' not in done.stderr
