"""How a run ends: which rank was first, and what a checkpoint failed for."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import types

import pytest

from megatron_mhc.runtime import failed_save, lost_peer

# Rank 1 ends in some way, and rank 0 waits for it in a collective.
SCRIPT = """
import os, signal, sys, time
import torch, torch.distributed as dist
from megatron_mhc.runtime import lost_peer
from megatron_mhc.runtime import run_end
dist.init_process_group('gloo')
run_end.watch()
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 1:
    exec(sys.argv[1])
dist.all_reduce(torch.ones(1))
"""


def two_ranks(ending: str) -> tuple[str, str]:
    """What ranks 0 and 1 write to stderr."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    common = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'WORLD_SIZE': '2'}
    common |= {'LOCAL_WORLD_SIZE': '2', 'OMP_NUM_THREADS': '1'}
    ranks = [
        subprocess.Popen(
            [sys.executable, '-c', SCRIPT, ending],
            env={**os.environ, **common, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = tuple(process.communicate(timeout=100)[1] for process in ranks)
    assert all(process.returncode for process in ranks)
    return errors


def test_a_rank_that_raised_is_named_with_its_reason():
    survivor, first = two_ranks("raise ValueError('no such expert')")
    assert survivor.splitlines()[-1] == (
        '[rank0]: [megatron-mhc] rank 1 ended first: ValueError: no such expert'
    )
    assert 'megatron-mhc' not in first and 'ValueError: no such expert' in first


def test_a_rank_that_was_killed_is_named():
    survivor, _ = two_ranks('os.kill(os.getpid(), signal.SIGKILL)')
    last = survivor.splitlines()[-1]
    assert last.startswith('[rank0]: [megatron-mhc] rank 1 ended first: process ')
    assert f'on {socket.gethostname()} is gone without a word' in last


def test_a_rank_without_last_words_keeps_nobody_waiting():
    """It lives on, but its sockets are closed: the search ends, and says who was silent."""
    ending = 'dist.destroy_process_group(); time.sleep(12); sys.exit(3)'
    survivor, _ = two_ranks(ending)
    assert 'no rank has said within 5 s why it ended (ranks that have said nothing: 1)' in survivor


@pytest.mark.parametrize('message', [*lost_peer.LOST])
def test_lost_connections_are_told_from_own_faults(message):
    assert lost_peer.is_lost_connection(RuntimeError(f'[x] {message}: y'))
    assert not lost_peer.is_lost_connection(RuntimeError('shape mismatch'))
    outer = RuntimeError('that rank failed or is stuck')
    outer.__cause__ = RuntimeError(message)
    assert lost_peer.is_lost_connection(outer)


@pytest.fixture
def run(monkeypatch, tmp_path):
    args = types.SimpleNamespace(save=str(tmp_path))
    monkeypatch.setattr(failed_save, 'parsed_arguments', lambda: args)
    return tmp_path


class WriteFailures(BaseException):
    """As torch has it: not an Exception, with the failures of ranks."""

    def __init__(self, failures):
        super().__init__(f'CheckpointException ranks:{failures.keys()}')
        self.failures = failures


def full() -> OSError:
    return OSError(errno.ENOSPC, 'No space left on device')


def explained(error: BaseException) -> str | None:
    """``error`` raised where Megatron saves."""

    def save_checkpoint(iteration):
        raise error

    try:
        save_checkpoint(6)
    except BaseException as caught:
        return failed_save.explain(caught, caught.__traceback__)


def test_a_full_disk_is_one_line_with_what_is_whole(run):
    line = explained(full())
    assert line.startswith(f'--save {run}: the checkpoint of iteration 6 could not be written (')
    assert 'No space left on device' in line and 'GiB are free there' in line
    assert 'no checkpoint there is whole' in line and '\n' not in line
    (run / 'iter_0000003').mkdir()
    (run / 'iter_0000006').mkdir()
    (run / 'latest_checkpointed_iteration.txt').write_text('3')
    assert f'iter_0000003 is whole and --load {run} goes on from it' in explained(full())


def test_a_tracker_that_was_cut_short_names_nothing(run):
    (run / 'latest_checkpointed_iteration.txt').write_text('')
    assert 'latest_checkpointed_iteration.txt was cut short too' in explained(full())


def test_failures_of_writers_are_named_by_rank(run):
    line = explained(WriteFailures({1: (RuntimeError('Worker failure: disk'), None)}))
    assert '(rank 1: RuntimeError: Worker failure: disk)' in line
    assert 'inline_container' in explained(RuntimeError('[enforce fail at inline_container.cc:6]'))


def test_other_errors_keep_their_traceback(run):
    assert explained(KeyError('optimizer')) is None
    assert explained(RuntimeError('Invalid sharding pattern')) is None
    try:
        raise full()
    except OSError as elsewhere:
        assert failed_save.explain(elsewhere, elsewhere.__traceback__) is None
