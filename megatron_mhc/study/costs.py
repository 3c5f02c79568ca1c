"""Seconds and bytes of one microbatch in each stage of a layout, from FLOPs, bytes and links.

FLOPs are those of ``model_flops``, parameters and edges those of ``model_memory``; nothing is
counted here a second time. T is the tokens of a microbatch, of which a tensor-parallel rank has
1 / tp between the linear layers (sequence parallelism), and 1 / cp everywhere.
"""

from __future__ import annotations

from typing import Any

from megatron_mhc.schedules.stage_layers import stage_at
from megatron_mhc.settings.recompute_cost import segment_size
from megatron_mhc.sizing.flops import ATTENTION_CORE, SCANS, head_flops, layer_flops
from megatron_mhc.sizing.memory import FP32, Layout, edge_bytes, rank_parameters, sharing, stages_of
from megatron_mhc.sizing.shape import ATTENTION, EXPERTS, LATENT, ModelShape
from megatron_mhc.study.hardware import Hardware
from megatron_mhc.study.kernels import BytesModel, Measured, Sublayer
from megatron_mhc.study.links import Groups, groups_of
from megatron_mhc.study.ring import Ring, ring_of
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
            symbols: layer_flops(shape, symbols) for symbols in shape.kinds(range(shape.layers))
        }
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
                kinds = self.shape.kinds(layers)
                for symbols, count in kinds.items():
                    stage.add(self._layer(layout, symbols), count)
                sublayers = sum(len(symbols) * count for symbols, count in kinds.items())
                self._rebuild(stage, layout, sublayers)
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

    def _layer(self, layout: Layout, symbols: str) -> Costs:
        ranks = layout.gpus // layout.pp, layout.tp, layout.cp, layout.ep
        key = *ranks, layout.micro_batch, symbols
        if key not in self.layer_costs:
            self.layer_costs[key] = self._new_layer(layout, symbols)
        return self.layer_costs[key]

    def _new_layer(self, layout: Layout, symbols: str) -> Costs:
        shape, hardware = self.shape, self.hardware
        groups, tokens = groups_of(layout, hardware), self._tokens(layout)
        own = tokens // layout.tp
        core = self._core(symbols) * tokens / layout.tp
        linear = self._linear(symbols) * tokens / layout.tp
        residual, sublayers = self._sublayer(layout), len(symbols)
        exchanged = 0
        if EXPERTS in symbols and shape.experts is not None:
            exchanged = shape.value_bytes * own * shape.experts.top_k * shape.hidden
        # Dispatch and combine.
        exchange = 2 * groups.ep.exchange_seconds(exchanged) if exchanged else 0.0
        collectives, sent = self._collectives(groups, tokens, symbols)
        ring = Ring(0.0, 0.0, 0.0)
        if {ATTENTION, LATENT} & {*symbols}:
            ring = ring_of(shape, layout, groups.cp, tokens, (core, CORE_BACKWARD * core))
        forward = linear + core + sublayers * residual.forward + collectives + ring.forward
        # Full recomputation runs the forward once more, with its messages.
        again = int(shape.full_recompute)
        return Costs(
            forward=forward,
            input_grad=again * forward
            + linear
            + CORE_BACKWARD * core
            + sublayers * residual.backward
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

    def _core(self, symbols: str) -> float:
        """Seconds a token of what mixes the sequence between the linear layers.

        Of Mamba and the gated delta net, a model: their FLOPs at attention's efficiency or their
        bytes, convolution and norm included, whichever takes longer.
        """
        flops, shape = self.flops[symbols], self.shape
        seconds = flops[ATTENTION_CORE] / self.attention_flops
        for name, mixer in zip(SCANS, (shape.mamba, shape.delta_net), strict=True):
            if flops[name] and mixer:
                moved = shape.value_bytes * mixer.moved(FP32 // shape.value_bytes)
                by_flops = flops[name] / self.attention_flops
                seconds += max(by_flops, moved / self.hardware.bandwidth)
        return seconds

    def _linear(self, symbols: str) -> float:
        """Seconds a token of a layer's linear layers, with all that stands between them.

        In fp8 the products alone are faster, a model: what is between them takes as long as in
        bf16, and so does the router.
        """
        flops = self.flops[symbols]
        whole = flops.total() - sum(flops[name] for name in (ATTENTION_CORE, *SCANS))
        if not self.shape.fp8:
            return whole / self.linear_flops
        narrow = whole - flops['router']
        saved = narrow / self.hardware.peak() - narrow / self.hardware.fp8_peak()
        return whole / self.linear_flops - saved

    def _collectives(self, groups: Groups, tokens: int, symbols: str) -> tuple[float, float]:
        """Seconds and bytes of a layer's all-gathers and reduce-scatters, of its forward."""
        shape = self.shape
        wide = shape.value_bytes * tokens * shape.hidden
        sizes = []
        for symbol in symbols:
            experts = shape.experts if symbol == EXPERTS else None
            # One of each, of experts for those that are shared; dispatched tokens too.
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
        linear = head_flops(shape) * tokens / layout.tp / self.linear_flops
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
