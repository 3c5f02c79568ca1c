"""Do two runs of a step leave the same bits?"""

from __future__ import annotations

import torch
from torch import Tensor


def first_difference(these: dict[str, Tensor], those: dict[str, Tensor]) -> str | None:
    """The first tensor whose bits differ, and by how much; None if all are equal."""
    for name in [*these, *(name for name in those if name not in these)]:
        if name not in these or name not in those:
            return f'{name}: only in one of them'
        a, b = these[name], those[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f'{name}: {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}'
        # As bytes, so that a NaN equals itself and 0 is not -0.
        different = (_bytes(a) != _bytes(b)).any(dim=1)
        if different.any():
            most = (a.double() - b.double()).abs().max().item()
            return f'{name}: {int(different.sum())} of {a.numel()} elements, by at most {most:.3g}'
    return None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1, 1).view(torch.uint8)
