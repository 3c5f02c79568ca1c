"""Hybrid models with local layers, and the weights of a GPT model in one of them."""

from __future__ import annotations

import re

import torch
from block_models import SMALL
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_mhc import ResidualConfig, compat

SEQUENCE, VOCABULARY = 16, 64
PLAIN = {**SMALL, 'is_hybrid_model': True, 'transformer_impl': 'local'}


def hybrid_class():
    """The class under the name that 0.17 has for it, or the later one."""
    return MambaModel if compat.core_minor(compat.core_version()) == '0.17' else MambaModel.__base__


def has_symbols(pattern: str) -> bool:
    """Whether this release has all layers of ``pattern``; latent attention comes with 0.19."""
    return '+' not in pattern or hasattr(mamba_stack_spec.submodules, 'mla_layer')


def hybrid_model(
    pattern: str,
    residual: dict | None = None,
    spec=mamba_stack_spec,
    on_config: dict | None = None,
    position_embedding_type='learned_absolute',
    **settings,
):
    """A model of ``pattern`` in this world of one.

    ``settings`` are the config's, ``on_config`` what a caller puts on it beside them.
    """
    torch.manual_seed(5)
    # Parts of a mixer are drawn from it.
    model_parallel_cuda_manual_seed(5)
    kind = MLATransformerConfig if set('+D') & set(pattern) else TransformerConfig
    main, *predicted = pattern.replace('|', '').split('/')
    counts = {'num_layers': len(main), 'mtp_num_layers': len(predicted) or None}
    config = kind(**{**counts, **PLAIN, **settings})
    if residual is not None:
        config.residual_config = ResidualConfig(**residual)
    for name, value in (on_config or {}).items():
        setattr(config, name, value)
    return hybrid_class()(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        hybrid_layer_pattern=pattern,
        position_embedding_type=position_embedding_type,
    )


def in_hybrid(layer: int) -> int:
    """The hybrid layer of the attention in GPT layer ``layer``, both from 1."""
    return 2 * layer - 1


def name_in_hybrid(name: str) -> str:
    """Where a pattern of ``*-`` or ``*E`` for each layer has the parameter ``name`` of a GPT model.

    Layer i is the layers 2i, its attention, and 2i + 1, its MLP, and its memory that of the former;
    the final norm has another name. A prediction layer holds one such pair.
    """

    def layer(found: re.Match[str]) -> str:
        own = found[3].startswith(('mlp', 'pre_mlp'))
        place = int(found[2] or 0)
        return f'{found[1]}.layers.{2 * place + own}.{found[3]}'

    name = re.sub(r'(decoder)\.layers\.(\d+)\.(.*)', layer, name)
    name = re.sub(r'(.*mtp_model_layer)()\.(.*)', layer, name)
    name = re.sub(r'(?<=engram\.layer_)(\d+)', lambda n: str(in_hybrid(int(n[0]))), name)
    return name.replace('decoder.final_layernorm.', 'decoder.final_norm.')


@torch.no_grad()
def take_weights(hybrid, gpt) -> None:
    """Give ``hybrid`` the weights of ``gpt``; each has exactly those of the other."""
    own = dict(hybrid.named_parameters())
    given = {name_in_hybrid(name): weight for name, weight in gpt.named_parameters()}
    assert own.keys() == given.keys()
    for name, weight in given.items():
        own[name].copy_(weight)
