"""The layers of a hybrid stack as n-stream layers, each of one sublayer.

A stack's spec names its class and one layer spec for each symbol of ``--hybrid-layer-pattern``. The
class is replaced by one that converts them as it is built: prediction layers (MTP) build stacks of
their own from the same specs, and keep one stream.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mhc.settings.residual import ResidualConfig

    class _Host(nn.Module):
        """What the mixin needs of the stack class behind it."""

        def __init__(
            self, config: TransformerConfig, submodules: Any, *args: object, **kwargs: object
        ) -> None: ...
else:
    _Host = object


def is_stack(spec: ModuleSpec) -> bool:
    """Whether ``spec`` is of a hybrid stack, by the name that its specs have in every release."""
    return hasattr(spec.submodules, 'mamba_layer')


class HyperConnectionStackMixin(_Host):
    """A stack that builds n-stream layers; ``widen_block`` gives it its two ends."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        *args: object,
        residual: ResidualConfig,
        **kwargs: object,
    ) -> None:
        from megatron_mhc.residual.spec import with_residual

        layers = {
            field.name: with_residual(spec, residual, sublayers=1)
            for field in dataclasses.fields(submodules)
            if field.name.endswith('_layer')
            and isinstance(spec := getattr(submodules, field.name), ModuleSpec)
        }
        super().__init__(config, dataclasses.replace(submodules, **layers), *args, **kwargs)
