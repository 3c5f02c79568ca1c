"""What the model keeps of a kernel's machine code: per loop, what one pass of a warp costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_mhc.kernels.roofline.gpus import Gpu
from megatron_mhc.kernels.roofline.pipes import ASYNC, LOADS, cycles, pipe
from megatron_mhc.kernels.roofline.sass import Instruction, parse
from megatron_mhc.kernels.roofline.walk import walk, wide

STORES = frozenset(('STG', 'ST'))


@dataclass(frozen=True)
class Section:
    """A loop without the loops inside it, or (the first of a profile) what is in no loop.

    ``cycles`` and ``issued`` are those of one pass of one warp by pipe; ``latency`` is the cycles
    that a warp alone needs for the pass, ``loaded`` the bytes that it loads of streams, ``copied``
    those that it copies to shared memory without waiting. ``memory`` says whether it touches global
    memory; ``inside`` is the index of the loop around it, or None.
    """

    cycles: dict[str, float]
    issued: dict[str, int]
    latency: float
    loaded: int
    copied: int
    memory: bool
    inside: int | None = None


def profile(text: str, gpu: Gpu) -> tuple[Section, ...]:
    """What is in no loop, then the loops of ``nvdisasm -c`` in the order of the code.

    Raises:
        RuntimeError: the text holds no instruction that is understood.
    """
    code = parse(text)
    sections = [_section(code.own(None), gpu, 1, None)]
    for loop in code.loops:
        # The innermost of those around it begins last.
        around = [index for index, other in enumerate(code.loops) if other.holds(loop)]
        inside = around[-1] + 1 if around else None
        sections.append(_section(code.own(loop), gpu, 2, inside))
    return tuple(sections)


def _section(body: list[Instruction], gpu: Gpu, passes: int, inside: int | None) -> Section:
    spent: Counter[str] = Counter()
    issued: Counter[str] = Counter()
    for instruction in body:
        kind = pipe(instruction)
        if kind:
            # Counter.update would add them too, but takes whole numbers alone by its type.
            spent[kind] += cycles(instruction, gpu)  # type: ignore[assignment]
            issued[kind] += 1
    return Section(
        cycles=dict(spent),
        issued=dict(issued),
        latency=walk(body, gpu, passes),
        loaded=sum(i.bytes for i in body if i.head in LOADS and wide(i)),
        copied=sum(i.bytes for i in body if i.head in ASYNC),
        memory=any(i.head in LOADS | ASYNC | STORES for i in body),
        inside=inside,
    )
