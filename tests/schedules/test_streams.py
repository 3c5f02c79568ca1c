"""Waits and protections of tensors that cross streams, seen by a device that only takes notes."""

import contextlib

import pytest
import torch

from megatron_mhc.schedules import executor_streams
from megatron_mhc.schedules.executor import run_plan
from megatron_mhc.schedules.executor_module import ModuleStage
from megatron_mhc.schedules.executor_streams import launch, side_stream
from megatron_mhc.schedules.plan import Op, Plan


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def record_event(self) -> str:
        self.events += 1
        event = f'{self.name}.{self.events}'
        self.log.append(f'record {event}')
        return event

    def wait_event(self, event: str) -> None:
        self.log.append(f'{self.name} waits for {event}')


class Device:
    """Stands in for ``torch.cuda``."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.made: list[tuple] = []
        self.current = [Stream('main', self.log)]

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 3

    def current_stream(self) -> Stream:
        return self.current[-1]

    def synchronize(self) -> None:
        self.log.append('synchronize')

    def Stream(self, device: int, priority: int) -> Stream:
        self.made.append((device, priority))
        return Stream(f'side{len(self.made)}', self.log)

    @contextlib.contextmanager
    def stream(self, stream: Stream):
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    def launched(self, name: str) -> None:
        self.log.append(f'{name} on {self.current_stream().name}')


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch, 'cuda', device)
    monkeypatch.setattr(
        torch.Tensor,
        'record_stream',
        lambda tensor, stream: device.log.append(f'{int(tensor)} alive for {stream.name}'),
    )
    executor_streams._stream.cache_clear()
    yield device
    executor_streams._stream.cache_clear()


def test_side_work_runs_beside_until_its_result_is_used(device):
    side = side_stream('high', -1)
    x, weights, y = (
        torch.tensor(1),
        [torch.tensor(2), {'bias': (torch.tensor(3),)}],
        torch.tensor(4),
    )

    def work(*args):
        device.launched('work')
        return y, None

    handle = launch(side, work, x, weights, 'text')
    device.launched('more')
    assert handle.result()[0] is y
    device.launched('use')
    handle.result()
    assert device.log == [
        'record main.1',
        'side1 waits for main.1',
        '1 alive for side1',
        '2 alive for side1',
        '3 alive for side1',
        'work on side1',
        'record side1.1',
        'more on main',
        'main waits for side1.1',
        '4 alive for main',
        'use on main',
    ]


def test_every_stream_that_uses_a_result_waits_once(device):
    side, other = side_stream('high', -1), side_stream('other')
    handle = launch(side, lambda: torch.tensor(7))
    device.log.clear()
    handle.result()
    with device.stream(other):
        handle.result()
    with device.stream(side):
        handle.result()
    assert device.log == [
        'main waits for side1.1',
        '7 alive for main',
        'side2 waits for side1.1',
        '7 alive for side2',
    ]


def test_one_stream_for_each_name_and_device(device):
    assert side_stream('high', -1) is side_stream('high', -1)
    assert side_stream('high', -1) is executor_streams.high_priority_stream()
    assert side_stream('other') is not side_stream('high', -1)
    assert device.made == [(3, -1), (3, 0)]


class SideStage(ModuleStage):
    """Returns its output from a side stream."""

    def forward(self, microbatch, x):
        output = super().forward(microbatch, x)
        return output if output is None else launch(side_stream('high', -1), lambda y: y, output)


class Transport:
    def __init__(self, device: Device) -> None:
        self.device = device

    def send(self, op: Op, tensor: torch.Tensor) -> None:
        self.device.launched(f'send {op} {int(tensor)}')

    def finish(self) -> None:
        pass


def side_stage() -> SideStage:
    module = torch.nn.Identity()
    return SideStage(module, data=lambda _: torch.tensor(5.0, requires_grad=True))


def plan(placement: tuple[int, ...], *ops: str) -> Plan:
    return Plan('by hand', 1, (placement,), (tuple(map(Op.parse, ops)),))


@torch.no_grad()
def test_tensor_is_sent_from_the_stream_that_made_it(device):
    run_plan(plan((0, 1), '0F0', '0SEND_F0'), 0, {(0, 0): side_stage()}, Transport(device))
    assert 'send 0SEND_F0 5 on side1' in device.log
    assert not [line for line in device.log if line.startswith('main waits')]


def test_messages_without_a_transport_are_refused(device):
    with pytest.raises(RuntimeError, match='plan by hand has messages; give the transport'):
        run_plan(plan((0, 1), '0F0', '0SEND_F0'), 0, {(0, 0): side_stage()}, None)


def test_channel_without_another_end_is_refused():
    message = Op.parse('0SEND_B0')
    with pytest.raises(ValueError, match='0SEND_B0: there is no stage at its other end'):
        plan((0, 1), '0F0').channel(message)


@torch.no_grad()
def test_next_stage_of_a_rank_waits_for_the_stream(device):
    last = ModuleStage(torch.nn.Identity(), loss=lambda y, _: y)
    run_plan(plan((0, 0), '0F0', '1F0'), 0, {(0, 0): side_stage(), (1, 0): last}, None)
    assert device.log[-2:] == ['main waits for side1.1', '5 alive for main']


@torch.no_grad()
def test_synchronous_run_waits_for_the_device_after_every_operation(device):
    last = ModuleStage(torch.nn.Identity(), loss=lambda y, _: y)
    stages = {(0, 0): side_stage(), (1, 0): last}
    run_plan(plan((0, 0), '0F0', '1F0'), 0, stages, None, synchronous=True)
    assert device.log.count('synchronize') == 2


def test_without_cuda_work_runs_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert side_stream('high', -1) is None
    handle = launch(None, lambda a, b: a + b, 1, 2)
    with handle.on_its_stream() as value:
        assert value == handle.result() == 3
