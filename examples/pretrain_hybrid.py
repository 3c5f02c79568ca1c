"""Pretrain a hybrid model with Megatron-Core's own training loop, as ``pretrain_gpt.py`` does.

``--hybrid-layer-pattern`` names its layers, one symbol each (``*`` attention, ``-`` MLP, ``E``
experts, ``M`` Mamba, ``G`` gated delta net), and ``|`` ends a pipeline stage:

    torchrun --nproc-per-node 8 examples/pretrain_hybrid.py --hybrid-layer-pattern 'M-M-M*-' ...
"""

from inspect import signature

from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args
from pretrain_gpt import main

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ImportError:  # 0.17
    from megatron.core.models.mamba import MambaModel as HybridModel


def model_provider(
    pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None
):
    """Build this pipeline stage's part of the model."""
    args = get_args()
    stack = mamba_stack_spec if args.spec is None else import_module(args.spec)
    # The stack spec has another name in 0.17.
    name = next(name for name in signature(HybridModel).parameters if name.endswith('_stack_spec'))
    return HybridModel(
        config=config or core_transformer_config_from_args(args),
        **{name: stack},
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        hybrid_layer_pattern=args.hybrid_layer_pattern,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


if __name__ == '__main__':
    main(model_provider)
