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
    """Passes of each loop in the order of the code, in the mean of the programs."""
    memory, steps = [loop for loop in loops if loop.memory], _steps(launch)
    if len(memory) != len(steps) and (loops or memory):
        raise ValueError(
            f'{variant(launch)}: {len(memory)} loops over memory in the code, {len(steps)} expected'
        )
    made = launch.constants.get('ITERATIONS', 1) - 1
    part, share = math.ceil(made / RESTARTS), _share(launch)
    passes, of_memory = [], iter(steps)
    for index, loop in enumerate(loops, start=1):
        if loop.memory:
            passes.append(next(of_memory))
        elif loop.inside is not None:
            # The pass number p of a part makes p - 1 before it again.
            passes.append((part - 1) / 2)
        elif any(other.inside == index for other in loops):
            passes.append(share * made / RESTARTS)
        else:
            passes.append(share * (part if 'backward' in launch.name else made))
    return passes


def _steps(launch: Launch) -> tuple[float, ...]:
    """Passes of the loops over global memory, in the order of the code."""
    given, constants = arguments(launch), launch.constants
    name, share = variant(launch).split()[0], _share(launch)
    if name == 'projection':
        return (float(_blocks(min(given['span'], given['C']), constants['BC'])),)
    if name == 'read_backward':
        return (float(_blocks(min(given['span'], given['T']), constants['BT'])),)
    if name in ('post_res_backward', 'pre_backward'):
        return (float(_blocks(given['C'], constants['BC'])),)
    of_maps: tuple[float, ...] = ()
    if name == 'maps_forward':
        of_maps = (share * given['partial_ptr'].shape[0],)
    if name.startswith('maps') and constants['HAS_U']:
        span = min(given.get('span', given['C']), given['C'])
        return *of_maps, (1 - share) * _blocks(span, constants['BC'])
    return of_maps


def _share(launch: Launch) -> float:
    """Of the programs those that do Sinkhorn."""
    if not launch.name.startswith('maps'):
        return 1.0
    return _blocks(arguments(launch)['T'], launch.constants['BT']) / launch.grid[0]


def _again(launch: Launch) -> int:
    """Bytes that programs read of what others read too, beyond the first time."""
    given, constants = arguments(launch), launch.constants
    n: Any = constants.get('N')
    name = variant(launch).split()[0]
    if name == 'projection':
        phi: int = PHI_BYTES * n * given['C'] * constants['MP']
        return phi * (_blocks(given['T'], constants['BT']) - 1)
    if name == 'read_backward':
        maps: int = 4 * given['T'] * (constants['MP'] + 2 + n + n * n)
        return maps * (_blocks(given['C'], constants['BC']) - 1)
    return 0


def _blocks(size: int, block: int) -> int:
    return math.ceil(size / block)
