"""The ``megatron-mhc`` command: a table of subcommands, of which only the one asked for is loaded.

A subcommand's module has ``add_arguments(parser)``, which also names the module that answers:
``parser.set_defaults(answer=NAME)``, where ``main(options)`` of NAME returns the exit status. Help
and wrong options then need the words of the options alone.
"""

from __future__ import annotations

import importlib
import os
import sys

from megatron_mhc import __version__
from megatron_mhc.inputs.refusal import OneLineParser
from megatron_mhc.runtime.script_path import enter_tree_at_hand

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Container

PROGRAM = 'megatron-mhc'
SHELLS = ('bash', 'zsh')
COMPLETION = 'megatron_mhc.commands.completion'
# name -> (module, help)
COMMANDS = {
    'run': ('run', 'run a pretrain script with --residual-type available'),
    'doctor': (
        'commands.doctor',
        'print versions, device, optional packages and the state of every patch',
    ),
    'patch': ('tree.command', "put the seams into a user's own Megatron tree"),
    'convert': ('convert.cli', 'give a checkpoint streams, or another layout of them'),
    'schedule': ('commands.schedule', 'about pipeline schedules'),
    'recipe': ('recipes.command', "the mHC paper's models"),
    'study': ('study.command', 'which layout trains fastest: step time, memory and messages'),
    'recompute': (
        'commands.recompute',
        'measure the memory of recompute segments beside the formula',
    ),
    'report': (
        'monitor.command',
        'say whether runs with --mhc-monitor are healthy, and draw their curves and maps',
    ),
    'kernels': ('commands.kernels', 'about the Triton kernels'),
    'docs': ('commands.docs', 'list the guides, or print one'),
}
# name -> the page of `megatron-mhc docs` that its --help ends with, and those of its topics.
GUIDES = {
    'doctor': 'troubleshooting',
    'patch': 'patches',
    'convert': 'conversion',
    'schedule': 'schedules',
    'study': 'study',
    'recompute': 'flags',
    'report': 'watching',
    'kernels': 'kernels',
}


class _Parser(OneLineParser):
    """One of a command or topic: its help ends with examples and the guide."""

    def format_help(self) -> str:
        page = self.prog.removeprefix(PROGRAM).strip()
        return super().format_help() + _closing(page)


def _closing(page: str) -> str:
    """What the help of ``page``, such as ``schedule show``, ends with."""
    from megatron_mhc.commands.examples import examples

    lines = ['', 'examples:', *(_folded(line) for line in examples(page))]
    name = page.partition(' ')[0]
    if name in GUIDES:
        lines += ['', f'guide: megatron-mhc docs {GUIDES[name]}']
    return '\n'.join(lines) + '\n'


def _folded(line: str) -> str:
    """A line to type within 80 columns, with the backslashes that a shell continues it after."""
    import re
    import textwrap

    head, flag, tail = line.partition(' --')
    # Values stay with their flag.
    glued = head + flag + re.sub(' (?!--)', '\0', tail)
    # 78 and the backslash.
    folded = textwrap.TextWrapper(78, '  ', '      ', break_long_words=False)
    folded.break_on_hyphens = False
    return ' \\\n'.join(folded.wrap(glued)).replace('\0', ' ')


def build_parser(wanted: Container[str]) -> argparse.ArgumentParser:
    """The parser, with the options of the ``wanted`` commands only: the others are words."""
    parser = _Parser(prog=PROGRAM, description='Hyper-connections for Megatron-Core.')
    parser.add_argument('--version', action='version', version=f'megatron-mhc {__version__}')
    parser.add_argument(
        '--print-completion',
        choices=SHELLS,
        help='print a script for the shell that completes commands and options',
    )
    commands = parser.add_subparsers(dest='command', metavar='COMMAND')
    for name, (module, words) in COMMANDS.items():
        command = commands.add_parser(name, help=words)
        if name in wanted:
            importlib.import_module(f'megatron_mhc.{module}').add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Dispatch to a subcommand; each brings its own ``--help``."""
    argv = sys.argv[1:] if argv is None else argv
    # The launcher's REMAINDER must reach it untouched, hence no argparse in between.
    if argv[:1] == ['run']:
        from megatron_mhc.run import main as run

        return run(argv[1:], prog=f'{PROGRAM} run', closing=_closing('run'))
    enter_tree_at_hand()
    parser = build_parser(argv[:1])
    options = parser.parse_args(argv)
    if options.print_completion:
        options.answer, options.parser = COMPLETION, build_parser(COMMANDS)
    elif options.command is None:
        parser.error(f'argument COMMAND: missing; choose from {", ".join(COMMANDS)}')
    try:
        status = importlib.import_module(options.answer).main(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has read enough. What is left would fail again at exit, so it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        # What a shell reports of a program that was interrupted.
        status = 130
    sys.exit(status)


if __name__ == '__main__':
    main()
