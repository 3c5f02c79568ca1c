"""The flags as text: the tables in megatron_mhc/docs/flags.md and the launcher's help.

``python -m megatron_mhc.settings.table`` writes both.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_mhc.settings.flag import Flag, flags_of
from megatron_mhc.settings.groups import EVERY_GROUP, Group

PAGE = Path(__file__).parents[1] / 'docs' / 'flags.md'
HELP = Path(__file__).with_name('flags.txt')
HEAD = '| flag | default | meaning |\n| --- | --- | --- |\n'


def row(flag: Flag) -> str:
    """One line of a table: flag, default, meaning, and what the flag belongs to."""
    word = flag.choices and not flag.said and isinstance(flag.default, str | bool)
    default = f'`{flag.default_text}`' if word else flag.default_text
    meaning = f'{flag.help}; {flag.belongs_to} only' if flag.only else flag.help
    meaning += f'; formerly `{flag.formerly}`' if flag.formerly else ''
    return f'| `{flag.name}` | {default} | {meaning} |\n'


def with_tables(page: str) -> str:
    """``page`` with the rows that the settings yield, under the heading of each group.

    Raises:
        ValueError: a group has no table there.
    """
    for group in EVERY_GROUP:
        page = _with_table(page, group)
    return page


def _with_table(page: str, group: Group) -> str:
    heading = f'## {group.title.capitalize()}\n'
    before, _, rest = page.partition(heading)
    between, head, after = rest.partition(HEAD)
    if not head or '\n## ' in between:
        raise ValueError(f'no table of flags under {heading!r}; add its head:\n{HEAD}')
    rows = ''.join(row(flag) for cls in group.settings for flag in flags_of(cls).values())
    return before + heading + between + head + rows + re.sub(r'^(\|.*\n)*', '', after)


def help_text() -> str:
    """What argparse prints of every group, in 80 columns."""
    flags = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=78),
    )
    for add_group in EVERY_GROUP:
        add_group(flags)
    return flags.format_help()


if __name__ == '__main__':
    PAGE.write_text(with_tables(PAGE.read_text()))
    HELP.write_text(help_text())
