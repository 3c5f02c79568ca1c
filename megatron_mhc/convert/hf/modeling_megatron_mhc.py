"""GPT models with one or n residual streams, as megatron-mhc trains them, for transformers.

A file for a folder of weights: it needs torch and transformers alone. Symbols: b batch, s sequence,
n streams, C hidden size; streams are ``[b, s, n*C]``, the stream index outer. What belongs to
streams is computed in fp32 whatever the dtype of the model.
"""

import copy
import inspect
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# What transformers calls the cache among the arguments of a model, and in its outputs.
CACHE = next(
    name
    for name in ('cache', 'past_key_values')
    if name in inspect.signature(create_causal_mask).parameters
)
DEFAULTS = {
    'use_cache': True,
    'vocab_size': 50304,
    'hidden_size': 1024,
    'intermediate_size': 4096,
    'num_hidden_layers': 24,
    'num_attention_heads': 16,
    'num_key_value_heads': 16,
    'head_dim': 64,
    'max_position_embeddings': 4096,
    # rope, learned_absolute or none
    'position_embedding_type': 'rope',
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
    'rope_interleaved': False,
    'normalization': 'RMSNorm',
    'norm_eps': 1e-5,
    'qk_norm': False,
    'hidden_act': 'silu',
    'gated_mlp': True,
    'attention_bias': False,
    'qkv_bias': False,
    'mlp_bias': False,
    'attention_dropout': 0.0,
    # Multi-latent attention where the rank of keys and values is given; ``head_dim`` is then what
    # RoPE turns.
    'kv_lora_rank': None,
    'q_lora_rank': None,
    'qk_head_dim': 128,
    'v_head_dim': 128,
    'residual_in_fp32': False,
    # Experts in the layers where ``expert_layers`` has 1.
    'num_experts': 0,
    'expert_layers': [],
    'experts_per_token': 2,
    'expert_intermediate_size': 0,
    'shared_expert_intermediate_size': None,
    'shared_expert_gate': False,
    # softmax or sigmoid
    'router_score': 'softmax',
    'router_pre_softmax': False,
    'router_scaling_factor': None,
    'router_bias': False,
    'router_groups': None,
    'router_group_topk': None,
    'router_dtype': None,
    # standard, hc (arXiv 2409.19606), mhc (arXiv 2512.24880), gated (as Qwen4-Exp) or attention
    # (arXiv 2603.15031, by blocks)
    'residual_type': 'mhc',
    'num_residual_streams': 4,
    'stream_merge': 'mean',
    'residual_norm_eps': 1e-6,
    # Whose conventions mhc follows; ``NUMERICS`` has them.
    'numerics': 'paper',
    'fixed_mappings': [],
    'manifold': 'sinkhorn',
    'sinkhorn_iterations': 20,
    'single_pass': False,
    'hc_variant': 'dynamic',
    'hc_tanh': True,
    'gated_rank': 320,
    # In sublayers.
    'attention_block_size': 24,
}


class MegatronMhcConfig(PretrainedConfig):
    """Every value that decides what the weights compute; ``DEFAULTS`` has all of them."""

    model_type = 'megatron_mhc'
    keys_to_ignore_at_inference = ['cache', 'past_key_values']

    def __init__(self, **given):
        for name, default in DEFAULTS.items():
            setattr(self, name, given.pop(name, copy.deepcopy(default)))
        super().__init__(**given)

    @property
    def streams(self):
        """n, or 0 where there is one residual stream."""
        return 0 if self.residual_type in ('standard', 'attention') else self.num_residual_streams


class Norm(nn.Module):
    """RMSNorm or LayerNorm, computed in fp32 and returned in the dtype of its weight."""

    def __init__(self, config, size):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if config.normalization != 'RMSNorm' else None

    def forward(self, x: Tensor) -> Tensor:
        shape, weight = self.weight.shape, self.weight.float()
        if self.bias is None:
            normed = F.rms_norm(x.float(), shape, weight, self.eps)
        else:
            normed = F.layer_norm(x.float(), shape, weight, self.bias.float(), self.eps)
        return normed.to(self.weight.dtype)


class CastLinear(nn.Linear):
    """A linear layer without bias in the dtype of its input, whatever that of its weight is.

    It is called as a module, so that weights which are offloaded come back before.
    """

    def __init__(self, width, size):
        super().__init__(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotary(config, positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """cos and sin ``[b, 1, s, d]`` fp32 of ``positions`` ``[b, s]``."""
    parameters = dict(config.rope_parameters)
    kind, scale = parameters['rope_type'], 1.0
    if kind == 'default':
        part = int(size * parameters.get('partial_rotary_factor', 1.0))
        steps = torch.arange(0, part, 2, dtype=torch.float32, device=positions.device)
        frequencies = 1.0 / (parameters['rope_theta'] ** (steps / part))
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, positions.device)
    angles = positions[:, None, :, None].float() * frequencies.to(positions.device)
    if config.rope_interleaved:
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first values of ``[b, heads, s, d]`` by their position; the rest stays."""
    size = cos.shape[-1]
    cos, sin, rest = cos.to(x.dtype), sin.to(x.dtype), x[..., size:]
    x = x[..., :size]
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        turned = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
    return torch.cat([x * cos + turned * sin, rest], dim=-1)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Softmax attention in fp32 with every product spelled out."""
    groups = module.num_key_value_groups
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Causal attention with grouped queries."""

    is_causal = True

    def __init__(self, config, index):
        super().__init__()
        self.config, self.layer_idx = config, index
        heads, groups, size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.num_key_value_groups = heads // groups
        self.scaling = size**-0.5
        width, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(width, heads * size, bias=bias)
        self.k_proj = nn.Linear(width, groups * size, bias=bias)
        self.v_proj = nn.Linear(width, groups * size, bias=bias)
        self.o_proj = nn.Linear(heads * size, width, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = Norm(config, size), Norm(config, size)

    def queries_keys_values(self, x: Tensor, position: tuple[Tensor, Tensor] | None):
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if position is not None:
            q, k = (rotate(t, *position, self.config.rope_interleaved) for t in (q, k))
        return q, k, v

    def forward(self, x: Tensor, position, mask, cache, **kwargs) -> Tensor:
        q, k, v = self.queries_keys_values(x, position)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = eager_attention
        if self.config._attn_implementation != 'eager':
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.config.attention_dropout if self.training else 0.0
        out, _ = attend(self, q, k, v, mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(out.flatten(2))


class LatentAttention(Attention):
    """Multi-latent attention (DeepSeek-V2); the cache has whole keys and values."""

    def __init__(self, config, index):
        nn.Module.__init__(self)
        self.config, self.layer_idx, self.num_key_value_groups = config, index, 1
        heads, width, turned = config.num_attention_heads, config.hidden_size, config.head_dim
        size, rank = config.qk_head_dim + turned, config.kv_lora_rank
        self.scaling = size**-0.5
        rope = config.rope_parameters
        if rope['rope_type'] == 'yarn':
            self.scaling *= (0.1 * rope['mscale_all_dim'] * math.log(rope['factor']) + 1.0) ** 2
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * size, bias=False)
        else:
            self.q_proj = nn.Linear(width, heads * size, bias=False)
        self.kv_a_proj = nn.Linear(width, rank + turned, bias=False)
        into = heads * (config.qk_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(rank, into, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, width, bias=config.attention_bias)
        self.q_a_layernorm = self.kv_a_layernorm = nn.Identity()
        if config.qk_norm:
            self.kv_a_layernorm = Norm(config, rank)
            if config.q_lora_rank:
                self.q_a_layernorm = Norm(config, config.q_lora_rank)

    def queries_keys_values(self, x: Tensor, position: tuple[Tensor, Tensor] | None):
        config = self.config
        heads, own, turned = config.num_attention_heads, config.qk_head_dim, config.head_dim
        if config.q_lora_rank:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        else:
            q = self.q_proj(x)
        q, q_turned = q.unflatten(-1, (heads, -1)).transpose(1, 2).split([own, turned], dim=-1)
        latent, k_turned = self.kv_a_proj(x).split([config.kv_lora_rank, turned], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = kv.split([own, config.v_head_dim], dim=-1)
        # Pairs lie side by side; ``rotate`` takes the first of all, and then the second of all.
        q_turned, k_turned = (
            rotate(torch.cat([t[..., ::2], t[..., 1::2]], dim=-1), *position, False)
            for t in (q_turned, k_turned.unsqueeze(1))
        )
        k = torch.cat([k, k_turned.expand(-1, heads, -1, -1)], dim=-1)
        return torch.cat([q, q_turned], dim=-1), k, v


class MLP(nn.Module):
    def __init__(self, config, size):
        super().__init__()
        width, bias = config.hidden_size, config.mlp_bias
        self.act = ACT2FN[config.hidden_act]
        if config.gated_mlp:
            self.gate_proj = nn.Linear(width, size, bias=bias)
        self.up_proj = nn.Linear(width, size, bias=bias)
        self.down_proj = nn.Linear(size, width, bias=bias)
        self.gated = config.gated_mlp

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(self.act(self.gate_proj(x)) * up if self.gated else self.act(up))


class Experts(nn.Module):
    """The experts that a router chooses for each token, and the shared ones beside them."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.gate = CastLinear(width, config.num_experts)
        if config.router_bias:
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.expert_bias = nn.Parameter(bias, requires_grad=False)
        size, shared = config.expert_intermediate_size, config.shared_expert_intermediate_size
        self.experts = nn.ModuleList(MLP(config, size) for _ in range(config.num_experts))
        self.shared_experts = MLP(config, shared) if shared else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            own = expert(tokens[token]) * weights[token, place, None].to(x.dtype)
            out.index_add_(0, token, own)
        out = out.view_as(x)
        if self.shared_experts is None:
            return out
        shared = self.shared_experts(x)
        return out + (
            shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid()
        )

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the experts of each token, ``[tokens, k]``."""
        config, k = self.config, self.config.experts_per_token
        dtype = {None: x.dtype, 'fp32': torch.float32, 'fp64': torch.float64}[config.router_dtype]
        logits = self.gate(x.to(dtype))
        if config.router_score == 'sigmoid':
            scores = logits.float().sigmoid()
            chosen = self.best(scores + self.expert_bias if config.router_bias else scores)
            weights = scores.gather(-1, chosen)
            if k > 1:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        elif config.router_pre_softmax:
            scores = logits.softmax(-1, dtype=torch.float32)
            chosen = self.best(scores)
            weights = scores.gather(-1, chosen)
        else:
            chosen = self.best(logits)
            weights = logits.gather(-1, chosen).softmax(-1, dtype=torch.float32)
        return (weights * (config.router_scaling_factor or 1.0)).to(dtype), chosen

    def best(self, scores: Tensor) -> Tensor:
        """The k largest, among the groups of experts whose largest have the largest sums."""
        k, groups, chosen = (
            self.config.experts_per_token,
            self.config.router_groups,
            self.config.router_group_topk,
        )
        if chosen:
            grouped = scores.unflatten(-1, (groups, -1))
            sums = grouped.topk(k // chosen, dim=-1).values.sum(-1)
            kept = torch.zeros_like(sums).scatter(-1, sums.topk(chosen, dim=-1).indices, 1.0)
            scores = grouped.masked_fill(kept.unsqueeze(-1) == 0, -math.inf).flatten(-2)
        return scores.topk(k, dim=-1).indices


# Of each convention: Sinkhorn-Knopp; eps added to H_pre, and to H_post; whether eps of the norm
# stands outside the root; whether parameters and maps are in the dtype of the streams; which maps
# are rounded to it before they are applied; whether both terms of the mix are; eps added to the
# gates of the merge, 'model' that of the model's norms.
EPS = 1e-6
NUMERICS = {
    'paper': ('exact', 0, 0, False, False, (), False, 0),
    'deepseek-v4': ('added', EPS, 0, False, False, (), False, EPS),
    'megatron-dev': ('added', EPS, 0, True, False, ('pre', 'post', 'res'), False, 'model'),
    'megatron-main': ('clamped', 0, 0, True, True, (), True, 0),
    'glm-5.3': ('added', EPS, 0, False, False, ('post', 'res'), True, 0),
    'hy4': ('exact', EPS, EPS, False, False, (), False, EPS),
}


def sinkhorn(logits: Tensor, passes: int, kind: str = 'exact') -> Tensor:
    """Doubly stochastic ``[..., n, n]``: columns are normalised first, rows last (mHC, Eq 9).

    With ``added`` eps is in every sum; ``clamped`` has rows first, and no sum below eps.
    """
    if kind == 'clamped':
        m = (logits - logits.amax(-1, keepdim=True)).exp()
        for axis in (-1, -2) * passes:
            m = m / m.sum(axis, keepdim=True).clamp(min=EPS)
        return m
    if kind == 'added':
        m = logits.softmax(-2) + EPS
        for axis in ((-2, -1) * passes)[1:]:
            m = m / (m.sum(axis, keepdim=True) + EPS)
        return m
    for _ in range(passes):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


def permutations(logits: Tensor, n: int) -> Tensor:
    """``[..., n!]`` -> ``[..., n, n]``: a softmax mixture of them, in the order of itertools."""
    order = torch.tensor(list(itertools.permutations(range(n))), device=logits.device)
    matrices = F.one_hot(order, n).flatten(1).double()
    mixed = logits.softmax(dim=-1).double() @ matrices
    return mixed.to(logits.dtype).unflatten(-1, (n, n))


def prime_factors(n: int) -> list[int]:
    factor = next((f for f in range(2, n + 1) if n % f == 0), None)
    return [] if factor is None else [factor, *prime_factors(n // factor)]


def kronecker(logits: Tensor, n: int) -> Tensor:
    """A Kronecker product of mixtures of permutations, one for each prime factor of n."""
    factors = prime_factors(n)
    product = logits.new_ones(*logits.shape[:-1], 1, 1)
    parts = logits.split([math.factorial(factor) for factor in factors], dim=-1)
    for size, part in zip(factors, parts, strict=True):
        mixture = permutations(part, size)
        product = product[..., :, None, :, None] * mixture[..., None, :, None, :]
        product = product.flatten(-2).flatten(-3, -2)
    return product


def rotations(logits: Tensor, n: int) -> Tensor:
    """A rotation in the plane of each pair of streams, in turn: ``n (n - 1) / 2`` angles."""
    rows = list(torch.eye(n, device=logits.device).expand(*logits.shape[:-1], n, n).unbind(-2))
    pairs = itertools.combinations(range(n), 2)
    for (i, j), angle in zip(pairs, logits.split(1, dim=-1), strict=True):
        c, s = angle.cos(), angle.sin()
        rows[i], rows[j] = c * rows[i] - s * rows[j], s * rows[i] + c * rows[j]
    return torch.stack(rows, dim=-2)


# Manifold of H_res -> how many logits it takes, and the matrix that they stand for.
MANIFOLDS = {
    'sinkhorn': (lambda n: n * n, None),
    'permutation': (math.factorial, permutations),
    'kronecker': (lambda n: sum(map(math.factorial, prime_factors(n))), kronecker),
    'orthogonal': (lambda n: n * (n - 1) // 2, rotations),
    'diagonal': (lambda n: n, lambda logits, n: torch.diag_embed(logits.sigmoid())),
    'identity': (lambda n: 0, lambda logits, n: torch.eye(n, device=logits.device)),
}


def scaled_projection(
    x: Tensor, phi: CastLinear, scale: Tensor, bias: Tensor, eps: float, outside: bool = False
) -> Tensor:
    """``scale * (x phi) / r + b`` with r the root mean square of all n*C values (mHC, Eq 14-16)."""
    r = (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    if outside:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) + eps
    return phi(x) / r * scale + bias


def read(x: Tensor, h_pre: Tensor) -> Tensor:
    """``sum_j h_pre[j] x[j]``, ``[b, s, C]``."""
    streams = x.float().unflatten(-1, (h_pre.shape[-1], -1))
    return (h_pre.unsqueeze(-1) * streams).sum(-2).to(x.dtype)


def write(x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, rounds: bool = False) -> Tensor:
    """``x'[i] = sum_j h_res[i, j] x[j] + h_post[i] y``, without a matmul that could be TF32."""
    if rounds:
        mixed = torch.stack([read(x, row) for row in h_res.unbind(-2)], dim=-2)
        written = (h_post.unsqueeze(-1) * y.to(x.dtype).float().unsqueeze(-2)).to(x.dtype)
        return (mixed + written).flatten(-2)
    streams = x.float().unflatten(-1, (h_post.shape[-1], -1))
    new = h_post.unsqueeze(-1) * y.float().unsqueeze(-2)
    for j, stream in enumerate(streams.unbind(-2)):
        new = new + h_res[..., j].unsqueeze(-1) * stream.unsqueeze(-2)
    return new.flatten(-2).to(x.dtype)


class HyperConnection(nn.Module):
    """The maps of one sublayer: H_pre and H_post ``[b, s, n]``, H_res ``[b, s, n, n]``."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        n, width = config.streams, config.hidden_size
        if set(config.fixed_mappings) == {'pre', 'post', 'res'}:
            return
        self.num_logits = MANIFOLDS[config.manifold][0](n) if self.constrained else n * n
        self.bias = nn.Parameter(torch.zeros(2 * n + self.num_logits, dtype=torch.float32))
        if self.constrained:
            self.mapping_proj = CastLinear(n * width, 2 * n + self.num_logits)
            names = ('alpha_pre', 'alpha_post', 'alpha_res')[: 3 if self.num_logits else 2]
        else:
            if config.hc_variant == 'static':
                return
            self.mapping_proj = CastLinear(width, n + 2)
            names = ('alpha_width', 'alpha_depth')
        for name in names:
            setattr(self, name, nn.Parameter(torch.full((1,), 0.01, dtype=torch.float32)))

    @property
    def constrained(self) -> bool:
        return self.config.residual_type == 'mhc'

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            n, fixed = self.config.streams, self.config.fixed_mappings
            one = torch.ones(*x.shape[:-1], n, device=x.device)
            constants = [one / n, one, torch.eye(n, device=x.device).expand(*one.shape, n)]
            if set(fixed) == {'pre', 'post', 'res'}:
                return constants
            maps = self.manifold_maps(x) if self.constrained else self.free_maps(x.float())
            named = zip(('pre', 'post', 'res'), maps, constants, strict=True)
            return [constant if name in fixed else own for name, own, constant in named]

    def manifold_maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, sizes = self.config.streams, [self.config.streams] * 2 + [self.num_logits]
        alphas = [self.alpha_pre, self.alpha_post, getattr(self, 'alpha_res', self.alpha_post)]
        scale = torch.cat([alpha.expand(size) for alpha, size in zip(alphas, sizes, strict=True)])
        eps, rules = self.config.residual_norm_eps, NUMERICS[self.config.numerics]
        kind, pre_eps, post_eps, outside, narrow, rounded, _, _ = rules
        if narrow:
            logits = self.narrow_logits(x, scale, eps)
        else:
            projection = self.mapping_proj, scale, self.bias, eps
            logits = scaled_projection(x.float(), *projection, outside)
        pre, post, res = logits.split(sizes, dim=-1)
        if self.config.manifold == 'sinkhorn':
            res = res.unflatten(-1, (n, n))
            res = res.to(x.dtype) if narrow else res
            h_res = sinkhorn(res, self.config.sinkhorn_iterations, kind).float()
        else:
            h_res = MANIFOLDS[self.config.manifold][1](res, n)
        pre, post = pre.sigmoid() + pre_eps, 2 * post.sigmoid() + post_eps
        maps = {'pre': pre, 'post': post, 'res': h_res}
        for name in ('pre', 'post') if narrow else rounded:
            maps[name] = maps[name].to(x.dtype).float()
        return maps['pre'], maps['post'], maps['res']

    def narrow_logits(self, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        """With parameters, product and norm rounded to the dtype of the streams."""
        scale, bias = scale.to(x.dtype).float(), self.bias.to(x.dtype).float()
        root = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        r = (1 / (root + eps)).to(x.dtype)
        return r.float() * self.mapping_proj(x).float() * scale + bias

    def free_maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, width = self.config.streams, self.config.hidden_size
        packed = self.bias.expand(*x.shape[:-1], -1)
        if self.config.hc_variant == 'dynamic':
            norm = F.rms_norm if self.config.normalization == 'RMSNorm' else F.layer_norm
            normed = norm(x.unflatten(-1, (n, width)), (width,), eps=self.config.norm_eps)
            h = self.mapping_proj(normed)
            h = h.tanh() if self.config.hc_tanh else h
            pre, post, res = h.split([1, 1, n], dim=-1)
            # Row j of A_r is of stream j; H_res is its transpose.
            pre, post, res = pre.squeeze(-1), post.squeeze(-1), res.mT.flatten(-2)
            wide, deep = self.alpha_width, self.alpha_depth
            packed = packed + torch.cat([wide * pre, deep * post, wide * res], dim=-1)
        pre, post, res = packed.split([n, n, n * n], dim=-1)
        return pre, post, res.unflatten(-1, (n, n))


class StreamMerge(nn.Module):
    """n streams -> ``[b, s, C]``, before the final norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.stream_merge == 'learned':
            n = config.streams
            self.mapping_proj = CastLinear(n * config.hidden_size, n)
            self.bias = nn.Parameter(torch.zeros(n, dtype=torch.float32))
            self.alpha = nn.Parameter(torch.full((1,), 0.01, dtype=torch.float32))

    def forward(self, x: Tensor, last_pre: Tensor) -> Tensor:
        n, merge = self.config.streams, self.config.stream_merge
        with torch.autocast(x.device.type, enabled=False):
            if merge == 'learned':
                phi, eps = self.mapping_proj, self.config.residual_norm_eps
                gate_eps = NUMERICS[self.config.numerics][-1]
                if gate_eps == 'model':
                    eps = gate_eps = self.config.norm_eps
                gates = scaled_projection(x.float(), phi, self.alpha, self.bias, eps).sigmoid()
                return read(x, gates + gate_eps)
            if self.config.single_pass:
                return read(x, last_pre)
            total = x.float().unflatten(-1, (n, -1)).sum(-2)
            return (total / n if merge == 'mean' else total).to(x.dtype)


class GatedConnection(nn.Module):
    """A read of n streams, every channel weighed by a gate of low rank, and H_post ``[b, s, n]``.

    Each stream is normed by itself, so that neither sublayers nor the model have norms. Without
    ``writes`` it is the last read, which makes one stream of n.
    """

    def __init__(self, config, writes=True):
        super().__init__()
        self.config = config
        width = config.streams * config.hidden_size
        self.gain = nn.Parameter(torch.ones(width, dtype=torch.float32))
        self.down, self.up = (
            CastLinear(width, config.gated_rank),
            CastLinear(config.gated_rank, width),
        )
        self.write = CastLinear(width, config.streams) if writes else None

    def read(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        n, width = self.config.streams, self.config.hidden_size
        with torch.autocast(x.device.type, enabled=False):
            streams = x.float().unflatten(-1, (n, width))
            normed = F.rms_norm(streams, (width,), eps=self.config.norm_eps)
            normed = normed * self.gain.float().view(n, width)
            v = normed.flatten(-2)
            gates = self.up(F.silu(self.down(v) / n)).sigmoid().unflatten(-1, (n, width))
            h_post = None if self.write is None else 2 * (self.write(v) / n).sigmoid()
            return (gates * normed).mean(-2).to(x.dtype), h_post

    def forward(self, x: Tensor, last_pre: Tensor | None = None) -> Tensor:
        return self.read(x)[0]

    def around(self, sublayer, x: Tensor) -> Tensor:
        u, h_post = self.read(x)
        return write(x, sublayer(u), h_post, torch.eye(self.config.streams, device=x.device))


class BlockAttention(nn.Module):
    """A softmax over block sums, side by side in ``[b, s, k*C]``: the running one is the last.

    Args:
        begins: whether the sublayer that reads is the first of its block.
    """

    def __init__(self, config, begins=False):
        super().__init__()
        self.config, self.begins = config, begins
        self.query = nn.Parameter(torch.zeros(config.hidden_size, dtype=torch.float32))

    def forward(self, x: Tensor, last_pre: Tensor | None = None) -> Tensor:
        width = self.config.hidden_size
        with torch.autocast(x.device.type, enabled=False):
            sums = x.float().unflatten(-1, (-1, width))
            normed = F.rms_norm(sums, (width,), eps=self.config.norm_eps)
            weights = (normed * self.query.float()).sum(-1).softmax(-1)
            return (weights.unsqueeze(-1) * sums).sum(-2).to(x.dtype)

    def around(self, sublayer, x: Tensor) -> Tensor:
        y, width = sublayer(self(x)), self.config.hidden_size
        ended, running = x[..., :-width], x[..., -width:]
        if self.begins:
            return torch.cat([x, y.to(x.dtype)], dim=-1)
        return torch.cat([ended, (running.float() + y.float()).to(x.dtype)], dim=-1)


def connection_of(config, sublayer):
    """The residual connection of a sublayer, counted from 0; None of the standard one."""
    kind = config.residual_type
    if kind == 'attention':
        return BlockAttention(config, begins=sublayer % config.attention_block_size == 0)
    if kind == 'gated':
        return GatedConnection(config)
    return None if kind == 'standard' else HyperConnection(config)


def merge_of(config):
    """What makes one stream of what the last layer leaves."""
    kind = config.residual_type
    if kind == 'attention':
        return BlockAttention(config)
    if kind == 'gated':
        return GatedConnection(config, writes=False)
    return None if kind == 'standard' else StreamMerge(config)


def norm_of(config):
    """A norm of layers or of the model, which gated reads make needless."""
    return nn.Identity() if config.residual_type == 'gated' else Norm(config, config.hidden_size)


class MegatronMhcLayer(GradientCheckpointingLayer):
    """Attention and MLP, each around its own residual connection."""

    def __init__(self, config, index):
        super().__init__()
        self.single_pass = config.single_pass
        self.rounds = NUMERICS[config.numerics][6]
        self.input_layernorm = norm_of(config)
        attention = LatentAttention if config.kv_lora_rank else Attention
        self.self_attn = attention(config, index)
        self.post_attention_layernorm = norm_of(config)
        experts = config.num_experts and config.expert_layers[index]
        self.mlp = Experts(config) if experts else MLP(config, config.intermediate_size)
        self.self_attention_hyper_connection = connection_of(config, 2 * index)
        self.mlp_hyper_connection = connection_of(config, 2 * index + 1)

    def forward(self, x: Tensor, h_pre: Tensor | None, position, mask, cache=None, **kwargs):
        """The next streams, and the H_pre that a single pass hands to the next sublayer."""

        def attention(u):
            return self.self_attn(self.input_layernorm(u), position, mask, cache, **kwargs)

        def mlp(u):
            return self.mlp(self.post_attention_layernorm(u))

        x, h_pre = self.around(self.self_attention_hyper_connection, attention, x, h_pre)
        return self.around(self.mlp_hyper_connection, mlp, x, h_pre)

    def around(self, connection, sublayer, x: Tensor, before: Tensor | None):
        if connection is None:
            return x + sublayer(x), None
        if not isinstance(connection, HyperConnection):
            return connection.around(sublayer, x), before
        h_pre, h_post, h_res = connection(x)
        y = sublayer(read(x, before if self.single_pass else h_pre))
        return write(x, y, h_post, h_res, self.rounds), h_pre


class MegatronMhcPreTrainedModel(PreTrainedModel):
    config_class = MegatronMhcConfig
    base_model_prefix = 'model'
    supports_gradient_checkpointing = True
    _no_split_modules = ['MegatronMhcLayer']
    _supports_sdpa = True
    # Also under ``dtype=torch.bfloat16``.
    _keep_in_fp32_modules_strict = [
        'self_attention_hyper_connection',
        'mlp_hyper_connection',
        'stream_merge',
        'expert_bias',
    ]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GatedConnection):
            nn.init.ones_(module.gain)
        elif isinstance(module, BlockAttention):
            nn.init.zeros_(module.query)
        elif isinstance(module, HyperConnection | StreamMerge):
            for name, parameter in module.named_parameters():
                nn.init.constant_(parameter, 0.01 if 'alpha' in name else 0.0)


class MegatronMhcModel(MegatronMhcPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.position_embedding_type == 'learned_absolute':
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(MegatronMhcLayer(config, index) for index in layers)
        self.stream_merge = merge_of(config)
        self.norm = norm_of(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """``hidden_states``, if asked for, are what each layer gets: n*C wide, or k*C."""
        config, cache = self.config, take_cache(kwargs)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = config.use_cache if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if not use_cache:
            cache = None
        elif cache is None:
            cache = DynamicCache(config=config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + seen
        causal = create_causal_mask(
            config=config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        position = None
        if config.position_embedding_type == 'learned_absolute':
            x = x + self.position_embeddings(position_ids)
        elif config.position_embedding_type == 'rope':
            position = rotary(config, position_ids, config.head_dim)
        x = x.float() if config.residual_in_fp32 else x
        h_pre = None
        if config.streams:
            x = x.repeat(1, 1, config.streams)
            # What a single pass reads first: stream 0.
            h_pre = F.one_hot(x.new_zeros(x.shape[:2], dtype=torch.long), config.streams).float()
        seen_states = []
        for layer in self.layers:
            seen_states.append(x)
            x, h_pre = layer(x, h_pre, position, causal, cache=cache)
        if self.stream_merge is not None:
            x = self.stream_merge(x, h_pre)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*seen_states, x) if output_hidden_states else None,
            **{CACHE: cache},
        )


def take_cache(kwargs):
    """The cache among ``kwargs``, by either of its names."""
    given = [kwargs.pop(name, None) for name in ('cache', 'past_key_values')]
    return next((cache for cache in given if cache is not None), None)


class MegatronMhcForCausalLM(MegatronMhcPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {'lm_head.weight': 'model.embed_tokens.weight'}

    def __init__(self, config):
        super().__init__(config)
        self.model = MegatronMhcModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        labels=None,
        logits_to_keep=0,
        return_dict=None,
        cache=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Logits ``[b, s, vocabulary]``.

        Args:
            logits_to_keep: of that many last tokens if it is not 0; of these where it is a tensor.
            num_items_in_batch: tokens by which the loss is divided, as Trainer gives them for all
                that it accumulates; by default those of ``labels``.
        """
        outputs = self.model(input_ids, cache=cache, **kwargs)
        x = outputs.last_hidden_state
        last = isinstance(logits_to_keep, int)
        logits = self.lm_head(x[:, slice(-logits_to_keep, None) if last else logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )
        return result if return_dict is not False else result.to_tuple()
