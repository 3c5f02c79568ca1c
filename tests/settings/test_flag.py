"""One field says all of a flag: option, help, check, refusals, comparison, row of the page."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from dataclasses import MISSING, dataclass

import pytest

from megatron_mhc.settings.flag import (
    ON_OFF,
    add_options,
    check,
    flags_of,
    given,
    refuse_in_vain,
    refuse_stray,
    setting,
    structure,
    write_back,
)
from megatron_mhc.settings.groups import EVERY_GROUP, RESIDUAL_FLAGS
from megatron_mhc.settings.table import HEAD, HELP, PAGE, help_text, row, with_tables

HOT = {'kind': ('hot',)}


@dataclass(frozen=True)
class Tea:
    """Every sort of setting."""

    leaves: tuple[int, ...] = setting(
        MISSING, '--tea-leaves', int, many=True, least=1, most=9, help='which leaves'
    )
    kind: str = setting('hot', '--tea-kind', choices=('hot', 'iced'), structural=True, help='`hot`')
    minutes: int | str = setting(
        4,
        '--tea-minutes',
        int,
        choices=('auto',),
        least=1,
        most=60,
        why='it steeps',
        source='a book',
        only=HOT,
        structural=True,
        metavar='M',
        help='`auto` or minutes',
        more='of steeping',
    )
    sugar: float = setting(0.5, '--tea-sugar', float, most=3.0, above=True, help='spoons')
    stirred: bool = setting(
        True, '--tea-no-stirring', bool, only=HOT, formerly='--tea-unstirred', help='let it stand'
    )
    sips: tuple[float, ...] = setting(
        (2.0, 0.5), '--tea-sips', float, many=True, above=True, most=3, help='one after another'
    )
    lid: bool = setting(False, '--tea-lid', bool, choices=ON_OFF, help='lid')
    extras: tuple[str, ...] = setting(
        (), '--tea-extras', many=True, choices=lambda: ('lemon', 'milk'), help='extras'
    )
    cup: str | None = setting(None, '--tea-cup', choices=('big', 'small'), said='`big`', help='cup')
    unflagged: int = 3

    def __post_init__(self) -> None:
        check(self)
        refuse_stray(self)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser.add_argument_group('tea'), Tea)
    return parser.parse_args(flags)


def test_what_is_left_out_is_none_and_what_is_given_reaches_the_settings():
    assert set(vars(parse()).values()) == {None} and given(parse(), Tea) == {}
    args = parse(
        *'--tea-leaves 3 1 --tea-minutes auto --tea-no-stirring --tea-lid on --tea-sugar 1'.split(),
        *'--tea-extras milk lemon milk --tea-sips 1 0.5'.split(),
    )
    tea = Tea(**given(args, Tea))
    assert tea == Tea((1, 3), 'hot', 'auto', 1.0, False, (1.0, 0.5), True, ('lemon', 'milk'))
    write_back(args, tea, lambda flag: flag.name != '--tea-cup')
    assert vars(args) == {
        'tea_leaves': [1, 3],
        'tea_kind': 'hot',
        'tea_minutes': 'auto',
        'tea_sugar': 1.0,
        'tea_stirring': False,
        'tea_sips': [1.0, 0.5],
        'tea_lid': True,
        'tea_extras': ['lemon', 'milk'],
        'tea_cup': None,
    }
    assert Tea(**given(args, Tea)) == tea
    assert parse('--tea-unstirred') == parse('--tea-no-stirring')


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        ({'leaves': ()}, '--tea-leaves : wanted distinct integers from 1 to 9; '),
        ({'leaves': (2, 2)}, '--tea-leaves 2 2: wanted distinct integers from 1 to 9; '),
        ({'leaves': (0, 'x')}, '--tea-leaves 0 x: wanted distinct integers from 1 to 9; '),
        ({'leaves': 3}, '--tea-leaves 3: wanted distinct integers from 1 to 9, in a tuple; '),
        ({'kind': 'cold'}, '--tea-kind cold: unknown value; choose one of hot, iced'),
        (
            {'minutes': 0},
            '--tea-minutes 0: wanted auto or an integer from 1 to 60; it steeps; leave it out to '
            'use 4 (a book)',
        ),
        ({'minutes': True}, '--tea-minutes True: wanted auto or an integer from 1 to 60; '),
        (
            {'sips': (1.0, 0.0)},
            '--tea-sips 1.0 0.0: wanted numbers above 0 to 3; leave it out to use 2.0 0.5',
        ),
        (
            {'sugar': 0},
            '--tea-sugar 0: wanted a finite number above 0, at most 3; leave it out to use 0.5',
        ),
        ({'stirred': 'no'}, "stirred 'no': wanted a bool; give True or False"),
        ({'extras': ('salt',)}, '--tea-extras salt: wanted any of lemon, milk; '),
        ({'extras': 'milk'}, '--tea-extras milk: wanted any of lemon, milk, in a tuple; '),
        ({'cup': 'x'}, '--tea-cup x: unknown value; choose one of big, small'),
        (
            {'kind': 'iced', 'minutes': 5},
            "minutes=5 has no effect with kind='iced': leave it at its default",
        ),
    ],
)
def test_wrong_values_are_refused(changed, message):
    with pytest.raises(ValueError) as refused:
        Tea(**{'leaves': (1,), **changed})
    assert str(refused.value).startswith(message)


def test_a_flag_in_vain_is_refused():
    flags = [flags_of(Tea)['minutes']]
    refuse_in_vain(flags, 'kind', '--tea-kind', 'hot')
    with pytest.raises(ValueError) as refused:
        refuse_in_vain(flags, 'kind', '--tea-kind', 'iced')
    assert str(refused.value) == (
        '--tea-minutes has no effect with --tea-kind iced: it belongs to hot; drop it or set '
        '--tea-kind hot'
    )


def test_what_is_structural_is_compared_where_it_has_an_effect():
    assert structure(Tea((1,))) == (('kind', 'hot'), ('minutes', 4))
    assert structure(Tea((1,), 'iced', sugar=1.0)) == (('kind', 'iced'),)


def test_help_and_row():
    minutes, stirred = (flags_of(Tea)[name] for name in ('minutes', 'stirred'))
    assert minutes.option_help == ('auto or minutes; of steeping (default: 4, a book; hot only)')
    assert row(minutes) == '| `--tea-minutes` | 4 | `auto` or minutes; hot only |\n'
    assert row(stirred) == (
        '| `--tea-no-stirring` | on | let it stand; hot only; formerly `--tea-unstirred` |\n'
    )
    assert row(flags_of(Tea)['cup']) == '| `--tea-cup` | `big` | cup |\n'
    assert row(flags_of(Tea)['kind']) == '| `--tea-kind` | `hot` | `hot` |\n'
    assert row(flags_of(Tea)['leaves']) == '| `--tea-leaves` | none | which leaves |\n'


def test_the_page_has_the_tables_that_the_settings_yield():
    page = PAGE.read_text()
    assert page == with_tables(page), 'run `python -m megatron_mhc.settings.table`'
    some = row(flags_of(RESIDUAL_FLAGS.settings[0])['manifold'])
    assert with_tables(page.replace(some, '| `--old` | 1 | gone |\n')) == page
    with pytest.raises(ValueError, match='no table of flags'):
        with_tables(page.replace(HEAD, ''))


def test_the_launchers_help_is_what_the_settings_yield():
    assert HELP.read_text() == help_text(), 'run `python -m megatron_mhc.settings.table`'


@pytest.mark.parametrize('group', EVERY_GROUP, ids=lambda group: group.title)
def test_every_flag_says_what_it_is(group):
    """Nothing that argparse cannot format, that would break a table, or that refuses a default."""
    # The last is an argument of Megatron's.
    others = cls_fields(group) | {'lr_decay_style'}
    for cls in group.settings:
        for name, flag in flags_of(cls).items():
            assert flag.help and '|' not in flag.help and flag.help.count('`') % 2 == 0, name
            assert '%' not in flag.option_help and flag.only.keys() <= others, name
            if flag.default not in (MISSING, None, ()) and not flag.many:
                flag.check(flag.default, name)
    group(argparse.ArgumentParser()).format_help()


def cls_fields(group) -> set[str]:
    return {field.name for cls in group.settings for field in dataclasses.fields(cls)}


def test_the_mechanism_needs_neither_torch_nor_megatron():
    code = (
        'import sys; sys.modules["torch"] = sys.modules["megatron"] = None\n'
        'import importlib.util, types\n'
        'package = types.ModuleType("megatron_mhc"); package.__path__ = ["megatron_mhc"]\n'
        'sys.modules["megatron_mhc"] = package\n'
        'import megatron_mhc.settings.flag'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
