"""The model that saved arguments describe, of either class, with local layers."""

from __future__ import annotations

import argparse
import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch

from megatron_mhc.convert.pattern import Pattern, parsed, pattern_of
from megatron_mhc.convert.saved_args import Described
from megatron_mhc.settings.residual import PAPER, ResidualConfig

if TYPE_CHECKING:
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

# One process, plain layers, every sum in fp32.
LOCAL = {
    'tensor_model_parallel_size': 1,
    'pipeline_model_parallel_size': 1,
    'virtual_pipeline_model_parallel_size': None,
    'pipeline_model_parallel_layout': None,
    'decoder_first_pipeline_num_layers': None,
    'decoder_last_pipeline_num_layers': None,
    'context_parallel_size': 1,
    'expert_model_parallel_size': 1,
    'expert_tensor_parallel_size': 1,
    'sequence_parallel': False,
    'transformer_impl': 'local',
    'use_cpu_initialization': True,
    'bf16': False,
    'fp16': False,
    'fp8': None,
    'fp4': None,
    'params_dtype': torch.float32,
    'no_persist_layer_norm': True,
    'gradient_accumulation_fusion': False,
    'masked_softmax_fusion': False,
    'bias_swiglu_fusion': False,
    'bias_dropout_fusion': False,
    'apply_rope_fusion': False,
    'moe_grouped_gemm': False,
    'moe_permute_fusion': False,
    'moe_token_dispatcher_type': 'allgather',
    'recompute_granularity': None,
    'recompute_modules': None,
    'overlap_moe_expert_parallel_comm': False,
    'delay_wgrad_compute': False,
    'tp_comm_overlap': False,
    'mtp_num_layers': None,
    'cuda_graph_impl': 'none',
    'enable_cuda_graph': False,
    'external_cuda_graph': False,
}


def residual_of(described: Described) -> ResidualConfig:
    """The connections of a model in one of the layouts, which are ours where ``maps`` says else."""
    if described.layout is None:
        return ResidualConfig('standard')
    # Their own numerics, or the paper's where ``maps`` and the merge are replaced anyway.
    own = described.layout.name == 'mhc'
    merge = 'learned' if described.learned else 'mean'
    return ResidualConfig(
        numerics=described.numerics if own else PAPER,
        num_residual_streams=described.num_streams,
        sinkhorn_iterations=described.iterations,
        stream_merge=None if described.single_pass else merge,
        single_pass=described.single_pass,
        manifold=described.layout.manifold,
        norm_eps=described.norm_eps,
        kernel_backend='torch',
    )


def build(
    args: argparse.Namespace, residual: ResidualConfig, prediction: bool = False
) -> LanguageModule:
    """A model of saved arguments, n streams if there are any.

    Args:
        prediction: with the layers of multi-token prediction, which logits of the next token do
            not need.
    """
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_mhc.mudd.layer import connect_densely
    from megatron_mhc.residual.block import widen_block

    depths = getattr(args, 'mtp_num_layers', None)
    args = copy.copy(args)
    for name, value in LOCAL.items():
        setattr(args, name, value)
    if prediction:
        args.mtp_num_layers = depths
    config = core_transformer_config_from_args(args)
    model = (_hybrid if pattern_of(args) else _gpt)(args, config, residual)
    if residual.residual_type == 'mudd':
        connect_densely(model.decoder, residual)
    elif residual.enabled:
        widen_block(model.decoder, residual)
    return model


def _gpt(args: argparse.Namespace, config: TransformerConfig, residual: ResidualConfig) -> GPTModel:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_decoder_layer_specs,
        get_gpt_mtp_block_spec,
    )

    from megatron_mhc.residual.spec import with_residual

    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=args.normalization
    )
    mtp_spec = None
    if args.mtp_num_layers:
        # Prediction layers keep the stock residual.
        layers = get_gpt_decoder_layer_specs(config, False, args.normalization)
        mtp_spec = get_gpt_mtp_block_spec(config, layers[-1], False)
    return GPTModel(
        config,
        with_residual(spec, residual),
        rope_scaling=args.use_rope_scaling,
        mtp_block_spec=mtp_spec,
        **_sizes(args),
    )


def _hybrid(args: argparse.Namespace, config: TransformerConfig, residual: ResidualConfig) -> Any:
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec

    from megatron_mhc.residual.spec import with_residual

    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:  # 0.17
        from megatron.core.models.mamba import MambaModel as HybridModel
    names = inspect.signature(HybridModel).parameters
    spec = next(name for name in names if name.endswith('_stack_spec'))
    pattern = parsed(str(pattern_of(args)))
    depths = pattern.depths[: args.mtp_num_layers or 0]
    # On the CPU device Megatron's stock spec gets local layers.
    return HybridModel(
        config,
        **{spec: with_residual(mamba_stack_spec, residual)},
        hybrid_layer_pattern=str(Pattern(pattern.layers, (len(pattern.layers),), depths)),
        **_sizes(args),
    )


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    return {
        'vocab_size': args.padded_vocab_size,
        'max_sequence_length': args.max_position_embeddings,
        'position_embedding_type': args.position_embedding_type,
        'rotary_percent': args.rotary_percent,
        'rotary_base': args.rotary_base,
        'share_embeddings_and_output_weights': not args.untie_embeddings_and_output_weights,
    }
