"""Every combination that is refused; ``megatron-mhc doctor --refusals`` prints them."""

from __future__ import annotations

from megatron_mhc.settings.refused_attention import ATTENTION
from megatron_mhc.settings.refused_cuda_graphs import ASKED, NEVER, UNASKED
from megatron_mhc.settings.refused_engram import ENGRAM
from megatron_mhc.settings.refused_gated import GATED
from megatron_mhc.settings.refused_mudd import MUDD
from megatron_mhc.settings.refused_pipeline import INVERTED_V, MIRRORED, ON_LINE
from megatron_mhc.settings.refused_post_stream import POST_STREAM
from megatron_mhc.settings.refused_residual import RESIDUAL
from megatron_mhc.settings.refused_single_pass import SINGLE_PASS
from megatron_mhc.settings.residual import ResidualConfig

GRAPHS = (NEVER, UNASKED, ASKED)
REFUSALS = (
    RESIDUAL,
    *GRAPHS,
    MUDD,
    GATED,
    ATTENTION,
    SINGLE_PASS,
    INVERTED_V,
    MIRRORED,
    ON_LINE,
    POST_STREAM,
    ENGRAM,
)


def check_residual(settings: object, residual: ResidualConfig) -> None:
    """Raise ValueError for the first refused pair found in ``settings``.

    Args:
        settings: parsed arguments or a ``TransformerConfig``.
        residual: with ``standard`` everything is allowed.
    """
    if not residual.enabled:
        return
    RESIDUAL.check(settings, residual.residual_type)
    for own in (ASKED if residual.cuda_graphs else UNASKED, NEVER, MUDD, GATED, ATTENTION):
        if residual.residual_type in own.values:
            own.check(settings, residual.residual_type)
    if residual.single_pass:
        SINGLE_PASS.check(settings)
