"""Who proves which part of a plan, and how a pipeline is told of a plan that must not run."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_mhc.pipeline import proof as pipeline_proof
from megatron_mhc.schedules import catalog
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import Op
from megatron_mhc.schedules.validator import PlanError, validate
from megatron_mhc.settings import step_plan
from megatron_mhc.settings.names import V_SCHEDULES
from megatron_mhc.settings.pipeline import PipelineConfig


class Group:
    """One end of a process group of ``size`` ranks, as one rank sees it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = (lambda: rank), (lambda: size)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    ranks = lambda group: list(range(group.size()))  # noqa: E731
    monkeypatch.setattr(pipeline_proof.dist, 'get_process_group_ranks', ranks)
    step_plan.plan_of.cache_clear()
    step_plan.prove.cache_clear()
    pipeline_proof._proved.clear()
    step_plan._promised.clear()


@pytest.mark.parametrize('evaluating', [False, True])
@pytest.mark.parametrize('schedule', V_SCHEDULES)
def test_a_rank_has_its_part_of_the_whole_plan(schedule, evaluating):
    whole = step_plan._lowered(schedule, 6, 13, evaluating, recompute=True).reversed_ranks()
    validate(whole)
    for rank in range(6):
        part = step_plan.plan_of(schedule, rank, 6, 13, evaluating, recompute=True)
        assert part.ranks[rank] == whole.ranks[rank]
        assert part.placement == whole.placement and part.schedule == whole.schedule
        assert not any(ops for other, ops in enumerate(part.ranks) if other != rank)


def test_a_rank_looks_at_its_neighbours_only(monkeypatch):
    looked_at = []
    monkeypatch.setattr(
        step_plan,
        'validate',
        lambda plan, ranks: looked_at.append([n for n, ops in enumerate(plan.ranks) if ops]),
    )
    for rank in (0, 3, 7):
        step_plan.plan_of('zb-v', rank, 8, 16)
    # In the numbers of the V.
    assert looked_at == [[6, 7], [3, 4, 5], [0, 1]]


def wrong(schedule, change):
    """The schedule with ``change`` applied to the words of every rank."""

    def operations(rank, *numbers):
        words = change(rank, [str(op) for op in schedule.operations(rank, *numbers)])
        return tuple(map(Op.parse, words))

    return dataclasses.replace(schedule, operations=operations)


def waits_for_ever(rank, words):
    """Every rank's own order is right, and so is that of all channels."""
    if rank == 0:
        early, late = words.index('0F1'), words.index('3I0')
        words[early], words[late] = words[late], words[early]
    return words


def test_a_plan_that_waits_for_ever_is_stopped_by_the_first_rank(monkeypatch):
    schedule = wrong(catalog.SCHEDULES['zb-v'], waits_for_ever)
    monkeypatch.setitem(catalog.SCHEDULES, 'zb-v', schedule)
    pipeline = PipelineConfig('zb-v')
    with pytest.raises(PlanError):
        validate(lower(catalog.make_plan('zb-v', 2, 4)))
    told = []

    def broadcast(found, group, group_src):
        # Rank 1 is told what rank 0 has said.
        told.extend(found) if group.rank() == group_src else found.__setitem__(0, told[0])

    monkeypatch.setattr(pipeline_proof.dist, 'broadcast_object_list', broadcast)
    for rank in (0, 1):
        with pytest.raises(ValueError, match='plan zb-v for 2 ranks and 4 microbatches is invalid'):
            pipeline_proof.proved_plan(pipeline, Group(rank, 2), 4, False, False)


def test_a_part_that_is_wrong_by_itself_needs_no_one_else(monkeypatch):
    schedule = wrong(catalog.SCHEDULES['zb-v'], lambda rank, words: words[:-1])
    monkeypatch.setitem(catalog.SCHEDULES, 'zb-v', schedule)
    with pytest.raises(PlanError, match='missing'):
        step_plan.plan_of('zb-v', 1, 2, 4)


def test_a_plan_is_proved_once(monkeypatch):
    proofs, told = [], []
    monkeypatch.setattr(step_plan, 'prove', lambda *numbers: proofs.append(numbers))
    monkeypatch.setattr(
        pipeline_proof.dist, 'broadcast_object_list', lambda *_, **__: told.append(1)
    )
    group, other = Group(0, 2), Group(1, 2)
    for _ in range(3):
        pipeline_proof.proved_plan(PipelineConfig('dualpipev'), group, 4, False, False)
        pipeline_proof.proved_plan(PipelineConfig('dualpipev'), other, 4, False, False)
    assert (len(proofs), len(told)) == (1, 2)


def test_what_a_command_line_names_is_proved_by_the_first_rank_of_the_job(monkeypatch, parse):
    """Not again by the first rank of each of hundreds of pipelines, while the others wait."""
    proofs = []
    monkeypatch.setattr(step_plan, 'prove', lambda *numbers: proofs.append(numbers))
    flags = '--num-layers 8 --micro-batch-size 1 --global-batch-size 12 --rampup-batch-size 4 4 9'
    flags += ' --pipeline-model-parallel-size 2 --pipeline-schedule zb-v'
    told = []
    monkeypatch.setattr(
        pipeline_proof.dist, 'broadcast_object_list', lambda *_, **__: told.append(1)
    )
    for rank, expected in (('9', 0), ('0', 2)):
        monkeypatch.setenv('RANK', rank)
        parse(*flags.split())
        assert len(proofs) == expected
        for microbatches in (4, 12):
            pipeline_proof.proved_plan(
                PipelineConfig('zb-v'), Group(0, 2), microbatches, False, False
            )
    assert (len(proofs), told) == (2, [])
    # A size between the two is not known before its step.
    pipeline_proof.proved_plan(PipelineConfig('zb-v'), Group(0, 2), 8, False, False)
    assert (len(proofs), told) == (3, [1])
