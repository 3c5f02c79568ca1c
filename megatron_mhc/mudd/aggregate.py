"""After a layer: each way of the next one as a weighed sum of all outputs so far (MUDD)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mhc.kernels.reference.precision import at_least_fp32, shown_overflow, without_autocast
from megatron_mhc.mudd.sizes import WAYS
from megatron_mhc.residual.hyper_connection import KeepFP32, MappingProjection


class WeighedSum(torch.autograd.Function):
    """``sum_j weights[..., w, j] * history[j]`` for every way w, accumulated in fp32.

    By hand, since autograd would keep an fp32 copy of every output for every later layer; here
    backward needs the outputs themselves, which are alive anyway, and the weights.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *history: Tensor) -> tuple[Tensor, ...]:
        """weights ``[..., ways, j]``, history j times ``[..., C]`` -> ways times ``[..., C]``."""
        ctx.save_for_backward(weights, *history)
        results = []
        for way in weights.unbind(-2):
            total = at_least_fp32(history[0]) * way[..., :1]
            for j, output in enumerate(history[1:], 1):
                total.addcmul_(output.to(total.dtype), way[..., j : j + 1])
            results.append(total.to(history[0].dtype))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        weights, *history = ctx.saved_tensors
        grad_weights = torch.empty_like(weights)
        grad_history = []
        for j, output in enumerate(history):
            wide = at_least_fp32(output)
            total = torch.zeros_like(wide)
            for w, grad in enumerate(grads):
                grad = grad.to(wide.dtype)
                grad_weights[..., w, j] = (grad * wide).sum(-1)
                total.addcmul_(grad, weights[..., w, j : j + 1])
            grad_history.append(total.to(output.dtype))
        return grad_weights, *grad_history


class DenseAggregate(KeepFP32):
    """The weights after one block: A(x) = GELU(RMSNorm(x) W1) W2 + a, or a alone (``static``).

    The norm has no gain. At the start W2 = 0 and a picks the newest output, so the model is the
    plain transformer.

    Args:
        hidden_size: C.
        layer: number of the block that it follows, from 1; a layer of a GPT model is one.
        ways: how many sums it makes, ``WAYS`` or the residual alone.
        dynamic: whether the weights depend on the token.
        norm_eps: of the norm.
        seed: of W1; equal on all ranks, and no draw from the model's stream.
        sequence_parallel: mark the parameters for Megatron's sum over tensor-parallel ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        layer: int,
        ways: int,
        dynamic: bool,
        norm_eps: float,
        seed: int,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        self.layer, self.ways, self.dynamic, self.norm_eps = layer, ways, dynamic, norm_eps
        self.seed = seed
        outputs, inner = ways * (layer + 1), len(WAYS) * (layer + 1)
        # 1-D: never decayed, and Adam's under Muon.
        self.bias = nn.Parameter(torch.empty(outputs, dtype=torch.float32))
        if dynamic:
            self.projection_in = MappingProjection(inner, hidden_size)
            self.projection_out = MappingProjection(outputs, inner)
        self.reset_parameters()
        for parameter in self.parameters():
            # Megatron's mark, which no class declares.
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W1 ~ N(0, 1/C), W2 = 0, a = 1 on the newest output and 0 on the others."""
        newest = torch.zeros(self.ways, self.layer + 1, device='cpu')
        newest[:, -1] = 1
        self.bias.copy_(newest.flatten())
        if self.dynamic:
            weight = self.projection_in.weight
            generator = torch.Generator(device='cpu').manual_seed((self.seed << 20) + self.layer)
            drawn = torch.empty(weight.shape, dtype=torch.float32, device='cpu')
            weight.copy_(drawn.normal_(0, weight.shape[1] ** -0.5, generator=generator))
            self.projection_out.weight.zero_()

    def forward(self, history: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All outputs so far ``[..., C]``, the newest last -> one ``[..., C]`` for each way."""
        newest = history[-1]
        with without_autocast(newest.device):
            weights = self.bias.to(at_least_fp32(newest[..., :0]).dtype)
            if self.dynamic:
                x = at_least_fp32(newest)
                h = shown_overflow(F.rms_norm(x, x.shape[-1:], eps=self.norm_eps), x)
                h = F.gelu(F.linear(h, self.projection_in().to(x.dtype)))
                weights = weights + F.linear(h, self.projection_out().to(x.dtype))
            weights = weights.expand(*newest.shape[:-1], -1)
            weights = weights.unflatten(-1, (self.ways, -1))
            sums: tuple[Tensor, ...] = WeighedSum.apply(weights, *history)
            return sums
