"""Layers of a hybrid model that mix a sequence without attention, by their sizes.

Mamba-2 (arXiv 2405.21060) and the gated delta net (arXiv 2412.06464) as Megatron builds them. Each
says what it has and does of one token: parameters, the FLOPs that Megatron counts, and values.
"""

from __future__ import annotations

from dataclasses import dataclass

# Tokens of a chunk of Megatron's scan: one state a head is written and read again for each.
CHUNK = 128


@dataclass(frozen=True)
class Mamba:
    """The symbol ``M``: in-projection, causal convolution, scan, gated norm, out-projection.

    Args:
        heads: of the scan.
        head_dim: width of one; both together are the inner width D.
        groups: of heads that share B and C.
        state: width of a head's state, N.
        convolution: tokens that the convolution sees.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    convolution: int = 4

    @property
    def inner(self) -> int:
        """D."""
        return self.heads * self.head_dim

    @property
    def convolved(self) -> int:
        """Channels of x, B and C."""
        return self.inner + 2 * self.groups * self.state

    @property
    def projected(self) -> int:
        """Outputs of the in-projection: z, x, B, C and a time step for each head."""
        return self.inner + self.convolved + self.heads

    def parameters(self, hidden: int) -> int:
        """With biases of the convolution, and A, D and a bias of the time step for each head."""
        matrices = hidden * (self.projected + self.inner)
        return matrices + self.convolved * (self.convolution + 1) + 3 * self.heads + self.inner

    def flops(self, hidden: int) -> tuple[int, int]:
        """Projections and scan of a token; Megatron leaves the convolution out."""
        return 2 * hidden * (self.projected + self.inner), 7 * self.inner * self.state

    def kept(self, wide: int) -> int:
        """Values of a token that a forward keeps, in fp32 ``wide`` each: projected, scanned,
        normed, and the states between chunks."""
        states = wide * self.inner * self.state // CHUNK
        return self.projected + self.convolved + 2 * self.inner + states

    def moved(self, wide: int) -> int:
        """Values of a token read and written between the projections: convolution, scan with its
        states, gated norm."""
        scan = self.convolved + self.heads + self.inner
        states = 2 * wide * self.inner * self.state // CHUNK
        return 2 * self.convolved + scan + states + 3 * self.inner


@dataclass(frozen=True)
class DeltaNet:
    """The symbol ``G``: in-projection, causal convolution, gated delta rule, norm, out-projection.

    Args:
        key_heads: of queries and keys.
        key_dim: width of one.
        value_heads: of values and gates.
        value_dim: width of one.
        convolution: tokens that the convolution sees.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    convolution: int

    @property
    def inner(self) -> int:
        """Width of all values."""
        return self.value_heads * self.value_dim

    @property
    def convolved(self) -> int:
        """Channels of queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.inner

    @property
    def projected(self) -> int:
        """Outputs of the in-projection: those, gates, and two numbers for each value head."""
        return self.convolved + self.inner + 2 * self.value_heads

    def parameters(self, hidden: int) -> int:
        """With A and a bias of the time step for each value head; its norm aside."""
        matrices = hidden * (self.projected + self.inner)
        return matrices + self.convolved * self.convolution + 2 * self.value_heads

    def flops(self, hidden: int) -> tuple[int, int]:
        """Projections, and convolution with the rule's four products, of a token."""
        rule = 4 * self.value_heads * self.value_dim**2
        products = 2 * (self.convolution * self.convolved + rule)
        return 2 * hidden * (self.projected + self.inner), products

    def kept(self, wide: int) -> int:
        """As ``Mamba.kept``; a state of key x value width for each value head and chunk."""
        return self.projected + self.convolved + 2 * self.inner + wide * self._states

    def moved(self, wide: int) -> int:
        """As ``Mamba.moved``."""
        rule = self.convolved + 2 * self.value_heads + self.inner
        return 2 * self.convolved + rule + 2 * wide * self._states + 3 * self.inner

    @property
    def _states(self) -> int:
        return self.inner * self.key_dim // CHUNK
