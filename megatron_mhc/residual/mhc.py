"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880)."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn

from megatron_mhc import ops
from megatron_mhc.kernels.numerics import PAPER
from megatron_mhc.kernels.reference.conventions import gates_as
from megatron_mhc.kernels.reference.mapping import scaled_projection_ref
from megatron_mhc.kernels.reference.precision import without_autocast
from megatron_mhc.manifolds import registry
from megatron_mhc.manifolds.manifold import Manifold
from megatron_mhc.residual.hyper_connection import HyperConnection, MappingProjection, Maps, Pending
from megatron_mhc.residual.start import STARTS


class _Settings(TypedDict):
    num_streams: int
    sinkhorn_iterations: int
    norm_eps: float
    backend: str
    precision: str


class ManifoldHyperConnection(HyperConnection):
    """mHC: one projection of all n*C values of a token, then sigma, 2 sigma and the manifold.

    Sinkhorn-Knopp, the paper's manifold, is part of the fused ops; with another one they take H_res
    as an input.
    """

    def build_parameters(self) -> None:
        n, factor = self.num_streams, self.residual.init_gating_factor
        rows = self.manifold.num_logits + 2 * n
        self.mapping_proj = MappingProjection(rows, n * self.hidden_size)
        self.bias = nn.Parameter(torch.empty(rows, dtype=torch.float32))
        self.alpha_pre = nn.Parameter(torch.full((1,), factor, dtype=torch.float32))
        self.alpha_post = nn.Parameter(torch.full((1,), factor, dtype=torch.float32))
        # One that no logit needs would never get a gradient.
        if self.manifold.num_logits:
            self.alpha_res = nn.Parameter(torch.full((1,), factor, dtype=torch.float32))

    @property
    def manifold(self) -> Manifold:
        return registry.load(self.residual.manifold, self.num_streams)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As ``--mhc-init`` says; phi Xavier-uniform or 0, alpha = ``init_gating_factor``."""
        for alpha in self._alphas():
            alpha.fill_(self.residual.init_gating_factor)
        start = STARTS[self.residual.init]
        if start.exact:
            self.mapping_proj.weight.zero_()
        else:
            self.mapping_proj.reset_parameters(self.generator())
        self.bias.copy_(start.bias(self.home, self.manifold))

    @property
    def fuses(self) -> bool:
        """Whether the ops that contain Sinkhorn compute these maps."""
        settings = self.residual
        plain = settings.manifold == 'sinkhorn' and settings.numerics == PAPER
        return plain and not settings.fixed_mappings

    def maps(self, x: Tensor) -> Maps:
        if self.residual.manifold == 'sinkhorn':
            numerics = self.residual.numerics
            parameters = self._parameters_of_mapping()
            return ops.mapping(x, *parameters, **self._settings(), numerics=numerics)
        pre, post, res = self._logits(x)
        with without_autocast(x.device):
            return *gates_as(pre, post, self.residual.numerics), self.manifold.matrix(res)

    def res_logits(self, x: Tensor) -> Tensor | None:
        manifold, fixed = self.manifold, 'res' in self.residual.fixed_mappings
        # One stream has H_res = 1; angles have a gradient wherever they are.
        free = self.num_streams > 1 and manifold.num_logits and manifold.doubly_stochastic
        return self._logits(x)[2] if free and not fixed else None

    def projected(self, logits: Tensor) -> Tensor:
        if self.residual.manifold != 'sinkhorn':
            return self.manifold.matrix(logits)
        n, settings = self.num_streams, self.residual
        return ops.sinkhorn(
            logits.unflatten(-1, (n, n)),
            settings.sinkhorn_iterations,
            backend=settings.kernel_backend,
            numerics=settings.numerics,
        )

    def read(self, x: Tensor) -> tuple[Tensor, ops.Carried]:
        if not self.fuses:
            return super().read(x)
        return ops.read(x, *self._parameters_of_mapping(), **self._settings())

    def joins(self, carried: ops.Carried) -> bool:
        return carried.fused and self.residual.edge_fusion and self.fuses

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

    def _logits(self, x: Tensor) -> Maps:
        """Of pre, post and res: ``[..., n]``, ``[..., n]`` and ``[..., K]``."""
        sizes = [self.num_streams, self.num_streams, self.manifold.num_logits]
        parts = zip(self._alphas(), sizes, strict=False)
        scale = torch.cat([alpha.expand(size) for alpha, size in parts])
        logits = scaled_projection_ref(
            x, self.mapping_proj(), self.bias, scale, self.residual.norm_eps
        )
        pre, post, res = logits.split(sizes, dim=-1)
        return pre, post, res

    def _alphas(self) -> list[Tensor]:
        present = [self.alpha_pre, self.alpha_post, getattr(self, 'alpha_res', None)]
        return [alpha for alpha in present if alpha is not None]

    def _parameters_of_mapping(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        return self.mapping_proj(), self.bias, self._alphas()

    def _settings(self) -> _Settings:
        return {
            'num_streams': self.num_streams,
            'sinkhorn_iterations': self.residual.sinkhorn_iterations,
            'norm_eps': self.residual.norm_eps,
            'backend': self.residual.kernel_backend,
            'precision': self.residual.projection_precision,
        }
