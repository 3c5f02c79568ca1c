"""The tables of one layer as one matrix, whose rows ranks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding, all_to_all
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_mhc.engram.addresses import rows
from megatron_mhc.engram.tokens import own_share
from megatron_mhc.settings.engram import ROW_BLOCKS, EngramConfig


def shared_by_experts(config: TransformerConfig, groups: ProcessGroupCollection) -> bool:
    """Whether the ranks that share experts share the tables: where they are more than those of TP.

    With sequence parallelism they include the tensor-parallel ranks, or are included.
    """
    return config.expert_model_parallel_size > 1 and groups.tp_ep.size() > groups.tp.size()


class EngramTable(VocabParallelEmbedding):
    """Megatron's vocabulary-parallel embedding with rows of n-grams in the place of tokens.

    Tensor-parallel ranks have the same tokens: each looks up what it holds, and a sum, or with
    sequence parallelism a reduce-scatter over the tokens, completes the rows. Expert-parallel ranks
    have tokens of their own: each asks the holders for its rows (all-to-all, as for experts), and
    its gradients go back the same way.

    Args:
        engram: the settings.
        layer: decoder layer, from 1.
        config: of the model.
        groups: its ranks.
    """

    def __init__(
        self,
        engram: EngramConfig,
        layer: int,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        experts = shared_by_experts(config, groups)
        super().__init__(
            rows(engram),
            engram.row_width,
            init_method=lambda weight: weight,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=groups.tp_ep if experts else groups.tp,
        )
        self.experts, self.groups = experts, groups
        # Its gradient is complete on the rank that holds it, but for replicas of all that share.
        self.weight.allreduce = not experts
        # The only mark by which every release keeps a matrix from Muon, and its DDP buffer apart.
        # It means a learning rate of its own too, so --decoupled-lr is refused.
        self.weight.is_embedding_or_output_parameter = True
        self.reset_parameters((engram.seed << 32) + (layer << 16), config.init_method_std)

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float) -> None:
        """Normal values, drawn block by block, so that they do not depend on the ranks."""
        if self.weight.is_meta:
            return
        size = self.num_embeddings // ROW_BLOCKS
        first = self.vocab_start_index // size
        generator = torch.Generator(device=self.weight.device)
        for block, values in enumerate(self.weight.split(size), first):
            values.normal_(0.0, std, generator=generator.manual_seed(seed + block))

    def forward(self, found: Tensor) -> Tensor:
        """Rows ``[b, s, tables]`` -> what they hold, side by side: ``[s, b, d_mem]``.

        With sequence parallelism s in the result is this rank's share.
        """
        if self.experts:
            own = own_share(found.transpose(0, 1), self.groups.tp, self.config.sequence_parallel)
            return self._asked_for(own.flatten()).view(*own.shape[:-1], -1)
        vectors = super().forward(found)
        if not self.reduce_scatter_embeddings:
            vectors = vectors.transpose(0, 1)
        return vectors.flatten(-2)

    def _asked_for(self, found: Tensor) -> Tensor:
        """Rows ``[k]`` -> what their holders sent, ``[k, width]``; k may differ between ranks."""
        holders = found // self.num_embeddings_per_partition
        order = holders.argsort(stable=True)
        asks = holders.bincount(minlength=self.tp_group.size())
        answers = torch.empty_like(asks)
        dist.all_to_all_single(answers, asks, group=self.tp_group)
        sizes = answers.tolist(), asks.tolist()
        asked = all_to_all(self.tp_group, found[order], *sizes)
        held = functional.embedding(asked - self.vocab_start_index, self.weight)
        vectors: Tensor = all_to_all(self.tp_group, held, *reversed(sizes))
        return vectors.index_select(0, order.argsort())

    def sharded_state_dict(
        self,
        prefix: str = '',
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Megatron's, with the replicas of this rank's rows where experts share them."""
        if self.experts:
            metadata = {**(metadata or {}), 'dp_cp_group': self.groups.expt_dp}
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)
