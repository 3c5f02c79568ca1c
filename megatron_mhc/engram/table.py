"""The tables of one layer as one matrix, whose rows the tensor-parallel ranks share."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mhc.engram.addresses import rows
from megatron_mhc.settings.engram import ROW_BLOCKS, EngramConfig


class EngramTable(VocabParallelEmbedding):
    """Megatron's vocabulary-parallel embedding with rows of n-grams in the place of tokens.

    Each rank looks up what it holds; a sum over the ranks, or with sequence parallelism a
    reduce-scatter over the tokens, completes the rows.

    Args:
        engram: the settings.
        layer: decoder layer, from 1.
        config: of the model.
        tp_group: the tensor-parallel ranks.
    """

    def __init__(
        self,
        engram: EngramConfig,
        layer: int,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(
            rows(engram),
            engram.row_width,
            init_method=lambda weight: weight,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=tp_group,
        )
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
        vectors = super().forward(found)
        if not self.reduce_scatter_embeddings:
            vectors = vectors.transpose(0, 1)
        return vectors.flatten(-2)
