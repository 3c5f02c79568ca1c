"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_mhc import ops
from megatron_mhc.hyper_connection import HyperConnection, MappingProjection, Maps, Pending

# Biases of the identity preset, home stream against the others. H_res = Sinkhorn(6I) has 0.993 on
# its diagonal; sigma(+-3) reads 0.95 of the home stream and 0.05 of each other one. H_post =
# 2 sigma(+-1) writes 1.46 and 0.54: streams must come to differ, or H_res gets no gradient at all.
IDENTITY_PRE = 3.0
IDENTITY_POST = 1.0
IDENTITY_RES = 6.0


class ManifoldHyperConnection(HyperConnection):
    """mHC: one projection of all n*C values of a token, then sigma, 2 sigma and Sinkhorn-Knopp."""

    def build_parameters(self) -> None:
        n, factor = self.num_streams, self.residual.init_gating_factor
        self.mapping_proj = MappingProjection(n * n + 2 * n, n * self.hidden_size)
        self.bias = nn.Parameter(torch.empty(n * n + 2 * n, dtype=torch.float32))
        self.alpha_pre = nn.Parameter(torch.full((1,), factor, dtype=torch.float32))
        self.alpha_post = nn.Parameter(torch.full((1,), factor, dtype=torch.float32))
        self.alpha_res = nn.Parameter(torch.full((1,), factor, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """phi Xavier-uniform; biases by preset; alpha = ``init_gating_factor``."""
        for alpha in (self.alpha_pre, self.alpha_post, self.alpha_res):
            alpha.fill_(self.residual.init_gating_factor)
        self.mapping_proj.reset_parameters(self.generator())
        self.bias.copy_(torch.cat(self._bias_preset()))

    def _bias_preset(self) -> list[Tensor]:
        n = self.num_streams
        if self.residual.init == 'uniform':
            return [torch.zeros(n * n + 2 * n, device='cpu')]
        home = torch.full((n,), -1.0, device='cpu')
        home[self.home] = 1.0
        res = IDENTITY_RES * torch.eye(n, device='cpu')
        return [IDENTITY_PRE * home, IDENTITY_POST * home, res.flatten()]

    def maps(self, x: Tensor) -> Maps:
        return ops.mapping(x, *self._parameters_of_mapping(), **self._settings())

    def read(self, x: Tensor) -> tuple[Tensor, ops.Carried]:
        if self.residual.fixed_mappings:
            return super().read(x)
        return ops.read(x, *self._parameters_of_mapping(), **self._settings())

    def joins(self, carried: ops.Carried) -> bool:
        fuses = self.residual.seam_fusion and not self.residual.fixed_mappings
        return carried.fused and fuses

    def write_read(self, pending: Pending) -> tuple[Tensor, Tensor, ops.Carried]:
        if not self.joins(pending.carried):
            return super().write_read(pending)
        return ops.write_read(
            *(pending.y, pending.carried, *self._parameters_of_mapping()),
            y_bias=pending.bias,
            dropout=pending.dropout,
            seed=pending.seed,
            **self._settings(),
        )

    def _parameters_of_mapping(self) -> tuple[Tensor, Tensor, Tensor]:
        alpha = torch.cat([self.alpha_pre, self.alpha_post, self.alpha_res])
        return self.mapping_proj(), self.bias, alpha

    def _settings(self) -> dict[str, object]:
        return {
            'num_streams': self.num_streams,
            'sinkhorn_iterations': self.residual.sinkhorn_iterations,
            'backend': self.residual.kernel_backend,
            'precision': self.residual.projection_precision,
        }
