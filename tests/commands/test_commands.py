"""All commands together: words of options, examples, JSON, exit status, completion."""

import argparse
import importlib
import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from megatron_mhc import cli
from megatron_mhc.commands.examples import EXAMPLES, examples
from megatron_mhc.inputs import options as names
from megatron_mhc.inputs.progress import progress

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / 'megatron_mhc' / 'docs' / 'commands.md').read_text()


def below(parser):
    """Page, such as ``schedule show`` -> its parser, of all there are."""
    found = {parser.prog.removeprefix(cli.PROGRAM).strip(): parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                found |= below(one)
    return found


PARSERS = below(cli.build_parser(cli.COMMANDS))
LEAVES = [page for page in PARSERS if not any(name.startswith(f'{page} ') for name in PARSERS)]
LEAVES.remove('')


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The folder that examples and tables find themselves in, with what they read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'torch_profile').mkdir()
    kernel = {'ph': 'X', 'cat': 'kernel', 'name': 'gemm', 'pid': 0, 'tid': 7, 'ts': 1, 'dur': 2}
    trace = {'traceEvents': [kernel | {'args': {'device': 0, 'stream': 7}}]}
    (tmp_path / 'trace.json').write_text(json.dumps(trace))
    for rank in (0, 1):
        (tmp_path / 'torch_profile' / f'rank-{rank}.json.gz').touch()
    (tmp_path / 'plan.csv').touch()
    core = tmp_path / 'tree' / 'megatron' / 'core'
    core.mkdir(parents=True)
    (core / 'package_info.py').write_text("MAJOR = 0\nMINOR = 19\nPATCH = 2\nPRE_RELEASE = ''\n")


def test_every_page_has_examples_and_no_other_has():
    assert EXAMPLES.keys() == {*LEAVES}


@pytest.mark.parametrize('page', PARSERS)
def test_examples_are_in_the_help_and_parse(page, files):
    text = PARSERS[page].format_help().replace(' \\\n     ', '')
    lines = re.findall(r'^  (megatron-mhc\b.*)', text.partition('\nexamples:\n')[2], re.MULTILINE)
    assert lines == examples(page) and lines
    for line in lines:
        assert line.startswith(f'megatron-mhc {page}')
        parser = cli.build_parser(cli.COMMANDS)
        parser.parse_args(shlex.split(line.replace(' ...', ''))[1:])


def test_help_of_the_launcher_has_examples(answer):
    status, out, _ = answer('run --help')
    assert status == 0 and all(line in out.replace(' \\\n     ', '') for line in examples('run'))


@pytest.mark.parametrize('page', PARSERS)
def test_help_fits_80_columns_and_has_no_markup(page, answer, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    status, out, _ = answer(f'{page} --help')
    assert status == 0 and [line for line in out.splitlines() if len(line) > 80] == []
    assert '``' not in out
    above, _, below = out.partition('\nexamples:\n')
    assert '  megatron-mhc ' not in above and 'megatron-mhc ' in below


SHARED = (
    *(names.STREAMS, names.CHUNKS, names.MICRO_BATCH, names.KERNEL_BACKEND, names.SEGMENTS),
    *(names.SCHEDULE, names.STEP, names.TP, names.CP, names.PP, names.EP, names.FULL),
)


@pytest.mark.parametrize('words', SHARED, ids=lambda words: words[0])
def test_one_thing_has_one_word_and_takes_the_others(words):
    having = {}
    for page, parser in PARSERS.items():
        held = {name: parser._option_string_actions.get(name) for name in words}
        # --recompute is a time in ``schedule``, and an older word there as well.
        if held[words[0]] is not None or any(held[w] for w in words if w != '--recompute'):
            having[page] = held
    assert having
    for page, held in having.items():
        assert None not in held.values(), (page, held)
        assert len({action.dest for action in held.values()}) == 1, page
        assert sum(action.help is not argparse.SUPPRESS for action in held.values()) == 1
        assert f'`{words[0]}`' in PAGE


def test_an_older_word_is_the_same_value_and_leaves_the_default():
    line = ['kernels', 'report', '--num-streams', '2']
    assert cli.build_parser(cli.COMMANDS).parse_args(line).num_streams == [2]
    line = 'recipe show 3b --micro-batch 4'.split()
    assert cli.build_parser(cli.COMMANDS).parse_args(line).micro_batch == 4
    line = 'study 3b --recompute 12 auto'.split()
    assert cli.build_parser(cli.COMMANDS).parse_args(line).segments == [12, 'auto']
    plain = cli.build_parser(cli.COMMANDS).parse_args(['recompute'])
    assert (plain.num_streams, plain.segments) == (4, ['none', 'auto', 'stage'])
    assert plain.sublayers == [24, 36, 60] and plain.full == 0


SCHEDULE = '--schedule 1f1b --pp 2 --microbatches 4'
# Page -> a line of it, and keys of what it prints.
JSON = {
    'doctor': ('doctor', {'torch', 'patches', 'problem'}),
    'patch': ('patch tree', {'seams', 'ok', 'megatron_core'}),
    'schedule list': ('schedule list', {'schedules'}),
    'schedule show': (f'schedule show {SCHEDULE}', {'ranks', 'placement'}),
    'schedule validate': (f'schedule validate {SCHEDULE}', {'valid'}),
    'schedule simulate': (f'schedule simulate {SCHEDULE}', {'makespan', 'span_bubble'}),
    'schedule compare': (
        'schedule compare --pp 2 --microbatches 4',
        {'schedules', 'refused'},
    ),
    'schedule trace': ('schedule trace trace.json', {'ranks', 'ok'}),
    'recipe list': ('recipe list', {'name', 'layouts'}),
    'recipe show': ('recipe show 3b', {'memory', 'flops'}),
    'study': ('study 3b --gpus 8 --tp 1 --pp 1 --ep 8', {'points', 'best'}),
    'docs': ('docs', {'pages'}),
}
# Each has a test of its JSON beside what it works on; the launcher prints what its script does.
ELSEWHERE = {'convert', 'recompute', 'kernels report', 'kernels accuracy'}
WITHOUT = {'run', 'report'}


def strict(text: str) -> object:
    """JSON as others read it: Python's own NaN is none."""

    def refuse(word):
        raise AssertionError(f'{word} is not JSON')

    return json.loads(text, parse_constant=refuse)


def test_every_command_with_an_answer_takes_json():
    assert {*JSON, *ELSEWHERE, *WITHOUT} == {*LEAVES}
    for page in (*JSON, *ELSEWHERE):
        assert '--json' in PARSERS[page]._option_string_actions, page


@pytest.mark.parametrize('page', JSON)
def test_json_is_one_object_and_nothing_else(page, files, answer):
    line, keys = JSON[page]
    status, out, _ = answer(f'{line} --json')
    found = strict(out)
    found = found[0] if isinstance(found, list) else found
    assert status in (0, 1) and keys <= found.keys()


def test_a_page_as_json(answer):
    found = strict(answer('docs flags --json')[1])
    assert found['page'] == 'flags' and found['text'].startswith('# Flags')


def test_refusals_as_json(answer):
    assert all(row['remedy'] for row in strict(answer('doctor --refusals --json')[1]))


def test_the_table_of_exit_statuses(files, answer, monkeypatch):
    """Those of the page, each met; 143 in tests/convert, 3 where a training runs."""
    from megatron_mhc.patches.monitor import STATUS

    met = {
        answer('docs')[0]: 'done',
        answer('patch tree')[0]: 'something was found',
        answer('docs nosuch')[0]: 'wrong input',
        STATUS: 'alarm',
        128 + 15: 'SIGTERM',
    }

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr('megatron_mhc.commands.docs.main', interrupted)
    met[answer('docs')[0]] = 'interrupted'
    listed = {int(row): words for row, words in re.findall(r'^\| (\d+) \| (.*) \|$', PAGE, re.M)}
    assert listed.keys() == met.keys()
    assert all(word in listed[status] for status, word in met.items())


def test_completion_needs_a_package(answer, monkeypatch):
    monkeypatch.setitem(sys.modules, 'shtab', None)
    status, out, err = answer('--print-completion bash')
    assert (status, out) == (2, '') and err.count('\n') == 1
    assert "pip install 'megatron-mhc[completion]'" in err


@pytest.mark.parametrize('shell', cli.SHELLS)
def test_completion_is_given_every_command(answer, monkeypatch, shell):
    """shtab gets the whole parser, with files and the flags of a script."""
    seen = {}

    def complete(parser, shell):
        seen.update(below(parser), shell=shell)
        return 'a script'

    monkeypatch.setitem(
        sys.modules, 'shtab', types.SimpleNamespace(FILE={'bash': 'files'}, complete=complete)
    )
    assert answer(f'--print-completion {shell}') == (0, 'a script\n', '')
    assert seen.pop('shell') == shell and seen.keys() == PARSERS.keys()
    assert '--mhc-init' in seen['run']._option_string_actions
    plan = seen['schedule show']._option_string_actions['--plan']
    assert plan.complete == {'bash': 'files'}


@pytest.mark.parametrize('installed', [True, False])
def test_progress_is_shown_on_a_terminal_only(capsys, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, 'tqdm', None)
    for terminal in (False, True):
        monkeypatch.setattr('sys.stderr.isatty', lambda terminal=terminal: terminal, raising=False)
        with progress(2, 'kernels') as advance:
            advance(1)
            advance(1)
        out, err = capsys.readouterr()
        assert out == '' and ('kernels: ' in err) is terminal
    # The line is gone at the end.
    assert err.endswith('\r')


def test_what_is_named_in_the_page_is_there():
    assert {*re.findall(r'^\| `(\w+)` \|', PAGE, re.MULTILINE)} == cli.COMMANDS.keys()
    assert importlib.import_module(cli.COMPLETION)
