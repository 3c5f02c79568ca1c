"""Layer specs of the tests of block recompute."""

from __future__ import annotations

import dataclasses


def moe_spec(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=False)


def split_spec(config):
    """Attention and MLP in layers of their own."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    whole = get_gpt_layer_local_spec()

    def without(*names):
        gone = {name: IdentityFuncOp if name.endswith('bda') else IdentityOp for name in names}
        submodules = dataclasses.replace(whole.submodules, **gone)
        return ModuleSpec(module=whole.module, submodules=submodules)

    attention = without('pre_mlp_layernorm', 'mlp', 'mlp_bda')
    mlp = without('input_layernorm', 'self_attention', 'self_attn_bda')
    return TransformerBlockSubmodules(
        layer_specs=[attention, mlp, mlp], layer_norm=whole.submodules.input_layernorm
    )
