"""Launcher: run an unmodified Megatron pretrain script with ``--residual-type`` available.

python -m megatron_mhc.run SCRIPT ARGS...
torchrun --nproc-per-node 8 -m megatron_mhc.run SCRIPT ARGS...
"""

from __future__ import annotations

import argparse
import os
import pathlib
import runpy
import sys

from megatron_mhc.inputs.refusal import OneLineParser, refuse
from megatron_mhc.runtime.script_path import enter_folder
from megatron_mhc.settings.names import DEVICES

# As argparse prints the flags of the settings, which take twice its own time to build; written by
# settings/table.py.
FLAGS = pathlib.Path(__file__).parent / 'settings' / 'flags.txt'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The launcher's own options, before SCRIPT; everything after it is the script's."""
    parser.add_argument(
        '--device',
        choices=[device for device in DEVICES if device != 'unchanged'],
        default='auto',
        help='cuda, or an emulated CUDA device on the CPU over gloo for functional runs '
        '(default: auto, cuda where there is one)',
    )
    parser.add_argument('script', metavar='SCRIPT', help='pretrain script, e.g. pretrain_gpt.py')
    parser.add_argument(
        'arguments', metavar='ARGS', nargs=argparse.REMAINDER, help='passed to SCRIPT as they are'
    )


def build_parser(prog: str, closing: str = '') -> argparse.ArgumentParser:
    """The launcher's parser; help lists the flags that a script gains, and ends in ``closing``."""
    parser = OneLineParser(
        prog=prog,
        description='Run a Megatron pretrain script, unmodified, with hyper-connections available.',
        epilog='flags that SCRIPT gains (beside its own; guide: megatron-mhc docs flags):\n'
        + FLAGS.read_text()
        + closing,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser


def main(
    argv: list[str] | None = None, prog: str = 'python -m megatron_mhc.run', closing: str = ''
) -> None:
    """Prepare Megatron, then run the script as ``__main__``."""
    parser = build_parser(prog, closing)
    options = parser.parse_args(argv)
    script = pathlib.Path(options.script)
    if not script.is_file():
        refuse(
            prog,
            f'SCRIPT {script}: no such file; name a pretrain script, e.g. examples/pretrain_gpt.py',
        )
    # Before anything looks for Megatron, so that the script gets the one that Python would give it.
    enter_folder(script.resolve().parent)
    from megatron_mhc.bootstrap import prepare

    try:
        _single_process_defaults()
        prepare(options.device)
    except (RuntimeError, ValueError) as error:
        refuse(prog, str(error))
    from megatron_mhc.runtime import cpu_device

    sys.argv = [str(script), *options.arguments]
    try:
        runpy.run_path(str(script.absolute()), run_name='__main__')
    except SystemExit:
        cpu_device.end_collectives()
        raise
    # Not after an error: peers that lose their connection would end this rank before it tells.
    cpu_device.end_collectives()


def _single_process_defaults() -> None:
    """Without torchrun, stand for its rendezvous variables for a world of one.

    Raises:
        RuntimeError: another launcher started several tasks and did not say how many; each would
            train by itself and write the same checkpoint.
    """
    if 'WORLD_SIZE' in os.environ:
        return
    from megatron_mhc.inputs.values import environment_integer

    for name in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE'):
        if environment_integer(name, 1) > 1:
            raise RuntimeError(
                f'{name}={os.environ[name]} but WORLD_SIZE is not set: every task would train '
                'alone; start torchrun on each node, or export RANK, LOCAL_RANK, WORLD_SIZE, '
                'MASTER_ADDR and MASTER_PORT'
            )
    if 'MASTER_ADDR' in os.environ:
        return
    import socket

    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    os.environ.update(
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        RANK='0',
        LOCAL_RANK='0',
        WORLD_SIZE='1',
        LOCAL_WORLD_SIZE='1',
    )


if __name__ == '__main__':
    main()
