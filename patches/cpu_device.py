"""Megatron-side patches of the emulated CPU device.

The launcher applies them after ``megatron_mhc.runtime.cpu_device.install``; with CUDA it applies
none.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_mhc.patches.cpu_arguments import CPU_ARGUMENTS_PATCH
from megatron_mhc.patches.cpu_groups import CPU_GROUPS_PATCH
from megatron_mhc.patches.cpu_hybrid import CPU_HYBRID_PATCHES
from megatron_mhc.patches.cpu_mixers import CPU_MIXER_PATCHES
from megatron_mhc.patches.cpu_optimizer import CPU_OPTIMIZER_PATCHES
from megatron_mhc.patches.cpu_sparse import CPU_SPARSE_PATCHES
from megatron_mhc.patches.engine import Patch, on_every_release


def _allow_no_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(original, allow_no_cuda=True)


def _splits_to_numpy(original: Callable[..., Any]) -> Callable[..., Any]:
    def move(tensor, as_numpy=False, *args, **kwargs):
        # The original converts only what it moved, and all_to_all takes no tensor as split sizes.
        moved = original(tensor, as_numpy, *args, **kwargs)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    return move


def _norm_with_sequence_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    def new(cls, config, *args, **kwargs):
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        config = copy.copy(config)
        config.sequence_parallel = False
        norm = original(cls, config, *args, **kwargs)
        # A norm works token by token, so split sequences are no obstacle; its gradient is partial,
        # and this mark has Megatron sum it over the tensor-parallel group.
        for param in norm.parameters():
            param.sequence_parallel = True
        return norm

    return new


def _any_head_size(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self, *args, k_channels=None, v_channels=None, **kwargs):
        # Latent attention names its head sizes: Transformer Engine's attention takes them, the
        # local one works for any but shapes its output by the configured one.
        original(self, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return init


def _without_fp8(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self, fp8=None, *args, **kwargs):
        # The default False is read as "on", and then Transformer Engine is called.
        original(self, fp8 or None, *args, **kwargs)

    return init


def _share_by_copy(original: Callable[..., Any]) -> Callable[..., Any]:
    def share(output, recomputed):
        # Storage level, so that views see the data and no version counter moves.
        target, source = output.untyped_storage(), recomputed.untyped_storage()
        target.resize_(source.nbytes())
        target.copy_(source)

    return lambda *args, **kwargs: share


def _wait_at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def manager(*args, **kwargs):
        with original(*args, **kwargs) as handle:
            yield handle
        # Left in flight beside p2p, gloo's coalesced collectives corrupt the heap.
        handle.wait()

    return manager


def _one_type_a_group(original: Callable[..., Any]) -> Callable[..., Any]:
    def partition_buckets(buffers, *args, **kwargs):
        kinds = list(dict.fromkeys(buffer.param_dtype for buffer in buffers))
        return [
            group
            for kind in kinds
            for group in original([b for b in buffers if b.param_dtype == kind], *args, **kwargs)
        ]

    return partition_buckets


def _keep_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def post_init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.deallocate_pipeline_outputs = False

    return post_init


_PATCHES: tuple[Patch, ...] = (
    Patch(
        id='cpu-allow-no-cuda',
        target='megatron.training.training:initialize_megatron',
        wrap=_allow_no_cuda,
        reason='start-up asserts a real CUDA device unless told otherwise',
        fingerprints=on_every_release('625d0daa') | {'0.17': 'd2c56f52', '0.18': '650a2e0f'},
        reads=('allow_no_cuda',),
    ),
    Patch(
        id='cpu-allow-no-cuda-script',
        target='megatron.training.initialize:initialize_megatron',
        wrap=_allow_no_cuda,
        reason='the same for scripts that do not train, which call it themselves',
        fingerprints=on_every_release('625d0daa') | {'0.17': 'd2c56f52', '0.18': '650a2e0f'},
        reads=('allow_no_cuda',),
    ),
    CPU_ARGUMENTS_PATCH,
    CPU_GROUPS_PATCH,
    Patch(
        id='cpu-alltoall-splits',
        target='megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu',
        wrap=_splits_to_numpy,
        reason='a tensor that is on the CPU already is not converted to numpy',
        fingerprints=on_every_release('9b679809'),
        reads=('tensor', 'as_numpy'),
    ),
    Patch(
        id='cpu-norm-sequence-parallel',
        target='megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__',
        wrap=_norm_with_sequence_parallel,
        reason="the local layer spec's only norm without Apex asserts no sequence parallelism",
        fingerprints=on_every_release('83653cf2'),
        reads=('config',),
    ),
    Patch(
        id='cpu-latent-attention',
        target='megatron.core.transformer.dot_product_attention:DotProductAttention.__init__',
        wrap=_any_head_size,
        reason="multi-latent attention passes arguments that only Transformer Engine's takes",
        fingerprints=on_every_release('80e0eb05'),
    ),
    Patch(
        id='cpu-checkpoint-fp8',
        target='megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__',
        wrap=_without_fp8,
        reason='selective recompute calls Transformer Engine although fp8 is off',
        fingerprints=on_every_release('d87a79d1') | {'0.20': 'd9ac8ac9'},
        reads=('fp8',),
    ),
    Patch(
        id='cpu-checkpoint-storage',
        target='megatron.core.tensor_parallel.random:_get_share_storage',
        wrap=_share_by_copy,
        reason='selective recompute compiles a C++ extension when it first runs',
        fingerprints=on_every_release('e3b0c442'),
    ),
    Patch(
        id='cpu-wait-coalesced',
        target='megatron.core.distributed.param_and_grad_buffer:_coalescing_manager',
        wrap=_wait_at_once,
        reason='gloo corrupts the heap when coalesced collectives stay in flight',
        fingerprints=on_every_release('8cbcc252'),
    ),
    Patch(
        id='cpu-bucket-types',
        target='megatron.core.distributed.distributed_data_parallel:partition_buckets',
        wrap=_one_type_a_group,
        reason='gloo overwrites parameters when it gathers fp32 and 16-bit buckets in one call',
        fingerprints=on_every_release('d4d4a205'),
        reads=('buffers',),
    ),
    Patch(
        id='cpu-keep-outputs',
        target='megatron.core.model_parallel_config:ModelParallelConfig.__post_init__',
        wrap=_keep_outputs,
        reason='0.17 frees a stage output whose send is pending; later releases wait for it',
        fingerprints={'0.17': '64b28ff1'},
    ),
    *CPU_HYBRID_PATCHES,
    *CPU_MIXER_PATCHES,
    *CPU_SPARSE_PATCHES,
    *CPU_OPTIMIZER_PATCHES,
)
# They must be in place before Megatron is imported, so no tree has a seam for them.
CPU_DEVICE_PATCHES = tuple(dataclasses.replace(patch, in_tree=False) for patch in _PATCHES)
