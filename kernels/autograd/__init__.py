"""Autograd functions over the Triton kernels.

``ops`` has one per op; ``fused_edge`` those that see a whole sublayer end and write dX once. Tokens
are flattened, maps and mapping parameters are fp32 and everything is contiguous. Nothing is saved
that backward can rebuild from less, no sum uses atomics, and nothing is read back from the device.
"""
