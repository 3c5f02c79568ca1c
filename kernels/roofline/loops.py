"""How often the loops of any Triton kernel run: from its source and the arguments of a launch.

The machine code does not say it. The source is walked as the first program would run it, with what
can be evaluated from arguments and constants; loops that the compiler unrolls are not in the code.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from megatron_mhc.kernels.roofline.profile import Section
from megatron_mhc.kernels.traffic import arguments
from megatron_mhc.kernels.triton.launch import Launch, cdiv

# Of triton.language, what loop bounds are made of; the first program of the grid.
LANGUAGE = SimpleNamespace(
    cdiv=cdiv,
    program_id=lambda axis=0: 0,
    minimum=min,
    maximum=max,
    range=range,
)
UNROLLED = 'static_range'


@dataclass(frozen=True)
class Count:
    """Passes of a loop of the source for each pass of the loop around it, whose index is given."""

    passes: float
    inside: int | None


def passes_of(launch: Launch, loops: Sequence[Section]) -> tuple[float, ...]:
    """Passes of each of the ``loops`` of the code, in their order.

    Where the code has fewer loops than the source, those with the fewest passes are taken to be
    unrolled.

    Raises:
        ValueError: the code has more loops than the source, or others around them, or how often
            one runs does not follow from the arguments.
    """
    counts = loop_counts(launch)
    kept = list(range(len(counts)))
    while len(kept) > len(loops):
        kept.remove(min(kept, key=lambda at: counts[at].passes))
    where: dict[int | None, int] = {at: place for place, at in enumerate(kept)}
    places = [where.get(counts[at].inside) for at in kept]
    wanted = [None if loop.inside is None else loop.inside - 1 for loop in loops]
    if len(kept) != len(loops) or places != wanted:
        raise ValueError(
            f'{launch.name}: {len(loops)} loops in the code, {len(counts)} in the source, or others'
        )
    found = tuple(counts[at].passes for at in kept)
    if any(math.isnan(passes) for passes in found):
        raise ValueError(f'{launch.name}: how often a loop runs does not follow from its arguments')
    return found


def loop_counts(launch: Launch) -> list[Count]:
    """The loops of the kernel's source that are not unrolled there; NaN passes where unknown."""
    source = textwrap.dedent(inspect.getsource(launch.kernel.fn))
    known = {**arguments(launch), **launch.constants, 'tl': LANGUAGE, 'triton': LANGUAGE}
    walk = _Walk(known)
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    walk.body(function.body, None)
    return walk.counts


class _Walk:
    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known
        self.counts: list[Count] = []

    def body(self, statements: Sequence[ast.stmt], inside: int | None) -> None:
        for node in statements:
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
                self._assign(node)
            elif isinstance(node, ast.If):
                taken = self._value(node.test)
                # Both, where it cannot be told: neither may be missed.
                self.body(node.body if taken is not False else [], inside)
                self.body(node.orelse if taken is not True else [], inside)
            elif isinstance(node, ast.For):
                self._loop(node, inside)

    def _assign(self, node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        value = self._value(node.value) if isinstance(node, ast.Assign) and node.value else None
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self.known.pop(name.id, None)
            if isinstance(target, ast.Name) and value is not None:
                self.known[target.id] = value

    def _loop(self, node: ast.For, inside: int | None) -> None:
        call = node.iter
        name = ast.unparse(call.func).rpartition('.')[2] if isinstance(call, ast.Call) else ''
        if name == UNROLLED or not isinstance(call, ast.Call):
            self.body(node.body, inside)
            return
        bounds = [self._value(bound) for bound in call.args]
        passes = math.nan
        if all(isinstance(bound, int) for bound in bounds):
            passes = float(len(range(*bounds)))
        unroll = next((w.value for w in call.keywords if w.arg == 'loop_unroll_factor'), None)
        factor = self._value(unroll) if unroll is not None else 1
        self.counts.append(Count(passes / (factor or 1), inside))
        self.body(node.body, len(self.counts) - 1)

    def _value(self, node: ast.expr) -> Any:
        """What it evaluates to as plain Python, a number or a truth; None where it does not."""
        try:
            code = compile(ast.Expression(node), '<kernel>', 'eval')
            value = eval(code, {'__builtins__': {'min': min, 'max': max}}, self.known)
        except Exception:  # what is computed on the GPU raises in many ways here
            return None
        return value if isinstance(value, bool | int | float) else None
