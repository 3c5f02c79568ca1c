"""Patches of the emulated CPU device: Mamba and gated delta net layers without their kernels.

Megatron's own layers stay, with their parameters, sharding, packing and caches; the names that they
call kernels by get the ones of ``megatron_mhc.runtime.cpu_ssd`` and ``cpu_delta_rule``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from megatron_mhc.patches.engine import Patch
from megatron_mhc.runtime import cpu_delta_rule, cpu_ssd


class GatedRMSNorm(cpu_ssd.GatedRMSNorm):
    """Sharded over its channels."""

    def sharded_state_dict(self, prefix='', sharded_offsets=(), metadata=None):
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {'weight': 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata['dp_cp_group'],
        )


def _packs(for_inference_not_training: bool = True) -> tuple[bool, str]:
    why = 'on the CPU device a Mamba layer infers in static batches, with no sequences packed'
    return not for_inference_not_training, why


MAMBA = {
    'HAVE_MAMBA_SSM': True,
    'ExtendedRMSNorm': GatedRMSNorm,
    'mamba_chunk_scan_combined': cpu_ssd.mamba_chunk_scan_combined,
    'mamba_split_conv1d_scan_combined': cpu_ssd.mamba_split_conv1d_scan_combined,
    '_check_mamba_sequence_packing_support': _packs,
    # Without these the layer computes in torch itself.
    'causal_conv1d_fn': None,
    'causal_conv1d_update': None,
    'selective_state_update': None,
}
DELTA_RULE = {
    'HAVE_FLA': True,
    'l2norm': cpu_delta_rule.l2norm,
    'causal_conv1d': cpu_delta_rule.causal_conv1d,
    'chunk_gated_delta_rule': cpu_delta_rule.chunk_gated_delta_rule,
    'causal_conv1d_fn': None,  # 0.17
}


def _calls(kernels: Mapping[str, Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self, *args, **kwargs):
        # 0.19 has a gated delta net in two modules.
        for module in {kind.__module__ for kind in type(self).__mro__}:
            if module.startswith('megatron.core.ssm.'):
                vars(sys.modules[module]).update(kernels)
        original(self, *args, **kwargs)

    return __init__


def _one_token_of_each(original: Callable[..., Any]) -> Callable[..., Any]:
    def _ssm_decode(self, zxBCdt, *args, **kwargs):
        # A static batch comes as [1, b, channels], as if of b tokens of one sequence.
        return original(self, zxBCdt.transpose(0, 1), *args, **kwargs).transpose(0, 1)

    return _ssm_decode


_DELTA_RULE = functools.partial(_calls, DELTA_RULE)
CPU_MIXER_PATCHES = (
    Patch(
        id='cpu-mamba',
        target='megatron.core.ssm.mamba_mixer:MambaMixer.__init__',
        wrap=functools.partial(_calls, MAMBA),
        reason='without mamba_ssm, whose kernels need CUDA, it refuses to be built',
        fingerprints={
            '0.17': '0e27c083',
            '0.18': '7d0fe4c1',
            '0.19': '7d0fe4c1',
            '0.20': '7d0fe4c1',
        },
    ),
    *(
        Patch(
            id=f'cpu-mamba-{id}',
            target=f'megatron.core.ssm.mamba_mixer:MambaMixer.{name}',
            wrap=_one_token_of_each,
            reason='its way without kernels takes one token of each sequence, a static batch first',
            fingerprints=dict.fromkeys(releases, 'da9c4369'),
            reads=('zxBCdt',),
        )
        for id, name, releases in (
            ('decode', '_ssm_decode', ('0.17', '0.18', '0.19')),
            # The same under the name that it has since.
            ('ssm-decode', 'ssm_decode', ('0.20',)),
        )
    ),
    Patch(
        id='cpu-delta-net',
        target='megatron.core.ssm.gated_delta_net:GatedDeltaNet.__init__',
        wrap=_DELTA_RULE,
        reason='without fla, whose kernels need CUDA, it refuses to be built',
        fingerprints={'0.17': 'de528b71', '0.18': '6ed9b1f9'},
    ),
    Patch(
        id='cpu-delta-net-base',
        target='megatron.core.ssm.gated_delta_net.common:_GDNBase.__init__',
        wrap=_DELTA_RULE,
        reason='the same where later releases have it',
        fingerprints={'0.19': 'ebb15f97', '0.20': 'e0cf7c91'},
    ),
)
