"""Seconds and bytes of messages between ranks, by where Megatron places the ranks of a group.

Megatron numbers ranks with tensor parallelism innermost, then context, data (and expert)
parallelism, then the pipeline. A group is thus ``members`` ranks, each ``stride`` after the one
before.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mhc.sizing.memory import Layout
from megatron_mhc.study.hardware import Hardware


@dataclass(frozen=True)
class Group:
    """Ranks that communicate.

    Args:
        hardware: nodes and links.
        members: ranks of the group.
        stride: from one to the next.
    """

    hardware: Hardware
    members: int
    stride: int

    @property
    def together(self) -> int:
        """Members in one node."""
        return max(1, min(self.members, self.hardware.gpus_per_node // self.stride))

    def sent(self, size: float) -> float:
        """Bytes a rank sends in an all-gather or reduce-scatter of ``size`` bytes in all.

        Also in an all-to-all, where ``size`` is what one rank spreads evenly over all members.
        """
        return size * (self.members - 1) / self.members

    def gather_seconds(self, size: float) -> float:
        """The same in a ring, which leaves a node through the adapters of all members in it."""
        if self.members == 1:
            return 0.0
        rate = self._nvlink
        if self.together < self.members:
            rate = min(rate, self.together * self._network)
        return self._latency + self.sent(size) / rate

    def exchange_seconds(self, size: float) -> float:
        """All-to-all; members of the node by NVLink, at the same time others by the network."""
        if self.members == 1:
            return 0.0
        near, far = self.together - 1, self.members - self.together
        share = size / self.members
        return self._latency + max(near * share / self._nvlink, far * share / self._network)

    def message_seconds(self, size: float) -> float:
        """From one member to the next; by the network unless one node has all of them."""
        rate = self._nvlink if self.together == self.members else self._network
        return self._latency + size / rate if self.members > 1 else 0.0

    @property
    def _nvlink(self) -> float:
        return self.hardware.nvlink_gb_s * 1e9 * self.hardware.link_efficiency

    @property
    def _network(self) -> float:
        # A faster network than NVLink would not be asked to be the slower one.
        return min(self.hardware.network_gb_s * 1e9 * self.hardware.link_efficiency, self._nvlink)

    @property
    def _latency(self) -> float:
        return self.hardware.latency_us * 1e-6


@dataclass(frozen=True)
class Groups:
    """Of a layout: tensor, context, expert, data (with context; of experts) and pipeline."""

    tp: Group
    cp: Group
    ep: Group
    dp: Group
    expert_dp: Group
    pp: Group


def groups_of(layout: Layout, hardware: Hardware) -> Groups:
    """Where the ranks of ``layout`` are."""
    tp, replicas = layout.tp, layout.replicas
    return Groups(
        tp=Group(hardware, tp, 1),
        cp=Group(hardware, layout.cp, tp),
        ep=Group(hardware, layout.ep, tp),
        dp=Group(hardware, replicas, tp),
        expert_dp=Group(hardware, layout.expert_dp, tp * layout.ep),
        pp=Group(hardware, layout.pp, tp * replicas),
    )
