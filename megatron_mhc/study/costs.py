"""Seconds and bytes of one microbatch in each stage of a layout, from FLOPs, bytes and links.

FLOPs are those of ``model_flops``, parameters and edges those of ``model_memory``; nothing is
counted here a second time. T is the tokens of a microbatch, of which a tensor-parallel rank has
1 / tp between the linear layers (sequence parallelism), and 1 / cp everywhere.
"""

from __future__ import annotations

from typing import Any

from megatron_mhc.schedules.stage_layers import stage_at
from megatron_mhc.settings.recompute_cost import segment_size
from megatron_mhc.sizing.flops import layer_flops, token_flops
from megatron_mhc.sizing.memory import FP32, Layout, edge_bytes, rank_parameters, sharing, stages_of
from megatron_mhc.sizing.shape import ModelShape
from megatron_mhc.study.hardware import Hardware
from megatron_mhc.study.kernels import BytesModel, Measured, Sublayer
from megatron_mhc.study.links import Groups, groups_of
from megatron_mhc.study.ring import ring_of
from megatron_mhc.study.seconds import Costs, RankCosts

# A backward of flash attention has 5 products of matrices, a forward 2 (arXiv 2307.08691).
CORE_BACKWARD = 2.5
# Bytes a parameter in Adam: gradient, (master) weight and two moments read, the latter three
# written; the weight of the model as well where that is narrower.
ADAM = 7 * FP32


class CostModel:
    """Costs of one model with one kind of residual connection on one kind of machine.

    Args:
        shape: the model.
        hardware: the machine.
        kernels: seconds of residual connections.
    """

    def __init__(
        self, shape: ModelShape, hardware: Hardware, kernels: BytesModel | Measured
    ) -> None:
        self.shape, self.hardware, self.kernels = shape, hardware, kernels
        self.flops = {
            sparse: layer_flops(shape, sparse)
            for sparse in {shape.has_experts(layer) for layer in range(shape.layers)}
        }
        self.head_flops = token_flops(shape)['head']
        peak = hardware.peak(shape.value_bytes)
        self.linear_flops = peak * hardware.gemm_efficiency
        self.attention_flops = peak * hardware.attention_efficiency
        self.layer_costs: dict[tuple[Any, ...], Costs] = {}

    def stages(self, layout: Layout) -> list[Costs]:
        """Every stage in forward order."""
        held = stages_of(self.shape, layout.pp, layout.placement, layout.chunks)
        found = [Costs() for _ in range(layout.stages)]
        for rank, chunks in enumerate(held):
            for chunk, layers in enumerate(chunks):
                stage = found[stage_at(rank, chunk, layout.pp, layout.placement)]
                sparse = sum(map(self.shape.has_experts, layers))
                for kind, count in ((False, len(layers) - sparse), (True, sparse)):
                    if count:
                        stage.add(self._layer(layout, kind), count)
                self._rebuild(stage, layout, 2 * len(layers))
        found[-1].add(self._head(layout))
        return found

    def hop(self, layout: Layout) -> float:
        """Seconds of one edge between ranks, with its n streams."""
        size = edge_bytes(self.shape, layout)
        return groups_of(layout, self.hardware).pp.message_seconds(size)

    def step(self, layout: Layout, stages: list[Costs]) -> RankCosts:
        """What comes on top of the pipeline."""
        groups, width = groups_of(layout, self.hardware), self.shape.value_bytes
        adam_bytes = ADAM + (width if width < FP32 else 0)
        reduce, gather, optimizer, data = [], [], [], []
        for rank, parts in enumerate(rank_parameters(self.shape, layout)):
            shares = {groups.dp: 0.0, groups.expert_dp: 0.0}
            adam = 0.0
            for part, whole in parts.items():
                split, replicas = sharing(part, layout)
                group = groups.expert_dp if part == 'routed_experts' else groups.dp
                shares[group] += whole / split
                adam += adam_bytes * whole / split / replicas
            backward = sum(
                stages[s].input_grad + stages[s].weight_grad
                for s in (
                    stage_at(rank, chunk, layout.pp, layout.placement)
                    for chunk in range(layout.chunks)
                )
            )
            sums = sum(group.gather_seconds(FP32 * count) for group, count in shares.items())
            reduce.append(max(0.0, sums - backward))
            gather.append(
                sum(group.gather_seconds(width * count) for group, count in shares.items())
            )
            optimizer.append(adam / self.hardware.bandwidth)
            data.append(sum(group.sent((FP32 + width) * count) for group, count in shares.items()))
        return RankCosts(max(reduce), max(gather), max(optimizer), max(data))

    def _layer(self, layout: Layout, sparse: bool) -> Costs:
        key = layout.gpus // layout.pp, layout.tp, layout.cp, layout.ep, layout.micro_batch, sparse
        if key not in self.layer_costs:
            self.layer_costs[key] = self._new_layer(layout, sparse)
        return self.layer_costs[key]

    def _new_layer(self, layout: Layout, sparse: bool) -> Costs:
        shape, hardware = self.shape, self.hardware
        groups, tokens = groups_of(layout, hardware), self._tokens(layout)
        own = tokens // layout.tp
        core = self.flops[sparse]['attention_core'] * tokens / layout.tp / self.attention_flops
        linear = self._linear(sparse) * tokens / layout.tp
        residual = self._sublayer(layout)
        exchanged = 0
        if sparse and shape.experts is not None:
            exchanged = shape.value_bytes * own * shape.experts.top_k * shape.hidden
        # Dispatch and combine.
        exchange = 2 * groups.ep.exchange_seconds(exchanged)
        collectives, sent = self._collectives(groups, tokens, sparse)
        ring = ring_of(shape, layout, groups.cp, tokens, (core, CORE_BACKWARD * core))
        forward = linear + core + 2 * residual.forward + collectives + ring.forward
        # Full recomputation runs the forward once more, with its messages.
        again = int(shape.full_recompute)
        return Costs(
            forward=forward,
            input_grad=again * forward
            + linear
            + CORE_BACKWARD * core
            + 2 * residual.backward
            + collectives
            + ring.backward,
            weight_grad=linear,
            exchange=exchange,
            again=again * exchange,
            collectives=(2 + again) * collectives,
            ring=(1 + again) * ring.forward + ring.backward,
            tensor_bytes=(2 + again) * sent,
            ring_bytes=ring.sent * (3 + again) / 3,
            expert_bytes=(4 + 2 * again) * groups.ep.sent(exchanged),
        )

    def _linear(self, sparse: bool) -> float:
        """Seconds a token of a layer's linear layers, with all that stands between them.

        In fp8 the products alone are faster, a model: what is between them takes as long as in
        bf16, and so does the router.
        """
        flops = self.flops[sparse]
        whole = sum(flops.values()) - flops['attention_core']
        if not self.shape.fp8:
            return whole / self.linear_flops
        narrow = whole - flops.get('router', 0)
        saved = narrow / self.hardware.peak() - narrow / self.hardware.fp8_peak()
        return whole / self.linear_flops - saved

    def _collectives(self, groups: Groups, tokens: int, sparse: bool) -> tuple[float, float]:
        """Seconds and bytes of a layer's all-gathers and reduce-scatters, of its forward."""
        shape = self.shape
        wide = shape.value_bytes * tokens * shape.hidden
        # One of each for attention, and for the MLP or the shared experts; dispatched tokens too.
        sizes = [wide, wide]
        experts = shape.experts if sparse else None
        if experts is None or experts.shared_ffn:
            sizes += [wide, wide]
        if experts is not None:
            sizes += [wide * experts.top_k] * 2
        return sum(map(groups.tp.gather_seconds, sizes)), sum(map(groups.tp.sent, sizes))

    def _rebuild(self, stage: Costs, layout: Layout, sublayers: int) -> None:
        """Recomputed segments run the forward kernels of every sublayer again.

        A V schedule rebuilds the segment that a backward begins with ahead of it, as R.
        """
        residual = self.shape.residual
        size = segment_size(residual.recompute_layer_num, residual.streams, sublayers)
        if not residual.has_streams or not size:
            return
        forward = self._sublayer(layout).forward
        ahead = (sublayers - 1) % size + 1 if layout.placement == 'v' else 0
        stage.recompute = ahead * forward
        stage.input_grad += (sublayers - ahead) * forward

    def _head(self, layout: Layout) -> Costs:
        """Output layer and loss."""
        shape, tokens = self.shape, self._tokens(layout)
        linear = self.head_flops * tokens / layout.tp / self.linear_flops
        # Logits are read and the fp32 softmax is written, and the other way round.
        loss = (
            (shape.value_bytes + FP32) * tokens * shape.vocab / layout.tp / self.hardware.bandwidth
        )
        tp = groups_of(layout, self.hardware).tp
        wide = shape.value_bytes * tokens * shape.hidden
        gather = tp.gather_seconds(wide)
        return Costs(
            forward=linear + loss + gather,
            input_grad=linear + loss + gather,
            weight_grad=linear,
            collectives=2 * gather,
            tensor_bytes=2 * tp.sent(wide),
        )

    def _sublayer(self, layout: Layout) -> Sublayer:
        """Residual connections of a sublayer, of a microbatch on one rank."""
        tokens = self._tokens(layout) // layout.tp
        shape, overlaps = self.shape, not self.hardware.one_queue(layout.tp, layout.cp)
        return self.kernels.sublayer(
            shape.residual, shape.hidden, tokens, shape.value_bytes, overlaps
        )

    def _tokens(self, layout: Layout) -> int:
        return layout.micro_batch * self.shape.sequence // layout.cp
