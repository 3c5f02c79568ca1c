"""``examples/init_study.py``: its arithmetic, what it repeats, and that runs do not meet."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'examples'))

import init_study  # noqa: E402
from init_study import GROUPS, SETTINGS, Run  # noqa: E402


def planted(setting: str, *losses: float) -> dict[Run, dict[str, float]]:
    """One result for each seed from 1 on."""
    return {
        Run('quickstart', setting, 100, seed): {'valid': loss}
        for seed, loss in enumerate(losses, 1)
    }


def lines(results: dict[Run, dict[str, float]]) -> str:
    records = [{**run._asdict(), 'text': 'digest', **outcome} for run, outcome in results.items()]
    return ''.join(json.dumps(record) + '\n' for record in records)


RESULTS = planted('standard', 2.0, 3.0, 4.0) | planted('identity', 1.9, 2.7) | planted('hc', 1.5)


def test_losses_are_paired_by_seed():
    """Errors of the mean by hand: stdev(2, 3, 4) / sqrt 3, and of -0.1 and -0.3 over sqrt 2."""
    found = {r.setting: r for r in init_study.rows(RESULTS, 'quickstart', 100, 'standard')}
    assert list(found) == ['standard', 'hc', 'identity']
    assert found['standard'].loss == pytest.approx((3.0, 1 / math.sqrt(3)))
    assert found['identity'].difference == pytest.approx((-0.2, 0.1))
    assert found['identity'].seeds == 2
    mean, error = found['hc'].difference
    assert mean == pytest.approx(-0.5) and math.isnan(error)


def test_table_says_means_and_errors():
    rows = init_study.table(RESULTS, 'standard').splitlines()
    assert '| standard | 3 | 3.0000 +- 0.5774 | 0 |' in rows
    assert '| identity | 2 | 2.3000 +- 0.4000 | -0.2000 +- 0.1000 |' in rows
    assert '| hc | 1 | 1.5000 | -0.5000 |' in rows


def test_pages_table_is_that_of_the_results():
    results, texts = init_study.read(ROOT / 'examples' / 'init_study.jsonl')
    page = (ROOT / 'megatron_mhc' / 'docs' / 'initial-values.md').read_text()
    assert len(texts) == 1
    missing = [r for r in init_study.table(results, 'standard').splitlines() if r not in page]
    assert not missing, 'python examples/init_study.py --table, into the page'


def test_every_setting_is_in_a_group():
    assert {name for _, names in GROUPS.values() for name in names} == set(SETTINGS)


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that take no time: a child that writes its loss, and fails where alpha is 1."""
    begun = []

    def run_in_child(arguments, start, log):
        begun.append(arguments)
        if child := os.fork():
            return child
        log.with_suffix('.json').write_text(json.dumps({'valid': 1.5}))
        os._exit(int(arguments[-2:] == ['--mhc-init-gating-factor', '1']))

    fake = types.SimpleNamespace(
        load_megatron=lambda: None,
        prepare=lambda folder, sizes: 'digest',
        command=lambda folder, size, flags, iters, seed: flags,
        run_in_child=run_in_child,
    )
    monkeypatch.setitem(sys.modules, 'init_study_run', fake)
    return begun


def study(folder: Path, *flags: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        init_study.main(['--results', str(folder / 'r.jsonl'), '--output', str(folder), *flags])
    return stopped.value.code


def test_a_run_that_is_there_is_not_repeated(tmp_path, fake_runs, capsys):
    (tmp_path / 'r.jsonl').write_text(lines(planted('standard', 2.0) | planted('hc', 2.5)))
    assert study(tmp_path, '--only', 'init', '--seeds', '1', '--jobs', '3') == 0
    assert len(fake_runs) == len(GROUPS['init'][1]) - 2
    assert '| prenorm | 1 | 1.5000 | -0.5000 |' in capsys.readouterr().out
    fake_runs.clear()
    assert study(tmp_path, '--only', 'init', '--seeds', '1') == 0
    assert not fake_runs
    assert study(tmp_path, '--only', 'init', '--seeds', '2') == 0
    assert len(fake_runs) == len(GROUPS['init'][1])


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, fake_runs, capsys):
    assert study(tmp_path, '--only', 'alpha', '--seeds', '1') == 1
    assert 'alpha 1, 100 iterations, seed 1: failed, see ' in capsys.readouterr().out
    results, _ = init_study.read(tmp_path / 'r.jsonl')
    assert {run.setting for run in results} == {'alpha 0', 'alpha 0.1'}


def test_results_on_another_text_or_none_are_refused(tmp_path, fake_runs, capsys):
    (tmp_path / 'r.jsonl').write_text(lines(RESULTS).replace('"digest"', '"other"'))
    assert study(tmp_path, '--only', 'eps') == 2
    assert 'error: --results' in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / 'r.jsonl').write_text('{"size": "deep"}\n')
    assert study(tmp_path, '--table') == 2
    assert 'line 1 is no result; remove it' in capsys.readouterr().err
    (tmp_path / 'r.jsonl').write_text(lines(planted('hc', 2.0)))
    assert study(tmp_path, '--plot', str(tmp_path / 'p.png')) == 2
    assert 'train more' in capsys.readouterr().err


def test_picture_of_all_sizes(tmp_path):
    more = {run._replace(size='deep'): outcome for run, outcome in RESULTS.items()}
    (tmp_path / 'r.jsonl').write_text(lines(RESULTS | more))
    assert study(tmp_path, '--plot', str(tmp_path / 'p.png')) == 0
    assert (tmp_path / 'p.png').read_bytes().startswith(b'\x89PNG')


REAL = """
import json, os, sys
from pathlib import Path
import init_study_run as one
folder = Path(sys.argv[1])
tiny = '--num-layers 1 --hidden-size 32 --seq-length 16 --max-position-embeddings 16'.split()
one.SIZES['quickstart'] = one.Size([*one.QUICKSTART, *tiny, *one.batch(4)], 4, one.BYTES)
one.HELD_OUT_SAMPLES = 8
one.load_megatron()
one.prepare(folder, {'quickstart'})
mhc = ['--residual-type', 'mhc', '--mhc-init']
cases = [['uniform', None], ['identity', {'post': 1.0}], ['uniform', None]]
for init, start in cases:
    log = folder / 'log'
    one.run_in_child(one.command(folder, 'quickstart', [*mhc, init], 3, 1), start, log)
    assert os.wait()[1] == 0, log.read_text()
    print(json.loads(log.with_suffix('.json').read_text())['valid'])
"""


def test_a_run_gives_the_same_bits_whatever_ran_before(tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', REAL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': f'{ROOT}:{ROOT / "examples"}', 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *_, first, other, again = done.stdout.split()
    assert first == again != other
