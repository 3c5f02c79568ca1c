"""A flag is said once: in the field of the settings that it fills.

``setting`` makes that field. The option and its help, the values that a namespace gives, the check
of each value, the refusal of one without effect, the comparison with a checkpoint and the row in
the page of flags (``table.py``) all follow from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from megatron_mhc.inputs.values import (
    check_bool,
    check_integer,
    check_number,
    integer,
    is_number,
    number,
    shown,
)

ON_OFF = ('on', 'off')


@dataclass(frozen=True)
class Flag:
    """What a field is on the command line, and which values it takes.

    Args:
        default: of the field; ``MISSING`` where there is none.
        name: of the flag. One with ``-no-`` switches off what is on by default.
        kind: of one value: int, float, bool or str.
        help: what it means, in one clause, for ``--help`` and the page; values in backticks.
        more: what ``--help`` adds to that.
        said: the default in words, where the value alone does not tell.
        source: where the default comes from.
        metavar: what stands for the value in ``--help``.
        least: smallest number allowed.
        most: largest number allowed.
        above: ``least`` itself is not allowed.
        choices: words allowed, or what returns them. An int takes them beside numbers; a bool with
            ``ON_OFF`` takes a value on the command line.
        many: several values, kept as a tuple: numbers in their order, words and integers sorted; an
            integer may not be repeated.
        only: other field, or argument of Megatron's -> values with which this one has an effect.
        structural: another value makes another function of the same weights.
        why: the reason of the range, for the refusal.
        absent: what the namespace has where the flag is left out.
        formerly: a name that it had before, which still works.
    """

    default: Any
    name: str
    kind: type
    help: str
    more: str = ''
    said: str = ''
    source: str = ''
    metavar: str | None = None
    least: float = 0
    most: float = 0
    above: bool = False
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = ()
    many: bool = False
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    structural: bool = False
    why: str = ''
    absent: str | None = None
    formerly: str = ''

    @property
    def dest(self) -> str:
        """The argument's name in a namespace."""
        return self.name.replace('-no-', '-', 1).lstrip('-').replace('-', '_')

    @property
    def default_text(self) -> str:
        default = self.default if self.absent is None else self.absent
        if self.said or default is MISSING:
            return self.said or 'none'
        if isinstance(default, bool):
            return 'on' if default else 'off'
        if isinstance(default, tuple):
            return ' '.join(map(str, default)) or 'none'
        return f'{default:g}'.replace('e-0', 'e-') if self.kind is float else str(default)

    @property
    def belongs_to(self) -> str:
        """What it has an effect with, in words; empty for everything."""
        return ' with '.join(map(listed, self.only.values()))

    @property
    def remedy(self) -> str:
        source = f' ({self.source})' if self.source else ''
        default = f'leave it out to use {self.default_text}{source}'
        without = self.default is MISSING and not self.said
        return '; '.join(filter(None, (self.why, '' if without else default))).replace('`', '')

    @property
    def option_help(self) -> str:
        text = '; '.join(filter(None, (self.help, self.more)))
        default = ', '.join(filter(None, (self.default_text, self.source)))
        only = f'; {self.belongs_to} only' if self.only else ''
        former = f'; formerly {self.formerly}' if self.formerly else ''
        return f'{text} (default: {default}{only}{former})'.replace('`', '')

    def words(self) -> tuple[str, ...]:
        return self.choices() if callable(self.choices) else self.choices

    def option(self) -> dict[str, Any]:
        """How argparse reads it. Ranges are left to ``check``, which gives the reason as well."""
        if self.kind is bool and not self.choices:
            return {'action': 'store_const', 'const': '-no-' not in self.name}
        options: dict[str, Any] = {'metavar': self.metavar, 'nargs': '+' if self.many else None}
        if self.kind is int:
            options['type'] = integer(words=self.words())
        elif self.kind is float:
            options['type'] = number()
        elif not callable(self.choices):
            options['choices'] = self.choices
        return options

    def value_of(self, parsed: Any) -> Any:
        """The field's value for one of a namespace, as parsed or as saved."""
        if isinstance(parsed, list):
            return tuple(parsed)
        return parsed == ON_OFF[0] if self.kind is bool and isinstance(parsed, str) else parsed

    def check(self, value: Any, field: str) -> None:
        if self.kind is bool:
            check_bool(field, value)
        elif self.kind is float:
            check_number(self.name, value, self.least, self.most, self.remedy, self.above)
        elif self.kind is int:
            least, most = int(self.least), int(self.most)
            check_integer(self.name, value, least, most, self.remedy, words=self.words())
        elif value not in self.words():
            raise ValueError(
                f'{self.name} {shown(value)}: unknown value; choose one of '
                f'{", ".join(self.words())}'
            )

    def check_many(self, values: Any) -> None:
        listed = isinstance(values, tuple | list)
        if self.kind is int:
            fits = listed and values and all(type(v) is int for v in values)
            fits = fits and len(set(values)) == len(values)
            fits = fits and self.least <= min(values) and max(values) <= self.most
            wanted = f'distinct integers from {self.least} to {self.most}'
        elif self.kind is float:
            fits = listed and values and all(map(is_number, values))
            fits = fits and self.least <= min(values) and max(values) <= self.most
            fits = fits and not (self.above and min(values) == self.least)
            start = 'above' if self.above else 'from'
            wanted = f'numbers {start} {self.least:g} to {self.most:g}'
        else:
            fits = listed and all(value in self.words() for value in values)
            wanted = f'any of {", ".join(self.words())}'
        if not fits:
            given = ' '.join(map(shown, values)) if listed else shown(values)
            wanted += '' if listed else ', in a tuple'
            raise ValueError(f'{self.name} {given}: wanted {wanted}; {self.remedy}')


def listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return ' and '.join(filter(None, (', '.join(words[:-1]), words[-1])))


def setting(default: Any, name: str, kind: type = str, *, help: str, **more: Any) -> Any:
    """A dataclass field with a flag; ``Flag`` describes the arguments."""
    flag = Flag(default, name, kind, help, **more)
    return dataclasses.field(default=default, metadata={'flag': flag})


def flags_of(cls: type[Any]) -> dict[str, Flag]:
    """Field -> its flag, of the settings ``cls``."""
    # mypy does not know that every class can be hashed.
    return _flags_of(cls)  # type: ignore[arg-type]


@functools.cache
def _flags_of(cls: type[Any]) -> dict[str, Flag]:
    fields = dataclasses.fields(cls)
    return {field.name: field.metadata['flag'] for field in fields if 'flag' in field.metadata}


def add_options(group: argparse._ArgumentGroup, cls: type) -> None:
    """Add the flags of ``cls``; those left out are None, to be told apart from those in vain."""
    for flag in flags_of(cls).values():
        names = filter(None, (flag.name, flag.formerly))
        group.add_argument(
            *names, dest=flag.dest, default=flag.absent, help=flag.option_help, **flag.option()
        )


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Field -> value, of the flags of ``cls`` that ``args`` has."""
    found = {name: getattr(args, flag.dest, None) for name, flag in flags_of(cls).items()}
    return {
        name: flags_of(cls)[name].value_of(value)
        for name, value in found.items()
        if value is not None
    }


def write_back(
    args: argparse.Namespace, config: Any, only: Callable[[Flag], bool] = lambda flag: True
) -> None:
    """Write what ``config`` has to ``args``, as plain values, for the flags that ``only`` picks."""
    for name, flag in flags_of(type(config)).items():
        if only(flag):
            value = getattr(config, name)
            setattr(args, flag.dest, list(value) if isinstance(value, tuple) else value)


def refuse_in_vain(given: Iterable[Flag], other: str, flag: str, value: str) -> None:
    """Raise ValueError for the first flag that has no effect beside ``value`` of another.

    Args:
        given: the flags on the command line.
        other: field of the other one.
        flag: its name.
        value: its value.
    """
    for one in given:
        values = one.only.get(other, (value,))
        if value not in values:
            raise ValueError(
                f'{one.name} has no effect with {flag} {value}: it belongs to {listed(values)}; '
                f'drop it or set {flag} {values[-1]}'
            )


def check(config: Any) -> None:
    """Raise ValueError for the first value that its flag does not take, and sort several."""
    for name, flag in flags_of(type(config)).items():
        value = getattr(config, name)
        if value is None and flag.default is None:
            continue
        if flag.many:
            flag.check_many(value)
            kept = value if flag.kind is float else sorted(set(value))
            object.__setattr__(config, name, tuple(kept))
        else:
            flag.check(value, name)


def refuse_stray(config: Any) -> None:
    """Raise ValueError for the first value without effect beside the others."""
    for name, flag in flags_of(type(config)).items():
        for other, values in flag.only.items():
            if getattr(config, other) not in values and getattr(config, name) != flag.default:
                raise ValueError(
                    f'{name}={getattr(config, name)!r} has no effect with {other}='
                    f'{getattr(config, other)!r}: leave it at its default'
                )


def structure(config: Any) -> tuple[tuple[str, Any], ...]:
    """What has to be equal for weights to mean the same: ``(field, value)`` of each."""
    return tuple(
        (name, getattr(config, name))
        for name, flag in flags_of(type(config)).items()
        if flag.structural
        and all(getattr(config, other) in values for other, values in flag.only.items())
    )
