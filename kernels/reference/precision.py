"""The working precision of the mapping: fp32, or fp64 where the caller already is."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """``tensor`` in fp32, or unchanged when it is fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def shown_overflow(normed: Tensor, x: Tensor) -> Tensor:
    """``normed``, a norm of x over its last axis, with NaN where fp32 cannot hold the squares.

    Divided by the root of inf they are zeros, which would pass for maps, weights or gates that do
    not depend on the token.
    """
    overflowed = x.detach().square().sum(-1, keepdim=True).isinf()
    return normed.masked_fill(overflowed, torch.nan)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which a surrounding autocast region cannot lower the precision."""
    if device.type == 'meta':
        # It has no autocast, and torch refuses to switch it off.
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)
