"""A decoder described by its sizes: what parameters, FLOPs and bytes are computed from.

Symbols, here and in ``size``, ``flops`` and ``memory``: C hidden size, N decoder layers, L
sublayers, V (padded) vocabulary, s sequence length, h heads, n residual streams, E experts. A
sublayer is written as in Megatron's hybrid patterns, so that a layer of a GPT is two of them.
Standard library only, so that a model can be sized up anywhere.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mhc.settings.constraint import layer_pattern
from megatron_mhc.settings.engram import EngramConfig
from megatron_mhc.settings.flags_engram import engram_config_from_args
from megatron_mhc.settings.flags_residual import residual_config_from_args
from megatron_mhc.settings.residual import ResidualConfig
from megatron_mhc.sizing.mixers import DeltaNet, Mamba

ATTENTION, LATENT, MLP, EXPERTS, MAMBA, DELTA_NET = '*+-EMG'


@dataclass(frozen=True)
class GroupedAttention:
    """Multi-head (groups = heads) or grouped-query attention.

    Args:
        heads: h, of queries.
        groups: of keys and values.
        head_dim: width of a head.
        qkv_bias: biases of the QKV projection.
        qk_norm: norms of queries and keys, over a head.
    """

    heads: int
    groups: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (MLA, arXiv 2405.04434).

    Args:
        heads: h.
        kv_rank: width of the latent of keys and values.
        qk_dim: width of a head's query and key without position.
        rope_dim: width with position; its key is shared by all heads.
        v_dim: width of a head's value.
        q_rank: width of the latent of queries; None: queries are projected directly.
        latent_norm: norms after the latents.
    """

    heads: int
    kv_rank: int
    qk_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int | None = None
    latent_norm: bool = False


@dataclass(frozen=True)
class Experts:
    """Mixture of experts in place of the MLP of some layers.

    Args:
        count: E, routed experts of a layer.
        top_k: routed experts of a token.
        ffn: intermediate size of one.
        shared_ffn: intermediate size of all shared experts together; 0 for none.
        layers: for each decoder layer whether it has experts.
    """

    count: int
    top_k: int
    ffn: int
    shared_ffn: int
    layers: tuple[bool, ...]


@dataclass(frozen=True)
class ModelShape:
    """A decoder: a GPT, or a hybrid model with one sublayer a layer.

    Args:
        layers: N.
        hidden: C.
        ffn: intermediate size of a dense MLP.
        vocab: V, as padded.
        sequence: s.
        attention: grouped or latent.
        experts: None for a dense model.
        gated: SwiGLU and its like: two input matrices in an MLP.
        norm_vectors: parameters of a norm over its width: 1 for RMSNorm, 2 for LayerNorm.
        linear_bias: biases of linear layers.
        tied: embedding and output layer are one matrix.
        learned_positions: rows of a learned position embedding; 0 for rotary ones.
        residual: residual connections.
        engram: conditional memory; None for none.
        value_bytes: of a weight, an activation and what ranks send of them: 2 for bf16 and fp16, 4
            for fp32, as Megatron trains without ``--bf16`` and ``--fp16``.
        fp8: linear layers inside of decoder layers multiply in fp8 (``--fp8-format``).
        full_recompute: every layer is run again in the backward, one at a time.
        pattern: of a hybrid model, a symbol for each layer; ``|`` between some of them are where
            stages may be cut, without any that is between all.
        mamba, delta_net: what ``M`` and ``G`` of the pattern are.
    """

    layers: int
    hidden: int
    ffn: int
    vocab: int
    sequence: int
    attention: GroupedAttention | LatentAttention
    experts: Experts | None = None
    gated: bool = True
    norm_vectors: int = 1
    linear_bias: bool = False
    tied: bool = False
    learned_positions: int = 0
    residual: ResidualConfig = ResidualConfig('standard')
    engram: EngramConfig | None = None
    value_bytes: int = 2
    fp8: bool = False
    full_recompute: bool = False
    pattern: str | None = None
    mamba: Mamba | None = None
    delta_net: DeltaNet | None = None

    @property
    def sublayers(self) -> int:
        """L: attention and MLP of every layer of a GPT; of a hybrid model, N."""
        return self.layers if self.pattern else 2 * self.layers

    def symbols(self, layer: int) -> str:
        """The sublayers of decoder layer ``layer`` (from 0): one symbol each."""
        if self.pattern:
            return self.pattern.replace('|', '')[layer]
        attention = LATENT if isinstance(self.attention, LatentAttention) else ATTENTION
        return attention + (EXPERTS if self.has_experts(layer) else MLP)

    def kinds(self, layers: Iterable[int]) -> Counter[str]:
        """How many of ``layers`` have which symbols."""
        return Counter(map(self.symbols, layers))

    def experts_of(self, layer: int) -> Experts | None:
        """The mixture of experts in decoder layer ``layer`` (from 0); None: a dense MLP."""
        return self.experts if self.experts and self.experts.layers[layer] else None

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of decoder layer ``layer`` (from 0) is a mixture of experts."""
        return self.experts_of(layer) is not None


# What changes the parameters and is not described here: argument -> flag.
_UNKNOWN = {
    'mtp_num_layers': '--mtp-num-layers',
    'attention_output_gate': '--attention-output-gate',
    'experimental_attention_variant': '--experimental-attention-variant',
    'heterogeneous_layers_config_path': '--heterogeneous-layers-config-path',
    'moe_latent_size': '--moe-latent-size',
    'moe_shared_expert_gate': '--moe-shared-expert-gate',
}


def shape_from_args(args: argparse.Namespace) -> ModelShape:
    """The model that Megatron's arguments describe, after Megatron has validated them.

    Raises:
        NotImplementedError: a flag that adds parameters which are not described here.
        ValueError: experts in a hybrid pattern, and none in the flags.
    """
    for name, flag in _UNKNOWN.items():
        if getattr(args, name, None):
            raise NotImplementedError(f'{flag}: models with it are not sized up; drop the flag')
    pattern = _pattern(args)
    learned = args.position_embedding_type == 'learned_absolute'
    return ModelShape(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        vocab=args.padded_vocab_size,
        sequence=args.seq_length,
        attention=_attention(args, pattern),
        experts=_experts(args, pattern),
        gated=bool(args.swiglu or getattr(args, 'quick_geglu', False)),
        norm_vectors=1 if args.normalization == 'RMSNorm' else 2,
        linear_bias=args.add_bias_linear,
        tied=not args.untie_embeddings_and_output_weights,
        learned_positions=args.max_position_embeddings if learned else 0,
        residual=residual_config_from_args(args),
        engram=engram_config_from_args(args),
        value_bytes=2 if args.bf16 or args.fp16 else 4,
        pattern=pattern,
        mamba=_mamba(args) if MAMBA in (pattern or '') else None,
        delta_net=_delta_net(args) if DELTA_NET in (pattern or '') else None,
    )


def _pattern(args: argparse.Namespace) -> str | None:
    """The hybrid pattern, by either name of its flag.

    Raises:
        NotImplementedError: layers that are not described here.
    """
    pattern = layer_pattern(vars(args).get)
    words = {'/': "prediction layers (behind '/')", 'D': "sparse attention ('D')"}
    for symbol, what in words.items():
        if symbol in (pattern or ''):
            raise NotImplementedError(
                f'--hybrid-layer-pattern {pattern}: {what} are not sized up; leave them out'
            )
    return pattern


def _mamba(args: argparse.Namespace) -> Mamba:
    # Where nobody says how many heads there are, they are twice as wide as the model.
    heads = args.mamba_num_heads or 2 * args.hidden_size // args.mamba_head_dim
    return Mamba(heads, args.mamba_head_dim, args.mamba_num_groups, args.mamba_state_dim)


def _delta_net(args: argparse.Namespace) -> DeltaNet:
    return DeltaNet(
        args.linear_num_key_heads,
        args.linear_key_head_dim,
        args.linear_num_value_heads,
        args.linear_value_head_dim,
        args.linear_conv_kernel_dim,
    )


def _attention(args: argparse.Namespace, pattern: str | None) -> GroupedAttention | LatentAttention:
    heads = args.num_attention_heads
    if (LATENT in pattern) if pattern else args.multi_latent_attention:
        return LatentAttention(
            heads,
            args.kv_lora_rank,
            args.qk_head_dim,
            args.qk_pos_emb_head_dim,
            args.v_head_dim,
            args.q_lora_rank,
            args.qk_layernorm,
        )
    groups = args.num_query_groups if args.group_query_attention else heads
    bias = args.add_bias_linear or args.add_qkv_bias
    return GroupedAttention(heads, groups, args.kv_channels, bias, args.qk_layernorm)


def _experts(args: argparse.Namespace, pattern: str | None) -> Experts | None:
    if args.num_experts is None and EXPERTS in (pattern or ''):
        raise ValueError(f"--hybrid-layer-pattern {pattern}: 'E' needs --num-experts; give it")
    if args.num_experts is None or (pattern and EXPERTS not in pattern):
        return None
    frequency = args.moe_layer_freq
    if pattern:
        frequency = [symbol == EXPERTS for symbol in pattern.replace('|', '')]
    elif isinstance(frequency, int):
        frequency = [layer % frequency == 0 for layer in range(args.num_layers)]
    return Experts(
        args.num_experts,
        args.moe_router_topk,
        args.moe_ffn_hidden_size or args.ffn_hidden_size,
        args.moe_shared_expert_intermediate_size or 0,
        tuple(map(bool, frequency)),
    )
