"""Run torchrun with a progress bar, a log file, and an orderly stop on Ctrl-C and SIGTERM."""

import collections
import ctypes
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
from tqdm import tqdm

ITERATION = re.compile(r'\[[^]]+\] iteration +(\d+)/ *(\d+) \|.*?number of nan iterations: +\d+ \|')
MILLISECONDS = re.compile(r'elapsed time per iteration \(ms\): ([\d.]+)')
# Everything is in the log file; these parts of it are worth a newcomer's screen. Ranks write at the
# same time, so other text may stand before them on a line.
SHOWN = re.compile(
    r'validation loss at.*|\[[^]]+\] (saving|successfully saved) checkpoint.*'
    r'|success\w+ loaded checkpoint.*|\[megatron.mhc\].*'
)
GRACE = 120  # seconds for the iteration, the evaluation and the checkpoint under way at a stop
MARK = 'SUPERVISED_RUN'  # variable by which what a dead rank has left behind is still found


def follow_parent_to_death():
    """A function for a new child: on Linux the kernel then sends it SIGTERM when we are killed."""
    if not sys.platform.startswith('linux'):
        return None
    set_option, parent_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: set_option(parent_death_signal, signal.SIGTERM)


class Ranks:
    """torchrun and the ranks below it, in a session of their own, out of the terminal's reach."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.stopped_at = None
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            command,
            env=env | {MARK: self._mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            start_new_session=True,
            preexec_fn=follow_parent_to_death(),
        )
        self.lines = self._process.stdout
        threading.Thread(target=self._end_with_torchrun, daemon=True).start()

    def stop(self, *_signal) -> None:
        """Ask each rank to save and leave; a second call, or one after ``GRACE``, ends them all.

        The ranks are asked one by one. torchrun would signal their whole process groups, and with
        them the helper through which Megatron writes checkpoints.
        """
        if self.stopped_at is not None:
            return self.kill()
        self.stopped_at = time.monotonic()
        tqdm.write('Stopping: the iteration under way is finished and saved (again: stop at once).')
        signal.signal(signal.SIGALRM, self.kill)
        signal.alarm(GRACE)
        ranks = self._children(recursive=False)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        # Nothing has begun yet, so there is nothing to save.
        return None if ranks else self.kill()

    def kill(self, *_signal) -> None:
        """End torchrun and everything below it; no rank outlives this call."""
        family = self._children(recursive=True)
        self._process.kill()
        for process in (*family, *self._marked()):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass

    def _end_with_torchrun(self) -> None:
        """A helper of a rank that was killed lives on, and would keep our end of the pipe open."""
        self._process.wait()
        self.kill()

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
            except psutil.Error:
                # Another user's, or gone.
                continue
        return found

    def wait(self) -> int:
        try:
            return self._process.wait()
        finally:
            signal.alarm(0)

    def _children(self, recursive: bool) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=recursive)
        except psutil.NoSuchProcess:
            return []


class Watch(threading.Thread):
    """Ends ``ranks`` when they have said nothing for ``silence`` seconds; None waits for ever."""

    def __init__(self, ranks: Ranks, silence: float | None):
        super().__init__(daemon=True)
        self.hung = False
        self._ranks, self._silence = ranks, silence
        self._last, self._ended = time.monotonic(), threading.Event()
        if silence is not None:
            self.start()

    def heard(self) -> None:
        self._last = time.monotonic()

    def end(self) -> None:
        self._ended.set()

    def run(self) -> None:
        while not self._ended.wait(1):
            if time.monotonic() - self._last > self._silence:
                self.hung = True
                return self._ranks.kill()


def run(
    command: list[str], env: dict[str, str], log: Path, label: str, silence: float | None = None
) -> None:
    """Run ``command`` to its end, showing Megatron's own lines.

    Args:
        silence: seconds without a line after which all ranks are ended, since they hang.

    Raises:
        KeyboardInterrupt: stopped by a signal, after the ranks have left.
        TimeoutError: nothing was said for ``silence`` seconds.
        RuntimeError: a rank failed; the message holds the end of the log.
    """
    ranks = Ranks(command, env)
    watch = Watch(ranks, silence)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    last, launcher_speaks = collections.deque(maxlen=30), False
    previous = {number: signal.signal(number, ranks.stop) for number in signals}
    try:
        with log.open('a') as file, tqdm(desc=label, unit='it', disable=None) as bar:
            for line in ranks.lines:
                watch.heard()
                file.write(line)
                file.flush()
                show(line, bar)
                # What torchrun adds about failed ranks only hides what they said themselves.
                launcher_speaks = launcher_speaks or 'torch/distributed/elastic' in line
                if not launcher_speaks:
                    last.append(line)
        status = ranks.wait()
    finally:
        watch.end()
        ranks.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if ranks.stopped_at is not None:
        raise KeyboardInterrupt
    if watch.hung:
        raise TimeoutError(f'nothing was said for {silence:g} s; all output: {log}')
    if status:
        raise RuntimeError(
            f'{"".join(last)}\ntraining failed (exit status {status}); all output: {log}'
        )


def show(line: str, bar: tqdm) -> None:
    """Pass on the lines of ``SHOWN`` and Megatron's iteration line, and move the bar by it."""
    match = ITERATION.search(line)
    if match is None:
        if found := SHOWN.search(line):
            tqdm.write(found[0].rstrip(), file=sys.stdout)
        return
    done, total = int(match[1]), int(match[2])
    text = match[0]
    if bar.disable:
        seconds = (total - done) * float(MILLISECONDS.search(text)[1]) / 1000
        text += f' {100 * done // total} %, about {seconds:.0f} s left'
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
    if bar.total is None:
        # A resumed run starts where its checkpoint was, and its speed is that of this run.
        bar.reset(total)
        bar.initial = bar.n = max(0, done - 1)
    bar.update(done - bar.n)


def latest_checkpoint(folder: Path) -> int | None:
    """Iteration of the newest whole checkpoint; parts of one that was never finished are removed.

    Raises:
        RuntimeError: the tracker file names a checkpoint that is not whole.
    """
    tracker = folder / 'latest_checkpointed_iteration.txt'
    latest = int(tracker.read_text()) if tracker.exists() else None
    for path in folder.glob('iter_*'):
        # torch writes .metadata when every rank's part is there, Megatron metadata.json.
        whole = all((path / name).exists() for name in ('.metadata', 'metadata.json'))
        if whole:
            continue
        if int(path.name.removeprefix('iter_')) == latest:
            raise RuntimeError(f'{path} is named in {tracker} but not whole: use --fresh')
        shutil.rmtree(path)
    return latest
