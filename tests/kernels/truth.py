"""What the kernels are held against: fp64 autograd of the reference on the same rounded inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Largest relative RMS errors against fp64, ``|got - want| / |want|`` over a whole tensor."""

    maps: float
    streams: float
    gradients: float


# Streams and gradients of 16 bits carry one rounding, 2^-8 (bf16) or 2^-11 of a value at most, and
# half as much on the whole. Maps and the gradients of fp32 tensors are fp32 whatever the streams.
TOLERANCE = {
    torch.float32: Tolerance(maps=1e-5, streams=5e-7, gradients=2e-5),
    torch.bfloat16: Tolerance(maps=1e-5, streams=2.0**-8, gradients=2.0**-8 + 2e-5),
    torch.float16: Tolerance(maps=1e-5, streams=2.0**-11, gradients=2.0**-11 + 2e-5),
}
# Several sublayers: each hands a rounded gradient to the one before.
CHAIN = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SINKHORN_GRADIENT = 2e-6

# n, T, C: one value a stream; masked tails in tokens and channels; several programs, tiles, splits
# of the channels and segments of the tokens. The tile tables stand in kernels/triton.
SHAPES = [(1, 21, 1), (1, 35, 70), (2, 37, 67), (4, 1, 2), (4, 67, 35), (4, 3, 261), (8, 5, 37)]
DTYPES = list(TOLERANCE)

Tensors = Mapping[str, Tensor]


def parameters(n: int, channels: int, device: torch.device) -> dict[str, Tensor]:
    """phi, b and alpha with logits of order 1."""
    m, width = n * n + 2 * n, n * channels
    return {
        'weight': (torch.randn(m, width) / width**0.5).to(device),
        'bias': torch.randn(m).to(device),
        'alpha': (0.5 + torch.rand(3)).to(device),
    }


def streams(n: int, tokens: int, channels: int, device: torch.device, dtype) -> Tensor:
    x = torch.randn(tokens, n * channels)
    if n * channels == 1:
        # Its gradient cancels, but for 1/r times fp32's last place: r must not be small.
        x += x.sign()
    return x.to(device, dtype)


def maps(n: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    return {
        'h_post': (2 * torch.rand(tokens, n)).to(device),
        'h_res': torch.rand(tokens, n, n).to(device),
    }


def seed_tensor(device: torch.device) -> Tensor:
    return torch.randint(0, 2**62, (1,)).to(device)


def with_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Tensors,
    cotangents: tuple[Tensor | None, ...],
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs of ``function``, and what autograd gives every tensor; None skips an output."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [(out, grad) for out, grad in zip(outputs, cotangents, strict=True) if grad is not None]
    torch.autograd.backward(*(list(part) for part in zip(*used, strict=True)))
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    return tuple(out.detach() for out in outputs), gradients


def true_gradients(function: Callable, tensors: Tensors, cotangents: tuple) -> tuple:
    """``with_gradients`` in fp64."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    grads = tuple(None if grad is None else grad.double() for grad in cotangents)
    return with_gradients(function, wide, grads)


def terms_of(
    function: Callable, tensors: Tensors, cotangents: tuple, biases: tuple[str, ...]
) -> dict[str, Tensor]:
    """What each token adds to the gradients of ``biases``, ``[..., M]`` in fp64."""
    tokens = tensors['x'].shape[:-1]
    own = {name: tensors[name].expand(*tokens, -1) for name in biases}
    _, gradients = true_gradients(function, {**tensors, **own}, cotangents)
    return {name: gradients[name] for name in biases}


def cotangents_of(*outputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.randn(out.shape).to(out) for out in outputs)


def error(got: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """Relative RMS error; relative to ``scale`` where that is larger than ``want``."""
    assert got.shape == want.shape
    size = want.norm() if scale is None else torch.maximum(want.norm(), scale.norm())
    # What is zero in truth (the map of one stream has no freedom) is held to an absolute bound.
    return float((got.double() - want).norm() / size.clamp(min=1e-2 * want.numel() ** 0.5))


def assert_gradients(
    got: Tensors,
    want: Tensors,
    dtypes: Tensors,
    tolerance: float,
    wide: float = TOLERANCE[torch.float32].gradients,
    sums: Tensors | None = None,
) -> None:
    """Each gradient in the dtype of its tensor, and within ``tolerance``, or ``wide`` where fp32.

    ``sums`` has, for gradients that add a term of every token, which may cancel, these terms:
    their root sum of squares is the size that an error is relative to.
    """
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert got[name].dtype == dtypes[name].dtype, name
        found = error(got[name], gradient, (sums or {}).get(name))
        limit = tolerance if got[name].dtype.itemsize == 2 else wide
        assert found < limit, f'd{name}: {found:.2e}'


def rounded_once(want: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 -> ``dtype`` to nearest even; torch rounds to fp32 on the way, here to odd."""
    single = want.float()
    bits = single.view(torch.int32)
    bits = torch.where(single.double().abs() > want.abs(), bits - 1, bits)
    inexact = bits.view(torch.float32).double() != want
    if dtype == torch.float32:
        return single
    return torch.where(inexact, bits | 1, bits).view(torch.float32).to(dtype)


def ulps(got: Tensor, want: Tensor) -> Tensor:
    """How many values of the dtype lie between ``got`` and ``want``, exactly."""

    def place(tensor: Tensor) -> Tensor:
        kind = torch.int16 if tensor.dtype.itemsize == 2 else torch.int32
        bits = tensor.view(kind).long()
        magnitude = bits & (2 ** (8 * tensor.dtype.itemsize - 1) - 1)
        return torch.where(bits < 0, -magnitude, magnitude)

    assert got.dtype == want.dtype
    return (place(got) - place(want)).abs()


def assert_one_ulp(got: Tensor, want: Tensor, terms: Tensor) -> None:
    """Within one ulp of ``want`` (fp64) rounded once.

    ``terms`` are the sums of absolute terms: where these cancel, fp32 arithmetic leaves some units
    in its own last place of them, which may be more than an ulp of the small difference.
    """
    near = ulps(got, rounded_once(want, got.dtype)) <= 1
    cancelled = (got.double() - want).abs() <= 2.0**-21 * terms
    assert (near | cancelled).all()
    # In fp32 an ulp is no more than the arithmetic itself leaves, and few values prove nothing.
    if got.dtype.itemsize == 2 and got.numel() > 100:
        assert near.float().mean() > 0.98
