"""Raw Triton kernels and their launchers. One family a file: tiles, forward, backward, launcher.

Launchers take contiguous tensors with the tokens flattened to T, ``[T, n*C]``, and know nothing of
autograd. ``megatron_mhc.kernels.autograd`` calls them; ``megatron_mhc.kernels.reference`` is their
truth. Values are widened to fp32 right after each load and rounded only by a store.
"""
