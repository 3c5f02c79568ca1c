"""Any plan, not only those of the catalog, survives being written and read back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mhc.schedules.catalog import SCHEDULES, make_plan, obstacle
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import COLLECTIVE, COMMUNICATION, Kind, Op, Plan, fuse
from megatron_mhc.schedules.plan_text import read_plan, write_csv, write_text


def operations(stages, directions):
    """Operations of every kind, in no sensible order."""
    stage, microbatch = st.integers(0, stages - 1), st.integers(0, 200)
    direction, none = st.integers(0, directions - 1), st.just('')
    passes = [kind for kind in Kind if kind not in COMMUNICATION | COLLECTIVE | {Kind.FUSE}]

    def of(kinds, number=microbatch, payload=none):
        kind = st.sampled_from(sorted(kinds))
        # Hypothesis would make up the parts of a named tuple.
        return st.builds(Op, kind, stage, number, direction, payload, st.just(()))

    return st.one_of(
        of(passes),
        of(COMMUNICATION, payload=st.sampled_from('FB')),
        of(COLLECTIVE, number=st.just(-1)),
        st.builds(fuse, of([Kind.F]), of([Kind.B, Kind.I])),
    )


@st.composite
def any_plan(draw):
    pp, directions = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    stages = draw(st.integers(1, 9))
    holders = st.tuples(*[st.integers(0, pp - 1)] * stages)
    placement = tuple(draw(holders) for _ in range(directions))
    op = operations(stages, directions)
    # A file without a single operation is none.
    ranks = [draw(st.lists(op, min_size=rank == 0, max_size=8)) for rank in range(pp)]
    name = draw(st.from_regex(r'[a-z0-9-]+( [a-z0-9-]+)?', fullmatch=True))
    return Plan(name, draw(st.integers(1, 10**5)), placement, tuple(map(tuple, ranks)))


@pytest.mark.parametrize('write', [write_text, write_csv])
@settings(deadline=None, max_examples=50)
@given(plan=any_plan())
def test_any_plan_is_read_back(write, plan):
    assert read_plan(write(plan)) == plan


@pytest.mark.parametrize('name', list(SCHEDULES))
def test_every_size_is_read_back(name):
    for pp, m in [(1, 1), (1, 2), (2, 4), (3, 3), (3, 7), (4, 12), (6, 12), (8, 40)]:
        if obstacle(name, pp, m) is None:
            plan = lower(make_plan(name, pp, m), recompute=name != 'forward-only', param_sync=True)
            for one in (plan, plan.reversed_ranks()):
                assert read_plan(write_text(one)) == read_plan(write_csv(one)) == one
