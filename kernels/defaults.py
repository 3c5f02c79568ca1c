"""What the ops, the flags and the kernels have as their default or limit; no torch here."""

from __future__ import annotations

NORM_EPS = 1e-6
"""Added to the mean square of all n*C values of a token: that of DeepSeek-V4's released code and of
Megatron-LM's main and dev. Under a smaller one a token whose streams are zero, such as an unused
row of the embedding, multiplies its gradient by 1/sqrt(eps)."""
# Numbers of streams that the kernels are written for.
KERNEL_STREAMS = (1, 2, 4, 8)
# Bytes that a stream should start at a multiple of, and what C should be a multiple of.
DIVISOR = 16
