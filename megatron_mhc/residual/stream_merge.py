"""The two ends of the widened residual stream: one stream to n, and n to one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_mhc import ops
from megatron_mhc.kernels.numerics import NUMERICS
from megatron_mhc.kernels.reference import merge_gates_as, scaled_projection_ref
from megatron_mhc.kernels.reference.precision import at_least_fp32
from megatron_mhc.residual.hyper_connection import (
    KeepFP32,
    MappingProjection,
    mark_parameters,
    require_width,
)
from megatron_mhc.residual.single_pass import opened, pre_for
from megatron_mhc.residual.start import STARTS, mean_logit
from megatron_mhc.settings.residual import ResidualConfig


def expand_streams(x: Tensor, num_streams: int) -> Tensor:
    """Replicate ``[s, b, C]`` into n equal streams ``[s, b, n*C]``."""
    return x.repeat(*(1,) * (x.dim() - 1), num_streams)


class StreamMerge(KeepFP32):
    """n streams ``[..., n*C]`` -> ``[..., C]``, just before the final norm.

    ``mean``, ``sum`` and ``pre``, the last sublayer's H_pre, have no parameters. ``learned``
    weighs each stream by sigma(alpha * (v phi) / r + b), computed from all streams of the token as
    mHC's own maps are (the head of DeepSeek-V4).

    Args:
        hidden_size: C; residual: the settings.
        sequence_parallel: as for a ``HyperConnection``.
        model_eps: of the model's norms, which Megatron-LM's dev branch has in this merge too.
    """

    def __init__(
        self,
        hidden_size: int,
        residual: ResidualConfig,
        sequence_parallel: bool = False,
        model_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.model_eps = model_eps
        self.residual = residual
        self.num_streams = residual.num_residual_streams
        self.hidden_size = hidden_size
        if residual.stream_merge == 'learned':
            n = self.num_streams
            self.mapping_proj = MappingProjection(n, n * hidden_size)
            self.bias = nn.Parameter(torch.empty(n, dtype=torch.float32))
            self.alpha = nn.Parameter(torch.empty(1, dtype=torch.float32))
            self.reset_parameters()
        mark_parameters(self, residual, sequence_parallel)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """phi Xavier-uniform, b = 0, alpha = ``init_gating_factor``: about half the sum.

        Under ``--mhc-init mean-reads`` b is the logit of 1/n: about the mean.
        """
        # Sublayers count upwards from seed << 20, so the number below it is nobody else's.
        generator = torch.Generator(device='cpu').manual_seed((self.residual.seed << 20) - 1)
        self.mapping_proj.reset_parameters(generator)
        start = STARTS[self.residual.init]
        self.bias.fill_(mean_logit(self.num_streams) if start.mean else 0.0)
        self.alpha.fill_(self.residual.init_gating_factor)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.residual
        if residual.single_pass:
            x = opened(x, residual, self.hidden_size)
        require_width(x, self.num_streams, self.hidden_size)
        if residual.stream_merge == 'learned':
            scale = self.alpha.expand(self.num_streams)
            theirs = NUMERICS[residual.numerics].merge_eps == 'model'
            eps = self.model_eps if theirs else residual.norm_eps
            logits = scaled_projection_ref(x, self.mapping_proj(), self.bias, scale, eps)
            gates = merge_gates_as(logits, self.model_eps, residual.numerics)
            return ops.pre(x, gates, backend=residual.kernel_backend)
        if residual.single_pass:
            return ops.pre(x, pre_for(x), backend=residual.kernel_backend)
        streams = at_least_fp32(x).unflatten(-1, (self.num_streams, self.hidden_size))
        total: Tensor = streams.sum(dim=-2)
        if residual.stream_merge == 'mean':
            total = total / self.num_streams
        return total.to(x.dtype)
