"""Norms that a topology takes over: sublayers get what is normed, and have none in front.

Transformer Engine has most of them inside of the projection behind; that becomes its plain one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
)
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from torch import nn

# Of a transformer layer and of a Mamba layer: norm -> the sublayer behind it, in a spec.
SUBLAYERS = {'input_layernorm': 'self_attention', 'pre_mlp_layernorm': 'mlp', 'norm': 'mixer'}
# The first projection of a sublayer. Others may norm what is inside, as latents are.
_FIRST = ('linear_qkv', 'linear_fc1', 'in_proj')


def norms_left_out(submodules: Any) -> dict[str, Any]:
    """Fields of a layer's spec that leave out the norms in front of its sublayers.

    Raises:
        ValueError: a norm is nowhere to be found, hence part of something else.
    """
    left_out = {}
    for norm, name in SUBLAYERS.items():
        if not hasattr(submodules, norm) or _is_identity(getattr(submodules, name)):
            continue
        if not _is_identity(getattr(submodules, norm)):
            left_out[norm] = IdentityOp
            continue
        sublayer = _without_fused_norm(getattr(submodules, name))
        if sublayer is None:
            raise ValueError(
                f'--residual-type gated: the layer spec has no {norm} in front of its {name}, and '
                'none in a first projection that is known: a norm elsewhere would norm what the '
                "gates have weighed; use Megatron's local or Transformer Engine layers, or "
                '--residual-type mhc'
            )
        left_out[name] = sublayer
    return left_out


def leave_out_final_norm(block: nn.Module) -> nn.Module:
    """An identity in place of the final norm of a block or hybrid stack, which has one."""
    name = 'final_norm' if getattr(block, 'final_norm', None) is not None else 'final_layernorm'
    identity: nn.Module = IdentityOp()
    setattr(block, name, identity)
    return identity


def _without_fused_norm(sublayer: Any) -> Any:
    """The spec with a plain first projection; None where that has no norm."""
    # By release, an MLP is a ModuleSpec or a partial of its class.
    partial = isinstance(sublayer, functools.partial)
    parts: Any = (
        sublayer.keywords.get('submodules') if partial else getattr(sublayer, 'submodules', None)
    )
    fused = [
        name for name in _FIRST if getattr(parts, name, None) is TELayerNormColumnParallelLinear
    ]
    if not fused:
        return None
    plain = dataclasses.replace(parts, **dict.fromkeys(fused, TEColumnParallelLinear))
    if partial:
        return functools.partial(
            sublayer.func, *sublayer.args, **{**sublayer.keywords, 'submodules': plain}
        )
    return dataclasses.replace(sublayer, submodules=plain)


def _is_identity(spec: Any) -> bool:
    return getattr(spec, 'module', spec) in (IdentityOp, IdentityFuncOp)
