"""The dropout mask of F_post,res: Philox 4x32-10 (Salmon et al., SC'11), the same on every path.

The mask depends on the seed and the position alone, so backward draws it again instead of saving
it, and the torch path and the kernels drop the same elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def dropout_seed(device: torch.device) -> Tensor:
    """A ``[1]`` int64 seed from the device's ambient generator, left on the device.

    Megatron's random-state tracker and recomputation replay that generator, and so the mask.
    """
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def dropout_constants(p: float) -> tuple[int, float]:
    """``(threshold, scale)``: an element stays where the upper 24 bits of its word reach the first.

    An integer, because p rounded to fp32 and to fp64 would not always keep the same elements.
    """
    return round(p * 2**24), 1 / (1 - p)


def dropout_scale_ref(tokens: int, channels: int, p: float, seed: Tensor) -> Tensor:
    """0 where an element is dropped, else 1 / (1 - p), in fp32.

    Args:
        tokens: T; channels: C.
        p: probability of dropping, 0 <= p < 1.
        seed: ``[1]`` int64.

    Returns:
        ``[T, C]`` on the device of the seed.
    """
    groups = (channels + 3) // 4
    counter = torch.arange(tokens * groups, device=seed.device, dtype=torch.int64)
    zero = torch.zeros_like(counter)
    words = [counter & _WORD, counter >> 32, zero, zero]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(_ROUNDS):
        # A 32 x 32 product may wrap the sign of int64; its bits are still those of the product.
        low, high = (m * word for m, word in zip(_MULTIPLIERS, words[::2], strict=True))
        words = [
            ((high >> 32) & _WORD) ^ words[1] ^ key[0],
            high & _WORD,
            ((low >> 32) & _WORD) ^ words[3] ^ key[1],
            low & _WORD,
        ]
        key = [(k + step) & _WORD for k, step in zip(key, _KEY_STEPS, strict=True)]
    random = torch.stack(words, dim=-1).view(tokens, groups * 4)[:, :channels]
    threshold, scale = dropout_constants(p)
    # Not where(..., scale, 0.0): that would round the scale to torch's default dtype.
    return ((random >> 8) >= threshold).float() * scale
