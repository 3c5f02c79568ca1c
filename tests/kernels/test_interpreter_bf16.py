"""The interpreter's repairs against torch, bit for bit."""

import numpy as np
import pytest
import torch
from truth import rounded_once

triton = pytest.importorskip('triton')
tl = triton.language

from megatron_mhc.kernels.triton.launch import Tile, launch  # noqa: E402

EDGES = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.0e38, 3.4e38, -3.4e38]
EDGES += [float('inf'), float('-inf'), float('nan'), 1e-45, -1e-40, 2.0**-126, 2.0**-133, 2.0**-134]


@triton.jit
def copy_kernel(source_ptr, target_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(source_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(target_ptr + at, value, mask=at < count)


def copied(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    target = source.new_empty(source.shape, dtype=dtype)
    block = 1 << (source.numel() - 1).bit_length()
    launch(copy_kernel, (1,), source, target, source.numel(), tile=Tile(1), BLOCK=block)
    return target


def bit_patterns() -> torch.Tensor:
    """fp32 values of any exponent, and the awkward ones."""
    bits = torch.randint(-(2**31), 2**31, (20000,), dtype=torch.int64).to(torch.int32)
    return torch.cat([bits.view(torch.float32), torch.tensor(EDGES)])


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    kind = torch.int16 if want.dtype.itemsize == 2 else torch.int32
    same = (got.view(kind) == want.view(kind)) | (got.isnan() & want.isnan())
    assert same.all()


def test_stores_round_to_nearest_even(device, random_seed):
    values = bit_patterns().to(device)
    assert_same_bits(copied(values, torch.bfloat16), values.bfloat16())


def test_stores_to_fp16_round_to_nearest_even(device, random_seed):
    values = (100 * torch.randn(20000)).to(device)
    assert_same_bits(copied(values, torch.float16), values.half())


def test_loads_are_exact(device):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert_same_bits(copied(every.to(device), torch.float32), every.float().to(device))


def test_conversions_against_torch(interpreter, random_seed):
    import interpreter_bf16

    values = bit_patterns()
    with np.errstate(all='ignore'):
        patterns = interpreter_bf16.to_bf16(values.numpy())
    rounded = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16)
    assert_same_bits(rounded, values.bfloat16())
    again = torch.from_numpy(interpreter_bf16.from_bf16(patterns).copy())
    assert_same_bits(again, values.bfloat16().float())


def test_fp64_is_rounded_once():
    """A value just above a tie: by way of fp32 it would become the tie, and go down to even."""
    signs = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    beside = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64) * 2.0**-40
    want = torch.tensor([1 + 2.0**-7, -1 - 2.0**-7, 1.0], dtype=torch.bfloat16)
    assert torch.equal(rounded_once(signs * (1 + 2.0**-8 + beside), torch.bfloat16), want)
