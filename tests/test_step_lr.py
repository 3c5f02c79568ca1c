"""The learning rate in steps: by hand, in Megatron's scheduler, and on the command line."""

from __future__ import annotations

import pytest

from megatron_mhc.step_lr import step_factor

STEP = '--lr 1e-3 --lr-decay-style step'


@pytest.mark.parametrize(
    ('fraction', 'factor'),
    [(0.0, 1.0), (0.7999, 1.0), (0.8, 0.316), (0.8999, 0.316), (0.9, 0.1), (1.0, 0.1), (1.5, 0.1)],
)
def test_the_papers_schedule(fraction, factor):
    assert step_factor(fraction, (0.8, 0.9), (0.316, 0.1)) == factor


@pytest.mark.parametrize('steps', [30_000, 50_000, 100_000, 7])
def test_a_milestone_is_hit_whatever_its_rounding(steps):
    at = [step_factor(step / steps, (0.8, 0.9), (0.316, 0.1)) for step in range(steps)]
    assert at.count(0.316) + at.count(0.1) == steps - -(-steps * 8 // 10)


def test_another_style_is_stocks(parse):
    from megatron_mhc.patches import engine

    args = parse('--lr-decay-style', 'cosine')
    assert args.lr_step_rates is None and 'step-lr' not in engine.applied()
    parse(*STEP.split())
    assert 'step-lr' in engine.applied()


@pytest.fixture
def scheduler(parse):
    """``scheduler(flags)``: Megatron's own scheduler for a run of 100 steps."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.training import global_vars

    class Optimizer:
        param_groups = [{'params': [object()]}, {'params': [object()], 'max_lr': 1e-2}]

    def make(*flags, **settings):
        args = parse(*STEP.split(), *flags)
        global_vars._GLOBAL_ARGS = args
        return OptimizerParamScheduler(
            Optimizer(),
            **{
                **dict(init_lr=0.0, max_lr=1e-3, min_lr=0.0, lr_warmup_steps=10),
                **dict(lr_decay_steps=100, lr_decay_style=args.lr_decay_style),
                **dict(start_wd=0.1, end_wd=0.1, wd_incr_steps=100, wd_incr_style='constant'),
                **settings,
            },
        )

    yield make
    global_vars._GLOBAL_ARGS = None


def rates(scheduler, group=0, steps=100):
    """Learning rate of each of the first ``steps`` steps."""
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[group]['lr'])
        scheduler.step(increment=1)
    return seen


def test_warm_up_plateau_and_steps(scheduler):
    seen = rates(scheduler())
    assert seen[:11] == pytest.approx([1e-4 * step for step in range(11)])
    assert seen[10:80] == [1e-3] * 70
    assert seen[80:90] == pytest.approx([3.16e-4] * 10)
    assert seen[90:] == pytest.approx([1e-4] * 10)


def test_each_group_steps_from_its_own_rate_down_to_the_least(scheduler):
    flags = '--lr-step-milestones 0.5 0.75 0.9 --lr-step-rates 0.5 0.2 0.05'.split()
    assert rates(scheduler(*flags), group=1)[::24] == pytest.approx([0, 1e-2, 1e-2, 5e-3, 5e-4])
    seen = rates(scheduler(*flags, min_lr=3e-4))
    assert (seen[60], seen[80], seen[99]) == pytest.approx((5e-4, 3e-4, 3e-4))


def test_a_resumed_scheduler_goes_on(scheduler):
    whole = rates(scheduler())
    first = scheduler()
    rates(first, steps=85)
    second = scheduler(use_checkpoint_opt_param_scheduler=True, override_opt_param_scheduler=False)
    second.load_state_dict(first.state_dict())
    assert rates(second, steps=15) == whole[85:]


REFUSED = {
    '--lr-step-rates 0.3 0.1': '--lr-step-rates has no effect with --lr-decay-style linear: drop',
    f'{STEP} --lr-step-rates 0.3': '2 and 1 values; give one rate for each',
    f'{STEP} --lr-step-milestones 0.9 0.8': '--lr-step-milestones 0.9 0.8: wanted ascending',
    f'{STEP} --lr-step-milestones 0.9 1.0': '--lr-step-milestones 0.9 1: wanted ascending',
    f'{STEP} --lr-step-rates 0.3 -1': '--lr-step-rates 0.3 -1: wanted finite factors',
    f'{STEP} --lr-step-rates 0.3 nan': '--lr-step-rates 0.3 nan: wanted finite factors',
    f'{STEP} --lr-step-rates fast': 'argument --lr-step-rates: invalid float value',
    '--lr-decay-style steps': 'argument --lr-decay-style: invalid choice',
}


@pytest.mark.parametrize('flags', REFUSED)
def test_refusals(parse, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*flags.split())
    assert stopped.value.code == 2
    assert REFUSED[flags] in capsys.readouterr().err
