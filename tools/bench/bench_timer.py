"""Times of a call: CUDA events on a GPU; on a CPU the wall clock, to show that it works."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

GPU_SECONDS = 0.1
"""Measured time aimed at per row; the number of samples follows from it."""
MOST_COPIES = 256
COPY_BYTES = 1 << 30

Work = Callable[[], Any]


class Sample(NamedTuple):
    """Seconds of one call over all samples."""

    median: float
    low: float
    p90: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Sample:
        ranked = sorted(seconds)
        p90 = ranked[min(len(ranked) - 1, round(0.9 * (len(ranked) - 1)))]
        return cls(statistics.median(ranked), ranked[0], p90)


class CpuTimer:
    """Wall clock, three samples: shows that the bench works, not how fast anything is."""

    label = 'CPU wall clock: function only, no speed claim'
    modes = ('cpu',)

    def stream(self) -> AbstractContextManager:
        return nullcontext()

    def copies(self, bytes_per_call: int) -> int:
        return 1

    def measure(self, mode: str, calls: Sequence[Work]) -> Sample:
        calls[0]()
        seconds = []
        for index in range(3):
            start = time.perf_counter()
            calls[index % len(calls)]()
            seconds.append(time.perf_counter() - start)
        return Sample.of(seconds)

    def recover(self) -> bool:
        return True

    def copy_bandwidth(self) -> dict[str, float]:
        """Bytes read and written per second."""
        return _copy_bandwidth(self, 'cpu', 1 << 22)


class CudaTimer:
    """Device time by CUDA events, on one side stream, over inputs that lie beyond the L2 cache."""

    label = 'CUDA events'
    modes = ('graph', 'eager')

    def __init__(self, seconds: float = GPU_SECONDS):
        self.seconds = seconds
        self.side = torch.cuda.Stream()
        self.l2_bytes = l2_bytes()

    def stream(self) -> AbstractContextManager:
        # Backward runs on the stream of its forward, and a capture must see both on its own.
        return torch.cuda.stream(self.side)

    def copies(self, bytes_per_call: int) -> int:
        """Sets of inputs to go round, so that none is still in L2 when its turn comes again."""
        wanted = -(-2 * self.l2_bytes // max(1, bytes_per_call)) + 1
        return max(2, min(MOST_COPIES, wanted))

    def measure(self, mode: str, calls: Sequence[Work]) -> Sample:
        """Seconds per call; ``graph`` replays a captured round, ``eager`` pays for every launch."""
        with self.stream():
            # Twice: compiled kernels first, then whatever tunes itself at its second call.
            for call in (calls[0], calls[0], *calls[1:4]):
                call()
            torch.cuda.synchronize()
            if mode == 'eager':
                return self._samples(calls, per_sample=1)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.side):
                for call in calls:
                    call()
            sample = self._samples([graph.replay], per_sample=len(calls))
            graph.reset()
            return sample

    def _samples(self, works: Sequence[Work], per_sample: int) -> Sample:
        first = self._timed(works, 1)[0]
        count = max(5, min(200, int(self.seconds / max(first, 1e-7))))
        # The first tenth warms clocks and caches up.
        seconds = self._timed(works, count + count // 10 + 1)[-count:]
        return Sample.of([value / per_sample for value in seconds])

    def _timed(self, works: Sequence[Work], count: int) -> list[float]:
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        for index, (start, end) in enumerate(pairs):
            start.record()
            works[index % len(works)]()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def recover(self) -> bool:
        """Free what a failed contender held; False if the device no longer answers."""
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True

    def copy_bandwidth(self) -> dict[str, float]:
        """Bytes read and written per second."""
        return _copy_bandwidth(self, 'cuda', COPY_BYTES)


def l2_bytes() -> int:
    # Older torch does not tell; no data-centre GPU so far has more.
    return getattr(torch.cuda.get_device_properties(0), 'L2_cache_size', 128 << 20)


def _copy_bandwidth(timer: CpuTimer | CudaTimer, device: str, size: int) -> dict[str, float]:
    """By the copy engine's route and by a plain elementwise kernel, neither of them Triton."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    works = {
        'copy_': lambda: target.copy_(source),
        'elementwise': lambda: torch.neg(source, out=target),
    }
    mode = timer.modes[-1]
    return {name: 2 * size / timer.measure(mode, [work]).median for name, work in works.items()}


def make_timer(device: str, seconds: float = GPU_SECONDS) -> CpuTimer | CudaTimer:
    return CpuTimer() if device == 'cpu' else CudaTimer(seconds)
