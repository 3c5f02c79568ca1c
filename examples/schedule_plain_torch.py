"""A pipeline schedule on plain torch, without Megatron: about 10 s on a CPU.

    python examples/schedule_plain_torch.py --schedule dualpipev-w --ranks 2 --microbatches 8

Draws the plan, runs it on gloo ranks over a small stack of MLPs, and compares every loss and
gradient, bit for bit, with the same stack trained in one process. To use it for a model of your
own, give ``stage_module`` its parts and ``run_rank`` your process group.
"""

import argparse
import pathlib
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from megatron_mhc.inputs.values import integer
from megatron_mhc.schedules.catalog import SCHEDULES, make_plan
from megatron_mhc.schedules.executor import run_plan
from megatron_mhc.schedules.executor_channels import Transport
from megatron_mhc.schedules.executor_debug import first_difference
from megatron_mhc.schedules.executor_module import ModuleStage
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import Plan
from megatron_mhc.schedules.render_text import render_text
from megatron_mhc.schedules.simulator import simulate
from megatron_mhc.schedules.validator import validate

# In each process, for torch's threads would wait for each other.
torch.set_num_threads(1)
BATCH, WIDTH = 4, 32
# DualPipe holds every stage twice, and the sum over both copies is its user's; the other has no
# backward.
NAMES = [name for name in SCHEDULES if name not in ('dualpipe', 'forward-only')]


def stage_module(stage: int) -> nn.Module:
    """The same weights for the same stage in every process."""
    torch.manual_seed(stage)
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def data(microbatch: int) -> Tensor:
    """[BATCH, WIDTH]"""
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(microbatch))


def loss(output: Tensor, microbatch: int) -> Tensor:
    """Learn to reverse the input."""
    return (output - data(microbatch).flip(-1)).square().mean()


def results(modules: dict[int, nn.Module], losses: dict[int, Tensor]) -> dict[str, Tensor]:
    """Losses and gradients by name."""
    found = {f'loss of microbatch {mb}': value for mb, value in losses.items()}
    for stage, module in modules.items():
        for name, parameter in module.named_parameters():
            found[f'gradient of stage {stage}, {name}'] = parameter.grad
    return found


def one_process(plan: Plan) -> dict[str, Tensor]:
    """The whole stack by plain autograd."""
    modules = {stage: stage_module(stage) for stage in range(plan.stages)}
    losses = {}
    for microbatch in range(plan.microbatches):
        value = loss(nn.Sequential(*modules.values())(data(microbatch)), microbatch)
        value.backward()
        losses[microbatch] = value.detach()
    return results(modules, losses)


def run_rank(rank: int, plan: Plan, recomputing: bool, folder: str) -> None:
    """One pipeline rank; leaves its losses and gradients in ``folder``."""
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=plan.pp
    )
    stages = {
        (stage, direction): ModuleStage(
            stage_module(stage),
            data=data,
            loss=loss if stage == plan.stages - 1 else None,
            recomputing=recomputing,
        )
        for stage, direction in plan.chunks[rank]
    }
    shape, device = torch.Size((BATCH, WIDTH)), torch.device('cpu')
    transport = Transport(
        plan, rank, range(plan.pp), dist.group.WORLD, lambda op: shape, torch.float32, device
    )
    run_plan(plan, rank, stages, transport)
    modules = {stage: held.module for (stage, _), held in stages.items()}
    losses = {mb: value for held in stages.values() for mb, value in held.losses.items()}
    torch.save(results(modules, losses), pathlib.Path(folder, f'{rank}.pt'))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--schedule', choices=NAMES, default='dualpipev-w')
    parser.add_argument('--ranks', type=integer(1, 16), default=2, help='processes (2)')
    parser.add_argument('--microbatches', type=integer(1, 256), default=8, help='of the step (8)')
    parser.add_argument('--recompute', action='store_true', help='keep the inputs of stages only')
    args = parser.parse_args()
    try:
        plan = make_plan(args.schedule, args.ranks, args.microbatches)
    except ValueError as error:
        parser.error(str(error))
    # Where tensors are sent and received, and the proof that nobody waits for ever.
    plan = lower(plan, recompute=args.recompute)
    validate(plan)
    print(render_text(simulate(plan)))
    expected, found = one_process(plan), {}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (plan, args.recompute, folder), nprocs=plan.pp)
        for rank in range(plan.pp):
            found |= torch.load(pathlib.Path(folder, f'{rank}.pt'), weights_only=True)
    difference = first_difference(expected, found)
    if difference is not None:
        raise SystemExit(f'{args.schedule} differs from one process: {difference}')
    mean = torch.stack([value for name, value in found.items() if 'loss' in name]).mean()
    print(
        f'{args.schedule} on {plan.pp} ranks: mean loss {mean:.6f}; {plan.microbatches} losses and '
        f'{len(found) - plan.microbatches} gradients equal those of one process, bit for bit'
    )


if __name__ == '__main__':
    main()
