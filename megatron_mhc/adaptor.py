"""One line at the top of a pretrain script: ``import megatron_mhc.adaptor``.

The script then accepts ``--residual-type {standard,hc,mhc}``. On a machine without CUDA, setting
``MEGATRON_MHC_DEVICE=cpu`` asks for the emulated CUDA device, as the launcher does by itself.
"""

import os

from megatron_mhc.bootstrap import prepare

prepare(os.environ.get('MEGATRON_MHC_DEVICE', 'unchanged'))
