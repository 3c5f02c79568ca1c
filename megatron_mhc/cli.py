"""The ``megatron-mhc`` command: ``run``, ``doctor``, ``patch``, ``kernels``, ``schedule``, ...."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from megatron_mhc import __version__
from megatron_mhc.refusal import refuse


class _OneLine(argparse.ArgumentParser):
    """Answers wrong input without the usage text."""

    def error(self, message: str) -> NoReturn:
        refuse(self.prog, message)


def main(argv: list[str] | None = None) -> None:
    """Dispatch to a subcommand; each brings its own ``--help``."""
    argv = sys.argv[1:] if argv is None else argv
    # The launcher's REMAINDER must reach it untouched, hence no argparse in between.
    if argv[:1] == ['run']:
        from megatron_mhc.run import main as run

        return run(argv[1:], prog='megatron-mhc run')
    parser = argparse.ArgumentParser(prog='megatron-mhc', description=__doc__)
    parser.add_argument('--version', action='version', version=f'megatron-mhc {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, parser_class=_OneLine)
    commands.add_parser('run', help='run a pretrain script with --residual-type available')
    doctor = commands.add_parser(
        'doctor', help='print versions, device, optional packages and the state of every patch'
    )
    doctor.add_argument('--json', action='store_true', help='print one JSON object')
    kernels = commands.add_parser('kernels', help='about the Triton kernels')
    topics = kernels.add_subparsers(dest='topic', required=True)
    if argv[:1] == ['kernels']:
        from megatron_mhc import kernels_accuracy, kernels_report

        modules = {'report': kernels_report, 'accuracy': kernels_accuracy}
        for module in modules.values():
            module.add_parser(topics)
        options = parser.parse_args(argv)
        sys.exit(modules[options.topic].main(options))
    schedule = commands.add_parser('schedule', help='about pipeline schedules')
    topics = schedule.add_subparsers(dest='topic', required=True)
    if argv[:1] == ['schedule']:
        from megatron_mhc import schedule_cli as module

        module.add_parsers(topics)
        if not set(argv[1:2]) & set(module.TOPICS):
            from megatron_mhc import schedule_trace as module

            module.add_parser(topics)
        sys.exit(module.main(parser.parse_args(argv)))
    patch = commands.add_parser('patch', help="put the seams into a user's own Megatron tree")
    if argv[:1] == ['patch']:
        from megatron_mhc import patch_cli

        patch_cli.add_arguments(patch)
        sys.exit(patch_cli.main(parser.parse_args(argv)))
    recompute = commands.add_parser(
        'recompute', help='measure the memory of block recompute beside the formula'
    )
    if argv[:1] == ['recompute']:
        from megatron_mhc import recompute_memory

        recompute_memory.add_arguments(recompute)
        sys.exit(recompute_memory.main(parser.parse_args(argv)))
    options = parser.parse_args(argv)
    from megatron_mhc.doctor import main as doctor_main

    sys.exit(doctor_main(options.json))


if __name__ == '__main__':
    main()
