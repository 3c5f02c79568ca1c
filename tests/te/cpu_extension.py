"""Transformer Engine's own Python on the CPU: a stand-in for its compiled half. Tests only.

The modules, autograd functions, fp8 contexts and stores of weight gradients are those of the
released wheel; only the handful of compiled operations that they end in is written here, in torch
(fp8 by torch's own fp8 types, scaled per tensor). One that is not raises and names itself.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import re
import sys
import types
from unittest import mock

import torch

# Looks for some of the modules that are replaced below, by their specifications.
import torch._dynamo

ENVIRONMENT = {
    # Its own switches: the core library is not looked for, scales and softmax are plain torch.
    'NVTE_PROJECT_BUILDING': '1',
    'NVTE_UNFUSED_FP8_UPDATE': '1',
    'NVTE_MASKED_SOFTMAX_FUSION': '0',
    'NVTE_TORCH_COMPILE': '0',
}


class _Numbered(type):
    """A C++ enumeration: any name, numbered as it is asked for."""

    def __new__(mcs, name, members=()):
        cls = super().__new__(mcs, name, (), {'__members__': {}})
        cls._count = itertools.count()
        for member in members:
            getattr(cls, member)
        return cls

    def __init__(cls, *args):
        super().__init__(cls.__name__)

    def __getattr__(cls, name):
        if name.startswith('__'):
            raise AttributeError(name)
        value = cls.__members__[name] = next(cls._count)
        setattr(cls, name, value)
        return value


class _Extension(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)

        def absent(*args, **kwargs):
            raise NotImplementedError(f'transformer_engine_torch.{name} has no CPU stand-in')

        value = _Numbered(name) if name[0].isupper() else absent
        setattr(self, name, value)
        return value


def install(folder: pathlib.Path) -> None:
    """Make ``import transformer_engine`` find the unpacked wheel in ``folder``.

    After ``megatron_mhc.runtime.cpu_device.install()``.

    Raises:
        RuntimeError: Megatron was imported before and has noted that there is none.
    """
    if 'megatron.core' in sys.modules:
        raise RuntimeError('install the CPU stand-in before Megatron is imported')
    # Megatron in the process that started this one has made other choices.
    for name in [name for name in os.environ if name.startswith('NVTE_')]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)
    sys.path.insert(0, str(folder))
    # What it exports models with, and imports with everything else.
    for name in ('onnx', 'onnxscript', 'einops'):
        sys.modules.setdefault(name, mock.MagicMock(__spec__=None, __path__=[]))
    # Hopper, the oldest GPU with every recipe but MXFP8.
    properties = torch.cuda.get_device_properties()
    properties.major, properties.minor = 9, 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)

    extension = _Extension('transformer_engine_torch')
    extension.__file__ = __file__
    source = (folder / 'transformer_engine' / 'pytorch' / 'constants.py').read_text()
    extension.DType = _Numbered('DType', re.findall(r'int\(tex\.DType\.(k\w+)\)', source))
    # Positions in lists, so that their order matters.
    kinds = ('INPUT', 'WEIGHT', 'OUTPUT')
    extension.FP8FwdTensors = _Numbered(
        'FP8FwdTensors', [f'GEMM{number}_{kind}' for number in (1, 2, 3) for kind in kinds]
    )
    extension.FP8BwdTensors = _Numbered(
        'FP8BwdTensors', [f'GRAD_{kind}{n}' for n in (1, 2, 3) for kind in ('OUTPUT', 'INPUT')]
    )
    for function in OPERATIONS:
        # Compiled code is out of autograd's sight.
        setattr(extension, function.__name__, torch.no_grad()(function))
    sys.modules['transformer_engine_torch'] = extension

    sys.modules['fused_weight_gradient_mlp_cuda'] = _apex_products()

    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda name: None
    # The first import went as far as the extension, and let the failure pass.
    import transformer_engine.pytorch  # noqa: F401

    # Its modules ask both before they do anything.
    torch.cuda.is_available = lambda: True
    torch.Tensor.is_cuda = property(lambda tensor: True)


def _apex_products() -> types.ModuleType:
    """What Megatron's own linear layers take of Apex: products that add to a gradient."""
    module = types.ModuleType('fused_weight_gradient_mlp_cuda')

    def add(x, grad, main_grad):
        main_grad.add_(grad.t().matmul(x))
        FUSED.append(tuple(main_grad.shape))

    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = add
    return module


def get_cudnn_version():
    return 91200


def get_cublasLt_version():  # noqa: N802
    return 130000


def get_num_cublas_streams():
    return 1


# --- norms ----------------------------------------------------------------------------------------


def layernorm_fwd(x, weight, bias, eps, out, quantizer, dtype, margin, zero_centered):
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    rstd = (wide.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
    y = (wide - mean) * rstd * (weight.float() + zero_centered) + bias.float()
    return _result(y.to(_torch_dtype(dtype)), out, quantizer), mean.squeeze(-1), rstd.squeeze(-1)


def layernorm_bwd(grad, x, mean, rstd, weight, margin, zero_centered):
    rstd = rstd.unsqueeze(-1)
    unit = (x.float() - mean.unsqueeze(-1)) * rstd
    d = grad.float() * (weight.float() + zero_centered)
    d = d - d.mean(-1, keepdim=True) - unit * (d * unit).mean(-1, keepdim=True)
    d_weight, d_bias = _rows(grad.float() * unit).sum(0), _rows(grad.float()).sum(0)
    return (d * rstd).to(x.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, margin, zero_centered):
    rstd = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    y = x.float() * rstd * (weight.float() + zero_centered)
    return _result(y.to(_torch_dtype(dtype)), out, quantizer), None, rstd.squeeze(-1)


def rmsnorm_bwd(grad, x, rstd, weight, margin, zero_centered):
    rstd = rstd.unsqueeze(-1)
    unit = x.float() * rstd
    d = grad.float() * (weight.float() + zero_centered)
    d = d - unit * (d * unit).mean(-1, keepdim=True)
    d_weight = _rows(grad.float() * unit).sum(0)
    return (d * rstd).to(x.dtype), d_weight.to(weight.dtype)


# --- products -------------------------------------------------------------------------------------


def generic_gemm(a, trans_a, b, trans_b, out, quantizer, out_dtype, bias, *others, **overlap):
    """Column-major as cuBLAS has it: the row-major result is ``op(b) @ op(a)``."""
    _, gelu, _, grad, _, _, accumulate, _ = others
    if gelu or overlap['comm_overlap'] is not None:
        raise NotImplementedError('fused GELU and overlapped communication have no CPU stand-in')
    a, b = _plain(a), _plain(b)
    left, right = _rows(b), _rows(a)
    y = (left.t() if trans_b else left) @ (right.t() if trans_a else right)
    bias_grad = None
    if bias is not None:
        if grad:
            bias_grad = left.sum(0).to(bias.dtype)
        else:
            y = y + bias
    if not trans_b:
        y = y.view(*b.shape[:-1], -1)
    y = y.to(_torch_dtype(out_dtype) or y.dtype)
    if out is not None:
        y = out.add_(y) if accumulate else out.copy_(y)
    return _result(y, None, quantizer), bias_grad, None, None


def te_general_grouped_gemm(
    a, trans_a, b, trans_b, out, out_dtype, splits, bias, bias_dtype, single_output, *others
):
    _, grad, _, _, accumulate, *_ = others
    outs = out[0].split(list(splits)) if single_output else out
    for index, one in enumerate(outs):
        own = bias[index] if len(bias) > index and bias[index].numel() else None
        common = (bias_dtype, False, None, grad, None, 0, False, False)
        y, bias_grad, _, _ = generic_gemm(
            *(a[index], trans_a, b[index], trans_b, None, None, None, own, *common),
            comm_overlap=None,
        )
        if grad and own is not None:
            own.copy_(bias_grad)
        one.copy_(one + y if accumulate else y)
    return bias


# --- fp8 ------------------------------------------------------------------------------------------


def create_empty_quantized_tensor(quantizer, shape, dtype, device, pinned):
    from transformer_engine.pytorch.tensor import Float8Tensor, Float8TensorStorage

    data, transpose = None, None
    if quantizer.rowwise_usage:
        data = torch.empty(shape, dtype=torch.uint8)
    if quantizer.columnwise_usage:
        transpose = torch.empty((shape[-1], *shape[:-1]), dtype=torch.uint8)
    common = {
        'data': data,
        'data_transpose': transpose,
        'fp8_scale_inv': torch.ones(1),
        'fp8_dtype': quantizer.dtype,
        'quantizer': quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**common, fake_dtype=dtype)
    return Float8Tensor(shape, dtype, device=torch.device('cpu'), **common)


def quantize(x, quantizer, out=None, noop=None):
    """One scale a tensor: its own largest value (tensorwise), or that of its history (delayed)."""
    if out is None:
        out = quantizer.make_empty(x.shape, dtype=x.dtype, device=x.device)
    fp8 = _torch_dtype(quantizer.dtype)
    largest, amax = torch.finfo(fp8).max, x.detach().float().abs().amax()
    if hasattr(quantizer, 'scale') and hasattr(quantizer, 'amax') and _delayed(quantizer):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale
    else:
        scale = largest / amax if amax > 0 else torch.ones(())
    data = (x.detach().float() * scale).clamp(-largest, largest).to(fp8).view(torch.uint8)
    out._scale_inv.copy_((1 / scale).expand(1))
    if out._data is not None:
        out._data.copy_(data.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(data.movedim(-1, 0))
        out._transpose_invalid = False
    QUANTIZED.append(tuple(x.shape))
    return out


def split_quantize(x, splits, quantizers, **others):
    return [quantize(part, q) for part, q in zip(x.split(list(splits)), quantizers, strict=True)]


def bgrad_quantize(grad, quantizer):
    return _rows(grad).sum(0), quantize(grad, quantizer)


def fp8_transpose(data, dtype, out=None):
    return data.movedim(-1, 0).contiguous()


def fused_multi_row_padding(x, out, splits, padded_splits):
    out.zero_()
    for rows, padded in zip(x.split(splits), out.split(padded_splits), strict=True):
        padded[: len(rows)] = rows


def fused_multi_row_unpadding(x, out, padded_splits, splits):
    for padded, rows in zip(x.split(padded_splits), out.split(splits), strict=True):
        rows.copy_(padded[: len(rows)])


def multi_tensor_l2norm(_chunk_size, _noop, tensor_lists, per_tensor=False):
    if per_tensor:
        raise NotImplementedError('multi_tensor_l2norm: the stand-in knows the norm of all only')
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().reshape(1), norms.new_empty(0)


QUANTIZED: list[tuple[int, ...]] = []
FUSED: list[tuple[int, ...]] = []
"""Shapes of what was quantised, and of gradients that a product was added to."""


def _delayed(quantizer):
    return type(quantizer).__name__ == 'Float8Quantizer'


def _plain(tensor):
    return (
        tensor
        if isinstance(tensor, torch.Tensor) and not _quantized(tensor)
        else (tensor.dequantize(dtype=tensor._dtype))
    )


def _quantized(tensor):
    from transformer_engine.pytorch import QuantizedTensorStorage

    return isinstance(tensor, QuantizedTensorStorage)


def _result(y, out, quantizer):
    if quantizer is not None:
        return quantizer(y) if out is None else quantizer.update_quantized(y, out)
    return y if out is None else out.copy_(y)


def _rows(tensor):
    return tensor.reshape(-1, tensor.shape[-1])


def _torch_dtype(dtype):
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return dtype if dtype is None or isinstance(dtype, torch.dtype) else TE_DType_To_Torch[dtype]


OPERATIONS = (
    get_cudnn_version,
    get_cublasLt_version,
    get_num_cublas_streams,
    layernorm_fwd,
    layernorm_bwd,
    rmsnorm_fwd,
    rmsnorm_bwd,
    generic_gemm,
    te_general_grouped_gemm,
    create_empty_quantized_tensor,
    quantize,
    split_quantize,
    bgrad_quantize,
    fp8_transpose,
    fused_multi_row_padding,
    fused_multi_row_unpadding,
    multi_tensor_l2norm,
)
