"""Rows of one op by one implementation: times, ideal traffic, accuracy, repeatability."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
from bench_bytes import BACKWARD, BOTH, FORWARD, ideal_bytes, ideal_elements, target
from bench_calls import COMPOSITES, Call, build
from bench_cases import in_double, make_inputs
from bench_ours import OURS, Torch
from bench_timer import CpuTimer, CudaTimer
from torch import Tensor

from megatron_mhc.kernels.peers.contender import (
    LAYER,
    Case,
    Contender,
    first_line,
    transposed_square,
)

OK = 'ok'
CHECK_TOKENS = 256
"""Accuracy is taken on this many tokens: the reference is in fp64, and slow."""
Errors = tuple[float | None, float | None, str]
"""Of the results, of the gradients, and the gradient that has the latter."""
NO_ERRORS: Errors = (None, None, '')
REPEATS = 3
"""Backward passes of the same inputs that must agree in every bit."""


@dataclass
class Row:
    """One line of the CSV; ``layer`` is per sublayer. Empty where nothing was measured."""

    op: str
    direction: str
    contender: str
    mode: str
    hidden: int
    tokens: int
    streams: int
    dtype: str
    status: str
    median_us: float | None = None
    min_us: float | None = None
    p90_us: float | None = None
    ideal_elements: float | None = None
    ideal_bytes: int | None = None
    ideal_gb_per_s: float | None = None
    copy_share: float | None = None
    times_ours: float | None = None
    error_fwd: float | None = None
    error_bwd: float | None = None
    worst_grad: str = ''
    bwd_repeatable: str = ''
    target: str = ''
    target_met: str = ''

    @property
    def point(self) -> tuple:
        """What must agree for two rows to be compared."""
        return (
            *(self.op, self.direction, self.mode),
            *(self.hidden, self.tokens, self.streams, self.dtype),
        )

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


COLUMNS = tuple(field.name for field in fields(Row))


def status_row(case: Case, contender: str, op: str, status: str) -> Row:
    """A line that says why there is no figure."""
    shape = (case.hidden, case.tokens, case.streams, case.dtype)
    return Row(op, '', contender, '', *shape, status)


def measure(
    case: Case,
    kind: type[Contender],
    op: str,
    timer: CpuTimer | CudaTimer,
    device: str,
    copy_bytes_per_s: float,
) -> list[Row]:
    """All rows of one op by one implementation; a failure is a row too, never an exception."""
    if op in kind.without:
        return []
    try:
        contender = kind(case)
        reason = contender.unsupported()
        if reason:
            return [status_row(case, kind.name, op, f'skipped: {reason}')]
        with timer.stream():
            errors = accuracy(kind, case, op, device) if kind.checked else NO_ERRORS
        if not kind.timed:
            row = status_row(case, kind.name, op, 'semantics only, not timed')
            row.error_fwd, row.error_bwd, row.worst_grad = errors
            return [row]
        return _timed_rows(case, contender, op, timer, device, copy_bytes_per_s, errors)
    except Exception as error:  # noqa: BLE001  whatever a peer does, the bench goes on
        return [status_row(case, kind.name, op, f'failed: {first_line(error)}')]


def _timed_rows(
    case: Case,
    contender: Contender,
    op: str,
    timer: CpuTimer | CudaTimer,
    device: str,
    copy_bytes_per_s: float,
    errors: Errors,
) -> list[Row]:
    with timer.stream():
        calls = [build(op, contender, make_inputs(case, device, seed=0), timed=True)]
        repeatable = is_repeatable(calls[0])
        size = sum(t.numel() * t.element_size() for t in (*calls[0].inputs, *calls[0].grads))
        for seed in range(1, timer.copies(size)):
            calls.append(build(op, contender, make_inputs(case, device, seed), timed=True))
    rows = []
    for direction in (FORWARD, BACKWARD, BOTH) if op in COMPOSITES else (FORWARD, BACKWARD):
        with timer.stream():
            work = works(calls, direction)
        captured = False
        for mode in timer.modes:
            # Launch overhead is worth a row of its own only where it can be compared as a whole.
            if mode == 'eager' and op not in COMPOSITES and captured:
                continue
            row = status_row(case, contender.name, op, OK)
            row.direction, row.mode = direction, mode
            row.error_fwd, row.error_bwd, row.worst_grad = errors
            row.bwd_repeatable = repeatable if direction != FORWARD else ''
            rows.append(row)
            try:
                _fill_times(row, case, timer, work, copy_bytes_per_s)
                captured = mode == 'graph'
            except Exception as error:  # noqa: BLE001
                row.status = f'failed: {first_line(error)}'
                if not timer.recover():
                    return rows
    return rows


def works(calls: list[Call], direction: str) -> list[Callable[[], object]]:
    """What is timed, once for each set of inputs; the forward of a lone backward runs here."""
    if direction == FORWARD:
        return [call.forward for call in calls]
    if direction == BOTH:
        return [call.both for call in calls]
    return [partial(call.backward, call.forward(), keep=True) for call in calls]


def _fill_times(
    row: Row,
    case: Case,
    timer: CpuTimer | CudaTimer,
    work: list[Callable[[], object]],
    copy_bytes_per_s: float,
) -> None:
    sample = timer.measure(row.mode, work)
    per = LAYER if row.op == 'layer' else 1
    row.median_us, row.min_us, row.p90_us = (round(s * 1e6 / per, 3) for s in sample)
    row.ideal_elements = ideal_elements(row.op, row.direction, case.streams)
    row.ideal_bytes = ideal_bytes(row.op, row.direction, case)
    rate = row.ideal_bytes / (sample.median / per)
    row.ideal_gb_per_s, row.copy_share = rate / 1e9, rate / copy_bytes_per_s
    if row.mode == 'graph' and row.contender == OURS[0].name:
        row.target, row.target_met = target(
            row.op, row.direction, case, row.median_us, row.copy_share
        )


def accuracy(kind: type[Contender], case: Case, op: str, device: str) -> Errors:
    """Worst relative RMS error over the results, and over the gradients, against fp64."""
    case = case._replace(tokens=min(case.tokens, CHECK_TOKENS))
    inputs = make_inputs(case, device, seed=12345)
    checked = kind(case)
    got = build(op, checked, inputs).in_our_layout()
    exact = build(op, _Exact(case, checked.rows_first), in_double(inputs)).in_our_layout()
    (forward, _), (backward, worst) = (
        max((relative_rms(mine[name], theirs[name]), name) for name in mine)
        for mine, theirs in zip(got, exact, strict=True)
    )
    return forward, backward, worst


class _Exact(Torch):
    """The torch path in fp64, with the order of normalisation of whoever is checked."""

    def __init__(self, case: Case, rows_first: bool):
        super().__init__(case)
        self.rows_first = rows_first

    def sinkhorn(self, logits: Tensor) -> Tensor:
        return self._turned(super().sinkhorn(self._turned(logits)))

    def mapping(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, alpha = params
        if self.rows_first:
            weight, bias = (transposed_square(p, self.case.streams) for p in (weight, bias))
        h_pre, h_post, h_res = super().mapping(x, weight, bias, alpha)
        return h_pre, h_post, self._turned(h_res)

    def _turned(self, h: Tensor) -> Tensor:
        return h.transpose(-1, -2) if self.rows_first else h


def relative_rms(got: Tensor, exact: Tensor) -> float:
    """``|got - exact| / |exact|`` in the 2-norm; infinity for a wrong shape or no number."""
    if got.shape != exact.shape:
        return float('inf')
    error = ((got.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()
    return error if error == error else float('inf')


def is_repeatable(call: Call) -> str:
    """Whether the gradients of the same inputs agree bit by bit; several tries can only refute."""
    outputs = call.forward()
    first, *others = (call.backward(outputs, keep=True) for _ in range(REPEATS))
    same = all(
        a is b if a is None or b is None else torch.equal(a, b)
        for other in others
        for a, b in zip(first, other, strict=True)
    )
    return 'yes' if same else 'no'
