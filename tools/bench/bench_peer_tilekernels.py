"""DeepSeek's TileKernels (TileLang): release 1 end to end, release 2 kernel by kernel.

Mapping of semantics: streams ``[T, 1, n, C]`` (ours, viewed), maps with a last axis of 1. Its
Sinkhorn ends on columns and its H_res is applied transposed, so the rows of the projection that
belong to res are put in transposed order outside the timed region, and it computes our function.
H_post factor 2 and the epsilons are arguments. Only n = 4 works.

Release 2 took the projection and all autograd wrappers out, so only its kernels of F_pre,
F_post,res and Sinkhorn can be timed; the small autograd functions around them are ours.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.kernels.peers.contender import EPS, Contender, transposed_square


def _release(wanted: int) -> tuple[bool, str]:
    for module in ('tile_kernels', 'tilelang'):
        if importlib.util.find_spec(module) is None:
            return False, f'{module} is not installed; pip install tile-kernels=={wanted}.*'
    if not torch.cuda.is_available():
        return False, 'TileLang kernels need a GPU'
    found = version('tile-kernels')
    return found.split('.')[0] == str(wanted), f'tile-kernels {found}'


class _TileKernels(Contender):
    """Layout of both releases."""

    def unsupported(self) -> str:
        if self.case.streams != 4:
            return 'only 4 streams'
        if self.case.dtype != 'bf16':
            return 'only bf16'
        return 'C must be a multiple of 128' if self.case.hidden % 128 else ''

    def streams(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.case.streams, self.case.hidden))

    def streams_back(self, x: Tensor) -> Tensor:
        return x.flatten(-2)

    def gate(self, h: Tensor) -> Tensor:
        return h.unsqueeze(-1)

    def gate_back(self, h: Tensor) -> Tensor:
        return h.squeeze(-1)

    def square(self, h: Tensor) -> Tensor:
        return h.transpose(-1, -2)

    square_back = square

    def params(self, weight: Tensor, bias: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        weight, bias = (transposed_square(p, self.case.streams) for p in (weight, bias))
        return weight, bias, alpha

    params_back = params


class TileKernels(_TileKernels):
    """Release 1, whole sublayer: its own autograd functions, gradients of x added in place.

    Backward of F_post,res parks its gradient on the storage of x and the other two add to it; that
    is only right when all three run, so single ops use the variants that do not park.
    """

    name = 'tilekernels'

    @classmethod
    def available(cls) -> tuple[bool, str]:
        return _release(1)

    def sinkhorn(self, logits: Tensor) -> Tensor:
        from tile_kernels.modeling.mhc.ops import sinkhorn_normalize

        return sinkhorn_normalize(logits, repeat=self.case.iterations, eps=EPS)

    def mapping(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._maps(x, params, adds_in_place=False)

    def _maps(
        self, x: Tensor, params: tuple[Tensor, ...], adds_in_place: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        from tile_kernels.modeling.mhc.ops import mhc_pre_norm_fn, mhc_pre_split_mixes

        weight, bias, alpha = params
        mixes = mhc_pre_norm_fn(x, weight, None, EPS, fuse_grad_acc=adds_in_place)
        h_pre, h_post, logits = mhc_pre_split_mixes(mixes, alpha, bias, self.case.streams, 2.0, EPS)
        return h_pre, h_post, self.sinkhorn(logits)

    def pre(self, x: Tensor, h_pre: Tensor) -> Tensor:
        from tile_kernels.modeling.mhc.ops import mhc_pre_apply_mix

        return mhc_pre_apply_mix(x, h_pre)

    def post(self, x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        from tile_kernels.modeling.mhc.ops import mhc_post

        return mhc_post(y, x, h_post, h_res)

    def read(self, x: Tensor, params: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        h_pre, h_post, h_res = self._maps(x, params, adds_in_place=True)
        return self.pre(x, h_pre), (x, h_post, h_res)

    def fused_edge(
        self, y: Tensor, state: Any, params: tuple[Tensor, ...], within: bool
    ) -> tuple[Tensor, Tensor]:
        x_new = self.write(y, state)
        return x_new, self.pre(x_new, self._maps(x_new, params, adds_in_place=False)[0])


class TileKernelsPerOp(_TileKernels):
    """Release 2, single kernels."""

    name = 'tilekernels-2'
    without = ('sublayer', 'layer', 'fused_edge', 'mapping')

    @classmethod
    def available(cls) -> tuple[bool, str]:
        return _release(2)

    def sinkhorn(self, logits: Tensor) -> Tensor:
        return _Sinkhorn.apply(logits, self.case.iterations)

    def pre(self, x: Tensor, h_pre: Tensor) -> Tensor:
        return _Pre.apply(x, h_pre)

    def post(self, x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        return _Post.apply(y, x, h_post, h_res)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        from tile_kernels.mhc import mhc_sinkhorn_fwd

        flat = logits.flatten(0, 1)
        out = torch.empty_like(flat)
        mhc_sinkhorn_fwd(flat, out, iterations, EPS)
        ctx.save_for_backward(flat)
        ctx.iterations = iterations
        return out.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        from tile_kernels.mhc import mhc_sinkhorn_bwd

        (flat,) = ctx.saved_tensors
        out = torch.empty_like(flat)
        mhc_sinkhorn_bwd(grad.flatten(0, 1), flat, out, ctx.iterations, EPS)
        return out.view_as(grad), None


class _Pre(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h_pre: Tensor) -> Tensor:
        from tile_kernels.mhc import mhc_pre_apply_mix_fwd

        u = torch.empty_like(x[..., 0, :])
        mhc_pre_apply_mix_fwd(x.flatten(0, 1), h_pre.flatten(0, 1).squeeze(-1), u.flatten(0, 1))
        ctx.save_for_backward(x, h_pre)
        return u

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        from tile_kernels.mhc import mhc_pre_apply_mix_bwd

        x, h_pre = ctx.saved_tensors
        # Its kernel adds to the gradient of x.
        d_x = torch.zeros_like(x)
        d_pre = mhc_pre_apply_mix_bwd(
            grad.flatten(0, 1), x.flatten(0, 1), h_pre.flatten(0, 1).squeeze(-1), d_x.flatten(0, 1)
        )
        return d_x, d_pre.view_as(h_pre)


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        from tile_kernels.mhc import mhc_post_fwd

        ctx.save_for_backward(y, x, h_post, h_res)
        return mhc_post_fwd(y, x, h_post, h_res)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        from tile_kernels.mhc import mhc_post_bwd

        return mhc_post_bwd(*ctx.saved_tensors, grad)
