"""Patches of the emulated CPU device: the hybrid stack with Megatron's local layers.

Megatron has hybrid stack specs for Transformer Engine alone. On the CPU its stock spec is replaced
by one of the same layers without it, wherever a script or builder took it from; a spec of one's own
stays. Weights have the same names in checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_mhc.patches.cpu_pattern import announce_slow_layers
from megatron_mhc.patches.cpu_sparse import local_sparse_layer, with_parts
from megatron_mhc.patches.engine import Patch, on_every_release
from megatron_mhc.patches.hybrid_model import HYBRID_MODEL_PATCHES, stack_spec_name

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig


def local_submodules(stock: Any, config: TransformerConfig) -> Any:
    """The layer specs of a stack with local layers in place of Transformer Engine's.

    Args:
        stock: the submodules of Megatron's stack spec.
        config: the model's, for its normalization.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    layer = functools.partial(get_gpt_layer_local_spec, normalization=config.normalization)

    def only(spec: ModuleSpec, whole: ModuleSpec, *names: str, **options: Any) -> ModuleSpec:
        kept = {name: getattr(whole.submodules, name) for name in names}
        return dataclasses.replace(spec, submodules=type(spec.submodules)(**kept, **options))

    attention = ('input_layernorm', 'self_attention', 'self_attn_bda')
    mlp = ('pre_mlp_layernorm', 'mlp', 'mlp_bda')

    # Where Transformer Engine's norm is part of the projection, names in checkpoints say so.
    def fused(name: str, projection: str) -> dict[str, Any]:
        return {'sharded_state_dict_keys_map': {f'{name}.': f'{projection}.layer_norm_'}}

    norm = layer().submodules.input_layernorm
    linear = {'in_proj': ColumnParallelLinear, 'out_proj': RowParallelLinear}
    layers = {
        'mamba_layer': with_parts(
            stock.mamba_layer,
            norm=norm,
            mixer=with_parts(stock.mamba_layer.submodules.mixer, **linear),
            **fused('norm', 'mixer.in_proj'),
        ),
        'gdn_layer': with_parts(
            stock.gdn_layer,
            input_layernorm=norm,
            self_attention=with_parts(
                stock.gdn_layer.submodules.self_attention, out_norm=norm, **linear
            ),
            **fused('input_layernorm', 'self_attention.in_proj'),
        ),
        'attention_layer': only(
            stock.attention_layer,
            layer(),
            *attention,
            **fused('input_layernorm', 'self_attention.linear_qkv'),
        ),
        'mlp_layer': only(
            stock.mlp_layer, layer(), *mlp, **fused('pre_mlp_layernorm', 'mlp.linear_fc1')
        ),
        # Any number: the layer takes that of its config.
        'moe_layer': only(stock.moe_layer, layer(num_experts=8), *mlp),
    }
    if hasattr(stock, 'mla_layer'):
        latent = layer(multi_latent_attention=True)
        layers['mla_layer'] = only(stock.mla_layer, latent, *attention)
    if hasattr(stock, 'dsa_layer'):
        layers['dsa_layer'] = local_sparse_layer(stock.dsa_layer, norm)
    return dataclasses.replace(
        stock, **layers, mtp_block_spec=_local_prediction(stock.mtp_block_spec)
    )


def _local_prediction(stock: ModuleSpec) -> ModuleSpec:
    """Prediction layers with a local projection; their stack is made of the layers above."""
    from megatron.core.models.backends import LocalSpecProvider

    linear = LocalSpecProvider().column_parallel_linear()
    return with_parts(
        stock,
        layer_specs=[with_parts(spec, eh_proj=linear) for spec in stock.submodules.layer_specs],
    )


def _with_local_layers(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    spec_name = stack_spec_name(signature)

    def __init__(self, *args, **kwargs):
        # The name under which every release has it.
        from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec

        bound = signature.bind(self, *args, **kwargs)
        spec, config = bound.arguments[spec_name], bound.arguments['config']
        # By its submodules, which an n-stream form of it shares.
        stock = spec.submodules is mamba_stack_spec.submodules
        if stock and config.transformer_impl == 'local':
            announce_slow_layers(bound.arguments.get('hybrid_layer_pattern'))
            local = local_submodules(spec.submodules, config)
            bound.arguments[spec_name] = dataclasses.replace(spec, submodules=local)
        original(*bound.args, **bound.kwargs)

    return __init__


def _local_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    def new(cls, config, hidden_size, eps=1e-5, *args, **kwargs):
        from megatron.core.models.backends import LocalSpecProvider

        if config.transformer_impl != 'local':
            return original(cls, config, hidden_size, eps, *args, **kwargs)
        local = LocalSpecProvider().layer_norm(rms_norm=config.normalization == 'RMSNorm')
        return local(config=config, hidden_size=hidden_size, eps=eps)

    return new


CPU_HYBRID_PATCHES = (
    *(
        dataclasses.replace(
            patch,
            id=f'cpu-{patch.id}',
            wrap=_with_local_layers,
            reason="Megatron's stack specs are made of Transformer Engine's layers",
        )
        for patch in HYBRID_MODEL_PATCHES
    ),
    Patch(
        id='cpu-hybrid-norm',
        target='megatron.core.extensions.transformer_engine:TENorm.__new__',
        wrap=_local_norm,
        reason="a hybrid stack builds Transformer Engine's norm itself",
        fingerprints=on_every_release('143447d6'),
        reads=('config', 'hidden_size', 'eps'),
    ),
)
