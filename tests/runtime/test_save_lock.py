"""Who saves into a folder: seen by process on one machine, by heartbeat from another."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from megatron_mhc.runtime import save_lock
from megatron_mhc.runtime.process_identity import is_gone, this_process

HOLD = (
    'import sys, time\n'
    'from megatron_mhc.runtime import save_lock\n'
    'try:\n'
    '    save_lock.hold(sys.argv[1])\n'
    'except ValueError as error:\n'
    '    sys.exit(str(error))\n'
    'print("held", flush=True)\n'
    'time.sleep(float(sys.argv[2]))\n'
)


def start(folder, seconds):
    return subprocess.Popen(
        [sys.executable, '-c', HOLD, str(folder), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / save_lock.NAME
    yield path
    save_lock.release(path)


@pytest.fixture
def elsewhere(monkeypatch, lock):
    """Writes the lock of a process on another machine, of which only its heartbeat is seen."""
    monkeypatch.setattr(save_lock, 'PATIENCE', 0.4)

    def write():
        other = dataclasses.replace(this_process(), host='node7', machine='another boot')
        entry = {'process': dataclasses.asdict(other), 'since': 'Monday', 'token': 'theirs'}
        lock.write_text(json.dumps(entry))

    return write


def test_a_second_run_is_refused_and_told_who_holds_it(tmp_path, lock):
    first = start(tmp_path, 60)
    assert first.stdout.readline() == 'held\n'
    second = start(tmp_path, 0)
    _, error = second.communicate(timeout=30)
    assert second.returncode == 1 and len(error.splitlines()) == 1
    assert f'--save {tmp_path}: another run saves there, process {first.pid} on ' in error
    first.kill()
    # A zombie, not yet reaped, has its number still, and saves nothing any more.
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    save_lock.hold(str(tmp_path))
    assert json.loads(lock.read_text())['process']['pid'] == os.getpid()
    first.communicate()


def test_a_run_that_ends_leaves_nothing(tmp_path):
    run = start(tmp_path / 'new', 0)
    assert run.communicate(timeout=30)[0] == 'held\n' and run.returncode == 0
    assert list((tmp_path / 'new').iterdir()) == []
    save_lock.hold(str(tmp_path / 'new'))
    # The same process may start training again.
    save_lock.hold(str(tmp_path / 'new'))
    save_lock.release(tmp_path / 'new' / save_lock.NAME)


def test_a_number_that_was_given_again_is_another_process(tmp_path, lock):
    mine = this_process()
    assert is_gone(mine) is False
    older = dataclasses.replace(mine, started='1')
    assert is_gone(older) is True and is_gone(dataclasses.replace(mine, machine='x')) is None
    lock.write_text(json.dumps({'process': dataclasses.asdict(older), 'since': 'x', 'token': 'y'}))
    save_lock.hold(str(tmp_path))
    assert json.loads(lock.read_text())['token'] != 'y'


def test_a_run_on_another_machine_is_known_by_its_heartbeat(tmp_path, lock, elsewhere):
    elsewhere()
    ended = threading.Event()

    def beat():
        while not ended.wait(0.02):
            os.utime(lock)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(ValueError, match='^--own .* on node7 since Monday, and two would'):
            save_lock.hold(str(tmp_path), '--own')
    finally:
        ended.set()
        beating.join()
    # Killed: no heartbeat, and no manual step.
    save_lock.hold(str(tmp_path))
    assert 'theirs' not in lock.read_text()
    assert [file.name for file in tmp_path.iterdir()] == [save_lock.NAME]


def test_a_lock_that_goes_while_it_is_looked_at_was_of_a_run_that_ended(tmp_path, lock, elsewhere):
    elsewhere()
    threading.Timer(0.15, lock.unlink).start()
    save_lock.hold(str(tmp_path))
    assert 'theirs' not in lock.read_text()


def test_the_holder_beats_and_says_when_it_has_lost_the_folder(
    tmp_path, lock, monkeypatch, capsys, elsewhere
):
    monkeypatch.setattr(save_lock, 'BEAT', 0.02)
    save_lock.hold(str(tmp_path))
    before = lock.stat().st_mtime_ns
    wait_until(lambda: lock.stat().st_mtime_ns > before)
    elsewhere()
    seen = []
    wait_until(lambda: seen.append(capsys.readouterr().err) or 'taken over by' in ''.join(seen))
    save_lock.release(lock)
    # It is not this run's to take away.
    assert 'theirs' in lock.read_text()


def test_a_file_system_without_links(tmp_path, lock, monkeypatch):
    def refuse(*args):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', refuse)
    save_lock.hold(str(tmp_path))
    assert start(tmp_path, 0).communicate(timeout=30)[1].startswith(f'--save {tmp_path}: another')


@pytest.mark.parametrize('text', ['', '{"process": ', '{}', '[1]', '{"process": {"pid": 1}}'])
def test_a_lock_cut_short_has_no_holder_that_could_live(tmp_path, lock, elsewhere, text):
    lock.write_text(text)
    save_lock.hold(str(tmp_path))
    assert json.loads(lock.read_text())['process']['pid'] == os.getpid()


def test_a_folder_that_cannot_be_written_to_is_said_at_start(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match=r'--save .*/file: cannot be written to \('):
        save_lock.hold(str(tmp_path / 'file'))
    with pytest.raises(ValueError, match='--non-persistent-global-ckpt-dir .*/file: cannot be'):
        save_lock.hold(str(tmp_path / 'file'), '--non-persistent-global-ckpt-dir')


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
