"""What every implementation has in common that is compared: ours, torch, and each peer.

The bench times them and the model of ``roofline`` predicts them. Inputs arrive in our layout and
orientation, streams ``[T, 1, n*C]`` and maps in fp32:
``x_new[i] = sum_j H_res[i, j] x[j] + H_post[i] y``, H_res normalised columns first, rows last. The
layout methods turn them into what the implementation wants and back, outside the timed region.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mhc.kernels.defaults import DTYPES

LAYER = 2
"""Sublayers of a layer (attention and MLP): as many sets of parameters and sublayer outputs."""
EPS = 1e-20
"""For every epsilon an implementation asks for: all then compute the same function."""


HEADLINE_TOKENS, HEADLINE_STREAMS = 8192, 4


class Case(NamedTuple):
    """C hidden size, T tokens, n streams, dtype of the streams, Sinkhorn-Knopp iterations."""

    hidden: int
    tokens: int
    streams: int
    dtype: str = 'bf16'
    iterations: int = 20

    def __str__(self) -> str:
        return f'C={self.hidden} T={self.tokens} n={self.streams} {self.dtype}'

    @property
    def maps(self) -> int:
        """Rows of the projection: pre | post | res."""
        return self.streams * (self.streams + 2)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return dtype

    @property
    def headline(self) -> bool:
        """Whether the report shows it first."""
        return self.tokens == HEADLINE_TOKENS and self.streams == HEADLINE_STREAMS


class Contender:
    """One implementation of the ops; a subclass overrides what it has and what differs."""

    name = ''
    timed = True
    """False: a check of semantics, whose speed nobody claims."""
    rows_first = False
    """Whether Sinkhorn normalises rows first and columns last, seen in our orientation."""
    checked = True
    """False: its numbers are those of another contender, and a check would take long."""
    without: tuple[str, ...] = ()
    """Ops that it does not offer, or not one by one."""

    def __init__(self, case: Case, device: str | None = None):
        """``device`` is that of its tensors where it is known already, such as meta."""
        self.case = case

    @classmethod
    def available(cls) -> tuple[bool, str]:
        """Whether it can run on this machine, and why not or which version."""
        return True, ''

    @classmethod
    def module(cls, name: str) -> ModuleType:
        """The module that holds kernels of it under their names, by the name that they give."""
        return importlib.import_module(name)

    def unsupported(self) -> str:
        """Why it does not take this case, or the empty string."""
        return ''

    # --- layout, not timed -----------------------------------------------------------------------
    def streams(self, x: Tensor) -> Tensor:
        return x

    def streams_back(self, x: Tensor) -> Tensor:
        return x

    def gate(self, h: Tensor) -> Tensor:
        """H_pre and H_post, ``[T, 1, n]``."""
        return h

    def gate_back(self, h: Tensor) -> Tensor:
        return h

    def square(self, h: Tensor) -> Tensor:
        """H_res or its logits, ``[T, 1, n, n]``."""
        return h

    def square_back(self, h: Tensor) -> Tensor:
        return h

    def params(self, weight: Tensor, bias: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        return weight, bias, alpha

    def params_back(self, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``params`` as gradients of weight, bias, alpha."""
        weight, bias, alpha = params
        return weight, bias, alpha

    # --- timed -----------------------------------------------------------------------------------
    def sinkhorn(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def mapping(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def pre(self, x: Tensor, h_pre: Tensor) -> Tensor:
        raise NotImplementedError

    def post(self, x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        raise NotImplementedError

    def read(self, x: Tensor, params: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        """``(u, state)``: the sublayer's input, and what ``write`` needs."""
        h_pre, h_post, h_res = self.mapping(x, *params)
        return self.pre(x, h_pre), (x, h_post, h_res)

    def write(self, y: Tensor, state: Any) -> Tensor:
        x, h_post, h_res = state
        return self.post(x, y, h_post, h_res)

    def write_read(
        self, y: Tensor, state: Any, params: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Any]:
        """``(x_new, u, state)``: the fused edge between two sublayers."""
        x_new = self.write(y, state)
        return x_new, *self.read(x_new, params)

    def fused_edge(
        self, y: Tensor, state: Any, params: tuple[Tensor, ...], within: bool
    ) -> tuple[Tensor, Tensor]:
        """``write_read`` on its own: ``(x_new, u)``.

        Args:
            within: instead of x_new, give the tensor through which the gradient of the streams
                comes back inside a network. Where that is another one, it may carry another
                quantity: right for time, not for a comparison of numbers.
        """
        return self.write_read(y, state, params)[:2]


def availability(kind: type[Contender]) -> tuple[bool, str]:
    """``kind.available()``, where an exception is a reason like any other."""
    try:
        return kind.available()
    except Exception as error:  # a broken installation must not stop what asks
        return False, first_line(error)


def first_line(error: BaseException) -> str:
    """An error on one short line, for a table."""
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0] if lines else ""}'[:160]


def transposed_square(rows: Tensor, streams: int) -> Tensor:
    """Rows pre | post | res with the rows of res put in the order of the transposed matrix.

    Sinkhorn of transposed logits, rows first, is the transpose of ours, columns first; a peer that
    also applies its matrix transposed then computes exactly our function. The inverse of itself.
    """
    n = streams
    order = torch.arange(n * n, device=rows.device).view(n, n).t().reshape(-1) + 2 * n
    return torch.cat([rows[: 2 * n], rows[order]])
