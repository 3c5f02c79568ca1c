"""Plans as text and CSV: what is written is read back; what is no plan is refused by line."""

import pytest

from megatron_mhc.schedules.catalog import SCHEDULES, make_plan
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import Kind
from megatron_mhc.schedules.plan_text import read_plan, write_csv, write_text
from megatron_mhc.schedules.validator import problems


@pytest.mark.parametrize('write', [write_text, write_csv])
@pytest.mark.parametrize('name', list(SCHEDULES))
def test_what_is_written_is_read_back(name, write):
    for plan in (make_plan(name, 4, 8), lower(make_plan(name, 4, 8), param_sync=True)):
        assert read_plan(write(plan)) == plan
        inverted = plan.reversed_ranks()
        assert read_plan(write(inverted)) == inverted


@pytest.mark.parametrize('name', list(SCHEDULES))
def test_operations_alone_are_enough(name):
    plan = make_plan(name, 4, 8)
    bare = '\n'.join(','.join(map(str, ops)) for ops in plan.ranks)
    found = read_plan(bare)
    assert (found.placement, found.microbatches, found.ranks) == (plan.placement, 8, plan.ranks)
    assert found.schedule == 'from a file'


def test_comments_and_blank_lines_are_left_out():
    text = '# mine\n\nschedule mine # a name\n0F0 0B0 # rank 0\n1F0 , 1B0\n'
    assert read_plan(text).schedule == 'mine' and read_plan(text).pp == 2


def test_what_a_file_says_is_kept_for_the_validator_to_judge():
    found = read_plan('microbatches 7\nplacement 0 1\n0F0\n-\n')
    assert found.microbatches == 7 and found.ranks[1] == ()
    assert read_plan(write_csv(found)) == found


def test_words_of_torch():
    text = '0F0,0SEND_F0,0WAIT_SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD,0WAIT_REDUCE_GRAD\n'
    text += '1UNSHARD,1RECV_F0,1F0,1RESHARD,1B0,1SEND_B0,1REDUCE_GRAD'
    found = read_plan(text)
    assert problems(found) == []
    assert ' '.join(map(str, found.ranks[1])) == ('1RECV_F0 1WAIT_F0 1F0 1B0 1SEND_B0 1REDUCE')
    # A file of our own is taken at its word.
    assert Kind.WAIT not in read_plan(f'schedule mine\n{text}').kinds


@pytest.mark.parametrize('count', ['1000000000000', '9' * 400])
def test_more_microbatches_than_anyone_can_follow(count):
    with pytest.raises(ValueError, match='microbatches 1000000000000|digits|too many') as caught:
        read_plan(GOOD.replace('microbatches 1', f'microbatches {count}'))
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 700


GOOD = 'microbatches 1\nplacement 0 1\n0F0 0B0\n1F0 1B0\n'


@pytest.mark.parametrize(
    'old, new, text',
    [
        (GOOD, '', 'no operations; give a line for each rank'),
        ('0B0', '0X0', "line 3: '0X0' is not an operation"),
        ('0F0', '(0F0;0F1)FUSE', 'line 3: a fused slot holds F and B'),
        ('placement 0 1', 'placement 0 2', 'names a rank that has no operations; there are 2'),
        ('placement 0 1', 'placement 0', '1F0: the placement has no such stage'),
        ('placement 0 1', 'placement 0 x', 'placement 0 x: give integers'),
        ('placement 0 1', 'placement 0 1\nplacement 1', 'two of the same length'),
        ('placement 0 1', 'placement', 'placement: give integers'),
        ('placement 0 1\n0F0', '2F0', 'no rank runs the forward of stage 0'),
        ('placement 0 1\n0F0', '0F0 1F0', r'ranks \[0, 1\] run the forward of stage 1'),
        ('placement 0 1\n0F0 0B0\n1F0', '0B0\n', 'no forward; give a placement line'),
        ('1B0', "1B0'", "rank 1: 1B0': the placement has no such stage"),
        ('microbatches 1', 'microbatches one', 'microbatches one: give integers'),
        ('0F0', '0F99999999999', "line 3: '0F99999999999' is not an operation"),
        ('0F0', '(0F0;0B0)OVERLAP', r"line 3: '\(0F0;0B0\)OVERLAP' is not an operation"),
        ('microbatches 1', 'microbatches 1 2', 'microbatches: give one number'),
    ],
)
def test_what_is_no_plan_is_refused(old, new, text):
    assert old in GOOD and read_plan(GOOD).microbatches == 1
    with pytest.raises(ValueError, match=text) as caught:
        read_plan(GOOD.replace(old, new))
    assert '\n' not in str(caught.value)
