"""The kernel that the indexer of sparse attention calls, in plain torch, for the emulated device.

The package ``fast_hadamard_transform`` needs CUDA, and Megatron calls it with bf16 alone. For
function, not speed: any floating type, with sums in fp32, or in fp64 for inputs in fp64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mhc.runtime.cpu_ssd import exact


def rotate_activation(x: Tensor) -> Tensor:
    """``H x / sqrt(d)`` along the last dimension; H is the Hadamard matrix in Sylvester's order.

    Args:
        x: [..., d]. Where d is no power of two, zeros follow up to the next one, and of the result
            the first d values are kept.

    Returns:
        [..., d] in the type of ``x``; an orthogonal map where d is a power of two.
    """
    size = x.shape[-1]
    width = 1 << (size - 1).bit_length()
    values = F.pad(exact(x), (0, width - size))
    half = 1
    while half < width:
        # H of 2k is [[H, H], [H, -H]] of k: sums and differences of neighbouring halves.
        first, second = values.unflatten(-1, (-1, 2, half)).unbind(-2)
        values = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half *= 2
    return (values[..., :size] / math.sqrt(size)).to(x.dtype)
