"""A step that ``--pipeline-verify-steps`` runs twice leaves behind what one step leaves."""

from __future__ import annotations

import ast
import pathlib
import random
import sys

import megatron.core
import numpy
import pytest
import torch
from megatron.core import rerun_state_machine
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.experimental_attention_variant import dsa
from megatron.core.transformer.moe import moe_utils
from torch import nn

from megatron_mhc.pipeline import verify as pipeline_verify
from megatron_mhc.pipeline.trackers import TRACKERS

MOE = 'load_balancing_loss'
CORE = pathlib.Path(megatron.core.__path__[0])


class Chunk(nn.Module):
    """What a chunk holds that a forward or a backward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.plain = (nn.Parameter(torch.ones(3)) for _ in range(2))
        self.weight.main_grad = torch.zeros(3)
        self.register_buffer('local_tokens_per_expert', torch.zeros(4), persistent=False)
        self.probe = lambda: self.seen.append(1)
        self.seen = []

    def step(self, iterators, synchronous, early):
        data = next(iterators[0])
        noise = torch.randn(3) + random.random() + numpy.random.rand()
        self.weight.main_grad += data * noise
        (self.plain * data).sum().backward()
        self.local_tokens_per_expert += 1
        if self.probe is not None:
            self.probe()
        for name in (MOE, 'z_loss'):
            moe_utils.save_to_aux_losses_tracker(name, data.mean(), 1, 2)
        helper, loss = multi_token_prediction.MTPLossLoggingHelper, data.mean()
        if hasattr(helper, 'save_metrics_to_tracker'):
            helper.save_metrics_to_tracker(loss, loss, loss, 0, 1)
        else:
            helper.save_loss_to_tracker(loss, 0, 1)
        dsa.DSAIndexerLossLoggingHelper.save_loss_to_tracker(loss, 1, 1)
        machine = rerun_state_machine.get_rerun_state_machine()
        machine.validation_counts['here'] += 1
        return [data.mean()]


def logged() -> dict:
    """What is in all trackers."""
    moe = moe_utils.get_moe_layer_wise_logging_tracker()
    found = {name: moe[name]['values'].tolist() for name in sorted(moe)}
    helpers = multi_token_prediction.MTPLossLoggingHelper, dsa.DSAIndexerLossLoggingHelper
    for helper in helpers:
        for key, value in helper.tracker.items():
            if isinstance(value, torch.Tensor):
                found[f'{helper.__name__} {key}'] = value.tolist()
    machine = rerun_state_machine.get_rerun_state_machine()
    return found | {'checks': dict(machine.validation_counts)}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Trackers of its own for each test, on a machine without CUDA too."""
    for module, path in TRACKERS:
        owner, (*names, last) = sys.modules.get(module), path.split('.')
        for name in names:
            owner = getattr(owner, name, None)
        if hasattr(owner, last):
            monkeypatch.setattr(owner, last, None if last == '_MOE_METRICS_TRACKER' else {})
    monkeypatch.setattr(torch.cuda, 'get_rng_state', torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, 'set_rng_state', torch.set_rng_state)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 'cpu')
    monkeypatch.setattr(
        rerun_state_machine, '_GLOBAL_RERUN_STATE_MACHINE', rerun_state_machine.RerunStateMachine()
    )


def left_behind(twice: bool, steps: int) -> tuple[dict, Chunk]:
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(7)
    chunk = Chunk()
    data = iter([torch.full((3,), float(value)) for value in range(1, 9)])
    for _ in range(steps):
        if twice:
            pipeline_verify.run_twice(chunk.step, [chunk], [data])
        else:
            chunk.step([data], False, False)
    return logged(), chunk


@pytest.mark.parametrize('steps', [1, 3])
def test_a_step_that_runs_twice_counts_once(monkeypatch, steps):
    with monkeypatch.context() as other:
        # Each run begins with empty trackers.
        clean.__wrapped__(other)
        wanted, alone = left_behind(False, steps)
    found, ours = left_behind(True, steps)
    assert found == wanted and len(found) >= 5
    assert torch.equal(ours.weight.main_grad, alone.weight.main_grad)
    assert torch.equal(ours.plain.grad, alone.plain.grad)
    assert torch.equal(ours.local_tokens_per_expert, torch.full((4,), float(steps)))
    assert len(ours.seen) == len(alone.seen) == steps


def test_a_difference_is_found_and_named():
    chunk = Chunk()
    honest = chunk.step

    def step(iterators, synchronous, early):
        losses = honest(iterators, synchronous, early)
        chunk.weight.main_grad += synchronous
        return losses

    named = 'steps: the gradient of chunk 0: weight: 3 of 3 elements, by at most 1: a step'
    with pytest.raises(RuntimeError, match=named):
        pipeline_verify.run_twice(step, [chunk], [iter([torch.ones(3)])])


def test_a_loss_that_differs_is_named():
    chunk = Chunk()

    def step(iterators, synchronous, early):
        chunk.step(iterators, synchronous, early)
        return [{'lm loss': (torch.ones(2), 3 + synchronous)}]

    with pytest.raises(RuntimeError, match='loss 0 lm loss 1: 1 of 1 elements, by at most 1'):
        pipeline_verify.run_twice(step, [chunk], [iter([torch.ones(3)])])


def test_megatron_has_no_tracker_that_is_not_restored():
    """Classes with a dictionary ``tracker``, and module globals whose name ends so."""
    found = set()
    for path in CORE.joinpath('transformer').rglob('*.py'):
        module = '.'.join(('megatron.core', *path.relative_to(CORE).with_suffix('').parts))
        for node in ast.parse(path.read_text()).body:
            inside = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f'{node.name}.' if isinstance(node, ast.ClassDef) else ''
            for one in inside:
                targets = one.targets if isinstance(one, ast.Assign) else []
                targets = [one.target] if isinstance(one, ast.AnnAssign) else targets
                for name in (t.id for t in targets if isinstance(t, ast.Name)):
                    # Those of random numbers are settings, and restored by themselves.
                    if name.lower().endswith('tracker') and 'rng' not in name:
                        found.add((module, prefix + name))
    assert found and found <= set(TRACKERS)
