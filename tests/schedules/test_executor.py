"""The executor on gloo: the bits of one process, whatever the schedule, and no hang on failure."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from launch import launch

from megatron_mhc.schedules.catalog import make_plan
from megatron_mhc.schedules.executor import in_turn, run_plan
from megatron_mhc.schedules.executor_channels import Transport, _tag
from megatron_mhc.schedules.executor_debug import first_difference
from megatron_mhc.schedules.executor_lanes import in_lanes
from megatron_mhc.schedules.executor_module import ModuleStage
from megatron_mhc.schedules.lowering import lower
from megatron_mhc.schedules.plan import COMMUNICATION, Op, Plan

WORKER = pathlib.Path(__file__).with_name('executor_worker.py')
ROOT = WORKER.parents[2]
LINES = ('gpipe', '1f1b', '1f1b-overlap', 'interleaved', 'zb-h1')
VS = ('zb-v', 'dualpipev', 'dualpipev-w')
BOUNDED = ('v-half', 'v-min', 'v-bound')


def cases(pp: int) -> dict[str, dict]:
    """By name; all of one number of ranks run in the same processes."""
    m = 2 * pp
    names = (*LINES, *VS, *BOUNDED)
    found = {name: {'schedule': name, 'microbatches': m + (name in VS)} for name in names}
    for name in VS:
        v = {'schedule': name, 'microbatches': m}
        found[f'{name} inverted'] = v | {'reversed': True}
        found[f'{name} in turn'] = v | {'lanes': False}
        found[f'{name} varying length'] = v | {'varies': True}
    found |= {
        '1f1b varying length': {'schedule': '1f1b', 'microbatches': m, 'varies': True},
        'gpipe varying length': {'schedule': 'gpipe', 'microbatches': m, 'varies': True},
        'dualpipev-w recompute': {'schedule': 'dualpipev-w', 'microbatches': m, 'recompute': True},
        'dualpipev synchronous': {'schedule': 'dualpipev', 'microbatches': m, 'synchronous': True},
        'dualpipev evaluating': {'schedule': 'dualpipev', 'microbatches': m, 'evaluating': True},
        '1f1b other ranks': {'schedule': '1f1b', 'microbatches': m, 'mirrored': True},
    }
    if pp > 1:
        found['dualpipe'] = {'schedule': 'dualpipe', 'microbatches': m}
        # Last: from then on all channels are groups.
        for name in ('dualpipe', '1f1b', 'dualpipev'):
            pairs = {'schedule': name, 'microbatches': m, 'pairs': True}
            found[f'{name} group for each channel'] = pairs
            if name != 'dualpipe':
                found[f'{name} group for each channel, varying length'] = pairs | {'varies': True}
    return found


def written(cases: list[dict], folder: pathlib.Path) -> pathlib.Path:
    path = folder / 'cases.json'
    path.write_text(json.dumps(cases))
    return path


def start(world: int, folder: pathlib.Path, cases: list[dict]) -> list[subprocess.Popen]:
    """Processes of which each has an output of its own, and none is ended with another."""
    path = written(cases, folder)
    env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': str(world)}
    return [
        subprocess.Popen(
            [sys.executable, WORKER, folder, path],
            env=env | {'RANK': str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def errors(processes: list[subprocess.Popen], timeout: float) -> list[str]:
    """What each rank wrote to stderr; kills those that are not done by then."""
    end = time.monotonic() + timeout
    found = []
    try:
        for process in processes:
            found.append(process.communicate(timeout=max(0.1, end - time.monotonic()))[1])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
    """``outcome(pp, name)``: what each rank found in a case."""
    done: dict[int, tuple[pathlib.Path, str]] = {}

    def get(pp: int, name: str) -> list[str]:
        if pp not in done:
            folder = tmp_path_factory.mktemp(f'pp{pp}')
            path = written(list(cases(pp).values()), folder)
            done[pp] = folder, launch(pp, WORKER, folder, path, timeout=240).stderr
        folder, messages = done[pp]
        number = list(cases(pp)).index(name)
        files = [folder / f'{number}-{rank}' for rank in range(pp)]
        assert all(file.exists() for file in files), messages
        return [file.read_text() for file in files]

    return get


@pytest.mark.parametrize(('pp', 'name'), [(pp, name) for pp in (1, 2, 4) for name in cases(pp)])
def test_losses_and_gradients_equal_one_process(outcome, pp, name):
    assert outcome(pp, name) == ['equal'] * pp


FAILURES = {
    # Rank 1, in its first backward.
    'dies': (2, {'fails': 'dies', 'timeout': 500}),
    'stalls': (3, {'fails': 'stalls', 'timeout': 5}),
}


@pytest.mark.parametrize('name', FAILURES)
def test_failing_rank_stops_the_others(tmp_path, name):
    world, case = FAILURES[name]
    case = {'schedule': '1f1b', 'microbatches': 6, 'fails_on': 1, **case}
    processes = start(world, tmp_path, [case])
    failing = processes.pop(1)
    try:
        first, *last = errors(processes, timeout=240)
    finally:
        failing.kill()
        failing.communicate()
    assert 'pipeline rank 0 (rank 0): 0WAIT_B0 with pipeline rank 1 (rank 1) did not' in first
    assert 'in operation 0WAIT_B0 of plan 1f1b on pipeline rank 0' in first
    for message in last:
        assert 'pipeline rank 2 (rank 2): 2WAIT_F' in message
        assert 'pipeline rank 1 (rank 1) did not complete; that rank failed or' in message


@pytest.mark.parametrize('tensor', [torch.zeros(2, 3), torch.zeros(2, 4).double()])
def test_wrong_tensor_is_refused_before_it_is_sent(tensor):
    plan = lower(make_plan('1f1b', 2, 2))
    for shape in (torch.Size((2, 4)), None):
        transport = Transport(
            plan, 0, (0, 1), None, lambda op, s=shape: s, torch.float32, torch.device('cpu')
        )
        if shape is None and tensor.dtype == torch.float32:
            continue  # it says its shape itself
        expected = 'any shape' if shape is None else r'\[2, 4\]'
        with pytest.raises(
            RuntimeError,
            match=r'rank 0, 0SEND_F0: the tensor is .*, but pipeline rank 1 expects '
            f'{expected} torch.float32',
        ):
            transport.send(Op.parse('0SEND_F0'), tensor)


@pytest.mark.parametrize(
    ('name', 'pp'), [('interleaved', 2), ('zb-v', 2), ('dualpipev', 4), ('dualpipe', 2)]
)
def test_channels_between_two_ranks_have_tags_of_their_own(name, pp):
    plan = lower(make_plan(name, pp, 4 * pp, chunks=3))
    channels = {plan.channel(op) for _, _, op in plan.leaves() if op.kind in COMMUNICATION}
    assert len({(*link[:2], _tag(link)) for link in channels}) == len(channels)


def test_receive_without_a_wait_is_reported():
    plan = lower(make_plan('1f1b', 2, 2))
    transport = Transport(
        plan, 1, (0, 1), None, lambda op: None, torch.float32, torch.device('cpu')
    )
    transport.receive(Op.parse('1RECV_F0'))
    with pytest.raises(RuntimeError, match='rank 1: received and never used: 1RECV_F0'):
        transport.finish()


def one_rank(*ops: str) -> Plan:
    return Plan('by hand', 1, ((0, 0),), (tuple(map(Op.parse, ops)),))


def two_stages() -> dict:
    return {
        (0, 0): ModuleStage(torch.nn.Linear(2, 2), data=lambda _: torch.ones(1, 2)),
        (1, 0): ModuleStage(torch.nn.Linear(2, 2), loss=lambda y, _: y.sum()),
    }


def test_operations_are_reported_in_order():
    plan = lower(make_plan('dualpipev-w', 1, 4))
    seen = []
    run_plan(plan, 0, two_stages(), None, on_op=seen.append)
    assert tuple(seen) == plan.ranks[0]


class InLanes(ModuleStage):
    def forward(self, microbatch, x):
        self.seen.append(in_lanes())
        return super().forward(microbatch, x)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [({}, True), ({'fused': in_turn}, False), ({'synchronous': True}, False)],
)
def test_fused_slots_run_in_lanes_unless_told_otherwise(options, expected):
    plan = lower(make_plan('dualpipev', 1, 4))
    stages = two_stages()
    stages[0, 0] = InLanes(stages[0, 0].module, data=stages[0, 0].data)
    stages[0, 0].seen = []
    run_plan(plan, 0, stages, None, **options)
    fused = {op.parts[0].microbatch for op in plan.ranks[0] if op.parts and not op.parts[0].stage}
    assert fused
    assert stages[0, 0].seen == [expected and mb in fused for mb in range(4)]


def test_left_over_tensors_are_reported():
    with pytest.raises(RuntimeError, match=r"left over .*\('F', 1, 0, 0\)"):
        run_plan(one_rank('0F0'), 0, two_stages(), None)


def test_missing_stages_are_reported():
    with pytest.raises(RuntimeError, match=r'no stage for \(stage, direction\) \[\(1, 0\)\]'):
        run_plan(one_rank('0F0'), 0, {(0, 0): None}, None)


def test_stage_without_an_output_is_reported():
    stages = two_stages()
    stages[0, 0].loss = lambda y, _: y.sum()
    with pytest.raises(RuntimeError, match='0F0: the stage returned nothing, but a neighbour'):
        run_plan(one_rank('0F0', '1F0'), 0, stages, None)


def test_error_of_a_stage_names_the_operation():
    plan = lower(make_plan('dualpipev', 1, 4))
    with pytest.raises(RuntimeError, match='has no forward') as caught:
        stages = two_stages()
        stages[1, 0].forward = lambda microbatch, x: None
        run_plan(plan, 0, stages, None)
    assert caught.value.__notes__ == [
        'in operation 1B0 of plan dualpipev on pipeline rank 0',
    ]


def test_different_bits_are_named():
    a = {'x': torch.tensor([1.0, float('nan')]), 'y': torch.zeros(3)}
    assert first_difference(a, {key: value.clone() for key, value in a.items()}) is None
    other = a | {'y': torch.tensor([0.5, 0, 0])}
    assert first_difference(a, other) == 'y: 1 of 3 elements, by at most 0.5'
    assert first_difference(a, {'x': a['x']}) == 'y: only in one of them'
    assert first_difference({'x': a['x']}, a) == 'y: only in one of them'
    assert first_difference({'x': a['y']}, {'x': a['y'].double()}).startswith(
        'x: [3] torch.float32'
    )
    assert first_difference({'x': a['y']}, {'x': -a['y']}) == 'x: 3 of 3 elements, by at most 0'
