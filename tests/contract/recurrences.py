"""Mamba-2 and the gated delta net token by token, as their papers have them, in fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def convolved(x, weight, bias, starts):
    """``silu(sum_j weight[:, -1-j] x[t-j] + bias)``, of [b, s, channels], within a sequence."""
    out, start = torch.zeros_like(x), 0
    for t in range(x.shape[1]):
        start = t if t in starts else start
        for back in range(min(weight.shape[1], t - start + 1)):
            out[:, t] = out[:, t] + weight[:, -1 - back] * x[:, t - back]
    return F.silu(out if bias is None else out + bias)


def state_space(x, dt, A, B, C, starts=(), state=None):
    """``h_t = exp(dt A) h + dt x B^T``, ``y_t = h_t C`` (arXiv 2405.21060).

    Args:
        x: [b, s, h, p].
        dt: [b, s, h], after its softplus.
        B: [b, s, h, n].
        starts: the first tokens of sequences but the first.
    """
    batch, length, heads, size = x.shape
    zero = x.new_zeros(batch, heads, size, B.shape[-1])
    state, outputs = zero if state is None else state, []
    for t in range(length):
        state = zero if t in starts else state
        write = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + write
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, 1), state


def gated_delta_rule(q, k, v, g, beta, starts=(), state=None):
    """``S_t = alpha_t (I - beta_t k_t k_t^T) S + beta_t k_t v_t^T`` (arXiv 2412.06464).

    Transposed against the paper, so that ``o_t = S_t^T q_t``; alpha is exp(g).
    Args: q, k [b, s, h, k]; v [b, s, h, v]; g, beta [b, s, h].
    """
    zero = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    state, outputs = zero if state is None else state, []
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    for t in range(q.shape[1]):
        state = zero if t in starts else state
        alpha, strength = (w[:, t, :, None, None] for w in (g.exp(), beta))
        key = k[:, t, :, :, None]
        erased = (eye - strength * key @ key.mT) @ state
        state = alpha * erased + strength * key @ v[:, t, :, None, :]
        outputs.append((state.mT @ q[:, t, :, :, None]).squeeze(-1) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), state


def parameters_of(mixer):
    """Its parameters in fp64, with one name for each of the convolution's on every release."""
    named = {name: value.detach().double() for name, value in mixer.named_parameters()}
    return {name.replace('conv1d.', 'conv1d_'): value for name, value in named.items()}


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def mamba_layer(mixer, x, starts=()):
    """Output [s, b, C] of a ``MambaMixer`` for x [s, b, C]."""
    own, config = parameters_of(mixer), mixer.config
    heads, size, groups = mixer.nheads, config.mamba_head_dim, config.mamba_num_groups
    inner, states = heads * size, groups * config.mamba_state_dim
    projected = x.double().transpose(0, 1) @ own['in_proj.weight'].T
    z, xbc, dt = projected.split([inner, inner + 2 * states, heads], -1)
    xbc = convolved(xbc, own['conv1d_weight'].squeeze(1), own['conv1d_bias'], starts)
    u, B, C = xbc.split([inner, states, states], -1)
    u = u.unflatten(-1, (heads, size))
    B, C = (w.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, dim=2) for w in (B, C))
    dt = F.softplus(dt + own['dt_bias'])
    y, _ = state_space(u, dt, -own['A_log'].exp(), B, C, starts)
    y = (y + own['D'][:, None] * u).flatten(-2) * F.silu(z)
    grouped = y.unflatten(-1, (groups, -1))
    normed = rms_norm(grouped, own['norm.weight'].view(groups, -1), 1e-5).flatten(-2)
    return (normed @ own['out_proj.weight'].T).transpose(0, 1)


def delta_net_layer(mixer, x, starts=()):
    """Output [s, b, C] of a ``GatedDeltaNet`` with RMS norms for x [s, b, C]."""
    own, config = parameters_of(mixer), mixer.config
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    key, value = keys * config.linear_key_head_dim, values * config.linear_value_head_dim
    projected = x.double().transpose(0, 1) @ own['in_proj.weight'].T
    qkv, z, beta, alpha = projected.split([2 * key + value, value, values, values], -1)
    qkv = convolved(qkv, own['conv1d_weight'].squeeze(1), None, starts)
    q, k, v = qkv.split([key, key, value], -1)
    q, k = (w.unflatten(-1, (keys, -1)).repeat_interleave(values // keys, dim=2) for w in (q, k))
    q, k = (w * torch.rsqrt(w.square().sum(-1, keepdim=True) + 1e-6) for w in (q, k))
    g = -own['A_log'].exp() * F.softplus(alpha + own['dt_bias'])
    y, _ = gated_delta_rule(q, k, v.unflatten(-1, (values, -1)), g, beta.sigmoid(), starts)
    normed = rms_norm(y, own['out_norm.weight'], config.layernorm_epsilon).flatten(-2)
    return (normed * F.silu(z) @ own['out_proj.weight'].T).transpose(0, 1)
