"""What our launches make of their code: bytes, what is read again from L2, and passes of each loop.

How often a loop runs stands in the launch, not in the machine code. Which loop of the code is which
follows from its form: one that touches global memory walks over channels, tokens or partial sums;
the others are passes of Sinkhorn, in backward those of a part with the passes made again inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_mhc.kernels.roofline.predict import Work
from megatron_mhc.kernels.roofline.profile import Section
from megatron_mhc.kernels.traffic import arguments, launch_bytes_by_kind, variant

if TYPE_CHECKING:
    from megatron_mhc.kernels.triton.launch import Launch

# kernels/triton/sinkhorn.py restarts its backward from so many states.
RESTARTS = 4
# A matrix product of bf16 streams takes phi in two parts of 2 bytes, one of fp32 in 4.
PHI_BYTES = 4


def work_of(launch: Launch, sections: Sequence[Section], resident: int) -> Work:
    """The ``Work`` of a recorded launch; ``resident`` blocks fit on an SM.

    Raises:
        ValueError: the code has loops that the launch does not explain.
    """
    return Work(
        grid=math.prod(launch.grid),
        warps=launch.options['num_warps'],
        resident=resident,
        dram_bytes=sum(launch_bytes_by_kind(launch).values()),
        l2_bytes=_again(launch),
        passes=tuple(_passes(launch, sections[1:])),
    )


def _passes(launch: Launch, loops: Sequence[Section]) -> list[float]:
    """Passes of each loop in the order of the code."""
    memory = [loop for loop in loops if loop.memory]
    steps = _steps(launch)
    if len(memory) > (steps is not None) or (loops and not memory and steps is not None):
        raise ValueError(
            f'{variant(launch)}: {len(memory)} loops over memory in the code, '
            f'{int(steps is not None)} expected'
        )
    made = launch.constants.get('ITERATIONS', 1) - 1
    part = math.ceil(made / RESTARTS)
    passes = []
    for index, loop in enumerate(loops, start=1):
        if loop.memory:
            passes.append(steps or 1.0)
        elif loop.inside is not None:
            # The pass number p of a part makes p - 1 before it again.
            passes.append((part - 1) / 2)
        elif any(other.inside == index for other in loops):
            passes.append(made / RESTARTS)
        else:
            passes.append(float(part if 'backward' in launch.name else made))
    return passes


def _steps(launch: Launch) -> float | None:
    """Passes of the loop over global memory; None where the kernel has none."""
    given, constants = arguments(launch), launch.constants
    name = variant(launch).split()[0]
    if name == 'projection':
        return float(_blocks(min(given['span'], given['C']), constants['BC']))
    if name == 'read_backward':
        return float(_blocks(min(given['span'], given['T']), constants['BT']))
    if name in ('post_res_backward', 'pre_backward'):
        return float(_blocks(given['C'], constants['BC']))
    if name == 'maps_forward':
        return float(given['partial_ptr'].shape[0])
    return None


def _again(launch: Launch) -> int:
    """Bytes that programs read of what others read too, beyond the first time."""
    given, constants = arguments(launch), launch.constants
    n: Any = constants.get('N')
    name = variant(launch).split()[0]
    if name == 'projection':
        phi: int = PHI_BYTES * n * given['C'] * constants['MP']
        return phi * (_blocks(given['T'], constants['BT']) - 1)
    if name == 'read_backward':
        maps: int = 4 * given['T'] * (constants['MP'] + 1 + n + n * n)
        return maps * (_blocks(given['C'], constants['BC']) - 1)
    return 0


def _blocks(size: int, block: int) -> int:
    return math.ceil(size / block)
