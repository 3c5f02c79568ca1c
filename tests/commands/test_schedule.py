"""``megatron-mhc schedule``: what it prints, and one line with status 2 for wrong input."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from megatron_mhc.commands import schedule_answer
from megatron_mhc.schedules.catalog import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]
KEYS = {'schedule', 'pp', 'microbatches', 'hop', 'work', 'makespan', 'bubble', 'peak_live'}
DUALPIPEV = '--schedule dualpipev --pp 8 --microbatches 32'


@pytest.fixture
def schedule(answer):
    return lambda words: answer(f'schedule {words}')


def test_simulate_prints_one_object(schedule):
    status, out, err = schedule(f'simulate {DUALPIPEV} --json')
    found = json.loads(out)
    assert (status, err) == (0, '') and KEYS <= set(found)
    assert {key: found[key] for key in KEYS} == {
        **{'schedule': 'dualpipev', 'pp': 8, 'microbatches': 32, 'hop': 0.0},
        **{'work': 96.0, 'makespan': 103.0, 'bubble': 7.0, 'peak_live': 8.5},
    }
    assert set(found) - KEYS == {'span_bubble', 'bubble_share', 'exposed_hop'}


def test_times_reach_the_simulator(schedule):
    words = 'simulate --schedule 1f1b --pp 4 --microbatches 8 --json'
    times = '--forward 2 --input-grad 3 --weight-grad 1 --hop 0.5'
    found = json.loads(schedule(f'{words} {times}')[1])
    assert (found['work'], found['hop']) == (48, 0.5) and found['bubble'] > 18
    assert json.loads(schedule(f'{words} --stage-scale 1 1 1 2')[1])['work'] == 48
    assert json.loads(schedule(f'{words} --recompute 0.5')[1])['work'] == 28
    alpha = json.loads(schedule(f'simulate {DUALPIPEV} --fused-slot-factor 0.8 --json')[1])
    assert alpha['makespan'] == pytest.approx(86.8)
    chunks = 'simulate --schedule interleaved --pp 4 --microbatches 8 --chunks 4 --json'
    assert json.loads(schedule(chunks)[1])['bubble'] == 9 / 4


def test_help_tells_a_default_of_zero(schedule):
    said = ' '.join(schedule('simulate --help')[1].split())
    assert 'from one rank to another (default: 0.0)' in said
    assert 'as it is executed (default' not in said


def test_the_executed_plan_can_be_simulated(schedule):
    words = 'simulate --schedule dualpipev-w --pp 8 --microbatches 64 --hop 0.2 --recompute 0.201'
    found = json.loads(schedule(f'{words} --lowered --json')[1])
    assert found['makespan'] <= 214.9


def test_simulate_for_people(schedule):
    status, out, _ = schedule(f'simulate {DUALPIPEV}')
    assert status == 0 and 'bubble' in out and '6.8 % of the total time' in out


def test_list_names_every_schedule_and_its_needs(schedule):
    listed = json.loads(schedule('list --json')[1])['schedules']
    assert [entry['name'] for entry in listed] == list(SCHEDULES)
    assert all(entry['description'] and entry['needs'] for entry in listed)
    out = schedule('list')[1]
    assert all(name in out for name in SCHEDULES)


def test_compare_ranks_what_is_possible_and_explains_the_rest(schedule):
    words = 'compare --pp 8 --microbatches 20'
    found = json.loads(schedule(f'{words} --json')[1])
    steps = [row['makespan'] for row in found['schedules']]
    names = [row['schedule'] for row in found['schedules']]
    refused = {row['schedule']: row['reason'] for row in found['refused']}
    assert steps == sorted(steps) and {'1f1b', 'zb-v', 'dualpipev'} <= set(names)
    assert '20' in refused['interleaved']
    hops = {row['schedule']: row['hops'] for row in found['schedules']}
    assert (hops['1f1b'], hops['dualpipev'], hops['dualpipe']) == (7, 14, 7)
    out = schedule(words)[1]
    assert 'interleaved' in out and 'refused: ' in out and 'forward-only' not in out


@pytest.mark.parametrize('shape', ['text', 'csv', 'drawing', 'svg', 'trace'])
def test_show_writes_each_format(schedule, tmp_path, shape):
    words = 'show --schedule dualpipev --pp 2 --microbatches 4 --format'
    status, out, _ = schedule(f'{words} {shape}')
    assert status == 0
    path = tmp_path / 'plan'
    assert schedule(f'{words} {shape} --output {path}')[:2] == (0, '')
    assert path.read_text() == out
    if shape == 'svg':
        ET.fromstring(out)
    if shape == 'trace':
        assert json.loads(out)['traceEvents']


def test_show_writes_png_to_a_file_only(schedule, tmp_path):
    words = 'show --schedule 1f1b --pp 2 --microbatches 2 --format png'
    path = tmp_path / 'a.png'
    assert schedule(f'{words} --output {path}')[0] == 0
    assert path.read_bytes()[:4] == b'\x89PNG'
    status, _, err = schedule(words)
    assert status == 2 and 'give --output FILE' in err


@pytest.mark.parametrize('shape', ['drawing', 'svg', 'trace'])
def test_show_draws_a_part_of_the_step(schedule, shape):
    words = f'show {DUALPIPEV} --format {shape}'
    part = schedule(f'{words} --from 50 --to 60')[1]
    assert 'F24' in part and 'F0' not in part and 'F31' not in part
    assert len(part) < len(schedule(words)[1]) / 3


def test_show_cuts_what_is_too_wide(schedule, tmp_path):
    cut = schedule(f'show {DUALPIPEV} --format svg --width 1000')[1]
    assert 'left out in between' in cut
    assert float(ET.fromstring(cut).get('width')) <= 1000
    path = tmp_path / 'a.png'
    for extra, least, most in (('', 2000, 2400), (' --width 1500', 1200, 1500)):
        assert schedule(f'show {DUALPIPEV} --format png --output {path}{extra}')[0] == 0
        assert least < int.from_bytes(path.read_bytes()[16:20]) <= most


def test_tables_explain_their_words(schedule):
    for words in (f'simulate {DUALPIPEV}', 'compare --pp 4 --microbatches 8'):
        lines = schedule(words)[1].splitlines()
        assert not {'makespan', 'span', 'span_bubble', 'copies'} & set(' '.join(lines[:2]).split())
        for name in ('total time', 'bubble', 'inner bubble', 'exposed comm.', 'in flight'):
            assert any(line.startswith(name + '  ') for line in lines), (words, name)


def test_show_lowered_has_communication(schedule):
    words = 'show --schedule 1f1b --pp 2 --microbatches 2 --json'
    plain, lowered = (json.loads(schedule(words + extra)[1]) for extra in ('', ' --lowered'))
    assert plain['ranks'][0] == ['0F0', '0F1', '0B0', '0B1']
    assert '0SEND_F0' in lowered['ranks'][0] and plain['placement'] == [[0, 1]]


def test_show_keeps_to_the_width(schedule):
    out = schedule(f'show {DUALPIPEV} --width 70')[1]
    assert all(len(line) <= 70 for line in out.splitlines() if line.startswith('rank'))


@pytest.mark.parametrize('shape', ['text', 'csv'])
@pytest.mark.parametrize('lowered', ['', ' --lowered'])
def test_a_plan_file_is_read_back(schedule, tmp_path, lowered, shape):
    path = tmp_path / 'plan'
    schedule(f'show {DUALPIPEV} --format {shape} --output {path}{lowered}')
    for topic in ('validate', 'simulate', 'show'):
        status, out, err = schedule(f'{topic} --plan {path} --json')
        assert (status, err) == (0, '')
        assert json.loads(out)['microbatches'] == 32
    made = json.loads(schedule(f'simulate {DUALPIPEV} --json')[1])
    read = json.loads(schedule(f'simulate --plan {path} --json')[1])
    assert read['makespan'] == made['makespan']


@pytest.mark.parametrize('topic', ['validate', 'simulate', 'show'])
def test_a_plan_that_fails_validation_is_refused(schedule, tmp_path, topic):
    path = tmp_path / 'plan.csv'
    schedule(f'show --schedule 1f1b --pp 2 --microbatches 2 --format csv --output {path}')
    path.write_text(path.read_text().replace('0B1', '0B0'))
    status, out, err = schedule(f'{topic} --plan {path}')
    assert (status, out) == (2, '')
    assert err.startswith(f'megatron-mhc schedule {topic}: error: ') and err.count('\n') == 1


def test_validate_says_what_it_proved(schedule):
    status, out, _ = schedule(f'validate {DUALPIPEV}')
    assert status == 0 and 'dualpipev is valid with its communication: 8 ranks, 32 micro' in out
    found = json.loads(schedule(f'validate {DUALPIPEV} --json')[1])
    assert found['valid'] is True and found['operations']['F'] == 8 * 64


@pytest.mark.parametrize(
    'words, text',
    [
        ('simulate --pp 8 --microbatches 32', '--schedule or --plan: one of them; give a NAME'),
        ('simulate --schedule 1f1b --pp 8', 'needs --pp and --microbatches'),
        ('simulate --schedule nosuch --pp 8 --microbatches 8', 'nosuch'),
        ('simulate --schedule dualpipev --pp 8 --microbatches 8', '16'),
        (
            'simulate --schedule 1f1b --pp 0 --microbatches 8',
            'argument --pp: 0: wanted an integer from 1',
        ),
        ('simulate --schedule 1f1b --pp 2 --microbatches x', 'argument --microbatches: x'),
        (
            'simulate --schedule 1f1b --pp 2 --microbatches 2 --hop -1',
            'argument --hop: -1: wanted a finite number',
        ),
        ('simulate --schedule 1f1b --pp 2 --microbatches 2 --hop wide', 'argument --hop'),
        (
            'simulate --schedule 1f1b --pp 2 --microbatches 2 --stage-scale 1',
            'stage_scale has 1 factors, the plan 2 stages',
        ),
        ('show --plan /nowhere/plan.csv', '/nowhere/plan.csv: No such file or directory'),
        (f'show --plan {__file__} --pp 2', 'leave out --pp'),
        (
            'show --schedule 1f1b --pp 2 --microbatches 2 --output /nowhere/a',
            'argument --output: /nowhere/a: No such file or directory',
        ),
        ('show --schedule 1f1b --pp 2 --microbatches 2 --width x', 'argument --width: x'),
        ('show --schedule 1f1b --pp 2 --microbatches 2 --from 9', '--from 9: the step ends at 9'),
        ('show --schedule 1f1b --pp 2 --microbatches 2 --from 2 --to 1', '--to 1: the picture'),
        (
            'show --schedule 1f1b --pp 2 --microbatches 2 --format csv --to 1',
            '--to 1 has no effect with --format csv',
        ),
        (
            'show --schedule 1f1b --pp 2 --microbatches 2 --json --from 1',
            '--from 1 has no effect with --json',
        ),
        (
            'show --schedule 1f1b --pp 2 --microbatches 2 --format trace --width 9',
            '--width 9 has no effect with --format trace',
        ),
        ('compare --pp 8', '--microbatches'),
        (
            f'compare --pp {"9" * 5000} --microbatches 1',
            '9... (5000 characters): wanted an integer',
        ),
        (
            f'simulate --schedule 1f1b --pp 2 --microbatches {"9" * 400}',
            '9... (400 characters): wanted an integer',
        ),
        ('simulate --schedule 1f1b --pp 4096 --microbatches 4096', 'too many to follow singly'),
        ('compare --pp 4096 --microbatches 4096', 'too many to follow singly'),
        ('compare --pp 8 --microbatches 8 --forward 0', 'forward=0'),
        ('nosuch', 'nosuch'),
    ],
)
def test_wrong_input_is_one_line_and_status_2(schedule, words, text):
    status, out, err = schedule(words)
    assert (status, out) == (2, '')
    assert text in err and err.count('\n') == 1 and err.startswith('megatron-mhc schedule')


def test_a_plan_that_reduces_already_is_completed(schedule, tmp_path):
    path = tmp_path / 'plan'
    path.write_text('0F0,0F1,0B0,0B1,0REDUCE_GRAD\n1F0,1B0,1F1,1B1,1REDUCE_GRAD\n')
    status, out, _ = schedule(f'validate --plan {path}')
    assert status == 0 and '2 REDUCE' in out and '4 SEND' in out


def test_plans_too_large_to_follow_are_one_line(schedule, tmp_path, monkeypatch):
    path = tmp_path / 'plan'
    path.write_text('microbatches 1000000000000\n0F0 0B0\n')
    assert 'more than 1048576 forward passes' in schedule(f'validate --plan {path}')[2]
    assert 'not a file' in schedule('validate --plan /dev/zero')[2]
    monkeypatch.setattr(schedule_answer, '_MOST_BYTES', 10)
    assert 'at most 10: more operations' in schedule(f'validate --plan {path}')[2]
    monkeypatch.setattr(schedule_answer, '_MOST_TIMED', 100)
    for words in (f'simulate {DUALPIPEV}', f'show {DUALPIPEV}'):
        assert 'operations are too many to give times singly, at most 100' in schedule(words)[2]
    assert schedule(f'validate {DUALPIPEV}')[0] == 0


def test_a_file_that_is_no_plan_is_refused(schedule, tmp_path):
    for content in ('', 'hello', '\x00\xff'):
        path = tmp_path / 'plan'
        path.write_text(content)
        status, _, err = schedule(f'validate --plan {path}')
        assert status == 2 and err.count('\n') == 1 and 'argument --plan' in err


def test_a_simulation_loads_neither_megatron_nor_matplotlib():
    code = (
        'import atexit, sys\n'
        'from megatron_mhc.cli import main\n'
        'heavy = {"megatron", "matplotlib", "triton"}\n'
        'atexit.register(lambda: print(sorted(heavy & set(sys.modules))))\n'
        'main(sys.argv[1:])\n'
    )
    words = f'schedule simulate {DUALPIPEV} --json'.split()
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [sys.executable, '-c', code, *words], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, loaded = done.stdout.splitlines()
    assert json.loads(found)['makespan'] == 103 and loaded == '[]'


def test_compare_refuses_what_factors_do_not_fit(schedule):
    found = json.loads(schedule('compare --pp 2 --microbatches 4 --stage-scale 1 2 --json')[1])
    on_line = {'gpipe', '1f1b', '1f1b-overlap', 'zb-h1'}
    assert {row['schedule'] for row in found['schedules']} == on_line | {'dualpipe'}
    reasons = {row['schedule']: row['reason'] for row in found['refused']}
    assert 'stage_scale has 2 factors, the plan 4 stages' in reasons['zb-v']


def test_a_reader_that_stops_early_gets_no_traceback():
    command = [sys.executable, '-m', 'megatron_mhc', *'schedule list'.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ''
    assert process.wait(timeout=60) == 1
