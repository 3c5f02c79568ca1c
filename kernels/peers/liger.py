"""Liger-Kernel's mHC (Triton), through its public functions.

Mapping of semantics: streams ``[T, 1, n, C]`` (ours, viewed); phi is our weight transposed, made
once outside the timed region; H_res is applied as ``[out, in]`` like ours, but Sinkhorn ends on
columns, so accuracy is taken against that order. H_post factor 2, epsilons as everybody's. It has
no Sinkhorn op of its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from importlib.metadata import version
from types import ModuleType

import torch
from torch import Tensor

from megatron_mhc.kernels.peers.contender import EPS, Contender
from megatron_mhc.kernels.peers.te import hidden

FUNCTIONS = 'liger_kernel.transformers.functional'


@functools.cache
def _load(name: str) -> ModuleType:
    # It imports PEFT, which imports a TransformerEngine that it finds.
    with hidden():
        return importlib.import_module(name)


class Liger(Contender):
    """phi in fp32 like everybody's: its projection then runs without its tensor-core path."""

    name = 'liger'
    rows_first = True
    without = ('sinkhorn',)
    half_phi = False

    @classmethod
    def available(cls) -> tuple[bool, str]:
        if importlib.util.find_spec('liger_kernel') is None:
            return False, 'not installed; pip install --no-deps liger-kernel'
        if not hasattr(_load(FUNCTIONS), 'liger_mhc_coeffs'):
            return False, 'this release has no mHC; 0.8.0 and later do'
        return True, f'liger-kernel {version("liger-kernel")}'

    @classmethod
    def module(cls, name: str) -> ModuleType:
        return _load(name)

    def streams(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.case.streams, self.case.hidden))

    def streams_back(self, x: Tensor) -> Tensor:
        return x.flatten(-2)

    def params(self, weight: Tensor, bias: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        phi = weight.t().to(self.case.torch_dtype) if self.half_phi else weight.t()
        return phi, bias, *alpha.unbind()

    def params_back(self, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        phi, bias, *alpha = params
        return phi.t(), bias, torch.stack(alpha)

    def mapping(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _load(FUNCTIONS).liger_mhc_coeffs(
            x,
            *params,
            allow_fp32=True,
            tmax=self.case.iterations,
            rms_eps=EPS,
            pre_eps=0.0,
            sinkhorn_eps=EPS,
            post_mult=2.0,
        )

    def pre(self, x: Tensor, h_pre: Tensor) -> Tensor:
        return _load(FUNCTIONS).liger_mhc_pre(x, h_pre)

    def post(self, x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        return _load(FUNCTIONS).liger_mhc_post_res(x, y, h_post, h_res)


class LigerHalfPhi(Liger):
    """phi in the dtype of the streams, as its documentation advises: faster, and less exact."""

    name = 'liger-half-phi'
    half_phi = True
