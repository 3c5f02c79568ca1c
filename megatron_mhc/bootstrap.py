"""What the launcher and the adaptor share: check, choose the device, apply the argument patch."""

from __future__ import annotations

import gc
import itertools
import os
import sys

from megatron_mhc.compat import describe_core, require_supported_core
from megatron_mhc.inputs.refusal import announce
from megatron_mhc.settings.flags_residual import parsed_arguments
from megatron_mhc.settings.names import DEVICES, TWO_CHUNK_SCHEDULES

# Class -> its module, below ``megatron.core.models``; 0.17 has the last one alone of hybrid models.
MODELS = {
    'GPTModel': 'gpt.gpt_model',
    'HybridModel': 'hybrid.hybrid_model',
    'MambaModel': 'mamba.mamba_model',
}
TOO_LATE = (
    'is too late: import megatron_mhc.adaptor at the top of the script, before arguments are '
    'parsed and models are built, or start the script with `python -m megatron_mhc.run`'
)


def prepare(device: str) -> None:
    """Make the next pretrain script understand ``--residual-type``; a second call does nothing.

    Args:
        device: ``cuda``; ``cpu``, an emulated CUDA device for functional runs; or ``auto``, which
            is ``cuda`` where there is one and ``cpu`` elsewhere. ``unchanged`` asks for nothing.

    Raises:
        ValueError: unknown device, or one that this machine does not have.
        RuntimeError: Megatron-Core is absent or out of range, what a patch is for has changed, or
            models exist.
    """
    import torch

    from megatron_mhc.runtime import cpu_device

    require_supported_core()
    _require_early()
    if device not in DEVICES:
        raise ValueError(f'--device {device}: choose one of {", ".join(DEVICES)}')
    if device == 'cuda' and not torch.cuda.is_available():
        raise ValueError(
            '--device cuda: torch sees no CUDA device here; use --device cpu for a functional run '
            'on an emulated device'
        )
    if device == 'auto' and not torch.cuda.is_available():
        _require_one_node()
        device = 'cpu'
    announce(describe_core())
    if device == 'cpu':
        cpu_device.install()
    from megatron_mhc.patches import engine
    from megatron_mhc.patches.arguments import ARGUMENTS_PATCH
    from megatron_mhc.patches.dataset_helpers import DATASET_HELPERS_PATCH, ships_prebuilt_helpers

    if cpu_device.is_installed():
        from megatron_mhc.patches.cpu_device import CPU_DEVICE_PATCHES

        engine.apply(CPU_DEVICE_PATCHES)
    if ships_prebuilt_helpers():
        engine.apply((DATASET_HELPERS_PATCH,))
    if asks_for_a_v(sys.argv):
        from megatron_mhc.patches.inverted_v import BATCH_PATCHES

        # Scripts import what this wraps by name, before they parse their arguments.
        engine.apply(BATCH_PATCHES)
    engine.apply((ARGUMENTS_PATCH,))


def asks_for_a_v(argv: list[str]) -> bool:
    """Whether a command line has ``--pipeline-schedule`` with a schedule on the inverted V."""
    flag = '--pipeline-schedule'
    values = [value for name, value in itertools.pairwise(argv) if name == flag]
    values += [token.partition('=')[2] for token in argv if token.startswith(f'{flag}=')]
    return any(value in TWO_CHUNK_SCHEDULES for value in values)


def _require_one_node() -> None:
    """One node without its driver must not join a job on GPUs as an emulated device."""
    import socket

    local = os.environ.get('LOCAL_WORLD_SIZE')
    if local is not None and int(os.environ.get('WORLD_SIZE', '1')) > int(local):
        raise RuntimeError(
            f'torch sees no CUDA device on {socket.gethostname()}, one of several nodes: repair '
            'its driver, or ask for the emulated device on all of them with --device cpu'
        )


def _require_early() -> None:
    patches = sys.modules.get('megatron_mhc.patches.engine')
    if patches is not None and 'arguments' in patches.applied():
        return
    if parsed_arguments() is not None:
        raise RuntimeError(f'Megatron has parsed its arguments: this {TOO_LATE}')
    homes = {name: sys.modules.get(f'megatron.core.models.{home}') for name, home in MODELS.items()}
    models = tuple(getattr(home, name) for name, home in homes.items() if home is not None)
    # Not isinstance: it would ask a proxy, which may be dead, for the class of its referent.
    built = next((o for o in gc.get_objects() if issubclass(type(o), models)), None)
    if built is not None:
        raise RuntimeError(f'a {type(built).__name__} exists already: this {TOO_LATE}')
