"""Our ops on the bench: Triton as it is used, Triton op by op, eager torch, compiled torch."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from megatron_mhc import __version__, ops
from megatron_mhc.kernels.peers.contender import EPS, Case, Contender


class Torch(Contender):
    """The torch path, eager: each op on its own, the gradients of x summed by autograd."""

    name = 'torch'
    backend = 'torch'

    @classmethod
    def available(cls) -> tuple[bool, str]:
        return True, f'megatron-mhc {__version__}, torch {torch.__version__}'

    def sinkhorn(self, logits: Tensor) -> Tensor:
        return ops.sinkhorn(logits, self.case.iterations, backend=self.backend)

    def mapping(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.mapping(x, *params, **self._settings())

    def pre(self, x: Tensor, h_pre: Tensor) -> Tensor:
        return ops.pre(x, h_pre, backend=self.backend)

    def post(self, x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        return ops.post_res(x, y, h_post, h_res, backend=self.backend)

    def _settings(self) -> dict[str, Any]:
        return {
            'num_streams': self.case.streams,
            'sinkhorn_iterations': self.case.iterations,
            'norm_eps': EPS,
            'backend': self.backend,
        }


class Compiled(Torch):
    """The torch path under ``torch.compile``, one graph per op and sublayer."""

    name = 'torch.compile'
    checked = False

    def __init__(self, case: Case):
        super().__init__(case)
        import torch._dynamo

        # Shapes of earlier cases would count against the limit of recompilations.
        torch._dynamo.reset()
        eager = Torch(case)
        for op in ('sinkhorn', 'mapping', 'pre', 'post', 'read', 'write', 'write_read'):
            setattr(self, op, torch.compile(getattr(eager, op), dynamic=False))

    @classmethod
    def available(cls) -> tuple[bool, str]:
        if importlib.util.find_spec('triton') is None:
            return False, 'torch.compile needs Triton; pip install triton'
        return super().available()


class TritonOps(Torch):
    """Our kernels one op at a time: mapping, F_pre, F_post,res as three autograd functions."""

    name = 'triton-unfused'
    backend = 'triton'
    # The single ops are those of ``triton``.
    without = ('mapping', 'pre', 'post', 'sinkhorn')

    @classmethod
    def available(cls) -> tuple[bool, str]:
        if importlib.util.find_spec('triton') is None:
            return False, 'Triton is not installed; pip install triton'
        if not torch.cuda.is_available() and not _interpreted():
            return False, 'Triton kernels need a GPU'
        return super().available()


class Triton(TritonOps):
    """Our kernels as the layers use them: read, write, and write_read at the fused edge."""

    name = 'triton'
    without = ()

    def read(self, x: Tensor, params: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        return ops.read(x, *params, **self._settings())

    def write(self, y: Tensor, state: Any) -> Tensor:
        return ops.write(y, state)

    def write_read(
        self, y: Tensor, state: Any, params: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Any]:
        return ops.write_read(y, state, *params, **self._settings())

    def fused_edge(
        self, y: Tensor, state: Any, params: tuple[Tensor, ...], within: bool
    ) -> tuple[Tensor, Tensor]:
        x_new, u, carried = self.write_read(y, state, params)
        return (carried.x if within else x_new), u


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


OURS = (Triton, TritonOps, Torch, Compiled)
