"""Build a recipe's model with Megatron, on the meta device, and count what it really has."""

from __future__ import annotations

import argparse
import tempfile
from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_mhc.recipes.recipe import SEGMENT_RECOMPUTE, AnyRecipe, Flags, recipe_flags, words
from megatron_mhc.settings.flags_engram import engram_config_from_args
from megatron_mhc.settings.flags_residual import residual_config_from_args
from megatron_mhc.settings.model_config import ENGRAM, RESIDUAL
from megatron_mhc.settings.residual import ResidualConfig
from megatron_mhc.sizing.memory import Layout

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

# For one rank, and for a machine that has not every kernel.
_STANDS_IN = str.maketrans({'M': '-', 'G': '-', 'D': '-', '|': None})
ARCHITECTURE = ('MODEL_ARGS', 'MOE_ARGS', 'RESIDUAL_ARGS')


def built_summary(recipe: AnyRecipe, residual: str | ResidualConfig = 'mhc') -> dict[str, int]:
    """``total``, ``active`` and ``mhc`` (as ``model_size.summary``) of the model that is built.

    For a process that does nothing else: it chooses the device and opens process groups of its own.

    Raises:
        RuntimeError: Megatron-Core is absent or out of range.
    """
    from megatron_mhc.bootstrap import prepare

    prepare('auto')
    from megatron.core import parallel_state, tensor_parallel

    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{folder}/store', rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        try:
            args = recipe_arguments(recipe, residual)
            return counted(build(args), args)
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def recipe_arguments(
    recipe: AnyRecipe, residual: str | ResidualConfig = 'mhc'
) -> argparse.Namespace:
    """The recipe's flags, as far as they shape the model, through Megatron's parser and checks."""
    topics = recipe_flags(recipe, Layout(1), residual)
    given = {name: value for topic in ARCHITECTURE for name, value in topics.get(topic, {}).items()}
    # Nothing runs, so nothing is recomputed; expert by expert the parameters are the same.
    for name in (*SEGMENT_RECOMPUTE, 'moe-grouped-gemm'):
        given.pop(name, None)
    return model_arguments(given, recipe.vocab)


def model_arguments(flags: Flags, vocab: int) -> argparse.Namespace:
    """Megatron's arguments on one rank, for local layers, with ``vocab`` as the padded size."""
    args = parsed([word for line in words(flags) for word in line])
    args.padded_vocab_size = vocab
    return args


def parsed(line: list[str], kind: type = argparse.ArgumentParser) -> argparse.Namespace:
    """A command line through Megatron's parser, of class ``kind``, and its checks on one rank.

    Nothing runs: a hybrid pattern is checked with MLPs in place of layers that need CUDA, as one
    stage wherever it ends some, and without prediction layers.
    """
    from megatron.training import arguments

    aside = kind(add_help=False, allow_abbrev=False)
    aside.add_argument('--hybrid-layer-pattern')
    known, line = aside.parse_known_args(line)
    pattern = known.hybrid_layer_pattern
    if pattern:
        plain = pattern.partition('/')[0].translate(_STANDS_IN)
        line = [*line, f'--hybrid-layer-pattern={plain}']

    local = {
        'micro-batch-size': 1,
        'transformer-impl': 'local',
        'use-cpu-initialization': True,
        'no-persist-layer-norm': True,
        'no-gradient-accumulation-fusion': True,
    }
    parser = arguments.add_megatron_arguments(kind(allow_abbrev=False))
    args: argparse.Namespace = parser.parse_args(
        [*line, *(word for flag in words(local) for word in flag)]
    )
    args.rank, args.world_size = 0, 1
    args = arguments.validate_args(args)
    args.hybrid_layer_pattern = pattern
    return args


def build(args: argparse.Namespace, stack: ModuleSpec | None = None) -> nn.Module:
    """The model of ``args`` with parameters that have a shape and no memory.

    Args:
        args: through Megatron's checks.
        stack: layers of a hybrid model; None for Megatron's own.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.mamba import MambaModel
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    RESIDUAL.attach(config, residual_config_from_args(args))
    ENGRAM.attach(config, engram_config_from_args(args))
    sizes = {
        'vocab_size': args.padded_vocab_size,
        'max_sequence_length': args.max_position_embeddings,
        'position_embedding_type': args.position_embedding_type,
        'share_embeddings_and_output_weights': not args.untie_embeddings_and_output_weights,
    }
    with torch.device('meta'):
        if args.hybrid_layer_pattern:
            sizes['hybrid_layer_pattern'] = args.hybrid_layer_pattern.replace('|', '')
            # From 0.18 on an older name of ``HybridModel``.
            model: nn.Module = MambaModel(config, stack or mamba_stack_spec, **sizes)
            return model
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=args.normalization
        )
        model = GPTModel(config, spec, **sizes)
        return model


def counted(model: nn.Module, args: argparse.Namespace) -> dict[str, int]:
    """Count the parameters of a whole model by their names."""
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def having(*parts: str) -> int:
        return sum(count for name, count in counts.items() if any(part in name for part in parts))

    total, idle = sum(counts.values()), 0
    if args.num_experts:
        per_expert = having('.experts.') // args.num_experts
        idle = per_expert * (args.num_experts - args.moe_router_topk)
    # A tied matrix is the output layer's, which a token does use.
    tied = not args.untie_embeddings_and_output_weights
    embedding = having('position_embeddings' if tied else 'embedding.', '.table.')
    mhc = having('hyper_connection.', 'stream_merge.')
    return {'total': total, 'active': total - embedding - idle, 'mhc': mhc}
