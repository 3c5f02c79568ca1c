"""``--lr-decay-style step`` in Megatron's own scheduler: rates, floor, resume."""

from __future__ import annotations

import types

import pytest

from megatron_mhc.optim.lr_steps import rate_at
from megatron_mhc.settings.flags_lr import LrSteps

LR, MIN_LR = 4e-4, 1e-6
PAPER = LrSteps().style


@pytest.fixture(scope='module')
def scheduler():
    """``scheduler(style, ...)``: Megatron's, over two groups of which one has a rate of its own."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megatron_mhc.patches import engine
    from megatron_mhc.patches.lr_steps import LR_STEPS_PATCH

    engine.apply((LR_STEPS_PATCH,))

    def make(style=PAPER, total=1000, warmup=20, min_lr=MIN_LR, **settings):
        groups = [{}, {'max_lr': LR / 2, 'min_lr': min_lr / 2}]
        return OptimizerParamScheduler(
            types.SimpleNamespace(param_groups=groups),
            init_lr=0.0,
            max_lr=LR,
            min_lr=min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=total,
            lr_decay_style=style,
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=total,
            wd_incr_style='constant',
            **{'use_checkpoint_opt_param_scheduler': False, **settings},
        )

    yield make
    engine.revert((LR_STEPS_PATCH,))


def rates(scheduler):
    return [group['lr'] for group in scheduler.optimizer.param_groups]


@pytest.mark.parametrize(('total', 'warmup', 'batch'), [(1000, 20, 1), (1000 * 320, 20 * 320, 320)])
def test_the_papers_schedule(scheduler, total, warmup, batch):
    """In iterations, and in samples of batches."""
    run = scheduler(total=total, warmup=warmup)
    expected = {0: 0.0, 10: 0.5, 20: 1.0, 21: 1.0, 799: 1.0, 800: 0.316, 899: 0.316}
    expected |= {900: 0.1, 1000: 0.1, 1200: 0.1}
    for iteration in range(1201):
        if iteration in expected:
            wanted = LR * expected[iteration]
            assert rates(run) == pytest.approx([wanted, wanted / 2], rel=1e-12), iteration
        run.step(batch)


def test_without_warm_up_the_base_rate_comes_first(scheduler):
    assert rates(scheduler(warmup=0)) == [LR, LR / 2]


def test_the_minimum_is_a_floor_after_warm_up_only(scheduler):
    run = scheduler(min_lr=LR / 5)
    assert rates(run) == [0.0, 0.0]
    run.step(850)
    assert rates(run) == pytest.approx([LR * 0.316, LR / 2 * 0.316])
    run.step(100)
    assert rates(run) == [LR / 5, LR / 10]


def test_a_warm_up_beyond_a_milestone_is_finished_first(scheduler):
    run = scheduler(warmup=850)
    run.step(840)
    assert rates(run)[0] == pytest.approx(LR * 840 / 850)
    run.step(11)
    assert rates(run)[0] == pytest.approx(LR * 0.316)


def test_milestones_are_met_exactly():
    """k of N steps is the fraction the user wrote, whatever N."""
    for total in (10, 30, 1000, 30000, 50000, 320 * 30000):
        for percent in range(1, 100):
            style = LrSteps((percent / 100,), (0.5,)).style
            reached = -(-total * percent // 100)
            assert rate_at(style, reached / total) == 0.5, (total, percent)
            assert rate_at(style, (reached - 1) / total) == 1.0, (total, percent)


def test_a_resumed_run_continues(scheduler):
    first, second = scheduler(), scheduler()
    first.step(850)
    second.load_state_dict(first.state_dict())
    assert rates(second) == rates(first) == pytest.approx([LR * 0.316, LR / 2 * 0.316])
    assert second.num_steps == 850


def test_the_schedule_of_the_checkpoint_is_compared_taken_or_overridden(scheduler):
    saved = scheduler()
    saved.step(850)
    other = LrSteps((0.5,), (0.25,)).style
    with pytest.raises(AssertionError, match='learning rate decay style'):
        scheduler(other).load_state_dict(saved.state_dict())
    taken = scheduler(other, use_checkpoint_opt_param_scheduler=True)
    taken.load_state_dict(saved.state_dict())
    assert rates(taken)[0] == pytest.approx(LR * 0.316)
    overridden = scheduler(other, override_opt_param_scheduler=True)
    overridden.load_state_dict(saved.state_dict())
    assert rates(overridden)[0] == pytest.approx(LR * 0.25)


@pytest.mark.parametrize('style', ['constant', 'linear', 'cosine', 'inverse-square-root'])
def test_other_styles_are_megatrons(scheduler, style):
    from megatron_mhc.patches import engine
    from megatron_mhc.patches.lr_steps import LR_STEPS_PATCH

    def curve():
        run = scheduler(style)
        return [run.step(50) or rates(run) for _ in range(25)]

    ours = curve()
    engine.revert((LR_STEPS_PATCH,))
    try:
        assert curve() == ours
    finally:
        engine.apply((LR_STEPS_PATCH,))
