"""Gradient norms of the mapping parameters, wherever Megatron keeps the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_mhc.residual.hyper_connection import HyperConnection


class MappingGradients:
    """Reads ``main_grad`` after its reduction over data-parallel and tensor-parallel ranks.

    Every rank counts its share: with the distributed optimizer the part of a gradient that was
    reduced on it, else the whole divided by the number of ranks that hold the same.

    Args:
        chunks: the model chunks, as Megatron wraps them.
        connections: the modules whose parameters are meant, one entry of the result each.
    """

    def __init__(self, chunks: Sequence[nn.Module], connections: Sequence[HyperConnection]) -> None:
        self._parameters = [list(connection.parameters()) for connection in connections]
        self._shards = {}
        for group in (g for chunk in chunks for g in getattr(chunk, 'bucket_groups', ())):
            if not group.ddp_config.use_distributed_optimizer:
                continue
            rank = group.intra_distributed_optimizer_instance_rank
            size = group.intra_distributed_optimizer_instance_size
            for bucket in group.buckets:
                length = bucket.grad_data.numel() // size
                for parameter, (start, end) in bucket.param_to_index.items():
                    low = max(start, rank * length) - start
                    high = min(end, (rank + 1) * length) - start
                    self._shards[parameter] = low, max(low, high), size

    @torch.no_grad()
    def squares(self) -> Tensor | None:
        """``[S]`` fp64, this rank's share of the squared norms; None without sublayers."""
        holders = parallel_state.get_tensor_model_parallel_world_size()
        holders *= parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        rows, parts, shares = [], [], []
        for row, parameters in enumerate(self._parameters):
            for parameter in parameters:
                gradient = getattr(parameter, 'main_grad', parameter.grad)
                if gradient is None:
                    continue
                low, high, size = self._shards.get(parameter, (0, gradient.numel(), 1))
                if low == high:
                    continue
                rows.append(row)
                parts.append(gradient.reshape(-1)[low:high])
                shares.append(size / holders)
        if not self._parameters:
            return None
        device = self._parameters[0][0].device if self._parameters[0] else torch.device('cpu')
        squares = torch.zeros(len(self._parameters), dtype=torch.float64, device=device)
        if parts:
            norms = torch.stack(torch._foreach_norm(parts)).double()
            owned = torch.tensor(shares, dtype=torch.float64, device=device)
            squares.index_add_(0, torch.tensor(rows, device=device), norms.square() * owned)
        return squares
