"""The kernels run on the GPU where there is one, else in Triton's interpreter on the CPU."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from megatron_mhc.runtime import cpu_device

# What these tests share stands in modules beside them; pytest imports tests by path.
sys.path.append(str(Path(__file__).parent))

INTERPRETED = False
if importlib.util.find_spec('triton'):
    from megatron_mhc.kernels.triton.launch import interpreted

    INTERPRETED = interpreted()


@pytest.fixture(scope='session')
def device() -> torch.device:
    """Where kernels run; skips without Triton, and where it is set to compile but has no GPU."""
    pytest.importorskip('triton')
    if not INTERPRETED and cpu_device.is_installed():
        pytest.skip('no GPU, and TRITON_INTERPRET is off')
    return torch.device('cpu' if INTERPRETED else 'cuda')


@pytest.fixture(scope='session')
def interpreter(device) -> None:
    """For tests that look into the interpreter."""
    if not INTERPRETED:
        pytest.skip('needs TRITON_INTERPRET=1')
