"""The tools behind ``make train``: corpus, supervision of the ranks, checkpoints, plot."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
sys.path.insert(0, str(TOOLS))

import plot_losses  # noqa: E402
import prepare_corpus  # noqa: E402
import supervise  # noqa: E402


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / 'source'
    (folder / 'deep').mkdir(parents=True)
    for i in range(60):
        name = f'deep/{i}.py' if i % 2 else f'{i}.py'
        (folder / name).write_text(f'value_{i} = "é" * {i}\n' * (i + 1))
    (folder / 'latin.py').write_bytes(b'\xe9\xff')
    (folder / 'copy.py').write_bytes((folder / '0.py').read_bytes())
    (folder / 'empty.py').touch()
    return folder


def test_corpus_holds_out_whole_files_and_round_trips(source, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    manifest = prepare_corpus.prepare(tmp_path / 'corpus', source)
    files = manifest['files']
    names = [name for split in files.values() for name in split]
    assert len(names) == len(set(names)) == 60
    assert not {'latin.py', 'empty.py'}.intersection(names)
    assert len({'copy.py', '0.py'}.intersection(names)) == 1
    for split in prepare_corpus.SPLITS:
        assert files[split]
        dataset = IndexedDataset(str(tmp_path / 'corpus' / split))
        assert len(dataset) == len(dataset.document_indices) - 1 == len(files[split])
        for name, tokens in zip(files[split], dataset, strict=True):
            assert tokens[-1] == prepare_corpus.EOD
            assert bytes(tokens[:-1].tolist()) == (source / name).read_bytes()
    held_out = manifest['tokens']['valid'] / sum(manifest['tokens'].values())
    assert 0.04 < held_out < 0.15


def test_corpus_is_deterministic_and_made_once(source, tmp_path, capsys):
    one, two = tmp_path / 'one', tmp_path / 'two'
    assert prepare_corpus.prepare(one, source) == prepare_corpus.prepare(two, source)
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (one, two)]
    assert contents[0] == contents[1]
    before = (one / 'train.bin').stat().st_mtime_ns
    prepare_corpus.prepare(one, source)
    assert (one / 'train.bin').stat().st_mtime_ns == before
    assert 'up to date' in capsys.readouterr().out


def test_corpus_follows_its_source(source, tmp_path):
    corpus = tmp_path / 'corpus'
    prepare_corpus.prepare(corpus, source)
    (corpus / 'cache').mkdir()  # Megatron's index of the old files
    (source / 'new.py').write_text('new = 1\n')
    prepare_corpus.prepare(corpus, source)
    assert not (corpus / 'cache').exists()
    assert {p.suffix for p in corpus.iterdir()} == {'.bin', '.idx', '.json'}
    # Without the manifest, which is written last, nothing counts as complete.
    (corpus / 'manifest.json').unlink()
    (corpus / 'test.idx').unlink()
    prepare_corpus.prepare(corpus, source)
    assert (corpus / 'test.idx').exists()


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['--source', '/nowhere'], '--source /nowhere: no such folder'),
        (['--source', '.', '--glob', '*.none'], 'at least 20 are needed'),
        (['--source', '.', '--max-bytes', '10'], '--max-bytes 10'),
    ],
)
def test_corpus_errors_name_the_flag(source, tmp_path, arguments, said):
    command = [sys.executable, TOOLS / 'prepare_corpus.py', '--output', tmp_path / 'c', *arguments]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 2 and said in result.stderr
    assert 'Traceback' not in result.stderr


def test_corpus_is_not_mixed_with_other_files(source, tmp_path):
    with pytest.raises(ValueError, match='holds other files'):
        prepare_corpus.prepare(tmp_path, source)


# Stands for torchrun with one rank: the parent waits for a child that prints iteration lines.
RANKS = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, '-uc', sys.argv[1]]).returncode)
"""
RANK = """
import os, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print('pid', os.getpid())
for i in range(1, 1000):
    print(f' [t] iteration {i:8}/    1000 | elapsed time per iteration (ms): 20.0 |'
          ' number of nan iterations:   0 | noise')
    time.sleep(0.02)
    if stop:
        print('  successfully saved checkpoint from iteration', i)
        sys.exit(0)
"""


def command(rank: str) -> list[str]:
    return [sys.executable, '-c', RANKS, rank]


def alive(log: Path) -> bool:
    """Whether the rank that wrote its process number to ``log`` still runs."""
    pid = int(log.read_text().split('pid ')[1].split()[0])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'


def interrupt(log: Path, number: int, times: int = 1) -> threading.Thread:
    def send():
        while not log.exists() or 'iteration' not in log.read_text():
            time.sleep(0.05)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_ranks_save(tmp_path, number, capsys):
    log = tmp_path / 'log'
    thread = interrupt(log, number)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        supervise.run(command(RANK), dict(os.environ), log, 'x')
    thread.join()
    assert 'successfully saved' in log.read_text() and not alive(log)
    assert signal.getsignal(number) is before
    shown = capsys.readouterr().out
    assert 'iteration        1/    1000' in shown and 'noise' not in shown


def test_a_second_signal_ends_ranks_that_do_not_leave(tmp_path):
    log = tmp_path / 'log'
    thread = interrupt(log, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        supervise.run(command(RANK.replace('if stop:', 'if 0:')), dict(os.environ), log, 'x')
    thread.join()
    assert not alive(log)


def test_a_failure_shows_the_end_of_the_log(tmp_path):
    with pytest.raises(RuntimeError, match=r'(?s)last words.*exit status 3'):
        rank = 'import sys; print("last words"); sys.exit(3)'
        supervise.run(command(rank), dict(os.environ), tmp_path / 'log', 'x')


def test_no_half_checkpoint_is_left(tmp_path):
    assert supervise.latest_checkpoint(tmp_path) is None
    for iteration in (5, 10):
        (tmp_path / f'iter_{iteration:07}').mkdir()
    for name in ('.metadata', 'metadata.json'):
        (tmp_path / 'iter_0000005' / name).touch()
    (tmp_path / 'latest_checkpointed_iteration.txt').write_text('5')
    assert supervise.latest_checkpoint(tmp_path) == 5
    assert not (tmp_path / 'iter_0000010').exists()
    (tmp_path / 'iter_0000005' / '.metadata').unlink()
    with pytest.raises(RuntimeError, match='--fresh'):
        supervise.latest_checkpoint(tmp_path)


def test_losses_are_read_back_and_plotted(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / 'events') as writer:
        for step in range(1, 5):
            writer.add_scalar('lm loss', 5 - step, step, walltime=step)
        writer.add_scalar('lm loss validation', 9.0, 4, walltime=10)
        writer.add_scalar('lm loss validation', 3.0, 4, walltime=11)
    # A resumed run replaces what it does again, wherever its file comes in the folder.
    with SummaryWriter(tmp_path / 'events', filename_suffix='.resumed') as writer:
        writer.add_scalar('lm loss', 1.5, 3, walltime=20)
    losses = plot_losses.read_losses(tmp_path / 'events')
    assert losses == {'lm loss': {1: 4, 2: 3, 3: 1.5, 4: 1}, 'lm loss validation': {4: 3}}
    plot_losses.plot({'mhc': [losses]}, tmp_path / 'x.png', 'title')
    assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')
    (tmp_path / 'none').mkdir()
    with pytest.raises(ValueError, match='no TensorBoard events'):
        plot_losses.read_losses(tmp_path / 'none')
