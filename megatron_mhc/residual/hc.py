"""Hyper-connections, static and dynamic (HC, arXiv 2409.19606).

The paper stores A_r and mixes with its transpose; here H_res = A_r^T, so that both residual types
share one formula: x'[i] = sum_j H_res[i, j] x[j] + H_post[i] y. Then H_pre = A_m and H_post = B.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mhc.kernels.reference.precision import at_least_fp32, shown_overflow, without_autocast
from megatron_mhc.residual.hyper_connection import HyperConnection, MappingProjection, Maps
from megatron_mhc.settings.residual import ResidualConfig


class UnconstrainedHyperConnection(HyperConnection):
    """HC: static maps plus, when dynamic, s * tanh(norm(x[j]) W) of each stream j by itself.

    Args:
        normalization: ``LayerNorm`` or ``RMSNorm``, without gain or bias (W absorbs the gain); the
            model's own choice.
        norm_eps: its eps.
    """

    def __init__(
        self,
        hidden_size: int,
        residual: ResidualConfig,
        sublayer: int,
        sequence_parallel: bool = False,
        normalization: str = 'LayerNorm',
        norm_eps: float = 1e-5,
    ) -> None:
        self.normalization = normalization
        self.norm_eps = norm_eps
        super().__init__(hidden_size, residual, sublayer, sequence_parallel)

    @property
    def dynamic(self) -> bool:
        return self.residual.hc_variant == 'dynamic'

    def build_parameters(self) -> None:
        n = self.num_streams
        # static part, 1-D because the paper decays only the dynamic part: pre | post | res
        self.bias = nn.Parameter(torch.empty(n * n + 2 * n, dtype=torch.float32))
        if self.dynamic:
            # W_m | W_beta | W_r as rows; stream j's last n outputs are row j of A_r.
            self.mapping_proj = MappingProjection(n + 2, self.hidden_size)
            # The paper shares s_alpha between the two width connections A_m and A_r.
            self.alpha_width = nn.Parameter(torch.empty(1, dtype=torch.float32))
            self.alpha_depth = nn.Parameter(torch.empty(1, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A_m = e_home, B = 1, A_r = I, W = 0: a pre-norm residual network at step 0."""
        n = self.num_streams
        read = F.one_hot(torch.tensor(self.home, device='cpu'), n).float()
        write = torch.ones(n, device='cpu')
        self.bias.copy_(torch.cat([read, write, torch.eye(n, device='cpu').flatten()]))
        if self.dynamic:
            self.mapping_proj.weight.zero_()
            self.alpha_width.fill_(self.residual.init_gating_factor)
            self.alpha_depth.fill_(self.residual.init_gating_factor)

    def maps(self, x: Tensor) -> Maps:
        n = self.num_streams
        static = self.bias.expand(*x.shape[:-1], -1)
        packed = static + self._dynamic(x) if self.dynamic else static
        pre, post, res = packed.split([n, n, n * n], dim=-1)
        return pre, post, res.unflatten(-1, (n, n))

    def _dynamic(self, x: Tensor) -> Tensor:
        """The token-dependent part of pre | post | res, ``[..., n*n + 2n]``."""
        n = self.num_streams
        with without_autocast(x.device):
            streams = at_least_fp32(x).unflatten(-1, (n, self.hidden_size))
            norm = F.rms_norm if self.normalization == 'RMSNorm' else F.layer_norm
            normed = norm(streams, (self.hidden_size,), eps=self.norm_eps)
            normed = shown_overflow(normed, streams)
            h = F.linear(normed, self.mapping_proj())
            h = torch.tanh(h) if self.residual.hc_tanh else h
            pre, post, a_r = h.split([1, 1, n], dim=-1)
            scale = torch.cat(
                [
                    self.alpha_width.expand(n),
                    self.alpha_depth.expand(n),
                    self.alpha_width.expand(n * n),
                ]
            )
            h_res = a_r.transpose(-1, -2)
            return scale * torch.cat([pre.squeeze(-1), post.squeeze(-1), h_res.flatten(-2)], dim=-1)
