"""Single-pass mHC: a sublayer reads with the H_pre of the one before it (DeepSeek-V4.1)::

    X_{l+1} = H_res,l X_l + H_post,l^T F_l(H_pre,l-1 X_l)

The first sublayer reads stream 0, and the H_pre that the last one leaves merges the streams. What
F_l reads thus depends on no map of X_l itself, so that one pass over the streams can write X_l,
read it and project it. H_pre travels on the streams (``NEXT_PRE``), and in one tensor with them
(``message``) from one pipeline stage, or recomputed part, to the next. It cannot be computed again
there: it is a map of streams, and of a projection, that the sublayer before it had.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mhc import ops
from megatron_mhc.residual.attached import NEXT_PRE
from megatron_mhc.residual.message import pack, unpack
from megatron_mhc.residual.mhc import ManifoldHyperConnection
from megatron_mhc.settings.residual import ResidualConfig


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

    def received(self, x: Tensor) -> Tensor:
        return opened(x, self.residual, self.hidden_size)

    def hand_over(self, x: Tensor, carried: ops.Carried) -> Tensor:
        assert isinstance(carried, _CarriedWithRead)
        if self.ends_stage or (self.ends_checkpoint and self.training):
            return pack(x, carried.next_pre)
        NEXT_PRE.attach(x, carried.next_pre)
        return x


def start(x: Tensor, num_streams: int, in_message: bool = False) -> Tensor:
    """The expanded embedding ``[s, b, n*C]`` so that the first sublayer reads its stream 0."""
    first = torch.zeros(num_streams, device=x.device)
    first[0] = 1
    h_pre = first.expand(*x.shape[:-1], num_streams)
    if in_message:
        return pack(x, h_pre)
    NEXT_PRE.attach(x, h_pre)
    return x


def opened(x: Tensor, residual: ResidualConfig, hidden_size: int) -> Tensor:
    """Streams ``[..., n*C]`` of a message, which is as much wider as H_pre needs; others stay."""
    n = residual.streams
    if x.shape[-1] != n * hidden_size + residual.edge_values(x.dtype.itemsize):
        return x
    streams, h_pre = unpack(x, n, n * hidden_size)
    NEXT_PRE.attach(streams, h_pre)
    return streams


def hand_on(x: Tensor, changed: Tensor) -> None:
    """Streams that something beside the sublayers made of ``x`` are read with the same H_pre."""
    if (h_pre := NEXT_PRE.peek(x)) is not None:
        NEXT_PRE.attach(changed, h_pre)


def pre_for(x: Tensor) -> Tensor:
    """The H_pre ``[..., n]`` that came with the streams.

    Raises:
        RuntimeError: something between two sublayers replaced the tensor.
    """
    h_pre = NEXT_PRE.peek(x)
    if h_pre is None:
        raise RuntimeError(
            'the H_pre of the sublayer before did not arrive with the streams: something between '
            'two layers replaced the tensor, which --mhc-single-pass cannot follow'
        )
    return h_pre
