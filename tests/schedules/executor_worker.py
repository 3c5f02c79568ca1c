"""One rank of the executor's tests: ``executor_worker.py RANK WORLD FOLDER CASES.json``.

Runs every case on gloo and compares losses and gradients of its stages with the same model in this
one process; writes per case what differs. A case in which a rank fails ends the others with the
executor's message on stderr.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import pathlib
import sys
import time
import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megatron_mhc.schedules import executor_channels
from megatron_mhc.schedules.catalog import forward_only, make_plan
from megatron_mhc.schedules.executor import in_turn, run_plan
from megatron_mhc.schedules.executor_channels import Transport
from megatron_mhc.schedules.executor_debug import first_difference
from megatron_mhc.schedules.executor_lanes import run_lanes, yield_lane, yield_point
from megatron_mhc.schedules.executor_module import ModuleStage
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import Kind, Op, Plan
from megatron_mhc.schedules.validator import live_activations, validate

HIDDEN, BATCH, SEQUENCE, VOCABULARY = 8, 2, 4, 11


class Graph:
    """There while the graph of a forward pass is."""

    alive: weakref.WeakSet = weakref.WeakSet()
    peak = 0

    @classmethod
    def begun(cls) -> Graph:
        one = cls()
        cls.alive.add(one)
        cls.peak = max(cls.peak, len(cls.alive))
        return one


class Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.graph = Graph.begun()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Block(nn.Module):
    """Attention and MLP; with hand-overs where a real layer would launch on a side stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 12), nn.GELU(), nn.Linear(12, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        x = Begin.apply(x)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + functional.scaled_dot_product_attention(q, k, v)
        yield_lane()
        return x + self.mlp(yield_point(x))


class Stage(ModuleStage):
    reduced = False

    def reduce(self) -> None:
        self.reduced = True


def stage_module(stage: int, stages: int) -> nn.Module:
    """The same weights for the same stage, wherever it is made."""
    torch.manual_seed(100 + stage)
    layers: list[nn.Module] = [Block()]
    if stage == 0:
        layers.insert(0, nn.Embedding(VOCABULARY, HIDDEN))
    if stage == stages - 1:
        layers.append(nn.Linear(HIDDEN, VOCABULARY))
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Data:
    """Tokens and labels of each microbatch from ``first`` on, also of varying length."""

    varies: bool
    first: int = 0

    def tokens(self, microbatch: int, offset: int = 0) -> Tensor:
        microbatch += self.first
        length = SEQUENCE + microbatch % 3 if self.varies else SEQUENCE
        generator = torch.Generator().manual_seed(1000 * offset + microbatch)
        return torch.randint(VOCABULARY, (BATCH, length), generator=generator)

    def loss(self, logits: Tensor, microbatch: int) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), self.tokens(microbatch, 1).flatten())


@functools.cache
def one_process(stages: int, data: Data, microbatches: int, training: bool) -> dict[str, Tensor]:
    """Losses by microbatch and gradients by stage, by plain forward and backward."""
    modules = [stage_module(stage, stages) for stage in range(stages)]
    found: dict[str, Tensor] = {}
    with torch.set_grad_enabled(training):
        for microbatch in range(microbatches):
            loss = data.loss(nn.Sequential(*modules)(data.tokens(microbatch)), microbatch)
            found[f'loss {microbatch}'] = loss.detach()
            if training:
                loss.backward()
    for stage, module in enumerate(modules):
        found |= gradients(stage, module)
    return found


def gradients(stage: int, module: nn.Module) -> dict[str, Tensor]:
    return {
        f'stage {stage} {name}': parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def make(case: dict, pp: int) -> Plan:
    plan = make_plan(case['schedule'], pp, case['microbatches'])
    if case.get('evaluating'):
        plan = forward_only(plan.placement, case['microbatches'])
    plan = lower(plan, recompute=case.get('recompute', False))
    validate(plan)
    return plan.reversed_ranks() if case.get('reversed') else plan


def run(case: dict, rank: int, pp: int, synchronous: bool = False) -> list[dict[str, Tensor]]:
    """One step; losses and gradients of this rank, per model copy."""
    plan = make(case, pp)
    varies = case.get('varies', False)
    copies = [
        Data(varies, sum(plan.microbatches_of(before) for before in range(direction)))
        for direction in range(plan.directions)
    ]
    stages = {
        (stage, direction): Stage(
            stage_module(stage, plan.stages),
            data=copies[direction].tokens,
            loss=copies[direction].loss if stage == plan.stages - 1 else None,
            recomputing=case.get('recompute', False),
        )
        for stage, direction in plan.chunks[rank]
    }
    transport = None
    if pp > 1:
        shape = torch.Size((BATCH, SEQUENCE, HIDDEN))
        group = dist.group.WORLD
        if 'timeout' in case:
            # Shorter than what starting the processes may take.
            group = dist.new_group(timeout=datetime.timedelta(seconds=case['timeout']))
            dist.barrier()
        transport = Transport(
            plan,
            rank,
            # Pipeline ranks need not be global ranks.
            range(pp)[:: -1 if case.get('mirrored') else 1],
            group,
            lambda op: None if varies else shape,
            torch.float32,
            torch.device('cpu'),
            timeout=datetime.timedelta(seconds=30),
        )

    def on_op(op: Op) -> None:
        if case.get('fails_on') == rank and op.kind is Kind.B:
            if case['fails'] == 'dies':
                os._exit(0)
            time.sleep(60)

    assert not Graph.alive
    Graph.peak = 0
    with torch.set_grad_enabled(not plan.forward_only):
        run_plan(
            plan,
            rank,
            stages,
            transport,
            fused=run_lanes if case.get('lanes', True) else in_turn,
            synchronous=synchronous,
            on_op=on_op,
        )
    assert all(held.reduced != plan.forward_only for held in stages.values())
    if not (case.get('recompute') or plan.forward_only):
        # What the plan says to be in flight is what autograd holds, counted in whole ranks.
        measured = Graph.peak / len(plan.chunks[rank]) * plan.directions
        assert measured == live_activations(plan)[rank], (Graph.peak, live_activations(plan))
    results: list[dict[str, Tensor]] = [{} for _ in range(plan.directions)]
    for (stage, direction), held in stages.items():
        results[direction] |= {f'loss {mb}': loss for mb, loss in held.losses.items()}
        results[direction] |= gradients(stage, held.module)
    return results


def differences(case: dict, rank: int, pp: int) -> str | None:
    """The first tensor that is not what one process computes."""
    plan = make(case, pp)
    found = run(case, rank, pp)
    if case.get('synchronous'):
        difference = first_difference(found[0], run(case, rank, pp, synchronous=True)[0])
        assert found[0] and difference is None, difference
    for direction, copy in enumerate(found):
        first = sum(plan.microbatches_of(before) for before in range(direction))
        data = Data(case.get('varies', False), first)
        expected = one_process(
            plan.stages, data, plan.microbatches_of(direction), not plan.forward_only
        )
        if not copy or (case.get('evaluating') and any('stage' in name for name in copy)):
            # Without the loss a rank that evaluates has nothing to show.
            assert case.get('evaluating') and not copy
            continue
        missing = {
            name
            for name in expected
            if name.startswith('stage')
            and (int(name.split()[1]), direction) in plan.chunks[rank]
            and name not in copy
        }
        assert not missing, missing
        difference = first_difference(copy, {name: expected[name] for name in copy})
        if difference is not None:
            return difference
    return None


def mirrored_sums(case: dict, rank: int, pp: int) -> str | None:
    """DualPipe: the two copies of each stage, summed across the mirror, are two replicas' sum."""
    plan = make(case, pp)
    found = run(case, rank, pp)
    half = case['microbatches'] // 2
    replicas = [
        one_process(plan.stages, Data(False, first), half, training=True) for first in (0, half)
    ]
    gathered: list[list[dict[str, Tensor]]] = [[] for _ in range(pp)]
    dist.all_gather_object(gathered, found)
    whole = one_process(plan.stages, Data(False), case['microbatches'], training=True)
    for stage in range(plan.stages):
        # Copy 0 of stage s is on rank s, copy 1 on rank P - 1 - s.
        ours, mirror = gathered[stage][0], gathered[pp - 1 - stage][1]
        names = [name for name in replicas[0] if name.startswith(f'stage {stage} ')]
        summed = {name: ours[name] + mirror[name] for name in names}
        difference = first_difference(
            summed, {name: replicas[0][name] + replicas[1][name] for name in names}
        )
        if difference is not None:
            return difference
        # One replica with all microbatches adds in another order.
        for name in names:
            torch.testing.assert_close(summed[name], whole[name])
    losses = [gathered[pp - 1][0], gathered[0][1]]
    return first_difference(
        {f'{d} {mb}': losses[d][f'loss {mb}'] for d in (0, 1) for mb in range(half)},
        {f'{d} {mb}': replicas[d][f'loss {mb}'] for d in (0, 1) for mb in range(half)},
    )


def main(rank: int, world: int, folder: str, cases: str) -> None:
    cases = json.loads(pathlib.Path(cases).read_text())
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    for number, case in enumerate(cases):
        pipeline_rank = world - 1 - rank if case.get('mirrored') else rank
        if case.get('pairs'):
            executor_channels.has_tags = lambda group, device: False
        check = mirrored_sums if case['schedule'] == 'dualpipe' else differences
        difference = check(case, pipeline_rank, world)
        (pathlib.Path(folder) / f'{number}-{rank}').write_text(difference or 'equal')
    dist.barrier()
    dist.destroy_process_group()


if __name__ == '__main__':
    main(int(os.environ['RANK']), int(os.environ['WORLD_SIZE']), *sys.argv[1:])
