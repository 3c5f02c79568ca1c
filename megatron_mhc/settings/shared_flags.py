"""Flags of ours that the Megatron release has too, for hyper-connections of its own (core 0.20).

One flag then serves both. With a residual connection of ours it means what we document; otherwise
it is the release's, with the release's type and default, as if we were not there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping

from megatron_mhc.inputs.refusal import announce
from megatron_mhc.inputs.values import flag_of

AddGroup = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
# Argument -> what its number counts here, and in the release.
UNITS = {'mhc_recompute_layer_num': ('sublayers, attention and MLP each one', 'whole layers')}


def add_groups(
    parser: argparse.ArgumentParser, groups: Iterable[AddGroup]
) -> dict[str, argparse.Action]:
    """Add our argument groups, and take over the flags that ``parser`` has already.

    Returns:
        our argument -> the release's action for the same flag.
    """
    before, handler = dict(parser._option_string_actions), parser.conflict_handler
    # Groups take it from the parser when they are made: the newer flag then replaces the older.
    parser.conflict_handler = 'resolve'
    try:
        for add_group in groups:
            add_group(parser)
    finally:
        parser.conflict_handler = handler
    after = parser._option_string_actions
    return {
        after[flag].dest: action for flag, action in before.items() if after[flag] is not action
    }


def hand_over(namespace: argparse.Namespace, shared: Mapping[str, argparse.Action]) -> None:
    """Give the release what belongs to it, in place, before our own flags are read.

    Raises:
        ValueError: a value that only we know, without a residual connection of ours.
    """
    ours = namespace.residual_type != 'standard'
    for name, action in shared.items():
        value = getattr(namespace, name)
        flag = action.option_strings[0] if action.option_strings else flag_of(name)
        if ours:
            if action.dest != name:
                setattr(namespace, action.dest, action.default)
            if name in UNITS and isinstance(value, int):
                own, theirs = UNITS[name]
                announce(
                    f'{flag} {value} counts {own}, with --residual-type; Megatron counts '
                    f'{theirs} for hyper-connections of its own'
                )
            continue
        setattr(namespace, name, None)
        setattr(namespace, action.dest, _as_released(action, flag, value))


def _as_released(action: argparse.Action, flag: str, value: object) -> object:
    if value is None:
        return action.default
    try:
        return action.type(str(value)) if callable(action.type) else value
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        raise ValueError(
            f"{flag} {value}: with --residual-type standard this is Megatron's own flag, which "
            'takes another kind of value; set --residual-type mhc, or drop the flag'
        ) from None
