"""``megatron-mhc --print-completion``: a script that completes the command in a shell, by shtab."""

from __future__ import annotations

import argparse
import pathlib

from megatron_mhc.inputs.refusal import refuse
from megatron_mhc.inputs.values import input_file
from megatron_mhc.settings.groups import EVERY_GROUP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


def main(options: argparse.Namespace) -> int:
    """Print the script for ``options.parser``; 0."""
    try:
        import shtab
    except ModuleNotFoundError:
        refuse(
            'megatron-mhc',
            '--print-completion: shtab, which writes the script, is not installed; '
            "pip install 'megatron-mhc[completion]'",
        )
    _add_flags(options.parser)
    for action in _actions(options.parser):
        if action.type in (input_file, pathlib.Path) or action.dest == 'script':
            action.complete = shtab.FILE
    print(shtab.complete(options.parser, shell=options.print_completion))
    return 0


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """To ``run`` the flags that a script gains, which come after SCRIPT."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for add_group in EVERY_GROUP:
        add_group(commands.choices['run'])


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Of the parser and of all below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
