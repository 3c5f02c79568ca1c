"""The layouts that a study looks at, and why others do not exist."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mhc.model_memory import Layout
from megatron_mhc.model_shape import GroupedAttention, ModelShape
from megatron_mhc.pipeline_config import PIPELINE_SCHEDULES
from megatron_mhc.schedules.catalog import obstacle

LARGEST = 500_000
# A reason that is counted, and what to change.
Reason = tuple[str, str]


@dataclass(frozen=True)
class Sweep:
    """Values to combine; each tuple has at least one.

    Args:
        gpus: ranks in all.
        tp, pp, ep: ranks that share tensors, stages, experts.
        dp: data-parallel ranks that are looked at; empty for whatever follows.
        schedule: of the pipeline, where there is one.
        vpp: chunks a rank, of ``interleaved``.
        micro_batch: sequences of a microbatch.
        streams: n.
        recompute: ``none``, ``auto``, ``stage`` or L_r sublayers.

    Raises:
        ValueError: more combinations than anyone waits for.
    """

    gpus: tuple[int, ...]
    tp: tuple[int, ...]
    pp: tuple[int, ...]
    ep: tuple[int, ...]
    dp: tuple[int, ...] = ()
    schedule: tuple[str, ...] = PIPELINE_SCHEDULES
    vpp: tuple[int, ...] = (2,)
    micro_batch: tuple[int, ...] = (1,)
    streams: tuple[int, ...] = (4,)
    recompute: tuple[int | str, ...] = ('auto',)

    def __post_init__(self) -> None:
        found = sum(1 for _ in itertools.islice(self.combinations(), LARGEST + 1))
        if found * len(self.streams) * len(self.recompute) > LARGEST:
            raise ValueError(
                f'more than {LARGEST} combinations; give fewer values of --tp, --pp, --ep, '
                '--micro-batch-size, --num-residual-streams or --recompute'
            )

    def combinations(self) -> Iterator[dict[str, int | str]]:
        """What ``Layout`` takes; without a pipeline there is no schedule to choose."""
        sizes = itertools.product(self.gpus, self.tp, self.pp, self.ep, self.micro_batch)
        for gpus, tp, pp, ep, micro_batch in sizes:
            same = {'gpus': gpus, 'tp': tp, 'pp': pp, 'ep': ep, 'micro_batch': micro_batch}
            for schedule in self.schedule if pp > 1 else ('1f1b',):
                for vpp in self.vpp if schedule == 'interleaved' else (2,):
                    yield same | {'schedule': schedule, 'vpp': vpp}


def legal_layouts(
    sweep: Sweep, shape: ModelShape, sequences: int
) -> tuple[list[Layout], Counter[Reason]]:
    """All layouts that exist, and how many do not for which first reason.

    Raises:
        ValueError: none exists; says why the most do not and what to change.
    """
    layouts, refused = [], Counter()
    for sizes in sweep.combinations():
        reason = impossible(shape, sequences, sizes, sweep.dp)
        if reason is None:
            layouts.append(Layout(**sizes))
        else:
            refused[reason] += 1
    if not layouts:
        (reason, remedy), count = refused.most_common(1)[0]
        raise ValueError(
            f'none of the {refused.total()} layouts exists; {count} of them: {reason}; {remedy}'
        )
    return layouts, refused


def impossible(
    shape: ModelShape, sequences: int, sizes: dict, dp: tuple[int, ...] = ()
) -> Reason | None:
    """Why a layout cannot be: in words that do not name its numbers, so that they can be counted.

    Args:
        shape: the model.
        sequences: of a step.
        sizes: what ``Layout`` takes.
        dp: data-parallel ranks that are asked for; empty for any.
    """
    tp, pp, ep, gpus = (sizes[name] for name in ('tp', 'pp', 'ep', 'gpus'))
    attention, experts = shape.attention, shape.experts
    grouped = isinstance(attention, GroupedAttention)
    if gpus % (tp * pp):
        return 'the GPUs are no multiple of tp x pp', f'change --gpus {gpus}, --tp or --pp'
    if gpus % (tp * pp * ep):
        return 'the GPUs are no multiple of tp x pp x ep', f'change --gpus {gpus} or --ep'
    replicas = gpus // (tp * pp)
    if dp and replicas not in dp:
        return 'dp = GPUs / (tp x pp) is not asked for', 'change --dp, or leave it out'
    if attention.heads % tp or (grouped and attention.groups % tp):
        return (
            'the attention heads do not divide by tp',
            f'choose a --tp that divides {attention.groups if grouped else attention.heads}',
        )
    divided = [shape.vocab, shape.sequence, shape.ffn, shape.hidden]
    if experts:
        divided += [experts.ffn, experts.shared_ffn]
    if any(size % tp for size in divided):
        return 'vocabulary, sequence or widths do not divide by tp', 'choose a smaller --tp'
    if ep > 1 and experts is None:
        return 'the model has no experts', 'choose --ep 1'
    if ep > 1 and experts.count % ep:
        return 'the experts do not divide by ep', f'choose an --ep that divides {experts.count}'
    if sequences % (replicas * sizes['micro_batch']):
        return (
            'the batch is no multiple of dp x the microbatch',
            f'change --global-batch-size {sequences}, --micro-batch-size, or --gpus {gpus}',
        )
    schedule, chunks = sizes['schedule'], sizes['vpp'] if pp > 1 else 1
    if pp > 1 and shape.layers < pp * _chunks(schedule, chunks):
        return (
            'fewer layers than stages',
            f'choose a --pp (with --vpp) of at most {shape.layers} stages; a V has 2 a rank',
        )
    microbatches = sequences // (replicas * sizes['micro_batch'])
    if pp > 1 and obstacle(schedule, pp, microbatches, chunks=chunks) is not None:
        need = 'a multiple of pp' if schedule == 'interleaved' else 'at least 2 x pp'
        return (
            f'{schedule} needs {need} microbatches',
            'choose a smaller --pp or --micro-batch-size, a larger --global-batch-size, or '
            '--schedule 1f1b or zb-v',
        )
    return None


def _chunks(schedule: str, vpp: int) -> int:
    return {'1f1b': 1, 'interleaved': vpp}.get(schedule, 2)
