"""Norms that a topology takes over: sublayers get what is normed, and have none in front."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from torch import nn

# Of a transformer layer and of a Mamba layer: norm -> the sublayer behind it, in a spec.
SUBLAYERS = {'input_layernorm': 'self_attention', 'pre_mlp_layernorm': 'mlp', 'norm': 'mixer'}


def norms_left_out(submodules: Any) -> dict[str, Any]:
    """Fields of a layer's spec that leave out the norms in front of its sublayers.

    Raises:
        ValueError: a norm is part of the projection behind it.
    """
    left_out = {}
    for norm, sublayer in SUBLAYERS.items():
        if not hasattr(submodules, norm) or _is_identity(getattr(submodules, sublayer)):
            continue
        if _is_identity(getattr(submodules, norm)):
            raise ValueError(
                f'--residual-type gated: the layer spec has no {norm} of its own in front of its '
                f'{sublayer}: it is part of the projection there, as in Transformer Engine, and '
                'would norm what the gates have weighed; use a spec of local layers '
                '(--transformer-impl local) or --residual-type mhc'
            )
        left_out[norm] = IdentityOp
    return left_out


def leave_out_final_norm(block: nn.Module) -> nn.Module:
    """An identity in place of the final norm of a block or hybrid stack, which has one."""
    name = 'final_norm' if getattr(block, 'final_norm', None) is not None else 'final_layernorm'
    identity: nn.Module = IdentityOp()
    setattr(block, name, identity)
    return identity


def _is_identity(spec: Any) -> bool:
    return getattr(spec, 'module', spec) in (IdentityOp, IdentityFuncOp)
