"""Does a step compute the same bits when the device is waited for after every operation?

If not, some stream read a tensor before it was written or after its memory was given away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def compare_with_synchronous(run: Callable[[bool], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Run a step as it is, then synchronously, and compare every bit.

    Args:
        run: ``run(synchronous)`` does one step and returns its losses and gradients by name. Both
            calls must start from the same state; what the first returns must not be overwritten by
            the second.

    Returns:
        What the synchronous run returned.

    Raises:
        RuntimeError: they differ; names the first tensor that does.
    """
    usual = run(False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    synchronous = run(True)
    difference = first_difference(usual, synchronous)
    if difference is not None:
        raise RuntimeError(
            f'{difference}: a step differs from the same step with full synchronisation; a stream '
            'read or freed a tensor too early, or the step is not deterministic'
        )
    return synchronous


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
