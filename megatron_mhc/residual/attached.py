"""What streams carry from one sublayer to the next beside their values: attributes of the tensor.

Code between two sublayers that replaces the tensor drops them all; the next sublayer then does
without, or says that it cannot. No other module knows a name, and each has one that attaches it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_mhc import ops
    from megatron_mhc.residual.hyper_connection import HyperConnection
    from megatron_mhc.residual.recompute import RecomputedSegment
    from megatron_mhc.schedules.executor_streams import Launched


class Attached[T]:
    """One thing that a tensor may carry.

    Args:
        name: of the attribute.
        owner: the module that attaches it, the only one.
        depends_on: what of the tensor it belongs to; once that has changed, it is not found.
    """

    def __init__(
        self, name: str, owner: str, depends_on: Callable[[Tensor], object] = lambda x: None
    ) -> None:
        self.name = name
        self.owner = owner
        self._depends_on = depends_on

    def attach(self, x: Tensor, value: T) -> None:
        """Let ``x`` carry ``value``, in place of one that it carries."""
        setattr(x, self.name, (value, self._depends_on(x)))

    def take(self, x: Tensor) -> T | None:
        """What ``x`` carries, once; None where nothing is, or no longer belongs to it."""
        found = getattr(x, self.name, None)
        if found is not None:
            delattr(x, self.name)
        return self._valid(x, found)

    def peek(self, x: Tensor) -> T | None:
        """What ``x`` carries, and goes on carrying; None as for ``take``."""
        return self._valid(x, getattr(x, self.name, None))

    def _valid(self, x: Tensor, found: tuple[T, object] | None) -> T | None:
        return found[0] if found is not None and found[1] == self._depends_on(x) else None


class ReadAhead(NamedTuple):
    """What the fused edge read from the streams for the sublayer of ``connection``."""

    connection: HyperConnection
    u: Tensor
    carried: ops.Carried


class DenseWays(NamedTuple):
    """What comes with mudd's residual way ``[s, b, C]``: the other ways, and all outputs so far."""

    ways: tuple[Tensor, ...]
    history: tuple[Tensor, ...]


def _values(x: Tensor) -> object:
    return x._version


def _values_and_graph(x: Tensor) -> object:
    """A checkpoint returns tensors that were made without a graph and gives them another one."""
    return x._version, x.grad_fn, x.requires_grad, torch.is_grad_enabled()


def _needs_gradient(x: Tensor) -> object:
    return x.requires_grad


# Taken by the sublayer that reads next, whether it can use it or not.
READ_AHEAD: Attached[ReadAhead] = Attached('mhc_read_ahead', 'residual.sublayer', _values_and_graph)

# The segment that the next sublayer belongs to, which takes it. Nothing rebuilds streams that were
# changed since.
SEGMENT: Attached[RecomputedSegment] = Attached('mhc_segment', 'residual.recompute', _values)

# Set while another CUDA stream still writes the tensor. Whoever reads it first, or sends it, takes
# it; it holds for any values, since those are what is not there yet.
IN_FLIGHT: Attached[Launched[Tensor]] = Attached('mhc_in_flight', 'residual.post_stream')

# Single-pass mHC: the H_pre ``[..., n]`` that the next sublayer, or the merge, reads with. It comes
# from the sublayer before, not from the values. On what a checkpoint returns it has no gradient.
NEXT_PRE: Attached[Tensor] = Attached('mhc_next_pre', 'residual.single_pass', _needs_gradient)

# Attention Residuals: the sums of ended blocks, ``[s, b, C]`` each, on the running one.
BLOCK_SUMS: Attached[tuple[Tensor, ...]] = Attached(
    'mhc_block_sums', 'residual.attention', _needs_gradient
)

# mudd: stays, because a layer's norm reads it as well as the layer.
DENSE_WAYS: Attached[DenseWays] = Attached('mhc_dense_ways', 'mudd.layer')
