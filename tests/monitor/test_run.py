"""Monitors, alarm and report in Megatron's own loop, from the command line."""

from __future__ import annotations

import json
import pathlib
import re
import struct
import subprocess

import pytest
from launch import launch

from megatron_mhc.cli import main as cli
from megatron_mhc.monitor.curves import loss_gap
from megatron_mhc.monitor.runs import read_run
from megatron_mhc.monitor.verdict import alarm_settings, verdict

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
MHC, HC = '--residual-type mhc --mhc-init identity ', '--residual-type hc '


def run(
    world: int, flags: str, poison: str = 'none:0:0', **environment: str
) -> subprocess.CompletedProcess:
    words = ('-m', 'megatron_mhc.run', POISONED, *(MODEL + flags).split())
    return launch(world, *words, MHC_POISON=poison, **environment)


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
    """A sound run on two stages whose report draws each sublayer."""
    folder = tmp_path_factory.mktemp('watched')
    flags = f'{MHC}{PP2}--mhc-monitor --mhc-monitor-per-layer --mhc-alarm stop '
    flags += f'--mhc-alarm-gain 2.5 --tensorboard-dir {folder} '
    flags += f'--wandb-project p --wandb-exp-name e --wandb-save-dir {folder}/w'
    done = run(2, flags, WANDB_MODE='offline')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert not ALARM.search(done.stderr)
    return folder


def test_scalars_and_maps_are_written(watched):
    seen = read_run(watched, 'run')
    assert [*seen.h_res] == [2, 4, 6] and seen.composite.shape == (8, 4, 4)
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


def report(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as end:
        cli(['report', *map(str, words)])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return out


def test_a_sound_run_is_called_healthy(watched, tmp_path, capsys):
    page = tmp_path / 'page.png'
    out = report(capsys, f'a={watched}', f'b={watched}', '-o', page, '--sublayers', 0, 5)
    first, second, last = out.splitlines()
    assert first[1:] == second[1:] and last == str(page)
    assert first.startswith('a: healthy at iteration 6: all finite; gains bounded (composite at ')
    assert '; no saturated rows; streams alive (effective rank 1.' in first
    assert page.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n' and page.stat().st_size > 50_000


def test_the_run_says_of_which_kind_it_is_and_how_its_alarm_was_set(watched):
    run = read_run(watched, 'run')
    assert run.options['residual_type'] == 'mhc' and alarm_settings(run).alarm_gain == 2.5


def wandb_records(data: bytes):
    """The records of an offline run: a LevelDB log, which newer wandb cannot read in Python.

    Blocks of 32 KiB; a piece is a checksum, 2 bytes of length, a kind, then the data. Kinds 1 and 4
    are the last piece of a record. https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    at, record = len(b':W&B') + 3, b''
    while len(data) - at > 7:
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from('<HB', data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b''


def test_wandb_gets_the_same_scalars_at_the_same_steps(watched):
    """From what an offline run leaves, which is what ``wandb sync`` sends."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = watched.glob('w/wandb/offline-run-*/run-*.wandb')
    sent = {}
    for history in (Record.FromString(r).history for r in wandb_records(file.read_bytes())):
        for item in history.item:
            points = sent.setdefault(item.key or item.nested_key[0], {})
            points[history.step.num] = json.loads(item.value_json)
    scalars = read_run(watched, 'run').scalars
    own = {tag: points for tag, points in scalars.items() if tag.startswith('mhc/')}
    assert own.keys() == {tag for tag in sent if tag.startswith('mhc/')} and len(own) > 100
    for tag in (*own, 'lm loss', 'grad-norm'):
        assert sent[tag] == pytest.approx(scalars[tag], rel=1e-6), tag


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


def test_runs_without_monitors_are_drawn_as_far_as_it_goes(standard, tmp_path, capsys):
    page = tmp_path / 'page.svg'
    first, last = report(capsys, f'standard={standard}', '-o', page).splitlines()
    assert first.endswith('all finite; there is no report of --mhc-monitor, so no more is known')
    assert page.stat().st_size and last == str(page)


def test_a_run_without_monitors_is_the_others_baseline(watched, standard, tmp_path, capsys):
    page = tmp_path / 'page.html'
    out = report(capsys, f'standard={standard}', f'mhc={watched}', '-o', page)
    assert out.startswith('standard: healthy at iteration 4: all finite; there is no report')
    assert 'loss less that of standard' in page.read_text()
    base, losses = (read_run(folder, 'run').scalars['lm loss'] for folder in (standard, watched))
    # Where both have a loss; a tenth of four points is one.
    assert loss_gap(losses, base) == {step: losses[step] - base[step] for step in (1, 2, 3, 4)}
    assert set(loss_gap(base, base).values()) == {0.0}


def test_the_gap_is_smoothed():
    losses = {step: float(step) for step in range(1, 31)}
    gap = loss_gap(losses, dict.fromkeys(losses, 0.0))
    assert (gap[1], gap[2], gap[3], gap[30]) == (1.0, 1.5, 2.0, 29.0)


@pytest.mark.parametrize(
    ('flags', 'poison', 'where', 'check'),
    [
        # Iteration 3 is not a log step: the gradient norm calls for the report.
        (MHC + PP2, 'mlp:2:3', 'layer 2 mlp (pipeline rank 0): its output', 'finite'),
        (MHC + VPP2, 'attention:2:3', 'layer 2 attention (pipeline rank 1): its output', 'finite'),
        (
            MHC + PP2 + '--pipeline-schedule dualpipev --mhc-recompute-layer-num stage ',
            'map:2:3',
            'layer 2 mlp (pipeline rank 0): its H_post or H_res',
            'finite',
        ),
        (
            '--residual-type hc ' + PP2,
            'explode:4:4',
            'layer 4 mlp (pipeline rank 1): H_res has',
            'gains',
        ),
        (
            '--residual-type hc ' + VPP2,
            'explode:3:4',
            'layer 3 mlp (pipeline rank 0): H_res has',
            'gains',
        ),
        (
            MHC + PP2,
            'saturate:3:4',
            'layer 3 mlp (pipeline rank 1): 100% of the rows of H_res',
            'saturation',
        ),
        # Whoever reads the streams sees that they are one.
        (
            MHC + VPP2,
            'collapse:2:4',
            'layer 3 attention (pipeline rank 0): the streams that it',
            'streams',
        ),
    ],
)
def test_a_planted_fault_is_named_and_ends_all_ranks(flags, poison, where, check, tmp_path):
    saved, events = tmp_path / 'saved', tmp_path / 'events'
    flags += f'--mhc-alarm stop --save {saved} --save-interval 100 '
    done = run(2, f'{flags}--mhc-monitor --tensorboard-dir {events}', poison)
    # The others are ended as soon as one rank is gone, so that only that one tells.
    assert done.returncode == 3, done.stderr[-3000:]
    ((iteration, line),) = ALARM.findall(done.stderr)
    assert iteration == poison.rpartition(':')[2] and line.startswith(where), line
    assert not saved.exists() or not list(saved.iterdir())
    # The report says the same; of which sublayer only where that iteration was to be written.
    worst, *_ = verdict(read_run(events, 'run'))
    assert (worst.check, worst.level, worst.since) == (check, 'sick', int(iteration))
    if int(iteration) % 2 == 0:
        assert where.startswith(worst.as_dict()['layer'])


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
