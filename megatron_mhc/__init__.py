"""Hyper-connections (HC) and manifold-constrained hyper-connections (mHC) for Megatron-Core.

Importing this package needs neither a GPU nor Triton nor Megatron; what needs torch or Megatron is
loaded when it is first used.
"""

import importlib

# As typing's, which takes a tenth of the start of a command to import.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from megatron_mhc import ops
    from megatron_mhc.residual.spec import with_residual
    from megatron_mhc.settings.residual import ResidualConfig

__version__ = '0.1.0'
__all__ = ['ResidualConfig', '__version__', 'ops', 'with_residual']

# name -> the module that has it, loaded when the name is first asked for.
_HOMES = {
    'ResidualConfig': 'megatron_mhc.settings.residual',
    'with_residual': 'megatron_mhc.residual.spec',
}


def __getattr__(name: str) -> object:
    if name == 'ops':
        return importlib.import_module('megatron_mhc.ops')
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
