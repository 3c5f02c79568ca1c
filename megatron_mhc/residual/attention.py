"""Attention Residuals in blocks (arXiv 2603.15031): a sublayer reads a softmax over block sums.

Outputs of sublayers add up within a block. With V_0 the embedding, V_1 ... the sums of the blocks
that have ended, V_k the running one, and N an RMSNorm without a gain::

    u    = sum_j softmax_j(q . N(V_j)) V_j
    V_k' = V_k + F(u), or F(u) alone where F is the first of a block

Each sublayer has a query q of its own, and so has the output layer. At q = 0 all weights are equal.
For the running sum it is a connection of one stream whose H_res is 1, or 0 where a block begins.
The sums of ended blocks travel on the running one (``BLOCK_SUMS``), and in one tensor with it from
one pipeline stage, or recomputed part, to the next.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mhc import ops
from megatron_mhc.kernels.reference.precision import at_least_fp32, shown_overflow, without_autocast
from megatron_mhc.residual.attached import BLOCK_SUMS
from megatron_mhc.residual.hyper_connection import (
    HyperConnection,
    KeepFP32,
    Maps,
    mark_parameters,
)
from megatron_mhc.residual.rerun import rerun
from megatron_mhc.settings.residual import ResidualConfig

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class _CarriedWithSums(ops.Carried):
    """``ops.Carried`` of the running sum, with those of the blocks before it."""

    ended: tuple[Tensor, ...]


def sublayers_of(config: TransformerConfig) -> int:
    """Sublayers of the whole model: in a hybrid one each layer is one."""
    number: int = config.num_layers
    return number if getattr(config, 'is_hybrid_model', False) else 2 * number


def block_sums_of(config: TransformerConfig, residual: ResidualConfig) -> int:
    """Sums in a message between two stages of this model; 0 of another topology."""
    if residual.residual_type != 'attention':
        return 0
    return residual.block_sums(sublayers_of(config))


def message(sums: Sequence[Tensor], places: int) -> Tensor:
    """All sums, ``[..., places * C]``, with zeros for the blocks that have yet to begin."""
    given = torch.cat([*sums], -1)
    missing = (places - len(sums)) * sums[0].shape[-1]
    return F.pad(given, (0, missing)) if missing else given


def attend(query: Tensor, *sums: Tensor, norm_eps: float) -> tuple[Tensor]:
    """``sum_j softmax_j(q . N(V_j)) V_j`` in fp32 (fp64 stays), one source after the other.

    Args:
        query: q ``[C]``; sums: V_j, each ``[..., C]``.
        norm_eps: of N.

    Returns:
        ``[..., C]`` in the type of the last one.
    """
    with without_autocast(query.device):
        logits = []
        for source in map(at_least_fp32, sums):
            normed = F.rms_norm(source, source.shape[-1:], eps=norm_eps)
            logits.append((shown_overflow(normed, source) * query).sum(-1, keepdim=True))
        weights = torch.cat(logits, -1).softmax(-1)
        total = torch.zeros_like(at_least_fp32(sums[-1]))
        for weight, source in zip(weights.split(1, -1), sums, strict=True):
            total = total + weight * at_least_fp32(source)
        return (total.to(sums[-1].dtype),)


class Reader(KeepFP32):
    """A query, and what it reads.

    Args:
        hidden_size: C.
        residual: the settings.
        sublayer: how many sublayers were written before.
        sublayers: of the whole model.
        norm_eps: eps of the model's norms.
    """

    def __init__(
        self,
        hidden_size: int,
        residual: ResidualConfig,
        sublayer: int,
        sublayers: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.hidden_size, self.norm_eps = hidden_size, norm_eps
        self.size, self.done = residual.attention_block_size, sublayer
        self.places = residual.block_sums(sublayers)
        # 1-D, hence never decayed. Where there is one source its gradient is 0.
        self.query = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))

    @property
    def ended(self) -> int:
        """How many sums there are beside the running one."""
        return -(-self.done // self.size)

    def opened(self, x: Tensor) -> Tensor:
        """The running sum ``[..., C]`` of a message ``[..., places * C]``; others stay.

        Raises:
            RuntimeError: a running sum came without the others.
        """
        if x.shape[-1] == self.places * self.hidden_size:
            sums: tuple[Tensor, ...] = x.split(self.hidden_size, -1)[: self.ended + 1]
            running = sums[-1]
            BLOCK_SUMS.attach(running, sums[:-1])
            return running
        if self.ended and BLOCK_SUMS.peek(x) is None:
            raise RuntimeError(
                'the sums of earlier blocks did not arrive with the hidden states: something '
                'between two layers replaced the tensor, which --residual-type attention cannot '
                'follow'
            )
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Running sum ``[..., C]`` -> u ``[..., C]``, and the sums of the blocks that ended."""
        ended = BLOCK_SUMS.peek(x) or ()
        (u,) = rerun(functools.partial(attend, norm_eps=self.norm_eps), self.query, *ended, x)
        return u, ended


class BlockAttention(HyperConnection):
    """What a sublayer reads of the block sums, and where it is added.

    Args:
        sublayers: of the whole model; norm_eps: eps of the model's norms.
    """

    def __init__(
        self,
        hidden_size: int,
        residual: ResidualConfig,
        sublayer: int,
        sequence_parallel: bool = False,
        sublayers: int = 1,
        norm_eps: float = 1e-5,
    ) -> None:
        self.sublayers, self.norm_eps = sublayers, norm_eps
        super().__init__(hidden_size, residual, sublayer, sequence_parallel)

    def build_parameters(self) -> None:
        sizes = self.hidden_size, self.residual, self.sublayer
        self.reader = Reader(*sizes, self.sublayers, self.norm_eps)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.reader.query)

    @property
    def begins(self) -> bool:
        """Whether this sublayer is the first of its block."""
        return self.sublayer % self.reader.size == 0

    def received(self, x: Tensor) -> Tensor:
        return self.reader.opened(x)

    def read(self, x: Tensor) -> tuple[Tensor, ops.Carried]:
        u, ended = self.reader(x)
        _, h_post, h_res = self.maps(x)
        carried = _CarriedWithSums(x, h_post, h_res, fused=False)
        carried.ended = (*ended, x) if self.begins else ended
        return u, carried

    def maps(self, x: Tensor) -> Maps:
        one = torch.ones(1, device=x.device).expand(*x.shape[:-1], 1)
        kept = torch.full((1, 1), float(not self.begins), device=x.device)
        return one, one, kept.expand(*x.shape[:-1], 1, 1)

    def hand_over(self, x: Tensor, carried: ops.Carried) -> Tensor:
        assert isinstance(carried, _CarriedWithSums)
        if self.ends_stage or (self.ends_checkpoint and self.training):
            return message((*carried.ended, x), self.reader.places)
        BLOCK_SUMS.attach(x, carried.ended)
        return x


class AttentionMerge(Reader):
    """The last read, of all sums, just before the final norm."""

    def __init__(
        self,
        hidden_size: int,
        residual: ResidualConfig,
        sublayers: int,
        sequence_parallel: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, residual, sublayers, sublayers, norm_eps)
        mark_parameters(self, residual, sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        u, _ = super().forward(self.opened(x))
        return u
