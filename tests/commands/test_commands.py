"""All commands together: words of options."""

import argparse
import importlib
from pathlib import Path

import pytest

from megatron_mhc import cli
from megatron_mhc.inputs import options as names

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / 'megatron_mhc' / 'docs' / 'commands.md').read_text()


def whole_parser():
    """All commands but the launcher, which has a parser of its own."""
    parser = argparse.ArgumentParser(prog='megatron-mhc')
    commands = parser.add_subparsers()
    for name, (module, _) in cli.COMMANDS.items():
        if name != 'run':
            command = commands.add_parser(name)
            importlib.import_module(f'megatron_mhc.{module}').add_arguments(command)
    return parser


def below(parser):
    """Page, such as ``schedule show`` -> its parser, of all there are."""
    found = {parser.prog.removeprefix('megatron-mhc').strip(): parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                found |= below(one)
    return found


PARSERS = below(whole_parser())


SHARED = (
    *(names.STREAMS, names.CHUNKS, names.MICRO_BATCH, names.KERNEL_BACKEND, names.SEGMENTS),
    *(names.SCHEDULE, names.STEP),
)


@pytest.mark.parametrize('words', SHARED, ids=lambda words: words[0])
def test_one_thing_has_one_word_and_takes_the_others(words):
    having = {}
    for page, parser in PARSERS.items():
        held = {name: parser._option_string_actions.get(name) for name in words}
        # --recompute is a time in ``schedule``, and an older word there as well.
        if held[words[0]] is not None or any(held[w] for w in words if w != '--recompute'):
            having[page] = held
    assert having
    for page, held in having.items():
        assert None not in held.values(), (page, held)
        assert len({action.dest for action in held.values()}) == 1, page
        assert sum(action.help is not argparse.SUPPRESS for action in held.values()) == 1
        assert f'`{words[0]}`' in PAGE


def test_an_older_word_is_the_same_value_and_leaves_the_default():
    line = ['kernels', 'report', '--num-streams', '2']
    assert whole_parser().parse_args(line).num_streams == [2]
    line = 'recipe show 3b --micro-batch 4'.split()
    assert whole_parser().parse_args(line).micro_batch == 4
    line = 'study 3b --recompute 12 auto'.split()
    assert whole_parser().parse_args(line).recompute == [12, 'auto']
    plain = whole_parser().parse_args(['recompute'])
    assert (plain.num_streams, plain.segments) == (4, ['none', 'auto', 'stage'])
    assert plain.sublayers == [24, 36, 60] and plain.full == 0
