"""The kernels that a Mamba-2 layer calls, in plain torch, for the emulated CPU device.

Names and parameters are those of the package ``mamba_ssm``, whose kernels need CUDA. For function,
not speed: sums and states are in fp32, or in fp64 for inputs in fp64.
Source: state space duality, https://arxiv.org/abs/2405.21060, section 6, over chunks of a sequence.
Shapes: b batch, s sequence, h heads, p head size, g groups, n state size, w width of a convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def exact(x: Tensor) -> Tensor:
    """``x`` in the type of sums and states."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """``silu`` of a convolution of each channel with its past, which ends where its sequence does.

    Args:
        x: [b, s, channels].
        weight: [channels, w]; the last column is that of the token itself.
        bias: [channels].
        seq_idx: [b, s], the number of the sequence that a token is of; none for one in each row.
    """
    length, width, values = x.shape[1], weight.shape[-1], exact(x)
    total = values * weight[:, -1].to(values)
    for back in range(1, min(width, length)):
        past = values[:, :-back]
        if seq_idx is not None:
            past = past * (seq_idx[:, :-back] == seq_idx[:, back:]).unsqueeze(-1)
        total = total + F.pad(past, (0, 0, back, 0)) * weight[:, width - 1 - back].to(values)
    return F.silu(total if bias is None else total + bias.to(values)).to(x.dtype)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`` and ``y_t = h_t C_t + D x_t``, times silu(z).

    Args:
        x: [b, s, h, p]; ``z`` likewise.
        dt: [b, s, h].
        A: [h], negative.
        B: [b, s, g, n], a group for h / g heads; ``C`` likewise.
        chunk_size: tokens that are one matrix; the last chunk may have fewer.
        D: [h] or [h, p].
        dt_bias: [h].
        initial_states: [b, h, p, n].
        seq_idx: [b, s], the number of the sequence that a token is of; none for one in each row.
        state_dtype: what the kernels round states to, which are not rounded here.

    Returns:
        y [b, s, h, p] and, if asked for, the state after the last token [b, h, p, n].
    """
    given, heads = x, x.shape[2]
    x, dt, B, C = map(exact, (x, dt, B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    numbers = torch.zeros(x.shape[:2], dtype=torch.int) if seq_idx is None else seq_idx
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    state = state if initial_states is None else state + initial_states
    before, outputs = numbers[:, 0], []
    parts = (x * dt.unsqueeze(-1), dt * A, B, C, numbers.to(x.device))
    for u, rate, b, c, number in zip(*(p.split(chunk_size, 1) for p in parts), strict=True):
        total = rate.cumsum(1)
        reach = (number.unsqueeze(2) == number.unsqueeze(1)).tril().unsqueeze(-1)
        decay = total.unsqueeze(2) - total.unsqueeze(1)
        decay = decay.masked_fill(~reach, -torch.inf).exp()  # [b, to, from, h]
        carried = total.exp() * (number == before.unsqueeze(1)).unsqueeze(-1)
        inside = torch.einsum('bihn,bjhn,bijh,bjhp->bihp', c, b, decay, u)
        outputs.append(inside + torch.einsum('bihn,bhpn,bih->bihp', c, state, carried))
        added = torch.einsum('bjhn,bjh,bjhp->bhpn', b, decay[:, -1], u)
        state = state * carried[:, -1, :, None, None] + added
        before = number[:, -1]
    y = torch.cat(outputs, 1)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D.unsqueeze(-1))
    y = (y if z is None else y * F.silu(exact(z))).to(given.dtype)
    return (y, state) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    activation: str = 'silu',
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor:
    """What lies between the projections of a Mamba-2 layer, but for its norm.

    Args:
        zxbcdt: [b, s, 2 h p + 2 g n + h], the output of the first projection.
        conv1d_weight: [h p + 2 g n, w], and ``conv1d_bias`` of its first size.
        dt_bias: [h]; ``A`` likewise.
        D: [h], or [h, p] where ``headdim`` is not given.
        activation: of the convolution; ``silu`` alone.
        ngroups: groups of B and C.
        norm_before_gate: of a norm that is not part of this.

    Returns:
        [b, s, h p].
    """
    assert activation in ('silu', 'swish') and not norm_before_gate
    heads = len(A)
    size = D.shape[-1] if headdim is None else headdim
    inner = heads * size
    z, xbc, dt = zxbcdt.split([inner, conv1d_weight.shape[0], heads], -1)
    xbc = causal_conv(xbc, conv1d_weight, conv1d_bias, seq_idx)
    states = (conv1d_weight.shape[0] - inner) // 2
    x, B, C = xbc.split([inner, states, states], -1)
    x, z = (t.unflatten(-1, (heads, size)) for t in (x, z))
    B, C = (t.unflatten(-1, (ngroups, -1)) for t in (B, C))
    options = {'z': z, 'dt_bias': dt_bias, 'dt_softplus': True, 'seq_idx': seq_idx}
    y = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, **options)
    assert isinstance(y, Tensor)
    return y.flatten(-2)


class GatedRMSNorm(nn.Module):
    """An RMS norm over each group of channels, of ``x * silu(z)``.

    Args:
        hidden_size: channels.
        group_size: channels of a group.
        norm_before_gate: gates what the norm gave instead; not here.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert not norm_before_gate
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``x``: [..., channels]; ``z`` as many values."""
        values = exact(x) if z is None else exact(x) * F.silu(exact(z)).view_as(x)
        groups = values.unflatten(-1, (-1, self.group_size))
        normed = F.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2)
        return (normed * self.weight.to(values)).to(x.dtype)
