"""The GPUs that the model knows, and where each of their constants comes from.

From NVIDIA: ``sms``, ``peak`` (data sheets of A100 80GB SXM, H100 SXM and H200 SXM; the latter two
are one die with one number of SMs, "NVIDIA H100 Tensor Core GPU Architecture"), ``fma_cycles``
("CUDA C++ Programming Guide", arithmetic instructions: 64 and 128 fp32 results per clock and SM)
and ``tensor_fma`` (dense bf16 of the data sheets, 312 and 989 TFLOPS, by SMs and boost clock).

Assumed, and most of the model's error: ``COPY_SHARE``, what a copy kernel reaches of the peak;
``clock``, below the boost clock of 1.83 GHz where the GPU is at its power limit; ``l2`` (of H100,
published microbenchmarks lie between 5.5 and 7 TB/s; A100 is given the same share of its 5120 bytes
per clock); ``dram_latency`` under load (unloaded, pointer chasing sees 690 cycles on GH200, and 281
to L2) and ``mma_share``, what mma.sync reaches of wgmma on Hopper.
"""

from __future__ import annotations

from dataclasses import dataclass

COPY_SHARE = 0.896


@dataclass(frozen=True)
class Gpu:
    """One GPU; rates of bytes in bytes/s, cycles at ``clock`` Hz.

    ``peak`` is the memory's rate, ``l2`` that of all traffic between L2 and the SMs.
    ``fma_cycles`` are those of an fp32 instruction of a warp in its quarter of an SM,
    ``tensor_fma`` bf16 multiply-adds per cycle in such a quarter. ``dram_latency`` in seconds,
    ``l2_latency`` in cycles.
    """

    name: str
    title: str
    arch: int
    sms: int
    clock: float
    peak: float
    l2: float
    fma_cycles: int
    tensor_fma: int
    mma_share: float
    dram_latency: float = 700e-9
    l2_latency: float = 300.0

    @property
    def copy(self) -> float:
        """Bytes/s, read and written together, that a copy is taken to reach."""
        return self.peak * COPY_SHARE

    @property
    def dram_cycles(self) -> float:
        return self.dram_latency * self.clock

    @property
    def needed_bytes(self) -> float:
        """Bytes that an SM must have under way to keep the memory busy (Little's law)."""
        return self.copy * self.dram_latency / self.sms

    def __str__(self) -> str:
        return (
            f'{self.title}: {self.sms} SMs at {self.clock / 1e9:.2f} GHz, copy at '
            f'{self.copy / 1e12:.2f} of {self.peak / 1e12:.2f} TB/s'
        )


def _hopper(name: str, title: str, peak: float) -> Gpu:
    return Gpu(name, title, 90, 132, 1.70e9, peak, 5.5e12, 1, 512, 0.62)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _hopper('h200', 'NVIDIA H200 SXM', 4.8e12),
        _hopper('h100', 'NVIDIA H100 SXM', 3.35e12),
        Gpu('a100', 'NVIDIA A100 80GB SXM', 80, 108, 1.41e9, 2.039e12, 4.5e12, 2, 256, 1.0),
    )
}
