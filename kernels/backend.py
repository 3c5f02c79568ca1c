"""Which implementation of an op runs: the Triton kernels or the torch reference, and why."""

from __future__ import annotations

import functools
import logging
import re

import torch

from megatron_mhc.kernels.defaults import BACKENDS, KERNEL_STREAMS
from megatron_mhc.kernels.numerics import PAPER, takes_triton

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
# Bytes of shared memory that read_backward takes for 8 streams of fp32 or fp16.
WIDE_EIGHT_STREAMS = 148 * 1024

logger = logging.getLogger('megatron_mhc.kernels')


def use_triton(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, n: int, numerics: str = PAPER
) -> bool:
    """Decide for one call; each new reason is logged once.

    Args:
        backend: ``auto`` takes the kernels wherever they run; ``triton`` demands them; ``torch`` is
            the reference.
        op: name for the log; n: number of streams.
        numerics: one of ``NUMERICS``.

    Raises:
        ValueError: an unknown backend, or ``triton`` where the kernels cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f'backend: got {backend!r}, wanted one of {BACKENDS}')
    if backend == 'torch':
        return False
    obstacle = numerics_obstacle(op, numerics) or kernel_obstacle(device, dtype, n)
    if backend == 'triton':
        if obstacle:
            raise ValueError(
                f"backend: got 'triton' for {op}, but {obstacle}; use 'auto' or 'torch'"
            )
        return True
    if device.type == 'cpu':
        # Interpreted kernels are for tests: slower than torch by orders of magnitude.
        obstacle = 'the streams are on the CPU'
    _log_once(op, device.type, obstacle)
    return obstacle is None


def numerics_obstacle(op: str, numerics: str) -> str | None:
    """Why the kernels cannot run ``op`` under these conventions, wherever it is."""
    if takes_triton(numerics, op):
        return None
    return f'the kernels compute {op} as --mhc-numerics {PAPER} does, not as {numerics} does'


def kernel_obstacle(device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Why the Triton kernels cannot run here, in half a sentence; None where they can."""
    if n not in KERNEL_STREAMS:
        return f'the kernels are written for n in {KERNEL_STREAMS} streams, not {n}'
    if dtype not in KERNEL_DTYPES:
        return f'the kernels take bf16, fp16 and fp32 streams, not {dtype}'
    obstacle = _platform_obstacle(device)
    if obstacle is None and n == 8 and dtype != torch.bfloat16 and device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        # torch has it, its stub does not.
        room = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        if room < WIDE_EIGHT_STREAMS:
            return f'8 streams of {dtype} take more shared memory than this GPU has; bf16 fits'
    return obstacle


@functools.cache
def _platform_obstacle(device: torch.device) -> str | None:
    # Asked of the module: its distribution has other names in some builds of torch.
    try:
        import triton
    except ModuleNotFoundError:
        return 'Triton is not installed (pip install triton)'
    except Exception as error:  # half an installation raises anything
        return f'Triton does not import: {type(error).__name__}: {str(error).splitlines()[:1]}'
    found = re.match(r'(\d+)\.(\d+)', triton.__version__)
    if found is None or tuple(map(int, found.groups())) < OLDEST_TRITON:
        wanted = '.'.join(map(str, OLDEST_TRITON))
        return f'Triton {triton.__version__} is older than {wanted} (pip install -U triton)'
    from megatron_mhc.kernels.triton.launch import interpreted

    if interpreted():
        return None if device.type == 'cpu' else 'TRITON_INTERPRET=1 is set (unset it)'
    if device.type == 'cpu':
        return 'the streams are on the CPU (TRITON_INTERPRET=1 interprets the kernels, slowly)'
    if device.type != 'cuda' or torch.version.hip:
        return f'the kernels are tested on NVIDIA GPUs only, not on {device.type}'
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f'{name} is sm_{capability[0]}{capability[1]}, older than sm_80'
    return None


@functools.cache
def _log_once(op: str, device: str, obstacle: str | None) -> None:
    if obstacle is None:
        logger.info('%s: Triton kernels', op)
    else:
        # On a GPU the reference is a loss that its user wants to know of.
        level = logging.INFO if device in ('cpu', 'meta') else logging.WARNING
        logger.log(level, '%s: torch reference, because %s', op, obstacle)
