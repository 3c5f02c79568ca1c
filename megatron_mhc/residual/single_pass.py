"""Single-pass mHC: a sublayer reads with the H_pre of the one before it (DeepSeek-V4.1)::

    X_{l+1} = H_res,l X_l + H_post,l^T F_l(H_pre,l-1 X_l)

The first sublayer reads stream 0, and the H_pre that the last one leaves merges the streams. What
F_l reads thus depends on no map of X_l itself, so that one pass over the streams can write X_l,
read it and project it. H_pre travels as an attribute of the streams, hence one pipeline stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mhc import ops
from megatron_mhc.residual.mhc import ManifoldHyperConnection


class _CarriedWithRead(ops.Carried):
    """``ops.Carried`` with the H_pre ``[..., n]`` that the next sublayer reads with."""

    next_pre: Tensor


class SinglePassHyperConnection(ManifoldHyperConnection):
    """mHC whose H_pre belongs to the sublayer after it."""

    # The fused ops read with the maps of the same streams.
    fuses = False

    def read(self, x: Tensor) -> tuple[Tensor, ops.Carried]:
        h_pre, h_post, h_res = self.all_maps(x)
        u = ops.pre(x, pre_for(x), backend=self.residual.kernel_backend)
        carried = _CarriedWithRead(x, h_post, h_res, fused=False)
        carried.next_pre = h_pre
        return u, carried

    def hand_over(self, x: Tensor, carried: ops.Carried) -> None:
        assert isinstance(carried, _CarriedWithRead)
        x.__dict__['mhc_next_pre'] = carried.next_pre


def start(x: Tensor, num_streams: int) -> None:
    """Let the first sublayer read stream 0 of the expanded embedding ``[s, b, n*C]``."""
    first = torch.zeros(num_streams, device=x.device)
    first[0] = 1
    x.__dict__['mhc_next_pre'] = first.expand(*x.shape[:-1], num_streams)


def hand_on(x: Tensor, changed: Tensor) -> None:
    """Streams that something beside the sublayers made of ``x`` are read with the same H_pre."""
    if 'mhc_next_pre' in x.__dict__:
        changed.__dict__['mhc_next_pre'] = x.__dict__['mhc_next_pre']


def pre_for(x: Tensor) -> Tensor:
    """The H_pre ``[..., n]`` that came with the streams.

    Raises:
        RuntimeError: something between two sublayers replaced the tensor.
    """
    carried: Tensor | None = x.__dict__.get('mhc_next_pre')
    if carried is None:
        raise RuntimeError(
            'the H_pre of the sublayer before did not arrive with the streams: something between '
            'two layers replaced the tensor, which --mhc-single-pass cannot follow'
        )
    return carried
