"""Megatron-Core's own fused mHC kernels, where the installed Megatron has them.

Mapping of semantics: streams ``[T, 1, n, C]`` (ours, viewed). Sinkhorn ends on columns; whether
H_res is applied transposed has changed between versions, so it is probed once with numbers: where
it is, transposed logits make it our function, else accuracy is taken against its own order. The
projection runs on an fp32 copy of the streams and the maps are cast to the dtype of the streams
before they are applied, both as its module does; both casts are timed. H_post factor 2.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from megatron_mhc.kernels.peers.contender import EPS, Case, Contender, transposed_square

MODULE = 'megatron.core.fusions.fused_mhc_kernels'


def _installed() -> bool:
    # Looking for the file, because importing megatron.core to look for a submodule takes seconds.
    package = importlib.util.find_spec('megatron')
    roots = package.submodule_search_locations if package else None
    inside = Path('core', 'fusions', 'fused_mhc_kernels.py')
    return any(Path(root, inside).exists() for root in roots or ())


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module(MODULE)


@functools.cache
def _applies_transposed(device: str) -> bool:
    """Whether the new stream j gets H_res[i, j] of the old stream i."""
    h_res = torch.tensor([[0.0, 1.0], [0.0, 0.0]], device=device).view(1, 1, 2, 2)
    x = torch.tensor([1.0, 2.0], device=device).view(1, 1, 2, 1).expand(1, 1, 2, 64).contiguous()
    y, gates = torch.zeros(1, 1, 64, device=device), torch.zeros(1, 1, 2, device=device)
    mixed = _kernels().fused_h_post_bda(h_res, x, gates, y, None)
    # Untransposed, stream 0 becomes 2 (stream 1); transposed, stream 1 becomes 1 (stream 0).
    return bool(mixed[0, 0, 1, 0] == 1)


class Megatron(Contender):
    """Triton, cuTile or torch per op, whatever its own dispatch picks on this machine."""

    name = 'megatron'

    def __init__(self, case: Case, device: str | None = None):
        super().__init__(case, device)
        device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
        # Only numbers can tell; what it launches does not depend on it.
        self.transposed = device == 'meta' or _applies_transposed(device)
        self.rows_first = not self.transposed

    @classmethod
    def available(cls) -> tuple[bool, str]:
        if not _installed():
            return False, f'the installed Megatron-Core has no {MODULE}'
        core = importlib.import_module('megatron.core').__version__
        backends = [
            name
            for name in ('triton', 'cutile')
            if getattr(_kernels(), f'is_{name}_available', lambda: False)()
        ]
        return True, f'megatron-core {core} ({", ".join(backends) or "torch only"})'

    def streams(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.case.streams, self.case.hidden))

    def streams_back(self, x: Tensor) -> Tensor:
        return x.flatten(-2)

    def square(self, h: Tensor) -> Tensor:
        return h.transpose(-1, -2) if self.transposed else h

    square_back = square

    def params(self, weight: Tensor, bias: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        if self.transposed:
            weight, bias = (transposed_square(p, self.case.streams) for p in (weight, bias))
        return weight, bias, *(a.view(1) for a in alpha.unbind())

    def params_back(self, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, *alpha = params
        if self.transposed:
            weight, bias = (transposed_square(p, self.case.streams) for p in (weight, bias))
        return weight, bias, torch.cat(alpha)

    def sinkhorn(self, logits: Tensor) -> Tensor:
        return _kernels().fused_sinkhorn(logits, self.case.iterations, EPS)

    def mapping(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, *alpha = params
        n, tokens = self.case.streams, x.shape[:2]
        project = _kernels().fused_proj_rms_compute_h
        flat, epsilons = x.reshape(-1, n * self.case.hidden), [EPS]
        if 'compute_h_eps' in inspect.signature(project).parameters:
            epsilons.append(EPS)
        else:
            # Older versions left the cast to the caller, and return the three maps in one tensor.
            flat = flat.float()
        *maps, _ = project(flat, weight, *alpha, bias, n, *epsilons)
        if len(maps) == 1:
            maps = maps[0].split([n, n, n * n], dim=-1)
        h_pre, h_post, logits = (m.reshape(*tokens, -1) for m in maps)
        return h_pre, h_post, self.sinkhorn(logits.unflatten(-1, (n, n)).contiguous())

    def pre(self, x: Tensor, h_pre: Tensor) -> Tensor:
        return _kernels().fused_h_aggregate(x, h_pre.to(x.dtype))

    def post(self, x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        return _kernels().fused_h_post_bda(h_res.to(x.dtype), x, h_post.to(x.dtype), y, None)
