"""``megatron-mhc docs``: every guide is listed and printed, without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mhc.cli import GUIDES, main
from megatron_mhc.commands import docs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(capsys):
    """``run(words)``: exit status, stdout and stderr of ``megatron-mhc docs words``."""

    def docs_of(words: str):
        with pytest.raises(SystemExit) as ended:
            main(['docs', *words.split()])
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return docs_of


def test_every_page_is_listed_on_a_line(run):
    status, out, err = run('')
    assert (status, err) == (0, '')
    listed = [line.split(maxsplit=1)[0] for line in out.splitlines()]
    assert sorted(listed) == sorted(path.stem for path in docs.FOLDER.glob('*.md'))
    assert all(len(line.split()) > 1 for line in out.splitlines())


@pytest.mark.parametrize('page', docs.PAGES)
def test_a_page_is_printed_as_it_is(run, page):
    text = (ROOT / 'megatron_mhc' / 'docs' / f'{page}.md').read_text()
    assert text.startswith('# ')
    assert run(page) == (0, text, '')


@pytest.mark.parametrize('name', GUIDES)
def test_help_of_a_command_names_its_guide(name, capsys):
    with pytest.raises(SystemExit):
        main([name, '--help'])
    *_, last = capsys.readouterr().out.strip().splitlines()
    assert last == f'guide: megatron-mhc docs {GUIDES[name]}'
    assert GUIDES[name] in docs.PAGES


def test_a_terminal_gets_a_pager(run, monkeypatch):
    shown = []
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    monkeypatch.setattr('pydoc.pager', shown.append)
    status, out, _ = run('flags')
    assert status == 0 and out == '' and shown[0].startswith('# Flags')


def test_an_unknown_page_is_refused(run):
    status, out, err = run('flag')
    assert status == 2 and not out and err.count('\n') == 1
    assert err.startswith("megatron-mhc docs: error: argument PAGE: invalid choice: 'flag'")
    assert 'troubleshooting' in err


def test_a_page_that_is_lost_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setattr(docs, 'FOLDER', tmp_path)
    status, out, err = run('flags')
    assert status == 2 and not out and err.count('\n') == 1
    assert 'flags.md: No such file or directory; install the package again' in err


def test_torch_is_not_imported(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['megatron-mhc', 'docs', 'flags']; "
        'from megatron_mhc.cli import main; main()'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        env={'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('# Flags')
