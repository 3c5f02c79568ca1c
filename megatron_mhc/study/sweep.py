"""The layouts that a study looks at, and why others do not exist."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from megatron_mhc.schedules.catalog import SCHEDULES, obstacle
from megatron_mhc.settings.names import STUDIED_SCHEDULES
from megatron_mhc.sizing.divides import Checks, model_checks
from megatron_mhc.sizing.memory import Layout
from megatron_mhc.sizing.shape import ModelShape

LARGEST = 500_000


class Reason(NamedTuple):
    """Why a layout does not exist.

    Args:
        check: number of the check; the higher, the closer to a layout that exists.
        words: without the layout's numbers, so that it can be counted.
        remedy: what to change.
    """

    check: int
    words: str
    remedy: str


class Sizes(TypedDict):
    """What ``Layout`` takes."""

    gpus: int
    tp: int
    pp: int
    ep: int
    cp: int
    micro_batch: int
    schedule: str
    vpp: int


@dataclass(frozen=True)
class Sweep:
    """Values to combine; each tuple has at least one.

    Args:
        gpus: ranks in all.
        tp, pp, ep: ranks that share tensors, stages, experts.
        cp: ranks that share a sequence.
        dp: data-parallel ranks that are looked at; empty for whatever follows.
        schedule: of the pipeline, where there is one.
        vpp: chunks a rank, of ``interleaved``.
        micro_batch: sequences of a microbatch.
        streams: n.
        recompute: ``none``, ``auto``, ``stage``, L_r sublayers or ``full``.
        precision: of ``PRECISIONS``.
        grows: the batch grows with the GPUs, so that a rank has as much to do (weak scaling).

    Raises:
        ValueError: more combinations than anyone waits for.
    """

    gpus: tuple[int, ...]
    tp: tuple[int, ...]
    pp: tuple[int, ...]
    ep: tuple[int, ...]
    dp: tuple[int, ...] = ()
    schedule: tuple[str, ...] = STUDIED_SCHEDULES
    vpp: tuple[int, ...] = (2,)
    micro_batch: tuple[int, ...] = (1,)
    streams: tuple[int, ...] = (4,)
    recompute: tuple[int | str, ...] = ('auto',)
    grows: bool = False
    cp: tuple[int, ...] = (1,)
    precision: tuple[str, ...] = ('bf16',)

    def __post_init__(self) -> None:
        found = sum(1 for _ in itertools.islice(self.combinations(), LARGEST + 1))
        kinds = len(self.streams) * len(self.recompute) * len(self.precision)
        if found * kinds > LARGEST:
            raise ValueError(
                f'more than {LARGEST} combinations; give fewer values of --gpus, --tp, --cp, '
                '--pp, --ep, --schedule, --vpp, --micro-batch-size, --num-residual-streams, '
                '--segments or --precision'
            )

    def batch(self, sequences: int, gpus: int) -> int:
        """Sequences of a step on so many GPUs; ``sequences`` are those on the fewest."""
        return round(sequences * gpus / min(self.gpus)) if self.grows else sequences

    def combinations(self) -> Iterator[Sizes]:
        """What ``Layout`` takes; without a pipeline there is no schedule to choose."""
        ranks = self.gpus, self.tp, self.cp, self.pp, self.ep
        for gpus, tp, cp, pp, ep, micro_batch in itertools.product(*ranks, self.micro_batch):
            for schedule in self.schedule if pp > 1 else ('1f1b',):
                for vpp in self.vpp if schedule == 'interleaved' else (2,):
                    yield Sizes(
                        gpus=gpus,
                        tp=tp,
                        pp=pp,
                        ep=ep,
                        cp=cp,
                        micro_batch=micro_batch,
                        schedule=schedule,
                        vpp=vpp,
                    )


def legal_layouts(
    sweep: Sweep, shape: ModelShape, sequences: int
) -> tuple[list[Layout], Counter[Reason]]:
    """All layouts that exist, and how many do not for which first reason.

    Raises:
        ValueError: none exists; says why those that come closest do not, and what to change.
    """
    layouts: list[Layout] = []
    refused: Counter[Reason] = Counter()
    for sizes in sweep.combinations():
        batch = sweep.batch(sequences, sizes['gpus'])
        reason = impossible(shape, batch, sizes, sweep.dp)
        if reason is None:
            layouts.append(Layout(**sizes))
        else:
            refused[reason] += 1
    if not layouts:
        closest = max(refused, key=lambda reason: (reason.check, refused[reason]))
        raise ValueError(f'no layout exists: {closest.words}; {closest.remedy}')
    return layouts, refused


def impossible(
    shape: ModelShape, sequences: int, sizes: Sizes, dp: tuple[int, ...] = ()
) -> Reason | None:
    """The first reason why a layout cannot be; None where it can.

    Args:
        shape: the model.
        sequences: of a step.
        sizes: what ``Layout`` takes.
        dp: data-parallel ranks that are asked for; empty for any.
    """
    ranks = sizes['tp'], sizes['cp'], sizes['ep']
    of_model = model_checks(shape, *ranks, _stages(sizes))
    checks = itertools.chain(of_model, _of_ranks(sequences, sizes, dp))
    for number, (wrong, words, remedy) in enumerate(checks):
        if wrong:
            return Reason(number, words, remedy)
    return None


def _of_ranks(sequences: int, sizes: Sizes, dp: tuple[int, ...]) -> Checks:
    gpus, schedule, pp = sizes['gpus'], sizes['schedule'], sizes['pp']
    model, cp = sizes['tp'] * pp, sizes['cp']
    shared, more = ('tp x cp x pp', ', --cp') if cp > 1 else ('tp x pp', '')
    words = f'the GPUs are no multiple of {shared}'
    yield gpus % (model * cp) > 0, words, f'change --gpus {gpus}, --tp{more} or --pp'
    words = 'the GPUs are no multiple of tp x pp x ep'
    yield gpus % (model * sizes['ep']) > 0, words, f'change --gpus {gpus} or --ep'
    replicas = gpus // (model * cp)
    yield (
        bool(dp) and replicas not in dp,
        f'dp = GPUs / ({shared}) is not one that is asked for',
        f'change --dp or --gpus {gpus}',
    )
    together = replicas * sizes['micro_batch']
    yield (
        sequences % together > 0,
        'the batch is no multiple of dp x the microbatch',
        f'change --global-batch-size {sequences}, --micro-batch-size or --gpus {gpus}',
    )
    need = 'a multiple of pp' if schedule == 'interleaved' else 'at least 2 x pp'
    yield (
        pp > 1 and obstacle(schedule, pp, sequences // together, chunks=sizes['vpp']) is not None,
        f'{schedule} needs {need} microbatches',
        'choose a smaller --pp or --micro-batch-size, a larger --global-batch-size, or --schedule '
        '1f1b or zb-v',
    )


def _stages(sizes: Sizes) -> int:
    pp = sizes['pp']
    return pp * (SCHEDULES[sizes['schedule']].chunks or sizes['vpp']) if pp > 1 else 1
