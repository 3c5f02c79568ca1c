"""Tests run anywhere: without CUDA, Megatron finds the emulated device."""

import os
import secrets

import pytest
import torch

from megatron_mhc import cpu_device

if not torch.cuda.is_available():
    cpu_device.install()


@pytest.fixture
def random_seed() -> int:
    """A fresh seed per run, printed when the test fails; REPEAT_SEED repeats one."""
    seed = int(os.environ.get('REPEAT_SEED') or secrets.randbits(32))
    print(f'REPEAT_SEED={seed}')
    torch.manual_seed(seed)
    return seed
