"""Gated residual: every channel of every stream is weighed by a gate of low rank (Qwen4-Exp).

With X the n streams of a token, N an RMSNorm of each stream by itself and v = vec(N(X))::

    A  = sigma(W_up silu(W_down v / n))          [n, C]
    u  = 1/n sum_i A_i * N(X)_i                  what F reads; it has no norm of its own
    X' = X + 2 sigma(W_write v / n)^T F(u)       a scalar a stream

The final norm is left out too: a last read, without W_write, makes one stream of n.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mhc import ops
from megatron_mhc.kernels.reference.precision import at_least_fp32, shown_overflow, without_autocast
from megatron_mhc.residual.hyper_connection import (
    HyperConnection,
    KeepFP32,
    MappingProjection,
    Maps,
    mark_parameters,
    require_width,
)
from megatron_mhc.residual.rerun import rerun
from megatron_mhc.settings.residual import ResidualConfig


def gates(
    x: Tensor, gain: Tensor, down: Tensor, up: Tensor, write: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates of some tokens, all in fp32 (fp64 stays).

    Args:
        x: streams ``[..., n*C]``.
        gain: of N, ``[n, C]``.
        down: ``[R, n*C]``; up: ``[n*C, R]``; write: ``[n, n*C]``, or ``[0, n*C]``.
        norm_eps: added to the mean square of a stream.

    Returns:
        A ``[..., n, C]``, N(X) ``[..., n, C]`` and H_post ``[..., n]``, or ``[..., 0]``.
    """
    n, hidden = gain.shape
    with without_autocast(x.device):
        streams = at_least_fp32(x).unflatten(-1, (n, hidden))
        normed = F.rms_norm(streams, (hidden,), eps=norm_eps) * gain
        normed = shown_overflow(normed, streams)
        v = normed.flatten(-2)
        inner = F.silu(F.linear(v, down) / n)
        a = torch.sigmoid(F.linear(inner, up)).unflatten(-1, (n, hidden))
        return a, normed, 2 * torch.sigmoid(F.linear(v, write) / n)


def _read(
    x: Tensor, gain: Tensor, down: Tensor, up: Tensor, write: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor]:
    a, normed, h_post = gates(x, gain, down, up, write, norm_eps)
    return (a * normed).mean(-2).to(x.dtype), h_post


class Gates(KeepFP32):
    """One read of n streams, and what is written after it.

    Args:
        hidden_size: C.
        residual: the settings.
        writes: how many streams are written: n, or 0 before the output layer.
        norm_eps: eps of the model's norms.
        std: of the projections, where they start as the model's linear layers do.
    """

    def __init__(
        self, hidden_size: int, residual: ResidualConfig, writes: int, norm_eps: float, std: float
    ) -> None:
        super().__init__()
        n, rank = residual.num_residual_streams, residual.gated_rank
        self.num_streams, self.hidden_size = n, hidden_size
        self.residual, self.norm_eps, self.std = residual, norm_eps, std
        # 1-D, hence never decayed.
        self.gain = nn.Parameter(torch.empty(n * hidden_size, dtype=torch.float32))
        self.down = MappingProjection(rank, n * hidden_size)
        self.up = MappingProjection(n * hidden_size, rank)
        self.write = MappingProjection(writes, n * hidden_size) if writes else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, home: int) -> None:
        """N(0, std) and gains of 1, as Qwen4-Exp starts in transformers; or as a pre-norm network.

        The latter has W_up = 0 and W_write = 0, so that gates are 1/2 and writes 1, and gains that
        sum to 2n, so that equal streams are read as one. Were they equal too, then all streams
        would get the same gradients, and stay copies: the home stream has n + 1, the others 1.
        """
        self.gain.fill_(1)
        for projection in filter(None, (self.down, self.up, self.write)):
            drawn = torch.empty(projection.weight.shape, dtype=torch.float32, device='cpu')
            projection.weight.copy_(drawn.normal_(0, self.std, generator=generator))
        if self.residual.gated_init == 'prenorm':
            self.gain.view(self.num_streams, -1)[home] = self.num_streams + 1
            for projection in filter(None, (self.up, self.write)):
                projection.weight.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Streams ``[..., n*C]`` -> u ``[..., C]`` in their type, and H_post ``[..., n]`` fp32."""
        read = functools.partial(_read, norm_eps=self.norm_eps)
        u, h_post = rerun(read, x, *self._weights())
        return u, h_post

    def mean_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., n]``: what a stream weighs in u, on average over its channels; and H_post."""
        a, _, h_post = gates(x, *self._weights(), norm_eps=self.norm_eps)
        return a.mean(-1) / self.num_streams, h_post

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        down = self.down()
        write = down[:0] if self.write is None else self.write()
        return self.gain.view(self.num_streams, -1), down, self.up(), write


class GatedConnection(HyperConnection):
    """The gated residual of one sublayer, of which ``read`` includes the norm; H_res = I.

    Args:
        norm_eps: eps of the model's norms; std: of the projections (``Gates``).
    """

    def __init__(
        self,
        hidden_size: int,
        residual: ResidualConfig,
        sublayer: int,
        sequence_parallel: bool = False,
        norm_eps: float = 1e-5,
        std: float = 0.02,
    ) -> None:
        self.norm_eps, self.std = norm_eps, std
        super().__init__(hidden_size, residual, sublayer, sequence_parallel)

    def build_parameters(self) -> None:
        sizes = self.hidden_size, self.residual, self.num_streams
        self.gates = Gates(*sizes, self.norm_eps, self.std)

    def reset_parameters(self) -> None:
        self.gates.reset_parameters(self.generator(), self.home)

    def read(self, x: Tensor) -> tuple[Tensor, ops.Carried]:
        u, h_post = self.gates(x)
        return u, ops.Carried(x, h_post, self._h_res(x), fused=False)

    def maps(self, x: Tensor) -> Maps:
        """For the monitors: the gates' means over the channels in place of H_pre."""
        return *self.gates.mean_gates(x), self._h_res(x)

    def _h_res(self, x: Tensor) -> Tensor:
        n = self.num_streams
        return torch.eye(n, device=x.device).expand(*x.shape[:-1], n, n)


class GatedMerge(Gates):
    """The last read, ``[..., n*C]`` -> ``[..., C]``, in place of the final norm."""

    def __init__(
        self,
        hidden_size: int,
        residual: ResidualConfig,
        sequence_parallel: bool = False,
        norm_eps: float = 1e-5,
        std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, residual, 0, norm_eps, std)
        # Sublayers count upwards from seed << 20, so the number below it is nobody else's.
        generator = torch.Generator(device='cpu').manual_seed((residual.seed << 20) - 1)
        self.reset_parameters(generator, home=0)
        mark_parameters(self, residual, sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        require_width(x, self.num_streams, self.hidden_size)
        u, _ = super().forward(x)
        return u
