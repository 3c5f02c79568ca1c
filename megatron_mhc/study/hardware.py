"""GPUs and links of a scaling study, and what is assumed of how well they are used."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_mhc.inputs.values import shown
from megatron_mhc.settings.queues import one_queue


@dataclass(frozen=True)
class Hardware:
    """One kind of machine: its spec sheet first, then assumptions (reasons: ``docs/study.md``).

    Args:
        name: for people.
        tflops: dense bf16 TFLOP/s of a GPU.
        memory_gib: memory of a GPU that a process sees.
        memory_gb_s: GB/s of it, read and written together.
        nvlink_gb_s: GB/s between GPUs of a node, one way, per GPU.
        network_gb_s: the same between nodes.
        gpus_per_node: GPUs that NVLink joins.
        gemm_efficiency: share of ``tflops`` in linear layers, with the norms, activation functions,
            routing and permutations between them.
        attention_efficiency: share of ``tflops`` in the core of attention.
        kernel_efficiency: share of ``memory_gb_s`` in mHC kernels, residual additions, the loss and
            the optimizer.
        link_efficiency: share of a link's bandwidth.
        latency_us: until a message or collective begins to arrive.
        slot_overlap: share of the all-to-all that a fused slot can hide, and does.
        post_overlap: share of the MLPs' F_post,res that ``--mhc-post-stream high`` hides.
        fp32_tflops: of matrix products of a model that is trained in fp32; 0 where unknown.
        fp8_tflops: dense, of linear layers in fp8; 0 where there is none.
        compute_capability: its major number, 10 for Blackwell: see ``one_queue``.
        gpus_per_host: GPUs that one operating system has, for launch scripts; 0: as NVLink joins.

    Raises:
        ValueError: a value that no machine has.
    """

    name: str
    tflops: float
    memory_gib: float
    memory_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    gpus_per_node: int = 8
    gemm_efficiency: float = 0.55
    attention_efficiency: float = 0.5
    kernel_efficiency: float = 0.8
    link_efficiency: float = 0.8
    latency_us: float = 10.0
    slot_overlap: float = 1.0
    post_overlap: float = 0.0
    fp32_tflops: float = 0.0
    fp8_tflops: float = 0.0
    compute_capability: int = 9
    gpus_per_host: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == 'name':
                if not value.isprintable():
                    raise ValueError(f'hardware name={shown(repr(value))}: give one line of text')
                continue
            if abs(value) > _LARGEST:
                raise ValueError(f'hardware {field.name}: no machine has more than {_LARGEST:g}')
            if not math.isfinite(value) or value < 0 or (not value and field.name not in _ZERO):
                raise ValueError(f'hardware {field.name}={value}: give a finite number above 0')
            if value > 1 and field.name.endswith(('efficiency', 'overlap')):
                raise ValueError(f'hardware {field.name}={value}: a share; give at most 1')

    def peak(self, value_bytes: int = 2) -> float:
        """FLOP/s of a GPU with values of 2 bytes (bf16, fp16) or 4 (fp32).

        Raises:
            ValueError: fp32, and ``fp32_tflops`` is not known.
        """
        if value_bytes == 2:
            return self.tflops * 1e12
        if not self.fp32_tflops:
            raise ValueError(
                'hardware fp32_tflops=0: unknown, but the model is fp32; add --bf16 behind '
                '--model, or --set fp32_tflops=67 (an H100)'
            )
        return self.fp32_tflops * 1e12

    def fp8_peak(self) -> float:
        """FLOP/s of a GPU in fp8.

        Raises:
            ValueError: it has none.
        """
        if not self.fp8_tflops:
            raise ValueError(
                f'--precision fp8: {self.name} has no fp8 (fp8_tflops=0); use another --hardware, '
                'or --set fp8_tflops=1979 (an H100)'
            )
        return self.fp8_tflops * 1e12

    def one_queue(self, tp: int, cp: int = 1) -> bool:
        """Whether all streams of a GPU share one hardware queue (``settings.queues``)."""
        return one_queue(tp, cp, self.compute_capability)

    @property
    def ranks_per_host(self) -> int:
        """GPUs of one launch of torchrun."""
        return self.gpus_per_host or self.gpus_per_node

    @property
    def bandwidth(self) -> float:
        """Bytes/s of memory in kernels that wait for it."""
        return self.memory_gb_s * 1e9 * self.kernel_efficiency

    @property
    def memory(self) -> float:
        """Bytes of a GPU."""
        return self.memory_gib * 2**30


_ZERO = ('latency_us', 'slot_overlap', 'post_overlap', 'fp32_tflops', 'fp8_tflops', 'gpus_per_host')
_LARGEST = 1e30
