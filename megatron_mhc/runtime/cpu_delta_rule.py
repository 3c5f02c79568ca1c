"""The kernels that a gated delta net calls, in plain torch, for the emulated CPU device.

Names and parameters are those of the package ``fla``, whose kernels need CUDA. For function, not
speed: sums and states are in fp32, or in fp64 for inputs in fp64.
Source: https://arxiv.org/abs/2412.06464, section 3.3, over chunks of a sequence.
Shapes: b batch, s sequence, h heads, k and v the sizes of a key and of a value.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from megatron_mhc.runtime.cpu_ssd import causal_conv, exact

CHUNK = 64  # tokens


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x`` divided by the root of its squares' sum along the last dimension."""
    values = exact(x)
    return (values * torch.rsqrt(values.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: None = None,
    output_final_state: bool = False,
    activation: str = 'silu',
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """``causal_conv`` of [b, s, channels], where ``cu_seqlens`` are the bounds of sequences."""
    assert activation in ('silu', 'swish') and initial_state is None and not output_final_state
    numbers = None
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[1], device=x.device)
        numbers = torch.bucketize(tokens, cu_seqlens[1:], right=True).unsqueeze(0)
    return causal_conv(x, weight, bias, numbers), None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """``S_t = exp(g_t) (S_{t-1} - beta_t k_t (k_t^T S_{t-1})) + beta_t k_t v_t^T``.

    Args:
        q: [b, s, h, k]; ``k`` likewise.
        v: [b, s, h, v].
        g: [b, s, h], the logarithm of a decay.
        beta: [b, s, h], the strength of a write.
        initial_state: [b, h, k, v], or one for each sequence of ``cu_seqlens``.
        cu_seqlens: the bounds of the sequences that one row is made of.
        chunk_size: tokens that are one matrix; the last chunk may have fewer.

    Returns:
        ``S_t^T q_t / sqrt(k)`` [b, s, h, v] and, if asked for, the last states.
    """
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    heads_first = [exact(t).transpose(1, 2) for t in (q, k, v, g, beta)]
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = heads_first[0].new_zeros(*heads_first[0].shape[:2], q.shape[-1], v.shape[-1])
        if initial_state is not None:
            state = state + (initial_state if cu_seqlens is None else initial_state[row])
        parts = [t[:, :, start:end].split(chunk_size, 2) for t in heads_first]
        for chunk in zip(*parts, strict=True) if start < end else ():
            output, state = _chunk(state, *chunk)
            outputs.append(output)
        states.append(state)
    y = torch.cat(outputs, 2).transpose(1, 2) * q.shape[-1] ** -0.5
    return y.to(v.dtype), torch.cat(states) if output_final_state else None


def _chunk(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [b, h, i, v] of a chunk's tokens i, and the state after it.

    With G the sums of g, what token i writes is ``k_i w_i^T``, of which all w solve ``w_i + beta_i
    sum_{j<i} exp(G_i - G_j) (k_i . k_j) w_j = beta_i (v_i - exp(G_i) S^T k_i)``.
    """
    total = g.cumsum(-1).unsqueeze(-1)
    length = q.shape[2]
    reach = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    decay = (total - total.mT).masked_fill(~reach, -torch.inf).exp()
    beta = beta.unsqueeze(-1)
    system = beta * (k @ k.mT) * decay  # its diagonal is taken as 1
    wanted = beta * (v - total.exp() * (k @ state))
    written = torch.linalg.solve_triangular(
        system.tril(-1), wanted, upper=False, unitriangular=True
    )
    output = total.exp() * (q @ state) + (q @ k.mT * decay) @ written
    last = total[:, :, -1:]
    return output, last.exp() * state + ((last - total).exp() * k).mT @ written
