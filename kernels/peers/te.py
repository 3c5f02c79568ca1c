"""TransformerEngine's Triton mHC, of an installed TransformerEngine or of its bare Python wheel.

Mapping of semantics: streams ``[T, 1, C, n]``, stream index innermost, and the projection's columns
in that order: both permuted outside the timed region. Its Sinkhorn ends on columns and H_res is
applied as ``x @ H_res``, so the rows of the projection that belong to res are put in transposed
order too, and it computes our function. H_post factor 2; its epsilon under the root is that of
fp32 and cannot be set. Only n = 4.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from megatron_mhc.kernels.peers.contender import Contender, transposed_square

PACKAGE = 'transformer_engine'
# Of the package: the kernels, their autograd functions, and the one compiled call of the latter.
KERNELS, WRAPPERS = f'{PACKAGE}.common.triton.mhc', f'{PACKAGE}.pytorch.triton.mhc'
GEMM = f'{PACKAGE}.pytorch.cpp_extensions.gemm'


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """A bare Python wheel of it cannot be found inside: whoever finds it would import it."""
    found = importlib.util.find_spec(PACKAGE) if PACKAGE not in sys.modules else None
    bare = found is not None and importlib.util.find_spec('transformer_engine_torch') is None
    if bare:
        # None there is what Python takes for: no such module.
        sys.modules[PACKAGE] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if bare:
            del sys.modules[PACKAGE]


@functools.cache
def load() -> tuple[ModuleType, str]:
    """The module of wrappers, and where it comes from.

    Raises:
        FileNotFoundError: the installed release has no mHC.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f'{PACKAGE} is not installed')
    root = Path(spec.submodule_search_locations[0])
    files = {
        name: root.joinpath(*name.split('.')[1:]).with_suffix('.py') for name in (KERNELS, WRAPPERS)
    }
    for path in files.values():
        if not path.exists():
            raise FileNotFoundError(f'{PACKAGE} has no mHC here (2.20 and later do): {path.name}')
    before = {name for name in sys.modules if name.split('.')[0] == PACKAGE}
    try:
        return importlib.import_module(WRAPPERS), 'whole package'
    except Exception:  # noqa: BLE001  without its compiled part it raises errors of many types
        _forget(keep=before)
    return _load_alone(files), 'mHC files alone, torch for its one GEMM'


def _forget(keep: Collection[str] = ()) -> None:
    for name in [name for name in sys.modules if name.split('.')[0] == PACKAGE]:
        if name not in keep:
            del sys.modules[name]


def _load_alone(files: dict[str, Path]) -> ModuleType:
    """Import the two files with empty packages around them, which are then taken away again.

    Nobody else may meet those: Megatron, for one, asks whether TransformerEngine can be imported.
    """
    gemm = ModuleType(GEMM)
    gemm.__dict__['general_gemm'] = _gemm
    try:
        for name in (KERNELS, WRAPPERS, GEMM):
            parts = name.split('.')
            for end in range(1, len(parts)):
                package = '.'.join(parts[:end])
                sys.modules.setdefault(package, ModuleType(package)).__path__ = []
        sys.modules[GEMM] = gemm
        for name, path in files.items():
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return module
    finally:
        _forget()


def _gemm(a: Tensor, b: Tensor, out_dtype: torch.dtype, layout: str) -> tuple[Tensor]:
    """Stands for the compiled GEMM: ``[K, M] x [K, N]`` given as ``NT``, that is ``b^T a``."""
    assert layout == 'NT', layout
    # The compiled one uses TF32 for fp32 operands.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    try:
        return ((b.t() @ a).to(out_dtype),)
    finally:
        torch.set_float32_matmul_precision(precision)


class TransformerEngine(Contender):
    """Default options: TF32, deterministic projection, gradients of x summed by autograd."""

    name = 'te'
    split_k = False
    buffer = False

    @classmethod
    def available(cls) -> tuple[bool, str]:
        if importlib.util.find_spec(PACKAGE) is None:
            return False, 'not installed; pip install --no-deps transformer-engine'
        _, how = load()
        try:
            return True, f'transformer-engine {version("transformer-engine")} ({how})'
        except PackageNotFoundError:
            return True, f'transformer-engine of unknown version ({how})'

    @classmethod
    def module(cls, name: str) -> ModuleType:
        return load()[0]

    def unsupported(self) -> str:
        return '' if self.case.streams == 4 else 'only 4 streams'

    def streams(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.case.streams, self.case.hidden)).transpose(-1, -2)

    def streams_back(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2).flatten(-2)

    def square(self, h: Tensor) -> Tensor:
        return h.transpose(-1, -2)

    square_back = square

    def params(self, weight: Tensor, bias: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        weight, bias = (transposed_square(p, self.case.streams) for p in (weight, bias))
        columns = weight.unflatten(-1, (self.case.streams, self.case.hidden))
        return columns.transpose(-1, -2).flatten(-2), bias.view(1, -1), alpha

    def params_back(self, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, alpha = params
        columns = weight.unflatten(-1, (self.case.hidden, self.case.streams))
        weight, bias = columns.transpose(-1, -2).flatten(-2), bias.view(-1)
        weight, bias = (transposed_square(p, self.case.streams) for p in (weight, bias))
        return weight, bias, alpha

    def sinkhorn(self, logits: Tensor) -> Tensor:
        return load()[0].mhc_fused_sinkhorn(logits, self.case.streams, iters=self.case.iterations)

    def mapping(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._maps(x, params, None)

    def pre(self, x: Tensor, h_pre: Tensor) -> Tensor:
        return load()[0].mhc_fused_aggregate(x, h_pre, self.case.streams)

    def post(self, x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        n = self.case.streams
        return load()[0].mhc_fused_expand_combine(y, None, h_post, x, h_res, n)

    def read(self, x: Tensor, params: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        buffer = torch.empty_like(x, dtype=torch.float32) if self.buffer else None
        h_pre, h_post, h_res = self._maps(x, params, buffer)
        n = self.case.streams
        u = load()[0].mhc_fused_aggregate(x, h_pre, n, fused_grad_x_acc_buffer=buffer)
        return u, (x, h_post, h_res, *([] if buffer is None else [buffer]))

    def write(self, y: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        x, h_post, h_res, *buffer = state
        n = self.case.streams
        return load()[0].mhc_fused_expand_combine(
            y, None, h_post, x, h_res, n, fused_grad_x_acc_buffer=buffer[0] if buffer else None
        )

    def _maps(
        self, x: Tensor, params: tuple[Tensor, ...], buffer: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, alpha = params
        n, tokens = self.case.streams, x.shape[:2]
        te = load()[0]
        h, mean_square = te.mhc_fused_projection(
            x.flatten(0, 1).flatten(1),
            weight,
            fused_grad_x_acc_buffer=buffer,
            use_split_k=self.split_k,
        )
        h_pre, h_post, logits = te.mhc_fused_scale(h, alpha, bias, mean_square, n)
        h_pre, h_post = (gate.unflatten(0, tokens) for gate in (h_pre, h_post))
        logits = logits.reshape(*tokens, n, n)
        return h_pre, h_post, te.mhc_fused_sinkhorn(logits, n, iters=self.case.iterations)


class TransformerEngineSplitK(TransformerEngine):
    """Projection with split-K and atomic adds: its fastest, and not repeatable."""

    name = 'te-split-k'
    split_k = True


class TransformerEngineBuffer(TransformerEngine):
    """Gradients of x accumulated in one fp32 buffer by its kernels, as it offers."""

    name = 'te-buffer'
    buffer = True
    without = ('fused_edge', 'mapping', 'pre', 'post', 'sinkhorn')
