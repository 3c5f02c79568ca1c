"""What the ops, the flags and the kernels have as their default or limit; no torch here."""

from __future__ import annotations

NORM_EPS = 1e-6
"""Added to the mean square of all n*C values of a token: that of DeepSeek-V4's released code and of
Megatron-LM's main and dev. Under a smaller one a token whose streams are zero, such as an unused
row of the embedding, multiplies its gradient by 1/sqrt(eps)."""
BACKENDS = ('auto', 'triton', 'torch')
PRECISIONS = ('auto', 'bf16x2', 'tf32', 'tf32x3', 'ieee')
"""How the kernels multiply phi: ``auto`` is ``bf16x2`` (high and low part) for bf16 streams and
``tf32x3`` for others; the torch reference is fp32 throughout."""
# On the command line -> what torch calls them.
DTYPES = {'bf16': 'bfloat16', 'fp16': 'float16', 'fp32': 'float32'}
# Numbers of streams that the kernels are written for.
KERNEL_STREAMS = (1, 2, 4, 8)
# Compute capabilities that they are checked for, those of ``verdict.MULTIPROCESSORS``.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# C and T of ``megatron-mhc kernels accuracy`` where none are given: seconds on either device.
ACCURACY_SIZES = {'cpu': (100, 35), 'cuda': (4096, 2048)}
# Bytes that a stream should start at a multiple of, and what C should be a multiple of.
DIVISOR = 16
