"""What one layer reads from its memory: gate, value and convolution (Engram, section 2)."""

from __future__ import annotations

import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from megatron_mhc.engram.generation import LayerCache
from megatron_mhc.engram.table import EngramTable
from megatron_mhc.kernels.reference.precision import shown_overflow
from megatron_mhc.settings.engram import CONVOLUTION_WIDTH, EngramConfig


class EngramLayer(MegatronModule):
    """Adds to each of n residual streams what the n-grams of a token retrieve.

    With e the retrieved vectors of a token and h one of its streams::

        alpha = sigmoid(RMSNorm(h) . RMSNorm(W_K e) / sqrt(C))      W_K of the stream's own
        u     = alpha W_V e                                         W_V shared by all streams
        h'    = h + u + SiLU(conv(RMSNorm(u)))                      depthwise, causal, dilated

    W_V and the convolution start at 0, so that h' = h exactly. The convolution is the paper's zero;
    W_V is ours, and has a gradient from the first step on.

    Args:
        engram: the settings.
        layer: decoder layer, from 1.
        num_streams: n.
        config: of the model.
        groups: its ranks.
    """

    def __init__(
        self,
        engram: EngramConfig,
        layer: int,
        num_streams: int,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.engram, self.tp_group = engram, groups.tp
        self.streams = (num_streams, config.hidden_size)
        wide, dtype = num_streams * config.hidden_size, config.params_dtype
        self.table = EngramTable(engram, layer, config, groups)
        self.key = nn.Parameter(torch.empty(wide, engram.dim, dtype=dtype))
        self.value = nn.Parameter(torch.zeros(config.hidden_size, engram.dim, dtype=dtype))
        self.hidden_norm = nn.Parameter(torch.ones(wide, dtype=dtype))
        self.key_norm = nn.Parameter(torch.ones(wide, dtype=dtype))
        self.convolution_norm = nn.Parameter(torch.ones(wide, dtype=dtype))
        # Tap j reads the token j * dilation before. Three axes, so that Muon leaves it to Adam.
        taps = torch.zeros(CONVOLUTION_WIDTH, *self.streams, dtype=dtype)
        self.convolution = nn.Parameter(taps)
        self.reset_parameters((engram.seed << 32) + (layer << 16) - 1)
        for name, parameter in self.named_parameters():
            if not name.startswith('table.'):
                # Each tensor-parallel rank sees its own tokens, so that gradients are summed.
                parameter.sequence_parallel = config.sequence_parallel

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """W_K normal with the model's std, drawn on the CPU and not from the model's own stream."""
        generator = torch.Generator(device='cpu').manual_seed(seed)
        values = torch.empty(self.key.shape, device='cpu')
        self.key.copy_(values.normal_(0.0, self.config.init_method_std, generator=generator))

    def forward(
        self, x: Tensor, found: Tensor, positions: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        """The streams with what was retrieved added.

        Args:
            x: streams ``[s, b, n*C]``, with sequence parallelism this rank's share of s.
            found: rows of the tables, ``[b, s, tables]``, of the whole sequence.
            positions: place of each token of ``x`` in its document, ``[s, b]``.
            cache: in inference, where earlier tokens are in it alone.
        """
        retrieved = self.table(found)
        value = functional.linear(retrieved, self.value).unsqueeze(-2)
        key = self._by_stream(functional.linear(retrieved, self.key))
        match = self._norm(self._by_stream(x), self.hidden_norm) * self._norm(key, self.key_norm)
        gate = torch.sigmoid(match.sum(-1, keepdim=True) / math.sqrt(self.streams[1]))
        gated = gate * value
        normed = self._norm(gated, self.convolution_norm).to(value.dtype)
        added = gated + functional.silu(self._convolve(normed, positions, cache))
        return x + added.flatten(-2).to(x.dtype)

    def _by_stream(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.streams)

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """RMSNorm of each stream by itself, at least in fp32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = functional.rms_norm(wide, x.shape[-1:], eps=self.config.layernorm_epsilon)
        return shown_overflow(normed, wide) * self._by_stream(gain)

    def _convolve(self, x: Tensor, positions: Tensor, cache: LayerCache | None) -> Tensor:
        """``out[t] = sum_j taps[j] x[t - j * dilation]`` within the document of t."""
        reach = self.engram.reach
        read = None if cache is None else cache.read
        preceding = self._preceding(x) if read is None else self._by_stream(read)
        before, length = torch.cat([preceding, x]), x.shape[0]
        if cache is not None:
            cache.keep(before[-reach:].flatten(-2))
        total = self.convolution[0] * x
        for tap in range(1, CONVOLUTION_WIDTH):
            back = tap * self.engram.dilation
            earlier = before[reach - back : reach - back + length]
            there = (positions >= back)[..., None, None]
            total = total + self.convolution[tap] * torch.where(there, earlier, 0)
        return total

    def _preceding(self, x: Tensor) -> Tensor:
        """The ``reach`` tokens before ``x``; before the first one anything, as none is read."""
        reach = self.engram.reach
        if not self.config.sequence_parallel or self.tp_group.size() == 1:
            return x.new_zeros(reach, *x.shape[1:])
        if x.shape[0] < reach:
            raise ValueError(
                f'--sequence-parallel leaves {x.shape[0]} tokens to a rank, and the convolution of '
                f'--engram-layers reads the {reach} before; use fewer tensor-parallel ranks'
            )
        # The last tokens of all ranks: a fraction of what gathering the sequence would move. The
        # first rank takes part too, or its neighbours would wait for it in the backward.
        ends = gather_from_sequence_parallel_region(x[-reach:].contiguous(), group=self.tp_group)
        rank = self.tp_group.rank()
        return ends.view(-1, reach, *x.shape[1:])[rank - 1]
