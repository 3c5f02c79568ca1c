"""F_post,res of the MLP sublayers on a stream of high priority (mHC, section 4.3.3).

There it waits for nothing but the sublayer's output, and the message to the next stage waits for
nothing but it. What it writes is marked as being in flight; whoever reads that calls ``settle``
first. The layers and the final norm do, and so does the end of the block, unless a schedule takes
the stage's output as it is (``left_in_flight``, ``taken``) and sends it from that stream.

Autograd replays the backward on the same stream. With ``standard`` residuals it is the
bias-dropout-add of the MLP that runs there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityFuncOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megatron_mhc.kernels.profiler_names import POST_RANGE
from megatron_mhc.residual.attached import IN_FLIGHT
from megatron_mhc.residual.block import final_norm_of
from megatron_mhc.residual.layer import HyperConnectionLayerMixin
from megatron_mhc.schedules.executor_lanes import yield_lane, yield_point
from megatron_mhc.schedules.executor_streams import Launched, launch, side_stream
from megatron_mhc.settings.refused_post_stream import POST_STREAM

if TYPE_CHECKING:
    from megatron.core.models.common.language_module.language_module import LanguageModule

HIGH_PRIORITY = -1
_LEFT: ContextVar[bool] = ContextVar('megatron_mhc_left_in_flight', default=False)


class PostStream:
    """Where the F_post,res of one model chunk run.

    Chunks have a stream each: in a fused slot, the one that runs forward must not queue behind
    the other's backward.
    """

    def __init__(self, chunk: int) -> None:
        self._name = f'post {chunk}'

    def run(
        self,
        write: Callable[..., Tensor],
        y: Tensor,
        bias: Tensor | None,
        *others: object,
        hands_over: bool,
    ) -> Tensor:
        """``write(y, bias, *others)``, launched and marked as being in flight.

        Args:
            write: F_post,res.
            y: the sublayer's output.
            bias: its bias.
            others: what else ``write`` reads.
            hands_over: let the other microbatch of a fused slot go on, here and in the backward. Of
                no use next to an all-to-all, which hands over itself.
        """
        if bias is not None:
            # A parameter's gradient is accumulated, on the compute stream, as soon as it is
            # there. Behind this view it is not, until the backward has handed over.
            bias = bias.view_as(bias)
        made: list[Tensor] = []

        def produce(y: Tensor, bias: Tensor | None, *others: object) -> Tensor:
            with torch.profiler.record_function(POST_RANGE):
                x = write(yield_point(y) if hands_over else y, bias, *others)
            # Pipeline schedules free a stage's output in place and therefore refuse views.
            made.append(make_viewless_tensor(inp=x, requires_grad=x.requires_grad, keep_graph=True))
            # An alias: x will hold what was launched, and its own storage may be replaced.
            return made[0].detach()

        stream = side_stream(self._name, HIGH_PRIORITY)
        launched = launch(stream, produce, y, bias, *others)
        (x,) = made
        IN_FLIGHT.attach(x, launched)
        if hands_over:
            yield_lane()
        return x


def settle(x: Any) -> None:
    """Let the current stream wait until ``x``, if it is a tensor in flight, is written."""
    if isinstance(x, Tensor) and (launched := IN_FLIGHT.take(x)) is not None:
        launched.result()


def taken(x: Tensor) -> Tensor | Launched[Tensor]:
    """``x`` outside of its graph; what is in flight stays so, and ``x`` itself may be freed.

    A message posted on the stream of what was launched waits for ``x`` only.
    """
    launched = IN_FLIGHT.take(x)
    return x.detach() if launched is None else launched


@contextlib.contextmanager
def left_in_flight() -> Iterator[None]:
    """Inside, a block that is not the last returns its output as it is, maybe in flight."""
    token = _LEFT.set(True)
    try:
        yield
    finally:
        _LEFT.reset(token)


def use_post_stream(model: LanguageModule) -> None:
    """Move F_post,res of every MLP sublayer of ``model.decoder`` to a stream of high priority.

    Args:
        model: a GPT or hybrid model; its chunks of one rank may run at the same time.

    Raises:
        ValueError: a setting that cannot be combined with it, or an unknown residual add.
    """
    POST_STREAM.check(model.config)
    block = model.decoder
    stream = PostStream(getattr(model, 'vp_stage', None) or 0)
    for layer in block.layers:
        if isinstance(layer, HyperConnectionLayerMixin):
            layer.post_stream = stream
        # A Mamba layer has no MLP to move.
        elif isinstance(layer, TransformerLayer) and not isinstance(layer.mlp_bda, IdentityFuncOp):
            _move_residual_add(layer, stream)
        # Before the memory, which reads the streams too.
        layer.register_forward_pre_hook(_settle_inputs, with_kwargs=True, prepend=True)
    norm = final_norm_of(block)
    if norm is not None:
        # Before the hook that merges the streams.
        norm.register_forward_pre_hook(_settle_inputs, with_kwargs=True, prepend=True)
    block.register_forward_hook(_settle_output)


def _move_residual_add(layer: TransformerLayer, stream: PostStream) -> None:
    original = layer.mlp_bda
    if original is not get_bias_dropout_add:
        raise ValueError(
            f'--mhc-post-stream high: mlp_bda={original} in a layer spec: only '
            'get_bias_dropout_add can be moved to another stream; use --mhc-post-stream compute'
        )

    @functools.wraps(original)
    def moved(training: bool, fused: bool) -> Callable[..., Tensor]:
        add: Callable[..., Tensor] = original(training, fused)
        if not training:
            return add

        def launched(
            x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
        ) -> Tensor:
            return stream.run(
                lambda y, bias, residual: add((y, bias), residual, prob),
                *(*x_with_bias, residual),
                hands_over=not layer.is_moe_layer,
            )

        return launched

    layer.mlp_bda = moved


def _settle_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    del module
    for value in (*args, *kwargs.values()):
        settle(value)


def _settle_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    del module, args
    if not _LEFT.get():
        for value in output if isinstance(output, tuple) else (output,):
            settle(value)
