"""One sublayer over n streams, whatever class it is in: what is read, run and written.

The stock code of a sublayer sees the C-wide input as its hidden states, and bias-dropout-add is
replaced by a function that only notes bias and dropout, so what it returns is the bare sublayer
output; ``write`` then applies F_post,res with both.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityFuncOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megatron_mhc import ops
from megatron_mhc.residual.attached import READ_AHEAD, ReadAhead
from megatron_mhc.residual.attention import BlockAttention, sublayers_of
from megatron_mhc.residual.gated import GatedConnection
from megatron_mhc.residual.hc import UnconstrainedHyperConnection
from megatron_mhc.residual.hyper_connection import HyperConnection, Pending
from megatron_mhc.residual.mhc import ManifoldHyperConnection
from megatron_mhc.residual.recompute import RecomputedSegment, Written, segment_of
from megatron_mhc.residual.single_pass import SinglePassHyperConnection
from megatron_mhc.settings.constraint import graphs_of_layers
from megatron_mhc.settings.residual import ResidualConfig

if TYPE_CHECKING:

    class _Host(nn.Module):
        """What the mixin needs of the layer class behind it."""

        config: TransformerConfig

        def get_layer_static_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]: ...
else:
    _Host = object

# Where the bias and dropout of the sublayer that is running are put: F_post,res applies them.
_TAIL: ContextVar[dict[str, Any] | None] = ContextVar('megatron_mhc_tail', default=None)
# The same while torch.compile traces, which cannot set a context variable; the innermost last.
_TRACED: list[dict[str, Any]] = []


@functools.cache
def n_stream_class(mixin: type, stock: type) -> type:
    """``stock`` with ``mixin`` in front of it; a class that has it is returned as it is."""
    if issubclass(stock, mixin):
        return stock
    return type(f'HyperConnection{stock.__name__}', (mixin, stock), {'__doc__': stock.__doc__})


@contextlib.contextmanager
def collected_tail() -> Iterator[dict[str, Any]]:
    """What ``bias_dropout`` was given inside the context, as arguments of F_post,res."""
    tail: dict[str, Any] = {}
    if torch.compiler.is_compiling():
        _TRACED.append(tail)
        yield tail
        _TRACED.pop()
        return
    token = _TAIL.set(tail)
    try:
        yield tail
    finally:
        _TAIL.reset(token)


def bias_dropout(training: bool, fused: bool) -> Callable[..., Tensor]:
    """Drop-in for ``get_bias_dropout_add``: the residual is left out, the rest is put off.

    ``fused`` is ignored; bias and dropout are part of F_post,res.
    """
    del fused

    def apply(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        del residual
        x, bias = x_with_bias
        if bias is not None and bias.dim() > 1:
            # One bias a token, which some mixtures of experts have: no longer a parameter.
            x, bias = x + bias, None
        tail = _TRACED[-1] if _TRACED else _TAIL.get()
        if tail is None:
            raise RuntimeError(
                'bias and dropout of a hyper-connection layer outside its sublayers: they belong '
                'to F_post,res; call _forward_attention and _forward_mlp of the layer instead'
            )
        tail.update(bias=bias, dropout=prob if training else 0.0)
        return x

    return apply


def without_residual(name: str, bias_dropout_add: object) -> object:
    """What takes the place of a spec's bias-dropout-add; one we do not know is not dropped."""
    known = getattr(bias_dropout_add, 'module', bias_dropout_add)
    if known is IdentityFuncOp:
        return bias_dropout_add
    if known not in (get_bias_dropout_add, bias_dropout):
        raise ValueError(
            f'{name}={known} in a layer spec: only get_bias_dropout_add can be replaced by '
            'hyper-connections, and what this one does would be lost; use --residual-type standard'
        )
    return bias_dropout


def build_hyper_connection(
    config: TransformerConfig, residual: ResidualConfig, sublayer: int
) -> HyperConnection:
    """The residual connection of sublayer number ``sublayer`` (attention and MLP both count)."""
    if residual.residual_type == 'hc':
        return UnconstrainedHyperConnection(
            config.hidden_size,
            residual,
            sublayer,
            config.sequence_parallel,
            normalization=config.normalization,
            norm_eps=config.layernorm_epsilon,
        )
    if residual.residual_type == 'gated':
        return GatedConnection(
            config.hidden_size,
            residual,
            sublayer,
            config.sequence_parallel,
            norm_eps=config.layernorm_epsilon,
            std=config.init_method_std,
        )
    if residual.residual_type == 'attention':
        return BlockAttention(
            config.hidden_size,
            residual,
            sublayer,
            config.sequence_parallel,
            sublayers=sublayers_of(config),
            norm_eps=config.layernorm_epsilon,
        )
    connection = SinglePassHyperConnection if residual.single_pass else ManifoldHyperConnection
    return connection(config.hidden_size, residual, sublayer, config.sequence_parallel)


@contextlib.contextmanager
def output_projections_rescaled(
    config: TransformerConfig, residual: ResidualConfig
) -> Iterator[None]:
    """Divide the initial std of output projections by sqrt(n) where streams are summed.

    HC section 3.1: the sum of n streams would otherwise leave the last layer with a larger std.
    Megatron initialises exactly these projections with ``output_layer_init_method``; only layers
    built inside the context are affected, so MTP layers keep their own.
    """
    original = config.output_layer_init_method
    if residual.stream_merge != 'sum' or original is None:
        yield
        return

    def rescaled(weight: Tensor, *args: object, **kwargs: object) -> Tensor | None:
        result: Tensor | None = original(weight, *args, **kwargs)
        weight.data.div_(math.sqrt(residual.num_residual_streams))
        return result

    config.output_layer_init_method = rescaled
    try:
        yield
    finally:
        config.output_layer_init_method = original


class ChainedLayer(_Host):
    """A layer whose last F_post,res may join the mapping of the next layer's first sublayer."""

    # Sublayers in a segment; 0: nothing is recomputed. ``widen_block`` sets it.
    recompute_segment_size: int = 0
    following: tuple[HyperConnection, ...] = ()

    def precedes(self, layer: nn.Module) -> None:
        """Let the last F_post,res join the first mapping of ``layer``."""
        own = (child for child in layer.children() if isinstance(child, HyperConnection))
        connection = next(own, None)
        # A recomputed or captured layer starts from its input alone: what was read ahead would be
        # lost.
        alone = self.config.recompute_granularity == 'full' or graphs_of_layers(
            lambda name: getattr(self.config, name, None)
        )
        if connection is not None and not alone:
            # In a tuple, or it would be registered as a child of this layer too.
            self.following = (connection,)

    def get_layer_static_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What a captured layer has as its input, of n streams ``[s, b, n*C]``."""
        inputs: dict[str, Tensor] = super().get_layer_static_inputs(*args, **kwargs)
        streams = [c.num_streams for c in self.children() if isinstance(c, HyperConnection)]
        narrow = inputs['hidden_states']
        wide = narrow.detach().repeat(1, 1, streams[0] if streams else 1)
        return inputs | {'hidden_states': wide.requires_grad_(narrow.requires_grad)}

    def run_sublayer(
        self,
        connection: HyperConnection,
        stock: Callable[..., Any],
        hidden_states: Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[Pending, RecomputedSegment | None, Any]:
        """``stock(u, *args, **kwargs)`` for what ``connection`` reads, observed.

        Returns:
            What F_post,res is to write, the segment that it is in, and what ``stock`` returned
            behind the sublayer's output.
        """
        hidden_states = connection.received(hidden_states)
        segment = segment_of(hidden_states, self.recompute_segment_size)
        u, carried = read(connection, hidden_states, segment)
        with collected_tail() as tail:
            output = stock(u, *args, **kwargs)
        y, *rest = output if isinstance(output, tuple) else (output,)
        connection.observe(hidden_states, carried, y, tail.get('bias'))
        return Pending(y, carried, **tail), segment, rest


def read(
    connection: HyperConnection, hidden_states: Tensor, segment: RecomputedSegment | None
) -> tuple[Tensor, ops.Carried]:
    """Sublayer input, from the read that came with the streams if there is one."""
    ahead = READ_AHEAD.take(hidden_states)
    observed = hidden_states._backward_hooks or hidden_states.retains_grad
    if ahead is not None and ahead.connection is connection and not observed:
        return ahead.u, ahead.carried
    _, u, carried = (
        connection(hidden_states) if segment is None else segment.read(connection, hidden_states)
    )
    return u, carried


def write(
    pending: Pending,
    segment: RecomputedSegment | None,
    connection: HyperConnection,
    following: HyperConnection | None = None,
) -> Tensor:
    """The next streams. Where the kernels run, the next sublayer reads them in the same pass.

    What it read travels on the streams (``READ_AHEAD``), so that any code between the two sublayers
    that replaces, changes or observes the tensor gets the plain path. In inference mode, which
    does not count changes of a tensor, there is no other.
    """
    if following is not None and not following.joins(pending.carried):
        following = None
    if following is not None and torch.is_inference_mode_enabled():
        following = None
    if segment is not None and segment.ends:
        # The next segment rebuilds its first read from the streams that it keeps.
        following = None

    def written(pending: Pending) -> Written:
        if following is None:
            return _viewless(connection.post(*pending)), None, None
        x, u, carried = following(pending)
        return _viewless(x), u, carried

    x, u, carried = written(pending) if segment is None else segment.write(written, pending)
    x = connection.hand_over(x, pending.carried)
    if following is not None:
        assert u is not None and carried is not None
        READ_AHEAD.attach(x, ReadAhead(following, u, carried))
    return x


def _viewless(x: Tensor) -> Tensor:
    """Pipeline schedules free a stage's output in place and therefore refuse views."""
    same: Tensor = make_viewless_tensor(inp=x, requires_grad=x.requires_grad, keep_graph=True)
    return same
