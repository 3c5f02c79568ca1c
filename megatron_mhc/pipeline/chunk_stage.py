"""One Megatron model chunk as a stage of a plan, by Megatron's own forward and backward steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from megatron_mhc.pipeline.deferred_wgrad import DeferredWgrads, delayed_modules
from megatron_mhc.residual.post_stream import left_in_flight, taken
from megatron_mhc.residual.recompute import RecomputedSegment, opened_segments
from megatron_mhc.schedules.executor_streams import Launched, high_priority_stream

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel


class ChunkStage:
    """Runs the microbatches of one chunk; what it keeps is keyed by microbatch.

    Args:
        chunk: the model chunk, wrapped as Megatron wraps it.
        config: the model's config.
        forward_step: ``(microbatch, input) -> (output, number of tokens)``.
        is_last: whether it computes the loss.
        evaluating: run forward passes only.
        recompute_stream: where ``recompute`` rebuilds, ``compute`` or ``high``.
        reduces: start the data-parallel reduction when the plan says so.
    """

    def __init__(
        self,
        chunk: DistributedDataParallel,
        config: Any,
        forward_step: Callable[[int, Tensor | None], tuple[Tensor, Tensor]],
        *,
        is_last: bool,
        evaluating: bool,
        recompute_stream: str | None,
        reduces: bool,
    ) -> None:
        self.chunk, self.config = chunk, config
        self.is_last, self.evaluating = is_last, evaluating
        self.recompute_stream = recompute_stream
        self.reduces = reduces
        self._forward_step = forward_step
        self._delayed = delayed_modules(chunk)
        self._kept: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._segments: dict[int, list[RecomputedSegment]] = {}
        self._weights: dict[int, DeferredWgrads] = {}
        self.tokens: Tensor | int = 0

    def forward(self, microbatch: int, x: Tensor | None) -> Tensor | Launched[Tensor] | None:
        """Output for the next stage, cut from the graph; None on the last stage."""
        if x is not None and not self.evaluating:
            x.requires_grad_()
        with opened_segments() as segments, left_in_flight():
            output, tokens = self._forward_step(microbatch, x)
        self.tokens += tokens
        sent = None if self.is_last else taken(output)
        if self.evaluating:
            return sent
        self._kept[microbatch] = x, output
        self._segments[microbatch] = segments
        if not self.is_last:
            # The graph needs the output's node only; its values go with what was sent.
            schedules.deallocate_output_tensor(output, self.config.deallocate_pipeline_outputs)
        return sent

    def recompute(self, microbatch: int) -> None:
        """Rebuild the segment that the backward of ``microbatch`` begins with.

        It rebuilds the others as it gets to them, so that one segment is alive at a time.
        """
        stream = high_priority_stream() if self.recompute_stream == 'high' else None
        for segment in self._segments[microbatch][-1:]:
            segment.rebuild(stream)

    def backward(self, microbatch: int, grad: Tensor | None) -> Tensor | None:
        """Gradient of the input; the weights' are accumulated."""
        x, output = self._kept.pop(microbatch)
        self._segments.pop(microbatch)
        gradient = schedules.backward_step(x, output, grad, self.config)
        DeferredWgrads(self._delayed).run()
        return gradient

    def backward_input(self, microbatch: int, grad: Tensor | None) -> Tensor | None:
        """Gradient of the input; the weights' are left for ``backward_weight``."""
        x, output = self._kept.pop(microbatch)
        self._segments.pop(microbatch)
        weights = self._weights[microbatch] = DeferredWgrads(self._delayed)
        with weights.collect():
            return schedules.backward_step(x, output, grad, self.config)

    def backward_weight(self, microbatch: int) -> None:
        """The weight gradients that ``backward_input`` left over."""
        self._weights.pop(microbatch).run()

    def reduce(self) -> None:
        """Start the reduction over data-parallel ranks: this stage has all its gradients."""
        if self.reduces:
            self.chunk.start_grad_sync()

    def param_sync(self) -> None:
        """Parameters are gathered by Megatron, before the step."""
