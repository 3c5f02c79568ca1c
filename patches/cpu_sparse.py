"""Patches of the emulated CPU device: sparse attention (``D``) with Megatron's local layers.

Megatron's own layer stays. Its indexer is given a linear layer that every tensor-parallel rank has
whole, for which Megatron has Transformer Engine's alone, and its rotation in plain torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.runtime.cpu_hadamard import rotate_activation

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig


class ReplicatedLinear(nn.Linear):
    """``x W^T``, whole on every tensor-parallel rank, called as Megatron calls linear layers."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool = False,
        parallel_mode: str = 'duplicated',
        **options: object,
    ) -> None:
        """``options`` say what this layer does not have: bias that is added later, no weight.

        Raises:
            ValueError: it is to be split, to have a bias, or to be without a weight.
        """
        if bias or parallel_mode != 'duplicated' or any(options.values()):
            raise ValueError(
                f'a linear layer of sparse attention with bias={bias}, parallel_mode='
                f'{parallel_mode}, {options}: on the CPU device it is whole on every rank, without '
                'bias; use a Megatron-Core that `megatron-mhc doctor` knows'
            )
        nn.Module.__init__(self)
        self.in_features, self.out_features = input_size, output_size
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.register_parameter('bias', None)
        if config.perform_initialization:
            init_method(self.weight.data)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


def local_sparse_layer(stock: ModuleSpec, norm: Any) -> ModuleSpec:
    """The spec of ``D`` with local layers in place of Transformer Engine's.

    Args:
        stock: Megatron's.
        norm: in front of attention.
    """
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    attention = stock.submodules.self_attention
    core = attention.submodules.core_attention
    linear = dict.fromkeys(('linear_wq_b', 'linear_wk', 'linear_weights_proj'), ReplicatedLinear)
    # Megatron's indexer has a layer norm, whatever the model has.
    k_norm = LocalSpecProvider().layer_norm(rms_norm=False)
    core = with_parts(core, indexer=with_parts(core.submodules.indexer, k_norm=k_norm, **linear))
    projections = [name for name in vars(attention.submodules) if name.startswith('linear_')]
    split: dict[str, Any] = dict.fromkeys(projections, ColumnParallelLinear)
    split['linear_proj'] = RowParallelLinear
    attention = with_parts(attention, core_attention=core, **split)
    return with_parts(stock, input_layernorm=norm, self_attention=attention)


def with_parts(spec: ModuleSpec, **parts: Any) -> ModuleSpec:
    """``spec`` with other submodules of these names."""
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **parts))


def _in_torch(original: Callable[..., Any]) -> Callable[..., Any]:
    del original

    def rotate(x, *args, **kwargs):
        return rotate_activation(x)

    return rotate


CPU_SPARSE_PATCHES = (
    Patch(
        id='cpu-sparse-rotation',
        target='megatron.core.transformer.experimental_attention_variant.dsa:rotate_activation',
        wrap=_in_torch,
        reason='it takes bf16 alone, and the package fast_hadamard_transform, which needs CUDA',
        fingerprints=on_every_release('adf3ddcb'),
        reads=('x',),
    ),
)
