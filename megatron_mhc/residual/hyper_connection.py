"""What HC and mHC share: one module per sublayer that reads from n streams and writes back.

Its forward computes the three maps once and applies F_pre; ``post`` applies F_post,res with those
maps. Nothing is kept on the module between the two calls, so that schedules may interleave
microbatches. A forward may also be given the sublayer before that has yet to be written
(``Pending``): where the kernels run, both then take one pass over the streams.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_mhc import ops
from megatron_mhc.inputs.values import MOST_LAYERS, MOST_WIDTH, check_integer
from megatron_mhc.settings.residual import MAPPINGS, ResidualConfig

Maps = tuple[Tensor, Tensor, Tensor]


class Pending(NamedTuple):
    """A sublayer's output before F_post,res: y ``[..., C]``, its read, its bias and dropout.

    ``seed`` determines the dropout mask; None draws one.
    """

    y: Tensor
    carried: ops.Carried
    bias: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None


def require_width(x: Tensor, num_streams: int, hidden_size: int) -> None:
    """Raise RuntimeError unless ``x`` is n streams wide."""
    if not isinstance(x, Tensor) or not x.dim():
        raise ValueError(f'x: got {type(x).__name__}, wanted a tensor [..., n*C] of streams')
    if x.shape[-1] != num_streams * hidden_size:
        raise RuntimeError(
            f'hidden states of width {x.shape[-1]} where {num_streams} streams * {hidden_size} are '
            'wanted: the previous pipeline stage runs with another --residual-type or stream '
            'count, or the block around these layers was not widened'
        )


class MappingProjection(nn.Module):
    """Holder of phi. Called (not read) for its weight, so that parameter-gather hooks fire."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32))

    def forward(self) -> Tensor:
        return self.weight

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Xavier-uniform, drawn on the CPU so that every device starts from the same values."""
        rows, columns = self.weight.shape
        bound = math.sqrt(6 / (rows + columns))
        phi = torch.empty(rows, columns, dtype=torch.float32, device='cpu')
        self.weight.copy_(phi.uniform_(-bound, bound, generator=generator))


class KeepFP32(nn.Module):
    """A module whose parameters stay in fp32 when the model around it is cast to bf16 or fp16.

    Megatron's ``Float16Module`` casts every parameter; a mapping cast to bf16 would violate the
    row sums by 1e-3. The original values are kept rather than cast back.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32:
                return tensor.to(device=moved.device)
            return moved

        # Without annotations in torch.
        module: nn.Module = super()._apply(keep_fp32, recurse)  # type: ignore[no-untyped-call]
        return module


def mark_parameters(module: nn.Module, residual: ResidualConfig, sequence_parallel: bool) -> None:
    """Set what Megatron reads off a parameter: how to sum its gradient, and which optimizer."""
    for parameter in module.parameters():
        # Megatron's marks, which no class declares.
        parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        if residual.mapping_optimizer == 'scalar':
            # The only mark by which every release keeps a matrix from Muon, and its DDP buffer
            # apart. It means a learning rate of its own too, so --decoupled-lr is refused.
            parameter.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]


class HyperConnection(KeepFP32):
    """The residual connection of one sublayer over n streams (mHC, Eq 3).

    Args:
        hidden_size: C.
        residual: the settings.
        sublayer: index of the sublayer in the whole model, attention and MLP counted separately.
            It names the home stream and seeds the initialisation, whatever the parallel layout.
        sequence_parallel: mark the parameters so that Megatron sums their gradients over the
            tensor-parallel ranks, each of which sees its own tokens.
    """

    def __init__(
        self,
        hidden_size: int,
        residual: ResidualConfig,
        sublayer: int,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        check_integer('hidden_size', hidden_size, 1, MOST_WIDTH, "give the model's C")
        check_integer('sublayer', sublayer, 0, 2 * MOST_LAYERS, 'count attention and MLP from 0')
        if not isinstance(residual, ResidualConfig):
            raise ValueError(
                f'residual {type(residual).__name__}: wanted a ResidualConfig; make one of it'
            )
        self.hidden_size = hidden_size
        self.residual = residual
        self.num_streams = residual.streams
        self.sublayer = sublayer
        # Whether a pipeline stage, or layers that are recomputed as one, end behind this sublayer.
        self.ends_stage = self.ends_checkpoint = False
        # Its row in the tables of the monitors, which have two a layer; a layer may have one alone.
        self.row = sublayer
        # A module whose maps are all constants has no parameters: none could ever get a gradient.
        if set(residual.fixed_mappings) != set(MAPPINGS):
            self.build_parameters()
            self.reset_parameters()
        mark_parameters(self, residual, sequence_parallel)
        # ``(streams, carried, sublayer output, its bias)`` of each forward in training, for the
        # monitors.
        self.probe: Callable[[Tensor, ops.Carried, Tensor, Tensor | None], None] | None = None

    @abstractmethod
    def build_parameters(self) -> None:
        """Create the fp32 parameters; biases and gating factors are 1-D, hence never decayed."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise them from ``self.generator()`` and nothing else."""

    @abstractmethod
    def maps(self, x: Tensor) -> Maps:
        """fp32 ``h_pre [..., n]``, ``h_post [..., n]``, ``h_res [..., n, n]`` of ``[..., n*C]``."""

    def generator(self) -> torch.Generator:
        """A private generator: equal on all ranks and layouts, no draw from the model's stream."""
        return torch.Generator(device='cpu').manual_seed((self.residual.seed << 20) + self.sublayer)

    @property
    def home(self) -> int:
        """The stream this sublayer favours where an initialisation favours one."""
        return self.sublayer % self.num_streams

    def forward(self, x: Tensor | Pending) -> tuple[Tensor, Tensor, ops.Carried]:
        """Read the streams for this sublayer.

        Args:
            x: streams ``[..., n*C]``, or the sublayer before, which is then written first.

        Returns:
            The streams ``[..., n*C]``, the sublayer input ``[..., C]`` and what ``post`` needs.
        """
        if isinstance(x, Pending):
            return self.write_read(x)
        require_width(x, self.num_streams, self.hidden_size)
        return x, *self.read(x)

    def read(self, x: Tensor) -> tuple[Tensor, ops.Carried]:
        h_pre, h_post, h_res = self.all_maps(x)
        u = ops.pre(x, h_pre, backend=self.residual.kernel_backend)
        return u, ops.Carried(x, h_post, h_res, fused=False)

    def all_maps(self, x: Tensor) -> Maps:
        """``maps``, with those that are held fixed in their place."""
        return self._fix(x, self.maps(x) if self._has_parameters() else None)

    def res_logits(self, x: Tensor) -> Tensor | None:
        """``[..., K]`` fp32, of which H_res is the projection onto doubly stochastic matrices.

        None where it is none, or where no logit changes it.
        """
        return None

    def projected(self, logits: Tensor) -> Tensor:
        """H_res ``[..., n, n]`` of what ``res_logits`` gave."""
        raise NotImplementedError(f'{type(self).__name__}: its H_res is no projection of logits')

    def observe(
        self, x: Tensor, carried: ops.Carried, y: Tensor, bias: Tensor | None = None
    ) -> None:
        """Show the monitors, if there are any, what this sublayer read and made."""
        if self.probe is not None and self.training:
            self.probe(x, carried, y, bias)

    def write_read(self, pending: Pending) -> tuple[Tensor, Tensor, ops.Carried]:
        x = self.post(*pending)
        return x, *self.read(x)

    def received(self, x: Tensor) -> Tensor:
        """Streams ``[..., n*C]`` of what came from the sublayer before."""
        return x

    def hand_over(self, x: Tensor, carried: ops.Carried) -> Tensor:
        """The streams that were written, with what the next sublayer needs beside them."""
        return x

    def joins(self, carried: ops.Carried) -> bool:
        """Whether a ``Pending`` with these streams is better than their ``post``."""
        return False

    def post(
        self,
        y: Tensor,
        carried: ops.Carried,
        bias: Tensor | None = None,
        dropout: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Sublayer output ``[..., C]`` and what the forward left -> the next streams."""
        return ops.write(
            *(y, carried, bias),
            dropout=dropout,
            seed=seed,
            backend=self.residual.kernel_backend,
            numerics=self.residual.numerics,
        )

    def _has_parameters(self) -> bool:
        return next(self.parameters(), None) is not None

    def _fix(self, x: Tensor, maps: Maps | None) -> Maps:
        """Replace the maps named in ``fixed_mappings`` by 1/n, 1 and I (mHC, Table 1).

        Without parameters all three are named, and ``maps`` is None.
        """
        if maps is not None and not self.residual.fixed_mappings:
            return maps
        n = self.num_streams
        fixed = torch.ones(n, device=x.device)
        constants = fixed / n, fixed, torch.eye(n, device=x.device)

        def chosen(place: int) -> Tensor:
            if maps is not None and MAPPINGS[place] not in self.residual.fixed_mappings:
                return maps[place]
            return constants[place].expand(*x.shape[:-1], *constants[place].shape)

        return chosen(0), chosen(1), chosen(2)
